"""The rule on logits, a `jax.custom_vjp` in every mode: numbers by the schedule, the gradient `o − y` by `_rule`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import _rule, _schedule
from ._autodiff import with_forward_mode
from ._options import Selection, Values, listed_vjp, prepared_vjp
from ._rule import Row, Sums
from ._sharding import ClassShards, in_auto, varying_as


def row_statistics(values: Values, selection: Selection, shards: ClassShards, with_entropy=False) -> tuple[Row, Any]:
    """The numbers of each row [...], differentiable in every mode with respect to `values`.

    In float32, or float64 for float64 logits or targets. With entropy, also 1.0 where the label is the first of the
    largest logits, else 0.0. With listed classes, the numbers of the others, and the logits [..., M] of those listed.
    """
    rule = _rule_of(shards, with_entropy)
    values = varying_as(values, values, selection, shards.offset())
    return in_auto(rule, values.logits, values.logits.ndim - 1, values, selection)


@functools.cache
def _rule_of(shards: ClassShards, with_entropy: bool, differentiated: bool = False):
    @jax.custom_vjp
    @jax.jit  # or each eager call would compile its branches anew
    def rule(values, selection):
        s = shards.joined(_schedule.class_sums(shards, with_entropy, differentiated, values, selection))
        row, more = _rule.row_of(s), None
        if with_entropy:
            more = is_correct(s, row, selection.labels)
        if selection.listed_ids is not None:
            row, more = row_of_others(row), shards.total(listed_vjp(values, selection)[0])
        return row, more

    def forward(values, selection):
        # The rule is called again, so that derivatives of residuals (second order) are the rule's, not its body's.
        out = _rule_of(shards, with_entropy, True)(values, selection)
        # To save little, the label's loss is made again of shift, log_sum and the label's logit.
        return out, (values, selection, out[0]._replace(loss=None, target_loss=None))

    def backward(residuals, cotangents):
        return _backward(shards, *residuals, *cotangents), None

    rule.defvjp(forward, backward)
    return jax.jit(with_forward_mode(rule), inline=True)  # eager calls compile once


@functools.partial(jax.jit, static_argnums=0)
def _backward(shards: ClassShards, values: Values, selection: Selection, row: Row, g: Row, g_more: Any) -> Values:
    """`o − y` of the logits that the rule sees, then back through the options. `row` comes without the label's loss."""
    labels, in_place, logit = selection.labels, _schedule.reads_label_in_place(values.logits), None
    values, selection = _schedule.rounded_once(values), _schedule.listed_anew(selection)
    if labels is not None and not in_place:
        values, logit = _schedule.label_logit(values, selection, row.shift, shards)
    (z, t), options_vjp = prepared_vjp(values, selection)
    row, g, logit = jax.tree.map(lambda a: a[..., None], (row, shards.cotangents(g, z), logit))
    if selection.listed_ids is not None:
        z = with_listed_capped(z, row)
    at_label = None
    if labels is not None:
        at_label = _schedule.is_label(labels, _schedule.class_iota(z, shards))
        if in_place:
            logit = _schedule.rounded_alike(jnp.where(at_label, z, row.shift), row.shift, values.logit_cap)
        row = row._replace(loss=_label_loss(row.shift, row.log_sum, logit))
    (dvalues,) = options_vjp(_rule.gradient(z, at_label, t, row, g))
    if selection.listed_ids is not None:
        dvalues = listed_vjp(values, selection)[1](dvalues, shards.cotangents(g_more, z))
    return dvalues


def with_listed_capped(z: Array, row: Row) -> Array:
    """Logits with those of listed classes at most shift + 1, for the gradient of the others, which drops them later.

    The shift is the others' maximum, or within 1/2 of their log-normalizer, so a class above shift + 1 is listed. Its
    exp could be inf, and inf·0 is NaN, in second derivatives at the latest.
    """
    return jnp.where(z > row.shift + 1, row.shift + 1, z)


def is_correct(s: Sums, row: Row, labels: Array | None) -> Array:
    """1.0 where the label is the first of the largest logits. Floating, as the outputs of a rule have tangents."""
    return ((s.argmax == labels) & ~jnp.isnan(row.loss)).astype(s.shift.dtype)


def row_of_others(row: Row) -> Row:
    """Where every class is listed, the log-normalizer of the others, shift + log_sum, is −inf, not NaN."""
    return jax.tree.map(lambda a: jnp.where(jnp.isneginf(row.shift) & jnp.isnan(a), 0, a), row)


def _label_loss(m: Array, log_sum: Array, logit: Array) -> Array:
    """−log o_c = (m − z_c) + L, differentiable. In a sure row m − z_c is exactly 0, and `where` leaves it out.

    Its derivative ∂m − ∂z_c is 0 too, but as computed it would have rounding errors as large as ∂L.
    """
    gap = m - logit
    return jnp.where(gap + log_sum < 0.5, 0, gap) + log_sum
