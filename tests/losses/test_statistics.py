"""`label_statistics`: values, analytic gradients in every mode, masks, ties; everything with classes sharded."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers.oracle import assert_close

N, K = 5, 8
LABELS = jnp.array([0, 3, 7, 2, 2])
DIFFERENTIABLE = ("log_prob", "log_normalizer", "entropy")


def logits(seed: int = 0, shape: tuple[int, ...] = (N, K), dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def naive(z, labels, where=None, logit_cap=None):
    """The definitions, for plain autodiff, rows last but one."""
    z = z if logit_cap is None else logit_cap * jnp.tanh(z / logit_cap)
    e = jnp.exp(z) if where is None else jnp.where(where, jnp.exp(z), 0)
    lse = jnp.log(e.sum(-1))
    log_o = z - lse[..., None]
    o_log_o = e / e.sum(-1, keepdims=True) * log_o
    log_prob = jnp.take_along_axis(log_o, labels[..., None], -1)[..., 0]
    seen = z if where is None else jnp.where(where, z, -jnp.inf)
    return log_prob, lse, -o_log_o.sum(-1), jnp.argmax(seen, -1) == labels


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_values_and_analytic_gradients(dtype):
    z = logits(dtype=dtype)
    exact = np.asarray(z).astype(np.float64)
    o = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    one_hot, entropy = np.eye(K)[LABELS], -(o * np.log(o)).sum(-1)
    statistics = jaxce.label_statistics(z, LABELS)
    assert isinstance(statistics, jaxce.LabelStatistics)
    assert statistics._fields == (*DIFFERENTIABLE, "correct")
    assert_close(statistics.log_prob, np.log((o * one_hot).sum(-1)), jnp.float32)
    assert_close(statistics.log_normalizer, np.log(np.exp(exact).sum(-1)), jnp.float32)
    assert_close(statistics.entropy, entropy, jnp.float32)
    assert statistics.correct.dtype == jnp.bool_
    np.testing.assert_array_equal(statistics.correct, exact.argmax(-1) == LABELS)

    rules = {"log_prob": one_hot - o, "log_normalizer": o, "entropy": -o * (np.log(o) + entropy[:, None])}
    pullback = jax.jit(lambda z, cotangents: jax.vjp(lambda z: jaxce.label_statistics(z, LABELS)[:3], z)[1](cotangents))
    for name, gradient in rules.items():
        cotangents = tuple(jnp.full(N, float(name == other)) for other in DIFFERENTIABLE)
        assert_close(pullback(z, cotangents)[0], gradient, dtype)


MODES = {
    "jvp": lambda f, z: jax.jvp(f, (z,), (logits(3, z.shape, z.dtype),))[1],
    "jacfwd": lambda f, z: jax.jacfwd(f)(z),
    "jacrev": lambda f, z: jax.jacrev(f)(z),
    "forward over reverse": lambda f, z: jax.jacfwd(jax.jacrev(f))(z),
    "reverse over forward": lambda f, z: jax.jacrev(jax.jacfwd(f))(z),
    "reverse over reverse": lambda f, z: jax.jacrev(jax.jacrev(f))(z),
    "forward over forward": lambda f, z: jax.jacfwd(jax.jacfwd(f))(z),
    "third order": lambda f, z: jax.jvp(jax.jacfwd(jax.jacrev(f)), (z,), (logits(3, z.shape, z.dtype),))[1],
    "vmap": lambda f, z: jax.vmap(jax.grad(lambda z: f(jnp.stack([z, z])).sum()))(z),
    "checkpoint": lambda f, z: jax.hessian(jax.checkpoint(lambda z: (f(z) ** 2).sum()))(z),
}


# By default every mode with a cap and a mask, and some without.
QUICK = ("jvp", "jacfwd", "jacrev", "forward over reverse")
MODE_CASES = [pytest.param("cap and mask", mode, id=f"cap and mask-{name}") for name, mode in MODES.items()]
MODE_CASES += [
    pytest.param("plain", mode, id=f"plain-{name}", marks=() if name in QUICK else pytest.mark.slow)
    for name, mode in MODES.items()
]


@pytest.mark.parametrize("variant, mode", MODE_CASES)
def test_every_mode(x64, variant, mode):
    labels = jnp.array([0, 2])
    options = {} if variant == "plain" else {"logit_cap": 2.0, "where": jnp.array([[True, False, True, True]])}
    z = logits(0, (2, 4), jnp.float64)

    def numbers(statistics, z):
        return jnp.stack(statistics(z, labels, **options)[:3], -1)

    got, wanted = (jax.jit(partial(mode, partial(numbers, f)))(z) for f in (jaxce.label_statistics, naive))
    assert np.abs(wanted).max() > 1e-2
    assert_close(got, wanted, jnp.float64, factor=4)


@pytest.mark.parametrize(
    "shape, axis, label_shape",
    [((K, N), 0, (N,)), ((2, K, 3), 1, (2, 3)), ((2, 4, 3, 2), (1, 3), (2, 3)), ((4, 3), None, ())],
)
def test_axis(shape, axis, label_shape):
    z = logits(0, shape)
    axes = tuple(range(z.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    flat = np.moveaxis(np.asarray(z), axes, range(-len(axes), 0)).reshape(*label_shape, -1)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, flat.shape[-1], label_shape), jnp.int32)
    got = jaxce.label_statistics(z, labels, axis)
    for value, wanted in zip(got, jaxce.label_statistics(jnp.asarray(flat), labels), strict=True):
        assert value.shape == label_shape
        np.testing.assert_array_equal(value, wanted)


def test_masks_and_ignored_rows():
    z = logits().at[1].set(jnp.nan)
    keep = np.array([True, False, True, True, True])
    wanted = jaxce.label_statistics(z[keep], LABELS[keep])
    mask = jnp.asarray(keep)
    selections: list[dict[str, Any]] = [{"where": mask}, {"where": mask[:, None]}, {"ignore_index": 3}]

    @jax.jit
    def statistics_and_gradient(z, options):
        def statistics(z):
            got = jaxce.label_statistics(z, LABELS, **options)
            return got[:3], got.correct

        got, pullback, correct = jax.vjp(statistics, z, has_aux=True)
        return got, correct, pullback(tuple(jnp.full(N, c) for c in (1.0, 2.0, 3.0)))[0]

    for options in selections:
        got, correct, gradient = statistics_and_gradient(z, options)
        for value, kept in zip(got, wanted[:3], strict=True):
            assert value[1] == 0
            assert_close(value[keep], kept, jnp.float32)
        assert (gradient[1] == 0).all() and (np.abs(gradient[keep]).min() > 0)
        assert not correct[1]
        np.testing.assert_array_equal(correct[keep], wanted.correct)


def test_class_mask():
    z, where = logits(), np.ones(K, bool)
    where[[1, 4]] = False
    labels = jnp.array([0, 3, 7, 2, 2])
    fewer = jnp.array([0, 2, 5, 1, 1])
    got = jaxce.label_statistics(z.at[:, 4].set(100.0).at[:, 1].set(jnp.nan), labels, where=jnp.asarray(where)[None])
    for value, wanted in zip(got, jaxce.label_statistics(z[:, where], fewer), strict=True):
        np.testing.assert_allclose(value, wanted, 2e-6)
    hidden = jaxce.label_statistics(z, labels.at[0].set(4), where=jnp.asarray(where)[None])
    assert np.isnan(hidden.log_prob[0]) and np.isfinite(hidden.log_prob[1:]).all() and not hidden.correct[0]


@pytest.mark.parametrize("logit_cap", [None, 1.0])
def test_ties_are_correct_for_the_first_as_in_argmax(logit_cap):
    rows = jnp.array([[1.0, 3, 3, 0], [3, 1, 3, 3], [0, 0, 0, 0], [-jnp.inf, 2, -jnp.inf, 2], [50, 90, 70, 1]])
    seen = rows if logit_cap is None else logit_cap * jnp.tanh(rows / logit_cap)
    for label in range(4):
        labels = jnp.full(5, label)
        np.testing.assert_array_equal(
            jaxce.label_statistics(rows, labels, logit_cap=logit_cap).correct, jnp.argmax(seen, -1) == label
        )


def test_confident_rows_keep_their_digits():
    margin = np.array([10.0, 20, 30, 40])
    z = jnp.zeros((4, 3)).at[:, 1].set(jnp.asarray(margin, jnp.float32))
    statistics = jaxce.label_statistics(z, jnp.ones(4, jnp.int32))
    rest = 2 * np.exp(-margin)
    np.testing.assert_allclose(statistics.log_prob, -np.log1p(rest), 1e-6)
    o = np.exp(-margin) / (1 + rest)
    np.testing.assert_allclose(statistics.entropy, np.log1p(rest) + 2 * o * margin, 1e-6)
    gradient = jax.grad(lambda z: jaxce.label_statistics(z, jnp.ones(4, jnp.int32)).log_prob.sum())(z)
    np.testing.assert_allclose(gradient[:, 1], rest / (1 + rest), 1e-6)


# Classes sharded over a mesh axis

FUNCTIONS = {
    "statistics": lambda z, y, **o: jnp.stack(jaxce.label_statistics(z, y, **o)[:3], -1),
    "correct": lambda z, y, **o: jaxce.label_statistics(z, y, **o).correct.astype(jnp.float32),
    "integer": jaxce.softmax_cross_entropy_with_integer_labels,
    "dense": jaxce.softmax_cross_entropy,
}
WEIGHTS = jnp.linspace(0.5, 2, 24)
CLASS_MASK = jnp.arange(24)[None] % 5 != 1
SHARDED = {  # options, and how those that are split are split
    "none": ({}, {}),
    "cap": ({"logit_cap": jnp.float32(3)}, {"logit_cap": P()}),
    "smoothing": ({"label_smoothing": jnp.float32(0.1)}, {"label_smoothing": P()}),
    "weights": ({"class_weights": WEIGHTS}, {"class_weights": P("classes")}),
    "z_loss": ({"z_loss": jnp.float32(0.01)}, {"z_loss": P()}),
    "class mask": ({"where": CLASS_MASK}, {"where": P(None, "classes")}),
    "row mask": ({"where": jnp.arange(6) != 2}, {"where": P("rows")}),
    "all": (
        {
            "logit_cap": jnp.float32(3),
            "label_smoothing": jnp.float32(0.1),
            "class_weights": WEIGHTS,
            "z_loss": jnp.float32(0.01),
            "where": CLASS_MASK,
        },
        {
            "logit_cap": P(),
            "label_smoothing": P(),
            "class_weights": P("classes"),
            "z_loss": P(),
            "where": P(None, "classes"),
        },
    ),
}


SINGLE = ("cap", "smoothing", "weights", "z_loss")  # all of them are in "all"
CASES = [(f, name) for f in ("integer", "dense") for name in SHARDED]
CASES += [("statistics", name) for name in ("none", "cap", "class mask", "row mask")]
CASES += [("correct", name) for name in ("none", "cap", "class mask")]
CASES = [pytest.param(f, name, marks=pytest.mark.slow if name in SINGLE else ()) for f, name in CASES]


@pytest.mark.parametrize("function, name", CASES)
def test_sharded_classes_are_as_unsharded(function, name):
    options, specs = SHARDED[name]
    assert len(jax.devices()) >= 8
    f = FUNCTIONS[function]
    mesh = jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    z = 2 * logits(0, (6, 24))
    labels, label_spec = jnp.array([0, 5, 12, 22, 23, 7]), P("rows")
    if function == "dense":
        labels, label_spec = jax.nn.softmax(logits(1, (6, 24))), P("rows", "classes")
    sharded = jax.shard_map(
        lambda z, y, o: f(z, y, axis_name="classes", **o),
        mesh=mesh,
        in_specs=(P("rows", "classes"), label_spec, specs),
        out_specs=P("rows"),
        check_vma=True,
    )

    def unsharded(z, y, o):
        return f(z, y, **o)

    moving = {k: v for k, v in options.items() if k != "where"}
    fixed = {k: v for k, v in options.items() if k == "where"}

    def results(f, z, moving, t):
        value, pullback = jax.vjp(lambda z, moving: f(z, labels, moving | fixed), z, moving)
        gradient = pullback(logits(4, value.shape))
        return value, gradient, jax.jvp(lambda z: f(z, labels, options), (z,), (t,))[1]

    got, wanted = (jax.jit(partial(results, f))(z, moving, logits(5, z.shape)) for f in (sharded, unsharded))
    assert_close(got[0], wanted[0], jnp.float32)
    for derivative, truth in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(wanted[1:]), strict=True):
        assert function == "correct" or np.abs(truth).max() > 0
        assert_close(derivative, truth, jnp.float32, factor=4)


def test_ties_and_invalid_labels_across_shards():
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.jit(
        jax.shard_map(
            lambda z, y: jaxce.label_statistics(z, y, axis_name="classes"),
            mesh=mesh,
            in_specs=(P(None, "classes"), P()),
            out_specs=P(),
            check_vma=True,
        )
    )
    z = jnp.zeros((3, 8)).at[0, jnp.array([2, 3, 6])].set(1).at[1, 7].set(1)
    for label in (-1, *range(8), 8, 9):
        labels = jnp.full(3, label)
        got, wanted = sharded(z, labels), jaxce.label_statistics(z, labels)
        np.testing.assert_array_equal(got.correct, wanted.correct)
        np.testing.assert_allclose(got.log_prob, wanted.log_prob, 1e-6)
        assert np.isnan(got.log_prob).all() == (label in (-1, 8, 9))
