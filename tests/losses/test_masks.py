"""Masks and ignored labels: what does not take part is as if it were not there, whatever it holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import (
    FORMS,
    LOSSES,
    assert_close,
    assert_descends,
    dense_loss,
    exact,
    integer_loss,
    logits,
    loss_and_gradient,
    option_sets,
    probabilities,
    stable,
    targets_of,
)

N, K = 4, 5
ROWS = (6, 7)  # of the tests that mask some rows or classes of many
OPTIONS = option_sets(ROWS[1])
ZERO_WEIGHT = option_sets(K, class_weights=[0.0, 0.5, 1.0, 2.0, 3.0])
each_form = pytest.mark.parametrize("form", FORMS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


# ---------------------------------------------------------------------------------------------------------------- rows


@each_form
@each_option
def test_masked_and_ignored_rows_are_left_out(form, options):
    """The loss is 0 and the gradient exactly 0, invalid labels and NaN notwithstanding; the others are as alone."""
    loss_fn, z, t = LOSSES[form], logits(*ROWS), targets_of(form, *ROWS)
    keep = np.array([True, False, True, True, False, True])
    wanted = [a[keep] for a in loss_and_gradient(loss_fn, z, t, **options)]
    assert_descends(loss_fn, z[keep], t[keep], wanted[1], **options)
    selections: list[dict[str, Any]] = [{"where": keep}, {"where": keep[:, None]}]
    selections += [{"ignore_index": 77}] if form == "integer" else []
    poisoned = jnp.where(keep[:, None], z, jnp.nan)
    t = jnp.where(keep, t, 77) if form == "integer" else jnp.where(keep[:, None], t, jnp.inf)
    for selection in selections:
        loss, gradient = loss_and_gradient(loss_fn, poisoned, t, **options, **selection)
        assert_close(loss[keep], wanted[0], "float32")
        assert_close(gradient[keep], wanted[1], "float32")
        assert (loss[~keep] == 0).all() and (gradient[~keep] == 0).all()


@pytest.mark.parametrize("keep", [[True, False, True], [[True] * 5, [False] * 5, [True, False, True, True, True]]])
@pytest.mark.parametrize("axis", [-1, 0])
def test_mask_of_rows_that_only_the_labels_have(axis, keep):
    """Logits whose row axis is 1 broadcast with the labels, and so does the mask: of rows or of classes."""
    z, labels, keep = logits(1, 5), jnp.array([0, 1, 2]), jnp.array(keep)
    moved = keep.T if axis == 0 and keep.ndim == 2 else keep
    wanted = integer_loss(jnp.broadcast_to(z, (3, 5)), labels, where=keep, label_smoothing=0.1)
    got = integer_loss(z.T if axis == 0 else z, labels, axis, moved, label_smoothing=0.1)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(got == 0, [False, True, False])
    assert_close(dense_loss(z, jax.nn.one_hot(labels, 5), where=keep, label_smoothing=0.1), wanted, "float32")
    got, wanted = (jaxce.label_statistics(a, labels, where=keep) for a in (z, jnp.broadcast_to(z, (3, 5))))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    slope = jax.grad(lambda z: integer_loss(z, labels, where=keep).sum())(z)
    full = jax.grad(lambda z: integer_loss(z, labels, where=keep).sum())(jnp.broadcast_to(z, (3, 5)))
    assert_close(slope[0], full.sum(0), "float32")


@each_form
@pytest.mark.parametrize("axis", [0, 1])
def test_mask_of_rows_along_another_axis(form, axis):
    z, targets = logits(3, 4, 5), targets_of(form, 3, 4, 5)
    keep = np.random.default_rng(0).random((3, 4)) < 0.6
    assert 0 < keep.sum() < keep.size
    truth = stable(np.asarray(z), np.asarray(targets))
    poisoned = jnp.moveaxis(jnp.where(keep[..., None], z, jnp.nan), -1, axis)
    targets = jnp.where(keep, targets, 77) if form == "integer" else jnp.where(keep[..., None], targets, jnp.inf)
    moved = targets if form == "integer" else jnp.moveaxis(targets, -1, axis)
    loss, gradient = loss_and_gradient(LOSSES[form], poisoned, moved, axis=axis, where=keep)
    gradient = np.moveaxis(gradient, axis, -1)
    assert_close(loss[keep], truth.loss[keep], "float32")
    assert_close(gradient[keep], truth.gradient[keep], "float32")
    assert not loss[~keep].any() and not gradient[~keep].any()


CONTENTS = {
    "nan": [np.nan] * K,
    "mixed": [np.nan, np.inf, -np.inf, 3e38, 0.0],
    "ordinary": [0.0, 1.0, -1.0, 0.5, 2.0],
}
each_content = pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
differentiable = {
    "label_smoothing": jnp.float32(0.1),
    "class_weights": jnp.array([jnp.inf, 0.5, 1.0, 2.0, 3.0]),  # as 1/frequency is of a class that does not occur
    "logit_cap": jnp.float32(3.0),
    "z_loss": jnp.float32(0.01),
}
MASKS = ("row", "row, kept axis", "every class")
each_mask = pytest.mark.parametrize("mask", MASKS)


def mask_of(name: str) -> jax.Array:
    rows = jnp.array([True, False, True, True])
    return {"row": rows, "row, kept axis": rows[:, None], "every class": jnp.broadcast_to(rows[:, None], (N, K))}[name]


@functools.partial(jax.jit, static_argnums=0)
def gradients_and_rate(loss_fn, z, targets, options, cotangent, selection):
    """Loss, gradients of the logits and of the options, and how the loss changes with all of them."""

    def loss_of(z, options):
        return loss_fn(z, targets, **selection, **options)

    loss, pullback = jax.vjp(loss_of, z, options)
    rates = jax.tree.map(jnp.ones_like, (z, options))
    return loss, *pullback(cotangent), jax.jvp(loss_of, (z, options), rates)[1]


def assert_row_is_absent(z, targets, **selection):
    """Row 1 of the loss is not there: neither for the loss nor for any gradient."""
    rest = np.array([0, 2, 3])
    cotangent = jnp.array([0.5, jnp.nan, -2.0, 1.0])  # what is done with an absent row's loss does not matter either
    for names in [("class_weights", "logit_cap", "z_loss"), ("label_smoothing", "logit_cap", "z_loss")]:
        options = {name: differentiable[name] for name in names}
        loss, dz, d_options, rate = gradients_and_rate(integer_loss, z, targets, options, cotangent, selection)
        wanted, wanted_dz, wanted_d_options, _ = gradients_and_rate(
            integer_loss, z[rest], targets[rest], options, cotangent[rest], {}
        )
        assert loss[1] == 0 and (dz[1] == 0).all() and rate[1] == 0
        np.testing.assert_allclose(loss[rest], wanted, 1e-6)
        np.testing.assert_allclose(dz[rest], wanted_dz, 1e-5, 1e-7)
        assert np.abs(wanted_dz).min() > 0
        for name in options:
            np.testing.assert_allclose(d_options[name], wanted_d_options[name], 1e-5, 1e-6, err_msg=name)
            assert np.isfinite(d_options[name]).all()


@each_content
@pytest.mark.parametrize("label", [1, K, -100])
def test_ignored_row_is_not_there(content, label):
    first = 1 if label != 1 else 2
    z, labels = logits(N, K).at[1].set(jnp.array(content)), jnp.array([first, label, 3, 4])
    assert_row_is_absent(z, labels, ignore_index=jnp.array(label))


@each_content
@each_mask
def test_masked_row_is_not_there(content, mask):
    z = logits(N, K).at[1].set(jnp.array(content))
    for label in (0, -1):
        assert_row_is_absent(z, jnp.array([1, label, 3, 4]), where=mask_of(mask))


@jax.jit
def dense_gradients(z, t, options, cotangent, where):
    loss, pullback = jax.vjp(lambda z, t, o: dense_loss(z, t, where=where, **o), z, t, options)
    return loss, *pullback(cotangent)


@each_content
@each_mask
def test_masked_row_of_dense_targets_is_not_there(content, mask):
    z, t = logits(N, K).at[1].set(jnp.array(content)), probabilities(N, K).at[:, 0].set(0).at[1].set(jnp.array(content))
    where, rest = mask_of(mask), np.array([0, 2, 3])
    for name in ("label_smoothing", "logit_cap", "z_loss"):
        options = {name: differentiable[name]}
        loss, dz, dt, d_options = dense_gradients(z, t, options, jnp.array([0.5, jnp.nan, -2.0, 1.0]), where)
        wanted, wanted_dz, wanted_dt, wanted_d_options = dense_gradients(
            z[rest], t[rest], options, jnp.array([0.5, -2.0, 1.0]), None
        )
        assert loss[1] == 0 and (dz[1] == 0).all() and (dt[1] == 0).all()
        np.testing.assert_allclose(loss[rest], wanted, 1e-6)
        np.testing.assert_allclose(dz[rest], wanted_dz, 1e-5, 1e-7)
        np.testing.assert_allclose(dt[rest], wanted_dt, 1e-5)
        np.testing.assert_allclose(d_options[name], wanted_d_options[name], 1e-5)


def test_everything_masked_or_ignored():
    z, labels = jnp.full((N, K), jnp.nan), jnp.full(N, -100)
    selections: list[dict[str, Any]] = [
        {"ignore_index": -100},
        {"where": jnp.zeros(N, bool)},
        {"where": jnp.zeros((1, K), bool)},
    ]
    for options in selections:
        loss, gradient = loss_and_gradient(integer_loss, z, labels, label_smoothing=0.1, z_loss=0.1, **options)
        assert (loss == 0).all() and (gradient == 0).all()
        statistics = jaxce.label_statistics(z, labels, **options)
        for value in statistics:
            assert (np.asarray(value) == 0).all()


# ------------------------------------------------------------------------------------------------------------- classes


@each_form
@each_option
def test_masked_classes_are_left_out(form, options):
    """Loss and gradient are those of the classes that are seen; the gradient of the others is exactly 0."""
    loss_fn, z, seen = LOSSES[form], logits(*ROWS), np.array([True, False, True, True, True, False, True])
    labels = jnp.array([0, 2, 3, 3, 0, 4])  # among the five that are seen
    t = probabilities(*ROWS)
    fewer = dict(options)
    if "class_weights" in options:
        fewer["class_weights"] = options["class_weights"][seen]
    wanted_of = (z[:, seen], labels if form == "integer" else t[:, seen])
    wanted = loss_and_gradient(loss_fn, *wanted_of, **fewer)
    assert_descends(loss_fn, *wanted_of, wanted[1], **fewer)

    poison = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3e38, 0.0, jnp.nan])[:, None]
    z, t = (jnp.where(seen, a, poison) for a in (z, t))
    targets = jnp.flatnonzero(jnp.asarray(seen), size=5)[labels] if form == "integer" else t
    loss, gradient = loss_and_gradient(loss_fn, z, targets, where=seen[None], **options)
    assert_close(loss, wanted[0], "float32")
    assert_close(gradient[:, seen], wanted[1], "float32")
    assert (gradient[:, ~seen] == 0).all()


@each_form
def test_each_row_may_mask_other_classes(form):
    """The masked row is the row of the classes that take part; targets of the others are taken as 0."""
    z, seen = logits(6, 5), np.random.default_rng(0).random((6, 5)) < 0.6
    seen[:, 2] = True
    targets = jnp.full(6, 2) if form == "integer" else probabilities(6, 5)
    loss, gradient = loss_and_gradient(LOSSES[form], jnp.where(seen, z, jnp.nan), targets, where=seen)
    for row in range(6):
        kept = np.flatnonzero(seen[row])
        fewer = np.array([kept.tolist().index(2)]) if form == "integer" else np.asarray(targets)[row : row + 1, kept]
        truth = exact(np.asarray(z)[row : row + 1, kept], fewer)
        assert_close(loss[row : row + 1], truth.loss, "float32")
        assert_close(gradient[row : row + 1, kept], truth.gradient, "float32")
        assert not np.delete(gradient[row], kept).any()


@pytest.mark.parametrize("options", ZERO_WEIGHT.values(), ids=ZERO_WEIGHT)
def test_masked_label_is_invalid(options):
    z, labels, where = logits(N, K), jnp.array([1, 2, 3, 4]), jnp.ones((N, K), bool).at[:, 0].set(False)
    valid = loss_and_gradient(integer_loss, z, labels, where=where, **options)
    loss, gradient = loss_and_gradient(integer_loss, z, labels, where=where.at[1, 2].set(False), **options)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    np.testing.assert_array_equal(gradient[1, [0, 2]], 0)  # classes that are not there
    assert np.isnan(gradient[1, [1, 3, 4]]).all()
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(loss[others], valid[0][others])
    np.testing.assert_array_equal(gradient[others], valid[1][others])


def test_class_mask_and_smoothing_smooth_over_unmasked_classes_only():
    z, where = logits(N, K), jnp.array([True, True, False, True, False])
    log_o = np.asarray(jax.nn.log_softmax(z[:, np.asarray(where)]), np.float64)  # of the three classes 0, 1, 3
    one_hot = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    smoothed = 0.7 * one_hot + 0.3 / 3
    gradient = np.zeros((N, K))
    gradient[:, np.asarray(where)] = np.exp(log_o) - smoothed
    integers = loss_and_gradient(
        integer_loss, z, jnp.array([0, 1, 3, 0]), where=where[None], label_smoothing=jnp.float32(0.3)
    )
    dense = jax.nn.one_hot(jnp.array([0, 1, 3, 0]), K)
    for loss, got in (integers, loss_and_gradient(dense_loss, z, dense, where=where[None], label_smoothing=0.3)):
        assert_close(loss, -(smoothed * log_o).sum(-1), "float32")
        assert_close(got, gradient, "float32")
