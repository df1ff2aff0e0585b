"""Row blocks of large logits: the same numbers, less memory. What is large is made small here, a row or two a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxce
from jaxce import _cache_blocks, _softmax

from ..helpers import oracle
from ..losses import test_accuracy, test_differentiation, test_statistics

integer_loss = jaxce.softmax_cross_entropy_with_integer_labels


@pytest.fixture
def blocks(monkeypatch):
    """Each row is a block, in the gradient of labels alone too; afterwards, that blocks were used is checked."""
    used, run = [], _cache_blocks._in_row_blocks
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # all arrays here are on one
    monkeypatch.setattr(_cache_blocks, "SMALL", 0)
    monkeypatch.setattr(_cache_blocks, "BLOCK", 0)
    monkeypatch.setattr(_softmax, "_keeps_exponentials", lambda *_: False)
    monkeypatch.setattr(_cache_blocks, "_in_row_blocks", lambda *arguments: used.append(1) or run(*arguments))
    jax.clear_caches()
    yield
    jax.clear_caches()
    assert used


in_blocks = pytest.mark.usefixtures("blocks")


@in_blocks
class TestInBlocks:
    """Tests of the losses, once more."""

    test_confidently_wrong_rows = staticmethod(test_accuracy.test_confidently_wrong_rows_are_exact)
    test_16_bit_logits = staticmethod(test_accuracy.test_16_bit_logits_of_a_large_vocabulary)
    test_targets_of_any_sum = staticmethod(test_accuracy.test_targets_of_any_sum)
    test_nan_stays_in_its_row = staticmethod(test_accuracy.test_nan_stays_in_its_row)
    test_equal_logits = staticmethod(test_accuracy.test_largest_and_equal_logits)
    test_statistics = staticmethod(test_statistics.test_masks_and_ignored_rows)


@in_blocks
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variable", ["logits of labels", "logits and dense"])
@pytest.mark.parametrize("mode", ["value_and_grad", "jvp", "grad of jvp", "rev rev"])
def test_modes(mode, variable):
    modes = {**test_differentiation.FIRST, **test_autodiff_modes.HIGHER}
    test_differentiation.assert_same(modes[mode], variable, lambda losses: lambda v: losses(v) ** 3)


@in_blocks
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["integer", "dense"])
def test_vmap(form):
    test_differentiation.test_vmap_is_the_batched_loss(form, (1, None), 1)


# ------------------------------------------------------------------------------------------- blocks and the whole alike

LEAD, K = (2, 4), 5
OPTIONS = {
    "none": {},
    "everything": {"label_smoothing": 0.1, "class_weights": jnp.arange(1.0, 1 + K), "logit_cap": 3.0, "z_loss": 0.1},
    "mask of classes": {"where": jnp.arange(K).reshape(1, 1, K) != 1},
    "mask of rows": {"where": jnp.arange(8).reshape(LEAD) != 3},
    "mask shared by some rows": {"where": jnp.ones((1, 4, K), bool).at[0, 2, 1].set(False)},
}


@pytest.mark.parametrize(
    "form, options, size",
    [("integer", name, 3) for name in OPTIONS]
    + [("dense", name, 5) for name in OPTIONS]
    + [("dense shared by rows", "everything", 3), ("integer", "none", 1), ("integer", "none", 4)],
)
def test_last_block_and_shared_arguments(monkeypatch, form, options, size):
    """8 rows in blocks of these sizes, with arguments per row, shared by all rows, and (not blocked) shared by some."""
    rng = np.random.default_rng(size)
    logits = jnp.asarray(rng.standard_normal((*LEAD, K)), jnp.float32)
    dense = jnp.asarray(rng.uniform(size=(*(LEAD if form == "dense" else (1, 1)), K)), jnp.float32)
    labels = jnp.asarray(rng.choice([0, 2, 3, 4], LEAD), jnp.int32)
    loss, targets = (integer_loss, labels) if form == "integer" else (jaxce.softmax_cross_entropy, dense)

    def results():
        def weighted(z):
            losses = loss(z, targets, **OPTIONS[options])
            return (losses * jnp.arange(1.0, 9).reshape(LEAD)).sum(), losses

        jax.clear_caches()
        (_, losses), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(logits)
        return losses, gradient, jax.jit(lambda z: loss(z, targets, **OPTIONS[options]))(logits)

    whole = results()
    monkeypatch.setattr(_softmax, "_keeps_exponentials", lambda *_: False)
    monkeypatch.setattr(_cache_blocks, "rows_per_block", lambda _: size)
    for got, wanted in zip(results(), whole, strict=True):
        oracle.assert_close(got, wanted, "float32")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_losses_of_any_size(monkeypatch, size, mapped):
    """About 0 to 170: of the first blocks no maximum is taken, of the last ones it is, and in some rows must be."""
    rows, classes = 46, 300
    rng = np.random.default_rng(size)
    logits, labels = rng.standard_normal((rows, classes)), rng.integers(classes, size=rows)
    logits[np.arange(rows), labels] = logits.max(-1) + 10 - 4 * np.arange(rows)
    logits = logits.astype(np.float32)
    truth = oracle.stable(logits, labels)
    monkeypatch.setattr(_softmax, "_keeps_exponentials", lambda *_: False)
    monkeypatch.setattr(_cache_blocks, "rows_per_block", lambda _: size)
    jax.clear_caches()

    def sum_and_losses(z, y):
        losses = integer_loss(z, y)
        return losses.sum(), losses

    f = jax.grad(sum_and_losses, has_aux=True)
    split = (2, rows // 2) if mapped else (rows,)
    arguments = jnp.asarray(logits).reshape(*split, classes), jnp.asarray(labels).reshape(split)
    gradients, losses = jax.jit(jax.vmap(f) if mapped else f)(*arguments)
    for row, (loss, gradient) in enumerate(zip(losses.ravel(), gradients.reshape(rows, classes), strict=True)):
        oracle.assert_close(gradient, truth.gradient[row], "float32", factor=2)  # two roundings of numbers up to 32
        if truth.loss[row] > 1:  # those near 0 need a better oracle: test_confidently_wrong_rows and the like
            oracle.assert_close(loss, truth.loss[row], "float32")


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_only_large_logits_are_split(one_device):
    def rows(*shape):
        return _cache_blocks.rows_per_block(jnp.zeros(shape, jnp.bfloat16))

    assert rows(1024, 1000) is None and rows(1, 2**25) is None and rows(0, 10) is None
    assert rows(1024, 50257) == 20 and rows(8, 128, 50257) == 20
    assert rows(3, 2**24) == 1


def test_sharded_rows_are_not_split(one_device):
    logits = jnp.zeros((1024, 50257), jnp.bfloat16)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("rows")))
    assert _cache_blocks.rows_per_block(sharded) is None and _cache_blocks.rows_per_block(logits) is not None


def test_several_devices_split_nothing():
    assert jax.device_count() > 1
    assert _cache_blocks.rows_per_block(jnp.zeros((1024, 50257), jnp.bfloat16)) is None


@in_blocks
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map(axis_type):
    """Over one device, where rows are split."""
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.standard_normal((6, K)), jnp.float32), jnp.asarray(rng.integers(K, size=6))
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(axis_type,), devices=jax.devices()[:1])
    spec = PartitionSpec("rows")
    gradient = jax.grad(lambda z, y: integer_loss(z, y).sum())
    arguments = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (logits, labels)]
    got = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))(*arguments)
    oracle.assert_close(got, oracle.stable(np.asarray(logits), np.asarray(labels)).gradient, "float32")


@in_blocks
def test_calls_outside_jit_do_not_compile_again(caplog):
    logits, others, labels = jnp.ones((8, 10)), jnp.zeros((8, 10)), jnp.zeros(8, jnp.int32)
    jax.block_until_ready(jax.value_and_grad(lambda z: integer_loss(z, labels).mean())(logits))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.block_until_ready(jax.value_and_grad(lambda z: integer_loss(z, labels).mean())(others))
    assert not [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
