"""Sharded: what is exchanged over classes, other layouts of x and w, statistics, every mode, uneven shards."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce

from ..collectives import collectives
from ..helpers import (
    LOSSES,
    MODES,
    SKIPS,
    assert_all_close,
    assert_close,
    cases,
    compiled,
    head,
    integer_loss,
    logits,
    mesh_of,
    on_shards,
    placed,
    temp_bytes,
    text_of,
)

N, D, K = 20, 12, 134  # 5 rows and 67 classes on each of 4 × 2 devices
WORLDS = ("jit", "Explicit", "shard_map")
each_world = pytest.mark.parametrize("world", WORLDS)


def mesh(axis_type: AxisType = AxisType.Auto):
    return mesh_of((4, 2), ("data", "model"), axis_type)


def in_world(world: str, f, arrays: tuple, specs: tuple):
    """`f(*arrays, axis_name=…)`, a number for each row, as a function of the arrays; and the arrays, placed."""
    devices = mesh(AxisType.Explicit if world == "Explicit" else AxisType.Auto)
    arrays = placed(devices, arrays, specs)
    if world != "shard_map":
        return partial(f, axis_name=None), arrays
    return on_shards(partial(f, axis_name="model"), devices, specs, P("data")), arrays


@each_world
def test_three_numbers_per_row_are_summed_over_classes_and_none_for_the_gradient(world):
    x, w, labels = head(N, D, K)

    def loss(z, labels, axis_name):
        return integer_loss(z, labels, axis_name=axis_name)

    f, arguments = in_world(world, loss, (x @ w, labels), (P("data", "model"), P("data")))
    for function in (f, lambda *v: jax.vjp(lambda z: f(z, v[1]), v[0])[1](v[1].astype(jnp.float32))):
        exchanges = collectives(text_of(function, *arguments))
        assert exchanges and {c.operation for c in exchanges} == {"all-reduce"}
        assert sum(c.numbers for c in exchanges) <= 3 * N // 4


LAYOUTS = {
    "batch and sequence": (P("data", "model", None), P()),
    "batch and classes": (P("data", None, None), P(None, "model")),
    "batch over both": (P(("data", "model"), None, None), P()),
    "FSDP over both": (P(("data", "model"), None, None), P(("data", "model"), None)),
}
TIED = ("batch and classes", "batch over both")  # w is [K, D]
AXIS_TYPES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
QUICK_LAYOUTS = {
    ("batch and sequence", "rows", "Auto"),
    ("batch and classes", "rows", "Explicit"),
    ("batch over both", "classes", "Auto"),
    ("FSDP over both", "classes", "Explicit"),
}


@pytest.mark.parametrize(
    "layout, blocked, axis_type", cases(LAYOUTS, ("rows", "classes"), AXIS_TYPES, quick=QUICK_LAYOUTS)
)
def test_other_layouts(layout, blocked, axis_type):
    """Leading axes, and tied embeddings."""
    x, w, labels = head((24, 6), D, K)
    x, w = jnp.concatenate([x, x], -1)[..., :16], jnp.concatenate([w, w])[:16]
    x_spec, w_spec = LAYOUTS[layout]
    class_axis, recompute = 0 if layout in TIED else -1, blocked == "classes"

    def loss(x, w, labels):
        options = {"class_axis": class_axis, "recompute": recompute, "block_size": 128 if recompute else 2}
        return jaxce.linear_cross_entropy(x, w, labels, **options)

    if class_axis == 0:
        w, w_spec = w.T, P(*reversed((*w_spec, None, None)[:2]))
    specs = (x_spec, w_spec, P(*x_spec[:2]))
    gradient = jax.value_and_grad(loss, (0, 1))
    wanted = jax.jit(gradient)(x, w, labels)
    arguments = placed(mesh(AXIS_TYPES[axis_type]), (x, w, labels), specs)
    executable = compiled(gradient, *arguments)
    assert all(np.abs(truth).max() > 0 for truth in jax.tree.leaves(wanted))
    assert_all_close(executable(*arguments), wanted, factor=4)
    exchanges = collectives(executable.as_text() or "")
    gathers = [c.numbers for c in exchanges if c.operation != "all-reduce"]
    assert gathers == ([w.size] if layout == "FSDP over both" else []), exchanges
    summed = sum(c.numbers for c in exchanges if c.operation == "all-reduce")
    rows, blocks = labels.size // 4, 4
    dx = blocks * rows * w.size // K if "classes" in layout else 0
    # Sums of the parts of a second axis would be more than one for each device: they are added up in each of 9 blocks.
    dw = 19 * w.size if layout == "batch and sequence" and not recompute else w.size
    assert w.size // 2 < summed <= dw + dx + 20 * blocks * rows, exchanges


@each_world
def test_label_statistics(world):
    x, w, labels = head(N, D, K)
    labels = labels.at[::2].set((x @ w).argmax(-1)[::2])
    names = jaxce.LabelStatistics._fields

    def statistics(z, labels, axis_name):
        return jnp.stack([s.astype("float32") for s in jaxce.label_statistics(z, labels, axis_name=axis_name)], -1)

    f, (placed_logits, placed_labels) = in_world(world, statistics, (x @ w, labels), (P("data", "model"), P("data")))
    wanted, pull = jax.vjp(lambda z: statistics(z, labels, None), x @ w)
    got = jax.jit(f)(placed_logits, placed_labels)
    assert 0 < wanted[:, names.index("correct")].sum() < N
    assert_close(got, wanted, "float32", factor=4)
    for i in range(3):
        g = jnp.zeros_like(wanted).at[:, i].set(1)
        gradient = jax.jit(jax.grad(lambda z, g=g: jnp.sum(g * f(z, placed_labels))))(placed_logits)
        assert_close(gradient, pull(g)[0], "float32", factor=4)


QUICK_MODES = {("jit", "rows"), ("Explicit", "classes"), ("shard_map", "logits")}


@pytest.mark.parametrize("world, form", cases(WORLDS, ("rows", "classes", "logits"), quick=QUICK_MODES))
def test_every_mode(world, form):
    """Forward mode, both second-order compositions and vmap, of a number per row."""
    x, w, labels = head(N, D, K)
    combine = jnp.sin(jnp.arange(1.0, N + 1))

    def losses(x, w, labels, axis_name):
        if form == "logits":
            return integer_loss(x @ w, labels, axis_name=axis_name)
        reduction = {"recompute": True, "reduction": "none"}
        if form == "rows":
            mean = jaxce.fused_linear(partial(row_loss, axis_name=axis_name), reduction="none", block_size=1)
            return mean(x, w, labels)
        return jaxce.linear_cross_entropy(x, w, labels, axis_name=axis_name, **reduction)

    def row_loss(logits, labels, axis_name):
        return integer_loss(logits, labels, axis_name=axis_name)

    specs = (P("data", None), P(None, "model"), P("data"))
    f, arguments = in_world(world, losses, (x, w, labels), specs)

    def modes(f: Any, x, w, labels):
        def total(w):
            return jnp.sum(combine * f(x, w, labels))

        numbers = ("jvp of grad", "grad of grad", "vmap of grad")
        return {name: MODES[name](total, w, w) for name in numbers} | {
            "jvp": MODES["jvp"](lambda v: f(*v, labels), (x, w), (x, w)),
            "vmap": MODES["vmap"](lambda x: f(x, w, labels), x, x),
        }

    wanted = jax.jit(partial(modes, partial(losses, axis_name=None)))(x, w, labels)
    got = jax.jit(partial(modes, f))(*arguments)
    assert all(np.abs(truth).max() > 0 for truth in jax.tree.leaves(wanted))
    assert_all_close(got, wanted, factor=16)


# Those that are linear in the losses: shards of the rows are added up.
IN_BODY = ("value_and_grad", "jvp of grad", "grad of slope", "vmap of grad")


@pytest.mark.parametrize("form", ["logits", "rows", "classes"])
def test_modes_inside_shard_map(form):
    """Differentiated, and mapped, by shard_map's body itself: each shard's part of a gradient, summed where asked."""
    x, w, labels = head(N, D, K)

    def total(w, x, labels, axis_name):
        if form == "logits":
            return integer_loss(x @ w, labels, axis_name=axis_name).sum()
        options: Any = {"recompute": form == "classes", "reduction": "sum"}
        return jaxce.linear_cross_entropy(x, w, labels, axis_name=axis_name, **options)

    def modes(x, w, labels, axis_name):
        f = partial(total, x=x, labels=labels, axis_name=axis_name)
        everything: Any = {name: MODES[name](f, w, w) for name in IN_BODY}
        everything["value_and_grad"] = everything["value_and_grad"][1]  # the value is not split, as gradients are
        return everything if axis_name is None else lax.psum(everything, "data")

    def on_shard(x, w, labels):
        w = w + 0 * x[0, 0]  # this shard's own, or its gradient would be the sum of all shards'
        return modes(x, w, labels, "model")

    specs = (P("data"), P(None, "model"), P("data"))
    outputs = {name: P(None, None, "model") if "vmap" in name else P(None, "model") for name in IN_BODY}
    mapped = on_shards(on_shard, mesh(), specs, outputs)
    wanted, got = jax.jit(partial(modes, axis_name=None))(x, w, labels), jax.jit(mapped)(x, w, labels)
    assert all(np.abs(truth).max() > 0 for truth in jax.tree.leaves(wanted))
    assert_all_close(got, wanted, factor=16)


@pytest.mark.parametrize("form", ["logits", "rows", "classes", "statistics"])
def test_uneven_last_shard(form):
    """K is not a multiple of the shards: the classes too many are masked."""
    x, w, labels = head(N, D, K)
    classes = K - 3
    labels = labels % classes
    real = jnp.arange(K) < classes

    def total(x, w, labels, real, axis_name):
        if form == "logits":
            where = jnp.broadcast_to(real[None], (x.shape[0], real.size))
            options: Any = {"label_smoothing": 0.1, "z_loss": 0.01, "axis_name": axis_name}
            return integer_loss(x @ w, labels, where=where, **options)
        options = {"class_mask": real, "axis_name": axis_name}
        if form == "statistics":
            found = jaxce.linear_label_statistics(x, w, labels, **options)
            return found.log_prob + found.entropy + found.log_normalizer
        options |= {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum", "recompute": form == "classes"}
        return jaxce.linear_cross_entropy(x, w, labels, **options)[None]

    def on_shard(x, w, labels, real):
        return lax.psum(total(x, w, labels, real, "model").sum(), "data")

    specs = (P("data"), P(None, "model"), P("data"), P("model"))
    mapped = on_shards(on_shard, mesh(), specs, P())
    got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(x, w, labels, real)
    wanted = jax.value_and_grad(lambda x, w: total(x, w, labels, real[:classes], None).sum(), (0, 1))(x, w[:, :classes])
    assert (got[1][1][:, classes:] == 0).all()
    got = (got[0], (got[1][0], got[1][1][:, :classes]))
    assert all(np.abs(truth).max() > 0 for truth in jax.tree.leaves(wanted))
    assert_all_close(got, wanted, factor=4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_blocks_of_few_rows_of_each_device(reduction):
    """5 rows of each part in 4 blocks would be 2 each, and none for the last: there are 3."""
    x, w, labels = head((10, 2), D, K)
    options: dict[str, Any] = {"recompute": False, "block_size": 3, "reduction": reduction}

    def loss(x, w, labels):
        return (jnp.sin(labels) * jaxce.linear_cross_entropy(x, w, labels, **options)).sum()

    gradient = jax.value_and_grad(loss, (0, 1))
    arguments = placed(mesh_of((2,), ("data",), AxisType.Auto), (x, w, labels), (P("data"), P(), P("data")))
    assert_all_close(compiled(gradient, *arguments)(*arguments), gradient(x, w, labels), factor=4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("form", ["rows", "classes", "any loss"])
def test_a_device_without_a_row_that_counts(form, axis_type):
    """Its rows are padding, with NaN in x and labels that are no class."""
    x, w, labels = head(N, D, K)
    kept, f = jnp.arange(N) < 7, partial(jaxce.linear_cross_entropy, recompute=form == "classes")
    if form == "any loss":
        f = jaxce.fused_linear(integer_loss)
    gradient = jax.value_and_grad(lambda x, w, labels, kept: f(x, w, labels, where=kept), (0, 1))
    wanted, (wanted_dx, wanted_dw) = gradient(x[:7], w, labels[:7], kept[:7])
    padded = jnp.where(kept[:, None], x, jnp.nan), w, jnp.where(kept, labels, -1), kept
    specs = P("data"), P(), P("data"), P("data")
    got, (dx, dw) = jax.jit(gradient)(*placed(mesh(axis_type), padded, specs))
    dx = np.asarray(dx)
    assert_all_close((got, dx[:7], dw), (wanted, wanted_dx, wanted_dw), factor=4)
    assert (dx[7:] == 0).all()


OF_ROWS = {
    "classes": partial(jaxce.linear_cross_entropy, recompute=True, logit_cap=2.0),
    "statistics": lambda *a, **o: sum(a.sum() for a in jaxce.linear_label_statistics(*a, **o)[:3]),
}
LIKELY = jnp.zeros(K).at[3].set(100.0)  # its exp is inf


@pytest.mark.parametrize("form, axis_type", [("classes", AxisType.Auto), ("statistics", AxisType.Explicit)])
def test_each_device_computes_its_own_rows_that_count(form, axis_type):
    """0, 3, 6 and 7 of 21 on each device: 7 of each, 5/16, are computed. No rows of x are exchanged."""
    x, w, labels = head((21, 4), D, K)  # time first
    kept = (jnp.arange(21)[:, None] * 8 % 21) < jnp.array([[0, 3, 6, 7]])

    def loss(x, w, labels, kept):
        return OF_ROWS[form](x, w, labels, where=kept, bias=LIKELY)

    gradient = jax.value_and_grad(loss, (0, 1))
    wanted, (wanted_dx, wanted_dw) = gradient(x[kept], w, labels[kept], kept[kept])
    padded = jnp.where(kept[..., None], x, jnp.nan), w, jnp.where(kept, labels, -1), kept
    arguments = placed(mesh(axis_type), padded, (P(None, "data"), P(), P(None, "data"), P(None, "data")))
    executable = compiled(gradient, *arguments)
    got, (dx, dw) = executable(*arguments)
    dx = np.asarray(dx)
    assert_all_close((got, dx[kept], dw), (wanted, wanted_dx, wanted_dw), factor=4)
    assert (dx[~kept] == 0).all()
    text = executable.as_text()
    assert not [c for c in collectives(text) if c.operation != "all-reduce"]
    assert not SKIPS or re.search(rf"f32\[7,{K}\]\S* dot\(", text)


def test_no_device_waits_for_one_without_a_row_that_counts():
    """A loss that communicates over the axis of the rows."""
    x, w, labels = head(N, D, K)

    def loss(z, labels):
        losses = integer_loss(z, labels)
        return losses * (1 + 0 * lax.psum(losses.sum(), "data"))

    def on_shard(x, w, labels, kept):
        total = jaxce.fused_linear(loss, reduction="sum", block_size=2)(x, w, labels, where=kept)
        return lax.psum(total, "data")

    kept, specs = jnp.arange(N) < 7, (P("data"), P(), P("data"), P("data"))
    f = on_shards(on_shard, mesh_of((4,), ("data",)), specs, P())
    got = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w, labels, kept)
    plain = jax.value_and_grad(lambda x, w, labels, kept: integer_loss(x @ w, labels).sum(where=kept), (0, 1))
    assert_all_close(got, plain(x, w, labels, kept), factor=4)


def test_any_loss_on_an_explicit_mesh():
    """With row arguments, aux and losses per row, which are typed as the rows of x are."""
    x, w, labels = head(N, D, K)

    def loss(logits, labels, scale):
        losses = integer_loss(logits, labels)
        return scale * losses**2, {"best": logits.argmax(-1), "first": logits[:, :2]}

    scale = jnp.linspace(1, 2, N)
    specs = (P("data", None), P(None, "model"), P("data"), P("data"))
    arrays = (x, w, labels, scale)
    arguments = placed(mesh(AxisType.Explicit), arrays, specs)
    for reduction in ("mean", "none"):
        fused = jaxce.fused_linear(loss, has_aux=True, block_size=1, reduction=reduction)

        def total(*v, fused=fused):
            losses, aux = fused(*v)
            return losses.sum(), (losses, aux)

        f: Any = jax.jit(jax.value_and_grad(total, (0, 1, 3), has_aux=True))
        got, wanted = f(*arguments), f(*arrays)
        for g, truth in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert np.abs(truth).max() > 0
            if g.dtype == jnp.int32:
                np.testing.assert_array_equal(g, truth)
            else:
                assert_close(g, truth, "float32", factor=4)
        (_, (losses, aux)), gradients = got
        typed = [jax.typeof(a).sharding.spec for a in (aux["best"], aux["first"], *gradients)]
        assert typed == [P("data"), P("data", None), specs[0], specs[1], specs[3]]
        assert jax.typeof(losses).sharding.spec == (P() if reduction == "mean" else P("data"))


def test_a_loss_cannot_close_over_arrays_of_an_explicit_mesh():
    """It sees Auto axes; row arguments are converted, what is closed over cannot be."""
    specs = (P("data", None), P(None, "model"), P("data"), P("model"))
    x, w, labels, scale = placed(mesh(AxisType.Explicit), (*head(N, D, K), logits(K)), specs)
    loss = jaxce.fused_linear(lambda z, y: integer_loss(z * scale[None], y))
    with pytest.raises(ValueError, match="mesh"):
        jax.jit(loss)(x, w, labels)


def test_types_keep_the_sum_of_dw_a_shard_in_size():
    """Plain jit cannot see which devices split what, and keeps a sum for each device, here all of them on each."""
    x, w = logits(64, 64), jnp.zeros((64, 2**15))
    temp = {}
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        arguments = placed(mesh_of((8,), ("model",), axis_type), (x, w), (P(), P(None, "model")))
        loss = partial(jaxce.linear_cross_entropy, labels=jnp.zeros(64, jnp.int32), block_size=1)
        temp[axis_type] = temp_bytes(jax.grad(loss, 1), *arguments)
    assert temp[AxisType.Explicit] <= 2.5 * w.nbytes // 8 < w.nbytes <= temp[AxisType.Auto] <= 2.5 * w.nbytes, temp


@pytest.mark.parametrize("form", ["integer", "dense"])
@pytest.mark.parametrize("axis", [(1, 2), (2, 1), None])
@pytest.mark.parametrize("spec", [P("data", None, "model"), P(None, "data", "model"), P("data", "model", None)])
def test_several_class_axes_of_an_explicit_mesh(spec, axis, form):
    z, targets = logits(4, 4, 6), jnp.abs(logits(4, 4, 6, seed=1))
    specs = (spec, spec)
    if form == "integer":
        shape, row_spec = ((), P()) if axis is None else ((4,), P(spec[0]))
        targets, specs = jnp.full(shape, 17), (spec, row_spec)
    loss = partial(LOSSES[form], axis=axis)
    f = jax.value_and_grad(lambda z, targets: loss(z, targets).sum())
    arguments = placed(mesh(AxisType.Explicit), (z, targets), specs)
    got, wanted = jax.jit(f)(*arguments), f(z, targets)
    assert_all_close(got, wanted, factor=4)
    assert jax.typeof(got[1]).sharding.spec == spec
