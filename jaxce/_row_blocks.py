r"""A row-wise loss of a linear layer, by blocks of rows.

For a block of B rows x, logits z = x·W + b, a row-wise loss ℓ, and the losses' cotangents g, with δ = g ⊙ ∂ℓ/∂z:

    dx = δ·Wᵀ        dW = Σ_blocks xᵀ·δ        db = Σ_rows δ

`sweep` is this loop. It differentiates ℓ with `jax.vjp` and knows nothing else of it.

Every block reads all of W and updates all of dW, which costs about 19/B of the matmuls' time, so B should not be below
128. Beyond 512 little is gained. In between, B is the largest for which a block's float32 logits fit in 64 MiB and in
two thirds of what W takes. It is then made smaller to split the rows evenly.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _checks
from ._autodiff import of_perturbed
from ._matmuls import Inputs, Layer
from ._sharding import gathered, parts_of, varying_as


def max_rows(features: int, classes: int) -> int:
    return min(512, max(128, min(2**24 // classes, 2 * features // 3)))


def row_parts(x: Array) -> tuple[int, ...]:
    return tuple(parts_of(x, axis) for axis in range(x.ndim - 1))


class RowBlocks(NamedTuple):
    """How arrays [*lead, ...] are split into n blocks [*parts, B]: [n, *parts, B, ...].

    Without a sharding there are no parts; with one, each part gives every block an equal share of its rows (see
    `jaxce._sharding`). A few rows are repeated to fill the blocks.
    """

    lead: tuple[int, ...]
    parts: tuple[int, ...]  # of each leading axis
    blocks: int  # n
    size: int  # B

    @classmethod
    def of(cls, lead: tuple[int, ...], parts: tuple[int, ...], max_rows: int) -> "RowBlocks":
        rows = math.prod(lead)
        part_rows = rows // math.prod(parts)
        blocks = max(1, min(-(-rows // max_rows), part_rows))
        return cls(lead, parts, blocks, -(-part_rows // blocks))

    @property
    def part_axes(self) -> tuple[int, ...]:
        return tuple(p for p in self.parts if p > 1)

    def split(self, a: Array, repeat: bool = True) -> Array:
        rest = a.shape[len(self.lead) :]
        divided = [n for p, length in zip(self.parts, self.lead, strict=True) for n in (p, length // p)]
        a = a.reshape(*divided, *rest)
        axes, first = len(self.lead), len(self.part_axes)
        a = jnp.moveaxis(a, range(0, 2 * axes, 2), range(axes))
        part_rows = math.prod(self.lead) // math.prod(self.parts)
        a = a.reshape(*self.part_axes, part_rows, *rest)
        if extra := self.blocks * self.size - part_rows:
            # Rows of zeros could make a loss NaN that is not; rows that are there already cannot. Their g is 0.
            fill = lax.slice_in_dim(a, 0, extra, axis=first)
            a = jnp.concatenate([a, fill if repeat else jnp.zeros_like(fill)], first)
        return jnp.moveaxis(a.reshape(*self.part_axes, self.blocks, self.size, *rest), first, 0)

    def join(self, a: Array) -> Array:
        first, axes = len(self.part_axes), len(self.lead)
        rest = a.shape[first + 2 :]
        a = jnp.moveaxis(a, 0, first).reshape(*self.part_axes, self.blocks * self.size, *rest)
        a = lax.slice_in_dim(a, 0, math.prod(self.lead) // math.prod(self.parts), axis=first)
        a = a.reshape(*self.parts, *(length // p for p, length in zip(self.parts, self.lead, strict=True)), *rest)
        return jnp.moveaxis(a, range(axes), range(0, 2 * axes, 2)).reshape(*self.lead, *rest)


def sweep_of(function: str, layer: Layer, loss_fn, has_aux: bool, x, w, bias, rows) -> tuple[Any, Inputs]:
    """`sweep` of this loss, and the inputs to run it on.

    The loss is made a function of what it closes over too, which the rules of differentiation could not see otherwise.
    (`jax.closure_convert` does so for floating tracers only; a closed-over integer tracer would leak.)
    """

    def block_loss(logits, *rows):
        losses, aux = loss_fn(logits, *rows) if has_aux else (loss_fn(logits, *rows), None)
        size = logits.shape[0]
        if jnp.shape(losses) != (size,) or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
            got = f"{jnp.result_type(losses)}{list(jnp.shape(losses))}"
            raise _checks.value_error(function, "the result of loss_fn", got, f"floating losses of shape ({size},)")
        aux = jax.tree.map(lambda a: _checks.leading(function, "aux of loss_fn", jnp.asarray(a), (size,)), aux)
        return losses.astype(layer.sum_dtype), aux

    def of_one_block(x, w, bias, rows):
        x, rows = jax.tree.map(lambda a: a[first], (x, rows))
        return layer.logits(x, w, bias), *rows

    first = (0,) * (x.ndim - 2)

    # Not built from shapes and dtypes: inside shard_map and Explicit meshes, types say more than these.
    block = jax.eval_shape(of_one_block, x, w, bias, rows)
    closed, shapes = jax.make_jaxpr(block_loss, return_shape=True)(*block)
    treedef = jax.tree.structure(shapes)

    def hoisted(consts, logits, *rows):
        from jax.extend import core  # here, as on newer jax it imports Pallas: half the import time of this package

        outs = core.jaxpr_as_fun(closed.replace(consts=consts))(*jax.tree.leaves((logits, rows)))
        return jax.tree.unflatten(treedef, outs)

    return functools.partial(sweep, layer, hoisted), Inputs(x, w, bias, (rows, list(map(jnp.asarray, closed.consts))))


def sweep(layer: Layer, block_loss, inputs: Inputs, g: Any = None, perturbed: Any = None):
    """((losses [n, *parts, B], gradients), aux): the gradients of Σ g·losses, with None for what is not `perturbed`.

    Without g, (losses, aux). In `inputs`, x is [n, *parts, B, D], and the others are row arguments
    [n, *parts, B, ...] and a list of the arrays that the loss closes over.
    """
    inputs = inputs._replace(w=gathered(inputs.w.astype(layer.operand_dtype), 1 - layer.class_axis))
    rows, consts = inputs.others
    parts = inputs.x.shape[1:-2]
    for _ in parts:
        block_loss = jax.vmap(block_loss, (None, *[0] * (1 + len(rows))))
    if g is None:
        return _losses(layer, block_loss, inputs)

    like = _varying_as_losses(layer, block_loss, inputs)
    _check_constants(consts, perturbed.others[1], like)
    # Where parts may be on different devices each has its own sums, which are added up, and so communicated, once.
    apart = [p for i, p in enumerate(parts) if math.prod(parts[: i + 1]) <= layer.devices]
    start = _zero_totals(layer, inputs, g, perturbed, apart)
    block = functools.partial(_block, layer, block_loss, inputs, perturbed, like, len(apart))
    # Where the sweep is itself differentiated, the checkpoint keeps the residuals of a block from being stacked.
    totals, out = lax.scan(jax.checkpoint(block, prevent_cse=False), start, (inputs.x, rows, g))
    (dw, dbias, dconsts), (losses, aux, dx, drows) = totals, out

    def added(total, a):  # over the parts
        return None if total is None else total.sum(range(len(apart))).astype(a.dtype)

    return (losses, Inputs(dx, added(dw, inputs.w), added(dbias, inputs.bias), (drows, dconsts))), aux


def _losses(layer: Layer, block_loss, inputs: Inputs):
    rows, consts = inputs.others

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(_, slices):
        x, rows = slices
        return None, block_loss(consts, layer.logits(x, inputs.w, inputs.bias), *rows)

    return lax.scan(block, None, (inputs.x, rows))[1]


def _zero_totals(layer: Layer, inputs: Inputs, g, perturbed: Inputs, apart: list[int]):
    """Where dw, dbias and the gradients of what the loss closes over are added up."""

    def zeros(a, moves):
        return varying_as(jnp.zeros((*apart, *a.shape), layer.sum_dtype), g, *jax.tree.leaves(inputs)) if moves else None

    _, consts = inputs.others
    dconsts = jax.tree.map(lambda c, moves: jnp.zeros_like(c) if moves else None, consts, perturbed.others[1])
    return zeros(inputs.w, perturbed.w), zeros(inputs.bias, perturbed.bias), dconsts


def _block(layer: Layer, block_loss, inputs: Inputs, perturbed: Inputs, like: Array, apart: int, totals, slices):
    """One step: the losses of a block, its dx and row gradients, and what it adds to the totals."""
    (x, rows, g), (dw, dbias, dconsts) = slices, totals
    z = layer.logits(x, inputs.w, inputs.bias)
    loss, values, to_tree = of_perturbed(
        lambda z, others: block_loss(others[1], z, *others[0]),
        (z, (rows, inputs.others[1])),
        (True, perturbed.others),
    )
    losses, loss_vjp, aux = jax.vjp(loss, values, has_aux=True)
    dz, (drows, block_dconsts) = to_tree(loss_vjp(varying_as(g, like))[0])
    dx = layer.dx_of_few(dz, inputs.w).astype(inputs.x.dtype) if perturbed.x else None
    dw = layer.add_dw(dw, x, dz) if perturbed.w else None
    dbias = dbias + dz.sum(range(apart, dz.ndim - 1)) if perturbed.bias else None
    dconsts = jax.tree.map(jnp.add, dconsts, block_dconsts)
    return (dw, dbias, dconsts), (losses, aux, dx, drows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _varying_as_losses(layer: Layer, block_loss, inputs: Inputs) -> Array:
    """A zero that in `jax.shard_map` varies over the mesh axes that the losses vary over; nothing else is computed."""
    rows, consts = inputs.others
    x, rows = jax.tree.map(lambda a: a[0], (inputs.x, rows))
    losses, _ = block_loss(consts, layer.logits(x, inputs.w, inputs.bias), *rows)
    return varying_as(jnp.zeros((), layer.sum_dtype), losses)


def _check_constants(consts, perturbed, like) -> None:
    """Here shard_map's autodiff would sum a replicated array's gradient over all shards.

    We need each shard's own part, as the gradient of that shard's loss; the sum comes later.
    """
    for c, moves in zip(consts, perturbed, strict=True):
        if moves and jax.typeof(varying_as(c, like)) != jax.typeof(c):
            got = f"closing over {c.dtype}{list(c.shape)}, which is the same on shards whose losses differ"
            wanted = "it as a row argument, or varying as they do (jax.lax.pcast), to be differentiated"
            raise _checks.value_error("fused_linear", "loss_fn", got, wanted)
