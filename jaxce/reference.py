r"""The naive formulas, line by line as in the derivation, differentiated by plain autodiff: jaxce's oracle.

    o_j = exp(z_j) / Σ_k exp(z_k)          E = −Σ_j y_j log o_j

These are the definitions, not implementations to use: exp overflows on large logits, and a confident prediction's loss
and gradient round to exactly 0. In float64 and at moderate logits they are the truth to about 1e-15.

Arguments are arrays of one floating dtype (labels and masks aside), in which everything is computed and returned;
losses are in nats, one per row. Nothing is checked, and there are no edges: an invalid label or a logit of −inf means
whatever the formula makes of it.

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
    """o_j = exp(z_j) / Σ_k exp(z_k) along `axis`; where `where` is False, a class is not there: o_j = 0.

    Args:
        logits: floating, [..., K] for the default axis.
        axis: the class axis, a tuple of them, or None for all; default the last.
        where: bool, broadcast against `logits`, default none: the classes that take part.

    Returns:
        Probabilities, of the shape and dtype of `logits`.

    Source: J. S. Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990.
    """
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

    Args:
        logits: floating, [..., K] for the default axis.
        labels: target probabilities or weights, broadcast against `logits`.
        axis: the class axis, one int; default the last.
        where: bool mask of classes, broadcast against `logits`, default none. Every row shows a class.
        label_smoothing, class_weights, logit_cap, z_loss: as in `jaxce.softmax_cross_entropy`.

    Returns:
        The loss of each row [...], in the dtype of `logits`.

    Source: as `jaxce.softmax_cross_entropy`.
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
    """`softmax_cross_entropy` of one-hot labels: E = −log o_y. Rows to ignore are for the caller to leave out.

    Args:
        logits, axis, where, label_smoothing, class_weights, logit_cap, z_loss: as in `softmax_cross_entropy`.
        labels: integer [...], in [0, K). Outside, the one-hot row is all zero, and so is the loss without a z-loss.

    Returns:
        The loss of each row [...], in the dtype of `logits`.

    Example:
        >>> import jax.numpy as jnp
        >>> print(f"{softmax_cross_entropy_with_integer_labels(jnp.array([1.0, 2.0, 3.0]), jnp.array(1)):.4f}")
        1.4076

    Source: as `jaxce.softmax_cross_entropy_with_integer_labels`.
    """
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
    """The mean over rows of `softmax_cross_entropy_with_integer_labels(x @ w + bias, labels)`, logits and all.

    Args:
        x: floating, [..., D].
        w: floating, [D, K].
        labels: integer, [...].
        bias: floating, [K], default none.

    Returns:
        The mean loss, a scalar in the dtype of `x`; NaN where there are no rows.

    Source: as `jaxce.linear_cross_entropy`.
    """
    logits = jnp.matmul(x, w)
    logits = logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))
    return softmax_cross_entropy_with_integer_labels(logits, labels).mean()
