"""`jax.vmap` of a head whose w is not mapped: the batch becomes rows, so that w gets one gradient, in blocks of all.

vmap of a rule of differentiation maps all of it: dw is made for each example, and a block of logits for all examples at
once. `jax.custom_batching.custom_vmap` could say otherwise, but has no reverse mode. So a head is a primitive. It is
differentiated as the function that it stands for; only its vmap is told here. What is differentiated first and then
mapped has a gradient for each example, and is mapped as any function.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from ._autodiff import of_perturbed
from ._matmuls import Layer
from ._sharding import in_shard_map


def maps_as_rows(layer: Layer, x: Array, w: Array) -> bool:
    """On one device. On several, and in `jax.shard_map`, the batch may be split otherwise than rows."""
    return layer.devices == 1 and not in_shard_map(x) and not in_shard_map(w)


def with_batch_as_rows(f: Callable, of_each: Callable | None = None, reduced: Callable = lambda out: out) -> Callable:
    """`f(shared, by_row)`, of pytrees of arrays. Mapped it is `reduced(of_each(shared, by_row))`, with one axis of rows
    more, the first. `of_each`, by default `f`, returns what is of each row, and is mapped as itself.

    That is where the first leaf of `by_row` is mapped, and nothing of `shared`. `f` must not close over arrays that are
    mapped; if it closes over a tracer, which we cannot know, it stays as it is. So it does if it has effects.
    """
    of_each = of_each or f

    def folded(shared, by_row):
        return reduced(with_batch_as_rows(of_each)(shared, by_row))

    def call(shared, by_row):
        args, treedef = jax.tree.flatten((shared, by_row))
        closed, out = jax.make_jaxpr(lambda *args: f(*jax.tree.unflatten(treedef, args)), return_shape=True)(*args)
        if closed.effects or any(isinstance(c, Tracer) for c in closed.consts):
            return f(shared, by_row)

        def batched(args, dims):
            """The results, mapped along their first axis; None to map `f` as it is."""
            shared_dims, by_row_dims = jax.tree.unflatten(treedef, [-1 if d is None else d for d in dims])
            flags = jax.tree.leaves(by_row_dims)
            if flags[0] < 0 or any(d >= 0 for d in jax.tree.leaves(shared_dims)):
                return None
            size = args[len(dims) - len(flags)].shape[flags[0]]
            shared, by_row = jax.tree.unflatten(treedef, args)

            def first(a, d):
                return jnp.moveaxis(a, d, 0) if d >= 0 else jnp.broadcast_to(a, (size, *a.shape))

            return jax.tree.leaves(folded(shared, jax.tree.map(first, by_row, by_row_dims)))

        return jax.tree.unflatten(jax.tree.structure(out), _head().bind(*args, jaxpr=closed, batched=batched))

    return call


@functools.cache
def _head():
    from jax.extend import core  # here, as on newer jax it imports Pallas: half the import time of this package
    from jax.interpreters import ad, batching, mlir

    def evaluate(*args, jaxpr, batched):
        return core.jaxpr_as_fun(jaxpr)(*args)

    def jvp(primals, tangents, **params):
        perturbed = [not isinstance(t, ad.Zero) for t in tangents]
        f, values, _ = of_perturbed(functools.partial(evaluate, **params), primals, perturbed)
        return jax.jvp(f, (values,), ([t for t in tangents if not isinstance(t, ad.Zero)],))

    def vmap(args, dims, **params):
        out = params["batched"](args, dims)
        out = out or jax.vmap(functools.partial(evaluate, **params), dims)(*args)
        return out, [0] * len(out)

    head = core.Primitive("jaxce_head")
    head.multiple_results = True
    head.def_impl(evaluate)
    head.def_abstract_eval(lambda *_, jaxpr, batched: jaxpr.out_avals)
    ad.primitive_jvps[head] = jvp
    batching.primitive_batchers[head] = vmap
    mlir.register_lowering(head, mlir.lower_fun(evaluate, multiple_results=True))
    return head
