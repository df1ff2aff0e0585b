"""fused_linear and linear_cross_entropy against the formulas with all the logits, in float64."""

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import fused_linear, linear_cross_entropy

from ..helpers.oracle import BF16_LOOPS, NO_BF16_LOOPS, TOLERANCE

IGNORED = -100
BLOCKED_OVER = pytest.mark.parametrize("recompute", [False, True], ids=["rows", "classes"])


def assert_close(got, wanted, tolerance=None):
    """Each leaf, relative to the largest number of the truth."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        bound = (TOLERANCE[jnp.dtype(g.dtype)] if tolerance is None else tolerance) * np.abs(w).max(initial=1e-300)
        np.testing.assert_array_less(np.abs(np.asarray(g, np.float64) - np.asarray(w, np.float64)), max(bound, 1e-300))


def problem(rows, features, classes, dtype: Any = np.float32, seed=0):
    """x, w, labels, with logits of standard deviation 1."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, features)), dtype)
    w = jnp.asarray(rng.standard_normal((features, classes)) / features**0.5, dtype)
    return x, w, jnp.asarray(rng.integers(classes, size=rows), jnp.int32)


def truth(x, w, labels, scale=None):
    """Loss, dx and dw of Σ scale·loss in NumPy float64; scale: by default that of the mean."""
    x, w, labels = np.asarray(x, np.float64), np.asarray(w, np.float64), np.asarray(labels)
    rows = np.arange(len(x))
    scale = np.full(len(x), 1 / max(1, len(x))) if scale is None else scale
    e = np.exp(x @ w)
    o = e / e.sum(-1, keepdims=True)
    loss = -(scale * np.log(o[rows, labels])).sum()
    o[rows, labels] -= 1
    dz = scale[:, None] * o
    return loss, (dz @ w.T, x.T @ dz)


# Every mode of differentiation, with every option


def all_options(x, w, bias, weights, class_weights, cap, smoothing, z_loss, *, labels, reduction):
    z = cap * jnp.tanh((x @ w + bias[None]) / cap)
    kept = labels != IGNORED
    labels = jnp.where(kept, labels, 0)
    t = (1 - smoothing) * jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype) + smoothing / z.shape[1]
    lse = jax.nn.logsumexp(z, -1)
    loss = (class_weights[None] * t * (lse[:, None] - z)).sum(1) + z_loss * lse**2
    loss = jnp.where(kept, weights * loss, 0)
    return loss.sum() / jnp.where(kept, weights * class_weights[labels], 0).sum() if reduction == "mean" else loss


def ours_all_options(x, w, bias, weights, class_weights, cap, smoothing, z_loss, *, class_axis, **options):
    return linear_cross_entropy(
        x,
        w if class_axis == -1 else w.T,
        bias=bias,
        weights=weights,
        class_weights=class_weights,
        logit_cap=cap,
        label_smoothing=smoothing,
        z_loss=z_loss,
        ignore_index=IGNORED,
        class_axis=class_axis,
        **options,
    )


def any_loss(logits, labels, scale, *, shift, center):
    """Closes over a floating and an integer array; not a cross-entropy."""
    picked = jnp.take_along_axis(logits, ((labels + shift) % logits.shape[-1])[:, None], -1)[:, 0]
    return scale * jax.nn.logsumexp(logits - center[None], -1) - picked**2


def modes(f, point, direction):
    every = tuple(range(len(point)))
    gradient = jax.grad(f, every)

    def squares(*v):
        return sum((g * g).sum() for g in gradient(*v))

    def doubled(x):
        return jax.tree.map(lambda a: a[None] * jnp.array([1.0, 2.0]).reshape(2, *[1] * a.ndim), x)

    return {
        "grad": lambda: gradient(*point),
        "jvp": lambda: jax.jvp(f, point, direction),
        "jacfwd": lambda: jax.jacfwd(f, 1)(*point),
        "forward over reverse": lambda: jax.jvp(gradient, point, direction),
        "reverse over reverse": lambda: jax.grad(squares, every)(*point),
        "reverse over forward": lambda: jax.grad(lambda *v: jax.jvp(f, v, direction)[1], every)(*point),
        "hessian of bias": lambda: jax.hessian(f, 2)(*point),
        "vmap over x": lambda: jax.vmap(jax.grad(f, (0, 1)), (0, *[None] * (len(point) - 1)))(
            doubled(point[0]), *point[1:]
        ),
        "vmap over heads": lambda: jax.vmap(jax.grad(f, (0, 1)), (None, 0, *[None] * (len(point) - 2)))(
            point[0], doubled(point[1]), *point[2:]
        ),
        "checkpoint": lambda: jax.grad(jax.checkpoint(f), every)(*point),
        "scan": lambda: jax.grad(
            lambda w: jax.lax.scan(lambda c, x: (c + f(x, w, *point[2:]), None), 0.0, doubled(point[0]))[0]
        )(point[1]),
    }


MODES = (
    "grad, jvp, jacfwd, forward over reverse, reverse over reverse, reverse over forward, hessian of bias, "
    "vmap over x, vmap over heads, checkpoint, scan"
).split(", ")


# By default every mode by blocks of rows of any loss, and nearly every one by blocks of classes, in either reduction.
QUICK_ROWS = ("grad", "jvp", "forward over reverse", "reverse over reverse", "vmap over x")
QUICK_NONE = ("jvp", "reverse over forward", "scan", "vmap over x")
QUICK_CLASSES = ("grad", "forward over reverse", "reverse over reverse", "vmap over heads", "checkpoint")


def each_mode(*variants):
    """Each mode with each of (its quick modes, other parameters); the rest is slow."""
    return [
        pytest.param(mode, *rest, marks=() if mode in quick else pytest.mark.slow)
        for quick, *rest in variants
        for mode in MODES
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mode", "reduction", "recompute", "class_axis", "block_size"),
    each_mode(
        (QUICK_ROWS, "mean", False, -1, 3), (QUICK_CLASSES, "mean", True, 0, 128), (QUICK_NONE, "none", True, -1, 128)
    ),
)
def test_cross_entropy_in_every_mode(mode, reduction, recompute, class_axis, block_size):
    rng = np.random.default_rng(1)
    x, w, labels = problem(5, 3, 130, np.float64)
    labels = labels.at[:3].set(jnp.array([IGNORED, 129, 128], jnp.int32))
    others = [rng.uniform(0.5, 1, shape) for shape in ((130,), (5,), (130,))] + [2.0, 0.1, 0.01]
    point = tuple(jnp.asarray(v) for v in (x, w, *others))
    direction = tuple(jnp.asarray(rng.standard_normal(v.shape)) for v in point)
    combine = jnp.asarray(rng.standard_normal(5))
    naive = partial(all_options, labels=labels, reduction=reduction)
    options = {"recompute": recompute, "class_axis": class_axis, "block_size": block_size}
    ours = partial(ours_all_options, labels=labels, reduction=reduction, **options)

    def scalar(f):
        return f if reduction == "mean" else lambda *v: jnp.sum(combine * f(*v))

    results = [jax.jit(modes(scalar(f), point, direction)[mode])() for f in (ours, naive)]
    assert_close(*results, tolerance=1e-11)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("mode", "reduction"), each_mode((MODES, "mean"), (QUICK_NONE, "none")))
def test_any_loss_in_every_mode(mode, reduction):
    rng = np.random.default_rng(2)
    x, w, labels = problem(7, 3, 5, np.float64)
    point = (x, w, *(jnp.asarray(rng.uniform(0.5, 1, shape)) for shape in ((5,), (7,), (5,), (7,))))
    direction = tuple(jnp.asarray(rng.standard_normal(v.shape)) for v in point)

    def ours(x, w, bias, scale, center, weights):
        loss = partial(any_loss, shift=jnp.cumsum(labels)[0], center=center)
        f = fused_linear(loss, reduction=reduction, block_size=3)
        return f(x, w, labels, scale, bias=bias, weights=weights).sum()

    def naive(x, w, bias, scale, center, weights):
        losses = weights * any_loss(x @ w + bias[None], labels, scale, shift=labels[0], center=center)
        return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()

    results = [jax.jit(modes(f, point, direction)[mode])() for f in (ours, naive)]
    assert_close(*results, tolerance=1e-11)


# Sizes and dtypes


def sizes(quick, slow):
    return [*quick, *(pytest.param(*size, marks=pytest.mark.slow) for size in slow)]


@pytest.mark.parametrize(
    ("rows", "recompute"),
    sizes(
        [(n, False) for n in (0, 1, 127, 128, 129, 391)] + [(0, True), (391, True)],
        [(n, True) for n in (1, 127, 128, 129)],
    ),
)
def test_any_number_of_rows(recompute, rows):
    x, w, labels = problem(rows, 33, 300)
    loss = partial(linear_cross_entropy, block_size=128, recompute=recompute)
    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x, w, labels)
    assert_close(got, wanted, 1e-6)
    assert_close(grads, wanted_grads, 2e-6)


# Blocks of classes end at multiples of 128; blocks of rows take all classes, whose number matters little there.
BLOCKED_CLASSES = [(n, axis, True) for n in (1, 129, 2049) for axis in (-1, 0)]
BLOCKED_CLASSES += [(2, -1, True), (127, 0, True), (128, -1, True), (300, 0, True)]
QUICK_SIZES = BLOCKED_CLASSES + [(1, -1, False), (2, 0, False), (300, -1, False), (2049, 0, False)]
EVERY_SIZE = itertools.product([1, 2, 127, 128, 129, 300, 2049], [-1, 0], [False, True])


@pytest.mark.parametrize(
    ("classes", "class_axis", "recompute"), sizes(QUICK_SIZES, [s for s in EVERY_SIZE if s not in QUICK_SIZES])
)
def test_any_number_of_classes(recompute, class_axis, classes):
    x, w, labels = problem(37, 7, classes)
    block_size = 128 if recompute else 16

    def loss(x, w):
        w = w if class_axis else w.T
        return linear_cross_entropy(x, w, labels, class_axis=class_axis, block_size=block_size, recompute=recompute)

    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    wanted, wanted_grads = truth(x, w, labels)
    assert abs(got - wanted) <= 1e-6 * max(wanted, 1e-30)
    assert_close(grads, wanted_grads, 2e-6 if classes > 1 else 1)


@BLOCKED_OVER
def test_default_blocks_of_a_large_head(recompute):
    x, w, labels = problem(67, 65, 50257)
    got, grads = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute), (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x, w, labels)
    assert_close(got, wanted, 1e-6)
    assert_close(grads, wanted_grads, 2e-6)


@pytest.mark.parametrize("options", [{"block_size": 256}, {"recompute": True}], ids=["rows", "classes"])
@pytest.mark.parametrize("rows", [1000, 65536])
def test_bfloat16_is_accumulated_in_float32(options, rows):
    x, w, labels = problem(rows, 16, 130, jnp.bfloat16)
    got, (_, dw) = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, **options), (0, 1)))(x, w, labels)
    wanted, (_, wanted_dw) = truth(x, w, labels)
    assert_close(got, wanted, 1e-5)
    rounding = np.abs(np.asarray(wanted_dw.astype(jnp.bfloat16), np.float64) - wanted_dw).max()
    error = np.abs(np.asarray(dw, np.float64) - wanted_dw).max()
    assert dw.dtype == jnp.bfloat16
    assert error <= rounding + np.abs(wanted_dw).max() / 256


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.value_and_grad(f, (0, 1)),
        lambda f: lambda x, w: jax.jvp(f, (x, w), (x, w)),
        lambda f: lambda x, w: jax.jvp(jax.grad(f, (0, 1)), (x, w), (x, w)),
        lambda f: lambda x, w: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(x, jnp.stack([w, -w])),
    ],
    ids=["grad", "jvp", "forward over reverse", "vmap over heads"],
)
def test_what_is_blocked_by_platform(transform):
    """A narrow w and no block_size: rows, or on CPU classes, in every mode."""
    x, w, labels = problem(64, 16, 130, jnp.bfloat16)

    def run(**options):
        return jax.jit(transform(partial(linear_cross_entropy, labels=labels, **options)))(x, w)

    got, wanted = jax.tree.map(lambda a: a.astype(jnp.float32), (run(), run(block_size=32)))
    assert_close(got, wanted, 1 / 64)


# There the float32 copy of all of w alone is over the bound, by classes as by rows: 210 MiB on jax 0.10, here 64.
@pytest.mark.skipif(not BF16_LOOPS, reason=NO_BF16_LOOPS)
def test_bfloat16_needs_no_accumulator_on_cpu():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 768), (768, 50257)))
    labels = jax.ShapeDtypeStruct((1024,), jnp.int32)
    memory = compiled(jax.grad(linear_cross_entropy, (0, 1)), x, w, labels).memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 * w.size / 2


@BLOCKED_OVER
def test_float32_parameters_with_bfloat16_matmuls(recompute):
    x, w, labels = problem(64, 16, 130)
    loss = partial(linear_cross_entropy, recompute=recompute, dtype=jnp.bfloat16)
    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), labels)
    assert {g.dtype for g in grads} == {jnp.dtype("float32")}
    assert_close(got, wanted, 1e-5)
    assert_close(grads, wanted_grads, 1 / 256)


@BLOCKED_OVER
def test_confident_rows_are_exact(recompute):
    margins = np.array([15.0, 30.0, 60.0], np.float32)
    w = jnp.eye(3, 140)
    x = jnp.asarray(np.diag(margins))
    f = jax.jit(partial(linear_cross_entropy, reduction="none" if recompute else "sum"))
    losses = jnp.stack([f(x[i : i + 1], w, jnp.array([i])).sum() for i in range(3)])
    wanted = np.log1p(139 * np.exp(-margins.astype(np.float64)))
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    # Row i of w has nothing but its label's logit, so dx_ii is the gradient there, o − 1.
    dx = jax.jit(jax.grad(lambda x: f(x, w, jnp.arange(3)).sum()))(x)
    np.testing.assert_allclose(np.diagonal(dx), np.expm1(-wanted), rtol=2e-6)


# Reductions, masks, invalid labels


@BLOCKED_OVER
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_to_average_is_zero(recompute, rows):
    x, w, _ = problem(rows, 3, 5)
    labels = jnp.full(rows, IGNORED)
    loss = partial(linear_cross_entropy, ignore_index=IGNORED, recompute=recompute)
    value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for weights in (None, jnp.ones(rows), jnp.zeros(rows)):
        got = value_and_gradients(x, w, labels, weights=weights)
        assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(got))


@BLOCKED_OVER
def test_ignored_rows_are_as_if_left_out_whatever_they_hold(recompute):
    x, w, labels = problem(9, 3, 5)
    kept = jnp.arange(9) % 3 != 1
    x, labels = jnp.where(kept[:, None], x, jnp.nan), jnp.where(kept, labels, IGNORED)
    loss = partial(linear_cross_entropy, ignore_index=IGNORED, recompute=recompute)
    got, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels)
    wanted, (wanted_dx, wanted_dw) = truth(x[kept], w, labels[kept])
    assert_close((got, dx[kept], dw), (wanted, wanted_dx, wanted_dw))
    assert (np.asarray(dx[~kept]) == 0).all()


@BLOCKED_OVER
def test_an_invalid_label_is_nan(recompute):
    x, w, labels = problem(4, 3, 5)
    value_and_dx = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute)))
    for class_weights in (None, jnp.ones(5)):
        for label in (-1, 5, -100, 2**30):
            got, dx = value_and_dx(x, w, labels.at[2].set(label), class_weights=class_weights)
            assert np.isnan(got)
            assert np.isnan(dx[2]).all()


def test_blocks_of_classes_update_dw_in_place():
    """A block's part of dw is written where it belongs: nothing is added to all of dw, once for each block."""
    x, w, labels = problem(8, 16, 3 * 256, jnp.bfloat16)
    loss = partial(linear_cross_entropy, recompute=True, block_size=256)
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, labels).compile().as_text()
    assert text is not None
    assert len(re.findall(r"(?:f32|bf16)\[16,768\]\S* dynamic-update-slice\(", text)) == 1
    assert not re.findall(r"(?:f32|bf16)\[16,768\]\S* add\(", text)


@BLOCKED_OVER
def test_gradient_accumulation_equals_one_batch(recompute):
    x, w, labels = problem(12, 3, 5)
    labels = labels.at[:5].set(IGNORED)  # the halves have 1 and 6 tokens
    loss = partial(linear_cross_entropy, ignore_index=IGNORED, recompute=recompute)
    dw = jax.jit(jax.grad(loss, 1))
    parts = [dw(x[i : i + 6], w, labels[i : i + 6], normalizer=7) for i in (0, 6)]
    assert_close(parts[0] + parts[1], dw(x, w, labels))


def test_reductions_agree_and_leading_axes_are_kept():
    x, w, labels = problem(12, 3, 5)
    x, labels = x.reshape(2, 6, 3), labels.reshape(2, 6)
    weights = jnp.linspace(0, 1, 12).reshape(2, 6)
    losses = linear_cross_entropy(x, w, labels, weights=weights, reduction="none")
    assert losses.shape == (2, 6)
    assert_close(linear_cross_entropy(x, w, labels, weights=weights, reduction="sum"), losses.sum())
    assert_close(linear_cross_entropy(x, w, labels, weights=weights), losses.sum() / weights.sum())
    assert_close(linear_cross_entropy(x, w, labels, weights=weights, normalizer=4.0), losses.sum() / 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_aux_is_returned_per_row_and_not_differentiated(reduction):
    x, w, labels = problem(12, 3, 5)

    def loss(logits, labels):
        aux = {"best": logits.argmax(-1), "logits": logits[:, :2]}
        return jax.nn.logsumexp(logits, -1), aux

    f = fused_linear(loss, has_aux=True, reduction=reduction, block_size=5)

    def summed(x, w):
        total, aux = f(x, w, labels.reshape(2, 6))
        return total.sum() + aux["logits"].sum(), aux

    (_, aux), dx = jax.jit(jax.value_and_grad(summed, has_aux=True))(x.reshape(2, 6, 3), w)
    assert_close(aux["logits"], (x @ w).reshape(2, 6, 5)[..., :2])
    np.testing.assert_array_equal(aux["best"], (x @ w).argmax(-1).reshape(2, 6))
    wanted = jax.grad(lambda x: jax.nn.logsumexp(x @ w, -1).sum() / (12 if reduction == "mean" else 1))(x)
    assert_close(dx.reshape(12, 3), wanted)
    rates = jax.jit(lambda *point: jax.jvp(summed, point, point)[1])(x.reshape(2, 6, 3), w)
    assert (np.asarray(rates[1]["logits"]) == 0).all()


def test_integer_arrays_may_be_closed_over_anywhere():
    x, w, labels = problem(4, 3, 5)

    def loss(x, labels):
        return fused_linear(lambda z: jnp.roll(z, labels[0], 1)[:, 0] ** 2, reduction="sum")(x, w)

    wanted = jax.grad(lambda x: (jnp.roll(x @ w, labels[0], 1)[:, 0] ** 2).sum())(x)
    assert_close(jax.grad(jax.jit(loss))(x, labels), wanted)
    assert_close(jax.vmap(jax.grad(loss), (None, 0))(x, labels[None])[0], wanted)
    assert_close(jax.grad(lambda x: jax.lax.scan(lambda c, y: (c + loss(x, y), None), 0.0, labels[None])[0])(x), wanted)


# What is computed, and what is held


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def matmuls(executable) -> int:
    return len(re.findall(r" dot\(", executable.as_text()))


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
    x, w, labels = problem(256, 64, 1024)
    f = partial(linear_cross_entropy, block_size=128, recompute=recompute)
    f = f if differentiated is None else jax.value_and_grad(f, differentiated)
    assert matmuls(compiled(f, x, w, labels)) == wanted


BLOCK = 128 * 4096 * 4


@pytest.mark.parametrize(
    ("blocks", "transform"),
    [
        (2.2, lambda f: f),
        (2.2, lambda f: jax.grad(f, (0, 1))),
        (3.4, lambda f: lambda x, w: jax.jvp(f, (x, w), (x, w))),
        (9.2, lambda f: lambda x, w: jax.jvp(jax.grad(f, (0, 1)), (x, w), (x, w))),
        (9.2, lambda f: jax.grad(lambda x, w: sum((g * g).sum() for g in jax.grad(f, (0, 1))(x, w)), (0, 1))),
    ],
    ids=["value", "grad", "jvp", "forward over reverse", "reverse over reverse"],
)
@BLOCKED_OVER
def test_memory_is_that_of_a_few_blocks(blocks, transform, recompute):
    """Of 16 blocks of the logits; x and w take a quarter of a block each, and have accumulators."""
    x, w, labels = problem(2048, 32, 4096)
    f = partial(linear_cross_entropy, labels=labels, block_size=256 if recompute else 128, recompute=recompute)
    memory = compiled(transform(f), x, w).memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes <= blocks * BLOCK


# Arguments


X, W, Y = problem(4, 3, 5)


def wrong(argument: Any) -> Any:
    return argument


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x is of dtype int32", lambda: linear_cross_entropy(X.astype(jnp.int32), W, Y)),
        (TypeError, "w is of dtype int32", lambda: linear_cross_entropy(X, W.astype(jnp.int32), Y)),
        (TypeError, "labels is of dtype float32", lambda: linear_cross_entropy(X, W, Y.astype(jnp.float32))),
        (TypeError, "dtype is", lambda: linear_cross_entropy(X, W, Y, dtype=jnp.int32)),
        (ValueError, r"x is of shape \(4, 3\), wanted \[..., 5\]", lambda: linear_cross_entropy(X, W, Y, class_axis=0)),
        (ValueError, r"w is of shape \(3,\)", lambda: linear_cross_entropy(X, W[:, 0], Y)),
        (ValueError, "at least one class", lambda: linear_cross_entropy(X, W[:, :0], Y)),
        (ValueError, r"labels is of shape \(3,\)", lambda: linear_cross_entropy(X, W, Y[:3])),
        (ValueError, r"labels is of shape \(4, 1\)", lambda: linear_cross_entropy(X, W, Y[:, None])),
        (ValueError, r"bias is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, bias=X[:, 0])),
        (ValueError, r"weights is of shape \(5,\)", lambda: linear_cross_entropy(X, W, Y, weights=W[0])),
        (ValueError, r"normalizer is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, normalizer=X[:, 0])),
        (ValueError, "normalizer is given", lambda: linear_cross_entropy(X, W, Y, reduction="sum", normalizer=2.0)),
        (ValueError, "reduction is 'max'", lambda: linear_cross_entropy(X, W, Y, reduction=wrong("max"))),
        (ValueError, "class_axis is 1", lambda: linear_cross_entropy(X, W, Y, class_axis=1)),
        (ValueError, "block_size is 0", lambda: linear_cross_entropy(X, W, Y, block_size=0)),
        (ValueError, "block_size is 100", lambda: linear_cross_entropy(X, W, Y, block_size=100, recompute=True)),
        (ValueError, "label_smoothing is 2", lambda: linear_cross_entropy(X, W, Y, label_smoothing=2.0)),
        (ValueError, r"class_weights is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, class_weights=X[:, 0])),
        (ValueError, r"row_args is of shape \(3,\)", lambda: fused_linear(lambda z, y: z[:, 0])(X, W, Y[:3])),
        (ValueError, r"result of loss_fn is float32\[\]", lambda: fused_linear(lambda z: z.sum())(X, W)),
        (ValueError, "aux of loss_fn", lambda: fused_linear(lambda z: (z[:, 0], z.sum()), has_aux=True)(X, W)),
    ],
)
def test_errors_name_function_argument_got_and_wanted(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert re.match(r"(fused_linear|linear_cross_entropy): ", str(caught.value))
