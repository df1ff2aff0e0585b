"""Heads, x @ w, as compiled: only the matmuls that are needed, and memory of a few blocks."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxce import linear_cross_entropy, linear_label_statistics

from ..helpers import (
    BF16_LOOPS,
    MIB,
    MODES,
    compiled,
    head,
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


@pytest.mark.parametrize("tail", [False, True])
def test_top_k_labels_of_a_head_hold_less_than_two_blocks(tail):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 64), (64, 32000)))
    ids, t = (jax.ShapeDtypeStruct((2048, 64), dtype) for dtype in (jnp.int32, jnp.float32))
    for recompute, differentiated in ((False, (0, 1)), (True, (0, 1)), (False, (0, 1, 3))):

        def loss(x, w, ids, t, recompute=recompute):
            return linear_cross_entropy(x, w, (ids, t), tail=tail, recompute=recompute)

        assert temp_bytes(jax.value_and_grad(loss, differentiated), x, w, ids, t) <= 48 * MIB


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


def test_gradient_of_a_jvp_by_rows_saves_no_more_than_its_arguments():
    """Of 16 blocks it holds 3.3 at once; 4.3, were more than the arguments saved, and on jax 0.10 in any case."""
    x, w, labels = head(2048, 32, 4096)

    def loss(x):
        return linear_cross_entropy(x, w, labels, block_size=128, recompute=False)

    limit = 3.8 if jax.__version_info__ >= (0, 12) else 4.4
    assert temp_bytes(lambda x: jax.grad(lambda x: jax.jvp(loss, (x,), (x,))[1])(x), x) <= limit * BLOCK
