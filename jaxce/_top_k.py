"""Sparse soft targets: of each row some classes are listed, with a target each.

Their loss is the dense one of M + 1 classes: those listed, and all others as one, whose logit is their log-normalizer:

    log Σ_k exp z_k = log(Σ_m exp z_{c_m} + exp(lse of the others))

Nothing cancels, however small the probability of the listed classes, or of all others, is. `_rule` has the gradient of
the others; `_listed` puts that of the listed classes in its place.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from . import _checks, _labels
from ._arguments import with_masks
from ._checks import Arrays, Axes
from ._elementary import finite, product, weighted
from ._options import Options, Selection, Values, combined, statistics_dtype, values_of
from ._rule import Row
from ._sharding import ClassShards
from ._softmax import row_statistics


def softmax_cross_entropy_with_top_k_labels(
    logits: Arrays,
    class_ids: Arrays,
    targets: Arrays,
    axis: Axes = -1,
    where: Arrays | None = None,
    *,
    tail: bool = False,
    label_smoothing: ArrayLike = 0.0,
    class_weights: Arrays | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of each row with targets for some classes: E = −Σ_m t_m log o_{c_m}, o = softmax(logits).

    It equals `softmax_cross_entropy` with dense targets that are 0 elsewhere, and makes no dense array. It is for
    distillation from a teacher's k largest probabilities. Every differentiation mode works, also with respect to the
    targets. Options may be traced.

    Args:
        logits: unnormalized log-probabilities, floating, with shape [..., num_classes].
        class_ids: integer, with shape [..., M], in [0, num_classes), counted over all shards. Targets of equal ids add.
        targets: real, with the shape of `class_ids`. A target of 0 is padding, whatever its id.
        axis: the class axis of `logits`, a tuple for several (ids index the classes flattened in that order), or None
            for all. M is the last axis in any case.
        where: bool, True for what takes part: classes, with as many axes as `logits`, or rows, with one less than
            `class_ids`. The target of a masked class counts as 0.
        tail: whether all other classes are one more class, of target 1 − Σ_m t_m and probability 1 − Σ_m o_{c_m}.
            Without it a student of truncated targets learns that other classes have probability 0. Targets may sum to
            1 at most, or the loss has no lower bound: renormalize those that were rounded to 16 bits.
        label_smoothing, logit_cap, z_loss, axis_name: see `softmax_cross_entropy`. Smoothing is over all num_classes.
        class_weights: real, with shape [num_classes]. They multiply the smoothed targets, but not the tail's.

    Returns:
        The loss of each row, with shape [...], in float32, or float64 if logits or targets are. Nothing is averaged.
        A row has loss 0 and gradient exactly 0, whatever it holds, if it or all its classes are masked. In other rows
        an id outside [0, num_classes) with a target other than 0 makes loss and gradient NaN.

    Raises:
        TypeError: logits are not floating, ids not integer, targets or options not real, or another dtype is wrong.
        ValueError: shapes do not fit, axes are out of range or repeated, there is no class, or an option is out of
            range. A traced one makes the loss NaN instead.

    Example: two of four classes; with `tail`, the other two together have the target 0.2.
        >>> import jax, jax.numpy as jnp, jaxce
        >>> z, ids, t = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([3, 1]), jnp.array([0.7, 0.1])
        >>> loss = jaxce.softmax_cross_entropy_with_top_k_labels
        >>> dense = jax.nn.softmax(z) * t.sum() - jnp.array([0, 0.1, 0, 0.7])
        >>> bool(jnp.allclose(jax.grad(loss)(z, ids, t), dense, atol=1e-6))
        True
        >>> print(f"{loss(z, ids, t):.4f}, {loss(z, ids, t, tail=True):.4f}")
        0.5522, 0.8148
    """
    function = "softmax_cross_entropy_with_top_k_labels"
    _checks.one_of(function, "tail", tail, (True, False), "a bool")
    z = _checks.floating(function, "logits", logits)
    axes = _checks.class_axes(function, axis, z.shape)
    rows = tuple(n for i, n in enumerate(z.shape) if i - z.ndim not in axes)
    ids, t = top_k_labels(function, class_ids, targets, rows)
    dtype = statistics_dtype(z, t)
    z, selection, shards = with_masks(function, z if dtype == jnp.float32 else z.astype(dtype), axes, where, axis_name)
    options = Options.of(function, dtype, z.ndim, shards, label_smoothing, class_weights, logit_cap, z_loss)
    selection, listed = listed_classes(ids, t.astype(dtype), tail, options, selection, shards)
    values = values_of(z, None, z.shape, options, selection, shards)
    return loss_of_rows(*row_statistics(values, selection, shards), listed, options, selection, shards)


def top_k_labels(function: str, class_ids: Arrays, targets: Arrays, rows: tuple[int, ...]) -> tuple[Array, Array]:
    ids, t = _checks.integer(function, "class_ids", class_ids), _checks.real(function, "targets", targets)
    _checks.shape(function, "class_ids", ids, (*rows, *(ids.shape[-1:] or (1,))), "that of the rows and one axis more")
    _checks.shape(function, "targets", t, ids.shape, "as class_ids")
    return ids, t


def listed_classes(
    class_ids: Array, targets: Array, tail: bool, options: Options, selection: Selection, shards: ClassShards
) -> tuple[Selection, Any]:
    """`selection` with each row's listed classes, and for `loss_of_rows` which ids [..., M] list one, their targets and
    class weights, and the target [...] of all others.
    """
    mask, row_mask = selection.class_mask, selection.row_mask
    ids = _labels.validated(class_ids, None, None, shards)
    t = targets if row_mask is None else jnp.where(row_mask[..., None], targets, 0)
    invalid = ((t != 0) & (ids == _labels.INVALID)).any(-1)
    if mask is not None:
        ids = _labels.validated(ids, jnp.expand_dims(mask, -2), None, shards)
    used = ids != _labels.INVALID
    used = used & (t != 0) if tail else used  # with a tail, padding (t = 0) must not take its class out of it
    t = jnp.where(used, t, 0)

    # Of equal ids one, the first, stands for all.
    same = (ids[..., None] == ids[..., None, :]) & used[..., None, :]
    unique = used & ~jnp.tril(same, -1).any(-1)
    rest = _one_minus_sum(t) if tail else jnp.zeros(t.shape[:-1], t.dtype)
    rest = jnp.where(invalid, jnp.nan, rest)
    t = jnp.where(same & unique[..., None], t[..., None, :], 0).sum(-1)

    ids, weights = jnp.where(unique, ids, _labels.INVALID), options.class_weights
    if weights is not None:
        weights = _labels.looked_up(weights[..., None, :], ids, shards)
    index, here = _labels.local_index(ids, shards)
    return selection._replace(listed_ids=jnp.where(here, index, _labels.INVALID)), (unique, t, weights, rest)


def _one_minus_sum(t: Array) -> Array:
    """1 − Σ t with all its digits, though it may be as small as the rounding of the sum.

    Multiples of 2⁻¹², and then of 2⁻²⁴, are added without rounding.
    """
    total = jnp.ones(t.shape[:-1], t.dtype)
    for unit in (2.0**12, 2.0**24):
        coarse = lax.stop_gradient(jnp.round(t * unit) / unit)
        total, t = total - coarse.sum(-1), t - coarse
    return total - t.sum(-1)


def loss_of_rows(
    row: Row, logits: Array | None, listed: Any, options: Options, selection: Selection, shards: ClassShards
) -> Array:
    """The loss of each row. With listed classes, `row` is of the others, and `logits` [..., M] are of those listed."""
    if logits is None:
        return combined(row, options, selection, shards)
    unique, t, weights, rest = listed
    # Subtract the largest, a constant: the softmax is the same, and a shift of 1e4 does not round log_sum.
    m = jnp.maximum(row.shift, jnp.where(unique, logits, -jnp.inf).max(-1, initial=-jnp.inf))
    m = lax.stop_gradient(finite(m))
    z = jnp.concatenate([logits - m[..., None], ((row.shift - m) + row.log_sum)[..., None]], -1)
    smoothing, share = options.label_smoothing, None
    if smoothing is not None:
        mass, kept = t.sum(-1) + rest, 1 - smoothing
        share = smoothing * mass / jnp.asarray(selection.class_count(shards), smoothing.dtype)
        t, rest = kept * t + share[..., None], kept * rest + share * row.mass
    t = t if weights is None else product(t, weights)
    t = jnp.concatenate([t, rest[..., None]], -1)
    mask = jnp.concatenate([unique, jnp.ones_like(rest, bool)[..., None]], -1)
    whole, _ = row_statistics(Values(z, t), Selection(None, mask, selection.row_mask), ClassShards(t.shape[-1]))
    loss = whole.target_loss if share is None else whole.target_loss + weighted(share, row.target_loss)
    whole = whole._replace(shift=whole.shift + m, target_loss=loss)
    return combined(whole, options, Selection(row_mask=selection.row_mask), shards)
