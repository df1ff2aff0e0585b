"""Sharded: what is exchanged over classes, other layouts of x and w, statistics, every mode, uneven shards."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

from ..collectives import collectives
from ..helpers.oracle import assert_close

N, D, K = 20, 12, 134  # 5 rows and 67 classes on each of 4 × 2 devices
WORLDS = pytest.mark.parametrize("world", ["jit", "Explicit", "shard_map"])


def mesh_of(axis_type=AxisType.Auto):
    assert len(jax.devices()) == 8
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def problem(*rows: int):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((*rows, D)), rng.standard_normal((D, K)) / D**0.5
    return jnp.asarray(x, "float32"), jnp.asarray(w, "float32"), jnp.asarray(rng.integers(K, size=rows), "int32")


def in_world(world: str, f, *arrays_and_specs):
    """`f(*arrays, axis_name=…)`, a number for each row, as a function of the arrays; and the arrays, placed."""
    mesh = mesh_of(AxisType.Explicit if world == "Explicit" else AxisType.Auto)
    arrays, specs = zip(*arrays_and_specs, strict=True)
    placed = tuple(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True))
    if world != "shard_map":
        return partial(f, axis_name=None), placed
    mapped: Any = jax.shard_map(
        partial(f, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=True
    )
    return mapped, placed


def text_of(f, *arguments) -> str:
    return jax.jit(f).lower(*arguments).compile().as_text() or ""


@WORLDS
def test_three_numbers_per_row_are_summed_over_classes_and_none_for_the_gradient(world):
    x, w, labels = problem(N)

    def loss(logits, labels, axis_name):
        return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, axis_name=axis_name)

    f, arguments = in_world(world, loss, (x @ w, P("data", "model")), (labels, P("data")))
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


@pytest.mark.parametrize(
    ("layout", "class_axis", "recompute", "axis_type"),
    [
        pytest.param(*case, marks=() if i % 5 == 0 else pytest.mark.slow)
        for i, case in enumerate(
            (layout, class_axis, recompute, axis_type)
            for layout, class_axis in zip(LAYOUTS, [-1, 0, 0, -1], strict=True)
            for recompute in (False, True)
            for axis_type in (AxisType.Auto, AxisType.Explicit)
        )
    ],
)
def test_other_layouts(layout, class_axis, recompute, axis_type):
    """Leading axes, and tied embeddings."""
    x, w, labels = problem(24, 6)
    x, w = jnp.concatenate([x, x], -1)[..., :16], jnp.concatenate([w, w])[:16]
    x_spec, w_spec = LAYOUTS[layout]

    def loss(x, w, labels):
        options = {"class_axis": class_axis, "recompute": recompute, "block_size": 128 if recompute else 2}
        return jaxce.linear_cross_entropy(x, w, labels, **options)

    if class_axis == 0:
        w, w_spec = w.T, P(*reversed((*w_spec, None, None)[:2]))
    specs = (x_spec, w_spec, P(*x_spec[:2]))
    gradient = jax.value_and_grad(loss, (0, 1))
    wanted = jax.jit(gradient)(x, w, labels)
    mesh = mesh_of(axis_type)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, w, labels), specs, strict=True)]
    executable = jax.jit(gradient).lower(*placed).compile()
    for got, truth in zip(jax.tree.leaves(executable(*placed)), jax.tree.leaves(wanted), strict=True):
        assert np.abs(truth).max() > 0
        assert_close(got, truth, "float32", factor=4)
    exchanges = collectives(executable.as_text() or "")
    gathers = [c.numbers for c in exchanges if c.operation != "all-reduce"]
    assert gathers == ([w.size] if layout == "FSDP over both" else []), exchanges
    summed = sum(c.numbers for c in exchanges if c.operation == "all-reduce")
    rows, blocks = labels.size // 4, 4
    dx = blocks * rows * w.size // K if "classes" in layout else 0
    # Sums of the parts of a second axis would be more than one for each device: they are added up in each of 9 blocks.
    dw = 19 * w.size if layout == "batch and sequence" and not recompute else w.size
    assert w.size // 2 < summed <= dw + dx + 20 * blocks * rows, exchanges


@WORLDS
def test_label_statistics(world):
    x, w, labels = problem(N)
    labels = labels.at[::2].set((x @ w).argmax(-1)[::2])
    names = jaxce.LabelStatistics._fields

    def statistics(logits, labels, axis_name):
        return jnp.stack(
            [s.astype(jnp.float32) for s in jaxce.label_statistics(logits, labels, axis_name=axis_name)], -1
        )

    f, (logits, placed_labels) = in_world(world, statistics, (x @ w, P("data", "model")), (labels, P("data")))
    wanted, pull = jax.vjp(lambda z: statistics(z, labels, None), x @ w)
    got = jax.jit(f)(logits, placed_labels)
    assert 0 < wanted[:, names.index("correct")].sum() < N
    assert_close(got, wanted, "float32", factor=4)
    for i in range(3):
        g = jnp.zeros_like(wanted).at[:, i].set(1)
        gradient = jax.jit(jax.grad(lambda z, g=g: jnp.sum(g * f(z, placed_labels))))(logits)
        assert_close(gradient, pull(g)[0], "float32", factor=4)


@pytest.mark.parametrize(
    ("world", "form"),
    [
        pytest.param(world, form, marks=() if i % 4 == 0 else pytest.mark.slow)
        for i, (world, form) in enumerate(
            itertools.product(("jit", "Explicit", "shard_map"), ("rows", "classes", "logits"))
        )
    ],
)
def test_every_mode(world, form):
    """Forward mode, both second-order compositions and vmap, of a number per row."""
    x, w, labels = problem(N)
    combine = jnp.sin(jnp.arange(1.0, N + 1))

    def losses(x, w, labels, axis_name):
        if form == "logits":
            return jaxce.softmax_cross_entropy_with_integer_labels(x @ w, labels, axis_name=axis_name)
        reduction = {"recompute": True, "reduction": "none"}
        if form == "rows":
            mean = jaxce.fused_linear(partial(row_loss, axis_name=axis_name), reduction="none", block_size=1)
            return mean(x, w, labels)
        return jaxce.linear_cross_entropy(x, w, labels, axis_name=axis_name, **reduction)

    def row_loss(logits, labels, axis_name):
        return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, axis_name=axis_name)

    specs = (P("data", None), P(None, "model"), P("data"))
    f, placed = in_world(world, losses, *zip((x, w, labels), specs, strict=True))

    def modes(f: Any, x, w, labels):
        def total(w):
            return jnp.sum(combine * f(x, w, labels))

        gradient = jax.grad(total)
        return {
            "jvp": jax.jvp(lambda x, w: f(x, w, labels), (x, w), (x, w))[1],
            "forward over reverse": jax.jvp(gradient, (w,), (w,))[1],
            "reverse over reverse": jax.grad(lambda w: (gradient(w) ** 2).sum())(w),
            "vmap": jax.vmap(lambda scale: f(scale * x, w, labels))(jnp.arange(1.0, 3)),
            "vmap of gradients": jax.vmap(lambda scale: jax.grad(lambda w: total(scale * w))(w))(jnp.arange(1.0, 3)),
        }

    wanted = jax.jit(partial(modes, partial(losses, axis_name=None)))(x, w, labels)
    got = jax.jit(partial(modes, f))(*placed)
    for mode, truth in wanted.items():
        assert np.abs(truth).max() > 0
        assert_close(got[mode], truth, "float32", factor=16)


@pytest.mark.parametrize("form", ["logits", "rows", "classes"])
def test_modes_inside_shard_map(form):
    """Differentiated, and mapped, by shard_map's body itself: each shard's part of a gradient, summed where asked."""
    x, w, labels = problem(N)

    def total(w, x, labels, axis_name):
        if form == "logits":
            return jaxce.softmax_cross_entropy_with_integer_labels(x @ w, labels, axis_name=axis_name).sum()
        options: Any = {"recompute": form == "classes", "reduction": "sum"}
        return jaxce.linear_cross_entropy(x, w, labels, axis_name=axis_name, **options)

    def modes(x, w, labels, axis_name):
        gradient: Any = jax.grad(total)
        f: Any = partial(total, x=x, labels=labels, axis_name=axis_name)
        everything = {
            "grad": gradient(w, x, labels, axis_name),
            "hessian times w": jax.jvp(lambda w: gradient(w, x, labels, axis_name), (w,), (w,))[1],
            "grad of grad": jax.grad(lambda w: (gradient(w, x, labels, axis_name) * w).sum())(w),
            "vmap": jax.vmap(lambda scale: jax.grad(lambda w: f(scale * w))(w))(jnp.arange(1.0, 3)),
        }
        return everything if axis_name is None else lax.psum(everything, "data")

    def on_shard(x, w, labels):
        w = w + 0 * x[0, 0]  # this shard's own, or its gradient would be the sum of all shards'
        return modes(x, w, labels, "model")

    specs = (P("data"), P(None, "model"), P("data"))
    outputs = {name: P(None, "model") for name in ("grad", "hessian times w", "grad of grad")}
    outputs |= {"vmap": P(None, None, "model")}
    mapped: Any = jax.shard_map(on_shard, mesh=mesh_of(), in_specs=specs, out_specs=outputs, check_vma=True)
    wanted, got = jax.jit(partial(modes, axis_name=None))(x, w, labels), jax.jit(mapped)(x, w, labels)
    for mode, truth in wanted.items():
        assert np.abs(truth).max() > 0
        assert_close(got[mode], truth, "float32", factor=16)


@pytest.mark.parametrize("form", ["logits", "rows", "classes"])
def test_uneven_last_shard(form):
    """K is not a multiple of the shards: the classes too many are masked, or have a bias of −inf."""
    x, w, labels = problem(N)
    classes = K - 3
    labels = labels % classes
    real = jnp.arange(K) < classes

    def total(x, w, labels, real, axis_name):
        if form == "logits":
            where = jnp.broadcast_to(real[None], (x.shape[0], real.size))
            options: Any = {"label_smoothing": 0.1, "z_loss": 0.01, "axis_name": axis_name}
            return jaxce.softmax_cross_entropy_with_integer_labels(x @ w, labels, where=where, **options)
        bias = jnp.where(real, 0.0, -jnp.inf)
        options = {"bias": bias, "z_loss": 0.01, "axis_name": axis_name, "reduction": "sum"}
        return jaxce.linear_cross_entropy(x, w, labels, recompute=form == "classes", **options)[None]

    def on_shard(x, w, labels, real):
        return lax.psum(total(x, w, labels, real, "model").sum(), "data")

    specs = (P("data"), P(None, "model"), P("data"), P("model"))
    mapped: Any = jax.shard_map(on_shard, mesh=mesh_of(), in_specs=specs, out_specs=P(), check_vma=True)
    got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(x, w, labels, real)
    wanted = jax.value_and_grad(lambda x, w: total(x, w, labels, real[:classes], None).sum(), (0, 1))(x, w[:, :classes])
    assert (got[1][1][:, classes:] == 0).all()
    got = (got[0], got[1][0], got[1][1][:, :classes])
    for g, truth in zip(got, jax.tree.leaves(wanted), strict=True):
        assert np.abs(truth).max() > 0
        assert_close(g, truth, "float32", factor=4)


def test_any_loss_on_an_explicit_mesh():
    """With row arguments, aux and losses per row, which are typed as the rows of x are."""
    x, w, labels = problem(N)

    def loss(logits, labels, scale):
        losses = jaxce.softmax_cross_entropy_with_integer_labels(logits, labels)
        return scale * losses**2, {"best": logits.argmax(-1), "first": logits[:, :2]}

    scale = jnp.linspace(1, 2, N)
    mesh = mesh_of(AxisType.Explicit)
    specs = (P("data", None), P(None, "model"), P("data"), P("data"))
    arrays = (x, w, labels, scale)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
    for reduction in ("mean", "none"):
        fused = jaxce.fused_linear(loss, has_aux=True, block_size=1, reduction=reduction)

        def total(*v, fused=fused):
            losses, aux = fused(*v)
            return losses.sum(), (losses, aux)

        f: Any = jax.jit(jax.value_and_grad(total, (0, 1, 3), has_aux=True))
        got, wanted = f(*placed), f(*arrays)
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


def test_types_keep_the_sum_of_dw_a_shard_in_size():
    """Plain jit cannot see which devices split what, and keeps a sum for each device, here all of them on each."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.standard_normal((64, 64)), "float32"), jnp.zeros((64, 2**15))
    temp = {}
    for axis_type in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P()), (w, P(None, "model")))]
        loss = partial(jaxce.linear_cross_entropy, labels=jnp.zeros(64, jnp.int32), block_size=1)
        memory = jax.jit(jax.grad(loss, 1)).lower(*placed).compile().memory_analysis()
        assert memory is not None
        temp[axis_type] = memory.temp_size_in_bytes
    assert temp[AxisType.Explicit] <= 2.5 * w.nbytes // 8 < w.nbytes <= temp[AxisType.Auto] <= 2.5 * w.nbytes, temp
