r"""A row-wise loss of a linear layer, by blocks of rows.

For a block of B rows x, logits z = x·W + b, a row-wise loss ℓ, and the losses' cotangents g, with δ = g ⊙ ∂ℓ/∂z:

    dx = δ·Wᵀ        dW = Σ_blocks xᵀ·δ        db = Σ_rows δ

`sweep` is this loop. It differentiates ℓ with `jax.vjp` and knows nothing else of it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from . import _checks
from ._autodiff import of_perturbed
from ._matmuls import CONDITIONALS, PLATFORMS, Inputs, Layer, scan_blocks
from ._sharding import gathered, mesh_axes, parts_of, varying_as, varying_over


def max_rows(layer: Layer, features: int) -> int:
    """Rows per block, B. Every block reads all of W, and reads and writes all of dW in float32.

    On a CPU that is 19/B of the matmuls' time, so that B is at least 128. Beyond 512 little is gained. In between, the
    float32 logits of a block fit in 64 MiB, and in two thirds of what W takes in float32.

    On accelerators dW takes (4/3)·R/B of three matmuls, where a device's peak is R times its bandwidth: 295 on an H100
    and 240 on a TPU v5e; less where it is the matmul's epilogue. And a matmul of fewer than R rows is bound by reading
    W. B is 1024: of 2048 rows, a twentieth faster, the float32 logits alone would take 1 GiB for 128,256 classes.
    """
    if layer.on_cpu:
        classes, features = _checks.known(layer.classes, 2**15), _checks.known(features, 2**10)
        return min(512, max(128, min(2**24 // classes, 2 * features // 3)))
    return 1024


def row_parts(x: Array) -> tuple[int, ...]:
    return tuple(parts_of(x, axis) for axis in range(x.ndim - 1))


class RowBlocks(NamedTuple):
    """How arrays [*lead, ...] are split into n blocks [*part_axes, B, ...].

    Without a sharding there are no parts; with one, each part gives every block an equal share of its rows (see
    `jaxce._sharding`). Where blocks do not divide the rows, the last one takes some of the block before again.
    """

    lead: tuple[int, ...]
    parts: tuple[int, ...]  # of each leading axis
    blocks: int  # n
    size: int  # B

    @classmethod
    def of(cls, lead: tuple[int, ...], parts: tuple[int, ...], max_rows: int) -> "RowBlocks":
        rows = math.prod(lead)
        part_rows = rows // math.prod(parts)
        blocks = max(1, min(-(-rows // max_rows), part_rows)) if isinstance(rows, int) else 1
        size = -(-part_rows // blocks)
        blocks = -(-part_rows // size) if blocks > 1 else 1  # fewer, where rounding up left none for the last ones
        return cls(lead, parts, blocks, size)

    @property
    def part_axes(self) -> tuple[int, ...]:
        return tuple(p for p in self.parts if p > 1)

    @property
    def part_rows(self) -> int:
        return math.prod(self.lead) // math.prod(self.parts)

    def by_parts(self, a: Array) -> Array:
        """[*lead, ...] as [*part_axes, rows, ...]."""
        rest = a.shape[len(self.lead) :]
        divided = [n for p, length in zip(self.parts, self.lead, strict=True) for n in (p, length // p)]
        a = jnp.moveaxis(a.reshape(*divided, *rest), range(0, 2 * len(self.lead), 2), range(len(self.lead)))
        return a.reshape(*self.part_axes, self.part_rows, *rest)

    def cut(self, arrays: Any, row_mask: Array | None) -> tuple[Any, Callable]:
        """What to scan over, and `take(slice)`: that block of `arrays`, and which of its rows are new; None for all.

        With a mask, a slice is (row indices, which are new, if any is). Blocks take the rows that count first; the
        places left over repeat a row that counts, and are not new, as zeros there could make a loss NaN. Without one, a
        slice is a block of `arrays`, all new; or, where the last block repeats rows of the one before, its index.
        """
        arrays, n, size, axis = jax.tree.map(self.by_parts, arrays), self.blocks, self.size, len(self.part_axes)
        if row_mask is not None:
            row_mask = self.by_parts(row_mask)
            place = jnp.expand_dims(jnp.arange(n * size), range(axis))
            order = jnp.argsort(~row_mask, -1, stable=True)
            if n * size != self.part_rows:
                order = jnp.take(order, jnp.minimum(place.ravel(), self.part_rows - 1), -1)
            new = place < row_mask.sum(-1, keepdims=True)
            slices = tuple(self._blocks(a) for a in (jnp.where(new, order, order[..., :1]), new))
            return (*slices, slices[1].any(range(1, axis + 2))), lambda s: (self._taken(arrays, s[0]), s[1])
        if n * size == self.part_rows:
            return jax.tree.map(self._blocks, arrays), lambda s: (s, None)

        def take(i):
            start = jnp.minimum(i * size, self.part_rows - size)
            new = jnp.arange(size) >= i * size - start
            block = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, axis), arrays)
            return block, jnp.broadcast_to(new, (*self.part_axes, size))

        return jnp.arange(n), take

    def join(self, out: Any, row_mask: Array | None) -> Any:
        """[n, *part_axes, B, ...] as [*lead, ...], with 0 where masked."""
        axis, lead_axes, n, size = len(self.part_axes), len(self.lead), self.blocks, self.size
        out = jax.tree.map(
            lambda a: jnp.moveaxis(a, 0, axis).reshape(*self.part_axes, n * size, *a.shape[axis + 2 :]), out
        )
        if row_mask is not None:
            out = self._taken(out, jnp.maximum(jnp.cumsum(self.by_parts(row_mask), -1) - 1, 0))
        elif again := n * size - self.part_rows:
            last = (n - 1) * size
            kept = functools.partial(lax.slice_in_dim, axis=axis)
            out = jax.tree.map(lambda a: jnp.concatenate([kept(a, 0, last), kept(a, last + again, None)], axis), out)

        def by_lead(a):
            rest = a.shape[axis + 1 :]
            a = a.reshape(*self.parts, *(length // p for p, length in zip(self.parts, self.lead, strict=True)), *rest)
            a = jnp.moveaxis(a, range(lead_axes), range(0, 2 * lead_axes, 2)).reshape(*self.lead, *rest)
            if row_mask is None:
                return a
            return jnp.where(jnp.expand_dims(row_mask, range(lead_axes, a.ndim)), a, jnp.zeros((), a.dtype))

        return jax.tree.map(by_lead, out)

    def _blocks(self, a: Array) -> Array:
        """[*part_axes, n·B, ...] as [n, *part_axes, B, ...]."""
        axis = len(self.part_axes)
        return jnp.moveaxis(a.reshape(*self.part_axes, self.blocks, self.size, *a.shape[axis + 1 :]), axis, 0)

    def _taken(self, arrays: Any, rows: Array) -> Any:
        """Of each part [rows, ...], these."""

        def take(a, rows):
            return a.at[rows].get(mode="promise_in_bounds")

        for _ in self.part_axes:
            take = jax.vmap(take)
        return jax.tree.map(lambda a: take(a, rows), arrays)


def sweep_of(
    layer: Layer, loss_fn, has_aux, several, parts, block_size: int | None, x, w, bias, rows, row_mask
) -> tuple[Callable[..., Any], Inputs, Any]:
    """`sweep` of this loss, the inputs to run it on, and the jaxpr of the loss of a block.

    The loss is made a function of what it closes over too, which the rules of differentiation could not see otherwise.
    (`jax.closure_convert` does so for floating tracers only; a closed-over integer tracer would leak.)
    """
    # Filled by `_hoisted`, once for each size of block: what the loss closes over, and its jaxprs.
    consts: list[Any] = []
    traced: list[Any] = []

    @functools.cache  # blocks of the same size share one trace of the loss
    def block_loss(blocks: RowBlocks) -> Callable:
        loss = functools.partial(_block_loss, layer, loss_fn, has_aux, several)
        return _hoisted(layer, loss, blocks, (x, w, bias, rows), consts, traced)

    def plan(layer: Layer) -> tuple[RowBlocks, Callable]:
        most = layer.devices * (block_size or max_rows(layer, x.shape[-1]))
        blocks = RowBlocks.of(x.shape[:-1], parts, most)
        return blocks, block_loss(blocks)

    plans = {platform: plan(layer._replace(platform=platform)) for platform in PLATFORMS}
    axes = frozenset().union(*(losses_axes(traced[0], i) for i in range(len(traced[0].out_avals) if several else 1)))
    if any(axes - mesh_axes(a) for a in jax.tree.leaves((x, rows))):
        # Each shard's own gradients are wanted, also of what all shards share.
        x, rows = varying_over(axes, (x, rows))
        return sweep_of(layer, loss_fn, has_aux, several, parts, block_size, x, w, bias, rows, row_mask)
    inputs = Inputs(x, w, bias, (rows, list(map(jnp.asarray, consts)), row_mask))
    skips = CONDITIONALS and row_mask is not None and not coupled(traced[0])  # or devices would wait for one that skips
    return functools.partial(sweep, layer, plans, skips=skips), inputs, traced[0]


def losses_axes(closed: Any, i: int = 0) -> frozenset[Any]:
    """`mesh_axes` of the losses that this jaxpr returns first, or of its result i."""
    return closed.out_avals[i].manual_axis_type.varying


def coupled(closed: Any) -> bool:
    """Whether the loss communicates over an axis on which its losses differ; if types do not tell, over any.

    Gradients are then sums over the shards' cotangents, which only the backward pass knows.
    """
    names = {effect.name for effect in closed.effects if hasattr(effect, "name")}
    return any(name not in mesh_axes(lax.axis_index(name)) - losses_axes(closed) for name in names)


def check_constants(closed: Any, inputs: Inputs, perturbed: Inputs) -> None:
    """Refuses to differentiate a closed-over array that shards share, but losses do not.

    shard_map's autodiff would sum its gradient over all shards, before it is scaled on each.
    """
    for c, moves in zip(inputs.others[1], perturbed.others[1], strict=True):
        if moves and losses_axes(closed) - mesh_axes(c):
            got = f"closing over {c.dtype}{list(c.shape)}, which is the same on shards whose losses differ"
            wanted = "it as a row argument, or varying as they do (jax.lax.pcast), to be differentiated"
            raise _checks.value_error("fused_linear", "loss_fn", got, wanted)


def _hoisted(layer: Layer, block_loss: Callable, blocks: RowBlocks, arguments, consts: list, traced: list) -> Callable:
    """`block_loss` of one block as a function of `consts` too, to which is added what it closes over."""

    def of_one_block(x, w, bias, rows):
        one_block = (*[0] * len(blocks.part_axes), slice(blocks.size))
        x, rows = jax.tree.map(lambda a: blocks.by_parts(a)[one_block], (x, rows))
        return layer.logits(x, w, bias), *rows

    # Not built from shapes and dtypes: inside shard_map and Explicit meshes, types say more than these.
    block = jax.eval_shape(of_one_block, *arguments)
    closed, shapes = jax.make_jaxpr(block_loss, return_shape=True)(*block)
    treedef, known = jax.tree.structure(shapes), list(map(id, consts))
    consts += [c for c in closed.consts if id(c) not in known]
    places = [list(map(id, consts)).index(id(c)) for c in closed.consts]
    closed = closed.replace(consts=[None] * len(places))  # or what compiles it would keep them
    traced.append(closed)

    def hoisted(consts, logits, *rows):
        from jax.extend import core  # here, as on newer jax it imports Pallas: half the import time of this package

        outs = core.jaxpr_as_fun(closed.replace(consts=[consts[i] for i in places]))(*jax.tree.leaves((logits, rows)))
        return jax.tree.unflatten(treedef, outs)

    return hoisted


def _block_loss(layer: Layer, loss_fn, has_aux: bool, several: bool, logits, *rows):
    """(floating numbers, (other numbers, aux)) of a block of logits [B, K], checked.

    The first two have the structure that the loss returns, with None for what is in the other. Unless `several`, there
    is one number, the losses.
    """
    out, size = loss_fn(logits, *rows), logits.shape[0]
    pair = isinstance(out, tuple | list) and len(out) == 2
    losses: Any = out[0] if has_aux and pair else out
    aux = out[1] if has_aux and pair else None
    leaves = jax.tree.leaves(losses) if several else [losses]
    arrays = all(isinstance(a, Array | np.ndarray) and a.shape == (size,) for a in leaves)
    floating = [arrays and jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]
    if not any(floating) or (not pair if has_aux else pair and not several):
        got = ", ".join(map(_checks.described, leaves)) or "empty"
        wanted = f"floating losses of shape ({size},), or with has_aux=True (losses, aux)"
        wanted += ", or a pytree of such arrays" if several else ", or with reduction='none' a pytree"
        raise _checks.value_error("fused_linear", "the result of loss_fn", got, wanted)
    aux = jax.tree.map(lambda a: _checks.leading("fused_linear", "aux of loss_fn", a, (size,), "as x"), aux)
    flags = jax.tree.unflatten(jax.tree.structure(losses), floating)
    numbers = jax.tree.map(lambda a, f: jnp.asarray(a, layer.sum_dtype) if f else None, losses, flags)
    return numbers, (jax.tree.map(lambda a, f: None if f else jnp.asarray(a), losses, flags), aux)


def sweep(layer: Layer, plans: dict, inputs: Inputs, g: Any = None, perturbed: Any = None, *, skips: bool):
    """((losses [...], gradients), aux): the gradients of Σ g·losses, with None for what is not `perturbed`.

    Without g, (losses, aux). In `inputs`, x is [..., D], and the others are row arguments [..., any], a list of the
    arrays that the loss closes over, and which rows count [...], or None for all. Of other rows every result is 0.
    """

    return layer.by_platform(lambda layer, *args: _sweep(layer, plans, skips, perturbed, *args), inputs, g)


def _sweep(layer: Layer, plans: dict, skips: bool, perturbed: Any, inputs: Inputs, g: Any):
    blocks, block_loss = plans[layer.platform]
    rows, _, row_mask = inputs.others
    given, inputs = inputs, inputs._replace(w=gathered(inputs.w.astype(layer.operand_dtype), 1 - layer.class_axis))
    parts = blocks.part_axes
    for _ in parts:
        block_loss = jax.vmap(block_loss, (None, *[0] * (1 + len(rows))))
    if g is None:
        slices, take = blocks.cut((inputs.x, rows), row_mask)
        return blocks.join(_losses(layer, block_loss, skips, inputs, slices, take), row_mask)

    # The first part axes, as long as their product fits the devices, may lie on different ones: each part has its own
    # sums, which are added up, and so communicated, once.
    apart = [p for i, p in enumerate(parts) if math.prod(parts[: i + 1]) <= layer.devices]
    slices, take = blocks.cut((inputs.x, rows, g), row_mask)
    start = _zero_totals(layer, inputs, g, perturbed, apart)
    masks = row_mask is not None and (not skips or bool(parts))
    block = functools.partial(_block, layer, block_loss, inputs, perturbed, len(apart), masks)
    # Where the sweep is itself differentiated, the checkpoint keeps the residuals of a block from being stacked.
    block = jax.checkpoint(_step(block, skips, take, start, slices), prevent_cse=False)
    totals, out = scan_blocks(layer, block, start, slices)
    (dw, dbias, dconsts), (losses, aux, dx, drows) = totals, blocks.join(out, row_mask)

    def added(total, a):  # over the parts
        return None if total is None else total.sum(range(len(apart))).astype(_sum_dtype(layer, a))

    return (losses, Inputs(dx, added(dw, given.w), added(dbias, given.bias), (drows, dconsts, None))), aux


def _losses(layer: Layer, block_loss, skips: bool, inputs: Inputs, slices, take):
    consts = inputs.others[1]

    def block(_, taken, new):
        x, rows = taken
        return None, block_loss(consts, layer.logits(x, inputs.w, inputs.bias), *rows)

    step = jax.checkpoint(_step(block, skips, take, None, slices), prevent_cse=False)
    return lax.scan(step, None, slices)[1]


def _step(block: Callable, skips: bool, take: Callable, start: Any, slices: Any) -> Callable:
    """`block(totals, *take(slice))` as a step of a scan. If it skips, (totals, zeros) without a row that counts."""

    def run(totals, slices):
        return block(totals, *take(slices))

    if not skips:
        return run
    # The zeros have the types of results, which in shard_map say more than shapes; nothing else is computed.
    zeros = jax.tree.map(jnp.zeros_like, run(start, jax.tree.map(lambda a: a[0], slices))[1])

    def skip(totals, _):
        return totals, zeros

    return lambda totals, slices: lax.cond(slices[-1], run, skip, totals, slices)


def _zero_totals(layer: Layer, inputs: Inputs, g, perturbed: Inputs, apart: list[int]):
    """Where dw, dbias and the gradients of what the loss closes over are added up."""

    def zeros(a, moves):
        return varying_as(jnp.zeros((*apart, *a.shape), layer.sum_dtype), g, inputs) if moves else None

    def zeros_like(c, moves):
        return jnp.zeros_like(c, _sum_dtype(layer, c)) if moves else None

    dconsts = jax.tree.map(zeros_like, inputs.others[1], perturbed.others[1])
    return zeros(inputs.w, perturbed.w), zeros(inputs.bias, perturbed.bias), dconsts


def _sum_dtype(layer: Layer, a: Array):
    """In which a sum over rows is returned: float16 may overflow, before it is multiplied by the 1/N of a mean."""
    return layer.sum_dtype if a.dtype == jnp.float16 else a.dtype


def _block(layer: Layer, block_loss, inputs: Inputs, perturbed: Inputs, apart: int, masks: bool, totals, taken, new):
    """One step: the losses of a block, its dx and row gradients, and what its new rows add to the totals."""
    (x, rows, g), (dw, dbias, dconsts) = taken, totals
    g = g if new is None else jax.tree.map(lambda g: jnp.where(new, g, 0), g)
    # If no row of a block (or of one of its parts) counts, the block repeats a masked row. That may hold NaN: use 0.
    repeated = None if new is None or not masks else ~new
    x = x if repeated is None else jnp.where(repeated[..., None], 0, x)
    z = layer.logits(x, inputs.w, inputs.bias)
    loss, values, to_tree = of_perturbed(
        lambda z, others: block_loss(others[1], z, *others[0]),
        (z, (rows, inputs.others[1])),
        (True, perturbed.others[:2]),
    )
    losses, loss_vjp, aux = jax.vjp(loss, values, has_aux=True)
    dz, (drows, block_dconsts) = to_tree(loss_vjp(g)[0])
    if repeated is not None:
        dz = jnp.where(repeated[..., None], 0, dz)
        block_dconsts = jax.tree.map(lambda d: jnp.where(repeated.all(), 0, d), block_dconsts)
    dx = layer.dx_of_few(dz, inputs.w).astype(inputs.x.dtype) if perturbed.x else None
    dw = layer.add_dw(dw, x, dz) if perturbed.w else None
    dbias = dbias + dz.sum(range(apart, dz.ndim - 1)) if perturbed.bias else None
    dconsts = jax.tree.map(lambda total, d: total + d.astype(total.dtype), dconsts, block_dconsts)
    return (dw, dbias, dconsts), (losses, aux, dx, drows)
