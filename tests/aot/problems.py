"""Heads of language models, and the losses that are compiled for them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

import jaxce

TOKENS = 8192
HEADS = {  # features, classes
    "llama-3.1-8b": (4096, 128256),
    "gemma-3-4b": (2560, 262144),
    "qwen3-8b": (4096, 151936),
    "gpt-oss-120b": (2880, 201088),
}
LOGITS = (TOKENS, 131072)


def head(features: int, classes: int, w_dtype=jnp.bfloat16, tokens: int = TOKENS) -> tuple:
    """x, w and the labels."""
    return (
        jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((features, classes), w_dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def gradients(loss: Callable) -> Callable:
    return jax.value_and_grad(loss, (0, 1))


OURS: dict[str, tuple[Callable, jnp.dtype]] = {  # and the dtype of w
    "jaxce": (jaxce.linear_cross_entropy, jnp.dtype(jnp.bfloat16)),
    "jaxce, recompute": (partial(jaxce.linear_cross_entropy, recompute=True), jnp.dtype(jnp.bfloat16)),
    "jaxce, float32 w": (partial(jaxce.linear_cross_entropy, dtype=jnp.bfloat16), jnp.dtype(jnp.float32)),
    "jaxce, float32 w, recompute": (
        partial(jaxce.linear_cross_entropy, dtype=jnp.bfloat16, recompute=True),
        jnp.dtype(jnp.float32),
    ),
}


def logits(dtype=jnp.bfloat16, shape=LOGITS) -> tuple:
    """Logits, labels, class weights, and a class mask."""
    rows, classes = shape
    return (
        jax.ShapeDtypeStruct(shape, dtype),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((classes,), jnp.float32),
        jax.ShapeDtypeStruct((classes,), jnp.bool_),
    )


def mean_loss(logits, labels, class_weights, where):
    return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_loss_with_every_option(logits, labels, class_weights, where):
    return jaxce.softmax_cross_entropy_with_integer_labels(
        logits,
        labels,
        where=where[None],
        ignore_index=-1,
        label_smoothing=0.1,
        class_weights=class_weights,
        logit_cap=30.0,
        z_loss=1e-4,
    ).mean()
