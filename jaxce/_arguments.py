"""Logits, masks and labels as the losses take them, brought into one form: the classes last, flattened to one axis."""

import jax.numpy as jnp
from jax import Array

from . import _checks, _labels
from ._checks import Arrays
from ._options import Selection
from ._sharding import ClassShards, last_axes_merged


def with_masks(
    function: str, logits: Array, axes: tuple[int, ...], where: Arrays | None, axis_name: str | None
) -> tuple[Array, Selection, ClassShards]:
    """Logits [..., K], their class mask and row mask, and how their classes are split."""
    shape = logits.shape
    logits = classes_last(logits, axes, shape)
    shards = ClassShards(logits.shape[-1], _checks.mesh_axis(function, axis_name))
    if where is None:
        return logits, Selection(), shards
    mask = _checks.mask(function, where, shape, axes)
    if mask.ndim < len(shape):
        mask = jnp.expand_dims(mask, axes)
    mask = classes_last(mask, axes, mask.shape if all(mask.shape[a] == 1 for a in axes) else shape)
    # A row without any class does not count.
    row_mask = jnp.broadcast_to(shards.total(mask.any(-1).astype(jnp.int32)) > 0, logits.shape[:-1])
    class_mask = mask if mask.shape[-1] == shards.local else None
    return logits, Selection(None, class_mask, row_mask), shards


def labelled_rows(
    function: str, logits: Arrays, labels: Arrays, axis, where, ignore_index, axis_name
) -> tuple[Array, Selection, ClassShards]:
    """`with_masks` for logits with integer labels. Rows labelled `ignore_index` are masked too."""
    z = _checks.floating(function, "logits", logits)
    y = _checks.integer(function, "labels", labels)
    axes = _checks.class_axes(function, axis, z.shape)
    rows = tuple(n for i, n in enumerate(z.shape) if i - z.ndim not in axes)
    batch = _checks.label_shape(function, y.shape, rows)
    size = iter(batch)
    shape = tuple(n if i - z.ndim in axes else next(size) for i, n in enumerate(z.shape))
    z, selection, shards = with_masks(function, jnp.broadcast_to(z, shape), axes, where, axis_name)
    row_mask, y = selection.row_mask, jnp.broadcast_to(y, batch)
    if ignore_index is not None:
        kept = ~_labels.ignored(function, y, ignore_index)
        row_mask = kept if row_mask is None else row_mask & kept
    y = _labels.validated(y, selection.class_mask, row_mask, shards)
    return z, Selection(y, selection.class_mask, row_mask), shards


def classes_last(array: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """`array` with `axes` moved to the end and flattened to one, in the order given.

    For (−1,) it is as it was: a class axis of size 1 stays 1, and is broadcast in `prepared`.
    """
    if axes == (-1,):
        return array
    wanted = (shape[a] if a in axes else array.shape[a] for a in range(-array.ndim, 0))
    array = jnp.moveaxis(jnp.broadcast_to(array, tuple(wanted)), axes, range(-len(axes), 0))
    return last_axes_merged(array, len(axes))
