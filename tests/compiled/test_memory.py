"""Temp memory of compiled losses, what is kept for the backward, and page faults.

The memory of heads, x @ w, is in `test_linear_programs`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jaxce

from ..helpers import (
    BF16_LOOPS,
    MIB,
    NO_BF16_LOOPS,
    compiled,
    dense_loss,
    head,
    integer_loss,
    logits,
    random_labels,
    row_arguments,
    temp_bytes,
    temp_bytes_of,
    text_of,
)

LARGE = (1024, 50257)


@jax.custom_vjp
def bare_loss(logits, labels):
    """The rule alone, for labels and nothing else, with the same exact numerics: the measure of what a loss costs."""
    return bare_forward(logits, labels)[0]


def bare_forward(logits, labels):
    logits, label_logit = label_logit_first(logits, labels)
    z = logits.astype(jnp.float32)
    m = z.max(-1)
    rest = jnp.where(is_label(labels, z), 0, jnp.exp(z - m[:, None])).sum(-1)
    log_sum = jnp.log1p(rest + jnp.expm1(label_logit - m))
    return (m - label_logit) + log_sum, (logits, labels, m, log_sum)


def bare_backward(residuals, g):
    logits, labels, m, log_sum = residuals
    logits, label_logit = label_logit_first(logits, labels)
    z, q = logits.astype(jnp.float32), jnp.expm1((label_logit - m) - log_sum)
    y = is_label(labels, z)
    e = jnp.where(y, 0, jnp.exp(z - m[:, None]))
    dz = jnp.where(y, (g * q)[:, None], (g * jnp.exp(-log_sum))[:, None] * e)
    return dz.astype(logits.dtype), None


def label_logit_first(logits, labels):
    label_logit = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0].astype(jnp.float32)
    return jax.lax.optimization_barrier((logits, label_logit))


def is_label(labels, z):
    return jax.lax.broadcasted_iota(labels.dtype, z.shape, 1) == labels[:, None]


bare_loss.defvjp(bare_forward, bare_backward)


def gradient_of(loss):
    return lambda logits, labels: jax.value_and_grad(lambda z: loss(z, labels).mean())(logits)


def assert_at_most(temp: int, limit: int, bare: int) -> None:
    """Within the limit, or within what the bare rule needs where XLA's own reductions need more than the limit."""
    assert temp <= limit or temp <= bare + 4096, f"temp {temp / MIB:.3f} MiB, the bare rule {bare / MIB:.3f} MiB"


# -------------------------------------------------------------------------------------------------------------- memory


def test_large_vocabulary_needs_no_temporary():
    """No one-hot, no probabilities, no second copy of the logits: 196 MiB each."""
    ours, bare = (temp_bytes(gradient_of(loss), *row_arguments(LARGE)) for loss in (integer_loss, bare_loss))
    assert_at_most(ours, MIB, bare)


def test_loss_alone_needs_what_the_bare_rule_needs():
    arguments = row_arguments(LARGE)
    assert_at_most(temp_bytes(integer_loss, *arguments), MIB, temp_bytes(bare_loss, *arguments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scan_over_microbatches_needs_what_the_bare_rule_needs(dtype):
    """Forward and backward are apart there: what the loss keeps for the backward would be stacked over the scan."""
    steps, rows, classes = 8, 64, 1000
    w = jax.ShapeDtypeStruct((16, classes), jnp.dtype(dtype))
    x = jax.ShapeDtypeStruct((steps, rows, 16), jnp.dtype(dtype))
    labels = jax.ShapeDtypeStruct((steps, rows), jnp.int32)

    def total(loss, w, x, labels):
        def step(sum_, batch):
            x, labels = batch
            return sum_ + loss(jnp.matmul(x, w), labels).mean(), None

        return jax.lax.scan(step, jnp.float32(0), (x, labels))[0]

    ours, bare = (
        temp_bytes(jax.value_and_grad(functools.partial(total, loss)), w, x, labels)
        for loss in (integer_loss, bare_loss)
    )
    slack = steps * rows * 2 * 4 + 4096  # a number or two per row
    assert ours <= bare + slack, f"{ours} bytes, the bare rule {bare}"


@pytest.mark.parametrize("tail", [False, True])
def test_top_k_labels_leave_little(tail, one_device):
    """Neither a second array of the logits' shape nor one with M times as many numbers."""
    z, ids, t = (jax.ShapeDtypeStruct((1024, k), d) for k, d in ((50257, "float32"), (64, "int32"), (64, "float32")))

    def loss(z, ids, t):
        return jaxce.softmax_cross_entropy_with_top_k_labels(z, ids, t, tail=tail).mean()

    # The comparisons of ids [N, M, M] are live in the loss alone only. A loop over M has 5 to 9 MiB, in 64 GPU kernels.
    for f, limit in ((loss, 17), (jax.value_and_grad(loss), 16), (jax.value_and_grad(loss, (0, 2)), 16)):
        assert temp_bytes(f, z, ids, t) <= limit * MIB


def residuals(f, *arguments) -> list[jax.Array]:
    """What is kept for the backward: the leaves of the function that `jax.vjp` returns, each array once."""
    pullback = jax.vjp(f, *arguments)[1]
    return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_residuals_of_integer_labels(dtype):
    """The logits in their own dtype, the labels, and two numbers per row."""
    z, labels = logits(32, 100, dtype=dtype), random_labels(32, classes=100)
    kept = residuals(lambda z: integer_loss(z, labels), z)
    large = [r for r in kept if r.size >= z.size]
    assert [(r.shape, r.dtype) for r in large] == [(z.shape, z.dtype)]
    numbers = [r for r in kept if r.size < z.size and jnp.issubdtype(r.dtype, jnp.floating)]
    integers = [r for r in kept if jnp.issubdtype(r.dtype, jnp.integer)]
    assert sum(r.size for r in numbers) <= 2 * 32
    assert sum(r.size for r in integers) <= 32
    assert len(large) + len(numbers) + len(integers) == len(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residuals_of_dense_targets(dtype):
    """Logits and targets in their own dtypes, and three numbers per row."""
    z, targets = jnp.ones((32, 100), dtype), jnp.full((32, 100), 0.01, jnp.bfloat16)
    kept = residuals(dense_loss, z, targets)
    large = [r for r in kept if r.size >= z.size]
    assert sorted(str(r.dtype) for r in large) == sorted([dtype, "bfloat16"])
    assert sum(r.size for r in kept if r.size < z.size) <= 3 * 32


def test_residuals_of_a_head_by_classes():
    """x and w once, and numbers per row."""
    x, w, labels = head(32, 100, 300)
    for loss in (
        lambda x, w: jaxce.linear_cross_entropy(x, w, labels, recompute=True, block_size=128),
        lambda x, w: jaxce.linear_label_statistics(x, w, labels, block_size=128)[:3],
    ):
        kept = residuals(loss, x, w)
        assert sorted(r.shape for r in kept if r.size >= x.size) == [x.shape, w.shape]
        assert sum(r.size for r in kept if r.size < x.size) <= 10 * 32


@pytest.mark.parametrize("in_axes", [(0, 0), (1, 1), (2, 0), (0, None), (None, 0)], ids=str)
def test_vmap_needs_at_most_one_array_to_move_its_axes(in_axes):
    batch, rows, classes = 4, 64, 2000
    shapes = []
    for axis, dtype, shape in zip(in_axes, ("float32", "int32"), ((rows, classes), (rows,)), strict=True):
        shape = shape if axis is None else (*shape[:axis], batch, *shape[axis:])
        shapes.append(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
    assert temp_bytes(jax.vmap(integer_loss, in_axes), *shapes) <= 4 * batch * rows * classes + MIB


def test_capped_logits_are_capped_once():
    """The label's logit is read before the exponentials, and no barrier for that has all logits capped again."""
    z, labels = row_arguments((1024, 1000))
    capped = functools.partial(integer_loss, logit_cap=30.0)
    assert temp_bytes(gradient_of(capped), z, labels) <= 4 * 1024 * 1000 + MIB


# ------------------------------------------------------------------------------ large logits on one CPU, in row blocks


def dense_gradient(logits, targets):
    return jax.value_and_grad(lambda z: dense_loss(z, targets).mean())(logits)


def smoothed(logits, labels):
    return integer_loss(logits, labels, label_smoothing=0.1)


# What is computed, the shape and dtype of the logits, the most temp memory in MiB.
LARGE_CASES = {
    # One block of exponentials; two, if XLA took the second pass, which few rows need, out of the loop that skips it.
    "gradient": (gradient_of(integer_loss), LARGE, "float32", 5),
    "gradient, bf16": (gradient_of(integer_loss), LARGE, "bfloat16", 8),
    "gradient, bf16, more": (gradient_of(integer_loss), (8192, 32000), "bfloat16", 16),
    "gradient of dense targets": (dense_gradient, LARGE, "float32", 16),
    "gradient of dense targets, bf16": (dense_gradient, LARGE, "bfloat16", 16),
    "loss": (integer_loss, LARGE, "float32", 8),
    "loss, bf16": (integer_loss, LARGE, "bfloat16", 8),
    "loss, smoothed": (smoothed, LARGE, "float32", 16),
    "statistics": (jaxce.label_statistics, LARGE, "float32", 16),
}


GRADIENTS = tuple(name for name in LARGE_CASES if "gradient" in name)


def program_of(name: str, donated: bool = False):
    f, shape, dtype, _ = LARGE_CASES[name]
    z, labels = row_arguments(shape, dtype)
    if dtype == "bfloat16" and not BF16_LOOPS:
        pytest.skip(NO_BF16_LOOPS)
    targets = jax.ShapeDtypeStruct(shape, jnp.float32) if "dense" in name else labels
    return compiled(f, z, targets, donate_argnums=(0,) if donated else ())


@pytest.mark.parametrize(
    "name, donated", [(name, False) for name in LARGE_CASES] + [(name, True) for name in GRADIENTS]
)
def test_large_logits_leave_no_temporary(name, donated, one_device):
    """The gradient is made where the logits were, if these are donated, and is all that is made of their size.

    On jax 0.10, of float32 logits and labels, the exponentials are made too, and then scaled in place.
    """
    _, shape, _, limit = LARGE_CASES[name]
    program = program_of(name, donated)
    temp = temp_bytes_of(program)
    assert temp <= limit * MIB, f"{temp / MIB:.1f} MiB"
    made = large_buffers(program.as_text(), shape[0] * shape[1])
    scaled = name == "gradient" and jax.__version_info__[:2] == (0, 10)
    assert len(made) == ("gradient" in name) + scaled, made


def large_buffers(text: str, size: int) -> list[str]:
    """The arrays of at least `size` numbers that instructions make; inside of fusions, none has a buffer."""
    made, fused = [], False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = "fused" in line or "region" in line
        found = re.match(r"\s+(?:ROOT )?%?\S+ = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if not found or fused:
            continue
        dtype, shape, operation = found.groups()
        names_only = operation in ("parameter", "get-tuple-element", "bitcast", "while", "tuple")
        if math.prod(map(int, shape.split(","))) >= size and not names_only:
            made.append(f"{operation} {dtype}[{shape}]")
    return made


@pytest.mark.parametrize("name", ["gradient", "gradient, bf16", "gradient of dense targets", "loss", "statistics"])
def test_large_logits_fault_no_pages_but_the_gradients(name, one_device):
    """What is not seen by the compiler's count of temporaries, as scratch inside of its kernels, is seen here."""
    resource = pytest.importorskip("resource", reason="there are no page faults to count on this platform")
    _, shape, dtype, _ = LARGE_CASES[name]
    run = program_of(name)
    targets = jnp.zeros(shape) if "dense" in name else jnp.zeros(shape[:1], jnp.int32)
    arguments = jnp.zeros(shape, dtype), targets
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        out = jax.block_until_ready(run(*arguments))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del out
    gradient = arguments[0].nbytes if "gradient" in name else 0
    # What is temporary is a fresh buffer too, when the allocator did not keep the last one.
    assert min(faults) * resource.getpagesize() <= gradient + temp_bytes_of(run) + MIB


def test_gradient_of_narrow_rows_is_made_of_their_exponentials(one_device):
    """Of fewer than 128 classes, exp is taken once for the loss and its gradient, and so there are no blocks."""
    text = text_of(gradient_of(integer_loss), *row_arguments((2**18, 100)))
    assert len(re.findall(r"f32\[\d+,100\]\S* exponential\(", text)) == 1 and " while(" not in text


@pytest.mark.parametrize("mapped", [False, True])
def test_a_maximum_is_taken_at_a_second_look_only(mapped, one_device):
    """The second loop, in the loop over blocks, runs for those that have a row whose loss is large."""
    shape = (2, 512, 50257) if mapped else LARGE
    text = text_of(jax.vmap(integer_loss) if mapped else integer_loss, *row_arguments(shape))
    assert len(re.findall(r" while\(", text)) == 2
