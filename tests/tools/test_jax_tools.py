"""The tools that JAX has for finding faults and for shipping programs, and type checkers: they find none in ours."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jax import export
from jax.experimental import checkify

import jaxce
from jaxce import (
    fused_linear,
    label_statistics,
    linear_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

from ..helpers import assert_all_close, cases, head, logits, probabilities, random_labels

N, D, K = 6, 3, 5
ALL: dict[str, Any] = {"label_smoothing": 0.1, "logit_cap": 3.0, "z_loss": 0.1}


def summed(f):
    return lambda *a: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(*a)))


def value_and_gradients(f, count: int):
    return jax.value_and_grad(summed(f), tuple(range(count)))


# ------------------------------------------------------------------------------------------------------ symbolic sizes

EXPORTED = {  # a function, and the axes of its arguments: those of floating ones, which are differentiated, first
    "integer": (softmax_cross_entropy_with_integer_labels, "nk", "n"),
    "dense": (softmax_cross_entropy, "nk", "nk"),
    "integer, every option": (
        lambda z, c, y: softmax_cross_entropy_with_integer_labels(z, y, class_weights=c, ignore_index=1, **ALL),
        *("nk", "k", "n"),
    ),
    "dense, every option": (lambda z, t, c: softmax_cross_entropy(z, t, class_weights=c, **ALL), "nk", "nk", "k"),
    "class mask": (lambda z, y: softmax_cross_entropy_with_integer_labels(z, y, where=z > z[:, :1] - 9), "nk", "n"),
    "row mask": (lambda z, t, y: softmax_cross_entropy(z, t, where=y > 1), "nk", "nk", "n"),
    "another axis": (lambda z, y: softmax_cross_entropy_with_integer_labels(z.T, y, 0), "nk", "n"),
    "all axes": (lambda z: softmax_cross_entropy_with_integer_labels(z, 3, None), "nk"),
    "statistics": (lambda z, y: label_statistics(z, y)[:3], "nk", "n"),
    "rows": (partial(linear_cross_entropy, recompute=False), "nd", "dk", "n"),
    "classes": (partial(linear_cross_entropy, recompute=True), "nd", "dk", "n"),
    "per row": (
        lambda x, w, b, y: linear_cross_entropy(x, w, y, bias=b, ignore_index=1, reduction="none", **ALL),
        *("nd", "dk", "k", "n"),
    ),
    "transposed": (partial(linear_cross_entropy, class_axis=0, reduction="sum"), "nd", "kd", "n"),
    "any loss": (fused_linear(softmax_cross_entropy_with_integer_labels), "nd", "dk", "n"),
    "any loss per row": (
        fused_linear(softmax_cross_entropy_with_integer_labels, reduction="none"),
        *("nd", "dk", "n"),
    ),
}


QUICK_EXPORTS = {("n", "integer"), ("n", "row mask"), ("n", "rows"), ("n", "any loss"), ("ndk", "dense, every option")}
QUICK_EXPORTS |= {("ndk", "statistics"), ("ndk", "classes"), ("ndk", "transposed")}


@pytest.mark.parametrize("symbols, name", cases(["n", "ndk"], EXPORTED, quick=QUICK_EXPORTS))
def test_export_with_symbolic_sizes(name, symbols):
    f, *axes = EXPORTED[name]
    floating = [a for a in axes if a != "n"]
    scope = export.SymbolicScope()
    sizes = {"n": N, "d": D, "k": K}
    symbolic = {a: export.symbolic_shape(a, scope=scope)[0] if a in symbols else n for a, n in sizes.items()}

    def dtype(a):
        return jnp.int32 if a == "n" else jnp.float32

    shapes = [jax.ShapeDtypeStruct(tuple(symbolic[c] for c in a), dtype(a)) for a in axes]
    both = value_and_gradients(f, len(floating))
    exported = export.export(jax.jit(both))(*shapes)
    for rows in (1, 300):
        size = {"n": rows, "d": 4 if "d" in symbols else D, "k": 131 if "k" in symbols else K}
        arguments = [
            random_labels(rows, classes=4) if a == "n" else logits(*(size[c] for c in a), seed=i)
            for i, a in enumerate(axes)
        ]
        assert_all_close(exported.call(*arguments), jax.jit(both)(*arguments), tolerance=3e-6)


# ---------------------------------------------------------------------------------------------------------- no transfer


def test_no_implicit_transfers():
    """Outside `jit` as far as optax passes, which is dense targets; inside, everything."""
    z, t, y = logits(N, K), probabilities(N, K), random_labels(N, classes=K)
    x, w, _ = head(N, D, K)
    rows, weights, mask, ignored = jnp.arange(N) != 1, jnp.arange(float(N)), jnp.arange(K) < 4, y[0]
    each: tuple[dict[str, Any], ...] = ({}, {"recompute": True}, {"class_mask": mask, "ignore_index": ignored})
    head_gradients = jax.jit(jax.grad(partial(linear_cross_entropy, **ALL), (0, 1)))
    with jax.transfer_guard("disallow"):
        softmax_cross_entropy(z, t)
        softmax_cross_entropy_with_integer_labels(z, y)
        for options in each:
            linear_cross_entropy(x, w, y, where=rows, weights=weights, **options)
        jax.jit(partial(softmax_cross_entropy_with_integer_labels, ignore_index=1, **ALL))(z, y)
        jax.jit(label_statistics)(z, y)
        head_gradients(x, w, y)


# --------------------------------------------------------------------------------------------------------- false alarms

Z, Y, T = logits(N, K), jnp.array([0, 1, 3, 4, 0, 1]), jax.nn.one_hot(jnp.array([0, 1, 3, 4, 0, 1]), K)
INF = Z.at[:, 2].set(-jnp.inf)
MASK, ROWS = jnp.arange(K)[None] != 2, jnp.arange(N) != 1
INF_WEIGHT = jnp.ones(K).at[2].set(jnp.inf)
BIAS = jnp.zeros(K).at[2].set(-jnp.inf)
FINITE = {
    "dense, −inf": (lambda z: softmax_cross_entropy(z, T), INF),
    "dense, class mask": (lambda z: softmax_cross_entropy(z, T, where=MASK, label_smoothing=0.1), Z),
    "dense, row mask": (lambda z: softmax_cross_entropy(z, T, where=ROWS), Z.at[1].set(jnp.inf)),
    "dense, weights": (lambda z: softmax_cross_entropy(z, T, class_weights=INF_WEIGHT), Z),
    "integer, −inf": (lambda z: softmax_cross_entropy_with_integer_labels(z, Y, z_loss=0.1), INF),
    "integer, mask and smoothing": (
        lambda z: softmax_cross_entropy_with_integer_labels(z, Y, where=MASK, **ALL),
        Z,
    ),
    "integer, weights": (lambda z: softmax_cross_entropy_with_integer_labels(z, Y, class_weights=INF_WEIGHT), Z),
    "statistics, −inf": (lambda z: label_statistics(z, Y)[:3], INF),
    "statistics, class mask": (lambda z: label_statistics(z, Y, where=MASK)[:3], Z),
    "head, −inf, rows": (lambda z: linear_cross_entropy(z, jnp.eye(K), Y, bias=BIAS, recompute=False), Z),
    "head, −inf, classes": (lambda z: linear_cross_entropy(z, jnp.eye(K), Y, bias=BIAS, recompute=True), Z),
}
QUICK_FINITE = {(name, "gradient") for name in FINITE if "head" not in name}
QUICK_FINITE |= {("head, −inf, classes", "value"), ("dense, −inf", "Hessian"), ("statistics, class mask", "jvp")}
OF = {
    "value": lambda f, z: f(z),
    "gradient": lambda f, z: jax.grad(summed(f))(z),
    "jvp": lambda f, z: jax.jvp(f, (z,), (jnp.ones_like(z),)),
    "Hessian": lambda f, z: jax.jvp(jax.grad(summed(f)), (z,), (jnp.ones_like(z),)),
}


@pytest.mark.parametrize("name, of", cases(FINITE, OF, quick=QUICK_FINITE))
def test_no_nan_on_the_way_to_finite_results(name, of):
    f, z = FINITE[name]
    g = partial(OF[of], f)
    error, out = jax.jit(checkify.checkify(g, errors=checkify.float_checks))(z)
    assert error.get() is None
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))
    with jax.debug_nans(True):
        g(z)


def test_no_index_out_of_bounds_in_blocks():
    """The last of several blocks of rows is moved to end with them."""
    z, y = jnp.zeros((516, 32771)), jnp.zeros(516, jnp.int32)
    with jax.default_device(jax.devices()[0]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        for f in (
            lambda z: softmax_cross_entropy_with_integer_labels(z, y),
            jax.grad(lambda z: softmax_cross_entropy_with_integer_labels(z, y).sum()),
            lambda z: label_statistics(z, y),
        ):
            error, _ = jax.jit(checkify.checkify(f, errors=checkify.index_checks))(z)
            assert error.get() is None


# --------------------------------------------------------------------------------------------------------------- types


def test_annotations_accept_what_the_functions_do():
    functions: Any = map(
        beartype,
        (
            softmax_cross_entropy_with_integer_labels,
            softmax_cross_entropy,
            label_statistics,
            linear_cross_entropy,
            fused_linear,
            jaxce.check_labels,
        ),
    )
    integer, dense, statistics, whole, any_loss, check = functions
    z, w, mask = [[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [True, True]
    for axis in (1, np.int64(1), jnp.array(1), [1], (np.int32(-1),)):
        integer(z, [0, 1], axis, mask, class_weights=[1, 2, 3], ignore_index=np.int64(1), z_loss=np.float32(0.1))
        dense(z, [[0, 1, 0], [1, 0, 0]], axis, mask)
        statistics(z, (0, 1), axis, mask, logit_cap=np.float16(3))
    options: dict[str, Any] = dict(class_axis=np.int64(-1), block_size=np.int64(1))
    whole(z, w, [0, 1], bias=[0.0, 1.0], weights=[1, 2], class_weights=[1.0, 2.0], normalizer=np.int64(3), **options)
    any_loss(softmax_cross_entropy_with_integer_labels, **options)(z, w, jnp.array([0, 1]))
    check([0, 1], np.int64(2), mask)
