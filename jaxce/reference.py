r"""The naive formulas, line by line as in the derivation, differentiated by plain autodiff: jaxce's oracle.

    o_j = exp(z_j) / Σ_k exp(z_k)          E = −Σ_j y_j log o_j

These are the definitions, not implementations to use: exp overflows on large logits, and a confident prediction's loss
and gradient round to exactly 0. In float64 and at moderate logits they are the truth to about 1e-15.

>>> import jax, jax.numpy as jnp
>>> z, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 0.0])
>>> bool(jnp.allclose(jax.grad(softmax_cross_entropy)(z, y), softmax(z) - y))
True
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def softmax(logits: Array, axis: int | Sequence[int] | None = -1, where: Array | None = None) -> Array:
    """o_j = exp(z_j) / Σ_k exp(z_k) along `axis`; where `where` is False, a class is not there: o_j = 0."""
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
    """E = −Σ_j t_j log o_j + z_loss·lse², t being the labels smoothed by (1−ε)·y + ε·Σy/K and then weighted.

    `where` is a mask of classes, broadcast against logits; other arguments as in `jaxce.softmax_cross_entropy`.
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
    """`softmax_cross_entropy` of one-hot labels: E = −log o_y. Rows to ignore are for the caller to leave out."""
    one_hot = jax.nn.one_hot(labels, logits.shape[axis], dtype=logits.dtype, axis=axis)
    return softmax_cross_entropy(
        logits,
        one_hot,
        axis,
        where,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        logit_cap=logit_cap,
        z_loss=z_loss,
    )


def linear_cross_entropy(x: Array, w: Array, labels: Array, bias: Array | None = None) -> Array:
    """The mean over rows of `softmax_cross_entropy_with_integer_labels(x @ w + bias, labels)`, logits and all."""
    logits = jnp.matmul(x, w)
    logits = logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    return softmax_cross_entropy_with_integer_labels(logits, labels).mean()
