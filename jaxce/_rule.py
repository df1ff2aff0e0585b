"""The mathematics of the softmax cross-entropy: the numbers of a row of logits, and their gradient, `o − y`.

For one row with logits z, o = softmax(z), targets t of mass a = Σ_j t_j, a label y, and lse = log Σ_k exp z_k. All
follows from log o_j = z_j − lse and ∂lse/∂z_i = exp z_i / Σ_k exp z_k = o_i:

    loss            −log o_y                                    ∂/∂z = o − onehot(y)
    target loss     −Σ_j t_j log o_j = a·lse − Σ_j t_j z_j      ∂/∂z = a·o − t          ∂/∂t = −log o
    log-normalizer  lse                                         ∂/∂z = o
    entropy         −Σ_j o_j log o_j = H                        ∂/∂z = −o·(log o + H)

We keep lse = m + L as two numbers: a shift m, usually max z, and L = log Σ_j exp(z_j − m). Their float32 sum near 1e4
would leave o three digits. If m = z_c, the term of class c is 1, and small terms are lost beside it. So that term is
written as 1 + expm1(z_c − m), and log1p adds the 1. c is the label, or without one the largest class:

    L = log1p(Σ_{j≠c} exp(z_j − m) + expm1(z_c − m))        −log o_c = (m − z_c) + L        o_c − 1 = expm1(log o_c)

A row is sure when −log o_c < 1/2. Then o_c > 0.6, so c is the largest, and m = z_c. Of the derivatives of m and L the
mathematics fixes only the sum, ∂m + ∂L = o. How to split it is our choice. In a sure row ∂m = onehot(c), and ∂L = o −
onehot(c) is as small as L: second derivatives stay accurate. In other rows m is a constant: ∂m = 0 and ∂L = o.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, tree

from ._elementary import exp, expm1, finite, log1p, product, times


class Sums(NamedTuple):
    """What some classes contribute. c is the label; without one, or for the entropy, the largest of these classes."""

    shift: Any  # m: the largest z_j; for a label, or with listed classes, any shift
    rest: Any  # Σ_{j≠c} exp(z_j − m); with listed classes perhaps Σ_j exp(z_j − m) − 1
    logit: Any  # the label's, or 0 where it is not among them; None without one
    mass: Any = None  # Σ_j t_j
    distance: Any = None  # Σ_j t_j (m − z_j)
    moment: Any = None  # Σ_j exp(z_j − m)(m − z_j)
    argmax: Any = None  # the first class of logit m

    without_largest = property(lambda s: s.logit is None or s.moment is not None)  # is c the largest class?


class Row(NamedTuple):
    """The numbers of a row. The same tuple holds their cotangents."""

    shift: Any  # m
    log_sum: Any  # L
    loss: Any  # −log o_y; None without a label
    target_loss: Any = None
    mass: Any = None  # a
    entropy: Any = None


def sums(z: Array, m: Array, at_label: Array | None, logit: Array | None, t=None, ids=None) -> Sums:
    """The `Sums` of logits z [..., K], about the shift m [...]. `ids`: the classes', for the entropy."""
    shift = finite(m)[..., None]  # −inf − −inf would be NaN
    at_m, argmax = z == shift, None  # at_m: the classes with z_j = m, mostly the largest
    # Without a label, at_c drops all of the largest, though c is only one of them: the others are counted, as ties.
    at_c, ties = (at_m, at_m.sum(-1, dtype=z.dtype) - 1) if at_label is None else (at_label, 0)
    if ids is not None:  # c is the first of the largest
        argmax = jnp.where(at_m, ids, jnp.iinfo(ids.dtype).max).min(-1)
        at_c, ties = ids == argmax[..., None], 0
    e = jnp.where(at_c, 0, exp(z - shift))

    def below(weight):  # Σ weight·(m − z). If z is a product, an FMA may make m − z nonzero at the largest.
        return jnp.where(at_m, 0, product(weight, shift - z)).sum(-1)

    s = Sums(m, e.sum(-1) + ties, logit, moment=None if ids is None else below(e), argmax=argmax)
    return s if t is None else s._replace(mass=jnp.broadcast_to(t.sum(-1), m.shape), distance=below(t))


def about(s: Sums, m: Array) -> Sums:
    """`s`, about a larger shift m. The largest class, if it was left out, is then counted in `rest`."""
    d = jnp.where(jnp.isneginf(s.shift), jnp.inf, m - s.shift)
    scale, total = exp(-d), (s.rest + 1 if s.without_largest else s.rest)
    s = s._replace(shift=m, rest=scale * total)
    if s.mass is not None:
        s = s._replace(distance=s.distance + product(s.mass, d))
    if s.moment is not None:  # scale·d first, as d may be 3e38
        s = s._replace(moment=scale * s.moment + product(scale, d) * total)
    return s


def joined(a: Sums, b: Sums) -> Sums:
    """The `Sums` of two parts of a row together (classes, blocks or shards), at one exponential."""
    swap, tie = a.shift < b.shift, a.shift == b.shift
    big, small = (tree.map(lambda u, v: jnp.where(swap, v, u), *ab) for ab in ((a, b), (b, a)))
    both = tree.map(jnp.add, big, about(small, big.shift))  # but for shift, logit and argmax
    argmax = None if a.argmax is None else jnp.where(tie, jnp.minimum(a.argmax, b.argmax), big.argmax)
    logit = None if a.logit is None else a.logit + b.logit
    return both._replace(shift=big.shift, logit=logit, argmax=argmax)


def row_of(s: Sums) -> Row:
    """A row's numbers, from the `Sums` of all its classes. A row without a finite maximum has no softmax: NaN."""
    gap = jnp.zeros_like(s.shift) if s.logit is None else s.shift - s.logit
    total = jnp.where(jnp.isnan(gap), gap, s.rest) if s.without_largest else s.rest + expm1(-gap)  # NaN: invalid label
    log_sum = jnp.where(jnp.isfinite(s.shift), log1p(total), jnp.nan)
    row = Row(s.shift, log_sum, None if s.logit is None else gap + log_sum)
    if s.mass is not None:
        row = row._replace(mass=s.mass, target_loss=s.mass * log_sum + s.distance)
    if s.moment is not None:  # H = lse − Σ_j o_j z_j = L + Σ_j o_j (m − z_j)
        row = row._replace(entropy=log_sum + exp(-log_sum) * s.moment)
    return row


def gradient(z: Array, at_label: Array | None, t: Array | None, row: Row, g: Row) -> tuple[Array, Array | None]:
    """∂/∂z = A·o − g.loss·onehot(c) − g.target_loss·t − g.entropy·o·(log o + H), and ∂/∂t, of any classes [..., K].

    A = g.log_sum + g.loss + g.target_loss·a is `slope`. Sure rows add (g.shift − g.log_sum)·onehot(c). Numbers of rows
    are [..., 1]; `row.loss` may be [..., K]: its entry at c counts.
    """
    loss = row.log_sum if row.loss is None else row.loss  # −log o_c
    sure, o_c, q, at_others, dt = loss < 0.5, exp(-loss), expm1(-loss), 0, None  # q = o_c − 1, with all its digits
    at_c = sure & (z == row.shift) if at_label is None else at_label  # without a label, the largest, if sure
    # At c each cotangent has its own term, in which nothing cancels: if sure, a·o_c − t is a·q + (a − t).
    slope, own = g.log_sum, g.shift * jnp.where(sure, 1, 0) + g.log_sum * jnp.where(sure, q, o_c)
    if row.loss is not None:
        slope, own = slope + g.loss, own + g.loss * q
    if t is not None:
        slope, at_others = slope + g.target_loss * row.mass, -g.target_loss * t
        own = own + g.target_loss * jnp.where(sure, row.mass * q + (row.mass - t), row.mass * o_c - t)
        dt = g.mass + times(g.target_loss, jnp.where((t == 0) & jnp.isneginf(z), 0, (row.shift - z) + row.log_sum))
    # We add two terms: one select, transposed twice by `_autodiff`, takes two passes. XLA shares this exp with `sums`.
    dz = slope * exp(-row.log_sum) * jnp.where(at_c, 0, exp(z - finite(row.shift))) + jnp.where(at_c, own, at_others)
    if row.entropy is not None:
        log_o = (z - row.shift) - row.log_sum
        dz = dz - g.entropy * product(exp(log_o), log_o + row.entropy)
    return dz, dt
