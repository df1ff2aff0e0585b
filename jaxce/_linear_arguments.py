"""Arguments of a head, x @ w: checked, as arrays, and which of its rows and classes take part."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import _checks, _labels
from ._matmuls import Layer
from ._options import Options, Selection
from ._sharding import ClassShards
from ._top_k import listed_classes, top_k_labels


def labelled_rows(
    function, layer: Layer, rows, labels, tail, ignore_index, class_mask, where, weights, options: Options, shards
) -> tuple[tuple[Selection, Array | None, Any], Array | None, bool]:
    """(`Selection`, dense targets, what `loss_of_rows` takes of listed classes); the weights; if blocks are to skip."""
    pair = isinstance(labels, tuple)
    _checks.one_of(function, "tail", tail, (True, False), "a bool")
    if pair and len(labels) != 2:
        raise _checks.value_error(function, "labels", f"a tuple of {len(labels)}", "(class_ids, targets)")
    if tail and not pair:
        raise _checks.value_error(function, "tail", "True", "it with labels (class_ids, targets)")
    masks = class_mask, ignore_index, where, weights
    labels = _checks.as_array(function, "labels", labels) if isinstance(labels, list) else labels
    if not pair and not jnp.issubdtype(getattr(labels, "dtype", jnp.int32), jnp.floating):
        labels = _checks.integer(function, "labels", labels)
        _checks.shape(function, "labels", labels, rows, "one label for each row of x")
        selection, weights, skips = selected(function, rows, labels, *masks, shards)
        return (selection, None, None), weights, skips
    if ignore_index is not None:
        raise _checks.value_error(function, "ignore_index", f"{ignore_index!r}", "None, unless labels are integers")
    selection, weights, skips = selected(function, rows, None, *masks, shards)
    if pair:
        ids, t = top_k_labels(function, labels[0], labels[1], rows)
        selection, listed = listed_classes(ids, t.astype(layer.sum_dtype), tail, options, selection, shards)
        return (selection, None, listed), weights, skips
    targets = _checks.shape(function, "labels", jnp.asarray(labels), (*rows, shards.local), "a target for each class")
    targets = targets.astype(layer.sum_dtype) if targets.dtype == jnp.float64 else targets
    return (selection, targets, None), weights, skips


def selected(
    function, rows, labels, class_mask, ignore_index, where, weights, shards
) -> tuple[Selection, Array | None, bool]:
    """The `Selection` of a head; the weights, 0 for rows that do not count; and whether blocks are to skip those rows.

    If all classes are masked (`some` is False), no row counts. Then nothing is masked on the way, as a softmax of no
    class is NaN: all classes are computed, and the results are set to 0.
    """
    kept = [] if ignore_index is None else [~_labels.ignored(function, labels, ignore_index)]
    row_mask, weights = rows_that_count(function, where, weights, kept, rows)
    skips = row_mask is not None
    if class_mask is not None:
        class_mask = _checks.boolean(function, "class_mask", class_mask)
        _checks.shape(function, "class_mask", class_mask, (shards.local,), "one bool for each class of w")
        some = shards.total(class_mask.any().astype(jnp.int32)).astype(bool)
        class_mask = jnp.expand_dims(class_mask | ~some, range(len(rows)))
        row_mask = jnp.broadcast_to(some, rows) if row_mask is None else row_mask & some
    labels = None if labels is None else _labels.validated(labels, class_mask, row_mask, shards)
    return Selection(labels, class_mask, row_mask), weights, skips


def for_blocks(x: Array, selection: Selection, skips: bool) -> tuple[Array, Selection]:
    """x and `selection` as blocks take them. If they skip rows, they are given the row mask, and leave those out.

    Else they are given none, and x is 0 in masked rows: a NaN there, times a gradient of 0, would reach dw.
    """
    if skips or selection.row_mask is None:
        return x, selection
    return jnp.where(selection.row_mask[..., None], x, 0), selection._replace(row_mask=None)


def rows_that_count(function, where, weights, kept, rows) -> tuple[Array | None, Array | None]:
    """Which rows are neither masked nor of weight 0 (None: all), and the weights, 0 for the others."""
    if where is not None:
        where = _checks.boolean(function, "where", where)
        kept = [*kept, _checks.shape(function, "where", where, rows, "True for each row of x that takes part")]
    return _counted(kept, weights) if kept or weights is not None else (None, None)


@jax.jit  # or Python's 0 would be transferred to the device
def _counted(kept: list[Array], weights: Array | None) -> tuple[Array, Array | None]:
    if weights is None:
        return functools.reduce(jnp.logical_and, kept), None
    row_mask = functools.reduce(jnp.logical_and, kept, weights != 0)
    return row_mask, jnp.where(row_mask, weights, 0)


def mean_divisor(layer: Layer, rows, options: Options, weights, selection: Selection, shards: ClassShards) -> Array:
    class_weight = None
    if options.class_weights is not None and selection.labels is not None:
        class_weight = _labels.label_weight(selection.labels, options.class_weights, selection.row_mask, shards)
    return _divisor(rows, layer.sum_dtype, weights, class_weight, selection.row_mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _divisor(rows, dtype, weights, class_weight, row_mask) -> Array:
    divisor = jnp.ones(rows, dtype) if weights is None else weights
    divisor = divisor if class_weight is None else divisor * class_weight
    return jnp.sum(divisor if row_mask is None else jnp.where(row_mask, divisor, 0))


def check_options(function, reduction, class_axis, dtype, block_size) -> tuple[int, Any, int | None]:
    _checks.one_of(function, "reduction", reduction, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")
    wanted = "-1 for w [D, K] or 0 for w [K, D]"
    class_axis = _checks.index(function, "class_axis", class_axis, wanted)
    _checks.one_of(function, "class_axis", class_axis, (-1, 0), wanted)
    try:
        dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
        fits = dtype is None or jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        fits = False
    if not fits:
        raise _checks.type_error(function, "dtype", repr(dtype), "a floating dtype")
    if block_size is not None:
        block_size = _checks.index(function, "block_size", block_size, "a positive int")
        if block_size < 1:
            raise _checks.value_error(function, "block_size", repr(block_size), "a positive int")
    return class_axis, dtype, block_size


def check_weights(function, weights, normalizer, lead, reduction, layer):
    if weights is not None:
        weights = _checks.real(function, "weights", weights).astype(layer.sum_dtype)
        _checks.shape(function, "weights", weights, lead, "one weight for each row of x")
    if normalizer is not None:
        if reduction != "mean":
            raise _checks.value_error(function, "normalizer", f"given with reduction={reduction!r}", "it with 'mean'")
        normalizer = _checks.scalar(function, "normalizer", normalizer, layer.sum_dtype)
    return weights, normalizer


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def row_scale(reduction, weights, normalizer, lead, layer):
    """g, what each row's loss is multiplied by. Here, not after the sum, so that gradients need no second scaling."""
    if reduction == "none":
        return weights
    scale = jnp.ones(lead, layer.sum_dtype) if weights is None else weights
    if reduction == "sum":
        return scale
    divisor = scale.sum() if normalizer is None else normalizer
    return jnp.where(divisor == 0, 0, scale / jnp.where(divisor == 0, 1, divisor))
