"""The mathematics of the softmax cross-entropy: the numbers of a row of logits, and their gradient, `o − y`.

For one row with logits z, o = softmax(z), targets t of mass a = Σ_j t_j, a label y, and lse = log Σ_k exp z_k:

    loss            −log o_y                                    ∂/∂z = o − onehot(y)
    target loss     −Σ_j t_j log o_j = a·lse − Σ_j t_j z_j      ∂/∂z = a·o − t          ∂/∂t = −log o
    log-normalizer  lse                                         ∂/∂z = o
    entropy         −Σ_j o_j log o_j = H                        ∂/∂z = −o·(log o + H)

since ∂o_j/∂z_i = o_j·(δ_ij − o_i), so ∂(target loss)/∂z_i = Σ_{j≠i} t_j o_i − t_i (1 − o_i) = a·o_i − t_i.

lse = m + L is kept as two numbers, the shift m = max z and L = log Σ_j exp(z_j − m): rounded to one, beside logits of
1e4, it would cost o all its digits. The sum contains a 1, beside which small terms are lost. So one class c is left
out, the label or else the largest:

    L = log1p(Σ_{j≠c} exp(z_j − m) + expm1(z_c − m))        −log o_c = (m − z_c) + L        o_c − 1 = expm1(log o_c)

A row is sure when −log o_c < 1/2: c is the largest, and m = z_c. Mathematics fixes only the sum of the derivatives of m
and L, which is o. In a sure row we take ∂m = onehot(c) and ∂L = o − onehot(c): ∂L is then as small as L, and second
derivatives stay accurate. In other rows m counts as a constant: ∂m = 0 and ∂L = o.

`Sums` is what some classes contribute, and `joined` adds two parts up: single classes, blocks of classes, or shards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._elementary import exp, expm1, log1p, product


class Sums(NamedTuple):
    """What some classes contribute. c is the label; without one (`logit` is None), the largest of these classes."""

    shift: Any  # m: the largest z_j, or for a label any shift
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


def sums(z: Array, m: Array, at_label: Array | None, logit: Array | None, t=None, ids=None) -> Sums:
    """The `Sums` of logits z [..., K], about the shift m [...]."""
    shift = _finite(m[..., None])
    largest = z == shift
    e = jnp.where(largest if at_label is None else at_label, 0, exp(z - shift))
    rest = e.sum(-1) if at_label is not None else e.sum(-1) + (largest.sum(-1, dtype=z.dtype) - 1)

    def below(weight):  # Σ weight·(m − z). At the largest the difference is 0, but LLVM may fuse a product z into it.
        return jnp.where(largest, 0, product(weight, shift - z)).sum(-1)

    s = Sums(m, rest, logit)
    if t is not None:
        s = s._replace(mass=jnp.broadcast_to(t.sum(-1), m.shape), distance=below(t))
    if ids is not None:
        first = jnp.where(largest, ids, jnp.iinfo(ids.dtype).max).min(-1)
        s = s._replace(moment=below(e), first=first)
    return s


def about(s: Sums, m: Array) -> Sums:
    """`s`, about a larger shift m. The largest class, if it was left out, is then counted in `rest`."""
    d = jnp.where(jnp.isneginf(s.shift), jnp.inf, m - s.shift)
    scale = exp(-d)
    total = s.rest + 1 if s.logit is None else s.rest
    s = s._replace(shift=m, rest=scale * total)
    if s.mass is not None:
        s = s._replace(distance=s.distance + product(s.mass, d))
    if s.moment is not None:  # scale·d first, as d may be 3e38
        s = s._replace(moment=scale * s.moment + product(scale, d) * total)
    return s


def joined(a: Sums, b: Sums) -> Sums:
    """The `Sums` of two parts of a row together, at one exponential."""
    swap = a.shift < b.shift
    big, small = (jax.tree.map(lambda u, v: jnp.where(swap, v, u), *ab) for ab in ((a, b), (b, a)))
    first = None if a.first is None else jnp.where(a.shift == b.shift, jnp.minimum(a.first, b.first), big.first)
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
        row = row._replace(entropy=log_sum + exp(-log_sum) * (s.moment + product(exp(-gap), gap)))
    return row


def gradient(z: Array, at_c: Array, t: Array | None, row: Row, g: Row) -> tuple[Array, Array | None]:
    """∂/∂z = A·o − g_loss·onehot(c) − g_t·t, A = g_loss + g_lse + g_t·a, and ∂/∂t, for any of a row's classes [..., K].

    `row` and its cotangents `g` are [..., 1]; only `row.loss` may be [..., K], of which the entry at c counts. `at_c`
    marks the label, or without one the largest class of a sure row.
    """
    loss = row.log_sum if row.loss is None else row.loss  # −log o_c
    sure, o_c, q = loss < 0.5, exp(-loss), expm1(-loss)  # q = o_c − 1
    # At c each cotangent gets its own term, in which nothing cancels. Their factors summed first would cancel.
    slope, own = g.log_sum, g.shift * jnp.where(sure, 1, 0) + g.log_sum * jnp.where(sure, q, o_c)
    at_others, dt = 0, None
    if row.loss is not None:
        slope, own = slope + g.loss, own + g.loss * q
    if t is not None:
        slope, at_others = slope + g.target_loss * row.mass, -g.target_loss * t
        own = own + g.target_loss * jnp.where(sure, row.mass * q + (row.mass - t), row.mass * o_c - t)
        dt = g.mass + g.target_loss * jnp.where((t == 0) & jnp.isneginf(z), 0, (row.shift - z) + row.log_sum)  # −log o
    e = jnp.where(at_c, 0, exp(z - _finite(row.shift)))
    # Added, not selected: after `_autodiff` transposed it twice, a select between sums would be two passes.
    dz = slope * exp(-row.log_sum) * e + jnp.where(at_c, own, at_others)
    if row.entropy is not None:
        log_o = (z - row.shift) - row.log_sum
        o = exp(log_o)
        dz = dz - g.entropy * o * (jnp.where(o == 0, 0, log_o) + row.entropy)
    return dz, dt


def _finite(m: Array) -> Array:
    return jnp.where(jnp.isneginf(m), 0, m)  # where all logits are −inf, −inf − −inf would be NaN
