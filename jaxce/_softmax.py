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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._autodiff import with_forward_mode
from ._cache_blocks import in_row_blocks
from ._elementary import exp, expm1, log1p, tanh
from ._sharding import devices, in_auto

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
    """Per row [...], in float32, or float64 for float64 logits; some are None where they were not asked for."""

    label_loss: Any  # −log o_y
    target_loss: Any  # −Σ_j t_j log o_j for the dense targets
    shift: Array  # m: max z, or the label's logit (`_about_label`)
    log_sum: Array  # L, so that the log-normalizer is m + L
    entropy: Any  # −Σ_j o_j log o_j
    correct: Any  # 1.0 where the label is the arg max (the first, among equals), else 0.0; not differentiated

    @property
    def log_normalizer(self) -> Array:
        return self.shift + self.log_sum


def row_statistics(
    values: Values,
    selection: Selection,
    *,
    axis_name: str | None = None,
    with_entropy: bool = False,
) -> RowStatistics:
    """The statistics of each row, differentiable in every mode with respect to `values`.

    With `axis_name`, inside `jax.shard_map`, the classes are split over that mesh axis. `with_entropy` asks for
    `entropy` and `correct`.
    """
    rule = _rule(axis_name, with_entropy)
    return in_auto(rule, values.logits, values.logits.ndim - 1, values, selection)


@functools.cache
def _rule(axis_name: str | None, with_entropy: bool, differentiated: bool = False):
    def forward_pass(arguments):
        values, selection = arguments
        return _forward(values, selection, axis_name, with_entropy)

    @jax.custom_vjp
    def rule(values, selection):
        label_alone = not (with_entropy or selection.labels is None or _has_targets(values))
        whole = differentiated and label_alone and _keeps_exponentials(values, selection)
        if whole or axis_name is not None:
            return forward_pass((values, selection))
        first = _about_label if label_alone else None
        return in_row_blocks(forward_pass, values.logits, (values, selection), first)

    def forward(values, selection):
        # The outputs come from a function that carries the rule, so that a derivative of these residuals, at second
        # order, goes through the rule again. It is not written to be differentiated itself.
        stats = _rule(axis_name, with_entropy, True)(values, selection)
        return stats, (values, selection, stats.shift, stats.log_sum, stats.entropy)

    def backward(residuals, cotangents):
        values, selection, m, log_sum, entropy = residuals
        return _backward(values, selection, m, log_sum, entropy, cotangents, axis_name), None

    rule.defvjp(forward, backward)
    return with_forward_mode(rule)


def _forward(values: Values, selection: Selection, axis_name, with_entropy) -> RowStatistics:
    values = _rounded_once(values)
    z, targets = _prepare(values, selection)
    # Where they are only cast, of the logits as they are: XLA on CPU would else make the cast copy a buffer.
    m = (values.logits if _only_casts(values, selection) else z).max(-1).astype(z.dtype)
    m = m if axis_name is None else lax.pmax(m, axis_name)
    values, label = _label_logit(values, selection, m)
    z, targets = _prepare(_after(values, m) if values.logit_cap is not None else values, selection)
    if label is not None:
        label = label._replace(logit=_rounded_alike(total(label.logit, axis_name), m, values.logit_cap))
    log_sum = _log_sum(z, m, label, axis_name)

    label_loss = None if label is None else (m - label.logit) + log_sum
    target_loss = entropy = correct = None
    if targets is not None and values.logit_cap is not None:
        z, targets = _prepare(_after(values, log_sum), selection)
    if targets is not None:
        # 0·log 0 = 0: without the select, a target of 0 at a logit of −inf would give NaN. At the maximum the distance
        # is exactly 0; where z is a product, LLVM may fuse it into the difference, which then is not.
        distance = jnp.where((targets == 0) | (z == m[..., None]), 0, targets * (m[..., None] - z))
        mass, distance = total((targets.sum(-1), distance.sum(-1)), axis_name)
        target_loss = mass * log_sum + distance
    if with_entropy and label is not None:
        o = exp((z - m[..., None]) - log_sum[..., None])
        distance = jnp.where((o == 0) | (z == m[..., None]), 0, o * (m[..., None] - z))
        class_ids = lax.broadcasted_iota(label.ids.dtype, z.shape, z.ndim - 1)
        largest = z == m[..., None]
        earlier, hit = largest & (class_ids < label.ids[..., None]), largest & _one_hot(label.ids, z)
        sums = distance.sum(-1), earlier.sum(-1, dtype=z.dtype), hit.sum(-1, dtype=z.dtype)
        distance, earlier, hit = total(sums, axis_name)
        entropy = log_sum + distance
        correct = ((hit > 0) & (earlier == 0)).astype(z.dtype)
    return RowStatistics(label_loss, target_loss, m, log_sum, entropy, correct)


def _about_label(arguments) -> tuple[RowStatistics, Array]:
    """The statistics where there is but a label, from one pass, and for which rows they are good: no maximum is taken.

    Shifted by the label's own logit, the exponentials of the others give L = log1p(Σ_{j≠y} exp(z_j − z_y)), and that
    is the loss. They overflow where it is above 88, and before that rounding z_j − z_y costs digits of o: 1e-6 at 32.
    """
    values, selection = arguments
    # The barrier has this computed once per row, not for each class.
    label = lax.optimization_barrier(_label_of(selection.labels, values, selection))
    loss = _log_sum(_prepare(values, selection)[0], label.logit, label, None)
    return RowStatistics(loss, None, label.logit, loss, None, None), (loss < 32) | jnp.isnan(label.logit)


def _log_sum(z: Array, m: Array, label: "_Label | None", axis_name) -> Array:
    """L = log Σ_j exp(z_j − m), as log1p of the sum without one of its terms exp(m − m) = 1."""
    shifted = z - m[..., None]
    if label is None:
        largest = z == m[..., None]
        rest = jnp.where(largest, 0, exp(shifted)).sum(-1)
        rest, ties = total((rest, largest.sum(-1, dtype=z.dtype)), axis_name)
        rest = rest + (ties - 1)
    else:
        rest = total(jnp.where(_one_hot(label.ids, z), 0, exp(shifted)).sum(-1), axis_name)
        rest = rest + expm1(label.logit - m)  # NaN for an invalid label: it spreads from here
    # A row without a finite maximum has no softmax.
    return jnp.where(jnp.isfinite(m), log1p(rest), jnp.nan)


def _backward(
    values: Values, selection: Selection, m: Array, log_sum: Array, entropy: Array | None, cotangents: Any, axis_name
) -> Values:
    """∂/∂z = A·o − g_y·onehot(y) − g_t·t, with A = g_y + g_t·a + g_lse, and its like for the other values.

    At one class c, where o may be near 1, this is g_y·q + g_t·(a·q + (a − t)) + g_lse·o with q = o_c − 1 = expm1(log
    o_c): nothing cancels. The derivative of lse = m + L is shared out in the same spirit: where m is z_c,
    ∂m = onehot(c) and ∂L = o − onehot(c), so that second derivatives, which come by way of m and L, keep their digits
    too; elsewhere ∂m = 0 and ∂L = o.
    """
    labels = selection.labels
    # Reading the labels' logits again would have the devices that share a row communicate: there they are looked at in
    # place, which costs an expm1 of every logit.
    in_place = devices(values.logits) > 1
    values, label = _label_logit(_rounded_once(values), selection._replace(labels=None) if in_place else selection, m)
    if values.logit_cap is not None:
        values = _after(values, m, log_sum)  # not what the forward pass waited for: XLA would merge these passes
    (z, targets), prepare_vjp = jax.vjp(lambda values: _prepare(values, selection), values)
    m, log_sum = m[..., None], log_sum[..., None]
    g = jax.tree.map(lambda v: v[..., None], cotangents)

    if labels is None:
        # Where o > 1/2 the largest is alone, and only there does a·o − t cancel.
        top, log_o = log_sum < 0.5, -log_sum
        exact = top & (z == m)
    else:
        exact = _one_hot(labels, z)
        label_logit = jnp.where(exact, z, m) if label is None else label.logit[..., None]
        label_logit = _rounded_alike(label_logit, m, values.logit_cap)
        top = label_logit == m
        # The select, for its derivative: z_c − m has none, but autodiff would find 1 − 1 and lose what is added.
        log_o = jnp.where(top, 0, label_logit - m) - log_sum
    # As in _log_sum: where XLA sees both, it computes this once.
    e = jnp.where(exact, 0, exp(z - m))
    q = expm1(log_o)

    # Each cotangent's factor at c is formed before anything is summed: transposed, this is forward mode.
    slope = g.log_sum
    at_exact = g.shift * jnp.where(top, 1, 0) + g.log_sum * jnp.where(top, q, 1 + q)
    if labels is not None:
        slope, at_exact = slope + g.label_loss, at_exact + g.label_loss * q
    dt = None
    if targets is None:
        at_others = 0
    else:
        mass = total(targets.sum(-1, keepdims=True), axis_name)
        slope, at_exact = (
            slope + g.target_loss * mass,
            at_exact + g.target_loss * (mass * q + (mass - targets)),
        )
        at_others = -g.target_loss * targets
        # A target of 0 at a logit of −inf gets 0, not inf: what multiplies it (class weights) has a derivative.
        dt = g.target_loss * jnp.where((targets == 0) & jnp.isneginf(z), 0, (m - z) + log_sum)
    # A sum, not a select of sums: transposed twice that would be two selects.
    dz = slope * exp(-log_sum) * e + jnp.where(exact, at_exact, at_others)
    if entropy is not None:
        log_probs = (z - m) - log_sum
        o = exp(log_probs)
        dz = dz - g.entropy * o * (jnp.where(o == 0, 0, log_probs) + entropy[..., None])
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
        z = soft_capped(z, values.logit_cap)
    if where is not None:
        z = jnp.where(where if keep is None else where | ~keep, z, -jnp.inf)

    if not _has_targets(values):
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
    # In shard_map a smoothed label's targets would be equal on all shards, and their cotangent is not.
    return z, jnp.where(jnp.isnan(z), t, t)


def _has_targets(values: Values) -> bool:
    return values.targets is not None or values.target_floor is not None


def _only_casts(values: Values, selection: Selection) -> bool:
    """Whether that is all that `_prepare` does to the logits."""
    return values.logit_cap is None and selection.where is None and selection.keep is None


def _keeps_exponentials(values: Values, selection: Selection) -> bool:
    """Whether XLA is to make the gradient, in place, of the very exponentials that the forward pass summed.

    Where classes are few it is: their rows are short vectors, and exponentials twice cost more than passes over memory.
    So it is on jax 0.10, where logits that a loop has read are not overwritten with their gradient.
    """
    without_cast = values.logits.dtype == statistics_dtype(values.logits) and _only_casts(values, selection)
    return without_cast and (values.logits.shape[-1] < 128 or jax.__version_info__[:2] == (0, 10))


@jax.custom_jvp
def soft_capped(z: Array, cap: Array) -> Array:
    """cap·tanh(z/cap). With u = z/cap, ∂/∂z = 1/cosh²u and ∂/∂cap = tanh u − u/cosh²u.

    That is exact where JAX's derivative of tanh, 1 − tanh², is nothing but a rounding error: from |u| of about 9 on.
    """
    # The maximum changes no number: it keeps LLVM from fusing this product into a difference z − m, where the largest
    # logit must give exactly 0.
    return jnp.maximum(cap * _tanh(z / cap), -cap)


@soft_capped.defjvp
def _soft_capped_jvp(primals, tangents):
    (z, cap), (z_rate, cap_rate) = primals, tangents
    u = jnp.clip(z / cap, -40, 40)  # so that derivatives of cosh are finite; beyond 40 the slope is under 1e-33
    slope = jnp.where(jnp.isinf(z), 0, 1 / _cosh(u) ** 2)
    return soft_capped(z, cap), slope * z_rate + (_tanh(u) - u * slope) * cap_rate


@jax.custom_jvp
def _tanh(u: Array) -> Array:
    return tanh(u)


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    (u,), (rate,) = primals, tangents
    return _tanh(u), rate / _cosh(u) ** 2


def _cosh(u: Array) -> Array:
    return (exp(u) + exp(-u)) / 2


def _rounded_once(values: Values) -> Values:
    """Logits that are a product would else be rounded anew, and differently, in each pass that reads them."""
    return values._replace(logits=lax.optimization_barrier(values.logits))


class _Label(NamedTuple):
    ids: Array  # [...]
    logit: Array  # [...] its logit as `_prepare` has it; NaN: invalid
    owned: Array  # [...] bool: a class of this shard, or invalid


def _label_logit(values: Values, selection: Selection, m: Array) -> tuple[Values, _Label | None]:
    """The label's logit, and the values to go on with.

    It is read after the maximum was taken: read first, by one thread, it would have the threads that share a pass begin
    late. And before anything else, behind a barrier: reading it late would keep the logits alive, and exp could not
    overwrite them. It is gathered before it is cast: a cast copy of all logits would be made for the gather (on TPU).
    """
    if selection.labels is None:
        return values, None
    late = lax.optimization_barrier((values.logits, m))[0]
    label = _label_of(selection.labels, values._replace(logits=late), selection)
    if values.logit_cap is None:  # capped, the exponentials do not depend on it, or a CPU would cap the logits twice
        logits, logit = lax.optimization_barrier((late, label.logit))
        return values._replace(logits=logits), label._replace(logit=logit)
    return values, label


def _label_of(labels: Array, values: Values, selection: Selection) -> _Label:
    owned = (labels >= 0) & (labels < values.logits.shape[-1])
    index = jnp.where(owned, labels, 0)[..., None]
    picked = Values(jnp.take_along_axis(values.logits, index, -1, mode="promise_in_bounds"), logit_cap=values.logit_cap)
    invalid = labels == INVALID_LABEL
    shown = None
    if selection.where is not None:
        shown = jnp.take_along_axis(selection.where, index, -1, mode="promise_in_bounds")
        hidden = owned & ~shown[..., 0]
        invalid = invalid | (hidden if selection.keep is None else hidden & selection.keep)
    logit = _prepare(picked, Selection(where=shown, keep=selection.keep))[0][..., 0]
    return _Label(labels, jnp.where(invalid, jnp.nan, jnp.where(owned, logit, 0)), owned | invalid)


def _after(values: Values, *statistics: Array) -> Values:
    """The values, which accelerators do not read before the statistics are known: so they cap the logits once more.

    XLA for GPUs would write the capped logits in one pass, in float32, and read them in the next: 4 GiB for
    [8192, 131072]. On a CPU that costs less than another tanh.
    """
    logits = lax.platform_dependent(
        values.logits,
        *statistics,
        cpu=lambda logits, *_: logits,
        default=lambda *args: lax.optimization_barrier(args)[0],
    )
    return values._replace(logits=logits)


def _rounded_alike(label_logit: Array, m: Array, cap: Array | None) -> Array:
    """The label's logit, where it is the largest exactly m.

    It is capped apart from the others, and compiled apart a tanh or a division may be rounded differently: a gap of
    one rounding, instead of 0, would cost a confident row's loss its digits. The derivative is the label's own.
    """
    if cap is None:
        return label_logit
    gap = lax.stop_gradient(m - label_logit)
    return label_logit + jnp.where(jnp.abs(gap) <= 4 * jnp.finfo(m.dtype).eps * jnp.abs(m), gap, 0)


def statistics_dtype(*arrays: Array | jax.ShapeDtypeStruct | None):
    """float64 if an array is, else float32."""
    return jnp.float64 if any(a is not None and a.dtype == jnp.float64 for a in arrays) else jnp.float32


def _one_hot(labels: Array, z: Array) -> Array:
    # Compared with an iota inside the pass that uses it, this is free; a scatter would not be.
    return lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1) == labels[..., None]


def total(partial_sums, axis_name: str | None):
    """Sums over the classes of this shard, as sums over all classes."""
    return partial_sums if axis_name is None else lax.psum(partial_sums, axis_name)
