"""Arguments and options that are wrong: errors that name function, argument, what it got and what it wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ..helpers import FORMS, LOSSES, dense_loss, integer_loss, logits, probabilities

N, K = 4, 5
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


@pytest.mark.parametrize("form", FORMS)
def test_errors_are_the_same_under_jit(form):
    with pytest.raises(ValueError, match=f"^{LOSSES[form].__name__}: axis is 2, wanted axes of logits"):
        jax.jit(lambda z: LOSSES[form](z, LABELS if form == "integer" else DENSE, axis=2))(LOGITS)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": -0.1}, {"label_smoothing": 1.1}, {"logit_cap": 0.0}, {"logit_cap": -1}, {"z_loss": -1.0}],
)
@pytest.mark.parametrize("loss_fn", [dense_loss, integer_loss])
def test_option_out_of_range(loss_fn, option):
    z = logits(N, K)
    labels = jnp.zeros(N, jnp.int32) if loss_fn is integer_loss else probabilities(N, K)
    ((name, value),) = option.items()

    def static(z, y):
        return loss_fn(z, y, **option)

    for call in (static, jax.jit(static)):
        with pytest.raises(ValueError, match=f"{loss_fn.__name__}: {name} is {value}, wanted a number in "):
            call(z, labels)
    traced = jax.jit(lambda z, o: loss_fn(z, labels, **o))(z, {name: jnp.float32(value)})
    assert np.isnan(traced).all()
    with pytest.raises(ValueError, match=name):
        loss_fn(z, labels, **{name: float("nan")})
