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
from ._matmuls import PLATFORMS, Inputs, Layer, scan_blocks
from ._sharding import gathered, mesh_axes, parts_of, varying_as, varying_over


def max_rows(layer: Layer, features: int) -> int:
    """Rows per block, B. Every block reads all of W, and reads and writes all of dW in float32.

    On a CPU that is 19/B of the matmuls' time, so that B is at least 128. Beyond 512 little is gained. In between, the
    float32 logits of a block fit in 64 MiB, and in two thirds of what W takes.

    On accelerators it is (4/3)·R/B of three matmuls, for a device whose peak is R times its bandwidth: 295 on an H100
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
        blocks = max(1, min(-(-rows // max_rows), part_rows)) if isinstance(rows, int) else 1
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


def sweep_of(
    function: str, layer: Layer, loss_fn, has_aux: bool, parts, block_size: int | None, x, w, bias, rows
) -> tuple[Callable[..., Any], Inputs, Any]:
    """`sweep` of this loss, the inputs to run it on, and the jaxpr of the loss of a block.

    The loss is made a function of what it closes over too, which the rules of differentiation could not see otherwise.
    (`jax.closure_convert` does so for floating tracers only; a closed-over integer tracer would leak.)
    """
    consts: list[Any] = []
    traced: list[Any] = []

    @functools.cache  # blocks of the same size share one trace of the loss
    def block_loss(blocks: RowBlocks) -> Callable:
        return _hoisted(function, layer, loss_fn, has_aux, blocks, (x, w, bias, rows), consts, traced)

    def plan(layer: Layer) -> tuple[RowBlocks, Callable]:
        most = layer.devices * (block_size or max_rows(layer, x.shape[-1]))
        blocks = RowBlocks.of(x.shape[:-1], parts, most)
        return blocks, block_loss(blocks)

    plans = {platform: plan(layer._replace(platform=platform)) for platform in PLATFORMS}
    axes = losses_axes(traced[0])
    if any(axes - mesh_axes(a) for a in jax.tree.leaves((x, rows))):
        # Each shard's own gradients are wanted, also of what all shards share.
        x, rows = varying_over(axes, (x, rows))
        return sweep_of(function, layer, loss_fn, has_aux, parts, block_size, x, w, bias, rows)
    inputs = Inputs(x, w, bias, (rows, list(map(jnp.asarray, consts))))
    return functools.partial(sweep, layer, plans), inputs, traced[0]


def losses_axes(closed: Any) -> frozenset[Any]:
    """`mesh_axes` of the losses that this jaxpr returns first."""
    return closed.out_avals[0].manual_axis_type.varying


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


def _hoisted(
    function, layer: Layer, loss_fn, has_aux: bool, blocks: RowBlocks, arguments, consts: list, traced: list
) -> Callable:
    """The loss of one block as a function of `consts` too, to which is added what it closes over."""

    def block_loss(logits, *rows):
        out, size = loss_fn(logits, *rows), logits.shape[0]
        pair = isinstance(out, tuple | list) and len(out) == 2
        losses: Any = out[0] if has_aux and pair else out
        aux = out[1] if has_aux and pair else None
        is_array = isinstance(losses, Array | np.ndarray) and pair == has_aux
        if not is_array or losses.shape != (size,) or not jnp.issubdtype(losses.dtype, jnp.floating):
            wanted = f"floating losses of shape ({size},), or with has_aux=True (losses, aux)"
            raise _checks.value_error(function, "the result of loss_fn", _checks.described(losses), wanted)
        aux = jax.tree.map(lambda a: _checks.leading(function, "aux of loss_fn", a, (size,), "as x"), aux)
        return jnp.asarray(losses, layer.sum_dtype), aux

    def of_one_block(x, w, bias, rows):
        first = (0,) * (1 + len(blocks.part_axes))
        x, rows = jax.tree.map(lambda a: blocks.split(a)[first], (x, rows))
        return layer.logits(x, w, bias), *rows

    # Not built from shapes and dtypes: inside shard_map and Explicit meshes, types say more than these.
    block = jax.eval_shape(of_one_block, *arguments)
    closed, shapes = jax.make_jaxpr(block_loss, return_shape=True)(*block)
    traced.append(closed)
    treedef, known = jax.tree.structure(shapes), list(map(id, consts))
    new = [c for c in closed.consts if id(c) not in known]
    consts += new
    places = [list(map(id, consts)).index(id(c)) for c in closed.consts]

    def hoisted(consts, logits, *rows):
        from jax.extend import core  # here, as on newer jax it imports Pallas: half the import time of this package

        outs = core.jaxpr_as_fun(closed.replace(consts=[consts[i] for i in places]))(*jax.tree.leaves((logits, rows)))
        return jax.tree.unflatten(treedef, outs)

    return hoisted


def sweep(layer: Layer, plans: dict, inputs: Inputs, g: Any = None, perturbed: Any = None):
    """((losses [...], gradients), aux): the gradients of Σ g·losses, with None for what is not `perturbed`.

    Without g, (losses, aux). In `inputs`, x is [..., D], and the others are row arguments [..., any] and a list of the
    arrays that the loss closes over.
    """

    return layer.by_platform(lambda layer, *args: _sweep(layer, plans[layer.platform], perturbed, *args), inputs, g)


def _sweep(layer: Layer, plan: tuple[RowBlocks, Callable], perturbed: Any, inputs: Inputs, g: Any):
    blocks, block_loss = plan
    w, (rows, consts) = gathered(inputs.w.astype(layer.operand_dtype), 1 - layer.class_axis), inputs.others
    x, rows = jax.tree.map(blocks.split, (inputs.x, rows))
    split = Inputs(x, w, inputs.bias, (rows, consts))
    parts = blocks.part_axes
    for _ in parts:
        block_loss = jax.vmap(block_loss, (None, *[0] * (1 + len(rows))))
    if g is None:
        return jax.tree.map(blocks.join, _losses(layer, block_loss, split))

    # Where parts may be on different devices each has its own sums, which are added up, and so communicated, once.
    apart = [p for i, p in enumerate(parts) if math.prod(parts[: i + 1]) <= layer.devices]
    g = blocks.split(g, repeat=False)
    start = _zero_totals(layer, inputs, g, perturbed, apart)
    block = functools.partial(_block, layer, block_loss, split, perturbed, len(apart))
    # Where the sweep is itself differentiated, the checkpoint keeps the residuals of a block from being stacked.
    totals, out = scan_blocks(layer, jax.checkpoint(block, prevent_cse=False), start, (x, rows, g))
    (dw, dbias, dconsts), (losses, aux, dx, drows) = totals, jax.tree.map(blocks.join, out)

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
        return varying_as(jnp.zeros((*apart, *a.shape), layer.sum_dtype), g, inputs) if moves else None

    _, consts = inputs.others
    dconsts = jax.tree.map(lambda c, moves: jnp.zeros_like(c) if moves else None, consts, perturbed.others[1])
    return zeros(inputs.w, perturbed.w), zeros(inputs.bias, perturbed.bias), dconsts


def _block(layer: Layer, block_loss, inputs: Inputs, perturbed: Inputs, apart: int, totals, slices):
    """One step: the losses of a block, its dx and row gradients, and what it adds to the totals."""
    (x, rows, g), (dw, dbias, dconsts) = slices, totals
    z = layer.logits(x, inputs.w, inputs.bias)
    loss, values, to_tree = of_perturbed(
        lambda z, others: block_loss(others[1], z, *others[0]),
        (z, (rows, inputs.others[1])),
        (True, perturbed.others),
    )
    losses, loss_vjp, aux = jax.vjp(loss, values, has_aux=True)
    dz, (drows, block_dconsts) = to_tree(loss_vjp(g)[0])
    dx = layer.dx_of_few(dz, inputs.w).astype(inputs.x.dtype) if perturbed.x else None
    dw = layer.add_dw(dw, x, dz) if perturbed.w else None
    dbias = dbias + dz.sum(range(apart, dz.ndim - 1)) if perturbed.bias else None
    dconsts = jax.tree.map(jnp.add, dconsts, block_dconsts)
    return (dw, dbias, dconsts), (losses, aux, dx, drows)
