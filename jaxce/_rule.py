"""The mathematics of the softmax cross-entropy: the numbers of a row of logits, and their gradient, `o − y`.

For one row with logits z, o = softmax(z), targets t of mass a = Σ_j t_j, a label y, and lse = log Σ_k exp z_k:

    loss            −log o_y                                    ∂/∂z = o − onehot(y)
    target loss     −Σ_j t_j log o_j = a·lse − Σ_j t_j z_j      ∂/∂z = a·o − t          ∂/∂t = −log o
    log-normalizer  lse                                         ∂/∂z = o
    entropy         −Σ_j o_j log o_j = H                        ∂/∂z = −o·(log o + H)

since ∂o_j/∂z_i = o_j·(δ_ij − o_i), so ∂(target loss)/∂z_i = Σ_{j≠i} t_j o_i − t_i (1 − o_i) = a·o_i − t_i.

**Exact where a row is sure.** lse = m + L is kept as two numbers, the shift m = max z and L = log Σ_j exp(z_j − m):
rounded to one number beside logits of 1e4, it would cost o all its digits. One class c is left out of the sum: the
label, or the largest where there is no label. Then nothing cancels:

    L = log1p(Σ_{j≠c} exp(z_j − m) + expm1(z_c − m))        −log o_c = (m − z_c) + L        o_c − 1 = expm1(log o_c)

A row is sure when −log o_c < 1/2. Then c is the largest class by far, so that m = z_c, and derivatives take it so:
∂m = onehot(c) and ∂L = o − onehot(c). In other rows ∂m = 0 and ∂L = o. Only the sum ∂m + ∂L = o matters to first order;
the second derivative is made of these parts, and keeps its digits because each of them does.

**A commutative monoid.** `Sums` is what some classes contribute to a row's numbers, and `joined` adds two parts up. The
parts may be single classes, blocks of classes or shards. Given the numbers, the `gradient` is elementwise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._elementary import exp, expm1, log1p


class Sums(NamedTuple):
    """What some classes contribute. c is the label; without one (`logit` is None), the largest of these classes."""

    shift: Any  # m = max z_j
    rest: Any  # Σ_{j≠c} exp(z_j − m)
    logit: Any  # z_c, or 0 where it is not among them
    mass: Any = None  # Σ_j t_j
    distance: Any = None  # Σ_j t_j (m − z_j)
    moment: Any = None  # Σ_{j≠c} exp(z_j − m)(m − z_j)
    first: Any = None  # the first class of logit m


class Row(NamedTuple):
    """The numbers of a row. The same tuple holds their cotangents."""

    shift: Any  # m
    log_sum: Any  # L
    loss: Any  # −log o_y; None without a label
    target_loss: Any = None
    mass: Any = None  # a
    entropy: Any = None

    @property
    def log_normalizer(self) -> Array:
        return self.shift + self.log_sum


def finite(m: Array) -> Array:
    """The shift where all logits are −inf would be −inf, and −inf − −inf is NaN."""
    return jnp.where(jnp.isneginf(m), 0, m)


def single(z: Array, at_label: Array | None, t: Array | None, ids: Array | None) -> Sums:
    """The `Sums` of each class by itself; with `ids`, also what the entropy and the arg max need."""
    zero = jnp.zeros_like(z)
    rest, logit = (zero, None) if at_label is None else (jnp.where(at_label, zero, 1), jnp.where(at_label, z, 0))
    return Sums(z, rest, logit, t, None if t is None else zero, None if ids is None else zero, ids)


def sums(z: Array, m: Array, at_label: Array | None, logit: Array | None, t=None, ids=None) -> Sums:
    """The `Sums` of logits z [..., K], given their largest m [...] (for a label, any shift will do)."""
    shift = finite(m[..., None])
    largest, e = z == shift, exp(z - shift)
    rest = jnp.where(largest if at_label is None else at_label, 0, e).sum(-1)
    rest = rest if at_label is not None else (largest.sum(-1, dtype=z.dtype) - 1) + rest
    s = Sums(m, rest, logit)
    if t is not None:
        # Exactly 0 at the maximum, where LLVM may fuse a product z into the difference; and 0·log 0 = 0.
        mass = jnp.broadcast_to(t.sum(-1), m.shape)
        s = s._replace(mass=mass, distance=_product(t, shift - z, largest | (t == 0)).sum(-1))
    if ids is not None:
        nothing = largest | jnp.isneginf(z) if at_label is None else largest | jnp.isneginf(z) | at_label
        first = jnp.where(largest, ids, jnp.iinfo(ids.dtype).max).min(-1)
        s = s._replace(moment=_product(e, shift - z, nothing).sum(-1), first=first)
    return s


def _product(a: Array, b: Array, zero: Array) -> Array:
    """a·b, and 0 where `zero`, also where b is infinite there (0·inf, even if not selected, alarms jax_debug_nans)."""
    return jnp.where(zero, 0, a * jnp.where(zero, 0, b))


def about(s: Sums, m: Array) -> Sums:
    """`s`, about a larger shift m; the largest class that it left out, if any, is then counted in `rest`."""
    no_class = jnp.isneginf(s.shift)
    d = jnp.where(no_class, jnp.inf, m - s.shift)
    scale, total = exp(-d), s.rest + 1 if s.logit is None else s.rest
    s = s._replace(shift=m, rest=scale * total)
    if s.mass is not None:
        s = s._replace(distance=s.distance + s.mass * jnp.where(s.mass == 0, 0, d))
    if s.moment is not None:
        s = s._replace(moment=scale * s.moment + (scale * jnp.where(no_class, 0, d)) * total)  # so ordered: d may be 3e38
    return s


def joined(a: Sums, b: Sums) -> Sums:
    """The `Sums` of two parts of a row together, at one exponential."""
    swap, equal = a.shift < b.shift, a.shift == b.shift
    big, small = (jax.tree.map(lambda u, v: jnp.where(swap, v, u), *ab) for ab in ((a, b), (b, a)))
    first = None if a.first is None else jnp.where(equal, jnp.minimum(a.first, b.first), big.first)
    both = jax.tree.map(jnp.add, big._replace(first=None), about(small, big.shift)._replace(first=None))
    return both._replace(shift=jnp.maximum(a.shift, b.shift), first=first)


def row_of(s: Sums) -> Row:
    """A row's numbers, from the `Sums` of all its classes. A row without a finite maximum has no softmax: NaN."""
    gap = jnp.zeros_like(s.shift) if s.logit is None else s.shift - s.logit
    log_sum = jnp.where(jnp.isfinite(s.shift), log1p(s.rest + expm1(-gap)), jnp.nan)
    row = Row(s.shift, log_sum, None if s.logit is None else gap + log_sum)
    if s.mass is not None:
        row = row._replace(mass=s.mass, target_loss=s.mass * log_sum + s.distance)
    if s.moment is not None:
        own = exp(-gap) * jnp.where(jnp.isposinf(gap), 0, gap)
        row = row._replace(entropy=log_sum + exp(-log_sum) * (s.moment + own))
    return row


def label_loss(m: Array, log_sum: Array, logit: Array) -> Array:
    """−log o_c again, differentiable. `where`: in a sure row m is z_c, and autodiff would compute 1 − 1 for m − z_c."""
    gap = m - logit
    return jnp.where(gap + log_sum < 0.5, 0, gap) + log_sum


def gradient(z: Array, at_c: Array, t: Array | None, row: Row, g: Row) -> tuple[Array, Array | None]:
    """∂/∂z = A·o − g_loss·onehot(c) − g_t·t, A = g_loss + g_lse + g_t·a, and ∂/∂t, for any of a row's classes [..., K].

    `row` and its cotangents `g` are [..., 1]. `at_c` marks the label, or without one the largest class of a sure row.
    """
    loss = row.log_sum if row.loss is None else row.loss  # −log o_c
    sure, o_c, q = loss < 0.5, exp(-loss), expm1(-loss)  # q = o_c − 1
    # The sum at c is finished for each cotangent before they are added: forward mode transposes this code.
    slope, own = g.log_sum, g.shift * jnp.where(sure, 1, 0) + g.log_sum * jnp.where(sure, q, o_c)
    at_others, dt = 0, None
    if row.loss is not None:
        slope, own = slope + g.loss, own + g.loss * q
    if t is not None:
        slope, at_others = slope + g.target_loss * row.mass, -g.target_loss * t
        own = own + g.target_loss * jnp.where(sure, row.mass * q + (row.mass - t), row.mass * o_c - t)
        distance = jnp.where((t == 0) & jnp.isneginf(z), 0, (row.shift - z) + row.log_sum)  # −log o; 0·log 0 = 0
        dt = g.mass + g.target_loss * distance
    e = jnp.where(at_c, 0, exp(z - finite(row.shift)))
    # Added, not selected: after `_autodiff` transposed it twice, a select between sums would be two passes.
    dz = slope * exp(-row.log_sum) * e + jnp.where(at_c, own, at_others)
    if row.entropy is not None:
        log_o = (z - row.shift) - row.log_sum
        o = exp(log_o)
        dz = dz - g.entropy * o * (jnp.where(o == 0, 0, log_o) + row.entropy)
    return dz, dt
