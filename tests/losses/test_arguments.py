"""Arguments of the two losses: axes, masks, shapes and dtypes that are right, and the errors of those that are not."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import oracle

LOSSES = {"integer": jaxce.softmax_cross_entropy_with_integer_labels, "dense": jaxce.softmax_cross_entropy}
forms = pytest.mark.parametrize("form", LOSSES)


def arrays(form: str, batch: tuple[int, ...], classes: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Logits [*batch, classes] and targets of this form, labels [*batch] or dense [*batch, classes]."""
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.standard_normal((*batch, classes)), jnp.float32)
    if form == "integer":
        return logits, jnp.asarray(rng.integers(classes, size=batch), jnp.int32)
    return logits, jnp.asarray(rng.dirichlet(np.ones(classes), batch), jnp.float32)


def with_gradient(loss, logits, targets, *args, **kwargs) -> tuple[jax.Array, jax.Array]:
    """The losses, and the gradient of their sum with respect to the logits."""

    @jax.jit
    def run(logits, targets):
        losses, pullback = jax.vjp(lambda z: loss(z, targets, *args, **kwargs), logits)
        return losses, pullback(jnp.ones_like(losses))[0]

    return run(logits, targets)


def truth(logits, targets) -> tuple[np.ndarray, np.ndarray]:
    """What `with_gradient` should return where the classes are the last axis."""
    rows = oracle.stable(np.asarray(logits), np.asarray(targets))
    return rows.loss, rows.gradient


def assert_same(got, wanted) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert np.asarray(w).any()
        oracle.assert_close(g, w, "float32")


# ---------------------------------------------------------------------------------------------------------------- axes


@forms
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_is_moveaxis(form, axis):
    logits, targets = arrays(form, (3, 4), 5)
    wanted_loss, wanted_gradient = truth(logits, targets)
    moved = targets if form == "integer" else jnp.moveaxis(targets, -1, axis)
    got = with_gradient(LOSSES[form], jnp.moveaxis(logits, -1, axis), moved, axis)
    assert_same(got, (wanted_loss, np.moveaxis(wanted_gradient, -1, axis)))


@forms
@pytest.mark.parametrize("axis", [(1, 2), (0, -1), (2, 0), (-1, -3), (1,), [0, 1], (0, 1, 2), None], ids=str)
def test_several_axes_are_one_flattened(form, axis):
    """In the order given: labels index the flattened classes."""
    shape = (3, 4, 5)
    axes = (0, 1, 2) if axis is None else tuple(a % 3 for a in axis)
    rows = tuple(a for a in range(3) if a not in axes)
    logits, _ = arrays(form, (3, 4), 5)
    flat = jnp.transpose(logits, rows + axes).reshape(*(shape[a] for a in rows), -1)
    _, targets = arrays(form, flat.shape[:-1], flat.shape[-1])
    inverse = np.argsort(rows + axes)

    def unflatten(array):
        return array.reshape([shape[a] for a in rows + axes]).transpose(inverse)

    wanted_loss, wanted_gradient = truth(flat, targets)
    got = with_gradient(LOSSES[form], logits, targets if form == "integer" else unflatten(targets), axis)
    assert_same(got, (wanted_loss, unflatten(wanted_gradient)))


@forms
def test_one_row_without_batch_axes(form):
    logits, targets = arrays(form, (), 5)
    loss, gradient = with_gradient(LOSSES[form], logits, targets)
    assert loss.shape == () and gradient.shape == (5,)
    assert_same((loss, gradient), truth(logits, targets))


# --------------------------------------------------------------------------------------------------------------- masks


def mask(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.6


@forms
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_mask_of_rows_is_leaving_them_out(form, axis):
    """Loss 0 and gradient exactly 0, NaN or an invalid label notwithstanding; the other rows are as without a mask."""
    logits, targets = arrays(form, (3, 4), 5)
    kept = mask((3, 4))
    assert 0 < kept.sum() < kept.size
    wanted_loss, wanted_gradient = truth(logits, targets)
    poison = jnp.where(kept[..., None], logits, jnp.nan)
    targets = jnp.where(kept, targets, 77) if form == "integer" else jnp.where(kept[..., None], targets, jnp.inf)
    moved = targets if form == "integer" else jnp.moveaxis(targets, -1, axis)
    loss, gradient = with_gradient(LOSSES[form], jnp.moveaxis(poison, -1, axis), moved, axis, kept)
    wanted = np.where(kept, wanted_loss, 0), np.where(kept[..., None], wanted_gradient, 0)
    assert_same((loss, jnp.moveaxis(gradient, axis, -1)), wanted)
    assert not np.asarray(loss)[~kept].any() and not np.moveaxis(np.asarray(gradient), axis, -1)[~kept].any()


@forms
@pytest.mark.parametrize("shape", [(6, 5), (1, 5)], ids=str)
def test_mask_of_classes_is_leaving_them_out(form, shape):
    """Row by row: the masked row is the row of the classes that take part, whatever the others hold."""
    logits, targets = arrays(form, (6,), 5)
    seen = mask(shape)
    seen[:, 2] = True
    rows = np.broadcast_to(seen, (6, 5))
    targets = jnp.full(6, 2) if form == "integer" else targets
    poison = jnp.where(rows, logits, jnp.nan)
    loss, gradient = with_gradient(LOSSES[form], poison, targets, where=seen)
    for row in range(6):
        kept = np.flatnonzero(rows[row])
        fewer = np.array([kept.tolist().index(2)]) if form == "integer" else np.asarray(targets)[row : row + 1, kept]
        truth = oracle.exact(np.asarray(logits)[row : row + 1, kept], fewer)
        oracle.assert_close(loss[row : row + 1], truth.loss, "float32")
        oracle.assert_close(gradient[row : row + 1, kept], truth.gradient, "float32")
        assert not np.delete(np.asarray(gradient)[row], kept).any()


@forms
def test_row_with_all_classes_masked_is_zero(form):
    logits, targets = arrays(form, (3,), 5)
    seen = jnp.ones((3, 5), bool).at[1].set(False)
    loss, gradient = with_gradient(LOSSES[form], logits, targets, where=seen)
    assert loss[1] == 0 and not gradient[1].any()
    assert loss[0] > 0 and gradient[0].any()


def test_masked_label_is_invalid():
    logits, labels = arrays("integer", (3,), 5)
    seen = jnp.ones((3, 5), bool).at[1, labels[1]].set(False)
    loss, gradient = with_gradient(LOSSES["integer"], logits, labels, where=seen)
    np.testing.assert_array_equal(jnp.isnan(loss), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(gradient).any(-1), [False, True, False])


def test_dense_target_of_a_masked_class_is_zero():
    logits, targets = arrays("dense", (3,), 5)
    seen = mask((3, 5), seed=1)
    got = with_gradient(LOSSES["dense"], logits, targets, where=seen)
    impossible = jnp.where(seen, logits, -jnp.inf)
    assert_same(got, truth(impossible, jnp.where(seen, targets, 0)))


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
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal(logits_shape), jnp.float32)
    targets = jnp.asarray(rng.uniform(0.1, 1, targets_shape), jnp.float32)
    shape = np.broadcast_shapes(logits_shape, targets_shape)

    def gradients(z, t):
        loss, pullback = jax.vjp(LOSSES["dense"], z, t)
        return loss, *pullback(jnp.ones_like(loss))

    def summed(array, to):
        lead = array.ndim - len(to)
        axes = tuple(i for i, n in enumerate((1,) * lead + to) if n == 1 and array.shape[i] > 1)
        return array.sum(axes).reshape(to)

    loss, dz, dt = gradients(logits, targets)
    full_logits, full_targets = np.broadcast_to(logits, shape), np.broadcast_to(targets, shape)
    full_loss, full_dz = truth(full_logits, full_targets)
    full_dt = oracle.stable(full_logits, full_targets).log_normalizer[..., None] - full_logits
    assert_same((loss, dz, dt), (full_loss, summed(full_dz, logits_shape), summed(full_dt, targets_shape)))


@pytest.mark.parametrize("logits_shape, labels_shape", [((3, 4, 5), (1, 4)), ((3, 4, 5), (3, 1)), ((1, 4, 5), (3, 4))])
def test_integer_labels_broadcast(logits_shape, labels_shape):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal(logits_shape), jnp.float32)
    labels = jnp.asarray(rng.integers(5, size=labels_shape), jnp.int32)
    batch = np.broadcast_shapes(logits_shape[:-1], labels_shape)
    loss, gradient = with_gradient(LOSSES["integer"], logits, labels)
    full_loss, full_gradient = truth(np.broadcast_to(logits, (*batch, 5)), np.broadcast_to(labels, batch))
    repeated = tuple(i for i, n in enumerate(logits_shape[:-1]) if n < batch[i])
    assert_same((loss, gradient), (full_loss, full_gradient.sum(repeated, keepdims=True)))


@forms
@pytest.mark.parametrize("batch", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_rows(form, batch):
    logits, targets = jnp.zeros((*batch, 5)), jnp.zeros(batch if form == "integer" else (*batch, 5))
    targets = targets.astype(jnp.int32) if form == "integer" else targets
    for where in (None, np.ones(batch, bool), np.ones((*batch, 5), bool)):
        loss, gradient = with_gradient(LOSSES[form], logits, targets, where=where)
        assert loss.shape == batch and gradient.shape == (*batch, 5)
        assert loss.dtype == gradient.dtype == jnp.float32
    assert LOSSES[form](logits, targets).sum() == 0


@forms
def test_one_class(form):
    """o = 1: loss and gradient are exactly 0, at any logit; a dense target of 2 likewise."""
    logits = jnp.array([[3.0], [-1e30], [0.1]])
    targets = jnp.zeros(3, jnp.int32) if form == "integer" else jnp.array([[1.0], [2.0], [0.5]])
    loss, gradient = with_gradient(LOSSES[form], logits, targets)
    np.testing.assert_array_equal(loss, np.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros((3, 1)))


@forms
def test_numpy_arrays_and_lists(form):
    logits, targets = arrays(form, (3,), 5)
    wanted = LOSSES[form](logits, targets)
    np.testing.assert_array_equal(LOSSES[form](np.asarray(logits), np.asarray(targets)), wanted)
    dense_or_labels = np.asarray(targets).tolist()
    np.testing.assert_allclose(LOSSES[form](logits, jnp.asarray(dense_or_labels)), wanted, rtol=1e-6)


@forms
@pytest.mark.parametrize("dtype, wanted", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")])
def test_dtypes(form, dtype, wanted):
    logits, targets = arrays(form, (3,), 5)
    loss, gradient = with_gradient(LOSSES[form], logits.astype(dtype), targets)
    assert (loss.dtype, gradient.dtype) == (jnp.dtype(wanted), jnp.dtype(dtype))


# ------------------------------------------------------------------------------------------------------ beside optax's


@forms
def test_positional_arguments_are_those_of_optax(form):
    optax = pytest.importorskip("optax")
    theirs = list(inspect.signature(getattr(optax, LOSSES[form].__name__)).parameters.values())
    ours = list(inspect.signature(LOSSES[form]).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def drop_in_cases():
    """Arguments where optax is right: ordinary logits, targets that sum to one, valid labels."""
    some_rows, all_classes = mask((3, 4)), np.ones((3, 4, 5), bool)
    some_classes = mask((3, 4, 5))
    for form in LOSSES:
        for axis in (-1, 0, 1, (1, 2), (-1, 0)):
            yield form, axis, None
        if form == "dense":
            yield form, None, None
        yield form, -1, some_rows
        yield form, -1, all_classes
        if form == "integer":
            some_classes[..., 0] = True
            yield form, -1, some_classes


@pytest.mark.parametrize("form, axis, where", list(drop_in_cases()))
def test_drop_in_for_optax(form, axis, where):
    optax = pytest.importorskip("optax")
    logits, targets = arrays("dense", (3, 4), 5)
    axes = tuple(range(3)) if axis is None else tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    if form == "dense":
        targets = targets / targets.sum(axes, keepdims=True)
    else:
        targets = jnp.zeros([n for i, n in enumerate(logits.shape) if i not in axes], jnp.int32)
        targets = targets if where is not None else targets.at[1].set(2)
    got = with_gradient(LOSSES[form], logits, targets, axis, where)
    wanted = with_gradient(getattr(optax, LOSSES[form].__name__), logits, targets, axis, where)
    assert_same(got, wanted)


# -------------------------------------------------------------------------------------------------------------- errors

LOGITS, LABELS, DENSE = jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32), jnp.zeros((3, 4))
NOT_CLASSES = "a shape that broadcasts against logits (3, 4) and keeps their classes"
NOT_MASK = "a shape that broadcasts to (3, 4) (a mask of classes) or (3,) (of rows), with as many axes"
NOT_ROWS = "(3,), that of logits without their class axes"

# Logits, targets, keywords, the error, and its message after the function's name; `None`: this form's good targets.
BOTH_ERRORS = [
    (jnp.zeros((3, 4), jnp.int32), None, {}, TypeError, "logits is of dtype int32, wanted a floating dtype"),
    (jnp.zeros((3, 4), bool), None, {}, TypeError, "logits is of dtype bool, wanted a floating dtype"),
    (jnp.zeros((3, 4), "complex64"), None, {}, TypeError, "logits is of dtype complex64, wanted a floating dtype"),
    ("logits", None, {}, TypeError, "logits is str, wanted an array"),
    (None, None, {}, TypeError, "logits is NoneType, wanted an array"),
    ([[1.0, 2.0], [3.0]], None, {}, TypeError, "logits is list, wanted an array"),
    (LOGITS, None, {"axis": 2}, ValueError, "axis is 2, wanted axes of logits, which have shape (3, 4)"),
    (LOGITS, None, {"axis": -3}, ValueError, "axis is -3, wanted axes of logits, which have shape (3, 4)"),
    (LOGITS, None, {"axis": (0, 5)}, ValueError, "axis is (0, 5), wanted axes of logits, which have shape (3, 4)"),
    (
        LOGITS,
        None,
        {"axis": (1, -1)},
        ValueError,
        "axis is (1, -1), wanted distinct axes of logits, which have shape (3, 4)",
    ),
    (LOGITS, None, {"axis": ()}, ValueError, "axis is (), wanted distinct axes of logits, which have shape (3, 4)"),
    (LOGITS, None, {"axis": 1.0}, TypeError, "axis is 1.0, wanted an int, a tuple of ints or None"),
    (LOGITS, None, {"axis": True}, TypeError, "axis is True, wanted an int, a tuple of ints or None"),
    (LOGITS, None, {"axis": "-1"}, TypeError, "axis is '-1', wanted an int, a tuple of ints or None"),
    (jnp.zeros(()), None, {}, ValueError, "axis is -1, wanted axes of logits, which have shape ()"),
    (LOGITS, None, {"where": jnp.ones((3, 4))}, TypeError, "where is of dtype float32, wanted dtype bool"),
    (LOGITS, None, {"where": jnp.ones((2, 4), bool)}, ValueError, f"where is of shape (2, 4), wanted {NOT_MASK}"),
    (LOGITS, None, {"where": jnp.ones(4, bool)}, ValueError, f"where is of shape (4,), wanted {NOT_MASK}"),
    (LOGITS, None, {"where": jnp.ones((), bool)}, ValueError, f"where is of shape (), wanted {NOT_MASK}"),
]
INTEGER_ERRORS = [
    (LOGITS, jnp.zeros(3), {}, TypeError, "labels is of dtype float32, wanted an integer dtype"),
    (LOGITS, jnp.zeros(3, bool), {}, TypeError, "labels is of dtype bool, wanted an integer dtype"),
    (LOGITS, "label", {}, TypeError, "labels is str, wanted an array"),
    (LOGITS, jnp.zeros(4, jnp.int32), {}, ValueError, f"labels is of shape (4,), wanted {NOT_ROWS}"),
    (LOGITS, jnp.zeros((3, 4), jnp.int32), {}, ValueError, f"labels is of shape (3, 4), wanted {NOT_ROWS}"),
    (LOGITS, jnp.zeros((), jnp.int32), {}, ValueError, f"labels is of shape (), wanted {NOT_ROWS}"),
    (jnp.zeros((3, 0)), LABELS, {}, ValueError, "logits is of shape (3, 0), wanted at least one class along axis -1"),
]
DENSE_ERRORS = [
    (LOGITS, jnp.zeros((3, 4), "complex64"), {}, TypeError, "labels is of dtype complex64, wanted a real dtype"),
    (LOGITS, "labels", {}, TypeError, "labels is str, wanted an array"),
    (LOGITS, jnp.zeros((2, 4)), {}, ValueError, f"labels is of shape (2, 4), wanted {NOT_CLASSES}"),
    (LOGITS, jnp.zeros(3), {}, ValueError, f"labels is of shape (3,), wanted {NOT_CLASSES}"),
    (jnp.zeros((3, 1)), DENSE, {}, ValueError, f"labels is of shape (3, 4), wanted {NOT_CLASSES.replace('4', '1')}"),
    (
        jnp.zeros((3, 0)),
        jnp.zeros((3, 0)),
        {},
        ValueError,
        "logits is of shape (3, 0), wanted at least one class along axis -1",
    ),
]
ERRORS = [
    *(("integer", *case) for case in BOTH_ERRORS + INTEGER_ERRORS),
    *(("dense", *case) for case in BOTH_ERRORS + DENSE_ERRORS),
]


@pytest.mark.parametrize(
    "form, logits, targets, keywords, error, message", ERRORS, ids=[f"{c[0]}: {c[-1]}" for c in ERRORS]
)
def test_errors_name_function_argument_got_and_wanted(form, logits, targets, keywords, error, message):
    loss = LOSSES[form]
    targets = (LABELS if form == "integer" else DENSE) if targets is None else targets
    with pytest.raises(error, match=f"^{re.escape(f'{loss.__name__}: {message}')}$"):
        loss(logits, targets, **keywords)


@forms
def test_errors_are_the_same_under_jit(form):
    with pytest.raises(ValueError, match=f"^{LOSSES[form].__name__}: axis is 2, wanted axes of logits"):
        jax.jit(lambda z: LOSSES[form](z, LABELS if form == "integer" else DENSE, axis=2))(LOGITS)


@pytest.mark.parametrize(
    "labels, classes, keywords, error, message",
    [
        (jnp.zeros(3), 5, {}, TypeError, "labels is of dtype float32, wanted an integer dtype"),
        (LABELS, 0, {}, ValueError, "num_classes is 0, wanted at least 1"),
        (
            LABELS,
            5,
            {"where": jnp.ones(7, bool)},
            ValueError,
            f"where is of shape (7,), wanted {LABELS.shape}, as labels",
        ),
        (LABELS, 5, {"where": LABELS}, TypeError, "where is of dtype int32, wanted dtype bool"),
    ],
)
def test_errors_of_check_labels(labels, classes, keywords, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'check_labels: {message}')}$"):
        jaxce.check_labels(labels, classes, **keywords)
