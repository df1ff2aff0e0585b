"""`softmax_cross_entropy_with_top_k_labels`: the dense loss of targets mostly 0, and the tail."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath as untyped_mpmath
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxce
from jaxce import softmax_cross_entropy_with_top_k_labels as top_k_loss

from ..helpers import (
    MODES,
    OPTION_SETS,
    assert_all_close,
    assert_close,
    assert_one_rounding,
    assert_relative,
    assert_same_in_mode,
    cases,
    logits,
    option_sets,
    option_values,
)

mpmath: Any = untyped_mpmath
N, K, M = 5, 67, 4
# Equal ids, padding by any id, and an id of 0 whose target counts.
IDS = jnp.array([[3, 9, 3, 66], [0, 1, 0, 0], [5, 900, -7, 33], [64, 31, 32, 63], [2, 2, 2, 2]], jnp.int32)
T = jnp.array([[0.3, 0.1, 0.2, 0.2], [0.4, 0.5, 0, 0], [0.7, 0, 0, 0.1], [0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.1, 0.3]])


def dense(ids, t, classes=K):
    rows = jnp.expand_dims(jnp.arange(ids.shape[0]), 1)
    return jnp.zeros((ids.shape[0], classes), t.dtype).at[rows, jnp.where(ids < 0, classes, ids)].add(t, mode="drop")


def dense_with_tail(z, ids, t):
    """The naive loss with one class more: what the listed classes leave of 1."""
    o, y = jax.nn.softmax(z), dense(ids, t, z.shape[-1])
    listed = dense(ids, (t != 0).astype(t.dtype), z.shape[-1]) > 0
    tail, target = jnp.where(listed, 0, o).sum(-1), 1 - t.sum(-1)
    return -(y * jnp.where(listed, jnp.log(o), 0)).sum(-1) - target * jnp.log(tail)


MASKS = ("nothing", "classes", "rows")
QUICK_MASKED = {(options, "nothing") for options in OPTION_SETS} | {("all", mask) for mask in MASKS}


@pytest.mark.parametrize("options, masked", cases(OPTION_SETS, MASKS, quick=QUICK_MASKED))
def test_equals_the_dense_loss(x64, options, masked):
    """Values, and the gradients of logits, targets and options."""
    z, t = logits(N, K, dtype="float64"), T.astype("float64")
    values = jax.tree.map(lambda a: jnp.asarray(a, "float64"), option_sets(K)[options])
    where = {"nothing": None, "classes": (jnp.arange(K) % 7 != 2)[None], "rows": jnp.arange(N) != 1}[masked]

    def run(f, *v):
        losses, pullback = jax.vjp(f, *v)
        return losses, pullback(logits(N, seed=3, dtype="float64"))

    ours = jax.jit(partial(run, lambda z, t, o: top_k_loss(z, IDS, t, where=where, **o)))(z, t, values)
    wanted = jax.jit(partial(run, lambda z, t, o: jaxce.softmax_cross_entropy(z, dense(IDS, t), where=where, **o)))
    assert_all_close(ours, wanted(z, t, values), tolerance=1e-13)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_axes(axis):
    z = logits(5, 7, 3)
    rows = {0: (7, 3), (0, 2): (7,), None: ()}[axis]
    classes = z.size // int(np.prod(rows))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, classes, (*rows, 4)), jnp.int32)
    t = jnp.abs(logits(*rows, 4, seed=2))
    axes = (0, 1, 2) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    flat = jnp.moveaxis(z, axes, range(-len(axes), 0)).reshape(*rows, classes)
    assert_close(top_k_loss(z, ids, t, axis), top_k_loss(flat, ids, t), "float32")


TOP_K_MODES = ("jvp", "linearize", "jacfwd of jacrev", "jacrev of jacfwd", "jacrev of jacrev", "jvp of hessian")
TOP_K_MODES += ("scan", "checkpoint", "vmap of jacrev", "linear_transpose")
QUICK = {("all", mode) for mode in TOP_K_MODES if not mode.startswith("jacrev of")} | {
    ("tail", mode) for mode in ("jvp", "jacfwd of jacrev", "scan")
}


@pytest.mark.parametrize("form, mode", cases(("all", "tail", "plain"), TOP_K_MODES, quick=QUICK))
def test_every_mode(x64, form, mode):
    """Of logits, targets and options together."""
    ids, classes = jnp.array([[1, 3, 1], [0, 2, 0]], jnp.int32), 4
    values = {name: jnp.asarray(v, "float64") for name, v in option_values(classes).items()} if form == "all" else {}
    t = jnp.array([[0.3, 0.1, 0.2], [0.4, 0.2, 0.1]], "float64")
    vector, unravel = ravel_pytree({"logits": logits(2, classes, dtype="float64"), "targets": t} | values)

    def ours(vector):
        return top_k_loss(class_ids=ids, tail=form == "tail", **unravel(vector))

    def naive(vector):
        values = unravel(vector)
        z, t = values.pop("logits"), values.pop("targets")
        return (
            dense_with_tail(z, ids, t)
            if form == "tail"
            else jaxce.reference.softmax_cross_entropy(z, dense(ids, t, classes), **values)
        )

    assert_same_in_mode(MODES[mode], ours, naive, vector, factor=8)


def exact(z, ids, t, tail):
    """The loss of a row and its gradient with 50 digits, ids being distinct."""
    with mpmath.workdps(50):
        z, t = ([mpmath.mpf(float(v)) for v in a] for a in (z, t))
        e = [mpmath.exp(v) for v in z]
        total, ids = mpmath.fsum(e), [int(i) for i in ids]
        rest = mpmath.fsum(v for k, v in enumerate(e) if k not in ids)
        target = (1 - mpmath.fsum(t)) if tail else mpmath.mpf(0)
        mass = mpmath.fsum(t) + target
        loss = -mpmath.fsum(t_m * mpmath.log(e[i] / total) for t_m, i in zip(t, ids, strict=True))
        loss -= target * mpmath.log(rest / total) if tail else 0
        gradient = [mass * v / total - (0 if k in ids else target * v / rest) for k, v in enumerate(e)]
        for t_m, i in zip(t, ids, strict=True):
            gradient[i] -= t_m
        return float(loss), np.array([float(g) for g in gradient])


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("rest", [1e-7, 1e-3, 0.5, 1 - 1e-7], ids="{:g}".format)
def test_any_share_of_the_tail_is_exact(rest, tail):
    """Of the teacher, and of the student: with a tail of 1e-7, of all but 1e-7, and when one class has nearly all."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(K, M, replace=False) for _ in range(4 * N)])
    share = rng.dirichlet(np.ones(M), 4 * N)
    z = rng.standard_normal((4 * N, K))
    listed = np.zeros((4 * N, K), bool)
    np.put_along_axis(listed, ids, True, 1)
    e = np.exp(z)
    others = (e * ~listed).sum(1)
    for n, student in enumerate(np.repeat([1e-7, 1e-3, 0.5, 1 - 1e-7], N)):  # the probability of all other classes
        factor = (1 - student) / student * others[n] / (e[n] * listed[n]).sum()
        z[n, ids[n]] += np.log(factor)
    z = jnp.asarray(z + rng.choice([0, 100], (4 * N, 1)), jnp.float32)
    t = jnp.asarray(share * (1 - rest), jnp.float32)
    loss = jax.jit(partial(top_k_loss, tail=tail))
    losses, pullback = jax.vjp(lambda z: loss(z, jnp.asarray(ids), t), z)
    (gradient,) = pullback(jnp.ones_like(losses))
    wanted = [exact(*row, tail) for row in zip(np.asarray(z), ids, np.asarray(t), strict=True)]
    assert_relative(losses, [w[0] for w in wanted], "float32", 5e-6)
    for got, (_, truth) in zip(gradient, wanted, strict=True):
        # The sum of the targets is rounded: beside a tail of nearly all, by as much as the targets.
        rounding = 2.0**-24 / np.abs(truth).max() if rest > 0.5 else 0
        assert_close(got, truth, "float32", tolerance=5e-6 + rounding)


def test_a_teacher_s_digits_are_those_of_its_tail():
    """Student and teacher have nearly all in one class; of both tails, 1e-7, a sum in float32 leaves nothing."""
    z = jnp.zeros((1, K)).at[0, 3].set(float(np.log(1e7 * (K - 2)))).at[0, 5].set(2.0)
    ids, t = jnp.array([[3, 5]]), jnp.array([[1 - 3 * 2.0**-24, 2.0**-24]], jnp.float32)
    loss, gradient = jax.value_and_grad(lambda z: top_k_loss(z, ids, t, tail=True)[0])(z)
    wanted, truth = exact(z[0], ids[0], t[0], True)
    assert abs(float(loss) / wanted - 1) <= 5e-6
    assert_close(gradient[0], truth, "float32", tolerance=5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_gradients_are_rounded_once(dtype):
    """At the listed classes too, where student and teacher nearly agree and o − t is small beside o."""
    z = logits(N, K, dtype=dtype, spread=2)
    o = jax.nn.softmax(z.astype("float32"))
    t, ids = jax.lax.top_k(o, M)
    t = 0.97 * t
    gradient = jax.grad(lambda z: top_k_loss(z, ids, t).sum())(z)
    z64, t64 = np.asarray(z.astype("float32"), np.float64), np.asarray(t, np.float64)
    o = np.exp(z64) / np.exp(z64).sum(1, keepdims=True)
    truth = t64.sum(1, keepdims=True) * o
    np.put_along_axis(truth, np.asarray(ids), np.take_along_axis(truth, np.asarray(ids), 1) - t64, 1)
    assert_one_rounding(gradient, truth, dtype)


@pytest.mark.parametrize("tail", [False, True])
def test_padding_invalid_ids_and_rows_that_do_not_count(tail):
    z, t = logits(N, K), 0.9 * T
    run = jax.jit(
        jax.value_and_grad(lambda z, ids, t, where: top_k_loss(z, ids, t, where=where, tail=tail).sum(), (0, 2))
    )
    every = jnp.ones(N, bool)
    wanted = run(z, IDS, t, every)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(wanted))
    other = run(z, jnp.where(t == 0, 12, IDS), t, every)
    assert_all_close((other[0], other[1][0]), (wanted[0], wanted[1][0]))
    loss = jax.jit(partial(top_k_loss, tail=tail))
    for bad in (-1, K, 2**30):
        ids = IDS.at[0, 1].set(bad)
        losses, (dz, dt) = loss(z, ids, t), run(z, ids, t, every)[1]
        assert np.isnan(losses[0]) and np.isfinite(losses[1:]).all()
        assert np.isnan(dz[0]).all() and np.isfinite(dz[1:]).all() and np.isfinite(dt[1:]).all()
        assert np.isnan(jax.jvp(lambda z, ids=ids: loss(z, ids, t), (z,), (z,))[1][0])
        value, (dz, dt) = run(z.at[0].set(jnp.nan), ids, t.at[0].set(jnp.nan), every.at[0].set(False))
        assert_close(value, loss(z, IDS, t)[1:].sum(), "float32")
        assert (np.asarray(dz[0]) == 0).all() and (np.asarray(dt[0]) == 0).all() and np.isfinite(dz).all()


def test_edges():
    """No listed class, all of them listed, logits of −inf, no rows."""
    z, ids = logits(2, 3), jnp.array([[0, 1, 2], [2, 1, 0]])
    t = jnp.array([[0.5, 0.25, 0.25], [0, 0, 0]])
    for tail in (False, True):
        loss, dz = jax.value_and_grad(lambda z, tail=tail: top_k_loss(z, ids, t, tail=tail).sum())(z)
        assert_close(loss, jaxce.softmax_cross_entropy(z[0], t[0]), "float32")
        assert_close(dz[0], jax.grad(jaxce.softmax_cross_entropy)(z[0], t[0]), "float32")
        assert (np.asarray(dz[1]) == 0).all()
    assert (np.asarray(top_k_loss(z, ids[:, :0], t[:, :0])) == 0).all()
    assert top_k_loss(z[:0], ids[:0], t[:0]).shape == (0,)
    z = z.at[0, 0].set(-jnp.inf).at[0, 2].set(-jnp.inf)
    assert np.isposinf(top_k_loss(z, ids, t)[0])
    loss, dz = jax.value_and_grad(lambda z: top_k_loss(z[0], jnp.array([1, 0]), jnp.array([1.0, 0])))(z)
    assert loss == 0 and (np.asarray(dz) == 0).all()
    assert np.isposinf(top_k_loss(z[0], jnp.array([1]), jnp.array([0.5]), tail=True))
    for bad in (jnp.inf, jnp.nan):
        assert np.isnan(top_k_loss(z.at[1, 1].set(bad), ids, t.at[1].set(0.3))[1])


def test_smoothing_from_0_where_an_unlisted_class_is_impossible():
    """The slope is infinite, as that of integer labels. Its derivative, by the logits, is not."""
    z = jnp.array([0.0, 0.0, -jnp.inf, 1.0])

    def loss(smoothing, z):
        return top_k_loss(z, jnp.array([0]), jnp.array([1.0]), label_smoothing=smoothing)

    assert jax.grad(loss)(0.0, z) == jax.jvp(lambda e: loss(e, z), (0.0,), (1.0,))[1] == jnp.inf
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jacobian(jax.grad(loss, 1))(0.0, z), [0.75, -0.25, -0.25, -0.25], 1e-6)
