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

from ..helpers import assert_all_close, direction_at, logits, mesh_of, on_shards, option_values

N, D, K = 12, 5, 24
IGNORED = -100
LABELS = jnp.array([0, 5, 12, 22, 23, 7, IGNORED, 6, 18, 17, 11, 3])


VALUES = option_values(K)
POINT = (
    logits(N, D),
    logits(D, K, seed=1),
    logits(K, seed=2),
    VALUES["class_weights"],
    jnp.float32(VALUES["logit_cap"]),
)
SPECS = (P("rows"), P(None, "classes"), P("classes"), P("classes"), P())
DIRECTION = direction_at(POINT)
KEY = jax.random.key(3)


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
        label_smoothing=VALUES["label_smoothing"],
        z_loss=VALUES["z_loss"],
        ignore_index=IGNORED,
        class_axis=class_axis,
        **options,
    )


def sharded(f, out_spec):
    wrapped = on_shards(f, mesh_of((2, 4), ("rows", "classes")), (*SPECS, P("rows")), out_spec)
    return lambda *v: wrapped(*v, LABELS)


def assert_same_derivatives(got, wanted):
    """The value, all gradients and a tangent of two functions to a scalar."""
    every = tuple(range(len(POINT)))
    results = []
    for f in (got, wanted):
        gradients = jax.jit(jax.value_and_grad(f, every))(*POINT)
        rate = jax.jit(lambda v, t, f=f: jax.jvp(f, v, t)[1])(POINT, DIRECTION)
        results.append(jax.tree.leaves((gradients, rate)))
    assert all(np.abs(w).max() > 0 for w in results[1])
    assert_all_close(*results, factor=4)


@pytest.mark.parametrize("recompute, class_axis", [(False, -1), (True, 0)])
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
    rows = P(("rows", "classes"))

    def on_shard(*v):
        return lax.psum(losses(*v, reduction="sum", block_size=2), ("rows", "classes"))

    wrapped = on_shards(on_shard, mesh_of((2, 2), ("rows", "classes")), (rows, P(), P(), P(), P(), rows), P())
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

    specs = (P("rows"), P(None, "classes"), P("rows"), P(), P("rows"))
    wrapped = on_shards(on_shard, mesh_of((2, 4), ("rows", "classes")), specs, P())
    point = (POINT[0], POINT[1], scale, jnp.float32(1.5))
    if closed_over:  # one number for all rows, whose gradient would be summed over their shards too early
        with pytest.raises(ValueError, match="loss_fn is closing over float32.*wanted it as a row arg"):
            jax.grad(lambda *v: wrapped(*v, labels), 3)(*point)
        return
    got = jax.jit(jax.grad(lambda *v: wrapped(*v, labels), (0, 1, 2, 3)))(*point)
    wanted = jax.jit(jax.grad(lambda *v: of(*v, labels, None), (0, 1, 2, 3)))(*point)
    assert_all_close(got, wanted, factor=4)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("spec", [P("rows"), P()])
def test_row_arguments_without_arithmetic(spec, reduction):
    """Typed keys and integers of 4 bits, by row or closed over: JAX does not add them up."""
    x, w = logits(N, D), logits(D, 7)
    rows = jax.random.split(jax.random.key(1), N), jnp.arange(N).astype(jnp.int4) % 7

    def noisy(z, keys, y):
        noise = jax.vmap(lambda k: jax.random.normal(k, (7,)))(keys) + jax.random.normal(KEY, (1, 7))
        return softmax_cross_entropy_with_integer_labels(z + noise, y)

    def loss(x, w, *rows):
        total = fused_linear(noisy, reduction=reduction)(x, w, *rows).sum()
        return lax.psum(total, "rows") if spec == P("rows") else total

    gradients = jax.value_and_grad(loss, (0, 1))
    got = jax.jit(on_shards(gradients, mesh_of((2,), ("rows",)), (spec, P(), spec, spec), (P(), (spec, P()))))
    wanted = jax.jit(jax.value_and_grad(lambda x, w: noisy(x @ w, *rows).sum(), (0, 1)))(x, w)
    assert_all_close(got(x, w, *rows), wanted, tolerance=3e-6)
