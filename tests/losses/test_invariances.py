"""Relations that hold whatever the numbers are: no oracle, so nothing to share a mistake with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    FORMS,
    LOSSES,
    assert_close,
    assert_descends,
    integer_loss,
    logits,
    loss_and_gradient,
    option_sets,
    probabilities,
    with_gradient,
)

N, K = 6, 7
LABELS = jnp.array([0, 3, 6, 2, 2, 5])
OPTIONS = option_sets(K)
each_form = pytest.mark.parametrize("form", FORMS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def targets_for(form: str) -> jax.Array:
    return LABELS if form == "integer" else probabilities(N, K)


def without_jit(loss_fn, z, targets, **options):
    return with_gradient(lambda z: loss_fn(z, targets, **options), z)


def assert_same_bits(actual, wanted):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@each_form
@pytest.mark.parametrize("name", ["none", "label_smoothing", "class_weights"])
@pytest.mark.parametrize("constant", [8.0, -1024.0, 16384.0])
def test_adding_a_constant_to_a_row_changes_nothing(form, name, constant):
    # Logits that are multiples of 1/128, so that the sum is exact and only the library's roundings are left.
    z = jnp.round(logits(N, K) * 128) / 128
    shift = jnp.where(jnp.arange(N) % 2 == 0, constant, -constant)[:, None]
    assert ((z + shift) - shift == z).all()
    options = OPTIONS[name]
    loss, gradient = loss_and_gradient(LOSSES[form], z, targets_for(form), **options)
    assert_descends(LOSSES[form], z, targets_for(form), gradient, **options)
    shifted_loss, shifted_gradient = loss_and_gradient(LOSSES[form], z + shift, targets_for(form), **options)
    assert_close(shifted_loss, loss, "float32")
    assert_close(shifted_gradient, gradient, "float32")


def test_adding_a_constant_to_a_confident_row_keeps_its_digits():
    z = jnp.zeros((1, K)).at[0, 2].set(16.0)
    loss, gradient = loss_and_gradient(integer_loss, z + 16384.0, jnp.array([2]))
    wanted = (K - 1) * np.exp(-16.0)
    np.testing.assert_allclose(loss, [wanted], 1e-6)
    np.testing.assert_allclose(gradient[0, 2], -wanted, 1e-6)


@each_form
@each_option
def test_permuting_classes_permutes_the_gradient(form, options):
    z, t, order = logits(N, K), targets_for(form), jax.random.permutation(jax.random.key(5), K)
    loss, gradient = loss_and_gradient(LOSSES[form], z, t, **options)
    assert_descends(LOSSES[form], z, t, gradient, **options)
    if "class_weights" in options:
        options = options | {"class_weights": options["class_weights"][order]}
    permuted_targets = jnp.argsort(order)[t] if form == "integer" else t[:, order]
    permuted_loss, permuted_gradient = loss_and_gradient(LOSSES[form], z[:, order], permuted_targets, **options)
    assert_close(permuted_loss, loss, "float32")
    assert_close(permuted_gradient, np.asarray(gradient)[:, order], "float32")


NEUTRAL = {"label_smoothing": 0.0, "z_loss": 0.0, "class_weights": np.ones(K), "logit_cap": None}
ROWS = {
    "ordinary": lambda dtype: logits(N, K, dtype=dtype),
    "confident": lambda dtype: logits(N, K, dtype=dtype) + 20 * jax.nn.one_hot(LABELS, K, dtype=dtype),
    "with -inf": lambda dtype: logits(N, K, dtype=dtype).at[:, 1].set(-jnp.inf),
}


@functools.cache
def bits_of(form: str, dtype, rows: str, jit: bool):
    """Rows, targets, and their loss and gradient without any option."""
    z, t = ROWS[rows](dtype), targets_for(form)
    if form == "dense":
        t = t.at[:, 1].set(0).astype(dtype)
    loss, gradient = (loss_and_gradient if jit else without_jit)(LOSSES[form], z, t)
    assert np.isfinite(loss).all() and (gradient != 0).any()
    return z, t, (loss, gradient)


@each_form
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_option_is_bitwise_no_option(form, name, dtype):
    neutral = NEUTRAL[name]
    for rows in ROWS:
        z, t, wanted = bits_of(form, dtype, rows, jit=False)
        assert_same_bits(without_jit(LOSSES[form], z, t, **{name: neutral}), wanted)
        if neutral is None:
            continue
        traced = {name: jnp.asarray(neutral, jnp.float32)}
        assert_same_bits(without_jit(LOSSES[form], z, t, **traced), wanted)
        # Targets are an argument: constant ones would be summed by XLA's constant folder, in another order.
        z, t, wanted = bits_of(form, dtype, rows, jit=True)
        assert_same_bits(loss_and_gradient(LOSSES[form], z, t, **traced), wanted)


@each_form
def test_all_neutral_options_together_are_bitwise_no_option(form):
    z, t = logits(N, K), targets_for(form)
    options = {"label_smoothing": jnp.float32(0), "z_loss": jnp.float32(0), "class_weights": jnp.ones(K)}
    everyone = {"where": jnp.ones((N, K), bool)} | ({"ignore_index": -100} if form == "integer" else {})
    for function in (without_jit, loss_and_gradient):
        assert_same_bits(function(LOSSES[form], z, t, **options, **everyone), function(LOSSES[form], z, t))


@each_form
@pytest.mark.parametrize(
    "options", [{}, {"logit_cap": 30.0}, {"label_smoothing": 0.1}], ids=["none", "cap", "smoothing"]
)
def test_loss_of_probabilities_is_not_negative(form, options):
    """Also where the logits are a product that the compiler may fuse with the subtraction of the maximum."""
    labels = jnp.arange(512) % K
    one_hot = jax.nn.one_hot(labels, K)
    t = labels if form == "integer" else one_hot
    compiled = jax.jit(lambda h, s: without_jit(LOSSES[form], s * h, t, **options))
    for margin in (0.0, 5.0, 17.0, 40.0, 90.0):
        for scale in (1.0, 0.731, 3.3):
            loss, gradient = compiled(logits(512, K) + margin * one_hot, jnp.float32(scale))
            assert (loss >= 0).all()
            if margin * scale < 60 or options:  # else e^−margin may be too small for float32
                assert (loss > 0).all() and (np.abs(gradient).max(-1) > 0).all()


@pytest.mark.parametrize("logit_cap", [None, 30.0])
@each_form
def test_loss_of_confident_scaled_logits_has_its_digits_under_jit(form, logit_cap):
    rows, scale = 256, np.float32(0.731)
    label = np.arange(rows) % K
    one_hot = jax.nn.one_hot(label, K)
    h = logits(rows, K) + 30 * one_hot
    t = jnp.asarray(label) if form == "integer" else one_hot
    loss, _ = jax.jit(lambda h: without_jit(LOSSES[form], scale * h, t, logit_cap=logit_cap))(h)
    z = np.asarray(scale * h).astype(np.float64)
    z = z if logit_cap is None else logit_cap * np.tanh(z / logit_cap)
    others = np.where(one_hot, -np.inf, z - z[np.arange(rows), label][:, None])
    np.testing.assert_allclose(loss, np.log1p(np.exp(others).sum(-1)), 3e-5)


@each_form
@pytest.mark.parametrize("name", ["none", "label_smoothing", "class_weights", "z_loss"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_gradient_rows_sum_to_zero(form, name, scale):
    """But for the gradient of the z-loss itself, 2·z_loss·lse·o, which sums to 2·z_loss·lse."""
    z = scale * logits(64, 101, seed=2)
    targets = jnp.arange(64) % 101 if form == "integer" else probabilities(64, 101)
    options = option_sets(101)[name] | ({"z_loss": 1e-2} if name == "z_loss" else {})
    _, gradient = loss_and_gradient(LOSSES[form], z, targets, **options)
    gradient = gradient.astype(np.float64)
    if name == "z_loss":
        lse = np.asarray(jax.nn.logsumexp(z, -1), np.float64)
        gradient = np.concatenate([gradient, -2e-2 * lse[:, None]], -1)
    assert np.abs(gradient).max() > 1e-2
    assert (np.abs(gradient.sum(-1)) <= 1e-6 * np.abs(gradient).sum(-1)).all()
