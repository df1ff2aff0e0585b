"""Arguments of the functions of a linear layer that are wrong."""

import re
from typing import Any

import jax.numpy as jnp
import pytest

from jaxce import fused_linear, linear_cross_entropy

from ..helpers import head

X, W, Y = head(4, 3, 5)


def wrong(argument: Any) -> Any:
    return argument


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x is of dtype int32", lambda: linear_cross_entropy(X.astype(jnp.int32), W, Y)),
        (TypeError, "w is of dtype int32", lambda: linear_cross_entropy(X, W.astype(jnp.int32), Y)),
        (TypeError, "labels is of dtype float32", lambda: linear_cross_entropy(X, W, Y.astype(jnp.float32))),
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
        (ValueError, "label_smoothing is 2", lambda: linear_cross_entropy(X, W, Y, label_smoothing=2.0)),
        (ValueError, r"class_weights is of shape \(4,\)", lambda: linear_cross_entropy(X, W, Y, class_weights=X[:, 0])),
        (ValueError, r"row_args is of shape \(3,\)", lambda: fused_linear(lambda z, y: z[:, 0])(X, W, Y[:3])),
        (ValueError, r"result of loss_fn is float32\[\]", lambda: fused_linear(lambda z: z.sum())(X, W)),
        (ValueError, "aux of loss_fn", lambda: fused_linear(lambda z: (z[:, 0], z.sum()), has_aux=True)(X, W)),
    ],
)
def test_errors_name_function_argument_got_and_wanted(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert re.match(r"(fused_linear|linear_cross_entropy): ", str(caught.value))
