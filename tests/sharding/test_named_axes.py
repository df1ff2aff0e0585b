"""A class axis split by name, in each world that has names, beside the naive formula written with pmax and psum.

In the same place the two have the same value and derivatives: each shard's own with respect to its own copies, whether
JAX differentiates outside or inside of the map, and whether types track which shards differ or not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers import MODES, assert_all_close, cases, direction_at, logits, mesh_of, option_values, probabilities

SHARDS, N, D, K = 4, 3, 5, 6  # K on each shard
LABELS = jnp.array([0, 13, 22])
IDS = jnp.array([[0, 13, 1, 0], [7, 22, 23, 8], [5, 4, 3, 2]], jnp.int32)  # on two shards, on three, on one
NUMBERS = tuple(name for name in option_values(K) if name != "class_weights")


def in_shard_map(check_vma: bool, f):
    def on_shard(v):
        return jax.tree.map(lambda a: a[None], f(jax.tree.map(lambda a: a[0], v)))

    split = P("classes")
    mesh = mesh_of((SHARDS,), ("classes",))
    return jax.shard_map(on_shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma)


# Each maps a function of a shard's arrays to one of arrays stacked over the shards.
WORLDS = {
    "checked shard_map": partial(in_shard_map, True),
    "unchecked shard_map": partial(in_shard_map, False),
    "pmap": lambda f: jax.pmap(f, "classes", devices=jax.devices()[:SHARDS]),
    "vmap": lambda f: jax.vmap(f, axis_name="classes"),
}


def naive(z, v, targets=None) -> dict[str, jax.Array]:
    """The numbers of each row that jaxce computes, of logits of which each shard has a part."""
    z = v["logit_cap"] * jnp.tanh(z / v["logit_cap"])
    m = lax.pmax(lax.stop_gradient(z.max(-1, keepdims=True)), "classes")
    lse = m + jnp.log(lax.psum(jnp.exp(z - m).sum(-1, keepdims=True), "classes"))
    log_o, smoothing, weights = z - lse, v["label_smoothing"], v["class_weights"][None]
    uniform = jnp.full_like(z, 1 / (SHARDS * K))
    z_loss = v["z_loss"] * lse[:, 0] ** 2

    def against(targets):
        return -lax.psum((targets * log_o).sum(-1), "classes")

    if targets is not None:
        mean = lax.psum(targets.sum(-1, keepdims=True), "classes") * uniform
        return {"dense": against(weights * ((1 - smoothing) * targets + smoothing * mean)) + z_loss}
    onehot = (LABELS[:, None] - K * lax.axis_index("classes") == jnp.arange(K)[None]).astype(z.dtype)
    integer = (1 - smoothing) * against(weights * onehot) + smoothing * against(weights * uniform) + z_loss
    entropy = against(jnp.exp(log_o))
    return {"integer": integer, "statistics": jnp.stack([-against(onehot), lse[:, 0], entropy])}


def options_of(v, *names) -> dict[str, Any]:
    return {name: v[name] for name in names or (*NUMBERS, "class_weights")} | {"axis_name": "classes"}


def integer_loss(z, v):
    return jaxce.softmax_cross_entropy_with_integer_labels(z, LABELS, **options_of(v))


def top_k_loss(z, shares, **options):
    return jaxce.softmax_cross_entropy_with_top_k_labels(z, IDS, shares, **options)


def naive_top_k(z, v, tail=False):
    """Their logits are read by one sum over shards; the targets, of which each shard has a copy, multiply it."""
    z, shares = v["logit_cap"] * jnp.tanh(z / v["logit_cap"]), v["shares"]
    m = lax.pmax(lax.stop_gradient(z.max(-1, keepdims=True)), "classes")
    e, classes = jnp.exp(z - m), K * lax.axis_index("classes") + jnp.arange(K)
    at = IDS[..., None] == jnp.expand_dims(classes, (0, 1))
    parts = e.sum(-1), jnp.where(at.any(1), 0, e).sum(-1)
    lse, lse_of_others = (m[:, 0] + jnp.log(lax.psum(part, "classes")) for part in parts)
    nll = lse[:, None] - z
    if tail:
        losses = lax.psum(jnp.where(at, nll[:, None], 0).sum(-1), "classes")
        return (shares * losses).sum(-1) + (1 - shares.sum(-1)) * (lse - lse_of_others) + v["z_loss"] * lse**2
    nll = v["class_weights"][None] * nll
    losses, uniform = lax.psum((jnp.where(at, nll[:, None], 0).sum(-1), nll.sum(-1) / (SHARDS * K)), "classes")
    smoothing = v["label_smoothing"]
    return (1 - smoothing) * (shares * losses).sum(-1) + smoothing * shares.sum(-1) * uniform + v["z_loss"] * lse**2


def head_loss(v, **options):
    return jaxce.linear_cross_entropy(v["x"], v["w"], LABELS, bias=v["bias"], **options_of(v), **options)


def naive_head(v, reduce):
    return reduce(naive(v["x"] @ v["w"] + v["bias"][None], v)["integer"], v["weights"])


def any_loss(v, reduction, naive_loss: bool):
    """A loss that reduces over shards itself, closes over its options, and takes a floating row argument."""

    def loss(z, factor):
        return factor * (naive(z, v)["integer"] if naive_loss else integer_loss(z, v))

    fused = jaxce.fused_linear(loss, reduction=reduction, block_size=3)
    return fused(v["x"], v["w"], v["weights"], bias=v["bias"])


def mean(losses, weights):
    return (weights * losses).sum() / weights.sum()


FORMS = {  # ours, and the naive formula
    "integer": (lambda v: integer_loss(v["z"], v), lambda v: naive(v["z"], v)["integer"]),
    "dense": (
        lambda v: jaxce.softmax_cross_entropy(v["z"], v["targets"], **options_of(v)),
        lambda v: naive(v["z"], v, v["targets"])["dense"],
    ),
    "top k": (
        lambda v: top_k_loss(v["z"], v["shares"], **options_of(v)),
        lambda v: naive_top_k(v["z"], v),
    ),
    "top k, tail": (
        lambda v: top_k_loss(v["z"], v["shares"], tail=True, **options_of(v, "logit_cap", "z_loss")),
        lambda v: naive_top_k(v["z"], v, tail=True),
    ),
    "statistics": (
        lambda v: jnp.stack(jaxce.label_statistics(v["z"], LABELS, **options_of(v, "logit_cap"))[:3]),
        lambda v: naive(v["z"], v)["statistics"],
    ),
    "head by rows, mean": (
        lambda v: head_loss(v, weights=v["weights"], normalizer=v["weights"].sum(), recompute=False),
        lambda v: naive_head(v, mean),
    ),
    "head by classes, mean": (
        lambda v: head_loss(v, weights=v["weights"], normalizer=v["weights"].sum(), recompute=True),
        lambda v: naive_head(v, mean),
    ),
    "head, none": (
        lambda v: head_loss(v, weights=v["weights"], reduction="none"),
        lambda v: naive_head(v, lambda losses, weights: weights * losses),
    ),
    "statistics of a head": (
        lambda v: jnp.stack(
            jaxce.linear_label_statistics(
                v["x"], v["w"], LABELS, bias=v["bias"], logit_cap=v["logit_cap"], axis_name="classes"
            )[:3]
        ),
        lambda v: naive(v["x"] @ v["w"] + v["bias"][None], v)["statistics"],
    ),
    "any loss, sum": (
        lambda v: any_loss(v, "sum", naive_loss=True),
        lambda v: naive_head(v, lambda losses, factor: (factor * losses).sum()),
    ),
    "any loss, none": (
        lambda v: any_loss(v, "none", naive_loss=False),
        lambda v: naive_head(v, lambda losses, factor: factor * losses),
    ),
}


def point(form: str) -> dict[str, jax.Array]:
    """The arrays of all shards, stacked; those that shards share are equal."""
    values = option_values(SHARDS * K)
    weights = np.split(np.asarray(values.pop("class_weights")), SHARDS)
    shared: dict[str, Any] = {name: np.float32(value) for name, value in values.items()}
    own: dict[str, Any] = {"class_weights": weights}
    if form in ("integer", "dense", "statistics", "top k", "top k, tail"):
        own["z"] = logits(SHARDS, N, K)
        own |= {"targets": jnp.moveaxis(probabilities(N, SHARDS, K), 1, 0)} if form == "dense" else {}
    else:
        own |= {"w": logits(SHARDS, D, K) / D**0.5, "bias": logits(SHARDS, K, seed=3)}
        shared |= {"x": logits(N, D, seed=4), "weights": np.array([0.5, 2, 1], np.float32)}
    if form.startswith("top k"):
        shared["shares"] = 0.9 * np.asarray(probabilities(N, 4))
    if form == "top k, tail":
        shared, own = {name: shared[name] for name in ("logit_cap", "z_loss", "shares")}, {"z": own["z"]}
    if form == "statistics":
        shared, own = {"logit_cap": shared["logit_cap"]}, {"z": own["z"]}
    if form == "statistics of a head":
        shared, own = {name: shared[name] for name in ("logit_cap", "x")}, {name: own[name] for name in ("w", "bias")}
    shared = {name: np.stack([value] * SHARDS) for name, value in shared.items()}
    return jax.tree.map(jnp.asarray, {name: np.stack(value) for name, value in own.items()} | shared)


IN_MODES = ("jvp", "vjp", "jvp of grad", "grad of jvp", "grad of slope", "vmap of grad")
PLACES = ("outside", "inside")
UNUSED = {"label_smoothing": 0.0, "z_loss": 0.0, "class_weights": jnp.ones(K)}
# All forms outside where types tell most, and inside where they tell least; some of them there in other ways, too.
SOME = ("integer", "dense", "top k, tail", "head by rows, mean", "head, none", "any loss, none")
QUICK = {(w, form, "outside", "vjp") for w in ("checked shard_map", "vmap") for form in FORMS}
QUICK |= {("unchecked shard_map", form, "inside", "vjp") for form in FORMS}
QUICK -= {(w, "statistics of a head", place, "vjp") for w in WORLDS if w != "vmap" for place in PLACES}
QUICK |= {("unchecked shard_map", form, *way) for form in SOME for way in (("inside", "jvp"), ("outside", "vjp"))}
QUICK |= {("pmap", form, "outside", "vjp") for form in ("integer", "head by rows, mean")}  # an unchecked shard_map


@pytest.mark.parametrize("world, form, place, mode", cases(WORLDS, FORMS, PLACES, IN_MODES, quick=QUICK))
def test_is_the_naive_formula_in_every_world(world, form, place, mode):
    mapped, run, v = WORLDS[world], MODES[mode], point(form)
    s = direction_at(v)
    results = []
    for f in FORMS[form]:
        f = partial(lambda f, v: f(UNUSED | v), f)
        if place == "outside":
            results.append(jax.jit(partial(run, mapped(f)))(v, s))
        else:
            results.append(jax.jit(mapped(lambda vs, f=f: run(f, *vs)))((v, s)))
    assert all(np.asarray(truth).any() for truth in jax.tree.leaves(results[1]))
    assert_all_close(*results, factor=32)
