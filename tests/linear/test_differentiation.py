"""fused_linear and linear_cross_entropy in every mode, against plain autodiff with all the logits, in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import fused_linear, linear_cross_entropy, reference

from ..helpers import MODES, Mode, assert_same_in_mode, cases, head, probabilities, two_of
from ..losses.test_top_k import dense, dense_with_tail

pytestmark = pytest.mark.usefixtures("x64")
IGNORED = -100
MASK = jnp.arange(130) % 11 != 5


def over(argument: int) -> Mode:
    """The gradients of x and w, mapped over that one of them."""

    def mapped(f, v, s):
        gradient = jax.grad(lambda x, w, *others: f((x, w, *others)), (0, 1))
        axes = [0 if i == argument else None for i in range(len(v))]
        return jax.vmap(gradient, axes)(*(two_of(a) if i == argument else a for i, a in enumerate(v)))

    return mapped


def over_masks(f, v, s):
    """The gradients with either weights, of which some are 0, and their own gradient."""
    weights = v[-1][None] * jnp.stack([jnp.arange(7) < 3, jnp.arange(7) != 1]).astype(v[-1].dtype)
    gradients = jax.vmap(jax.grad(lambda w, weights: f((v[0], w, *v[2:-1], weights))), (None, 0))
    return jax.grad(lambda w: (gradients(w, weights) ** 2).sum())(v[1])


def scan_over_x(f, v, s):
    def total(w):
        def step(sum_, x):
            return sum_ + f((x, w, *v[2:])), None

        return jax.lax.scan(step, 0.0, two_of(v[0]))[0]

    return jax.grad(total)(v[1])


def sum_of_vmap(f):
    """Over two axes of x: the head takes both as rows, if nothing else is mapped."""

    def summed(v):
        return jax.vmap(jax.vmap(lambda x: f((x, *v[1:]))))(two_of(two_of(v[0]))).sum()

    return summed


# Of a function of (x, w, bias, …) to a number.
LINEAR_MODES: dict[str, Mode] = {
    name: MODES[name] for name in ("value_and_grad", "jvp", "jvp of grad", "grad of jvp", "grad of grad")
} | {
    "jacfwd of w": lambda f, v, s: jax.jacfwd(lambda w: f((v[0], w, *v[2:])))(v[1]),
    "hessian of bias": lambda f, v, s: jax.hessian(lambda bias: f((*v[:2], bias, *v[3:])))(v[2]),
    "vmap over x": over(0),
    "vmap over heads": over(1),
    "grad of vmap": lambda f, v, s: jax.grad(sum_of_vmap(f))(v),
    "jvp of grad of vmap": lambda f, v, s: jax.jvp(jax.grad(sum_of_vmap(f)), (v,), (s,)),
    "grad of checkpoint": lambda f, v, s: jax.grad(jax.checkpoint(f))(v),
    "scan over x": scan_over_x,
}


def all_options(x, w, bias, weights, class_weights, cap, smoothing, z_loss, *, labels, reduction):
    z = cap * jnp.tanh((x @ w + bias[None]) / cap)
    kept = labels != IGNORED
    labels = jnp.where(kept, labels, 0)
    t = (1 - smoothing) * jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype) + smoothing / MASK.sum(dtype=z.dtype)
    lse = jax.nn.logsumexp(z, -1, where=MASK[None])
    loss = (class_weights[None] * t * (lse[:, None] - z)).sum(1, where=MASK[None]) + z_loss * lse**2
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
        class_mask=MASK,
        class_axis=class_axis,
        **options,
    )


def any_loss(logits, labels, scale, *, shift, center):
    """Closes over a floating and an integer array; not a cross-entropy."""
    picked = jnp.take_along_axis(logits, ((labels + shift) % logits.shape[-1])[:, None], -1)[:, 0]
    return scale * jax.nn.logsumexp(logits - center[None], -1) - picked**2


# Blocks are of rows or of classes; a reduction "none" is always by classes.
BLOCKED: dict[str, dict[str, Any]] = {
    "rows, mean": {"reduction": "mean", "recompute": False, "class_axis": -1, "block_size": 3},
    "classes, mean": {"reduction": "mean", "recompute": True, "class_axis": 0, "block_size": 128},
    "classes, 18 rows": {"reduction": "mean", "recompute": True, "class_axis": -1, "block_size": 128},
    "classes, none": {"reduction": "none", "recompute": True, "class_axis": -1, "block_size": 128},
}
# By default nearly every mode by blocks of classes, in either reduction. Any loss, below, has every mode by rows.
QUICK_NONE = ("jvp", "grad of jvp", "scan over x", "vmap over x")
QUICK = {("rows, mean", m) for m in ("value_and_grad", "jvp of grad", "vmap over x")}
QUICK |= {("classes, none", m) for m in QUICK_NONE}
QUICK |= {("classes, 18 rows", "value_and_grad")}
QUICK |= {
    ("classes, mean", m)
    for m in ("value_and_grad", "jvp of grad", "grad of grad", "vmap over heads", "grad of vmap", "grad of checkpoint")
}


@pytest.mark.parametrize("blocked, mode", cases(BLOCKED, LINEAR_MODES, quick=QUICK))
def test_cross_entropy_in_every_mode(blocked, mode):
    """With every option, of which all that are arrays or numbers are differentiated too."""
    options, rng, rows = BLOCKED[blocked], np.random.default_rng(1), 18 if "18" in blocked else 5
    x, w, labels = head(rows, 3, 130, "float64")
    labels = labels.at[:3].set(jnp.array([IGNORED, 129, 128], jnp.int32)).at[5:].set(IGNORED)
    assert MASK[labels[1:5]].all()
    others = [rng.uniform(0.5, 1, shape) for shape in ((130,), (rows,), (130,))] + [2.0, 0.1, 0.01]
    point = tuple(jnp.asarray(v) for v in (x, w, *others))
    combine = jnp.asarray(rng.standard_normal(rows))
    naive = partial(all_options, labels=labels, reduction=options["reduction"])
    ours = partial(ours_all_options, labels=labels, **options)

    def number(f):
        return lambda v: f(*v) if options["reduction"] == "mean" else jnp.sum(combine * f(*v))

    assert_same_in_mode(LINEAR_MODES[mode], number(ours), number(naive), point, tolerance=1e-11)


SOFT: dict[str, tuple[bool, dict[str, Any]]] = {
    "dense": (False, {}),
    "top k, rows": (True, {"recompute": False, "block_size": 3}),
    "top k, classes": (True, {"recompute": True, "block_size": 128, "tail": True}),
}
QUICK_SOFT = {("top k, classes", m) for m in ("value_and_grad", "jvp of grad", "grad of grad", "vmap over x")}
QUICK_SOFT |= {("top k, rows", "jvp of grad"), ("dense", "jvp of grad"), ("dense", "grad of grad")}


@pytest.mark.parametrize("form, mode", cases(SOFT, LINEAR_MODES, quick=QUICK_SOFT))
def test_soft_targets_in_every_mode(form, mode):
    """Of x, w, bias and the targets."""
    x, w, _ = head(5, 3, 130, "float64")
    listed, options = SOFT[form]
    ids = (
        jnp.asarray(np.random.default_rng(1).integers(0, 130, (5, 4)), jnp.int32)
        .at[0]
        .set(jnp.array([7, 7, 129, 0], jnp.int32))
    )
    t = probabilities(5, 4 if listed else 130, dtype="float64") * 0.9
    point = (x, w, jnp.linspace(-0.5, 0.5, 130), t)
    combine = jnp.asarray(np.random.default_rng(1).standard_normal(5))

    def ours(v):
        x, w, bias, t = v
        labels = (ids, t) if listed else t
        return linear_cross_entropy(x, w, labels, bias=bias, weights=combine, reduction="sum", **options)

    def naive(v):
        x, w, bias, t = v
        z = x @ w + bias[None]
        if options.get("tail"):
            losses = dense_with_tail(z, ids, t)
        else:
            losses = reference.softmax_cross_entropy(z, dense(ids, t, 130) if listed else t)
        return jnp.sum(combine * losses)

    assert_same_in_mode(LINEAR_MODES[mode], ours, naive, point, tolerance=1e-11)


QUICK_ANY = {("mean", m) for m in LINEAR_MODES if m != "jvp of grad of vmap"} | {("none", m) for m in QUICK_NONE}


QUICK_ANY |= {("mean", "grad of vmap over masks")}
ANY_MODES = LINEAR_MODES | {"grad of vmap over masks": over_masks}


@pytest.mark.parametrize("reduction, mode", cases(("mean", "none"), ANY_MODES, quick=QUICK_ANY))
def test_any_loss_in_every_mode(reduction, mode):
    rng = np.random.default_rng(2)
    x, w, labels = head(7, 3, 5, "float64")
    point = (x, w, *(jnp.asarray(rng.uniform(0.5, 1, shape)) for shape in ((5,), (7,), (5,), (7,))))

    def ours(v):
        x, w, bias, scale, center, weights = v
        loss = partial(any_loss, shift=jnp.cumsum(labels)[0], center=center)
        f = fused_linear(loss, reduction=reduction, block_size=3)
        return f(x, w, labels, scale, bias=bias, weights=weights).sum()

    def naive(v):
        x, w, bias, scale, center, weights = v
        losses = weights * any_loss(x @ w + bias[None], labels, scale, shift=labels[0], center=center)
        return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()

    assert_same_in_mode(ANY_MODES[mode], ours, naive, point, tolerance=1e-11)


@pytest.mark.parametrize("recompute", [False, True], ids=["rows", "classes"])
@pytest.mark.parametrize("listed", [5, 2])
def test_second_derivatives_where_the_other_classes_are_none_or_far_below(recompute, listed):
    """One logit is 800 above those that are not listed: its exp, about their shift, is inf."""
    x, w, _ = head(3, 2, 5, "float64")
    bias = jnp.zeros(5).at[1].set(0.5 if listed == 5 else 800.0)
    ids = jnp.array([[3, 1, 0, 2, 4], [1, 0, 4, 3, 2], [4, 1, 2, 0, 3]], jnp.int32)[:, :listed]
    t = probabilities(3, listed, dtype="float64")

    def ours(bias):
        return linear_cross_entropy(x, w, (ids, t), bias=bias, recompute=recompute)

    def naive(bias):
        return -(dense(ids, t, 5) * jax.nn.log_softmax(x @ w + bias[None])).sum() / 3

    for derivative in (jax.grad, jax.hessian):
        got, wanted = derivative(ours)(bias), derivative(naive)(bias)
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)
