r"""The rule: softmax cross-entropy of rows of logits, with its analytic gradient.

For one row with logits z, o = softmax(z), targets t, a = Σ_j t_j and the log-normalizer lse = log Σ_k exp z_k:

    E      = −Σ_j t_j log o_j = a·lse − Σ_j t_j z_j
    ∂E/∂z  = a·o − t              (o − y when the targets sum to one)
    ∂E/∂t  = −log o
    ∂lse/∂z = o

because ∂o_j/∂z_i = o_i·(δ_ij − o_j), so ∂E/∂z_i = Σ_{j≠i} t_j o_i − t_i·(1 − o_i) = o_i·Σ_j t_j − t_i.

A row may have two targets at once: an integer label (t = one-hot, never made) and dense targets; the label smoothing
of an integer label is the second one. Options that touch every logit (soft-cap, masks, class weights) are ordinary JAX
in `_prepare`, which the backward runs again instead of saving what it made.

Numerics
--------
log o_j = (z_j − m) − L, where m = max z and L = lse − m are kept as two numbers: their sum alone, rounded, would cost
o all its digits beside logits of size 1e4. One class c per row is left out of the sum over exponentials: the label, or
for dense targets the largest. Then L = log1p(rest) has full relative accuracy for confident rows, and so has the
gradient at c, where o_c − 1 = expm1(−gap) with gap = −log o_c. The usual formulas return 0 for both.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._autodiff import with_forward_mode

# Labels outside [0, K) arrive here as this number: it is out of range on every shard of a class axis.
INVALID_LABEL = jnp.iinfo(jnp.int32).min


class Values(NamedTuple):
    """What a row's cross-entropy is differentiated with respect to. `None`: not used."""

    logits: Array  # [..., K]
    targets: Array | None = None  # dense targets, broadcast against the logits
    target_scale: Array | None = None  # dense targets become class_weights ⊙ (target_scale·targets + target_floor)
    target_floor: Array | None = None  # [..., 1]
    class_weights: Array | None = None  # [K]
    logit_cap: Array | None = None  # []


class Selection(NamedTuple):
    """Which entries take part."""

    labels: Array | None = None  # [...] integer, this shard's first class being 0
    where: Array | None = None  # class mask, broadcast against the logits; every kept row shows a class
    keep: Array | None = None  # [...] rows that count


class RowStatistics(NamedTuple):
    """Per row [...]; in float32, or float64 for float64 logits."""

    label_loss: Array | None  # −log o_y
    target_loss: Array | None  # −Σ_j t_j log o_j for the dense targets
    shift: Array  # m = max z; not differentiated: in m + L it cancels
    log_sum: Array  # L, so that the log-normalizer is m + L
    entropy: Array | None  # −Σ_j o_j log o_j
    correct: Array | None  # 1.0 where the label is the arg max (the first, among equals), else 0.0; not differentiated

    @property
    def log_normalizer(self) -> Array:
        return self.shift + self.log_sum


def row_statistics(
    values: Values, selection: Selection, *, axis_name: str | None = None, with_entropy: bool = False
) -> RowStatistics:
    """The statistics of each row, differentiable in every mode with respect to `values`.

    With `axis_name`, inside `jax.shard_map`, the classes are split over that mesh axis. `with_entropy` asks for
    `entropy` and `correct`.
    """
    return _rule(axis_name, with_entropy)(values, selection)


@functools.cache
def _rule(axis_name: str | None, with_entropy: bool):
    @jax.custom_vjp
    def rule(values, selection):
        return _forward(values, selection, axis_name, with_entropy)

    def forward(values, selection):
        # The outputs come from the function that carries the rule, so that a derivative of these residuals, at second
        # order, goes through the rule again. Differentiating _forward itself would be wrong there: m is a constant.
        stats = differentiable(values, selection)
        return stats, (values, selection, stats.shift, stats.log_sum, stats.entropy)

    def backward(residuals, cotangents):
        return _backward(*residuals, cotangents, axis_name), None

    rule.defvjp(forward, backward)
    differentiable = with_forward_mode(rule)
    return differentiable


def _forward(values: Values, selection: Selection, axis_name, with_entropy) -> RowStatistics:
    logits, label_logit, owned = _label_logit_first(values, selection)
    z, targets = _prepare(values._replace(logits=logits), selection)
    m = z.max(-1) if axis_name is None else lax.pmax(z.max(-1), axis_name)
    left_out = z == m[..., None] if owned is None else _one_hot(selection.labels, z)
    e = jnp.where(left_out, 0, jnp.exp(z - m[..., None]))  # [..., K]
    if owned is None:
        rest, count = _total((e.sum(-1), left_out.sum(-1, dtype=e.dtype)), axis_name)
        log_sum = jnp.log1p(rest + (count - 1))
    else:
        rest, label_logit = _total((e.sum(-1), jnp.where(owned, label_logit, 0)), axis_name)
        log_sum = jnp.log1p(rest + jnp.expm1(label_logit - m))  # one of the sum's terms is exp(m − m) = 1
    # A row without a finite maximum has no softmax, and a NaN label logit (invalid label) spreads from here.
    log_sum = jnp.where(jnp.isfinite(m), log_sum, jnp.nan)

    label_loss = None if owned is None else (m - label_logit) + log_sum
    target_loss = entropy = correct = None
    if targets is not None:
        # 0·log 0 = 0: without the select, a target of 0 at a logit of −inf would give NaN.
        distance = jnp.where(targets == 0, 0, targets * (m[..., None] - z))
        mass, distance = _total((targets.sum(-1), distance.sum(-1)), axis_name)
        target_loss = mass * log_sum + distance
    if with_entropy:
        o = jnp.exp((z - m[..., None]) - log_sum[..., None])
        distance = jnp.where(o == 0, 0, o * (m[..., None] - z))
        class_ids = lax.broadcasted_iota(selection.labels.dtype, z.shape, z.ndim - 1)
        earlier = (z == m[..., None]) & (class_ids < selection.labels[..., None])
        distance, earlier = _total((distance.sum(-1), earlier.sum(-1, dtype=z.dtype)), axis_name)
        entropy = log_sum + distance
        correct = ((label_logit == m) & (earlier == 0)).astype(z.dtype)
    return RowStatistics(label_loss, target_loss, m, log_sum, entropy, correct)


def _backward(values: Values, selection: Selection, m, log_sum, entropy, g: RowStatistics, axis_name) -> Values:
    r"""∂/∂z = A·o − g_y·onehot − g_t·t, with A = g_y + g_t·a + g_lse, and its like for the other values.

    At the class left out, with q = o − 1 = expm1(−gap), this is A·q + (A − g_y − g_t·t) (for a label; for dense
    targets g_y = 0), where for a plain cross-entropy the second term is exactly 0: nothing cancels.
    """
    logits, label_logit, owned = _label_logit_first(values, selection)
    values = values._replace(logits=logits)
    (z, targets), prepare_vjp = jax.vjp(lambda values: _prepare(values, selection), values)
    m, log_sum = m[..., None], log_sum[..., None]
    g = RowStatistics(*(None if v is None else v[..., None] for v in g))

    pull = g.log_sum  # A without the label's share
    if targets is not None:
        pull = pull + g.target_loss * _total(targets.sum(-1), axis_name)[..., None]
    if owned is None:
        # With o > 1/2 the largest is alone, and only there does a·o − t cancel. z.max, not m: it has a derivative.
        left_out = (z == m) & (log_sum < 0.5)
        q, slope = jnp.expm1((z.max(-1, keepdims=True) - m) - log_sum), pull
        e = jnp.exp(z - m)
    else:
        left_out = _one_hot(selection.labels, z)
        q = jnp.expm1((label_logit[..., None] - m) - log_sum)
        slope = pull + g.label_loss
        e = jnp.where(left_out, 0, jnp.exp(z - m))  # as in _forward: where XLA sees both, it computes this once
    scaled = slope * jnp.exp(-log_sum)
    if targets is None:
        dz = jnp.where(left_out, slope * q + pull, scaled * e)
        dt = None
    else:
        t_pull = g.target_loss * targets
        dz = jnp.where(left_out, slope * q + (pull - t_pull), scaled * e - t_pull)
        dt = g.target_loss * ((m - z) + log_sum)
    if entropy is not None:
        o = jnp.exp((z - m) - log_sum)
        log_o = jnp.where(o == 0, 0, (z - m) - log_sum)
        dz = dz - g.entropy * o * (log_o + entropy[..., None])
    return prepare_vjp((dz, dt))[0]


def _prepare(values: Values, selection: Selection) -> tuple[Array, Array | None]:
    """The logits and the dense targets that the formulas see: options applied, classes and rows masked.

    Hidden classes get the logit −inf and the target 0; rows that do not count become all 0. What they held is replaced
    before anything is computed from it, or a NaN there would reach the gradients of the options.
    """
    where, keep = selection.where, selection.keep
    keep = None if keep is None else keep[..., None]
    visible = where if keep is None else keep if where is None else where & keep

    z = values.logits.astype(statistics_dtype(values.logits, values.targets))
    if visible is not None:
        z = jnp.where(visible, z, 0)
    if values.logit_cap is not None:
        z = values.logit_cap * jnp.tanh(z / values.logit_cap)
    if where is not None:
        z = jnp.where(where if keep is None else where | ~keep, z, -jnp.inf)

    if values.targets is None and values.target_floor is None:
        return z, None
    t = jnp.zeros((), z.dtype)
    if values.targets is not None:
        t = values.targets.astype(z.dtype)
        t = t if visible is None else jnp.where(visible, t, 0)
        t = t if values.target_scale is None else values.target_scale * t
    if values.target_floor is not None:
        t = t + values.target_floor
    if values.class_weights is not None:
        t = values.class_weights * t
    if visible is not None:
        t = jnp.where(visible, t, 0)
    return z, jnp.broadcast_to(t, z.shape)


def _label_logit_first(values: Values, selection: Selection) -> tuple[Array, Array | None, Array | None]:
    """The logits, the label's logit [...] as `_prepare` has it (NaN: invalid), and whether this shard has it.

    The label's logit is read first, behind a barrier: reading it late would keep the logits alive, and exp could not
    overwrite them. It is gathered before it is cast: a cast copy of all logits would be made for the gather (TPU).
    """
    labels = selection.labels
    if labels is None:
        return values.logits, None, None
    owned = (labels >= 0) & (labels < values.logits.shape[-1])
    index = jnp.where(owned, labels, 0)[..., None]
    picked = Values(jnp.take_along_axis(values.logits, index, -1), logit_cap=values.logit_cap)
    invalid = labels == INVALID_LABEL
    shown = None
    if selection.where is not None:
        shown = jnp.take_along_axis(selection.where, index, -1)
        hidden = owned & ~shown[..., 0]
        invalid = invalid | (hidden if selection.keep is None else hidden & selection.keep)
    label_logit = _prepare(picked, Selection(where=shown, keep=selection.keep))[0][..., 0]
    label_logit = jnp.where(invalid, jnp.nan, label_logit)
    logits, label_logit = lax.optimization_barrier((values.logits, label_logit))
    return logits, label_logit, owned


def statistics_dtype(*arrays: Array | None):
    """float64 if an array is, else float32."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def _one_hot(labels: Array, z: Array) -> Array:
    # Compared with an iota inside the pass that uses it, this is free; a scatter would not be.
    return lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1) == labels[..., None]


def _total(partial_sums, axis_name: str | None):
    return partial_sums if axis_name is None else lax.psum(partial_sums, axis_name)
