"""Rows of logits and their targets, the options of the losses, and the one way to take a loss and its gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import jaxce

integer_loss = jaxce.softmax_cross_entropy_with_integer_labels
dense_loss = jaxce.softmax_cross_entropy
LOSSES = {"integer": integer_loss, "dense": dense_loss}
FORMS = tuple(LOSSES)  # of the targets

# What differs between the options that a test is given; the values are those of `option_sets`.
OPTION_SETS = {
    "none": (),
    "label_smoothing": ("label_smoothing",),
    "class_weights": ("class_weights",),
    "logit_cap": ("logit_cap",),
    "z_loss": ("z_loss",),
    "all": ("label_smoothing", "class_weights", "logit_cap", "z_loss"),
}


def logits(*shape: int, seed: int = 0, dtype: DTypeLike = "float32", spread: float = 1.0) -> jax.Array:
    """Normal numbers of this standard deviation. So are the operands of a head, and tangents."""
    return jnp.asarray(spread * np.random.default_rng(seed).standard_normal(shape), dtype)


def probabilities(*shape: int, seed: int = 1, dtype: DTypeLike = "float32") -> jax.Array:
    """Dense targets, positive, whose sum over the last axis is 1."""
    e = np.exp(np.random.default_rng(seed).standard_normal(shape))
    return jnp.asarray(e / e.sum(-1, keepdims=True), dtype)


def random_labels(*shape: int, classes: int, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(classes, size=shape), jnp.int32)


def targets_of(form: str, *shape: int) -> jax.Array:
    """Targets for logits of this shape [..., K]."""
    return random_labels(*shape[:-1], classes=shape[-1]) if form == "integer" else probabilities(*shape)


def head(
    rows: int | tuple[int, ...], features: int, classes: int, dtype: DTypeLike = "float32", seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and labels of a language model's head, x @ w being logits of standard deviation 1."""
    rng = np.random.default_rng(seed)
    rows = (rows,) if isinstance(rows, int) else rows
    x, w = rng.standard_normal((*rows, features)), rng.standard_normal((features, classes)) / features**0.5
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(rng.integers(classes, size=rows), jnp.int32)


def option_values(classes: int, class_weights: Sequence[float] | None = None) -> dict[str, Any]:
    """A value of every option that takes part in the arithmetic."""
    weights = np.linspace(0.5, 2, classes) if class_weights is None else class_weights
    return {
        "label_smoothing": 0.2,
        "class_weights": jnp.asarray(weights, jnp.float32),
        "logit_cap": 3.0,
        "z_loss": 0.1,
    }


def option_sets(classes: int, class_weights: Sequence[float] | None = None) -> dict[str, dict[str, Any]]:
    """No option, each alone, and all together."""
    values = option_values(classes, class_weights)
    return {name: {option: values[option] for option in options} for name, options in OPTION_SETS.items()}


def with_gradient(f: Callable, z, cotangent=None) -> tuple[jax.Array, jax.Array]:
    """f(z), and the gradient of its sum; with a cotangent, of Σ cotangent·f(z). Eager, unless it is inside a jit."""
    losses, pullback = jax.vjp(f, z)
    return losses, pullback(jnp.ones_like(losses) if cotangent is None else cotangent)[0]


def loss_and_gradient(loss_fn: Callable, z, targets, **options) -> tuple[np.ndarray, np.ndarray]:
    """The losses of rows, and the gradient of their sum with respect to the logits, compiled."""
    loss, gradient = _compiled(loss_fn, z, targets, **options)
    return np.asarray(loss), np.asarray(gradient)


@partial(jax.jit, static_argnums=0, static_argnames=("axis",))
def _compiled(loss_fn, z, targets, **options):
    return with_gradient(lambda z: loss_fn(z, targets, **options), z)


def assert_descends(loss_fn, z, targets, gradient, **options):
    """What relates gradients to each other also holds for zeros, and for the negative: a step along it must gain."""
    assert (loss_fn(z - 0.01 * gradient, targets, **options) < loss_fn(z, targets, **options)).all()
