"""Forward mode for a `jax.custom_vjp` function, by transposing its backward rule.

`jax.custom_vjp` functions refuse `jax.jvp`, `jax.jacfwd`, `jax.hessian` and `jax.linearize`, because they define only
the pullback  v ↦ vᵀJ.  But the pullback is linear in v, and the transpose of  v ↦ vᵀJ  is  ṫ ↦ Jṫ, the pushforward.
So `jax.linear_transpose` of the backward rule *is* the forward rule, and reverse mode, which transposes the pushforward
once more, arrives back at the backward rule. One analytic rule serves every mode.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def with_forward_mode(f: Callable[..., Any]) -> Callable[..., Any]:
    """Give `f`, a `jax.custom_vjp` function, every mode of differentiation.

    `f` takes pytrees of arrays as positional arguments; `None` is an empty pytree. Its backward rule must be linear in
    the cotangent, as the mathematics has it, and itself differentiable where higher orders are wanted.
    """

    @jax.custom_jvp
    def differentiable(*args):
        return f(*args)

    def jvp(args, tangents):
        leaves, treedef = jax.tree.flatten(args)
        rates = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
        # Inputs without a tangent are constants of the pullback, so that nothing is spent on their cotangents.
        # (Integers have no tangent either: a float0 array, before jax 0.11.)
        moving = [i for i, r in enumerate(rates) if not isinstance(r, SymbolicZero) and r.dtype != jax.dtypes.float0]

        def f_of_moving(*values):
            merged = list(leaves)
            for i, value in zip(moving, values, strict=True):
                merged[i] = value
            return f(*jax.tree.unflatten(treedef, merged))

        out, pullback = jax.vjp(f_of_moving, *(leaves[i] for i in moving))
        return out, _push(pullback, out, tuple(rates[i] for i in moving))

    differentiable.defjvp(jvp, symbolic_zeros=True)
    return functools.wraps(f)(differentiable)


def _push(pullback, out, rates):
    def push(pullback, rates):
        (rate,) = jax.linear_transpose(pullback, out)(rates)
        return rate

    # Without the checkpoint the residuals of reverse mode would be the coefficients of the linear map, several arrays
    # of the logits' shape; with it they are those of f's own backward rule.
    push = jax.checkpoint(push, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    return push(pullback, rates)
