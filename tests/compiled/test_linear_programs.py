"""Heads, x @ w, as compiled: only the matmuls that are needed, and memory of a few blocks."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxce import fused_linear, linear_cross_entropy, linear_label_statistics

from ..helpers import (
    BF16_LOOPS,
    MIB,
    MODES,
    SKIPS,
    compiled,
    dense_loss,
    head,
    integer_loss,
    matmuls,
    temp_bytes,
    temp_bytes_of,
    text_of,
)

by_blocks = pytest.mark.parametrize("recompute", [False, True], ids=["rows", "classes"])


def test_bfloat16_needs_no_accumulator_on_cpu():
    """On jax 0.10 there is a float32 copy of all of w (see `NO_BF16_LOOPS`), but nothing else of its size."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 768), (768, 50257)))
    labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
    memory = temp_bytes(jax.grad(linear_cross_entropy, (0, 1)), x, w, labels)
    assert memory < 4 * w.size * (0.5 if BF16_LOOPS else 1.5)


def test_blocks_of_classes_update_dw_in_place():
    """A block's part of dw is written where it belongs: nothing is added to all of dw, once for each block."""
    x, w, labels = head(8, 16, 3 * 256, jnp.bfloat16)
    loss = partial(linear_cross_entropy, recompute=True, block_size=256)
    text = text_of(jax.value_and_grad(loss, (0, 1)), x, w, labels)
    assert len(re.findall(r"(?:f32|bf16)\[16,768\]\S* dynamic-update-slice\(", text)) == 1
    assert not re.findall(r"(?:f32|bf16)\[16,768\]\S* add\(", text)


@pytest.mark.parametrize(
    ("wanted", "differentiated", "recompute"),
    [
        (1, None, False),
        (2, 0, False),
        (2, 1, False),
        (3, (0, 1), False),
        (1, None, True),
        (3, 0, True),
        (3, 1, True),
        (4, (0, 1), True),
    ],
)
def test_only_the_matmuls_that_are_needed(wanted, differentiated, recompute):
    x, w, labels = head(256, 64, 1024)
    f = partial(linear_cross_entropy, block_size=128, recompute=recompute)
    f = f if differentiated is None else jax.value_and_grad(f, differentiated)
    assert matmuls(text_of(f, x, w, labels)) == wanted


def objective(x, w, labels):
    """Of all the numbers of a row."""
    found = linear_label_statistics(x, w, labels)
    return (jnp.exp(found.log_prob) + 0.1 * found.entropy + 0.01 * found.log_normalizer**2).mean()


def test_statistics_of_a_head_hold_less_than_two_blocks():
    """The logits would be 250 MiB."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 64), (64, 32000)))
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
    for f, dots, limit in ((linear_label_statistics, 1, 40), (jax.value_and_grad(objective, (0, 1)), 4, 48)):
        executable = compiled(f, x, w, labels)
        assert matmuls(executable.as_text()) == dots
        assert temp_bytes_of(executable) <= limit * MIB


@pytest.mark.parametrize(("options", "limit"), [({}, 34), ({"ignore_index": -1}, 34), ({"label_smoothing": 0.1}, 50)])
def test_blocks_of_classes_are_small_on_a_cpu(options, limit):
    x, w, labels = head(2048, 64, 32000)
    loss = partial(linear_cross_entropy, recompute=True, **options)
    assert temp_bytes(jax.value_and_grad(loss, (0, 1)), x, w, labels) <= limit * MIB


@pytest.mark.parametrize("tail", [False, True])
def test_top_k_labels_of_a_head_hold_less_than_two_blocks(tail):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 64), (64, 32000)))
    ids, t = (jax.ShapeDtypeStruct((2048, 64), dtype) for dtype in (jnp.int32, jnp.float32))
    for recompute, differentiated in ((False, (0, 1)), (True, (0, 1)), (False, (0, 1, 3))):

        def loss(x, w, ids, t, recompute=recompute):
            return linear_cross_entropy(x, w, (ids, t), tail=tail, recompute=recompute)

        assert temp_bytes(jax.value_and_grad(loss, differentiated), x, w, ids, t) <= 48 * MIB


def test_the_last_classes_of_dw_are_updated_in_place():
    """A slice of dw at a known index, read by the fusion that updates dw there, would have it copy all of dw."""
    x, w, labels = head(1024, 1024, 1000)  # two tiles, the last one smaller
    text = text_of(jax.grad(partial(linear_cross_entropy, block_size=128, recompute=False), (0, 1)), x, w, labels)
    assert re.search(r"f32\[1024,1000\]\S* dynamic-update-slice\(", text)
    assert not re.search(r" slice\(.*\[0:1024\], \[\d+:1000\]", text)


@by_blocks
def test_no_matmul_reads_a_transposed_x(recompute):
    """dw = xᵀ·δ on a CPU: x is transposed before the loop, not by each matmul, which that makes slow."""
    x, w, labels = head(256, 16, 1024)
    f = partial(linear_cross_entropy, block_size=128, recompute=recompute)
    text = text_of(jax.value_and_grad(f, (0, 1)), x, w, labels)
    assert " dot(" in text and "lhs_contracting_dims={0}" not in text


def test_dx_of_a_block_is_made_transposed():
    """On a CPU w·δᵀ is the faster matmul."""
    x, w, labels = head(256, 16, 1024)
    text = text_of(jax.value_and_grad(partial(linear_cross_entropy, block_size=128, recompute=False)), x, w, labels)
    assert re.findall(r"f32\[16,128\]\S* dot\(", text) and not re.findall(r"f32\[128,16\]\S* dot\(", text)


BLOCK = 128 * 4096 * 4


LIMITS = {"value": 2.2, "value_and_grad": 2.2, "jvp": 3.4, "jvp of grad": 9.2, "grad of grad": 9.2}  # in blocks


@pytest.mark.parametrize("mode", LIMITS)
@by_blocks
def test_memory_is_that_of_a_few_blocks(mode, recompute):
    """Of 16 blocks of the logits; x and w take a quarter of a block each, and have accumulators."""
    x, w, labels = head(2048, 32, 4096)
    block_size = 256 if recompute else 128

    def loss(v):
        x, w = v
        return linear_cross_entropy(x, w, labels, block_size=block_size, recompute=recompute)

    run = loss if mode == "value" else lambda v: MODES[mode](loss, v, v)
    assert temp_bytes(run, (x, w)) <= LIMITS[mode] * BLOCK


FORMS_OF_HEADS: dict[str, Callable] = {
    "rows": partial(linear_cross_entropy, recompute=False, block_size=128),
    "classes": partial(linear_cross_entropy, recompute=True, block_size=256),
    "none": partial(linear_cross_entropy, reduction="none", block_size=256),
    "any loss": fused_linear(integer_loss, block_size=128),
    "any loss, none": fused_linear(integer_loss, reduction="none", block_size=128),
}


def test_blocks_without_a_row_that_counts_are_not_computed():
    x, w, labels = head(1000, 8, 16)
    kept, computed = jnp.arange(1000) % 10 == 3, []

    def loss(logits, labels):
        jax.debug.callback(lambda _: computed.append(1), logits[0, 0])
        return integer_loss(logits, labels)

    def blocks(f, **options):
        computed.clear()
        jax.block_until_ready(jax.jit(partial(f, **options))(x, w, labels))
        jax.effects_barrier()
        return len(computed)

    f = fused_linear(loss, block_size=20)
    for run in (f, jax.value_and_grad(f, (0, 1))):  # and one block whose type alone is used
        assert blocks(run, where=kept) == blocks(run, weights=kept.astype(jnp.float32)) in ((6, 7) if SKIPS else (50,))
        assert blocks(run, where=~kept) in ((46, 47) if SKIPS else (50,))


def test_blocks_of_classes_are_of_the_rows_that_count():
    x, w, labels = head(1600, 8, 256)
    text = text_of(jax.grad(partial(linear_cross_entropy, ignore_index=3, recompute=True), (0, 1)), x, w, labels)
    rows = {"500,256", "1000,256", "1600,256"} if SKIPS else {"1600,256"}
    assert rows <= set(re.findall(r"f32\[(\d+,256)\]\S* dot\(", text))


@by_blocks
def test_rows_left_out_need_at_most_a_copy_of_x(recompute):
    x, w, labels = head(4096, 512, 32000)
    f = jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute), (0, 1))
    masked = partial(f, ignore_index=3)
    copies = 1 if recompute or SKIPS else 5
    assert temp_bytes(masked, x, w, labels) <= temp_bytes(f, x, w, labels) + copies * x.nbytes


def test_row_arguments_are_not_copied():
    """Dense teachers are as large as the logits; 1999 rows make uneven blocks."""
    x, w, _ = head(1999, 32, 4096)
    teacher, f = jnp.ones((1999, 4096)), jax.value_and_grad(fused_linear(dense_loss, block_size=128), (0, 1))
    for options in ({}, {"where": jnp.arange(1999) > 3}):
        assert temp_bytes(partial(f, **options), x, w, teacher) <= 6 * BLOCK


@pytest.mark.parametrize("form", FORMS_OF_HEADS)
def test_a_scan_over_microbatches_needs_no_more_than_the_plain_formula(form):
    """Blocks of rows finish dw in the forward pass: without a checkpoint the scan would keep one for each step."""
    x, w, labels = head((16, 128), 256, 2048)

    def plain(x, w, labels):
        return integer_loss(x @ w, labels).mean()

    f = FORMS_OF_HEADS[form]
    f = jax.checkpoint(f) if form in ("rows", "any loss") else f

    def total(w, f):
        return jax.lax.scan(lambda c, b: (c + f(b[0], w, b[1]).sum(), None), 0.0, (x, labels))[0]

    assert temp_bytes(jax.grad(partial(total, f=f)), w) <= temp_bytes(jax.grad(partial(total, f=plain)), w)


@pytest.mark.parametrize("policy", ["dots_saveable", "everything_saveable", "dots_with_no_batch_dims_saveable"])
@pytest.mark.parametrize("form", FORMS_OF_HEADS)
def test_a_checkpoint_policy_sees_no_matmul_of_a_block(form, policy):
    x, w, labels = head(2048, 32, 4096)
    policy = getattr(jax.checkpoint_policies, policy)

    def total(x, w):
        return FORMS_OF_HEADS[form](x, w, labels).sum()

    assert temp_bytes(jax.grad(jax.checkpoint(total, policy=policy), (0, 1)), x, w) <= 2.7 * BLOCK


def test_gradient_of_a_jvp_by_rows_saves_no_more_than_its_arguments():
    """Of 16 blocks it holds 3.3 at once; 4.3, were more than the arguments saved, and on jax 0.10 in any case."""
    x, w, labels = head(2048, 32, 4096)

    def loss(x):
        return linear_cross_entropy(x, w, labels, block_size=128, recompute=False)

    limit = 3.8 if jax.__version_info__ >= (0, 12) else 4.4
    assert temp_bytes(lambda x: jax.grad(lambda x: jax.jvp(loss, (x,), (x,))[1])(x), x) <= limit * BLOCK
