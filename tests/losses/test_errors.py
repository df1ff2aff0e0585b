"""Arguments and options that are wrong: errors that name function, argument, what it got and what it wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import softmax_cross_entropy_with_top_k_labels

from ..helpers import FORMS, LOSSES, dense_loss, integer_loss, logits, probabilities

N, K = 4, 5
LOGITS, LABELS, DENSE = jnp.zeros((3, 4)), jnp.zeros(3, jnp.int32), jnp.zeros((3, 4))
NOT_CLASSES = "a shape that broadcasts against logits (3, 4) and keeps their classes"
NOT_MASK = "a shape that broadcasts to (3, 4) (a mask of classes) or (3,) (of rows), with as many axes"
NOT_ROWS = "(3,), that of logits without their class axes"
NOT_ARRAY = "wanted an array; JAX says: "

# Logits, targets, keywords, the error, and its message after the function's name; `None`: this form's good targets.
BOTH_ERRORS = [
    (jnp.zeros((3, 4), jnp.int32), None, {}, TypeError, "logits is of dtype int32, wanted a floating dtype"),
    (jnp.zeros((3, 4), bool), None, {}, TypeError, "logits is of dtype bool, wanted a floating dtype"),
    (jnp.zeros((3, 4), "complex64"), None, {}, TypeError, "logits is of dtype complex64, wanted a floating dtype"),
    ("logits", None, {}, TypeError, f"logits is str, {NOT_ARRAY}Value 'logits' with dtype"),
    (None, None, {}, TypeError, f"logits is NoneType, {NOT_ARRAY}None is not"),
    ([[1.0, 2.0], [3.0]], None, {}, TypeError, f"logits is list, {NOT_ARRAY}setting an array element with a sequence"),
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
    (LOGITS, None, {"axis": jnp.float32(1.9)}, TypeError, "axis is Array(1.9, dtype=float32), wanted an int, a"),
    (LOGITS, None, {"axis": np.array([1])}, TypeError, "axis is array([1]), wanted an int, a tuple of ints or None"),
    (LOGITS, None, {"axis": 2**70}, ValueError, f"axis is {2**70}, wanted axes of logits, which have shape (3, 4)"),
    (LOGITS, None, {"axis_name": "shards"}, ValueError, "axis_name is 'shards', wanted a mesh axis of the jax"),
    (LOGITS, None, {"axis_name": ()}, ValueError, "axis_name is (), wanted a mesh axis of the jax.shard_map"),
    (LOGITS, None, {"axis_name": ["a"]}, ValueError, "axis_name is ['a'], wanted a mesh axis of the jax.shard_map"),
    (LOGITS, None, {"axis_name": 1}, ValueError, "axis_name is 1, wanted a mesh axis of the jax.shard_map"),
    (LOGITS, None, {"label_smoothing": True}, TypeError, "label_smoothing is of dtype bool, wanted a number"),
    (LOGITS, None, {"label_smoothing": False}, TypeError, "label_smoothing is of dtype bool, wanted a number"),
    (LOGITS, None, {"logit_cap": np.True_}, TypeError, "logit_cap is of dtype bool, wanted a number"),
    (LOGITS, None, {"z_loss": jnp.array(True)}, TypeError, "z_loss is of dtype bool, wanted a number"),
    (LOGITS, None, {"logit_cap": 3.5e38}, ValueError, "logit_cap is 3.5e+38, wanted a number in (0, inf)"),
    (LOGITS, None, {"logit_cap": 1e-46}, ValueError, "logit_cap is 1e-46, wanted a number in (0, inf)"),
    (LOGITS, None, {"z_loss": 10**400}, ValueError, f"z_loss is int, {NOT_ARRAY}int too large"),
]
# What JAX refuses as an array, and what the message says of it.
NO_ARRAYS = {
    "objects": (np.array([1, 2, 0], object), "ndarray of dtype object"),
    "strings": (np.array(["a", "b", "c"]), "ndarray of dtype <U1"),
    "longdouble": (np.array([1, 2, 0], np.longdouble), f"ndarray of dtype {np.dtype(np.longdouble)}"),
    "masked integers": (np.ma.array([1, 2, 0], mask=[False, True, False]), "MaskedArray of dtype int64"),
    "masked floats": (np.ma.array([1.0, 2, 0], mask=[False, True, False]), "MaskedArray of dtype float64"),
    "ragged": ([[1], [1, 2]], "list"),
    "beyond 32 bits": ([1, 2**32, 0], "list"),
    "beyond 64 bits": ([1, 2**70, 0], "list"),
}
INTEGER_ERRORS = [
    (LOGITS, jnp.zeros(3), {}, TypeError, "labels is of dtype float32, wanted an integer dtype"),
    (LOGITS, jnp.zeros(3, bool), {}, TypeError, "labels is of dtype bool, wanted an integer dtype"),
    (LOGITS, "label", {}, TypeError, f"labels is str, {NOT_ARRAY}Value 'label"),
    (LOGITS, jnp.zeros(4, jnp.int32), {}, ValueError, f"labels is of shape (4,), wanted {NOT_ROWS}"),
    (LOGITS, jnp.zeros((3, 4), jnp.int32), {}, ValueError, f"labels is of shape (3, 4), wanted {NOT_ROWS}"),
    (LOGITS, jnp.zeros((), jnp.int32), {}, ValueError, f"labels is of shape (), wanted {NOT_ROWS}"),
    (LOGITS, None, {"ignore_index": 2**70}, ValueError, f"ignore_index is int, {NOT_ARRAY}Python int"),
    (LOGITS, None, {"ignore_index": True}, TypeError, "ignore_index is of dtype bool, wanted an integer dtype"),
    (LOGITS, None, {"ignore_index": [1, 2]}, ValueError, "ignore_index is of shape (2,), wanted (), a scalar"),
    (jnp.zeros((3, 0)), LABELS, {}, ValueError, "logits is of shape (3, 0), wanted at least one class along axis -1"),
]
DENSE_ERRORS = [
    (LOGITS, jnp.zeros((3, 4), "complex64"), {}, TypeError, "labels is of dtype complex64, wanted a real dtype"),
    (LOGITS, "labels", {}, TypeError, f"labels is str, {NOT_ARRAY}Value 'label"),
    (LOGITS, jnp.zeros((2, 4)), {}, ValueError, f"labels is of shape (2, 4), wanted {NOT_CLASSES}"),
    (LOGITS, jnp.zeros(3), {}, ValueError, f"labels is of shape (3,), wanted {NOT_CLASSES}"),
    (
        jnp.zeros((4, 4)),
        jnp.arange(4),
        {},
        ValueError,
        "labels is of an integer dtype and shape (4,), wanted as many axes as logits (4, 4), or for class ids "
        "softmax_cross_entropy_with_integer_labels",
    ),
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
    end = "" if NOT_ARRAY in message or "axis" in message else "$"
    with pytest.raises(error, match=f"^{re.escape(f'{loss.__name__}: {message}')}{end}"):
        loss(logits, targets, **keywords)


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_what_is_no_array_is_described_and_jax_quoted(name):
    value, described = NO_ARRAYS[name]
    for argument, call in {
        "labels": lambda: integer_loss(LOGITS, value),
        "logits": lambda: integer_loss(value, LABELS),
        "where": lambda: dense_loss(LOGITS, DENSE, where=value),
        "class_weights": lambda: dense_loss(LOGITS, DENSE, class_weights=value),
        "ignore_index": lambda: integer_loss(LOGITS, LABELS, ignore_index=value),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f": {argument} is {described}, {NOT_ARRAY}."):
            call()


IDS = jnp.zeros((3, 2), jnp.int32)


@pytest.mark.parametrize(
    "ids, targets, keywords, error, message",
    [
        (IDS.astype("float32"), IDS, {}, TypeError, "class_ids is of dtype float32, wanted an integer dtype"),
        (IDS, IDS.astype("complex64"), {}, TypeError, "targets is of dtype complex64, wanted a real dtype"),
        (IDS[0], IDS, {}, ValueError, "class_ids is of shape (2,), wanted (3, 2), that of the rows and one axis more"),
        (
            IDS[:2],
            IDS,
            {},
            ValueError,
            "class_ids is of shape (2, 2), wanted (3, 2), that of the rows and one axis more",
        ),
        (IDS, IDS[:, :1], {}, ValueError, "targets is of shape (3, 1), wanted (3, 2), as class_ids"),
        (IDS, IDS, {"axis": 2}, ValueError, "axis is 2, wanted axes of logits, which have shape (3, 4)"),
        (IDS, IDS, {"where": jnp.ones(4, bool)}, ValueError, f"where is of shape (4,), wanted {NOT_MASK}"),
        (IDS, IDS, {"tail": "False"}, ValueError, "tail is 'False', wanted a bool"),
        (IDS, IDS, {"tail": None}, ValueError, "tail is None, wanted a bool"),
        (IDS, IDS, {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5, wanted a number in [0, 1]"),
    ],
)
def test_errors_of_top_k_labels(ids, targets, keywords, error, message):
    with pytest.raises(error, match=f"^{re.escape(f'softmax_cross_entropy_with_top_k_labels: {message}')}$"):
        softmax_cross_entropy_with_top_k_labels(LOGITS, ids, targets, **keywords)


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
    for concrete in map(jnp.dtype, ("float32", "float64", "bfloat16", "int8")):
        given = np.asarray(np.sign(value) * np.ceil(abs(value)), concrete)  # 2 and −1, which int8 has too
        for o in (given, given[()], *([jnp.asarray(given)] if concrete.itemsize < 8 else ())):
            for transform in (lambda f: f, jax.jit):
                with pytest.raises(ValueError, match=f"{name} is .*, wanted a number in "):
                    transform(lambda z, o=o: loss_fn(z, labels, **{name: o}))(z)
    traced = jax.jit(lambda z, o: loss_fn(z, labels, **o))(z, {name: jnp.float32(value)})
    assert np.isnan(traced).all()
    with pytest.raises(ValueError, match=name):
        loss_fn(z, labels, **{name: float("nan")})
