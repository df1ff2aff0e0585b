"""A row's numbers through a linear layer, by blocks of classes: 4 matmuls, and no accumulator of w's size.

The forward pass joins the `Sums` of the blocks. The backward pass makes each block of logits again, finishes that block
of dw at once, and adds to dx. What is saved is x, w, labels and numbers per row. The mathematics is `_rule`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _labels, _rule
from ._autodiff import with_backward
from ._checks import known
from ._matmuls import CONDITIONALS, Inputs, Layer, checkpointed, over_classes
from ._options import Selection, Values, listed_vjp, prepared, prepared_vjp
from ._row_blocks import RowBlocks
from ._rule import Row
from ._schedule import is_label, nan_if_invalid, single, sums_of_block
from ._sharding import ClassShards, gathered, varying_as
from ._softmax import is_correct, row_of_others, with_listed_capped


def max_classes(layer: Layer, rows: int, block_size: int | None, with_entropy: bool) -> int:
    """Classes per block of each part. Every block reads and writes dx in float32: R/C of four matmuls, for C classes.

    R is the device's peak over its bandwidth: 295 on an H100, 240 on a TPU v5e. So C is 2048 there, or more where the
    float32 logits of a block then still fit in 64 MiB. On CPU they fit in 16 MiB, and XLA makes one more array of them;
    with the entropy, in 6.4 MiB. Larger blocks take no less time.
    """
    if block_size is not None:
        block_size = 128 * -(-block_size // 128)
    else:
        rows = known(rows, 2**13)
        numbers = 2**23 // (5 if with_entropy else 2) if layer.on_cpu else 2**24
        block_size = max(0 if layer.on_cpu else 2048, numbers // max(1, rows))
    return layer.devices * block_size // layer.parts


def class_blocked_rows(
    layer: Layer,
    inputs: Inputs,
    selection: Selection,
    block_size: int | None,
    shards: ClassShards,
    parts: tuple[int, ...],
    with_entropy: bool = False,
) -> tuple[Row, Array | None]:
    """The numbers of the rows [...] of x [..., D], differentiable with respect to `inputs`.

    `inputs.others` is `Values` without logits, and `parts` are those of the axes of rows (see `_sharding`). With
    entropy, also 1.0 where the label is the first largest class. With listed classes, the numbers of the other classes,
    and the logits [..., M] of those listed.
    """
    inputs = varying_as(inputs, inputs, selection, shards.offset())

    def by_blocks(loop, *arguments, **static):
        def run(layer, inputs, *arguments):
            inputs = inputs._replace(w=gathered(inputs.w, 1 - layer.class_axis))
            return loop(layer, shards, block_size, inputs, *arguments, **static)

        return layer.by_platform(run, *arguments, platforms=("cpu", "gpu"))  # TPUs as GPUs

    def forward(arguments):
        numbers = functools.partial(by_blocks, _forward, with_entropy=with_entropy)
        return _on_rows_that_count(lambda *arguments: (numbers(*arguments), ()), parts, *arguments)[0]

    def backward(arguments, out, g, perturbed):
        def run(*arguments):
            gradients = by_blocks(_backward, *arguments, perturbed=perturbed[0])
            return gradients.x, gradients._replace(x=None)

        dx, others = _on_rows_that_count(run, parts, *arguments, out, g)
        return others._replace(x=dx), None

    (row, listed), correct = with_backward(forward, backward)((inputs, selection))
    return row, correct if with_entropy else listed


SHARES = 5, 10, 16  # sixteenths of the rows: the fewest of them that hold all that count are computed


def _on_rows_that_count(run, parts: tuple[int, ...], inputs: Inputs, selection: Selection, *by_row):
    """`run(inputs, selection, *by_row)` on the rows that count, gathered into the smallest of `SHARES` that holds them.

    Forward, `by_row` is (), and `run` returns (numbers per row, ()). Backward, it is (those numbers, their cotangents),
    and `run` returns (dx, the other gradients). Masked rows get 0. Of sharded rows, each part gathers its own.
    """
    mask, lead = selection.row_mask, inputs.x.shape[:-1]
    if mask is None:
        return run(inputs, selection, *by_row)

    per_row = any(a.ndim > 1 and a.shape[:-1] == lead for a in jax.tree.leaves(inputs.others))

    def of_all(inputs, selection, *by_row):  # a NaN in x, times a gradient of 0, would reach dw
        inputs = inputs._replace(x=jnp.where(selection.row_mask[..., None], inputs.x, 0))
        if not per_row and selection.class_mask is None:  # a mask of finite logits would be one more array on CPU
            selection = selection._replace(row_mask=None)
        return run(inputs, selection, *by_row)

    whole = RowBlocks(lead, parts, 1, 0)
    if not CONDITIONALS or per_row or known(whole.part_rows, 0) < SHARES[-1]:
        return of_all(inputs, selection, *by_row)

    most = whole.by_parts(mask).sum(-1).max()
    too_few = [most * SHARES[-1] > whole.part_rows * share for share in SHARES[:-1]]
    blocks = [whole._replace(size=-(-whole.part_rows * share // SHARES[-1])) for share in SHARES[:-1]]
    branches = [*(functools.partial(_on_share, run, block) for block in blocks), of_all]
    return lax.switch(sum(a.astype(jnp.int32) for a in too_few), branches, inputs, selection, *by_row)


def _on_share(run, blocks: RowBlocks, inputs: Inputs, selection: Selection, *by_row):
    """As `_on_rows_that_count`, of one block that has room for all of them.

    Copies of one row, with x = 0, fill it up. Their cotangents are 0: they add nothing to dw. Nor has any class a
    probability, about their shift of 1e30: about the shift of the row that was copied, exp(z) could be inf, and 0·inf
    is NaN.
    """
    rows = inputs.x, selection.labels, selection.listed_ids, *by_row
    slices, take = blocks.cut(rows, selection.row_mask)
    (x, labels, listed_ids, *by_row), new = take(jax.tree.map(lambda a: a[0], slices))

    def or_zero(a):
        return jnp.where(jnp.expand_dims(new, range(new.ndim, a.ndim)), a, 0)

    x, by_row = jax.tree.map(or_zero, (x, by_row))  # what stands in may be masked itself, if no row counts
    if by_row:
        (row, listed), g = by_row
        by_row = (row._replace(shift=jnp.where(new, row.shift, 1e30)), listed), g

    def of_rows(a):  # [1, ..., 1, any] for [*lead, any]
        return a.reshape(*[1] * new.ndim, a.shape[-1]) if a.ndim else a

    others, class_mask = jax.tree.map(of_rows, (inputs.others, selection.class_mask))
    selected = Selection(labels, class_mask, listed_ids=listed_ids)
    out, rest = run(Inputs(x, inputs.w, inputs.bias, others), selected, *by_row)
    if rest:
        shaped = jax.tree.map(lambda a, d: None if d is None else d.reshape(a.shape), inputs.others, rest.others)
        rest = rest._replace(others=shaped)
    return blocks.join(jax.tree.map(lambda a: a[None], out), selection.row_mask), rest


def _block(layer: Layer, shards: ClassShards, inputs: Inputs, selection: Selection, start, size: int):
    """Of one block of classes: w, `Values`, `Selection`, and its classes [1, ..., 1, C]."""

    def take(a: Array) -> Array:
        return layer.take(a, start, size, -1) if a.shape[-1:] == (layer.classes,) else a

    w = layer.take_w(inputs.w, start, size)
    values, bias, class_mask = jax.tree.map(take, (inputs.others, inputs.bias, selection.class_mask))
    z = layer.logits(inputs.x, w, bias)
    ids = jnp.expand_dims(layer.take(shards.ids(), start, size), range(z.ndim - 1))
    values, selection = values._replace(logits=z), selection._replace(class_mask=class_mask, in_block=())
    if selection.listed_ids is not None:
        part, place = jnp.divmod(selection.listed_ids, layer.classes // layer.parts)
        here = (place >= start) & (place < start + size)
        selection = selection._replace(listed_ids=jnp.where(here, part * size + place - start, _labels.INVALID))
    return w, values, selection, ids


def _forward(layer: Layer, shards, block_size, inputs: Inputs, selection, with_entropy: bool):
    labels, listed_ids = selection.labels, selection.listed_ids

    @checkpointed
    def step(total, start, size):
        total, listed = total
        _, values, selected, ids = _block(layer, shards, inputs, selection, start, size)
        z, t = prepared(values, selected)
        s = sums_of_block(layer.on_cpu, z, is_label(labels, ids), t, ids if with_entropy else None)
        listed = None if listed is None else listed + listed_vjp(values, selected)[0]
        return _rule.joined(total, s), listed

    zeros = varying_as(jnp.zeros(inputs.x.shape[:-1], layer.sum_dtype), inputs)
    t = None if inputs.others.targets is None else zeros
    no_class = jnp.full_like(zeros, jnp.iinfo(jnp.int32).max, jnp.int32) if with_entropy else None
    nothing = single(zeros - jnp.inf, None if labels is None else zeros > 0, t, no_class)
    if labels is not None:
        nothing = nothing._replace(logit=nan_if_invalid(zeros, labels))
    listed = None if listed_ids is None else jnp.broadcast_to(zeros[..., None], listed_ids.shape)
    most = max_classes(layer, zeros.size, block_size, with_entropy)
    s, listed = over_classes(step, (nothing, listed), layer.classes // layer.parts, most)
    s = shards.joined(s)
    row = _rule.row_of(s)
    correct = is_correct(s, row, labels) if with_entropy else None
    out = (row, None) if listed is None else (row_of_others(row), shards.total(listed))
    return out, correct


def _backward(layer: Layer, shards, block_size, inputs: Inputs, selection, out, g, perturbed: Inputs):
    """The gradients of ⟨g, out⟩ with respect to `inputs`, None where not `perturbed`."""
    rows, g = range(inputs.x.ndim - 1), shards.cotangents(g, inputs.x)
    row, g_row = jax.tree.map(lambda a: a[..., None], (out[0], g[0]))

    @checkpointed
    def step(x_transposed, grads, start, size):
        w, values, selected, ids = _block(layer, shards, inputs, selection, start, size)
        (z, t), options_vjp = prepared_vjp(values, selected)
        z = z if selection.listed_ids is None else with_listed_capped(z, row)
        (dvalues,) = options_vjp(_rule.gradient(z, is_label(selection.labels, ids), t, row, g_row))
        if selected.listed_ids is not None:
            dvalues = listed_vjp(values, selected)[1](dvalues, g[1])
        dz = dvalues.logits

        def put(total, block, axis=-1):
            return layer.put(total, block, start, axis)

        def added(total, block):
            if total is None:
                return None
            return put(total, block) if total.shape[-1:] == (layer.classes,) else total + block

        dw = layer.dw(inputs.x, dz, x_transposed) if perturbed.w else None
        return Inputs(
            grads.x + layer.dx(dz, w) if perturbed.x else None,
            put(grads.w, dw, layer.class_axis) if perturbed.w else None,
            put(grads.bias, dz.sum(rows)) if perturbed.bias else None,
            Values(*map(added, grads.others, dvalues)),
        )

    grads = jax.tree.map(lambda a, moves: jnp.zeros_like(a) if moves else None, inputs, perturbed)
    grads = grads if grads.x is None else grads._replace(x=grads.x.astype(layer.sum_dtype))

    step = functools.partial(step, layer.transposed(inputs.x) if perturbed.w else None)
    most = max_classes(layer, row.shift.size, block_size, row.entropy is not None)
    grads = over_classes(step, grads, layer.classes // layer.parts, most)
    return grads if grads.x is None else grads._replace(x=grads.x.astype(inputs.x.dtype))
