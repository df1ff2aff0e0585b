"""Row blocks of large logits: the same numbers, less memory. What is large is made small here, a row or two a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxce import _schedule

from ..helpers import (
    LOSSES,
    assert_all_close,
    assert_close,
    integer_loss,
    logits,
    mesh_of,
    on_shards,
    option_sets,
    placed,
    random_labels,
    stable,
)
from ..losses import test_accuracy, test_differentiation, test_edges, test_statistics
from . import test_compilations

# Every internal name that this file knows: a module, and what of it is replaced or called.
SMALL = (_schedule, "SMALL")  # bytes below which all logits are taken at once
BLOCK = (_schedule, "BLOCK")  # bytes of a block
IN_ROW_BLOCKS = (_schedule, "_in_row_blocks")  # what goes through the blocks
ROWS_PER_BLOCK = (_schedule, "rows_per_block")  # how many rows of these logits make a block, or None
KEEPS_EXPONENTIALS = (_schedule, "keeps_exponentials")  # whether the gradient of labels alone goes without blocks


def rows_per_block(logits):
    return getattr(*ROWS_PER_BLOCK)(logits)


@pytest.fixture
def blocks(monkeypatch, one_device):
    """Each row is a block, in the gradient of labels alone too; afterwards, that blocks were used is checked."""
    jax.clear_caches()
    used, run = [], getattr(*IN_ROW_BLOCKS)
    monkeypatch.setattr(*SMALL, 0)
    monkeypatch.setattr(*BLOCK, 0)
    monkeypatch.setattr(*KEEPS_EXPONENTIALS, lambda *_: False)
    monkeypatch.setattr(*IN_ROW_BLOCKS, lambda *arguments: used.append(1) or run(*arguments))
    yield
    jax.clear_caches()
    assert used


@pytest.fixture
def blocks_of(monkeypatch):
    """A function that has blocks be of so many rows from then on."""

    def set_size(size: int) -> None:
        jax.clear_caches()
        monkeypatch.setattr(*KEEPS_EXPONENTIALS, lambda *_: False)
        monkeypatch.setattr(*ROWS_PER_BLOCK, lambda _: size)

    yield set_size
    jax.clear_caches()


in_blocks = pytest.mark.usefixtures("blocks")


@in_blocks
class TestInBlocks:
    """Tests of the losses, once more."""

    test_confidently_wrong_rows = staticmethod(test_accuracy.test_confidently_wrong_rows_are_exact)
    test_16_bit_logits = staticmethod(test_accuracy.test_16_bit_logits_of_a_large_vocabulary)
    test_targets_of_any_sum = staticmethod(test_accuracy.test_targets_of_any_sum)
    test_nan_stays_in_its_row = staticmethod(test_edges.test_row_without_a_finite_maximum_is_nan)
    test_equal_logits = staticmethod(test_accuracy.test_largest_and_equal_logits)
    test_statistics = staticmethod(test_statistics.test_masks_and_ignored_rows)

    @pytest.mark.parametrize("form", ["integer", "cap", "dense", "statistics"])
    def test_no_compilation(self, form, caplog):
        test_compilations.test_calls_outside_jit_do_not_compile_again(test_compilations.EAGER[form], caplog)


@in_blocks
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variable", ["logits of labels", "logits and dense"])
@pytest.mark.parametrize("mode", ["value_and_grad", "jvp", "grad of jvp", "jacrev of jacrev"])
def test_modes(mode, variable):
    test_differentiation.assert_same(mode, variable, test_differentiation.cubed)


@in_blocks
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["integer", "dense"])
def test_vmap(form):
    test_differentiation.test_vmap_is_the_batched_loss(form, (1, None), 1)


# ------------------------------------------------------------------------------------------- blocks and the whole alike

LEAD, K = (2, 4), 5
SETS = option_sets(K)
OPTIONS = {
    "none": SETS["none"],
    "everything": SETS["all"],
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
def test_last_block_and_shared_arguments(blocks_of, form, options, size):
    """8 rows in blocks of these sizes, with arguments per row, shared by all rows, and (not blocked) shared by some."""
    rng = np.random.default_rng(size)
    z = logits(*LEAD, K, seed=size)
    dense = jnp.asarray(rng.uniform(size=(*(LEAD if form == "dense" else (1, 1)), K)), jnp.float32)
    labels = jnp.asarray(rng.choice([0, 2, 3, 4], LEAD), jnp.int32)
    loss, targets = (LOSSES["integer"], labels) if form == "integer" else (LOSSES["dense"], dense)

    def results():
        def weighted(z):
            losses = loss(z, targets, **OPTIONS[options])
            return (losses * jnp.arange(1.0, 9).reshape(LEAD)).sum(), losses

        (_, losses), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(z)
        return losses, gradient, jax.jit(lambda z: loss(z, targets, **OPTIONS[options]))(z)

    whole = results()
    blocks_of(size)
    assert_all_close(results(), whole)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
def test_losses_of_any_size(blocks_of, size, mapped):
    """About 0 to 170: of the first blocks no maximum is taken, of the last ones it is, and in some rows must be."""
    rows, classes = 46, 300
    z, labels = np.array(logits(rows, classes, seed=size)), np.asarray(random_labels(rows, classes=classes, seed=size))
    z[np.arange(rows), labels] = z.max(-1) + 10 - 4 * np.arange(rows)
    truth = stable(z, labels)
    blocks_of(size)

    def sum_and_losses(z, y):
        losses = integer_loss(z, y)
        return losses.sum(), losses

    f = jax.grad(sum_and_losses, has_aux=True)
    split = (2, rows // 2) if mapped else (rows,)
    arguments = jnp.asarray(z).reshape(*split, classes), jnp.asarray(labels).reshape(split)
    gradients, losses = jax.jit(jax.vmap(f) if mapped else f)(*arguments)
    for row, (loss, gradient) in enumerate(zip(losses.ravel(), gradients.reshape(rows, classes), strict=True)):
        assert_close(gradient, truth.gradient[row], "float32", factor=2)  # two roundings of numbers up to 32
        if truth.loss[row] > 1:  # those near 0 need a better oracle: test_confidently_wrong_rows and the like
            assert_close(loss, truth.loss[row], "float32")


# ----------------------------------------------------------------------------------------------------------- the choice


def test_only_large_logits_are_split(one_device):
    def rows(*shape):
        return rows_per_block(jnp.zeros(shape, jnp.bfloat16))

    assert rows(1024, 1000) is None and rows(1, 2**25) is None and rows(0, 10) is None
    assert rows(1024, 50257) == 20 and rows(8, 128, 50257) == 20
    assert rows(3, 2**24) == 1


def test_sharded_rows_are_not_split(one_device):
    z = jnp.zeros((1024, 50257), jnp.bfloat16)
    sharded = placed(mesh_of((2,), ("rows",), AxisType.Explicit), z, P("rows"))
    assert rows_per_block(sharded) is None and rows_per_block(z) is not None


def test_several_devices_split_nothing():
    assert jax.device_count() > 1
    assert rows_per_block(jnp.zeros((1024, 50257), jnp.bfloat16)) is None


@in_blocks
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_inside_shard_map(axis_type):
    """Over one device, where rows are split."""
    z, labels, spec = logits(6, K), random_labels(6, classes=K), P("rows")
    mesh = mesh_of((1,), ("rows",), axis_type)
    gradient = jax.grad(lambda z, y: integer_loss(z, y).sum())
    got = jax.jit(on_shards(gradient, mesh, spec, spec))(*placed(mesh, (z, labels), (spec, spec)))
    assert_close(got, stable(np.asarray(z), np.asarray(labels)).gradient, "float32")
