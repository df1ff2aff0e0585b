"""What is compiled: heads of language models and losses of logits, by jaxce, and by every peer that is installed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxce

from ..benchmarks.contenders import installed, linear_losses

TOKENS = 8192  # of all heads that do not say otherwise
HEADS = {  # features, classes
    "llama-3.1-8b": (4096, 128256),
    "gemma-3-4b": (2560, 262144),
    "qwen3-8b": (4096, 151936),
    "gpt-oss-120b": (2880, 201088),
}
MORE_HEADS = {  # tokens, features, classes
    "few tokens": (4096, 4096, 151936),
    "many tokens": (32768, 2048, 65536),
    "gpt-2": (8192, 768, 50257),
}
ALL_HEADS = {name: (TOKENS, *shape) for name, shape in HEADS.items()} | MORE_HEADS
LOGITS = (TOKENS, 131072)
LOGITS_DTYPES = {"logits": jnp.bfloat16, "logits, float32": jnp.float32}
PROBLEMS = (*ALL_HEADS, *LOGITS_DTYPES)


class Case(NamedTuple):
    problem: str
    contender: str
    function: Callable
    arguments: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def is_head(self) -> bool:
        return self.problem in ALL_HEADS


def shape_of(problem: str) -> str:
    if problem in LOGITS_DTYPES:
        return f"{list(LOGITS)} {jnp.dtype(LOGITS_DTYPES[problem]).name}"
    tokens, features, classes = ALL_HEADS[problem]
    return f"[{tokens}, {features}] @ [{features}, {classes}] bfloat16"


def cases(problem: str) -> list[Case]:
    of = cases_of_logits if problem in LOGITS_DTYPES else cases_of_a_head
    return of(problem)


# --- Heads -------------------------------------------------------------------------------------------------------


def head(features: int, classes: int, w_dtype=jnp.bfloat16, tokens: int = TOKENS) -> tuple:
    """x, w and the labels."""
    return (
        jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16),
        jax.ShapeDtypeStruct((features, classes), w_dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def gradients(loss: Callable) -> Callable:
    return jax.value_and_grad(loss, (0, 1))


HALF, SINGLE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def per_row(x, w, labels):
    return jaxce.linear_cross_entropy(x, w, labels, reduction="none").mean()


def statistics(x, w, labels):
    found = jaxce.linear_label_statistics(x, w, labels)
    return (jnp.exp(found.log_prob) + 0.1 * found.entropy + 0.01 * found.log_normalizer**2).mean()


def of(dtype=HALF, /, **options) -> tuple[Callable, jnp.dtype]:
    return partial(jaxce.linear_cross_entropy, **options), dtype


OURS: dict[str, tuple[Callable, jnp.dtype]] = {  # and the dtype of w
    "jaxce": of(),
    "jaxce, recompute=True": of(recompute=True),
    "jaxce, recompute=False": of(recompute=False),
    "jaxce, per row": (per_row, HALF),
    "jaxce, statistics": (statistics, HALF),
    "jaxce, float32 w": of(SINGLE, dtype=HALF),
    "jaxce, float32 w, recompute=True": of(SINGLE, dtype=HALF, recompute=True),
}


def blocks_of(classes: Iterable[int] = (), rows: Iterable[int] = ()) -> dict[str, tuple[Callable, jnp.dtype]]:
    """By blocks of so many classes, or rows."""
    plans = {f"jaxce, {size} classes": of(recompute=True, block_size=size) for size in classes}
    return plans | {f"jaxce, {size} rows": of(recompute=False, block_size=size) for size in rows}


SOME = blocks_of((1024, 2048, 4096, 8192, 16384), (1024, 2048))
BLOCKS = {  # by head
    "llama-3.1-8b": blocks_of((512, 1024, 2048, 4096, 8192, 16384), (512, 1024, 2048, 4096, 8192)),
    **dict.fromkeys(("gemma-3-4b", *MORE_HEADS), SOME),
}


def peers_of_a_head() -> dict[str, Callable]:
    peers = {name: loss for name, loss in linear_losses().items() if not name.startswith("jaxce")}
    if installed("optax"):
        import optax

        integer = optax.softmax_cross_entropy_with_integer_labels
        peers["optax, bfloat16 logits"] = lambda x, w, labels: integer(x @ w, labels).mean()
    return peers


def cases_of_a_head(problem: str) -> list[Case]:
    tokens, features, classes = ALL_HEADS[problem]
    losses = OURS | BLOCKS.get(problem, {}) | {name: (loss, HALF) for name, loss in peers_of_a_head().items()}
    return [
        Case(problem, name, gradients(loss), head(features, classes, dtype, tokens))
        for name, (loss, dtype) in losses.items()
    ]


# --- Logits ------------------------------------------------------------------------------------------------------


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


def mean_of_every_statistic(logits, labels):
    """Of those that have a derivative."""
    found = jaxce.label_statistics(logits, labels)
    return (found.log_prob + found.log_normalizer + found.entropy).mean()


def mean_of_top_k(logits, class_ids, targets):
    return jaxce.softmax_cross_entropy_with_top_k_labels(logits, class_ids, targets, tail=True).mean()


def top_k_of_a_head(x, w, class_ids, targets):
    return jaxce.linear_cross_entropy(x, w, (class_ids, targets), tail=True)


def top_k(rows: int = TOKENS, listed: int = 64) -> tuple:
    return tuple(jax.ShapeDtypeStruct((rows, listed), dtype) for dtype in (jnp.int32, jnp.float32))


def cases_of_logits(problem: str, shape: tuple[int, int] = LOGITS) -> list[Case]:
    dtype = LOGITS_DTYPES[problem]
    z, labels, class_weights, where = logits(dtype, shape)
    integer: tuple = (z, labels, class_weights, where)
    dense: tuple = (z, z)
    losses: dict[str, tuple[Callable, tuple]] = {
        "jaxce": (mean_loss, integer),
        "jaxce, every option": (mean_loss_with_every_option, integer),
        "jaxce, dense targets": (lambda z, t: jaxce.softmax_cross_entropy(z, t).mean(), dense),
        "jaxce, statistics": (mean_of_every_statistic, (z, labels)),
        "jaxce, top-k labels": (mean_of_top_k, (z, *top_k(shape[0]))),
    }
    if installed("optax"):
        import optax

        with_labels = optax.softmax_cross_entropy_with_integer_labels
        losses["optax"] = lambda z, y, *_: with_labels(z, y).mean(), integer
        losses["optax, dense targets"] = lambda z, t: optax.softmax_cross_entropy(z, t).mean(), dense
    return [Case(problem, name, jax.value_and_grad(loss), arguments) for name, (loss, arguments) in losses.items()]
