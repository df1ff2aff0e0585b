"""The arguments of the losses, checked and brought into one form: classes last, labels local, options as arrays."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from . import _checks
from ._sharding import in_auto
from ._softmax import INVALID_LABEL, statistics_dtype, total


class Rows(NamedTuple):
    """Logits with the classes last, and what is masked of them."""

    logits: Array  # [..., K]
    where: Array | None  # class mask, broadcast against the logits
    keep: Array | None  # [...] rows that count
    visible: Array | None  # both, broadcast against the logits
    class_count: Array | int  # classes of each row that are not masked, on all shards

    @classmethod
    def of(
        cls,
        function: str,
        logits: Array,
        axes: tuple[int, ...],
        where: ArrayLike | None,
        axis_name,
    ) -> "Rows":
        shape = logits.shape
        logits = classes_last(logits, axes, shape)
        classes = logits.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
        if where is None:
            return cls(logits, None, None, None, classes)
        mask = _checks.mask(function, where, shape, axes)
        if mask.ndim < len(shape):
            mask = jnp.expand_dims(mask, axes)
        mask = mask if all(mask.shape[a] == 1 for a in axes) else _broadcast_classes(mask, axes, shape)
        mask = classes_last(mask, axes, mask.shape)
        keep = total(mask.any(-1).astype(jnp.int32), axis_name) > 0
        keep = jnp.broadcast_to(keep, logits.shape[:-1])
        if mask.shape[-1] < logits.shape[-1]:  # a mask of rows
            return cls(logits, None, keep, keep[..., None], classes)
        # Counted apart, and only where smoothing wants it: on CPU the sum makes integers of the whole mask.
        shown = total(mask.sum(-1, keepdims=True), axis_name)
        return cls(logits, mask, keep, mask, jnp.maximum(shown, 1))

    def without(self, ignored: Array) -> "Rows":
        keep = ~ignored if self.keep is None else self.keep & ~ignored
        return self._replace(
            keep=keep,
            visible=keep[..., None] if self.where is None else self.where & keep[..., None],
        )


class Options(NamedTuple):
    """The options as arrays of the statistics' dtype; `None`: not used."""

    dtype: Any
    label_smoothing: Array | None
    class_weights: Array | None  # [1, ..., 1, K]
    logit_cap: Array | None
    z_loss: Array | None

    @classmethod
    def of(
        cls,
        function: str,
        logits: Array | jax.ShapeDtypeStruct,
        targets: Array | None,
        label_smoothing: ArrayLike = 0.0,
        class_weights: ArrayLike | None = None,
        logit_cap: ArrayLike | None = None,
        z_loss: ArrayLike = 0.0,
        axis_name: str | None = None,
    ) -> "Options":
        dtype = statistics_dtype(logits, targets)
        smoothing = cap = penalty = weights = None
        if not _is_zero(label_smoothing):
            smoothing = _checks.scalar(function, "label_smoothing", label_smoothing, dtype, 0, 1)
        if class_weights is not None:
            weights = _checks.real(function, "class_weights", class_weights).astype(dtype)
            per = "one weight for each class" + ("" if axis_name is None else " of this shard")
            _checks.shape(function, "class_weights", weights, logits.shape[-1:], per)
            weights = jnp.expand_dims(weights, range(logits.ndim - 1))
        if logit_cap is not None:
            cap = _checks.scalar(function, "logit_cap", logit_cap, dtype, 0, math.inf, open_interval=True)
        if not _is_zero(z_loss):
            penalty = _checks.scalar(function, "z_loss", z_loss, dtype, 0, math.inf)
        return cls(dtype, smoothing, weights, cap, penalty)


def labelled_rows(function, logits, labels, axis, where, ignore_index, axis_name) -> tuple[Rows, Array]:
    """The rows, and for each its label as `Selection.labels` has it."""
    logits = _checks.floating(function, "logits", logits)
    labels = _checks.integer(function, "labels", labels)
    axes = _checks.class_axes(function, axis, logits.shape)
    row_shape = tuple(n for i, n in enumerate(logits.shape) if i - logits.ndim not in axes)
    batch = _checks.label_shape(function, labels.shape, row_shape)
    rows = Rows.of(function, logits, axes, where, axis_name)
    local_classes = rows.logits.shape[-1]
    if batch != row_shape:
        rows = rows._replace(
            logits=jnp.broadcast_to(rows.logits, (*batch, local_classes)),
            keep=None if rows.keep is None else jnp.broadcast_to(rows.keep, batch),
        )

    labels = jnp.broadcast_to(labels, batch)
    if ignore_index is not None:
        rows = rows.without(ignored(function, labels, ignore_index))
    return rows, local_labels(labels, rows.keep, local_classes, axis_name)


def ignored(function: str, labels: Array, ignore_index: ArrayLike) -> Array:
    labels = signed(labels)
    return labels == _checks.scalar(function, "ignore_index", ignore_index, labels.dtype)


def local_labels(labels: Array, keep: Array | None, local_classes: int, axis_name) -> Array:
    """Labels as `Selection.labels` has them: int32, counted from this shard's first class; 0 for rows not kept."""
    labels = signed(labels)
    first_class, classes = 0, local_classes
    if axis_name is not None:
        first_class = local_classes * lax.axis_index(axis_name)
        classes = local_classes * lax.axis_size(axis_name)
    valid = (labels >= 0) & (labels < classes)
    if keep is not None:
        valid = valid | ~keep
        labels = jnp.where(keep, labels, 0)
    labels = labels.astype(jnp.int32) - first_class
    return jnp.where(valid, labels, INVALID_LABEL)


def class_weight_of(labels: Array, keep: Array | None, class_weights: Array, axis_name) -> Array:
    """0 for rows that do not count: an infinite weight of some class must not be multiplied with their 0 gradient."""
    owned = (labels >= 0) & (labels < class_weights.size)
    owned = owned if keep is None else owned & keep

    def look_up(labels, owned, class_weights):
        return jnp.where(owned, class_weights.ravel()[jnp.where(owned, labels, 0)], 0)

    return total(in_auto(look_up, labels, labels.ndim, labels, owned, class_weights), axis_name)


def classes_last(array: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """`array` with `axes` moved to the end and flattened to one, in the order given."""
    if axes == (-1,):
        return array
    array = jnp.moveaxis(_broadcast_classes(array, axes, shape), axes, range(-len(axes), 0))
    return array.reshape(
        (
            *array.shape[: array.ndim - len(axes)],
            math.prod(array.shape[array.ndim - len(axes) :]),
        )
    )


def _broadcast_classes(array: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(
        array,
        tuple(shape[a] if a in axes else array.shape[a] for a in range(-array.ndim, 0)),
    )


def signed(labels: Array) -> Array:
    """As int32 or int64, what is beyond their range being no class and so left at the largest number."""
    wanted = jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32
    if jnp.issubdtype(labels.dtype, jnp.unsignedinteger) and labels.dtype.itemsize >= 4:
        labels = jnp.minimum(labels, jnp.array(jnp.iinfo(wanted).max, labels.dtype))
    return labels.astype(wanted)


def _is_zero(option: ArrayLike) -> bool:
    return isinstance(option, int | float) and option == 0
