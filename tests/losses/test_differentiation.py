"""Every mode of differentiation, of any order, against plain autodiff of the reference formulas in float64."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxce

from ..helpers import oracle

pytestmark = pytest.mark.usefixtures("x64")

N, K = 2, 4
VARIABLES = ("logits of labels", "logits of dense", "dense", "logits and dense")
# The tables below: what is done to v ↦ losses [N] at the variable v, with a direction s.
Mode = Callable[[Callable, jax.Array, jax.Array], object]
Losses = Callable[[jax.Array], jax.Array]


def losses_of(variable: str, library) -> tuple[Losses, jax.Array]:
    """The losses of N rows as a function of `variable`, by `jaxce` or its `reference`, and a point [..., N, K]."""
    rng = np.random.default_rng(VARIABLES.index(variable))
    logits, dense = jnp.asarray(rng.standard_normal((N, K))), jnp.asarray(rng.uniform(0.1, 1, (N, K)))
    labels = jnp.asarray(rng.integers(K, size=N), jnp.int32)
    if variable == "logits of labels":
        return lambda z: library.softmax_cross_entropy_with_integer_labels(z, labels), logits
    if variable == "logits of dense":
        return lambda z: library.softmax_cross_entropy(z, dense), logits
    if variable == "dense":
        return lambda t: library.softmax_cross_entropy(logits, t), dense
    return lambda v: library.softmax_cross_entropy(v[0], v[1]), jnp.stack([logits, dense])


def direction(point: jax.Array) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).standard_normal(point.shape))


def scalar(losses: Losses) -> Losses:
    """Not linear in the losses, so that the cotangents of the rule have derivatives too."""
    return lambda v: (jnp.sin(jnp.arange(1.0, N + 1)) * losses(v) ** 2).sum()


FIRST: dict[str, Mode] = {
    "value_and_grad": lambda f, v, s: jax.value_and_grad(scalar(f))(v),
    "vjp": lambda f, v, s: jax.vjp(f, v)[1](jnp.cos(jnp.arange(1.0, N + 1))),
    "jvp": lambda f, v, s: jax.jvp(f, (v,), (s,)),
    "linearize": lambda f, v, s: jax.linearize(f, v)[1](s),
    "linear_transpose": lambda f, v, s: jax.linear_transpose(jax.linearize(f, v)[1], v)(jnp.arange(1.0, N + 1)),
    "jacfwd": lambda f, v, s: jax.jacfwd(f)(v),
    "jacrev": lambda f, v, s: jax.jacrev(f)(v),
    "jvp of grad": lambda f, v, s: jax.jvp(jax.grad(scalar(f)), (v,), (s,)),
    "grad of jvp": lambda f, v, s: jax.grad(lambda v: jax.jvp(scalar(f), (v,), (s,))[1])(v),
    "hessian of the scalar": lambda f, v, s: jax.hessian(scalar(f))(v),
}
HIGHER: dict[str, Mode] = {
    "fwd fwd": lambda f, v, s: jax.jacfwd(jax.jacfwd(f))(v),
    "fwd rev": lambda f, v, s: jax.jacfwd(jax.jacrev(f))(v),
    "rev fwd": lambda f, v, s: jax.jacrev(jax.jacfwd(f))(v),
    "rev rev": lambda f, v, s: jax.jacrev(jax.jacrev(f))(v),
    "fwd fwd fwd": lambda f, v, s: jax.jacfwd(jax.jacfwd(jax.jacfwd(f)))(v),
    "rev rev rev": lambda f, v, s: jax.jacrev(jax.jacrev(jax.jacrev(f)))(v),
    "fwd rev fwd": lambda f, v, s: jax.jacfwd(jax.jacrev(jax.jacfwd(f)))(v),
}


def scanned(losses: Losses) -> Losses:
    """v ↦ losses(v), losses(sin v) as a scan."""

    def through(v):
        return jax.lax.scan(lambda c, _: (jnp.sin(c), losses(c)), v, length=2)[1][1] + losses(v)

    return through


WRAPPERS: dict[str, Callable[[Losses], Losses]] = {
    "checkpoint": jax.checkpoint,  # pyright: ignore[reportAssignmentType]
    "scan": scanned,
    "jit": jax.jit,
    "scan of checkpoint": lambda f: scanned(jax.checkpoint(f)),  # pyright: ignore[reportArgumentType]
    "vmap of jit": lambda f: lambda v: jax.vmap(jax.jit(f))(jnp.stack([v, 2 * v])).sum(0),
}


def assert_same(mode: Mode, variable: str, wrap: Callable[[Losses], Losses] = lambda f: f, *, jit: bool = True) -> None:
    """The mode gives the same for jaxce as for the reference."""

    def result(library):
        losses, point = losses_of(variable, library)

        def run(v):
            return mode(wrap(losses), v, direction(v))

        return (jax.jit(run) if jit else run)(point)

    got, wanted = jax.tree.leaves(result(jaxce)), jax.tree.leaves(result(jaxce.reference))
    assert len(got) == len(wanted) and all(np.asarray(w).any() for w in wanted)
    for g, w in zip(got, wanted, strict=True):
        oracle.assert_close(g, w, "float64")


def quick_where(quick: Callable[..., bool], *tables) -> list:
    """The product of the tables; what is not quick is slow."""
    return [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow, id="-".join(case))
        for case in itertools.product(*tables)
    ]


BOTH = ("logits of labels", "logits and dense")


# Logits and dense targets that vary together cover each of them; alone they are quick in two modes only.
@pytest.mark.parametrize(
    "mode, variable", quick_where(lambda m, v: v in BOTH or m in ("value_and_grad", "jvp"), FIRST, VARIABLES)
)
def test_first_order_and_products(mode, variable):
    assert_same(FIRST[mode], variable)


@pytest.mark.parametrize(
    "mode, variable",
    quick_where(
        lambda m, v: m not in ("fwd fwd fwd", "rev rev rev") and (m, v) != ("fwd rev fwd", "logits of labels"),
        HIGHER,
        BOTH,
    ),
)
def test_second_and_third_order(mode, variable):
    """Of the cubes of the losses, since those of dense targets are linear in them."""
    assert_same(HIGHER[mode], variable, lambda losses: lambda v: losses(v) ** 3)


@pytest.mark.parametrize(
    "wrapper, mode, variable",
    quick_where(
        lambda w, m, v: (m, v) in [("grad of jvp", "logits of labels"), ("value_and_grad", "logits and dense")],
        WRAPPERS,
        ("value_and_grad", "grad of jvp"),
        BOTH,
    ),
)
def test_through_transformations(wrapper, mode, variable):
    assert_same(FIRST[mode], variable, WRAPPERS[wrapper])


@pytest.mark.parametrize("variable", BOTH)
@pytest.mark.parametrize("mode", ["value_and_grad", "jvp", pytest.param("fwd rev", marks=pytest.mark.slow)])
def test_without_jit(mode, variable):
    assert_same({**FIRST, **HIGHER}[mode], variable, jit=False)


@pytest.mark.parametrize("variable", VARIABLES)
def test_check_grads(variable):
    losses, point = losses_of(variable, jaxce)
    check_grads(losses, (point,), order=2)


@pytest.mark.parametrize("variable", VARIABLES[:2])
def test_float32_logits_have_float32_derivatives(variable):
    """Of first and second order, for logits that float32 holds exactly."""
    losses, point = losses_of(variable, jaxce)
    reference, _ = losses_of(variable, jaxce.reference)
    point = point.astype(jnp.float32)
    for mode in (FIRST["jacfwd"], FIRST["jacrev"], HIGHER["fwd rev"], HIGHER["rev fwd"]):
        got, wanted = jax.jit(lambda z, mode=mode: (mode(losses, z, z), mode(reference, z.astype(jnp.float64), z)))(
            point
        )
        dtype = "float32" if variable == "logits of labels" else got.dtype
        oracle.assert_close(got, wanted, dtype, factor=2)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["jacfwd", "jacrev"])
def test_second_order_of_a_confident_row(mode):
    """The Hessian diag(o) − o·oᵀ, whose entries are all tiny.

    The label's own one, o_y·(1 − o_y), is a sum that cancels: it is exact relative to 1, the others to themselves.
    """
    logits, loss = np.array([[30.0, 0.0, 1.0, -2.0]]), jaxce.softmax_cross_entropy_with_integer_labels
    hessian = jax.jit(mode(jax.jacrev(lambda z: loss(z, jnp.array([0]))[0])))(jnp.asarray(logits)).reshape(4, 4)
    o = np.exp(logits[0] - 30) / np.exp(logits[0] - 30).sum()
    truth = np.diag(o) - np.outer(o, o)
    truth[0, 0] = o[0] * o[1:].sum()
    assert abs(hessian[0, 0] - truth[0, 0]) < 1e-16
    oracle.assert_relative(hessian.at[0, 0].set(truth[0, 0]), truth, "float64", 1e-12)


# ----------------------------------------------------------------------------------------------- dtypes and vmap's axes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variable", VARIABLES[:3])
def test_tangents_and_cotangents_have_the_dtype_of_their_variable(variable, dtype):
    rng = np.random.default_rng(0)
    logits, dense = (jnp.asarray(rng.uniform(0.1, 1, (N, K)), dtype) for _ in range(2))
    labels = jnp.array([0, 3], jnp.int32)
    losses, point = {
        "logits of labels": (lambda z: jaxce.softmax_cross_entropy_with_integer_labels(z, labels), logits),
        "logits of dense": (lambda z: jaxce.softmax_cross_entropy(z, dense), logits),
        "dense": (lambda t: jaxce.softmax_cross_entropy(logits, t), dense),
    }[variable]
    out, rate = jax.eval_shape(lambda v: jax.jvp(losses, (v,), (v,)), point)
    assert out.dtype == rate.dtype == jnp.float32
    assert jax.eval_shape(jax.grad(lambda v: losses(v).sum()), point).dtype == dtype
    assert jax.eval_shape(jax.hessian(lambda v: losses(v).sum()), point).dtype == dtype


@pytest.mark.parametrize(
    "in_axes, out_axes",
    [((0, 0), 0), ((1, 0), 1), ((2, 1), 0), ((-1, None), -1), ((None, 0), 1), ((1, -1), 0)],
    ids=str,
)
@pytest.mark.parametrize("form", ["integer", "dense"])
def test_vmap_is_the_batched_loss(form, in_axes, out_axes):
    """For any in_axes, of losses and gradients; an axis of None is shared by the batch."""
    batch, rng = 4, np.random.default_rng(0)
    logits, labels = rng.standard_normal((batch, N, K)), rng.integers(K, size=(batch, N))
    dense = rng.uniform(0.1, 1, (batch, N, K))
    loss, targets = {
        "integer": (jaxce.softmax_cross_entropy_with_integer_labels, labels),
        "dense": (jaxce.softmax_cross_entropy, dense),
    }[form]

    def gradient(z, t):
        return jax.grad(lambda z: (loss(z, t) ** 2).sum())(z)

    arguments = [a[0] if axis is None else a for a, axis in zip((logits, targets), in_axes, strict=True)]
    moved = [a if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip(arguments, in_axes, strict=True)]
    batched = [
        np.broadcast_to(a, (batch, *a.shape[-n:])) for a, n in zip(arguments, (2, targets.ndim - 1), strict=True)
    ]
    for f in (loss, gradient):
        got = jax.jit(jax.vmap(f, in_axes, out_axes))(*moved)
        oracle.assert_close(jnp.moveaxis(got, out_axes, 0), f(*batched), "float64")
