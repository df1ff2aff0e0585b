"""The softmax cross-entropy of a linear layer by blocks of classes: 4 matmuls, and no accumulator of W's size.

A row's loss needs of all its logits only the running sums that the log-normalizer is made of. The backward pass makes
each block of logits again, finishes that block of dW at once, and adds to dx. The formulas are those of
`jaxce._softmax`, and so are the letters. A block's float32 logits take 32 MiB, or those of 128 classes if that is more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._arguments import Options, class_weight_of
from ._autodiff import of_moving, with_gradients, with_pullback
from ._elementary import exp, expm1, log1p
from ._layer import Layer, over_classes, varying_as
from ._sharding import gathered
from ._softmax import INVALID_LABEL, soft_capped, total


class _Head(NamedTuple):
    x: Any  # [..., D]
    w: Any
    bias: Any  # [K] or None
    logit_cap: Any  # [] or None
    class_weights: Any  # [K] or None, of the smoothed targets
    labels: Any  # [...] as in `Selection.labels`


class _Statistics(NamedTuple):
    """Per row [...]."""

    label_loss: Array  # −log o_y
    spread: Array | None  # −Σ_k c_k log o_k, for label smoothing
    shift: Array  # m, not differentiated: in m + L it cancels
    log_sum: Array  # L


class _Plan(NamedTuple):
    layer: Layer
    fitting: int  # classes per block and part
    smooth: bool
    axis_name: str | None

    @property
    def part_classes(self) -> int:
        return self.layer.classes // self.layer.parts


def class_blocked_loss(
    layer: Layer, x: Array, w: Array, bias: Array | None, labels, keep, scale, options: Options, block_size, axis_name
) -> Array:
    """Σ scale·loss over the rows [...] of x [..., D], for labels as in `Selection.labels`; without scale each loss.

    The gradients of the sum are made together with it, as in `jaxce._row_blocks`.
    """
    fitting = layer.devices * (block_size or 2**23 // max(1, labels.size))  # float32 logits of 32 MiB on each device
    plan = _Plan(layer, fitting // layer.parts, options.label_smoothing is not None, axis_name)
    c = None if options.class_weights is None else options.class_weights.ravel()
    head = _Head(x, w, bias, options.logit_cap, c if plan.smooth else None, labels)
    statistics = with_pullback(lambda head: (_forward(plan, head), None), functools.partial(_pull, plan))

    def losses_of(inputs):
        head, options = inputs
        return _losses(plan, statistics(head)[0], head.labels, options), None

    def gradients_of(inputs, g, moving):
        head, options = inputs
        stats, _ = statistics(head)
        losses, values, to_tree = of_moving(
            lambda stats, options: _losses(plan, stats, head.labels, options),
            (stats, options),
            (jax.tree.map(lambda _: True, stats), moving[1]),
        )
        losses, pull = jax.vjp(losses, values)
        g_stats, d_options = to_tree(pull(varying_as(g, losses))[0])
        return (losses, (_pull(plan, head, stats, g_stats, moving[0]), d_options)), None

    inputs = head, _RowOptions(options.label_smoothing, c, options.z_loss, keep)
    return losses_of(inputs)[0] if scale is None else with_gradients(losses_of, gradients_of)(inputs, scale)[0]


class _RowOptions(NamedTuple):
    """What acts on a row's statistics."""

    label_smoothing: Array | None
    class_weights: Array | None  # [K]
    z_loss: Array | None
    keep: Array | None  # [...] bool


def _losses(plan: _Plan, stats: _Statistics, labels: Array, options: _RowOptions) -> Array:
    loss, spread = stats.label_loss, stats.spread
    if options.class_weights is not None:
        weight = class_weight_of(labels, None, options.class_weights, plan.axis_name)
        # A label of weight 0 at a logit of −inf: 0·inf is 0 here, as in 0·log 0.
        loss = weight * jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)
    if options.label_smoothing is not None and spread is not None:
        classes = plan.layer.classes * (1 if plan.axis_name is None else lax.axis_size(plan.axis_name))
        loss = (1 - options.label_smoothing) * loss + options.label_smoothing / classes * spread
    if options.z_loss is not None:
        loss = loss + options.z_loss * (stats.shift + stats.log_sum) ** 2
    return loss if options.keep is None else jnp.where(options.keep, loss, 0)


def _block(plan: _Plan, head: _Head, start, size):
    """w, class weights [C], uncapped logits [..., C], and which of them are the labels', for one block of classes."""
    layer = plan.layer
    w = layer.take(head.w, start, size, layer.class_axis)
    if layer.operands == jnp.bfloat16:
        # Rounds as the cast to come does. XLA for TPUs would move a mere cast out of the loop, and make it of all of w.
        w = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
    bias = None if head.bias is None else layer.take(head.bias, start, size)
    ids = layer.class_ids(start, size)
    c = jnp.ones(ids.shape, layer.sums) if head.class_weights is None else layer.take(head.class_weights, start, size)
    z = layer.logits(head.x, w, bias)
    c, ids = (jnp.expand_dims(a, range(z.ndim - 1)) for a in (c, ids))
    return w, c, z, ids == head.labels[..., None]


def _capped(z, logit_cap):
    return z if logit_cap is None else soft_capped(z, logit_cap)


def _forward(plan: _Plan, head: _Head) -> _Statistics:
    """Running maximum m and Σ exp(z − m) without the label, as in `jaxce._softmax`, which explains why without."""
    head = head._replace(w=gathered(head.w, 1 - plan.layer.class_axis))
    lowest = jnp.finfo(plan.layer.sums).min  # not −inf: −inf − −inf is NaN

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
    def step(carry, start, size):
        m, rest, label_logit, spread, mass = carry
        _, c, z, label = _block(plan, head, start, size)
        z = _capped(z, head.logit_cap)
        label_logit = label_logit + jnp.where(label, z, 0).sum(-1)
        new_m = jnp.maximum(m, z.max(-1))
        rest = rest * exp(m - new_m) + jnp.where(label, 0, exp(z - new_m[..., None])).sum(-1)
        if plan.smooth:
            spread = spread + mass * (new_m - m) + jnp.where(c == 0, 0, c * (new_m[..., None] - z)).sum(-1)
            mass = mass + c.sum()
        return new_m, rest, label_logit, spread, mass

    zeros = varying_as(jnp.zeros(head.labels.shape, plan.layer.sums), *jax.tree.leaves(head))
    carry = zeros + lowest, zeros, zeros, zeros, zeros.ravel()[:1].sum()
    m, rest, label_logit, spread, mass = over_classes(step, carry, plan.part_classes, plan.fitting)

    if plan.axis_name is not None:
        local_m = m
        m = lax.pmax(lax.stop_gradient(local_m), plan.axis_name)
        rest, spread = rest * exp(local_m - m), spread + mass * (m - local_m)
    label_logit = jnp.where(head.labels == INVALID_LABEL, jnp.nan, label_logit)
    rest, label_logit, spread, mass = total((rest, label_logit, spread, mass), plan.axis_name)
    log_sum = log1p(rest + expm1(label_logit - m))
    log_sum = jnp.where(jnp.isfinite(m) & (m > lowest), log_sum, jnp.nan)
    return _Statistics((m - label_logit) + log_sum, spread + mass * log_sum if plan.smooth else None, m, log_sum)


def _pull(plan: _Plan, head: _Head, stats: _Statistics, g: _Statistics, moving: _Head) -> _Head:
    """dz_k = A·o_k − g_y·onehot_k − g_s·c_k, A = g_y + g_s·Σc + g_lse; at the label, o_y − 1 = expm1(−label_loss)."""
    layer, head = plan.layer, head._replace(w=gathered(head.w, 1 - plan.layer.class_axis))
    m, log_sum = stats.shift[..., None], stats.log_sum[..., None]
    g_label, g_lse = g.label_loss[..., None], g.log_sum[..., None]
    g_spread = None if g.spread is None else g.spread[..., None]
    rows = range(head.labels.ndim)
    if g_spread is not None:
        c = jnp.ones(layer.classes, layer.sums) if head.class_weights is None else head.class_weights
        g_lse = g_lse + g_spread * total(c.sum(), plan.axis_name)

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3,))
    def step(x_transposed, grads, start, size):
        w, c, raw, label = _block(plan, head, start, size)
        cap = None if head.logit_cap is None else varying_as(head.logit_cap, raw)
        z, uncap = jax.vjp(_capped, raw, cap)
        o = exp((z - m) - log_sum)
        dz = jnp.where(label, g_label * expm1(-stats.label_loss)[..., None] + g_lse * o, (g_label + g_lse) * o)
        dz = dz if g_spread is None else dz - g_spread * c
        draw, dcap = uncap(dz)

        def dc(g_spread):
            return jnp.sum(g_spread * jnp.where((c == 0) & jnp.isneginf(z), 0, (m - z) + log_sum), rows)

        return grads._replace(
            x=grads.x + layer.dx(draw, w) if moving.x else None,
            w=layer.put(grads.w, layer.dw(head.x, draw, x_transposed), start, layer.class_axis) if moving.w else None,
            bias=layer.put(grads.bias, draw.sum(rows), start) if moving.bias else None,
            logit_cap=grads.logit_cap + dcap if moving.logit_cap else None,
            class_weights=layer.put(grads.class_weights, dc(g_spread), start) if moving.class_weights else None,
        )

    def zeros(a, moves):
        return varying_as(jnp.zeros_like(a), *jax.tree.leaves((head, g))) if moves else None

    grads = jax.tree.map(zeros, head, moving)
    grads = grads if grads.x is None else grads._replace(x=grads.x.astype(layer.sums))

    def loop(grads, x_transposed=None):
        return over_classes(functools.partial(step, x_transposed), grads, plan.part_classes, plan.fitting)

    if moving.w and layer.devices == 1:  # elsewhere a copy of x, for nothing
        grads = lax.platform_dependent(
            grads, head.x, cpu=lambda grads, x: loop(grads, layer.transposed(x)), default=lambda grads, x: loop(grads)
        )
    else:
        grads = loop(grads)
    return grads if grads.x is None else grads._replace(x=grads.x.astype(head.x.dtype))
