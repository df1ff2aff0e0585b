"""Options and masks. Some change logits or targets (`prepared`); others combine a row's finished numbers (`combined`).

Each is a choice of targets t or ordinary JAX around the rule, so that it is written once, for logits and for heads.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import _checks
from ._elementary import product, soft_capped, weighted
from ._labels import label_weight
from ._listed import added_at, is_here, is_listed
from ._rule import Row
from ._sharding import ClassShards


class Values(NamedTuple):
    """What a row's numbers are differentiated with respect to. `None`: not used.

    The targets that the rule sees are class_weights ⊙ (target_scale·targets + target_floor).
    """

    logits: Any  # [..., K]
    targets: Any = None  # broadcast against the logits
    target_scale: Any = None  # []
    target_floor: Any = None  # [..., 1]
    class_weights: Any = None  # [1, ..., 1, K]. That of an integer label is for `combined`
    logit_cap: Any = None  # []


class Selection(NamedTuple):
    """What takes part."""

    labels: Any = None  # [...] as in `_labels`
    class_mask: Any = None  # bool, broadcast against the logits; every row that counts has an unmasked class
    row_mask: Any = None  # [...] bool, the rows that count
    listed_ids: Any = None  # [..., M] as in `_listed`: classes of this shard that are listed, and left out of the sums
    in_block: tuple[()] | None = None  # () in a block of classes: a flag in the tree's structure, static under jit

    @property
    def mask(self) -> Array | None:
        """Both masks together, broadcast against the logits."""
        if self.row_mask is None:
            return self.class_mask
        rows = self.row_mask[..., None]
        return rows if self.class_mask is None else self.class_mask & rows

    def class_count(self, shards: ClassShards) -> Array | int:
        """The classes of each row [...] (axes may be 1) that are not masked, on all shards; at least 1."""
        return shards.classes if self.class_mask is None else jnp.maximum(shards.total(self.class_mask.sum(-1)), 1)


class Options(NamedTuple):
    """The options as arrays of the dtype of the statistics. `None`: not used."""

    label_smoothing: Array | None
    class_weights: Array | None  # [1, ..., 1, K]
    logit_cap: Array | None
    z_loss: Array | None

    @classmethod
    def of(
        cls, function: str, dtype, ndim: int, shards: ClassShards, smoothing=None, weights=None, cap=None, z_loss=None
    ) -> "Options":
        """The options as given, for logits of `ndim` axes."""

        # 0 is "not used", but not for a cap (an open interval), where it is an error, as False is everywhere.
        def number(name: str, value: Any, high: float, **bounds: Any):
            if value is None or (isinstance(value, int | float) and value is not False and value == 0 and not bounds):
                return None
            return _checks.scalar(function, name, value, dtype, high, **bounds)

        if weights is not None:
            weights = _checks.real(function, "class_weights", weights).astype(dtype)
            per = "one weight for each class" + ("" if shards.axis_name is None else " of this shard")
            _checks.shape(function, "class_weights", weights, (shards.local,), per)
            weights = jnp.expand_dims(weights, range(ndim - 1))
        return cls(
            number("label_smoothing", smoothing, 1),
            weights,
            number("logit_cap", cap, math.inf, open_interval=True),
            number("z_loss", z_loss, math.inf),
        )


def statistics_dtype(*arrays: Array | None):
    """float64 if an array is, else float32."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def prepared(values: Values, selection: Selection) -> tuple[Array, Array | None]:
    """The logits, and the targets of all classes (other axes may be 1), that the rule sees: options applied, masked.

    Masked classes get the logit −inf and the target 0; rows that do not count become all 0. What they held is replaced
    before anything is computed from it, or a NaN there would reach the gradients of the options.
    """
    if selection.listed_ids is not None:
        others = ~is_listed(selection.listed_ids, values.logits, selection.in_block is not None)
        mask = others if selection.class_mask is None else others & selection.class_mask
        selection = Selection(None, mask, selection.row_mask)
    mask, class_mask, row_mask = selection.mask, selection.class_mask, selection.row_mask
    z = values.logits.astype(statistics_dtype(values.logits, values.targets))
    # Only where needed: XLA for GPUs writes a mask to memory if it is used twice.
    if mask is not None and (row_mask is not None or values.logit_cap is not None):
        z = jnp.where(mask, z, 0)
    z = z if values.logit_cap is None else soft_capped(z, values.logit_cap)
    if class_mask is not None:
        z = jnp.where(class_mask if row_mask is None else class_mask | ~row_mask[..., None], z, -jnp.inf)
    if values.targets is None:
        return z, None

    t = values.targets.astype(z.dtype)
    t = jnp.broadcast_to(t, (*t.shape[:-1], z.shape[-1]))
    t = t if mask is None else jnp.where(mask, t, 0)
    t = t if values.target_scale is None else values.target_scale * t + values.target_floor
    if values.class_weights is not None:  # an infinite weight of a class without target counts for nothing
        t = product(t, values.class_weights)
    return z, t if mask is None else jnp.where(mask, t, 0)  # again, as the floor is for every class


def prepared_vjp(values: Values, selection: Selection) -> tuple[tuple[Array, Array | None], Callable]:
    """`prepared`, with targets of the logits' shape, and its vjp.

    Listed classes are not masked here, but their cotangents are: masked before, the gradient's pass would take XLA on
    CPU a quarter longer.
    """

    def alike(values):
        z, t = prepared(values, selection._replace(listed_ids=None))
        return z, None if t is None else jnp.broadcast_to(t, z.shape)

    (z, t), vjp = jax.vjp(alike, values)
    if selection.listed_ids is None:
        return (z, t), vjp
    listed = is_listed(selection.listed_ids, values.logits, selection.in_block is not None)
    return (z, t), lambda cotangents: vjp(jax.tree.map(lambda a: jnp.where(listed, 0, a), cotangents))


def listed_vjp(values: Values, selection: Selection) -> tuple[Array, Callable[[Values, Array], Values]]:
    """The logits [..., M] of the listed classes as the rule sees them, 0 for those not here, and their vjp.

    It adds to the gradient of `values`, in which that of the logits is 0 at the listed classes.
    """
    here = is_here(selection.listed_ids, values.logits.shape[-1])
    index = jnp.where(here, selection.listed_ids, 0)
    listed = jnp.take_along_axis(values.logits, index, -1, mode="promise_in_bounds")

    def seen(listed, cap):
        return jnp.where(here, prepared(Values(listed, logit_cap=cap), Selection(row_mask=selection.row_mask))[0], 0)

    z, vjp = jax.vjp(seen, listed, values.logit_cap)

    def added(dvalues, g):
        dlisted, dcap = vjp(g)
        logits = added_at(dvalues.logits, selection.listed_ids, dlisted, selection.in_block is not None)
        return dvalues._replace(logits=logits, logit_cap=None if dcap is None else dvalues.logit_cap + dcap)

    return z, added


def combined(row: Row, options: Options, selection: Selection, shards: ClassShards) -> Array:
    """The loss of each row from its numbers: of its label if there is one, else of its dense targets.

    A smoothed label of class weight c_y costs (1−ε)·c_y·(−log o_y) + ε/K·Σ_k c_k (−log o_k).
    """
    loss, smoothing = row.target_loss, options.label_smoothing
    if selection.labels is not None:
        loss = row.loss
        if options.class_weights is not None:
            weight = label_weight(selection.labels, options.class_weights, selection.row_mask, shards)
            loss = weighted(weight, loss)
        if smoothing is not None:
            share = smoothing / jnp.asarray(selection.class_count(shards), smoothing.dtype)
            loss = weighted(1 - smoothing, loss) + weighted(share, row.target_loss)
    if options.z_loss is not None:
        log_normalizer = row.shift + row.log_sum
        loss = loss + (options.z_loss * log_normalizer) * log_normalizer  # its square may overflow, and 0·inf is NaN
    return loss if selection.row_mask is None else jnp.where(selection.row_mask, loss, 0)


def values_of(
    logits: Any, targets: Any, shape: tuple[int, ...], options: Options, selection: Selection, shards: ClassShards
) -> Values:
    """`Values` of logits of this shape. Without targets, smoothed labels get a second target: Σ_k c_k (−log o_k)."""
    smoothing = options.label_smoothing
    weights = None if targets is None and smoothing is None else options.class_weights
    values = Values(logits, targets, class_weights=weights, logit_cap=options.logit_cap)
    if smoothing is None:
        return values
    if targets is None:
        return values._replace(targets=jnp.ones((1,) * len(shape), smoothing.dtype))
    t = jnp.broadcast_to(targets.astype(smoothing.dtype), shape)
    t = t if selection.mask is None else jnp.where(selection.mask, t, 0)
    mean = shards.total(t.sum(-1)) / jnp.asarray(selection.class_count(shards), smoothing.dtype)
    return values._replace(target_scale=1 - smoothing, target_floor=smoothing * mean[..., None])
