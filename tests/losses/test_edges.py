"""What happens at the edges: invalid labels of any dtype, infinities, and rows without a finite maximum.

What is masked or ignored is in `test_masks`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import linear_cross_entropy

from ..helpers import (
    assert_all_close,
    assert_close,
    dense_loss,
    integer_loss,
    logits,
    loss_and_gradient,
    option_sets,
    probabilities,
    with_gradient,
)

N, K = 4, 5
OPTIONS = option_sets(K, class_weights=[0.0, 0.5, 1.0, 2.0, 3.0])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
INVALID = [K, -1, -K, np.iinfo(np.int32).max, np.iinfo(np.int32).min]


def assert_only_row_is_nan(loss, gradient, row: int, others):
    """`others`: loss and gradient of the same rows, that row being valid."""
    assert np.isnan(loss[row]) and np.isnan(gradient[row]).all()
    rest = np.arange(len(loss)) != row
    np.testing.assert_array_equal(loss[rest], others[0][rest])
    np.testing.assert_array_equal(gradient[rest], others[1][rest])
    assert np.abs(gradient[rest]).min() > 0


# ------------------------------------------------------------------------------------------------- labels out of range


@each_option
@pytest.mark.parametrize("label", INVALID)
def test_label_out_of_range_is_nan_in_its_row_only(label, options):
    z, labels = logits(N, K), jnp.array([1, 2, 3, 4])
    valid = loss_and_gradient(integer_loss, z, labels, **options)
    invalid = loss_and_gradient(integer_loss, z, labels.at[1].set(label), **options)
    assert_only_row_is_nan(*invalid, 1, valid)


@pytest.mark.parametrize("label", [*INVALID, K + 1])
def test_label_out_of_range_is_nan_in_forward_mode_and_at_second_order(label):
    z, labels = logits(N, K), jnp.array([1, label, 3, 4])
    loss, rate = jax.jit(lambda z, t: jax.jvp(lambda z: integer_loss(z, labels), (z,), (t,)))(z, logits(N, K, seed=1))
    invalid = np.array([False, True, False, False])
    np.testing.assert_array_equal(np.isnan(loss), invalid)
    np.testing.assert_array_equal(np.isnan(rate), invalid)
    hessian = jax.jit(jax.hessian(lambda z: integer_loss(z, jnp.array(label))))(z[0])
    assert np.isnan(hessian).all()


@pytest.mark.parametrize("classes", [5, 257])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_every_integer_dtype_of_labels(dtype, classes):
    """257 classes do not fit into 8 bits, which must not matter: none of their labels is out of range then."""
    info, z = np.iinfo(dtype), logits(N, classes)
    last = min(classes - 1, info.max)
    beyond = [value for value in (classes, info.max) if classes <= value <= info.max] or [1, 127]
    labels = np.array([0, last, *beyond[:1], *beyond[-1:]])
    loss, gradient = loss_and_gradient(integer_loss, z, labels.astype(dtype))
    wanted, wanted_gradient = loss_and_gradient(integer_loss, z, jnp.asarray(np.where(labels < classes, labels, -1)))
    np.testing.assert_array_equal(loss, wanted)
    np.testing.assert_array_equal(gradient, wanted_gradient)
    np.testing.assert_array_equal(np.isnan(loss), labels >= classes)
    smallest = integer_loss(z, np.full(N, info.min, dtype))
    assert np.isnan(smallest).all() if info.min < 0 else np.isfinite(smallest).all()


def test_labels_beyond_32_bits_do_not_wrap_around():
    labels = np.array([2**32 + 1, -(2**32) + 1, 1, 2**33])
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(N, K), labels)), [True, True, False, True])
    unsigned = np.array([2**64 - 1, 2**63, 2**32, 1], np.uint64)
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(N, K), unsigned)), [True, True, True, False])


UNSIGNED = np.array([2, 2**32 - 1, 2**31, 1], np.uint32)


@pytest.mark.parametrize("label", [2**32 - 1, 2**31])
@pytest.mark.parametrize("wide", [False, True])
def test_ignore_index_beyond_int32_is_one_label(label, wide):
    """Given like the labels, or as any other integer."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", wide)
    try:
        for index in (jnp.uint32(label), np.uint32(label), *([label, np.int64(label), np.uint64(label)] * wide)):
            for loss in (
                integer_loss(logits(N, K), UNSIGNED, ignore_index=index),
                linear_cross_entropy(logits(N, 3), logits(3, K), UNSIGNED, ignore_index=index, reduction="none"),
            ):
                np.testing.assert_array_equal(loss == 0, UNSIGNED == label)
                np.testing.assert_array_equal(np.isnan(loss), (UNSIGNED > K) & (UNSIGNED != label))
    finally:
        jax.config.update("jax_enable_x64", before)
    for index in (label, np.int64(label), np.uint64(label)):
        assert integer_loss(logits(N, K), UNSIGNED, ignore_index=index)[list(UNSIGNED).index(label)] == 0
    for smaller in (np.int8, np.int32, np.uint8):  # 2**32 − 1 is not −1, nor 255
        assert np.isnan(integer_loss(logits(N, K), np.array([1, -1, 1, 1]).astype(smaller), ignore_index=label)[1])


def test_64_bit_labels(x64):
    labels = jnp.array([2**32 + 1, -(2**32) + 1, 1, 2**33])
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(N, K), labels)), [True, True, False, True])
    unsigned = jnp.array([2**64 - 1, 2**63, 2**32, 1], jnp.uint64)
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(N, K), unsigned)), [True, True, True, False])
    loss = integer_loss(logits(N, K), jnp.array([1, 2**40, 3, 4]), ignore_index=2**40)
    np.testing.assert_array_equal(np.asarray(loss) == 0, [False, True, False, False])


def test_label_out_of_range_along_another_axis_and_flattened_axes():
    z = logits(2, N, 3)
    loss, gradient = loss_and_gradient(integer_loss, z, jnp.array([[0, 1, 4], [3, -1, 2]]), axis=1)
    np.testing.assert_array_equal(np.isnan(loss), [[False, False, True], [False, True, False]])
    np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(np.isnan(loss)[:, None], z.shape))
    loss = integer_loss(z, jnp.array([5, 6, -1, 0]), (0, 2))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    assert np.isnan(integer_loss(z, jnp.array(z.size), None)) and np.isfinite(
        integer_loss(z, jnp.array(z.size - 1), None)
    )


# ---------------------------------------------------------------------------------------------------------- infinities


def test_minus_inf_logits_without_target_do_not_count():
    z, labels = logits(N, K).at[:, 2].set(-jnp.inf), jnp.array([0, 1, 3, 4])
    rest = np.array([0, 1, 3, 4])
    wanted = loss_and_gradient(integer_loss, z[:, rest], jnp.array([0, 1, 2, 3]), z_loss=0.1)
    one_hot = jax.nn.one_hot(labels, K)
    for got in (
        loss_and_gradient(integer_loss, z, labels, z_loss=0.1),
        loss_and_gradient(dense_loss, z, one_hot, z_loss=0.1),
        loss_and_gradient(
            dense_loss, z, one_hot, z_loss=0.1, class_weights=jnp.ones(K), label_smoothing=jnp.float32(0)
        ),
        loss_and_gradient(integer_loss, z, labels, z_loss=0.1, label_smoothing=jnp.float32(0)),
    ):
        assert_close(got[0], wanted[0], "float32")
        assert_close(got[1][:, rest], wanted[1], "float32")
        assert (got[1][:, 2] == 0).all()


@pytest.mark.parametrize("name", ["class_weights", "logit_cap", "z_loss"])
@pytest.mark.parametrize("dense", [False, True])
def test_minus_inf_logits_without_target_leave_the_gradient_of_options_finite(dense, name):
    z, labels = logits(N, K, seed=3).at[:, 2].set(-jnp.inf), jnp.array([0, 1, 3, 4])
    options = {"class_weights": jnp.ones(K), "logit_cap": jnp.float32(3), "z_loss": jnp.float32(0.1)}

    def loss(z, o):
        return (dense_loss(z, jax.nn.one_hot(labels, K), **o) if dense else integer_loss(z, labels, **o)).sum()

    got = jax.grad(loss, argnums=1)(z, {name: options[name]})[name]
    # −1e4 is as good as −inf to a softmax and to a tanh.
    wanted = jax.grad(loss, argnums=1)(z.at[:, 2].set(-1e4), {name: options[name]})[name]
    if name == "class_weights":
        assert got[2] == 0
    np.testing.assert_allclose(got, wanted, 1e-5)
    assert np.abs(wanted).max() > 0.1


def test_gradient_of_a_zero_target_at_minus_inf_is_zero():
    """Not −log 0 = +inf: such a class counts for nothing, in forward mode too."""
    z, t = logits(N, K), probabilities(N, K).at[:, 2].set(0)
    rest = np.array([0, 1, 3, 4])

    def rate_and_gradient(z, t):
        direction = jnp.ones_like(t)
        rate = jax.jvp(lambda t: dense_loss(z, t), (t,), (direction,))[1]
        return rate, with_gradient(lambda t: dense_loss(z, t), t)[1]

    rate, gradient = rate_and_gradient(z.at[:, 2].set(-jnp.inf), t)
    wanted_rate, wanted = rate_and_gradient(z[:, rest], t[:, rest])
    assert (gradient[:, 2] == 0).all()
    assert_close(gradient[:, rest], wanted, "float32")
    assert_close(rate, wanted_rate, "float32")


def test_logit_cap_makes_infinite_logits_finite():
    z, labels = logits(N, K).at[:, 2].set(-jnp.inf).at[0, 4].set(jnp.inf), jnp.array([0, 1, 2, 4])
    capped = (3 * jnp.tanh(z / 3)).at[0, 4].set(3)
    loss, gradient = loss_and_gradient(integer_loss, z, labels, logit_cap=3)
    wanted, wanted_gradient = loss_and_gradient(integer_loss, capped, labels)
    assert_close(loss, wanted, "float32")
    slope = np.asarray(1 - jnp.tanh(z / 3) ** 2)
    assert (gradient[:, 2] == 0).all() and gradient[0, 4] == 0
    assert_close(gradient, wanted_gradient * slope, "float32", factor=4)


def test_target_mass_on_minus_inf_is_inf():
    z, t = logits(N, K).at[:, 2].set(-jnp.inf), jnp.full((N, K), 0.2)
    loss, gradient = loss_and_gradient(dense_loss, z, t)
    assert (loss == np.inf).all()
    assert_close(gradient, np.asarray(jax.nn.softmax(z)) - 0.2, "float32")
    loss, gradient = loss_and_gradient(integer_loss, z, jnp.full(N, 2))
    assert (loss == np.inf).all()
    assert_close(gradient, np.asarray(jax.nn.softmax(z)) - np.eye(K)[2], "float32")
    loss, _ = loss_and_gradient(integer_loss, z, jnp.array([0, 1, 3, 4]), label_smoothing=0.1)
    assert (loss == np.inf).all()
    # Weight 0 is no mass, and so is no smoothing where the class is masked.
    weights = jnp.ones(K).at[2].set(0)
    selections: list[dict[str, Any]] = [{"class_weights": weights}, {"where": jnp.isfinite(z)}]
    for options in selections:
        assert np.isfinite(dense_loss(z, t, **options)).all()
        assert np.isfinite(integer_loss(z, jnp.array([0, 1, 3, 4]), label_smoothing=0.1, **options)).all()
    assert (integer_loss(z, jnp.full(N, 2), class_weights=weights) == 0).all()


@pytest.mark.parametrize(
    "dtype, reduction",
    [("float32", "none"), ("float32", "sum"), ("float16", "none"), ("bfloat16", "none"), ("float64", "none")],
)
def test_z_loss_of_zero_is_none_where_the_square_overflows(dtype, reduction, x64):
    """At the largest numbers the log-normalizer's square is infinite. A traced 0 times it is still 0."""
    largest = jnp.finfo(dtype).max
    z, labels = jnp.stack([jnp.full(K, -largest), jnp.full(K, largest), logits(K, dtype=dtype)]), jnp.array([0, 1, 2])
    w = jnp.eye(K, dtype=z.dtype)
    for loss in (
        lambda z, o: integer_loss(z, labels, z_loss=o),
        lambda z, o: dense_loss(z, jax.nn.one_hot(labels, K), z_loss=o),
        lambda z, o: linear_cross_entropy(z / 2, w, labels, z_loss=o, reduction=reduction),
        lambda z, o: linear_cross_entropy(z / 2, w, labels, z_loss=o, reduction="sum", recompute=True),
    ):
        wanted = with_gradient(lambda z, f=loss: f(z, 0.0), z)
        got = jax.jit(lambda z, o, f=loss: with_gradient(lambda z: f(z, o), z))(z, 0.0)
        assert_all_close(got, wanted, tolerance=1e-6)
        assert all(np.isfinite(a).all() for a in got)
    rate = jax.jit(jax.grad(lambda o: integer_loss(logits(K), 1, z_loss=o)))(0.0)
    np.testing.assert_allclose(rate, jax.nn.logsumexp(logits(K)) ** 2, 1e-6)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("smoothing", [0.0, jnp.float32(0.0)])
def test_infinite_weight_of_an_absent_class_counts_for_nothing(axis, smoothing):
    """1/frequency of a class that does not occur, in both forms."""
    z, labels, weights = logits(N, K), jnp.array([0, 1, 3, 4]), jnp.array([1.0, 2.0, jnp.inf, 0.5, 3.0])
    one_hot = jax.nn.one_hot(labels, K)
    wanted = loss_and_gradient(integer_loss, z, labels, class_weights=weights.at[2].set(1))
    dense = dense_loss if axis == -1 else lambda z, t, **o: dense_loss(z.T, t.T, 0, **o)
    got = jax.jit(
        lambda z: with_gradient(lambda z: dense(z, one_hot, class_weights=weights, label_smoothing=smoothing), z)
    )(z)
    assert_all_close(got, wanted, tolerance=1e-6)
    assert_all_close(loss_and_gradient(integer_loss, z, labels, class_weights=weights), wanted, tolerance=1e-6)
    for recompute in (True, False):
        loss = linear_cross_entropy(z, jnp.eye(K), labels, class_weights=weights, reduction="sum", recompute=recompute)
        np.testing.assert_allclose(loss, wanted[0].sum(), 1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_row_without_a_finite_maximum_is_nan(bad, dense):
    z, labels = logits(N, K), jnp.array([1, 2, 3, 4])
    call, targets = (dense_loss, jax.nn.one_hot(labels, K)) if dense else (integer_loss, labels)
    valid = loss_and_gradient(call, z, targets)
    assert_only_row_is_nan(*loss_and_gradient(call, z.at[1, 0].set(bad), targets), 1, valid)
    assert_only_row_is_nan(*loss_and_gradient(call, z.at[1].set(-jnp.inf), targets), 1, valid)


@pytest.mark.parametrize("form", ["dense", "smoothed", "head by rows", "head by classes"])
def test_modes_agree_where_the_loss_is_inf(form):
    """Tangents and cotangents of 0, of other classes, rows and weights, have no part in it."""
    z = jnp.array([[1.0, -jnp.inf, 0.5, 2.0], [1.0, 2.0, 3.0, 4.0]])
    targets, labels, weights = jnp.full((2, 4), 0.25), jnp.array([1, 3]), jnp.array([1.0, 2.0, 3.0, 4.0])

    def loss(z, targets, weights, row_weights):
        if form == "dense":
            return row_weights * dense_loss(z, targets, class_weights=weights)
        options: Any = {"label_smoothing": 0.1, "class_weights": weights}
        if form == "smoothed":
            return integer_loss(z, labels, **options)
        options |= {"weights": row_weights, "recompute": form == "head by classes", "reduction": "sum"}
        return linear_cross_entropy(jnp.eye(2), jnp.zeros((2, 4)), labels, bias=z[0], **options)

    for i in range(3 if form in ("dense", "smoothed") else 4):
        backward, forward = (jac(loss, i)(z, targets, weights, jnp.ones(2)) for jac in (jax.jacrev, jax.jacfwd))
        assert not np.isnan(backward).any(), i
        assert np.isinf(backward).any() == (i > 0 and (form, i) not in NOT_TARGETS)
        np.testing.assert_allclose(backward, forward, 1e-5, 1e-7)


NOT_TARGETS = {("smoothed", 1), ("head by rows", 1), ("head by classes", 1)}
