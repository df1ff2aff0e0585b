"""Loss and gradient against oracles: confident rows, 16-bit logits, unusual targets, infinities."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import oracle

FORMS = ("integer", "dense")
seeds = pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
CLASSES = (1, 2, 7, 8, 129)


@functools.partial(jax.jit, static_argnums=2)
def value_and_gradient(logits: jax.Array, targets: jax.Array, loss=None) -> tuple[jax.Array, jax.Array]:
    """The losses of rows, and the gradient of their sum with respect to the logits."""
    if loss is None:
        integer = jnp.issubdtype(targets.dtype, jnp.integer)
        loss = jaxce.softmax_cross_entropy_with_integer_labels if integer else jaxce.softmax_cross_entropy
    losses, pullback = jax.vjp(lambda z: loss(z, targets), logits)
    return losses, pullback(jnp.ones_like(losses))[0]


def random_rows(seed: int, rows: int, classes: int, dtype="float32", spread: float = 1.0) -> tuple:
    """Logits of this standard deviation, in `dtype`, integer labels, and dense targets in float32."""
    rng = np.random.default_rng([seed, rows, classes])
    logits = jnp.asarray(spread * rng.standard_normal((rows, classes)), dtype)
    labels = jnp.asarray(rng.integers(classes, size=rows), jnp.int32)
    targets = jnp.asarray(rng.uniform(0.1, 1, (rows, classes)), jnp.float32)
    return logits, labels, targets / targets.sum(-1, keepdims=True)


# ----------------------------------------------------------------------------------------------- confident predictions

# 1,000 rows, by their number of classes.
CONFIDENT_ROWS = {2: 300, 3: 300, 31: 260, 129: 120, 1000: 20}


class Rows(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray
    truth: oracle.Truth


@functools.cache
def confident_rows(classes: int, rows: int, low: float, high: float, seed: int) -> Rows:
    """Normal logits whose label's is above (below, if negative) the largest other by a margin in [low, high]."""
    rng = np.random.default_rng([seed, classes])
    logits = rng.standard_normal((rows, classes))
    labels = rng.integers(classes, size=rows).astype(np.int32)
    picked = np.arange(rows), labels
    logits[picked] = -np.inf
    logits[picked] = logits.max(-1) + rng.uniform(low, high, rows)
    logits = logits.astype(np.float32)
    return Rows(logits, labels, oracle.exact(logits, labels))


def all_confident_rows(low: float, high: float, seed: int) -> list[Rows]:
    assert sum(CONFIDENT_ROWS.values()) == 1000
    return [confident_rows(classes, rows, low, high, seed) for classes, rows in CONFIDENT_ROWS.items()]


def in_form(form: str, case: Rows) -> tuple[jax.Array, jax.Array]:
    targets = case.labels if form == "integer" else oracle.dense(case.labels, case.logits.shape[-1]).astype("float32")
    return jnp.asarray(case.logits), jnp.asarray(targets)


margins = pytest.mark.parametrize("low, high, tolerance", [(5, 40, 5e-6), (40, 80, 1e-5)])


@margins
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_confident_rows_are_exact(form, low, high, tolerance, seed):
    for case in all_confident_rows(low, high, seed):
        loss, gradient = value_and_gradient(*in_form(form, case))
        oracle.assert_relative(loss, case.truth.loss, "float32", tolerance)
        oracle.assert_relative(gradient, case.truth.gradient, "float32", tolerance)
        g = np.asarray(gradient, np.float64)
        assert (np.abs(g.sum(-1)) <= 1e-6 * np.abs(g).sum(-1)).all()


@margins
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_optax_loses_confident_rows(low, high, tolerance, seed):
    """The same rows have relative error 1 with optax: they are no easy ones."""
    optax = pytest.importorskip("optax")
    for case in all_confident_rows(low, high, seed):
        logits, labels = in_form("integer", case)
        loss, gradient = value_and_gradient(logits, labels, optax.softmax_cross_entropy_with_integer_labels)
        picked = np.arange(len(labels)), case.labels
        for actual, truth in (loss, case.truth.loss), (gradient[picked], case.truth.gradient[picked]):
            assert np.max(np.abs(np.asarray(actual, np.float64) / truth - 1)) > 1 - tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_confidently_wrong_rows_are_exact(form, seed):
    for classes in (2, 3, 129):
        case = confident_rows(classes, 50, -80, -5, seed)
        loss, gradient = value_and_gradient(*in_form(form, case))
        oracle.assert_relative(loss, case.truth.loss, "float32", 5e-7)
        oracle.assert_relative(gradient, case.truth.gradient, "float32", 1e-5)


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e30])
@pytest.mark.parametrize("form", FORMS)
def test_large_common_offset_costs_nothing(form, offset):
    """What is known of the logits is their differences: of size 1e30, these are 0 or huge."""
    logits = (np.array([[0.0, 3.5, 1.25], [7.0, 0.0, -2.0], [0.0, 0.0, 0.5]]) + offset).astype(np.float32)
    labels = np.array([1, 0, 1], np.int32)
    truth = oracle.exact(logits, labels)
    loss, gradient = value_and_gradient(*in_form(form, Rows(logits, labels, truth)))
    oracle.assert_relative(loss, truth.loss, "float32", 1e-6)
    oracle.assert_relative(gradient, truth.gradient, "float32", 1e-6)


# ------------------------------------------------------------------------------------------------------- ordinary rows


@seeds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_ordinary_rows(form, dtype, seed):
    for classes in CLASSES:
        logits, labels, dense = random_rows(seed, 5, classes, dtype)
        targets = labels if form == "integer" else dense
        truth = oracle.stable(np.asarray(logits), np.asarray(targets))
        loss, gradient = value_and_gradient(logits, targets)
        oracle.assert_close(loss, truth.loss, "float32")
        if classes > 1:
            oracle.assert_close(gradient, truth.gradient, dtype)
        else:  # a·o − t = t − t
            assert not loss.any() and not gradient.any()


@seeds
@pytest.mark.parametrize("form", FORMS)
def test_float64(form, seed, x64):
    for classes in CLASSES[1:]:
        logits, labels, dense = random_rows(seed, 5, classes, "float64")
        targets = labels if form == "integer" else dense.astype("float64")
        truth = oracle.exact(np.asarray(logits), np.asarray(targets))
        loss, gradient = value_and_gradient(logits, targets)
        oracle.assert_close(loss, truth.loss, "float64")
        oracle.assert_close(gradient, truth.gradient, "float64")


@seeds
def test_ordinary_rows_are_as_good_as_those_of_optax(seed):
    """On average: both are as exact as float32 allows there, and which is the better one is chance."""
    optax = pytest.importorskip("optax")
    for classes in CLASSES[1:]:
        logits, labels, _ = random_rows(seed, 500, classes)
        truth = oracle.stable(np.asarray(logits), np.asarray(labels))
        ours = value_and_gradient(logits, labels)
        theirs = value_and_gradient(logits, labels, optax.softmax_cross_entropy_with_integer_labels)
        for actual, peer, wanted in zip(ours, theirs, (truth.loss, truth.gradient), strict=True):
            error, peers_error = (np.abs(np.asarray(a, np.float64) - wanted).mean() for a in (actual, peer))
            assert error <= 1.5 * peers_error


@seeds
def test_log_normalizer(seed):
    for classes in CLASSES[1:]:
        logits, labels, _ = random_rows(seed, 5, classes, spread=3)
        truth = oracle.exact(np.asarray(logits), np.asarray(labels))
        statistics = jax.jit(jaxce.label_statistics)(logits, labels)
        oracle.assert_close(statistics.log_normalizer, truth.log_normalizer, "float32")
        oracle.assert_close(-statistics.log_prob, truth.loss, "float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_16_bit_logits_of_a_large_vocabulary(form, dtype, seed):
    """Loss in float32, and the gradient rounded once."""
    logits, labels, _ = random_rows(seed, 16, 32_000, dtype, spread=3)
    targets = labels if form == "integer" else jax.nn.one_hot(labels, 32_000, dtype=jnp.float32)
    truth = oracle.stable(np.asarray(logits), np.asarray(targets))
    loss, gradient = value_and_gradient(logits, targets)
    oracle.assert_relative(loss, truth.loss, "float32", 1e-5)
    oracle.assert_one_rounding(gradient, truth.gradient, dtype)


# ------------------------------------------------------------------------------------------------- any targets whatever


@seeds
def test_targets_of_any_sum(seed):
    """∂E/∂z = a·o − t: exactly 0 for an all-zero row, 2·o − t where the targets sum to 2."""
    logits, _, dense = random_rows(seed, 6, 33)
    mass = np.array([[0.0], [0.25], [1.0], [2.0], [2.0], [100.0]], np.float32)
    loss, gradient = value_and_gradient(logits, jnp.asarray(mass) * dense)
    assert loss[0] == 0 and not gradient[0].any()
    truth = oracle.exact(np.asarray(logits), mass * np.asarray(dense))
    for row in range(1, 6):
        oracle.assert_close(loss[row], truth.loss[row], "float32")
        oracle.assert_close(gradient[row], truth.gradient[row], "float32")
    o = jaxce.reference.softmax(logits[3:5])
    oracle.assert_close(gradient[3:5], 2 * o - 2 * dense[3:5], "float32")


@seeds
def test_negative_targets(seed):
    logits, _, dense = random_rows(seed, 6, 17)
    targets = dense - 0.05
    truth = oracle.exact(np.asarray(logits), np.asarray(targets))
    loss, gradient = value_and_gradient(logits, targets)
    oracle.assert_close(loss, truth.loss, "float32", factor=2)  # terms of both signs
    oracle.assert_close(gradient, truth.gradient, "float32")


@seeds
def test_integer_and_boolean_targets_are_numbers(seed):
    logits, labels, _ = random_rows(seed, 4, 9)
    one_hot = jax.nn.one_hot(labels, 9, dtype=jnp.float32)
    wanted = jaxce.softmax_cross_entropy(logits, one_hot)
    for dtype in (jnp.int32, bool):
        np.testing.assert_array_equal(jaxce.softmax_cross_entropy(logits, one_hot.astype(dtype)), wanted)


@jax.jit
def target_gradient(targets: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.grad(lambda t: jaxce.softmax_cross_entropy(logits, t).sum())(targets)


@pytest.mark.parametrize("low, high", [(0, 3), (5, 40), (40, 80)])
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_gradient_of_dense_targets_is_minus_log_o(low, high, seed):
    """For the label of a confident row that is again the tiny loss, to full relative accuracy."""
    for classes in (2, 3, 129):
        case = confident_rows(classes, 20, low, high, seed)
        logits, targets = in_form("dense", case)
        gradient = target_gradient(targets, logits)
        minus_log_o = case.truth.log_normalizer[:, None] - case.logits.astype(np.float64)
        minus_log_o[np.arange(20), case.labels] = case.truth.loss
        oracle.assert_relative(gradient, minus_log_o, "float32", 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_16_bit_targets_has_their_dtype(dtype):
    logits, _, dense = random_rows(0, 4, 33)
    targets = dense.astype(dtype)
    gradient = target_gradient(targets, logits)
    z = np.asarray(logits, np.float64)
    truth = np.log(np.exp(z).sum(-1, keepdims=True)) - z
    oracle.assert_one_rounding(gradient, truth, dtype)


# --------------------------------------------------------------------------------------- infinities and invalid labels


def test_impossible_class_without_target_contributes_nothing():
    """0·log 0 = 0: the row is as it would be without the class."""
    logits = jnp.array([[1.0, -jnp.inf, 0.5, 2.0]])
    kept = jnp.array([0, 2, 3])
    for targets in (jnp.array([2]), jnp.array([[0.25, 0.0, 0.75, 0.0]])):
        fewer = jnp.array([1]) if targets.ndim == 1 else targets[:, kept]
        loss, gradient = value_and_gradient(logits, targets)
        truth = oracle.exact(np.asarray(logits[:, kept]), np.asarray(fewer))
        oracle.assert_close(loss, truth.loss, "float32")
        oracle.assert_close(gradient[:, kept], truth.gradient, "float32")
        assert gradient[0, 1] == 0


def test_target_on_an_impossible_class_is_infinite():
    logits = jnp.array([[1.0, -jnp.inf, 0.5]])
    for targets in (jnp.array([1]), jnp.array([[0.5, 0.5, 0.0]])):
        assert value_and_gradient(logits, targets)[0] == jnp.inf


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row(form):
    logits, labels, dense = random_rows(0, 3, 5)
    targets = labels if form == "integer" else dense
    loss, gradient = value_and_gradient(logits.at[1, 2].set(jnp.nan), targets)
    wanted_loss, wanted_gradient = value_and_gradient(logits, targets)
    assert jnp.isnan(loss[1]) and jnp.isnan(gradient[1]).all()
    others = jnp.array([0, 2])
    np.testing.assert_array_equal(loss[others], wanted_loss[others])
    np.testing.assert_array_equal(gradient[others], wanted_gradient[others])


def test_label_out_of_range_is_nan():
    """Forward and backward, in every mode, and in its row only."""
    logits, labels, _ = random_rows(0, 3, 5)

    @jax.jit
    def rate(z, labels):
        return jax.jvp(lambda z: jaxce.softmax_cross_entropy_with_integer_labels(z, labels), [z], [z])[1]

    for label in (-1, -5, 5, 6, np.iinfo(np.int32).min, np.iinfo(np.int32).max):
        labels = labels.at[1].set(label)
        loss, gradient = value_and_gradient(logits, labels)
        np.testing.assert_array_equal(jnp.isnan(loss), [False, True, False])
        np.testing.assert_array_equal(jnp.isnan(rate(logits, labels)), [False, True, False])
        np.testing.assert_array_equal(jnp.isnan(gradient), np.broadcast_to([[False], [True], [False]], (3, 5)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32])
def test_label_dtypes(dtype):
    """257 classes do not fit into 8 bits, which must not matter."""
    logits, labels, _ = random_rows(0, 3, 257)
    labels = labels % 128  # so that each dtype has them
    wanted = value_and_gradient(logits, labels)
    for got, want in zip(value_and_gradient(logits, labels.astype(dtype)), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_largest_and_equal_logits(form):
    largest = np.finfo(np.float32).max
    logits = np.array([[largest, -largest, 0.0], [2.0, 2.0, 2.0], [-largest, -largest, -largest]], np.float32)
    labels = np.array([0, 1, 2], np.int32)
    truth = oracle.stable(logits, labels)
    loss, gradient = value_and_gradient(*in_form(form, Rows(logits, labels, truth)))
    oracle.assert_close(loss, truth.loss, "float32")
    oracle.assert_close(gradient, truth.gradient, "float32")


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_confident_rows_are_exact(inner, outer):
    """o_c·(1 − o_c), which is 0 if 1 − o_c is formed by subtraction."""

    def integer(z):
        return jaxce.softmax_cross_entropy_with_integer_labels(z, 0)

    def dense(z):
        return jaxce.softmax_cross_entropy(z, jnp.array([1.0, 0.0, 0.0]))

    losses = (integer,) if inner is outer is jax.jacrev else (integer, dense)  # dense, rev-rev: a documented limit
    second = jax.jit(lambda z: [outer(inner(loss))(z)[0, 0] for loss in losses])
    for margin in (10.0, 20.0, 40.0):
        rest = 2 * np.exp(-margin)
        truth = rest / (1 + rest) ** 2
        for derivative in second(jnp.array([margin, 0.0, 0.0])):
            assert abs(derivative / truth - 1) < 5e-6


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_gradient_through_a_saturated_cap_is_exact(mode):
    """∂cap·tanh(z/cap)/∂z = 1/cosh²(z/cap), which 1 − tanh² rounds to 0 or to a rounding error."""
    z, cap = np.linspace(-90, 90, 37, dtype=np.float32)[:, None] * np.ones(2, np.float32), 5.0
    z[:, 1] = 1

    def losses(z):
        return jaxce.softmax_cross_entropy_with_integer_labels(z, jnp.ones(37, jnp.int32), logit_cap=cap)

    got = np.asarray(jax.jit(mode(lambda z: losses(z)))(jnp.asarray(z)))[np.arange(37), np.arange(37)]
    capped = cap * np.tanh(z.astype(np.float64) / cap)
    o = 1 / (1 + np.exp(capped[:, 1] - capped[:, 0]))
    truth = o / np.cosh(z[:, 0].astype(np.float64) / cap) ** 2
    np.testing.assert_allclose(got[:, 0], truth, rtol=1e-5)
