"""Options: what the soft-cap is applied to, and however they are given.

Beside PyTorch, optax and T5X they are in `test_peers`, in every mode of differentiation in `test_differentiation`.
"""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import reference

from ..helpers import assert_all_close, assert_close, dense_loss, integer_loss, logits, probabilities, with_gradient

N, K = 6, 5
LABELS = jnp.array([0, 4, 2, 2, 1, 3])
WEIGHTS = (0.5, 2.0, 0.0, 1.5, 3.0)
COTANGENT = jnp.linspace(-1, 2, N)


@pytest.mark.parametrize("cap", [0.5, 3.0, 30.0])
def test_logit_cap_is_a_tanh_before_everything_else(cap):
    z, others = logits(N, K), {"label_smoothing": 0.1, "class_weights": jnp.array(WEIGHTS), "z_loss": 0.01}
    for loss_fn, targets in ((integer_loss, LABELS), (dense_loss, probabilities(N, K))):
        truth = with_gradient(lambda z, f=loss_fn, t=targets: f(cap * jnp.tanh(z / cap), t, **others), z, COTANGENT)
        loss, gradient = with_gradient(lambda z, f=loss_fn, t=targets: f(z, t, logit_cap=cap, **others), z, COTANGENT)
        assert np.abs(truth[1]).max() > 1e-2
        assert_close(loss, truth[0], "float32")
        assert_close(gradient, truth[1], "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_large_cap_is_none(dtype, x64):
    """Up to the largest number, as a batch of caps may say it. z/cap is then below the smallest normal number."""
    z, largest = logits(N, K, dtype=dtype), float(jnp.finfo(dtype).max)

    def loss(z, cap):
        return integer_loss(z, LABELS, logit_cap=cap)

    wanted = with_gradient(lambda z: loss(z, None), z)
    for cap in (1e30, largest / 100, largest):
        assert_all_close(with_gradient(lambda z, cap=cap: loss(z, cap), z), wanted)
    assert_close(jax.vmap(loss, (None, 0))(z, jnp.asarray([largest, largest / 3], dtype))[0], wanted[0], dtype)
    # Logits of that size are capped as others are.
    z, cap = largest / 100 * z[0, :2], largest / 50
    gap = np.float64(cap) * np.diff(np.tanh(np.asarray(z, np.float64) / cap))
    assert_close(integer_loss(z, 0, logit_cap=cap), np.maximum(gap, 0)[0], dtype)


class Parameter:
    """As wrappers of parameters are, which JAX takes for arrays."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


def test_options_that_wrap_an_array():
    z, values = logits(N, K), {"label_smoothing": 0.1, "logit_cap": 4.0, "z_loss": 0.01}

    def loss(values, wrapper):
        return integer_loss(z, LABELS, **{name: wrapper(value) for name, value in values.items()}).sum()

    values = jax.tree.map(jnp.float32, values)
    for run in (loss, jax.value_and_grad(loss)):
        assert_all_close(run(values, Parameter), run(values, jnp.asarray))
    with pytest.raises(ValueError, match="z_loss is .*, wanted a number in"):
        loss({"z_loss": -1.0}, lambda value: Parameter(jnp.float32(value)))


def test_options_may_differ_between_vmapped_rows():
    smoothing, cap, z_loss = jnp.linspace(0, 1, N), jnp.linspace(1, 9, N), jnp.linspace(0, 0.5, N)
    weights = jax.random.uniform(jax.random.key(3), (N, K))

    def call(z, y, e, c, w, p):
        return integer_loss(z, y, label_smoothing=e, logit_cap=c, class_weights=w, z_loss=p)

    rows = (logits(N, K), LABELS, smoothing, cap, weights, z_loss)
    single = jax.jit(call)
    wanted = jnp.stack([single(*(a[i] for a in rows)) for i in range(N)])
    assert_close(jax.vmap(call)(*rows), wanted, "float32")


GIVEN = {
    "Python": lambda v: v,
    "Python int": lambda v: int(v) if np.ndim(v) == 0 else [int(w) for w in v],
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.int64": lambda v: np.asarray(v).astype(np.int64),
    "np.float16": np.float16,
    "jax": lambda v: jnp.asarray(v, jnp.float32),
    "jax bfloat16": lambda v: jnp.asarray(v, jnp.bfloat16),
    "jax weak": lambda v: jnp.asarray(v) * 1.0 if np.ndim(v) == 0 else jnp.asarray(v, jnp.float32),
}


GIVEN_CASES = [(name, wide, "strict") for name in GIVEN for wide in (False, True)]
GIVEN_CASES += [("np.float64", True, "standard"), ("jax bfloat16", False, "standard")]


@pytest.mark.parametrize("given, wide, promotion", GIVEN_CASES)
def test_options_in_any_type(given, wide, promotion):
    options = {"label_smoothing": 1.0, "class_weights": [0.0, 1.0, 2.0, 3.0, 4.0], "logit_cap": 4.0, "z_loss": 2.0}
    before = jax.config.read("jax_enable_x64"), jax.config.jax_numpy_dtype_promotion
    z, t = np.asarray(logits(N, K)), np.asarray(probabilities(N, K))
    where = np.array([True, True, False, True, True])[None]
    capped, w = 4 * np.tanh(z[:, where[0]].astype(np.float64) / 4), np.array([0.0, 1, 3, 4])
    lse = np.log(np.exp(capped).sum(-1, keepdims=True))
    smoothed = {"integer": 1 / 4, "dense": t[:, where[0]].astype(np.float64).sum(-1, keepdims=True) / 4}
    jax.config.update("jax_enable_x64", wide)
    jax.config.update("jax_numpy_dtype_promotion", promotion)
    try:
        given_options = {name: GIVEN[given](value) for name, value in options.items()}
        forms = {"integer": (integer_loss, np.array([0, 4, 1, 3, 1, 3])), "dense": (dense_loss, t)}

        @jax.jit
        def losses(z):
            return {form: f(z, y, where=where, **given_options) for form, (f, y) in forms.items()}

        full, low = losses(z), losses(z.astype(jnp.bfloat16))
        for form, (loss_fn, targets) in forms.items():
            truth = (smoothed[form] * w * (lse - capped)).sum(-1) + 2 * lse[:, 0] ** 2
            assert_close(full[form], truth, "float32")
            np.testing.assert_allclose(low[form], truth, 0.02)  # other numbers, for bfloat16: mostly for the type
            abstract = jax.eval_shape(loss_fn, z, targets, where=where, **given_options)
            for result in (full[form].aval, low[form].aval, abstract):
                assert result.dtype == jnp.float32 and not result.weak_type
    finally:
        jax.config.update("jax_enable_x64", before[0])
        jax.config.update("jax_numpy_dtype_promotion", before[1])


@pytest.mark.parametrize("promotion", ["strict", "standard"])
def test_float64_logits_with_options_of_float32(x64, promotion):
    before = jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_numpy_dtype_promotion", promotion)
    try:
        z = logits(N, K, dtype="float64")
        options = {
            "label_smoothing": jnp.float32(0.25),
            "class_weights": jnp.array(WEIGHTS, jnp.float32),
            "logit_cap": np.float32(4),
            "z_loss": 0.5,
        }
        exact = {name: jnp.asarray(value, jnp.float64) for name, value in options.items()}
        for loss_fn, targets in ((integer_loss, LABELS), (dense_loss, probabilities(N, K))):
            where = jnp.arange(K)[None] != (2 if loss_fn is dense_loss else K)
            one = jnp.asarray(targets) if loss_fn is integer_loss else targets.astype("float64")
            naive = getattr(reference, loss_fn.__name__)
            ours = partial(loss_fn, labels=targets, where=where, **options)
            truths = partial(naive, labels=one, where=where, **exact)
            got, truth = jax.jit(
                lambda z, fs=(ours, truths): [with_gradient(f, z, COTANGENT.astype(z.dtype)) for f in fs]
            )(z)
            assert_close(got[0], truth[0], "float64")
            assert_close(got[1], truth[1], "float64")
    finally:
        jax.config.update("jax_numpy_dtype_promotion", before)


def test_python_numbers_and_lists_for_everything():
    integer, dense = cast(Any, integer_loss), cast(Any, dense_loss)  # lists work, but are not in ArrayLike
    loss = integer([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], [2, 0], class_weights=[1, 2, 3], label_smoothing=0.1, z_loss=1)
    z, c = np.array([[1.0, 2, 3], [3, 1, 0]]), np.array([1.0, 2, 3])
    lse = np.log(np.exp(z).sum(-1, keepdims=True))
    t = (0.9 * np.eye(3)[[2, 0]] + 0.1 / 3) * c
    assert_close(loss, (t * (lse - z)).sum(-1) + lse[:, 0] ** 2, "float32")
    assert_close(dense([1.0, 2.0], [1, 0]), np.log1p(np.exp(1.0)), "float32")
