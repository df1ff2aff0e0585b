"""Rules of differentiation that serve every mode: reverse and forward, of any order, under every transformation.

`jax.custom_vjp` functions refuse `jax.jvp`, `jax.jacfwd`, `jax.hessian` and `jax.linearize`, because they define only
the pullback  v ↦ vᵀJ.  But the pullback is linear in v, and the transpose of  v ↦ vᵀJ  is  ṫ ↦ Jṫ, the pushforward.
So the transpose of the backward rule *is* the forward rule, and reverse mode, which transposes the pushforward once
more, arrives back at the backward rule. One analytic rule serves every mode. In three forms:

    with_forward_mode   for a `jax.custom_vjp` function
    with_backward       for a loop over blocks, whose backward loop is given
    with_gradients      for a weighted sum of losses, whose gradients one loop computes together with the losses

An input is perturbed (JAX's word) if it has a tangent. The others are constants: nothing is spent on their cotangents.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from ._elementary import times
from ._sharding import mesh_axes, reduced_as, shared_out, varying_over


def with_forward_mode(f: Callable[..., Any]) -> Callable[..., Any]:
    """Give `f`, a `jax.custom_vjp` function, every mode of differentiation.

    `f` takes pytrees of arrays as positional arguments; `None` is an empty pytree. Its backward rule must be linear in
    the cotangent, as the mathematics has it, and itself differentiable where higher orders are wanted.
    """

    differentiable = jax.custom_jvp(f)

    def jvp(args, tangents):
        f_of_perturbed, values, _ = of_perturbed(f, args, _perturbed(tangents))
        out, pullback = jax.vjp(f_of_perturbed, values)

        def pushforward(pullback, tangents):
            (tangent,) = jax.linear_transpose(pullback, out)((tangents,))
            return tangent

        return out, _saving_arguments(pushforward)(pullback, _nonzero(tangents))

    differentiable.defjvp(jvp, symbolic_zeros=True)
    return differentiable


def with_backward(forward: Callable, backward: Callable) -> Callable[[Any], Any]:
    """inputs ↦ forward(inputs) = (out, aux), differentiated by `backward(inputs, out, g, perturbed)`.

    That returns the gradients of ⟨g, out⟩ in the structure of `inputs`, with `None` where `perturbed`, a pytree of
    bools, is False. aux is not differentiated. `inputs` and `out` are all that is saved.
    """

    rule = jax.custom_jvp(forward)

    def jvp(primals, tangents):
        (inputs,), perturbed = primals, _perturbed(tangents[0])
        out, aux = rule(inputs)

        def pullback(residuals, g):
            return jax.tree.leaves(backward(*residuals, g, perturbed))

        # `transposed` marks its arrays as varying over the same mesh axes. For derivatives of higher order `out` must
        # be marked before that, here.
        residuals = inputs, varying_over(mesh_axes(inputs, out, _nonzero(tangents[0])), out)
        tangent = transposed(pullback, residuals, _nonzero(tangents[0]), out)
        return (out, aux), (tangent, jax.tree.map(zero_from_primal, aux))

    rule.defjvp(jvp, symbolic_zeros=True)
    return rule


def transposed(pullback: Callable, residuals: Any, tangents: list[Array], like: Any) -> Any:
    """P(tangents), like `like`: P is the linear map whose transpose is `pullback(residuals, g)`.

    Reverse mode transposes P, and is to run `pullback` as it is written: JAX's transpose of a transpose turns updates
    in place into sums, and matmuls of bfloat16 into matmuls of float32. Of all that JAX can transpose, only
    `lax.custom_linear_solve` takes the transpose from us. So P is the solution of a system: with x = (t, P t),

        [ 1  0] [x1]   [t]
        [−P  1] [x2] = [0]

    `solve` is the tangent, `transpose_solve` reverse mode, and `matvec` for derivatives of the system itself.

    JAX fails if only some parts of the right-hand side have tangents; in derivatives of the system too. So each part is
    made to depend on all tangents and residuals: zeros computed from them are added, or ones multiplied (`_zeros_of`).
    Test: test_blocks_of_classes_update_dw_in_place; without `_nothing`, test_cross_entropy_in_every_mode.
    """
    axes = mesh_axes(residuals, tangents, like)  # of every part: in `jax.shard_map` JAX makes them all alike
    zeros, tangents = varying_over(axes, (jax.tree.map(jnp.zeros_like, like), tangents))
    floating = [a for a in jax.tree.leaves(residuals) if jnp.issubdtype(a.dtype, jnp.inexact)]

    inlined = functools.partial(jax.jit, inline=True)  # traced once, though used several times

    @inlined
    def pull(residuals, g):
        return [shared_out(axes, gradient) for gradient in pullback(residuals, g)]

    @inlined
    def push(residuals, t):
        # `jax.linear_transpose` would take what a checkpointed loop computes of residuals for linear too.
        return jax.vjp(functools.partial(pull, residuals), zeros)[1](t)[0]

    @_saving_arguments
    def matvec(residuals, x):
        t, out = x
        nothing = _nothing(floating)
        y = t, jax.tree.map(jnp.subtract, out, push(residuals, t))
        return jax.tree.map(lambda a: a * (1 + _zeros_of(nothing, a)), y)

    def solve(_, b):
        t, out = b
        return t, jax.tree.map(jnp.add, out, push(residuals, t))

    def transpose_solve(_, g):
        t, out = g
        return jax.tree.map(jnp.add, t, pull(residuals, out)), out

    nothing = _nothing(tangents)
    b = jax.tree.map(lambda a: a + _zeros_of(nothing, a), (tangents, zeros))
    x: Any = lax.custom_linear_solve(functools.partial(matvec, residuals), b, solve, transpose_solve)
    return jax.tree.map(reduced_as, x[1], like)


def _nothing(arrays: list[Array]) -> Array:
    """An empty array that depends on all of `arrays`."""
    return jnp.concatenate([lax.slice_in_dim(a.ravel(), 0, 0).astype(jnp.float32) for a in arrays])


def _zeros_of(nothing: Array, like: Array) -> Array:
    """Zeros that depend on `nothing`; XLA computes nothing for them."""
    return lax.pad(nothing.astype(like.dtype), jnp.zeros((), like.dtype), [(0, like.size, 0)]).reshape(like.shape)


def with_gradients(
    losses_of: Callable, gradients_of: Callable, differentiable: Callable
) -> Callable[[Any, Array], Any]:
    """(inputs, g) ↦ (Σ g·losses, aux), whose tangent is Σ ⟨gradient, tangent⟩: reverse mode only scales the gradients.

    `losses_of(inputs)` returns (losses, aux), `gradients_of(inputs, g, perturbed)` ((losses, gradients), aux), with
    gradients as in `with_backward`. `differentiable` is the same function, for derivatives of the gradients.
    """

    @jax.custom_jvp
    def total(inputs, g):
        losses, aux = losses_of(inputs)
        return jnp.sum(times(g, losses)), aux

    def jvp(primals, tangents):
        inputs, g = primals
        perturbed = _perturbed(tangents[0])
        compute = _opaque(*(functools.partial(f, perturbed=perturbed) for f in (gradients_of, differentiable)))
        (losses, grads), aux = compute(inputs, g)
        out = jnp.sum(times(g, losses))
        gradients = jax.tree.leaves((grads, None if _is_zero(tangents[1]) else losses))
        tangent = jnp.zeros_like(out)
        for gradient, direction in zip(gradients, _nonzero(tangents), strict=True):
            # A gradient by weights is a loss, perhaps infinite, and 0·inf is NaN. Weights, per row or class, have one
            # axis. For larger arrays `times` would cost a pass.
            along = times if sum(n != 1 for n in gradient.shape) <= 1 else jnp.multiply
            slope = jnp.sum(along(direction.astype(out.dtype), gradient.astype(out.dtype)))
            tangent = tangent + reduced_as(slope, out)
        return (out, aux), (tangent, jax.tree.map(zero_from_primal, aux))

    total.defjvp(jvp, symbolic_zeros=True)
    return total


def _opaque(f, differentiable):
    """`f`, which returns (out, aux), kept opaque to partial evaluation. Its derivatives are those of `differentiable`.

    Partial evaluation would drop the scan's checkpoints and hoist logits-sized arrays (3× the memory), even with no
    tangent inside. JAX does not open a custom_jvp function.
    Test: test_memory_is_that_of_a_few_blocks, value_and_grad by rows.
    """

    opaque = jax.custom_jvp(f)

    def jvp(args, tangents):
        perturbed = _perturbed(tangents)

        def along(args, tangents):
            f_of_perturbed, values, _ = of_perturbed(differentiable, args, perturbed)
            return jax.jvp(f_of_perturbed, (values,), (tangents,), has_aux=True)

        out, tangent, aux = _saving_arguments(along)(args, _nonzero(tangents))
        return (out, aux), (tangent, jax.tree.map(zero_from_primal, aux))

    opaque.defjvp(jvp, symbolic_zeros=True)
    return opaque


def of_perturbed(f: Callable, args: Any, perturbed: Any) -> tuple[Callable, list, Callable]:
    """`f` as a function of a list, the perturbed leaves of `args`; that list; its way back into a tree like `args`.

    That tree has `None` for what is not perturbed.
    """
    leaves, treedef = jax.tree.flatten(args)
    flags = jax.tree.leaves(perturbed)

    def merged(values, others):
        values = iter(values)
        return jax.tree.unflatten(treedef, [next(values) if p else a for p, a in zip(flags, others, strict=True)])

    values = [a for a, p in zip(leaves, flags, strict=True) if p]
    return lambda values: f(*merged(values, leaves)), values, lambda values: merged(values, [None] * len(leaves))


def _saving_arguments(f):
    """`f`, linear in some arguments, saving its arguments and nothing else.

    Without the checkpoint the residuals of reverse mode would be the coefficients of the linear map: several arrays of
    the logits' shape.
    Test: test_residuals_of_integer_labels, test_residuals_of_a_head_by_classes, and
    test_gradient_of_a_jvp_by_rows_saves_no_more_than_its_arguments.
    """
    return jax.checkpoint(f, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)


def _is_zero(tangent) -> bool:
    # The tangent of an integer is zero too: a float0 array, before jax 0.11.
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _perturbed(tangents):
    return jax.tree.map(lambda t: not _is_zero(t), tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))


def _nonzero(tangents) -> list[Array]:
    leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    return [tangent for tangent in leaves if not _is_zero(tangent)]
