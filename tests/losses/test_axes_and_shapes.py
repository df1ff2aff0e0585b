"""Axes, shapes and the signature of the two losses; arguments that are wrong are in `test_errors`."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import (
    FORMS,
    LOSSES,
    assert_all_close,
    logits,
    loss_and_gradient,
    probabilities,
    random_labels,
    stable,
    targets_of,
)

each_form = pytest.mark.parametrize("form", FORMS)


def truth(z, targets) -> tuple[np.ndarray, np.ndarray]:
    """What `loss_and_gradient` should return where the classes are the last axis."""
    rows = stable(np.asarray(z), np.asarray(targets))
    return rows.loss, rows.gradient


def assert_same(got, wanted) -> None:
    assert all(np.asarray(w).any() for w in wanted)
    assert_all_close(got, wanted)


# ---------------------------------------------------------------------------------------------------------------- axes


@each_form
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_is_moveaxis(form, axis):
    z, targets = logits(3, 4, 5), targets_of(form, 3, 4, 5)
    wanted_loss, wanted_gradient = truth(z, targets)
    moved = targets if form == "integer" else jnp.moveaxis(targets, -1, axis)
    got = loss_and_gradient(LOSSES[form], jnp.moveaxis(z, -1, axis), moved, axis=axis)
    assert_same(got, (wanted_loss, np.moveaxis(wanted_gradient, -1, axis)))


@each_form
@pytest.mark.parametrize("axis", [(1, 2), (0, -1), (2, 0), (-1, -3), (1,), [0, 1], (0, 1, 2), None], ids=str)
def test_several_axes_are_one_flattened(form, axis):
    """In the order given: labels index the flattened classes."""
    shape = (3, 4, 5)
    axes = (0, 1, 2) if axis is None else tuple(a % 3 for a in axis)
    rows = tuple(a for a in range(3) if a not in axes)
    z = logits(*shape)
    flat = jnp.transpose(z, rows + axes).reshape(*(shape[a] for a in rows), -1)
    targets = targets_of(form, *flat.shape)
    inverse = np.argsort(rows + axes)

    def unflatten(array):
        return array.reshape([shape[a] for a in rows + axes]).transpose(inverse)

    wanted_loss, wanted_gradient = truth(flat, targets)
    loss_fn = partial(LOSSES[form], axis=axis)  # a list cannot be static
    got = loss_and_gradient(loss_fn, z, targets if form == "integer" else unflatten(targets))
    assert_same(got, (wanted_loss, unflatten(wanted_gradient)))


@each_form
def test_one_row_without_batch_axes(form):
    z, targets = logits(5), targets_of(form, 5)
    loss, gradient = loss_and_gradient(LOSSES[form], z, targets)
    assert loss.shape == () and gradient.shape == (5,)
    assert_same((loss, gradient), truth(z, targets))


# -------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "logits_shape, targets_shape",
    [
        ((3, 4, 5), (5,)),
        ((3, 4, 5), (4, 5)),
        ((3, 4, 5), (3, 1, 5)),
        ((5,), (4, 5)),
        ((1, 5), (4, 5)),
        ((3, 5), (3, 1)),
    ],
    ids=str,
)
def test_dense_targets_broadcast(logits_shape, targets_shape):
    """Against the logits as NumPy broadcasts, and gradients are summed where an argument was repeated."""
    z, targets = logits(*logits_shape), probabilities(*targets_shape)
    shape = np.broadcast_shapes(logits_shape, targets_shape)

    def gradients(z, t):
        loss, pullback = jax.vjp(LOSSES["dense"], z, t)
        return loss, *pullback(jnp.ones_like(loss))

    def summed(array, to):
        lead = array.ndim - len(to)
        axes = tuple(i for i, n in enumerate((1,) * lead + to) if n == 1 and array.shape[i] > 1)
        return array.sum(axes).reshape(to)

    loss, dz, dt = gradients(z, targets)
    full_logits, full_targets = np.broadcast_to(z, shape), np.broadcast_to(targets, shape)
    full_loss, full_dz = truth(full_logits, full_targets)
    full_dt = stable(full_logits, full_targets).log_normalizer[..., None] - full_logits
    assert_same((loss, dz, dt), (full_loss, summed(full_dz, logits_shape), summed(full_dt, targets_shape)))


@pytest.mark.parametrize("logits_shape, labels_shape", [((3, 4, 5), (1, 4)), ((3, 4, 5), (3, 1)), ((1, 4, 5), (3, 4))])
def test_integer_labels_broadcast(logits_shape, labels_shape):
    z, labels = logits(*logits_shape), random_labels(*labels_shape, classes=5)
    batch = np.broadcast_shapes(logits_shape[:-1], labels_shape)
    loss, gradient = loss_and_gradient(LOSSES["integer"], z, labels)
    full_loss, full_gradient = truth(np.broadcast_to(z, (*batch, 5)), np.broadcast_to(labels, batch))
    repeated = tuple(i for i, n in enumerate(logits_shape[:-1]) if n < batch[i])
    assert_same((loss, gradient), (full_loss, full_gradient.sum(repeated, keepdims=True)))


@each_form
@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows(form, batch):
    z, targets = logits(*batch, 5), targets_of(form, *batch, 5)
    for where in (None, np.ones(batch, bool), np.ones((*batch, 5), bool)):
        loss, gradient = loss_and_gradient(LOSSES[form], z, targets, where=where)
        assert loss.shape == batch and gradient.shape == (*batch, 5)
        assert loss.dtype == gradient.dtype == jnp.float32
    assert LOSSES[form](z, targets).sum() == 0


@each_form
def test_one_class(form):
    """o = 1: loss and gradient are exactly 0, at any logit; a dense target of 2 likewise."""
    z = jnp.array([[3.0], [-1e30], [0.1]])
    targets = jnp.zeros(3, jnp.int32) if form == "integer" else jnp.array([[1.0], [2.0], [0.5]])
    loss, gradient = loss_and_gradient(LOSSES[form], z, targets)
    np.testing.assert_array_equal(loss, np.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros((3, 1)))


# ------------------------------------------------------------------------------------------------------ beside optax's


@each_form
def test_positional_arguments_are_those_of_optax(form):
    optax = pytest.importorskip("optax")
    theirs = list(inspect.signature(getattr(optax, LOSSES[form].__name__)).parameters.values())
    ours = list(inspect.signature(LOSSES[form]).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def mask(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape) < 0.6


# Arguments where optax is right: ordinary logits, targets that sum to one, valid labels.
DROP_IN = {f"axis {axis}": (axis, None) for axis in (-1, 0, 1, (1, 2), (-1, 0))}
DROP_IN |= {"mask of rows": (-1, mask(3, 4)), "every class": (-1, np.ones((3, 4, 5), bool))}
FOR_DENSE = {"all axes": (None, None)}
FOR_INTEGER = {"mask of classes": (-1, mask(3, 4, 5) | (np.arange(5) == 0))}


@pytest.mark.parametrize(
    "form, name",
    [("dense", name) for name in DROP_IN | FOR_DENSE] + [("integer", name) for name in DROP_IN | FOR_INTEGER],
)
def test_drop_in_for_optax(form, name):
    optax = pytest.importorskip("optax")
    axis, where = (DROP_IN | FOR_DENSE | FOR_INTEGER)[name]
    z, targets = logits(3, 4, 5), probabilities(3, 4, 5)
    axes = tuple(range(3)) if axis is None else tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    if form == "dense":
        targets = targets / targets.sum(axes, keepdims=True)
    else:
        targets = jnp.zeros([n for i, n in enumerate(z.shape) if i not in axes], jnp.int32)
        targets = targets if where is not None else targets.at[1].set(2)
    peer = getattr(optax, LOSSES[form].__name__)
    got, wanted = (loss_and_gradient(f, z, targets, axis=axis, where=where) for f in (LOSSES[form], peer))
    assert_same(got, wanted)
