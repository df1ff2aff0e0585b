"""The modes of differentiation: what JAX does to a function, in all of which jaxce has to agree with the truth."""

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .oracle import assert_all_close

Function = Callable[[Any], jax.Array]
# What is done to `f` at the point v in the direction s, both trees of arrays.
Mode = Callable[[Function, Any, Any], object]


def weights_of(out: jax.Array) -> jax.Array:
    weights = jnp.sin(jnp.arange(1.0, out.size + 1)).reshape(out.shape).astype(out.dtype)
    return weights + jnp.zeros_like(out)  # in shard_map varying as it does


def scalar(f: Function) -> Function:
    """A number that is not linear in `f`, so that the rule's cotangents have derivatives too. A number stays itself."""

    def number(v):
        out = f(v)
        return out if out.ndim == 0 else (weights_of(out) * out**2).sum()

    return number


def two_of(v):
    """A batch of two points."""
    return jax.tree.map(lambda a: a[None] * jnp.array([1, 0.9], a.dtype).reshape(2, *[1] * a.ndim), v)


def transposed(f: Function, v) -> object:
    out, linear = jax.linearize(f, v)
    return jax.linear_transpose(linear, v)(weights_of(out))


def pulled_back(f: Function, v) -> object:
    out, pullback = jax.vjp(f, v)
    return pullback(weights_of(out))


def grad_of_grad(f: Function, v) -> object:
    def squares(v):
        return jnp.stack([(g * g).sum() for g in jax.tree.leaves(jax.grad(scalar(f))(v))]).sum()

    return jax.grad(squares)(v)


def grad_along(f: Function, v, s) -> jax.Array:
    """The slope of `f` in the direction s, in reverse mode; unlike the squares it is linear in `f`."""
    gradient = jax.grad(scalar(f))(v)
    return jnp.stack([(g * t).sum() for g, t in zip(*map(jax.tree.leaves, (gradient, s)), strict=True)]).sum()


def scanned(f: Function) -> Function:
    """A scan whose steps take their point from the carry, and from outside."""

    def through(v):
        def step(c, _):
            return jax.tree.map(jnp.sin, c), f(c) + f(v)

        return jax.lax.scan(step, v, length=2)[1].sum(0)

    return through


MODES: dict[str, Mode] = {
    # First order.
    "value_and_grad": lambda f, v, s: jax.value_and_grad(scalar(f))(v),
    "vjp": lambda f, v, s: pulled_back(f, v),
    "jvp": lambda f, v, s: jax.jvp(f, (v,), (s,)),
    "linearize": lambda f, v, s: jax.linearize(f, v)[1](s),
    "linear_transpose": lambda f, v, s: transposed(f, v),
    "jacfwd": lambda f, v, s: jax.jacfwd(f)(v),
    "jacrev": lambda f, v, s: jax.jacrev(f)(v),
    # Products with second derivatives, for which no matrix is made.
    "jvp of grad": lambda f, v, s: jax.jvp(jax.grad(scalar(f)), (v,), (s,)),
    "grad of jvp": lambda f, v, s: jax.grad(lambda v: jax.jvp(scalar(f), (v,), (s,))[1])(v),
    "grad of grad": lambda f, v, s: grad_of_grad(f, v),
    "grad of slope": lambda f, v, s: jax.grad(lambda v: grad_along(f, v, s))(v),
    # Second order.
    "hessian of a number": lambda f, v, s: jax.hessian(scalar(f))(v),
    "jacfwd of jacfwd": lambda f, v, s: jax.jacfwd(jax.jacfwd(f))(v),
    "jacfwd of jacrev": lambda f, v, s: jax.jacfwd(jax.jacrev(f))(v),
    "jacrev of jacfwd": lambda f, v, s: jax.jacrev(jax.jacfwd(f))(v),
    "jacrev of jacrev": lambda f, v, s: jax.jacrev(jax.jacrev(f))(v),
    # Third order.
    "jvp of hessian": lambda f, v, s: jax.jvp(jax.hessian(f), (v,), (s,))[1],
    "jacfwd of jacfwd of jacfwd": lambda f, v, s: jax.jacfwd(jax.jacfwd(jax.jacfwd(f)))(v),
    "jacfwd of jacrev of jacfwd": lambda f, v, s: jax.jacfwd(jax.jacrev(jax.jacfwd(f)))(v),
    "jacrev of jacrev of jacrev": lambda f, v, s: jax.jacrev(jax.jacrev(jax.jacrev(f)))(v),
    # Through other transformations.
    "checkpoint": lambda f, v, s: jax.jacrev(jax.checkpoint(f))(v),
    "hessian of checkpoint": lambda f, v, s: jax.hessian(jax.checkpoint(scalar(f)))(v),
    "scan": lambda f, v, s: jax.grad(scalar(scanned(f)))(v),
    "vmap": lambda f, v, s: jax.vmap(f)(two_of(v)),
    "vmap of grad": lambda f, v, s: jax.vmap(jax.grad(scalar(f)))(two_of(v)),
    "vmap of jacrev": lambda f, v, s: jax.vmap(jax.jacrev(f))(two_of(v)),
}

# What may stand between the function and any of the modes.
WRAPPERS: dict[str, Callable[[Function], Function]] = {
    "checkpoint": jax.checkpoint,  # pyright: ignore[reportAssignmentType]
    "scan": scanned,
    "jit": jax.jit,
    "scan of checkpoint": lambda f: scanned(jax.checkpoint(f)),  # pyright: ignore[reportArgumentType]
    "vmap of jit": lambda f: lambda v: jax.vmap(jax.jit(f))(two_of(v)).sum(0),
}


def direction_at(point):
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), point)


def assert_same_in_mode(
    mode: Mode | str, ours: Function, truth: Function, point, *, jit: bool = True, **tolerance
) -> None:
    """The mode gives the same of both functions, and no zeros. The tolerance is that of `assert_all_close`."""
    run = MODES[mode] if isinstance(mode, str) else mode

    def result(f):
        return (jax.jit if jit else lambda g: g)(lambda v: run(f, v, direction_at(v)))(point)

    got, wanted = result(ours), result(truth)
    assert all(np.asarray(w).any() for w in jax.tree.leaves(wanted))
    assert_all_close(got, wanted, **tolerance)


def cases(*tables: Iterable[Any], quick: Container[tuple]) -> list:
    """The product of the tables' names, as parameters. What is not in `quick` is slow."""
    return named(itertools.product(*tables), quick=quick)


def named(names: Iterable[tuple], *, quick: Container[tuple]) -> list:
    """These tuples of names (or of numbers), as parameters. What is not in `quick` is slow."""
    return [
        pytest.param(*case, marks=() if case in quick else pytest.mark.slow, id="-".join(map(str, case)))
        for case in names
    ]
