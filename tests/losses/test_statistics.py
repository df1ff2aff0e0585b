"""`label_statistics`: values, analytic gradients in every mode, masks, ties."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import assert_close, assert_same_in_mode, cases, exact, logits, random_labels

N, K = 5, 8
LABELS = jnp.array([0, 3, 7, 2, 2])
DIFFERENTIABLE = ("log_prob", "log_normalizer", "entropy")


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
    z = logits(N, K, dtype=dtype)
    z64 = np.asarray(z).astype(np.float64)
    o = np.exp(z64) / np.exp(z64).sum(-1, keepdims=True)
    one_hot, entropy = np.eye(K)[LABELS], -(o * np.log(o)).sum(-1)
    statistics = jaxce.label_statistics(z, LABELS)
    assert isinstance(statistics, jaxce.LabelStatistics)
    assert statistics._fields == (*DIFFERENTIABLE, "correct")
    assert_close(statistics.log_prob, np.log((o * one_hot).sum(-1)), "float32")
    assert_close(statistics.log_normalizer, np.log(np.exp(z64).sum(-1)), "float32")
    assert_close(statistics.entropy, entropy, "float32")
    assert statistics.correct.dtype == jnp.bool_
    np.testing.assert_array_equal(statistics.correct, z64.argmax(-1) == LABELS)

    rules = {"log_prob": one_hot - o, "log_normalizer": o, "entropy": -o * (np.log(o) + entropy[:, None])}
    pullback = jax.jit(lambda z, cotangents: jax.vjp(lambda z: jaxce.label_statistics(z, LABELS)[:3], z)[1](cotangents))
    for name, gradient in rules.items():
        cotangents = tuple(jnp.full(N, float(name == other)) for other in DIFFERENTIABLE)
        assert_close(pullback(z, cotangents)[0], gradient, dtype)


@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
def test_any_number_of_classes(seed):
    for classes in (2, 7, 8, 129):
        z, labels = logits(5, classes, seed=seed, spread=3), random_labels(5, classes=classes, seed=seed)
        truth = exact(np.asarray(z), np.asarray(labels))
        statistics = jax.jit(jaxce.label_statistics)(z, labels)
        assert_close(statistics.log_normalizer, truth.log_normalizer, "float32")
        assert_close(-statistics.log_prob, truth.loss, "float32")


STATISTICS_MODES = (
    "jvp",
    "jacfwd",
    "jacrev",
    "jacfwd of jacrev",
    "jacrev of jacfwd",
    "jacrev of jacrev",
    "jacfwd of jacfwd",
    "jvp of hessian",
    "vmap of jacrev",
    "hessian of checkpoint",
)
# By default every mode with a cap and a mask, and some without.
QUICK = {("cap and mask", mode) for mode in STATISTICS_MODES}
QUICK |= {("plain", mode) for mode in ("jvp", "jacfwd", "jacrev", "jacfwd of jacrev")}


@pytest.mark.parametrize("variant, mode", cases(("cap and mask", "plain"), STATISTICS_MODES, quick=QUICK))
def test_every_mode(x64, variant, mode):
    labels = jnp.array([0, 2])
    options = {} if variant == "plain" else {"logit_cap": 2.0, "where": jnp.array([[True, False, True, True]])}

    def numbers(statistics, z):
        return jnp.stack(statistics(z, labels, **options)[:3], -1)

    ours, truth = (partial(numbers, f) for f in (jaxce.label_statistics, naive))
    assert_same_in_mode(mode, ours, truth, logits(2, 4, dtype="float64"), factor=4)


@pytest.mark.parametrize(
    "shape, axis, label_shape",
    [((K, N), 0, (N,)), ((2, K, 3), 1, (2, 3)), ((2, 4, 3, 2), (1, 3), (2, 3)), ((4, 3), None, ())],
)
def test_axis(shape, axis, label_shape):
    z = logits(*shape)
    axes = tuple(range(z.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    flat = np.moveaxis(np.asarray(z), axes, range(-len(axes), 0)).reshape(*label_shape, -1)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, flat.shape[-1], label_shape), jnp.int32)
    got = jaxce.label_statistics(z, labels, axis)
    for value, wanted in zip(got, jaxce.label_statistics(jnp.asarray(flat), labels), strict=True):
        assert value.shape == label_shape
        np.testing.assert_array_equal(value, wanted)


def test_masks_and_ignored_rows():
    z = logits(N, K).at[1].set(jnp.nan)
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
            assert_close(value[keep], kept, "float32")
        assert (gradient[1] == 0).all() and (np.abs(gradient[keep]).min() > 0)
        assert not correct[1]
        np.testing.assert_array_equal(correct[keep], wanted.correct)


def test_class_mask():
    z, where = logits(N, K), np.ones(K, bool)
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
    statistics, of_another_label = (jaxce.label_statistics(z, jnp.full(4, label)) for label in (1, 2))
    rest = 2 * np.exp(-margin)
    np.testing.assert_allclose(statistics.log_prob, -np.log1p(rest), 1e-6)
    np.testing.assert_allclose(of_another_label.log_prob, -np.log1p(rest) - margin, 1e-6)
    o = np.exp(-margin) / (1 + rest)
    for found in (statistics, of_another_label):
        np.testing.assert_allclose(found.entropy, np.log1p(rest) + 2 * o * margin, 1e-6)
    gradient = jax.grad(lambda z: jaxce.label_statistics(z, jnp.ones(4, jnp.int32)).log_prob.sum())(z)
    np.testing.assert_allclose(gradient[:, 1], rest / (1 + rest), 1e-6)
