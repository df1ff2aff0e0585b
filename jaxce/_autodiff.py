"""Rules of differentiation that serve every mode: reverse and forward, of any order, under every transformation.

`jax.custom_vjp` functions refuse `jax.jvp`, `jax.jacfwd`, `jax.hessian` and `jax.linearize`, because they define only
the pullback  v ↦ vᵀJ.  But the pullback is linear in v, and the transpose of  v ↦ vᵀJ  is  ṫ ↦ Jṫ, the pushforward.
So the transpose of the backward rule *is* the forward rule, and reverse mode, which transposes the pushforward once
more, arrives back at the backward rule. One analytic rule serves every mode. In three forms:

    with_forward_mode   for a `jax.custom_vjp` function
    with_pullback       for a loop over blocks, whose backward loop is given
    with_gradients      for a weighted sum of losses, whose gradients one loop finds together with the losses

Inputs without a tangent are constants of the rule: nothing is spent on their cotangents.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero


def with_forward_mode(f: Callable[..., Any]) -> Callable[..., Any]:
    """Give `f`, a `jax.custom_vjp` function, every mode of differentiation.

    `f` takes pytrees of arrays as positional arguments; `None` is an empty pytree. Its backward rule must be linear in
    the cotangent, as the mathematics has it, and itself differentiable where higher orders are wanted.
    """

    @jax.custom_jvp
    def differentiable(*args):
        return f(*args)

    def jvp(args, rates):
        f_of_moving, values, _ = of_moving(f, args, _moving(rates))
        out, pullback = jax.vjp(f_of_moving, values)

        def push(pullback, rates):
            (rate,) = jax.linear_transpose(pullback, out)((rates,))
            return rate

        return out, _lean(push)(pullback, _nonzero(rates))

    differentiable.defjvp(jvp, symbolic_zeros=True)
    return functools.wraps(f)(differentiable)


def with_pullback(forward: Callable, pull: Callable) -> Callable[[Any], Any]:
    """inputs ↦ forward(inputs) = (out, aux), differentiated by `pull(inputs, out, g, moving)`: gradients of ⟨g, out⟩.

    They have the structure of `inputs`, and `None` where `moving`, a pytree of bools, is False. aux is not
    differentiated. `inputs` and `out` are all that is saved.
    """

    @jax.custom_jvp
    def rule(inputs):
        return forward(inputs)

    def jvp(primals, rates):
        (inputs,), moving = primals, _moving(rates[0])
        out, aux = rule(inputs)

        def gradients(inputs, out, g):
            _, primals, _ = of_moving(forward, (inputs,), moving)
            return list(map(_summed_like, jax.tree.leaves(pull(inputs, out, g, moving)), primals)), None

        def push(inputs, out, rates):
            # jax.linear_transpose would do, but before jax 0.10 it cannot transpose a scan.
            def pullback(g):
                return _whole(gradients)(inputs, out, g)[0]

            return jax.vjp(pullback, jax.tree.map(jnp.zeros_like, out))[1](rates)[0]

        return (out, aux), (_lean(push)(inputs, out, _nonzero(rates[0])), _zero_rates(aux))

    rule.defjvp(jvp, symbolic_zeros=True)
    return rule


def with_gradients(losses_of: Callable, gradients_of: Callable) -> Callable[[Any, Array], Any]:
    """(inputs, g) ↦ (Σ g·losses, aux), whose tangent is Σ ⟨gradient, rate⟩: reverse mode only scales the gradients.

    `losses_of(inputs)` returns (losses, aux), `gradients_of(inputs, g, moving)` ((losses, gradients), aux), gradients
    as in `with_pullback`.
    """

    @jax.custom_jvp
    def total(inputs, g):
        losses, aux = losses_of(inputs)
        return jnp.sum(g * losses), aux

    def jvp(primals, rates):
        inputs, g = primals
        (losses, grads), aux = _whole(functools.partial(gradients_of, moving=_moving(rates[0])))(inputs, g)
        out = jnp.sum(g * losses)
        gradients = jax.tree.leaves((grads, None if _is_zero(rates[1]) else losses))
        rate = jnp.zeros_like(out)
        for gradient, direction in zip(gradients, _nonzero(rates), strict=True):
            product = jnp.sum(gradient.astype(out.dtype) * direction.astype(out.dtype))
            rate = rate + _summed_like(product, out)
        return (out, aux), (rate, _zero_rates(aux))

    total.defjvp(jvp, symbolic_zeros=True)
    return total


def _whole(f):
    """`f`, which returns (out, aux), for use inside a rule of differentiation.

    While a rule is evaluated, JAX splits every scan in it into what depends on tangents and what does not, even if
    nothing does; that drops its checkpoints and moves loop-invariant arrays of the logits' size out of the loop (three
    times the memory). A custom_jvp function is not split, and says how to be differentiated if it must be.
    """

    @jax.custom_jvp
    def whole(*args):
        return f(*args)

    def jvp(args, rates):
        moving = _moving(rates)

        def along(args, rates):
            f_of_moving, values, _ = of_moving(f, args, moving)
            return jax.jvp(f_of_moving, (values,), (rates,), has_aux=True)

        out, rate, aux = _lean(along)(args, _nonzero(rates))
        return (out, aux), (rate, _zero_rates(aux))

    whole.defjvp(jvp, symbolic_zeros=True)
    return whole


def of_moving(f: Callable, args: Any, moving: Any) -> tuple[Callable, list, Callable]:
    """`f` as a function of a list, the leaves of `args` that move; that list; and its way back into a tree like `args`.

    That tree has `None` for what does not move.
    """
    leaves, treedef = jax.tree.flatten(args)
    flags = jax.tree.leaves(moving)

    def merged(values, others):
        values = iter(values)
        return jax.tree.unflatten(treedef, [next(values) if m else a for m, a in zip(flags, others, strict=True)])

    values = [a for a, moves in zip(leaves, flags, strict=True) if moves]
    return lambda values: f(*merged(values, leaves)), values, lambda values: merged(values, [None] * len(leaves))


def _lean(f):
    """`f`, linear in some arguments, saving its arguments and nothing else.

    Without the checkpoint the residuals of reverse mode would be the coefficients of the linear map, several arrays of
    the logits' shape.
    """
    return jax.checkpoint(f, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)


def _summed_like(value: Array, like: Array) -> Array:
    """In `jax.shard_map`: `value`, summed over the mesh axes along which it varies and `like` does not.

    It is the cotangent of `like` if `value` is that of a copy on each shard, so autodiff of the copying finds the sum.
    """
    mixed, pull = jax.vjp(lambda like: like + jnp.zeros_like(value), like.astype(value.dtype))
    return pull(value + jnp.zeros_like(mixed))[0]


def _is_zero(rate) -> bool:
    # Integers have no tangent either: a float0 array, before jax 0.11.
    return isinstance(rate, SymbolicZero) or rate.dtype == jax.dtypes.float0


def _moving(rates):
    return jax.tree.map(lambda rate: not _is_zero(rate), rates, is_leaf=lambda r: isinstance(r, SymbolicZero))


def _nonzero(rates) -> list[Array]:
    leaves = jax.tree.leaves(rates, is_leaf=lambda r: isinstance(r, SymbolicZero))
    return [rate for rate in leaves if not _is_zero(rate)]


def _zero_rates(aux):
    def zero(a):
        floating = jnp.issubdtype(a.dtype, jnp.inexact)
        return jnp.zeros_like(a) if floating else np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(zero, aux)
