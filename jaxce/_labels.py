"""What an integer label is inside the package: an int32 class, counted over all shards, or INVALID.

A label is INVALID when it is outside [0, K) or names a masked class. Its row's loss and gradient are NaN: the `logit`
of such a label is NaN, and spreads. A row that does not count has label 0, and is set to 0 at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from . import _checks
from ._sharding import ClassShards, in_auto

INVALID = -1  # no class, on any shard


def signed(labels: Array) -> Array:
    """As int32 or int64. What is beyond their range is no class, and becomes the largest number."""
    unsigned = jnp.issubdtype(labels.dtype, jnp.unsignedinteger)
    wide = labels.dtype.itemsize >= (4 if unsigned else 8)
    wanted = jax.dtypes.canonicalize_dtype(jnp.int64) if wide else jnp.int32
    if unsigned and wide:
        largest = min(jnp.iinfo(wanted).max, jnp.iinfo(labels.dtype).max)
        labels = jnp.minimum(labels, jnp.array(largest, labels.dtype))
    return labels.astype(wanted)


def ignored(function: str, labels: Array, ignore_index: ArrayLike) -> Array:
    index = _checks.integer(function, "ignore_index", ignore_index)
    _checks.shape(function, "ignore_index", index, (), "a scalar")
    if labels.dtype != index.dtype:
        labels, index = signed(labels), signed(index)
    dtype = max(labels.dtype, index.dtype, key=lambda dtype: dtype.itemsize)
    return labels.astype(dtype) == index.astype(dtype)


@functools.partial(jax.jit, static_argnums=3)
def validated(labels: Array, class_mask: Array | None, row_mask: Array | None, shards: ClassShards) -> Array:
    """Labels [...] as they are used inside."""
    labels = signed(labels)
    valid = (labels >= 0) & (labels < shards.classes)
    labels = jnp.where(valid, labels, INVALID).astype(jnp.int32)
    if class_mask is not None:
        shown = looked_up(class_mask.astype(jnp.int32), labels, shards) > 0
        labels = jnp.where(shown, labels, INVALID)
    return labels if row_mask is None else jnp.where(row_mask, labels, 0)


def local_index(labels: Array, shards: ClassShards) -> tuple[Array, Array]:
    """Where on this shard a label's class is, and whether it is here; 0 where it is not."""
    index = labels - shards.offset()
    here = (index >= 0) & (index < shards.local)
    return jnp.where(here, index, 0), here


def looked_up(table: Array, labels: Array, shards: ClassShards) -> Array:
    """table[..., label] for a table [..., K] whose leading axes are those of the labels or 1; 0 for INVALID labels."""

    def look_up(labels, table):
        index, here = local_index(labels, shards)
        found = jnp.take_along_axis(table, index[..., None], -1, mode="promise_in_bounds")[..., 0]
        return shards.total(jnp.where(here, found, 0))

    return in_auto(look_up, labels, labels.ndim, labels, table)


def label_weight(labels: Array, class_weights: Array, row_mask: Array | None, shards: ClassShards) -> Array:
    """Each row's class weight; 0 for rows that do not count.

    There inf (1/frequency of an absent class) would meet a gradient of zero, and make it NaN.
    """
    return looked_up(class_weights, labels if row_mask is None else jnp.where(row_mask, labels, INVALID), shards)
