"""linear_cross_entropy and fused_linear inside `jax.shard_map`: classes over one mesh axis, rows over another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxce import fused_linear, linear_cross_entropy, softmax_cross_entropy_with_integer_labels

from ..helpers.oracle import assert_close

N, D, K = 12, 5, 24
IGNORED = -100
LABELS = jnp.array([0, 5, 12, 22, 23, 7, IGNORED, 6, 18, 17, 11, 3])


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


POINT = (normal(N, D, seed=0), normal(D, K, seed=1), normal(K, seed=2), jnp.linspace(0.5, 2, K), jnp.float32(3))
SPECS = (P("rows"), P(None, "classes"), P("classes"), P("classes"), P())
DIRECTION = tuple(normal(*v.shape, seed=5) for v in POINT)


def losses(*arguments, class_axis=-1, **options) -> Any:
    """Per row, or their sum."""
    x, w, bias, class_weights, cap, labels = arguments
    return linear_cross_entropy(
        x,
        w if class_axis == -1 else w.T,
        labels,
        bias=bias,
        class_weights=class_weights,
        logit_cap=cap,
        label_smoothing=0.1,
        z_loss=0.01,
        ignore_index=IGNORED,
        class_axis=class_axis,
        **options,
    )


def sharded(f, out_spec):
    assert len(jax.devices()) >= 8
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wrapped: Any = jax.shard_map(f, mesh=mesh, in_specs=(*SPECS, P("rows")), out_specs=out_spec, check_vma=True)
    return lambda *v: wrapped(*v, LABELS)


def assert_same_derivatives(got, wanted):
    """The value, all gradients and a tangent of two functions to a scalar."""
    every = tuple(range(len(POINT)))
    results = []
    for f in (got, wanted):
        gradients = jax.jit(jax.value_and_grad(f, every))(*POINT)
        rate = jax.jit(lambda v, t, f=f: jax.jvp(f, v, t)[1])(POINT, DIRECTION)
        results.append(jax.tree.leaves((gradients, rate)))
    for g, w in zip(*results, strict=True):
        assert np.abs(w).max() > 0
        assert_close(g, w, jnp.float32, factor=4)


@pytest.mark.parametrize("recompute", [False, True], ids=["rows", "classes"])
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_sum_over_all_shards_is_that_of_the_whole(recompute, class_axis):
    options = {"reduction": "sum", "recompute": recompute, "class_axis": class_axis}
    block = 128 if recompute else 4  # rows; 128 is more than a shard's classes

    def on_shard(*v):
        return lax.psum(losses(*v, axis_name="classes", block_size=block, **options), "rows")

    assert_same_derivatives(sharded(on_shard, P()), lambda *v: losses(*v, LABELS, **options))


def test_losses_per_row():
    combine = jnp.sin(jnp.arange(1.0, N + 1))
    f = sharded(partial(losses, axis_name="classes", reduction="none"), P("rows"))
    assert_same_derivatives(
        lambda *v: (combine * f(*v)).sum(), lambda *v: (combine * losses(*v, LABELS, reduction="none")).sum()
    )


def test_data_parallel_without_an_axis_name():
    """Rows over both mesh axes, everything else on every shard: gradients are summed as the types say."""
    mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = P(("rows", "classes"))

    def on_shard(*v):
        return lax.psum(losses(*v, reduction="sum", block_size=2), ("rows", "classes"))

    wrapped: Any = jax.shard_map(on_shard, mesh=mesh, in_specs=(rows, P(), P(), P(), P(), rows), out_specs=P())
    assert_same_derivatives(lambda *v: wrapped(*v, LABELS), lambda *v: losses(*v, LABELS, reduction="sum"))


@pytest.mark.parametrize("closed_over", [False, True])
def test_fused_linear_of_a_loss_that_sums_over_shards(closed_over):
    """Row arguments are the same on every shard of the classes: their gradient must not be summed over them twice."""
    scale, labels = jnp.linspace(1, 2, N), jnp.abs(LABELS) % K

    def of(*arguments):
        x, w, scale, cap, labels, axis_name = arguments

        def loss(logits, scale, caps, labels):
            caps = cap if closed_over else caps[:, None]
            losses = softmax_cross_entropy_with_integer_labels(logits / caps, labels, axis_name=axis_name)
            return scale * losses

        caps = jnp.broadcast_to(cap, scale.shape)
        return fused_linear(loss, reduction="sum", block_size=4)(x, w, scale, caps, labels)

    def on_shard(*v):
        return lax.psum(of(*v, "classes"), "rows")

    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (P("rows"), P(None, "classes"), P("rows"), P(), P("rows"))
    wrapped: Any = jax.shard_map(on_shard, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
    point = (POINT[0], POINT[1], scale, jnp.float32(1.5))
    if closed_over:  # one number for all rows, whose gradient would be summed over their shards too early
        with pytest.raises(ValueError, match="loss_fn is closing over float32.*wanted it as a row arg"):
            jax.grad(lambda *v: wrapped(*v, labels), 3)(*point)
        return
    got = jax.jit(jax.grad(lambda *v: wrapped(*v, labels), (0, 1, 2, 3)))(*point)
    wanted = jax.jit(jax.grad(lambda *v: of(*v, labels, None), (0, 1, 2, 3)))(*point)
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w, jnp.float32, factor=4)
