"""Loss and gradient against oracles: confident rows, 16-bit logits, unusual targets, higher derivatives."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce._elementary import soft_capped

from ..helpers import (
    FORMS,
    LOSSES,
    Truth,
    assert_close,
    assert_one_rounding,
    assert_relative,
    dense,
    dense_loss,
    exact,
    integer_loss,
    logits,
    loss_and_gradient,
    probabilities,
    random_labels,
    stable,
)

seeds = pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
CLASSES = (1, 2, 7, 8, 129)


def random_rows(seed: int, rows: int, classes: int, dtype="float32", spread: float = 1.0) -> tuple:
    """Logits of this standard deviation, in `dtype`, integer labels, and dense targets in float32."""
    z = logits(rows, classes, seed=seed, dtype=dtype, spread=spread)
    return z, random_labels(rows, classes=classes, seed=seed), probabilities(rows, classes, seed=seed + 100)


# ----------------------------------------------------------------------------------------------- confident predictions

# 1,000 rows, by their number of classes.
CONFIDENT_ROWS = {2: 300, 3: 300, 31: 260, 129: 120, 1000: 20}


class Rows(NamedTuple):
    logits: np.ndarray
    labels: np.ndarray
    truth: Truth


@functools.cache
def confident_rows(classes: int, rows: int, low: float, high: float, seed: int) -> Rows:
    """Normal logits whose label's is above (below, if negative) the largest other by a margin in [low, high]."""
    rng = np.random.default_rng([seed, classes])
    z = rng.standard_normal((rows, classes))
    labels = rng.integers(classes, size=rows).astype(np.int32)
    picked = np.arange(rows), labels
    z[picked] = -np.inf
    z[picked] = z.max(-1) + rng.uniform(low, high, rows)
    z = z.astype(np.float32)
    return Rows(z, labels, exact(z, labels))


def all_confident_rows(low: float, high: float, seed: int) -> list[Rows]:
    assert sum(CONFIDENT_ROWS.values()) == 1000
    return [confident_rows(classes, rows, low, high, seed) for classes, rows in CONFIDENT_ROWS.items()]


def in_form(form: str, case: Rows) -> tuple[jax.Array, jax.Array]:
    targets = case.labels if form == "integer" else dense(case.labels, case.logits.shape[-1]).astype("float32")
    return jnp.asarray(case.logits), jnp.asarray(targets)


margins = pytest.mark.parametrize("low, high, tolerance", [(5, 40, 5e-6), (40, 80, 1e-5)])


@margins
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_confident_rows_are_exact(form, low, high, tolerance, seed):
    for case in all_confident_rows(low, high, seed):
        loss, gradient = loss_and_gradient(LOSSES[form], *in_form(form, case))
        assert_relative(loss, case.truth.loss, "float32", tolerance)
        assert_relative(gradient, case.truth.gradient, "float32", tolerance)
        g = np.asarray(gradient, np.float64)
        assert (np.abs(g.sum(-1)) <= 1e-6 * np.abs(g).sum(-1)).all()


@margins
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_optax_loses_confident_rows(low, high, tolerance, seed):
    """The same rows have relative error 1 with optax: they are no easy ones."""
    optax = pytest.importorskip("optax")
    for case in all_confident_rows(low, high, seed):
        z, labels = in_form("integer", case)
        loss, gradient = loss_and_gradient(optax.softmax_cross_entropy_with_integer_labels, z, labels)
        picked = np.arange(len(labels)), case.labels
        for actual, truth in (loss, case.truth.loss), (gradient[picked], case.truth.gradient[picked]):
            assert np.max(np.abs(np.asarray(actual, np.float64) / truth - 1)) > 1 - tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_confidently_wrong_rows_are_exact(form, seed):
    for classes in (2, 3, 129):
        case = confident_rows(classes, 50, -80, -5, seed)
        loss, gradient = loss_and_gradient(LOSSES[form], *in_form(form, case))
        assert_relative(loss, case.truth.loss, "float32", 5e-7)
        assert_relative(gradient, case.truth.gradient, "float32", 1e-5)


@pytest.mark.parametrize("offset", [-1e4, 1e4, 1e30])
@pytest.mark.parametrize("form", FORMS)
def test_large_common_offset_costs_nothing(form, offset):
    """What is known of the logits is their differences: of size 1e30, these are 0 or huge."""
    z = (np.array([[0.0, 3.5, 1.25], [7.0, 0.0, -2.0], [0.0, 0.0, 0.5]]) + offset).astype(np.float32)
    labels = np.array([1, 0, 1], np.int32)
    truth = exact(z, labels)
    loss, gradient = loss_and_gradient(LOSSES[form], *in_form(form, Rows(z, labels, truth)))
    assert_relative(loss, truth.loss, "float32", 1e-6)
    assert_relative(gradient, truth.gradient, "float32", 1e-6)


# ------------------------------------------------------------------------------------------------------- ordinary rows


@seeds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_ordinary_rows(form, dtype, seed):
    for classes in CLASSES:
        z, labels, t = random_rows(seed, 5, classes, dtype)
        targets = labels if form == "integer" else t
        truth = stable(np.asarray(z), np.asarray(targets))
        loss, gradient = loss_and_gradient(LOSSES[form], z, targets)
        assert_close(loss, truth.loss, "float32")
        if classes > 1:
            assert_close(gradient, truth.gradient, dtype)
        else:  # a·o − t = t − t
            assert not loss.any() and not gradient.any()


@seeds
@pytest.mark.parametrize("form", FORMS)
def test_float64(form, seed, x64):
    for classes in CLASSES[1:]:
        z, labels, t = random_rows(seed, 5, classes, "float64")
        targets = labels if form == "integer" else t.astype("float64")
        truth = exact(np.asarray(z), np.asarray(targets))
        loss, gradient = loss_and_gradient(LOSSES[form], z, targets)
        assert_close(loss, truth.loss, "float64")
        assert_close(gradient, truth.gradient, "float64")


@seeds
def test_ordinary_rows_are_as_good_as_those_of_optax(seed):
    """On average: both are as exact as float32 allows there, and which is the better one is chance."""
    optax = pytest.importorskip("optax")
    for classes in CLASSES[1:]:
        z, labels, _ = random_rows(seed, 500, classes)
        truth = stable(np.asarray(z), np.asarray(labels))
        ours = loss_and_gradient(integer_loss, z, labels)
        theirs = loss_and_gradient(optax.softmax_cross_entropy_with_integer_labels, z, labels)
        for actual, peer, wanted in zip(ours, theirs, (truth.loss, truth.gradient), strict=True):
            error, peers_error = (np.abs(np.asarray(a, np.float64) - wanted).mean() for a in (actual, peer))
            assert error <= 1.5 * peers_error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_16_bit_logits_of_a_large_vocabulary(form, dtype, seed):
    """Loss in float32, and the gradient rounded once."""
    z, labels, _ = random_rows(seed, 16, 32_000, dtype, spread=3)
    targets = labels if form == "integer" else jax.nn.one_hot(labels, 32_000, dtype=jnp.float32)
    truth = stable(np.asarray(z), np.asarray(targets))
    loss, gradient = loss_and_gradient(LOSSES[form], z, targets)
    assert_relative(loss, truth.loss, "float32", 1e-5)
    assert_one_rounding(gradient, truth.gradient, dtype)


# ------------------------------------------------------------------------------------------------- any targets whatever


@seeds
def test_targets_of_any_sum(seed):
    """∂E/∂z = a·o − t: exactly 0 for an all-zero row, 2·o − t where the targets sum to 2."""
    z, _, t = random_rows(seed, 6, 33)
    mass = np.array([[0.0], [0.25], [1.0], [2.0], [2.0], [100.0]], np.float32)
    loss, gradient = loss_and_gradient(dense_loss, z, jnp.asarray(mass) * t)
    assert loss[0] == 0 and not gradient[0].any()
    truth = exact(np.asarray(z), mass * np.asarray(t))
    for row in range(1, 6):
        assert_close(loss[row], truth.loss[row], "float32")
        assert_close(gradient[row], truth.gradient[row], "float32")
    o = jaxce.reference.softmax(z[3:5])
    assert_close(gradient[3:5], 2 * o - 2 * t[3:5], "float32")


@seeds
def test_negative_targets(seed):
    z, _, t = random_rows(seed, 6, 17)
    targets = t - 0.05
    truth = exact(np.asarray(z), np.asarray(targets))
    loss, gradient = loss_and_gradient(dense_loss, z, targets)
    assert_close(loss, truth.loss, "float32", factor=2)  # terms of both signs
    assert_close(gradient, truth.gradient, "float32")


@seeds
def test_integer_and_boolean_targets_are_numbers(seed):
    z, labels, _ = random_rows(seed, 4, 9)
    one_hot = jax.nn.one_hot(labels, 9, dtype=jnp.float32)
    wanted = dense_loss(z, one_hot)
    for dtype in (jnp.int32, bool):
        np.testing.assert_array_equal(dense_loss(z, one_hot.astype(dtype)), wanted)


@jax.jit
def target_gradient(targets: jax.Array, z: jax.Array) -> jax.Array:
    return jax.grad(lambda t: dense_loss(z, t).sum())(targets)


@pytest.mark.parametrize("low, high", [(0, 3), (5, 40), (40, 80)])
@pytest.mark.parametrize("seed", [0], ids="seed{}".format)
def test_gradient_of_dense_targets_is_minus_log_o(low, high, seed):
    """For the label of a confident row that is again the tiny loss, to full relative accuracy."""
    for classes in (2, 3, 129):
        case = confident_rows(classes, 20, low, high, seed)
        z, targets = in_form("dense", case)
        gradient = target_gradient(targets, z)
        minus_log_o = case.truth.log_normalizer[:, None] - case.logits.astype(np.float64)
        minus_log_o[np.arange(20), case.labels] = case.truth.loss
        assert_relative(gradient, minus_log_o, "float32", 5e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_16_bit_targets_has_their_dtype(dtype):
    z, _, t = random_rows(0, 4, 33)
    targets = t.astype(dtype)
    gradient = target_gradient(targets, z)
    truth = stable(np.asarray(z), np.asarray(t)).log_normalizer[:, None] - np.asarray(z, np.float64)
    assert_one_rounding(gradient, truth, dtype)


# ------------------------------------------------------------------------ extreme logits, higher derivatives, caps


@pytest.mark.parametrize("form", FORMS)
def test_largest_and_equal_logits(form):
    largest = np.finfo(np.float32).max
    z = np.array([[largest, -largest, 0.0], [2.0, 2.0, 2.0], [-largest, -largest, -largest]], np.float32)
    labels = np.array([0, 1, 2], np.int32)
    truth = stable(z, labels)
    loss, gradient = loss_and_gradient(LOSSES[form], *in_form(form, Rows(z, labels, truth)))
    assert_close(loss, truth.loss, "float32")
    assert_close(gradient, truth.gradient, "float32")


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_second_derivatives_of_confident_rows_are_exact(inner, outer):
    """o_c·(1 − o_c), which is 0 if 1 − o_c is formed by subtraction."""

    losses = [lambda z: integer_loss(z, 0), lambda z: dense_loss(z, jnp.array([1.0, 0.0, 0.0]))]
    second = jax.jit(lambda z: [outer(inner(loss))(z)[0, 0] for loss in losses])
    for margin in (10.0, 20.0, 40.0):
        rest = 2 * np.exp(-margin)
        truth = rest / (1 + rest) ** 2
        for derivative in second(jnp.array([margin, 0.0, 0.0])):
            assert abs(derivative / truth - 1) < 5e-6


def hessian_of_a_row_sure_of_the_first_class(z: np.ndarray) -> np.ndarray:
    """diag(o) − o·oᵀ, whose entries are all tiny."""
    o = np.exp(z - z[0]) / np.exp(z - z[0]).sum()
    truth = np.diag(o) - np.outer(o, o)
    truth[0, 0] = o[0] * o[1:].sum()
    return truth


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["jacfwd", "jacrev"])
@pytest.mark.parametrize("targets", ["label", "unlikely label", "one-hot", "spread"])
def test_every_entry_of_a_confident_rows_hessian_is_exact(targets, mode):
    """Relative to itself, in float32: also the row and the column of a label that is all but impossible."""
    z = np.array([30.0, 0.0, 1.0, -2.0])
    loss = {
        "label": lambda z: integer_loss(z, 0),
        "unlikely label": lambda z: integer_loss(z, 1),
        "one-hot": lambda z: dense_loss(z, jnp.array([1.0, 0.0, 0.0, 0.0])),
        "spread": lambda z: dense_loss(z, jnp.array([0.5, 0.25, 0.25, 0.0])),
    }[targets]
    hessian = jax.jit(mode(jax.jacrev(loss)))(jnp.asarray(z, jnp.float32))
    truth = hessian_of_a_row_sure_of_the_first_class(z)
    if targets == "unlikely label":  # of the largest class 1 − o cancels there
        hessian, truth = hessian.at[0, 0].set(0), truth * (1 - np.eye(4)[0][:, None] * np.eye(4)[0])
    assert_relative(hessian, truth, "float32", 1e-6)


@pytest.mark.parametrize("unlikely", [20.0, 60.0])
def test_gradient_of_the_log_normalizer_at_an_unlikely_label_is_exact(unlikely):
    """It is o, and o_y keeps its digits where 1 + (o_y − 1) would lose them; so does that of a z-loss."""
    z = jnp.array([unlikely, 0.0, 1.0])
    o = np.exp(np.asarray(z, np.float64) - unlikely) / np.exp(np.asarray(z, np.float64) - unlikely).sum()
    assert_relative(jax.grad(lambda z: jaxce.label_statistics(z, 1).log_normalizer)(z), o, "float32", 1e-6)
    weights = jnp.array([1.0, 0.0, 1.0])  # the label's own loss counts for nothing
    gradient = jax.grad(lambda z: integer_loss(z, 1, class_weights=weights, z_loss=0.5))(z)
    assert_relative(gradient, o * float(jax.nn.logsumexp(z)), "float32", 1e-6)


@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_gradient_through_a_saturated_cap_is_exact(mode):
    """∂cap·tanh(z/cap)/∂z = 1/cosh²(z/cap), which 1 − tanh² rounds to 0 or to a rounding error."""
    z, cap = np.linspace(-90, 90, 37, dtype=np.float32)[:, None] * np.ones(2, np.float32), 5.0
    z[:, 1] = 1

    def losses(z):
        return integer_loss(z, jnp.ones(37, jnp.int32), logit_cap=cap)

    got = np.asarray(jax.jit(mode(lambda z: losses(z)))(jnp.asarray(z)))[np.arange(37), np.arange(37)]
    capped = cap * np.tanh(z.astype(np.float64) / cap)
    o = 1 / (1 + np.exp(capped[:, 1] - capped[:, 0]))
    truth = o / np.cosh(z[:, 0].astype(np.float64) / cap) ** 2
    np.testing.assert_allclose(got[:, 0], truth, rtol=1e-5)


def test_the_largest_capped_logit_is_the_maximum_of_capped_logits():
    """Without the `maximum` in `soft_capped`, on jax 0.10 a fused multiply and subtract leaves a rounding error."""

    def largest(z):
        capped = soft_capped(z, jnp.float32(30))
        return (capped - capped.max(-1, keepdims=True)).max(-1)

    assert not jax.jit(largest)(logits(64, 300, spread=20)).any()
