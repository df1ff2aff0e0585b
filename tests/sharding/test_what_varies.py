"""Every combination of arguments that differ between the shards of checked `jax.shard_map`, the others being the same.

Gradients of what shards share are added up once, and only once; of what differs, each shard has its own.
"""

import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers import (
    assert_all_close,
    direction_at,
    head,
    logits,
    mesh_of,
    named,
    on_shards,
    option_values,
    probabilities,
)

SHARDS, N, D, K = 2, 4, 3, 5
X, W, LABELS = head(N, D, K)
WEIGHTS = jnp.array([0.5, 1, 2, 1.5])
MASK = jnp.arange(K)[None] % 4 != 1
VALUES: dict[str, Any] = jax.tree.map(jnp.float32, option_values(K))
HEAD = {"x": X, "w": W, "bias": logits(K, seed=2), "weights": WEIGHTS}
ANY = HEAD | {"factor": jnp.array([1, 2, 0.5, 0.7])}


def any_loss(reduction, **v):
    scale = v.get("scale", jnp.ones(K))  # closed over

    def loss(z, factor):
        return factor * jax.nn.logsumexp(z * scale[None], -1)

    fused = jaxce.fused_linear(loss, reduction=reduction, block_size=2)
    return fused(v["x"], v["w"], v["factor"], bias=v["bias"], weights=v["weights"])


FUNCTIONS: dict[str, tuple[Any, dict[str, Any]]] = {  # and their arguments
    "integer": (jaxce.softmax_cross_entropy_with_integer_labels, {"logits": X @ W, "labels": LABELS} | VALUES),
    "dense": (jaxce.softmax_cross_entropy, {"logits": X @ W, "labels": probabilities(N, K), "where": MASK} | VALUES),
    "statistics": (
        lambda **v: jnp.stack(jaxce.label_statistics(**v)[:3]),
        {"logits": X @ W, "labels": LABELS, "logit_cap": VALUES["logit_cap"]},
    ),
}
for blocks, reduction in (("rows", "mean"), ("classes", "mean"), ("classes", "none")):
    options: dict[str, Any] = {"recompute": blocks == "classes", "reduction": reduction}
    head_loss = partial(jaxce.linear_cross_entropy, **options)
    FUNCTIONS[f"head by {blocks}, {reduction}"] = (head_loss, HEAD | {"labels": LABELS} | VALUES)
for reduction in ("mean", "sum", "none"):
    FUNCTIONS[f"any loss, {reduction}"] = (partial(any_loss, reduction), ANY)
CLOSED_OVER = "a loss that closes over what varies"
FUNCTIONS[CLOSED_OVER] = (partial(any_loss, "sum"), ANY | {"scale": jnp.linspace(1, 2, K)})


def combinations(names, sizes):
    return [c for size in sizes for c in itertools.combinations(names, size)]


CASES: list[tuple] = []
QUICK: set[tuple] = set()
for function, (_, arguments) in FUNCTIONS.items():
    every = combinations(arguments, range(1, len(arguments) + 1))
    if function == CLOSED_OVER:  # one that shards share may not be differentiated
        every = [c for c in every if "scale" in c]
    CASES += [(function, "+".join(c)) for c in every]
    if function == "any loss, mean":  # a sum too
        continue
    # Heads' losses per row try all options; other losses share what makes options vary with them.
    if function != "head by classes, none":
        arguments = dict.fromkeys(("logits", "labels", "class_weights", "x", "w", "factor"))
    singles = [c for c in every if len(c) == 1 and c[0] in arguments]
    QUICK |= {(function, "+".join(c)) for c in singles + [c for c in every if len(c) == 2 and "scale" in c]}


def versions(a):
    """One for each shard."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return jnp.stack([a, (a + 1) % K])
    return jnp.stack([a, ~a if a.dtype == jnp.bool_ else 0.8 * a])


def results(f, v, s):
    """Value, gradients and tangent of the number f(v), in the direction s of some of v."""

    def total(moving):
        return f(v | moving)

    moving = {name: v[name] for name in s}
    return *jax.value_and_grad(total)(moving), jax.jvp(total, (moving,), (s,))[1]


@functools.cache
def of_one_shard(function):  # compiled once for all its cases
    return jax.jit(partial(results, lambda v: FUNCTIONS[function][0](**v).sum()))


@pytest.mark.parametrize("function, names", named(CASES, quick=QUICK))
def test_each_combination_of_varying_arguments(function, names):
    f, arguments = FUNCTIONS[function]
    varying = names.split("+")
    v = {name: versions(a) if name in varying else a for name, a in arguments.items()}
    s = direction_at({name: a for name, a in v.items() if jnp.issubdtype(a.dtype, jnp.floating)})
    specs = {name: P("data") if name in varying else P() for name in v}

    def of_shard(v, i):
        return {name: a[i] if name in varying else a for name, a in v.items()}

    def on_shard(v):
        return lax.psum(f(**of_shard(v, 0)).sum(), "data")

    sharded = on_shards(on_shard, mesh_of((SHARDS,), ("data",)), (specs,), P())
    got = jax.jit(partial(results, sharded))(v, s)

    apart = [of_one_shard(function)(of_shard(v, i), of_shard(s, i)) for i in range(SHARDS)]
    value, gradients, tangent = jax.tree.map(lambda *a: sum(a), *apart)
    gradients |= {name: jnp.stack([g[name] for _, g, _ in apart]) for name in s if name in varying}
    assert_all_close(got, (value, gradients, tangent), factor=16)
