"""Losses and `label_statistics` with every option inside `jax.shard_map`, the classes over a mesh axis."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers import (
    FORMS,
    LOSSES,
    OPTION_SETS,
    assert_close,
    logits,
    mesh_of,
    named,
    on_shards,
    option_values,
    probabilities,
)

FUNCTIONS = {
    "statistics": lambda z, y, **o: jnp.stack(jaxce.label_statistics(z, y, **o)[:3], -1),
    "correct": lambda z, y, **o: jaxce.label_statistics(z, y, **o).correct.astype(jnp.float32),
} | LOSSES
VALUES: dict[str, Any] = jax.tree.map(jnp.float32, option_values(24))  # traced
SPLIT = {"class_weights": P("classes")}  # the others are the same on every shard
CLASS_MASK, ROW_MASK = jnp.arange(24)[None] % 5 != 1, jnp.arange(6) != 2
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options, and how they are split
    name: ({option: VALUES[option] for option in set_}, {option: SPLIT.get(option, P()) for option in set_})
    for name, set_ in OPTION_SETS.items()
}
OPTIONS["class mask"] = {"where": CLASS_MASK}, {"where": P(None, "classes")}
OPTIONS["row mask"] = {"where": ROW_MASK}, {"where": P("rows")}
OPTIONS["all"] = OPTIONS["all"][0] | OPTIONS["class mask"][0], OPTIONS["all"][1] | OPTIONS["class mask"][1]

CASES = [(f, name) for f in FORMS for name in OPTIONS]
CASES += [("statistics", name) for name in ("none", "logit_cap", "class mask", "row mask")]
CASES += [("correct", name) for name in ("logit_cap", "class mask")]
QUICK = {(f, name) for f, name in CASES if name in ("none", "all", "class mask", "row mask")}  # the others are in "all"


@pytest.mark.parametrize("function, name", named(CASES, quick=QUICK))
def test_sharded_classes_are_as_unsharded(function, name):
    options, specs = OPTIONS[name]
    f, z = FUNCTIONS[function], 2 * logits(6, 24)
    labels, label_spec = jnp.array([0, 5, 12, 22, 23, 7]), P("rows")
    if function == "dense":
        labels, label_spec = probabilities(6, 24), P("rows", "classes")
    sharded = on_shards(
        lambda z, y, o: f(z, y, axis_name="classes", **o),
        mesh_of((2, 4), ("rows", "classes")),
        (P("rows", "classes"), label_spec, specs),
        P("rows"),
    )

    def unsharded(z, y, o):
        return f(z, y, **o)

    moving = {k: v for k, v in options.items() if k != "where"}
    fixed = {k: v for k, v in options.items() if k == "where"}

    def results(f, z, moving, t):
        value, pullback = jax.vjp(lambda z, moving: f(z, labels, moving | fixed), z, moving)
        gradient = pullback(logits(*value.shape, seed=4))
        return value, gradient, jax.jvp(lambda z: f(z, labels, options), (z,), (t,))[1]

    got, wanted = (jax.jit(partial(results, f))(z, moving, logits(*z.shape, seed=5)) for f in (sharded, unsharded))
    assert_close(got[0], wanted[0], "float32")
    for derivative, truth in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(wanted[1:]), strict=True):
        assert function == "correct" or np.abs(truth).max() > 0
        assert_close(derivative, truth, "float32", factor=4)


def test_ties_and_invalid_labels_across_shards():
    def statistics(z, y):
        return jaxce.label_statistics(z, y, axis_name="classes")

    sharded = jax.jit(on_shards(statistics, mesh_of((4,), ("classes",)), (P(None, "classes"), P()), P()))
    z = jnp.zeros((3, 8)).at[0, jnp.array([2, 3, 6])].set(1).at[1, 7].set(1)
    for label in (-1, *range(8), 8, 9):
        labels = jnp.full(3, label)
        got, wanted = sharded(z, labels), jaxce.label_statistics(z, labels)
        np.testing.assert_array_equal(got.correct, wanted.correct)
        np.testing.assert_allclose(got.log_prob, wanted.log_prob, 1e-6)
        assert np.isnan(got.log_prob).all() == (label in (-1, 8, 9))
