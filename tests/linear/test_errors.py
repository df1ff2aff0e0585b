"""Arguments of the functions of a linear layer that are wrong."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import fused_linear, linear_cross_entropy, linear_label_statistics

from ..helpers import head

X, W, Y = head(4, 3, 5)


OBJECTS = np.zeros((3, 5), object)


def row_loss(logits, labels):
    return logits[:, 0] * labels


def wrong(argument: Any) -> Any:
    return argument


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x is of dtype int32", lambda: linear_cross_entropy(X.astype(jnp.int32), W, Y)),
        (TypeError, "w is of dtype int32", lambda: linear_cross_entropy(X, W.astype(jnp.int32), Y)),
        (ValueError, r"labels is of shape \(4,\), wanted \(4, 5\)", lambda: linear_cross_entropy(X, W, X[:, 0])),
        (TypeError, "labels is of dtype bool", lambda: linear_cross_entropy(X, W, Y > 0)),
        (ValueError, "labels is a tuple of 3", lambda: linear_cross_entropy(X, W, wrong((Y, Y, Y)))),
        (TypeError, "class_ids is of dtype float32", lambda: linear_cross_entropy(X, W, (X, X))),
        (ValueError, r"class_ids is of shape \(4,\), wanted \(4, 4\)", lambda: linear_cross_entropy(X, W, (Y, X))),
        (ValueError, r"targets is of shape \(4, 3\)", lambda: linear_cross_entropy(X, W, (Y[:, None], X))),
        (ValueError, "tail is True", lambda: linear_cross_entropy(X, W, Y, tail=True)),
        (ValueError, "tail is 'no'", lambda: linear_cross_entropy(X, W, Y, tail=wrong("no"))),
        (ValueError, "ignore_index is 0", lambda: linear_cross_entropy(X, W, jnp.ones((4, 5)), ignore_index=0)),
        (TypeError, "dtype is", lambda: linear_cross_entropy(X, W, Y, dtype=jnp.int32)),
        (ValueError, r"x is of shape \(4, 3\), wanted \[..., 5\]", lambda: linear_cross_entropy(X, W, Y, class_axis=0)),
        (ValueError, r"w is of shape \(3,\)", lambda: linear_cross_entropy(X, W[:, 0], Y)),
        (ValueError, "at least one class", lambda: linear_cross_entropy(X, W[:, :0], Y)),
        (ValueError, r"labels is of shape \(3,\)", lambda: linear_cross_entropy(X, W, Y[:3])),
        (ValueError, r"labels is of shape \(4, 1\)", lambda: linear_cross_entropy(X, W, Y[:, None])),
        (ValueError, r"bias is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, bias=X[:, 0])),
        (ValueError, r"weights is of shape \(5,\)", lambda: linear_cross_entropy(X, W, Y, weights=W[0])),
        (ValueError, r"normalizer is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, normalizer=X[:, 0])),
        (ValueError, "normalizer is given", lambda: linear_cross_entropy(X, W, Y, reduction="sum", normalizer=2.0)),
        (ValueError, "reduction is 'max'", lambda: linear_cross_entropy(X, W, Y, reduction=wrong("max"))),
        (ValueError, "class_axis is 1", lambda: linear_cross_entropy(X, W, Y, class_axis=1)),
        (ValueError, "block_size is 0", lambda: linear_cross_entropy(X, W, Y, block_size=0)),
        (ValueError, "block_size is -1", lambda: linear_cross_entropy(X, W, Y, block_size=-1, recompute=True)),
        (TypeError, "class_mask is of dtype int32", lambda: linear_cross_entropy(X, W, Y, class_mask=Y)),
        (ValueError, r"class_mask is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, class_mask=Y > 0)),
        (
            ValueError,
            r"class_mask is of shape \(1, 5\)",
            lambda: linear_label_statistics(X, W, Y, class_mask=W[:1] > 0),
        ),
        (TypeError, "labels is of dtype float32", lambda: linear_label_statistics(X, W, Y.astype(jnp.float32))),
        (ValueError, r"labels is of shape \(3,\)", lambda: linear_label_statistics(X, W, Y[:3])),
        (ValueError, r"x is of shape \(4, 3\)", lambda: linear_label_statistics(X, W, Y, class_axis=0)),
        (ValueError, "class_axis is 1", lambda: linear_label_statistics(X, W, Y, class_axis=1)),
        (ValueError, "block_size is 0", lambda: linear_label_statistics(X, W, Y, block_size=0)),
        (ValueError, "logit_cap is 0", lambda: linear_label_statistics(X, W, Y, logit_cap=0.0)),
        (ValueError, "label_smoothing is 2", lambda: linear_cross_entropy(X, W, Y, label_smoothing=2.0)),
        (ValueError, r"class_weights is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, class_weights=X[:, 0])),
        (TypeError, "class_axis is False", lambda: linear_cross_entropy(X, W, Y, class_axis=False)),
        (TypeError, "class_axis is array", lambda: linear_cross_entropy(X, W, Y, class_axis=wrong(np.zeros(2)))),
        (TypeError, "block_size is True, wanted a pos", lambda: linear_cross_entropy(X, W, Y, block_size=True)),
        (TypeError, "block_size is 2.0", lambda: linear_cross_entropy(X, W, Y, block_size=wrong(2.0))),
        (ValueError, "recompute is 'yes', wanted a b", lambda: linear_cross_entropy(X, W, Y, recompute=wrong("yes"))),
        (ValueError, "recompute is 1, wanted a bool", lambda: linear_cross_entropy(X, W, Y, recompute=wrong(1))),
        (ValueError, "reduction is array", lambda: linear_cross_entropy(X, W, Y, reduction=wrong(np.zeros(2)))),
        (TypeError, "dtype is 'abc', wanted a floating", lambda: linear_cross_entropy(X, W, Y, dtype="abc")),
        (ValueError, "axis_name is 'a', wanted a mesh axis", lambda: linear_cross_entropy(X, W, Y, axis_name="a")),
        (TypeError, "normalizer is of dtype bool", lambda: linear_cross_entropy(X, W, Y, normalizer=True)),
        (ValueError, "label_smoothing is 2", lambda: linear_cross_entropy(X, W, Y, label_smoothing=np.int64(2))),
        (ValueError, r"for w \(5, 3\) \(or class_axis=0\)", lambda: linear_cross_entropy(X, W.T, Y)),
        (ValueError, r"for w \(3, 5\) \(or class_axis=-1\)", lambda: linear_cross_entropy(X, W, Y, class_axis=0)),
        (
            TypeError,
            "w is ndarray of dtype object, wanted an array; JAX",
            lambda: linear_cross_entropy(X, OBJECTS, Y),
        ),
        (TypeError, "row_args is ndarray of dtype object", lambda: fused_linear(lambda z, y: z[:, 0])(X, W, OBJECTS)),
        (TypeError, "loss_fn is int, wanted a function", lambda: fused_linear(wrong(3))),
        (ValueError, "has_aux is 'no', wanted a bool", lambda: fused_linear(lambda z: z[:, 0], has_aux=wrong("no"))),
        (TypeError, "row_args is given as labels=, wanted them by", lambda: fused_linear(row_loss)(X, W, labels=Y)),
        (ValueError, r"row_args is of shape \(\), wanted .* close over", lambda: fused_linear(row_loss)(X, W, 2.0)),
        (ValueError, "result of loss_fn is tuple, .* has_aux=True", lambda: fused_linear(lambda z: (z[:, 0], z))(X, W)),
        (ValueError, "result of loss_fn is list, wanted floating", lambda: fused_linear(lambda z: [z[:, 0]])(X, W)),
        (ValueError, "result of loss_fn is dict, wanted floating", lambda: fused_linear(lambda z: {"loss": z})(X, W)),
        (ValueError, "result of loss_fn is NoneType", lambda: fused_linear(lambda z: None)(X, W)),
        (ValueError, r"result of loss_fn is int32\[4\]", lambda: fused_linear(lambda z, y: y)(X, W, Y)),
        (
            ValueError,
            r"result of loss_fn is float32\[4\], wanted .* has_aux=True \(losses, aux\)",
            lambda: fused_linear(lambda z: z[:, 0], has_aux=True)(X, W),
        ),
        (ValueError, "result of loss_fn is tuple", lambda: fused_linear(lambda z: (z[:, 0],) * 3, has_aux=True)(X, W)),
        (ValueError, r"row_args is of shape \(3,\)", lambda: fused_linear(lambda z, y: z[:, 0])(X, W, Y[:3])),
        (ValueError, r"result of loss_fn is float32\[\]", lambda: fused_linear(lambda z: z.sum())(X, W)),
        (TypeError, "where is of dtype", lambda: linear_cross_entropy(X, W, Y, where=Y)),
        (ValueError, r"where is of shape \(3,\)", lambda: linear_cross_entropy(X, W, Y, where=Y[:3] > 0)),
        (ValueError, r"where is of shape \(4, 5\)", lambda: fused_linear(lambda z: z[:, 0])(X, W, where=X @ W > 0)),
        (
            ValueError,
            r"result of loss_fn is float32\[4\], float32\[4, 5\]",
            lambda: fused_linear(lambda z: (z[:, 0], z), reduction="none")(X, W),
        ),
        (ValueError, "aux of loss_fn", lambda: fused_linear(lambda z: (z[:, 0], z.sum()), has_aux=True)(X, W)),
    ],
)
def test_errors_name_function_argument_got_and_wanted(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert re.match(r"(fused_linear|linear_cross_entropy|linear_label_statistics): ", str(caught.value))


def test_integers_and_bools_of_numpy_are_options():
    wanted = linear_cross_entropy(X, W, Y, class_axis=-1, block_size=2, recompute=True)
    got = linear_cross_entropy(X, W, Y, class_axis=np.int64(-1), block_size=np.int32(2), recompute=wrong(np.True_))
    assert got == wanted


def test_a_count_of_more_than_32_bits_normalizes():
    """JAX would keep the low 32 bits of a NumPy integer, which are 0."""
    total = float(linear_cross_entropy(X, W, Y, reduction="sum"))
    for count in (2**33, np.int64(2**33), np.array(2**33)):
        np.testing.assert_allclose(linear_cross_entropy(X, W, Y, normalizer=count), total / 2**33, 1e-6)
    weighted = linear_cross_entropy(X, W, Y, reduction="sum", weights=np.full(4, 2**33))
    np.testing.assert_allclose(weighted, total * 2**33, 1e-6)
