"""The losses in the three worlds of sharding: plain jit, Explicit meshes and `jax.shard_map`.

Every value and gradient against the unsharded one, and what devices exchange against what they may, counted in the
compiled text. Local sizes are odd and blocks do not divide them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

from ..collectives import collectives
from ..helpers import assert_close, cases, compiled, head, mesh_of, on_shards, option_values, placed, probabilities

IGNORED = -100
FEATURES = 12
# The losses of logits, linear_cross_entropy by blocks of rows and of classes, linear_label_statistics; top-k labels.
FORMS = ("integer", "dense", "rows", "classes", "statistics", "top k", "top k rows", "top k classes")
WORLDS = ("jit", "Explicit", "shard_map")
SHARDINGS = {"batch": (8, 1), "class": (1, 8), "both": (4, 2), "FSDP": (4, 2)}  # devices for rows, for classes
DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    form: str
    world: str
    sharding: str
    dtype: str
    options: str

    @property
    def shards(self) -> tuple[int, int]:
        return SHARDINGS[self.sharding]

    @property
    def rows(self) -> int:
        return 5 * self.shards[0]

    @property
    def classes(self) -> int:
        """More than the 1024 of one block of classes on 8 devices, in these forms."""
        local = {1: 1157, 2: 577, 8: 145}[self.shards[1]] if self.by_classes else 67
        return local * self.shards[1]

    @property
    def class_mesh_axis(self) -> str | None:
        """Sharded parameters leave logits whole that are not their product."""
        return None if self.sharding == "FSDP" and not self.fused else "model"

    @property
    def fused(self) -> bool:
        return self.form not in ("integer", "dense", "top k")

    @property
    def by_classes(self) -> bool:
        return self.form in ("classes", "statistics", "top k classes")

    @property
    def top_k(self) -> bool:
        return self.form.startswith("top k")


def problem(case: Case) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, P]]:
    """What is differentiated, what is not, and how each is sharded."""
    rng, n, k = np.random.default_rng(1), case.rows, case.classes
    x, w, labels = (np.array(a) for a in head(n, FEATURES, k))
    point, fixed = {}, {"combine": rng.uniform(0.5, 1.5, n).astype("float32")}
    if case.fused:
        point |= {"x": jnp.asarray(x, case.dtype), "w": jnp.asarray(w, case.dtype)}
    else:
        point["logits"] = jnp.asarray(x @ w, case.dtype)
    if case.form == "dense":
        point["targets"] = probabilities(n, k, dtype=case.dtype)
    if case.options == "all options":
        values = option_values(k)
        point |= {"class_weights": values["class_weights"], "cap": np.float32(values["logit_cap"])}
        if case.form == "statistics":
            del point["class_weights"]
        if case.fused:
            point["bias"] = rng.standard_normal(k).astype("float32") / 4
            fixed["class_mask"] = (rng.random(k) < 0.8) | np.isin(np.arange(k), labels)
        else:
            where = rng.random((n, k)) < 0.8
            where[np.arange(n), labels] = True
            fixed["where"] = where
        labels[3] = IGNORED if case.form != "dense" and not case.top_k else labels[3]
    if case.top_k:
        fixed["ids"] = rng.integers(0, k, (n, 4)).astype("int32")
        fixed["ids"][:, 0], fixed["ids"][::2, 1] = labels, labels[::2]
        point["shares"] = 0.9 * probabilities(n, 4)
    fixed["labels"] = labels
    model = case.class_mesh_axis
    specs = {
        "x": P("data", None),
        "w": P("data" if case.sharding == "FSDP" else None, model),
        "logits": P("data", model),
        "targets": P("data", model),
        "shares": P("data", None),
        "ids": P("data", None),
        "where": P("data", model),
        "labels": P("data"),
        "combine": P("data"),
        "bias": P(model),
        "class_weights": P(model),
        "class_mask": P(model),
        "cap": P(),
    }
    return jax.tree.map(jnp.asarray, point), jax.tree.map(jnp.asarray, fixed), specs


def loss_of(case: Case, point: dict[str, Any], fixed: dict[str, Any], axis_name: str | None = None):
    """Σ combine·loss, on one shard or all."""
    options: dict[str, Any] = {"axis_name": axis_name}
    if case.options == "all options":
        options |= {"logit_cap": point["cap"]}
        if case.fused:
            options |= {"class_mask": fixed["class_mask"], "bias": point["bias"]}
        if case.form != "statistics":
            options |= {name: option_values(1)[name] for name in ("label_smoothing", "z_loss")}
            options["class_weights"] = point["class_weights"]
        options |= {} if case.form == "dense" or case.top_k else {"ignore_index": IGNORED}
        options |= {} if case.fused else {"where": fixed["where"]}
    if case.form == "integer":
        losses = jaxce.softmax_cross_entropy_with_integer_labels(point["logits"], fixed["labels"], **options)
    elif case.form == "dense":
        losses = jaxce.softmax_cross_entropy(point["logits"], point["targets"], **options)
    elif case.form == "top k":
        shares = point["shares"]
        losses = jaxce.softmax_cross_entropy_with_top_k_labels(
            point["logits"], fixed["ids"], shares, tail=True, **options
        )
    elif case.form == "statistics":
        found = jaxce.linear_label_statistics(point["x"], point["w"], fixed["labels"], block_size=128, **options)
        losses = found.log_prob + found.entropy**2 + 0.1 * found.log_normalizer**2
    else:
        recompute, labels = case.by_classes, fixed["labels"]
        if case.top_k:
            labels, options["tail"] = (fixed["ids"], point["shares"]), True
        options |= {"recompute": recompute, "block_size": 128 if recompute else 1}
        if case.options == "plain" and axis_name is None:  # the mean
            return jaxce.linear_cross_entropy(point["x"], point["w"], labels, **options)
        if case.options == "plain":
            options["normalizer"] = case.rows
        else:
            options |= {"reduction": "sum", "weights": fixed["combine"]}
        return jaxce.linear_cross_entropy(point["x"], point["w"], labels, **options)
    return (fixed["combine"] * losses).sum()


def sharded(case: Case, mesh, specs):
    """The loss in the world of the case, as a function of (point, fixed)."""
    if case.world != "shard_map":
        return lambda point, fixed: loss_of(case, point, fixed)

    def on_shard(point, fixed):
        if case.sharding == "FSDP" and case.fused:
            point = point | {"w": lax.all_gather(point["w"], "data", axis=0, tiled=True)}
        return lax.psum(loss_of(case, point, fixed, case.class_mesh_axis), "data")

    def whole(point, fixed):
        in_specs = tuple({name: specs[name] for name in arrays} for arrays in (point, fixed))
        return on_shards(on_shard, mesh, in_specs, P())(point, fixed)

    return whole


def check(case: Case) -> None:
    point, fixed, specs = problem(case)
    wanted = jax.jit(jax.value_and_grad(lambda point: loss_of(case, point, fixed)))(point)

    axis_type = AxisType.Explicit if case.world == "Explicit" else AxisType.Auto
    mesh = mesh_of(case.shards, ("data", "model"), axis_type)
    arguments = tuple(placed(mesh, arrays, {name: specs[name] for name in arrays}) for arrays in (point, fixed))
    placements = {name: a.sharding for name, a in arguments[0].items()}
    gradient = jax.value_and_grad(sharded(case, mesh, specs))
    outputs = None if case.world == "Explicit" else (NamedSharding(mesh, P()), placements)
    executable = compiled(gradient, *arguments, out_shardings=outputs)
    loss, gradients = executable(*arguments)

    assert_close(loss, wanted[0], "float32", factor=4)
    for name, truth in wanted[1].items():
        assert np.abs(truth.astype(jnp.float32)).max() > 0
        assert_close(gradients[name], truth, truth.dtype, factor=4)
        assert gradients[name].sharding.is_equivalent_to(placements[name], truth.ndim), name
    if case.world == "Explicit":
        types = jax.eval_shape(gradient, *arguments)[1]
        assert {n: t.sharding.spec for n, t in types.items()} == {
            n: jax.typeof(a).sharding.spec for n, a in arguments[0].items()
        }
    check_exchanges(case, collectives(executable.as_text() or ""))


def check_exchanges(case: Case, exchanges) -> None:
    data, model = case.shards
    rows, classes = case.rows // data, case.classes // model
    gathers = [c for c in exchanges if c.operation == "all-gather"]
    sums = [c for c in exchanges if c.operation in ("all-reduce", "reduce-scatter")]
    assert len(gathers) + len(sums) == len(exchanges), exchanges

    small = 0 if case.options == "plain" else case.classes  # of class_weights
    large = [c for c in gathers if c.numbers > small]
    if case.sharding == "FSDP" and case.fused:
        assert 1 <= len(large) <= 2, gathers  # w's features: once forward, once backward
        assert all(c.numbers == FEATURES * classes for c in large), gathers
    else:
        assert not large, gathers

    numbers = 8 if case.options == "plain" else 40  # per row
    blocks = 3 if case.by_classes else 2  # and the rows that fill the last block
    allowed = numbers * blocks * rows + 16 + (12 * case.classes if case.options == "all options" else 0)
    allowed += blocks * rows * FEATURES if case.fused and model > 1 else 0  # dx
    allowed += FEATURES * classes if case.fused and data > 1 else 0  # dw
    assert sum(c.numbers for c in sums) <= allowed, (sums, allowed)


# Each form in each world and under each sharding, with both dtypes, plain and with all options.
QUICK = {
    ("integer", "jit", "FSDP", "bfloat16", "all options"),
    ("integer", "Explicit", "class", "bfloat16", "plain"),
    ("integer", "shard_map", "both", "float32", "plain"),
    ("dense", "jit", "both", "float32", "all options"),
    ("dense", "Explicit", "FSDP", "bfloat16", "all options"),
    ("dense", "shard_map", "class", "bfloat16", "plain"),
    ("rows", "jit", "class", "bfloat16", "all options"),
    ("rows", "Explicit", "both", "float32", "all options"),
    ("rows", "shard_map", "FSDP", "bfloat16", "all options"),
    ("classes", "jit", "batch", "float32", "plain"),
    ("classes", "jit", "FSDP", "float32", "plain"),
    ("classes", "Explicit", "class", "bfloat16", "all options"),
    ("classes", "shard_map", "both", "float32", "plain"),
    ("top k", "jit", "class", "float32", "all options"),
    ("top k", "Explicit", "both", "bfloat16", "plain"),
    ("top k", "shard_map", "both", "float32", "all options"),
    ("top k rows", "shard_map", "both", "float32", "all options"),
    ("top k rows", "jit", "batch", "bfloat16", "all options"),
    ("top k classes", "jit", "FSDP", "float32", "all options"),
    ("top k classes", "Explicit", "class", "float32", "plain"),
    ("top k classes", "shard_map", "both", "float32", "plain"),
    ("statistics", "jit", "both", "float32", "plain"),
    ("statistics", "Explicit", "class", "bfloat16", "all options"),
    ("statistics", "shard_map", "both", "float32", "plain"),
}


@pytest.mark.parametrize(
    "form, world, sharding, dtype, options",
    cases(FORMS, WORLDS, SHARDINGS, DTYPES, ("plain", "all options"), quick=QUICK),
)
def test_equals_unsharded_and_exchanges_only_sums(form, world, sharding, dtype, options):
    check(Case(form, world, sharding, dtype, options))
