r"""A row-wise loss of a linear layer, by blocks of rows.

For a block of B rows x, logits z = x·W + b, a row-wise loss ℓ, and the losses' cotangents g, with δ = g ⊙ ∂ℓ/∂z:

    dx = δ·Wᵀ        dW = Σ_blocks xᵀ·δ        db = Σ_rows δ

`sweep` is this loop. It differentiates ℓ with `jax.vjp` and knows nothing else of it.

Every block reads all of W and updates all of dW, which costs about 19/B of the matmuls' time, so B should not be below
128; beyond 512 little is gained. In between, B is the largest for which a block's float32 logits fit in 64 MiB and in
two thirds of what W takes, and is then made smaller to split the rows evenly.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _checks
from ._autodiff import of_moving
from ._layer import Layer, varying_as
from ._sharding import gathered, parts_of


def rows_per_block(features: int, classes: int) -> int:
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
    def of(cls, lead: tuple[int, ...], parts: tuple[int, ...], most: int) -> "RowBlocks":
        rows = math.prod(lead)
        part_rows = rows // math.prod(parts)
        blocks = max(1, min(-(-rows // most), part_rows))
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


class Inputs(NamedTuple):
    """What a sweep can be differentiated with respect to."""

    x: Any  # [n, *parts, B, D]
    w: Any
    bias: Any  # [K] or None
    rows: Any  # row arguments, [n, *parts, B, ...]
    consts: Any  # list of the arrays that the loss closes over


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
        return losses.astype(layer.sums), aux

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

    return functools.partial(sweep, layer, hoisted), Inputs(x, w, bias, rows, list(map(jnp.asarray, closed.consts)))


def sweep(layer: Layer, block_loss, inputs: Inputs, g: Any = None, moving: Any = None):
    """((losses [n, *parts, B], gradients), aux): the gradients of Σ g·losses, with None for inputs not `moving`.

    Without g, (losses, aux).
    """
    w = gathered(inputs.w.astype(layer.operands), 1 - layer.class_axis)
    parts = inputs.x.shape[1:-2]
    # Where parts may be on different devices each has its own sums, which are added up, and so communicated, once.
    apart = [p for i, p in enumerate(parts) if math.prod(parts[: i + 1]) <= layer.devices]

    like = None if g is None else _varying_as_losses(layer, block_loss, inputs)
    if g is not None:
        _check_constants(inputs.consts, moving.consts, like)

    loss_of_block = block_loss
    for _ in parts:
        loss_of_block = jax.vmap(loss_of_block, (None, *[0] * (1 + len(inputs.rows))))

    # Where the sweep is itself differentiated, the checkpoint keeps the residuals of a block from being stacked.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(totals, slices):
        x, rows, g = slices
        z = layer.logits(x, w, inputs.bias)
        if g is None:
            return totals, loss_of_block(inputs.consts, z, *rows)
        loss, values, to_tree = of_moving(
            lambda z, rows, consts: loss_of_block(consts, z, *rows),
            (z, rows, inputs.consts),
            (True, moving.rows, moving.consts),
        )
        losses, pull, aux = jax.vjp(loss, values, has_aux=True)
        dz, drows, block_dconsts = to_tree(pull(varying_as(g, like))[0])
        dw, dbias, dconsts = totals
        dx = layer.dx_of_few(dz, w).astype(inputs.x.dtype) if moving.x else None
        dw = layer.add_dw(dw, x, dz) if moving.w else None
        dbias = dbias + dz.sum(range(len(apart), dz.ndim - 1)) if moving.bias else None
        dconsts = jax.tree.map(jnp.add, dconsts, block_dconsts)
        return (dw, dbias, dconsts), (losses, aux, dx, drows)

    if g is None:
        return lax.scan(block, None, (inputs.x, inputs.rows, None))[1]

    def zeros(a, moves):
        return varying_as(jnp.zeros((*apart, *a.shape), layer.sums), g, *jax.tree.leaves(inputs)) if moves else None

    def sum_of_parts(total, a):
        return total.sum(range(len(apart))).astype(a.dtype)

    dconsts = jax.tree.map(lambda c, moves: jnp.zeros_like(c) if moves else None, inputs.consts, moving.consts)
    totals: Any = zeros(inputs.w, moving.w), zeros(inputs.bias, moving.bias), dconsts
    (dw, dbias, dconsts), (losses, aux, dx, drows) = lax.scan(block, totals, (inputs.x, inputs.rows, g))
    dw = sum_of_parts(dw, inputs.w) if moving.w else None
    dbias = sum_of_parts(dbias, inputs.bias) if moving.bias else None
    return (losses, Inputs(dx, dw, dbias, drows, dconsts)), aux


@functools.partial(jax.jit, static_argnums=(0, 1))
def _varying_as_losses(layer: Layer, block_loss, inputs: Inputs) -> Array:
    """A zero that in `jax.shard_map` varies over the mesh axes that the losses vary over; nothing else is computed."""
    x, rows = jax.tree.map(lambda a: a[(0,) * (inputs.x.ndim - 2)], (inputs.x, inputs.rows))
    losses, _ = block_loss(inputs.consts, layer.logits(x, inputs.w, inputs.bias), *rows)
    return varying_as(jnp.zeros((), layer.sums), losses)


def _check_constants(consts, moving, like) -> None:
    """In shard_map autodiff sums the gradient of what does not vary over the shards, of all shards' losses.

    But each shard's part is wanted, as the gradient of that shard's loss.
    """
    for c, moves in zip(consts, moving, strict=True):
        if moves and jax.typeof(varying_as(c, like)) != jax.typeof(c):
            got = f"closing over {c.dtype}{list(c.shape)}, which is the same on shards whose losses differ"
            wanted = "it as a row argument, or varying as they do (jax.lax.pcast), to be differentiated"
            raise _checks.value_error("fused_linear", "loss_fn", got, wanted)
