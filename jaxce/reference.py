"""The naive formulas (Bridle, 1990), line by line, differentiated by plain autodiff: jaxce's oracle.

    o_j = exp(z_j) / Σ_k exp(z_k)          E = −Σ_j y_j log o_j

They are to be read as a proof, not used: exp overflows on large logits, and a confident prediction's loss and gradient
round to exactly 0. In float64 and at moderate logits they are the truth to about 1e-15.

Logits have shape [..., num_classes] and one floating dtype, which the losses [...] have too. `where` masks classes, and
leaves each row one. Nothing is checked: an invalid label or a logit of −inf means whatever the formula makes of it.

>>> import jax, jax.numpy as jnp
>>> z, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.0])
>>> bool(jnp.allclose(jax.grad(softmax_cross_entropy)(z, y), softmax(z) - y))
True
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def softmax(logits: Array, axis: int | Sequence[int] | None = -1, where: Array | None = None) -> Array:
    """o_j = exp(z_j) / Σ_k exp(z_k) along `axis`; a masked class has o_j = 0."""
    e = jnp.exp(logits)
    e = e if where is None else jnp.where(where, e, 0)
    return e / e.sum(axis, keepdims=True)


def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    axis: int = -1,
    where: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Array | None = None,
    logit_cap: float | None = None,
    z_loss: float = 0.0,
) -> Array:
    """E = −Σ_j t_j log o_j + z_loss·lse², where t = class_weights ⊙ ((1−ε)·y + ε·Σy/K) for `labels` y.

    ε is `label_smoothing`, K the number of classes not masked, lse = log Σ_k exp z_k. A cap makes z cap·tanh(z/cap).
    """
    z = jnp.moveaxis(logits, axis, -1)
    t = jnp.moveaxis(jnp.broadcast_to(labels, logits.shape), axis, -1)
    seen = jnp.ones(z.shape, bool)
    if where is not None:
        seen = jnp.moveaxis(jnp.broadcast_to(where, logits.shape), axis, -1)
    t = jnp.where(seen, t, 0)
    classes = seen.sum(-1, keepdims=True, dtype=t.dtype)
    t = (1 - label_smoothing) * t + label_smoothing * t.sum(-1, keepdims=True) / classes
    if class_weights is not None:
        t = jnp.expand_dims(class_weights, range(z.ndim - 1)) * t
    if logit_cap is not None:
        z = logit_cap * jnp.tanh(z / logit_cap)
    o = softmax(z, where=seen)
    log_normalizer = jnp.log(jnp.where(seen, jnp.exp(z), 0).sum(-1))
    return -jnp.where(seen, t * jnp.log(jnp.where(seen, o, 1)), 0).sum(-1) + z_loss * log_normalizer**2


def softmax_cross_entropy_with_integer_labels(
    logits: Array, labels: Array, axis: int = -1, where: Array | None = None, **options: Any
) -> Array:
    """E = −log o_y: `softmax_cross_entropy` of one-hot labels, with its options. A label not in [0, K) has no class."""
    one_hot = jax.nn.one_hot(labels, logits.shape[axis], dtype=logits.dtype, axis=axis)
    return softmax_cross_entropy(logits, one_hot, axis, where, **options)


def linear_cross_entropy(x: Array, w: Array, labels: Array, bias: Array | None = None) -> Array:
    """The mean over rows of the cross-entropy of logits x @ w + bias, all of them held; NaN without rows."""
    logits = jnp.matmul(x, w)
    logits = logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    return softmax_cross_entropy_with_integer_labels(logits, labels).mean()
