"""What happens at the edges: invalid and ignored labels, masked rows, infinities, and the error under checkify."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

import jaxce

from ..helpers.oracle import assert_close

integer_loss = jaxce.softmax_cross_entropy_with_integer_labels
dense_loss = jaxce.softmax_cross_entropy

N, K = 4, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weights": {"class_weights": jnp.array([0.0, 0.5, 1.0, 2.0, 3.0])},
    "logit_cap": {"logit_cap": 3.0},
    "z_loss": {"z_loss": 1e-2},
    "all": {
        "label_smoothing": 0.1,
        "class_weights": jnp.array([0.0, 0.5, 1.0, 2.0, 3.0]),
        "logit_cap": 3.0,
        "z_loss": 1e-2,
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def logits(seed: int = 0, shape: tuple[int, ...] = (N, K)) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def loss_and_gradient(loss_fn, z, targets, **options):
    loss, gradient = _loss_and_gradient(loss_fn, z, targets, **options)
    return np.asarray(loss), np.asarray(gradient)


@functools.partial(jax.jit, static_argnums=0, static_argnames="axis")
def _loss_and_gradient(loss_fn, z, targets, **options):
    loss, pullback = jax.vjp(lambda z: loss_fn(z, targets, **options), z)
    return loss, pullback(jnp.ones_like(loss))[0]


def assert_only_row_is_nan(loss, gradient, row: int, others):
    """`others`: loss and gradient of the same rows, that row being valid."""
    assert np.isnan(loss[row]) and np.isnan(gradient[row]).all()
    rest = np.arange(len(loss)) != row
    np.testing.assert_array_equal(loss[rest], others[0][rest])
    np.testing.assert_array_equal(gradient[rest], others[1][rest])
    assert np.abs(gradient[rest]).min() > 0


# Labels out of range


@each_option
@pytest.mark.parametrize("label", [K, -1, -K, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_label_out_of_range_is_nan_in_its_row_only(label, options):
    z, labels = logits(), jnp.array([1, 2, 3, 4])
    valid = loss_and_gradient(integer_loss, z, labels, **options)
    invalid = loss_and_gradient(integer_loss, z, labels.at[1].set(label), **options)
    assert_only_row_is_nan(*invalid, 1, valid)


@pytest.mark.parametrize("label", [K, -1])
def test_label_out_of_range_is_nan_in_forward_mode_and_under_jit(label):
    z, labels = logits(), jnp.array([1, label, 3, 4])
    loss, rate = jax.jit(lambda z, t: jax.jvp(lambda z: integer_loss(z, labels), (z,), (t,)))(z, logits(1))
    invalid = np.array([False, True, False, False])
    np.testing.assert_array_equal(np.isnan(loss), invalid)
    np.testing.assert_array_equal(np.isnan(rate), invalid)
    hessian = jax.hessian(lambda z: integer_loss(z, jnp.array(label)))(z[0])
    assert np.isnan(hessian).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_every_integer_dtype_of_labels(dtype):
    info = np.iinfo(dtype)
    labels = np.array([0, K - 1, K, info.max], dtype)
    loss, gradient = loss_and_gradient(integer_loss, logits(), labels)
    wanted, wanted_gradient = loss_and_gradient(integer_loss, logits(), jnp.array([0, K - 1, -1, -1]))
    np.testing.assert_array_equal(loss, wanted)
    np.testing.assert_array_equal(gradient, wanted_gradient)
    assert np.isnan(loss[2:]).all()
    smallest = integer_loss(logits(), np.full(N, info.min, dtype))
    assert np.isnan(smallest).all() if info.min < 0 else np.isfinite(smallest).all()


def test_labels_beyond_32_bits_do_not_wrap_around():
    labels = np.array([2**32 + 1, -(2**32) + 1, 1, 2**33])
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(), labels)), [True, True, False, True])
    unsigned = np.array([2**64 - 1, 2**63, 2**32, 1], np.uint64)
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(), unsigned)), [True, True, True, False])


def test_64_bit_labels(x64):
    labels = jnp.array([2**32 + 1, -(2**32) + 1, 1, 2**33])
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(), labels)), [True, True, False, True])
    unsigned = jnp.array([2**64 - 1, 2**63, 2**32, 1], jnp.uint64)
    np.testing.assert_array_equal(np.isnan(integer_loss(logits(), unsigned)), [True, True, True, False])
    loss = integer_loss(logits(), jnp.array([1, 2**40, 3, 4]), ignore_index=2**40)
    np.testing.assert_array_equal(np.asarray(loss) == 0, [False, True, False, False])


def test_label_out_of_range_along_another_axis_and_flattened_axes():
    z = logits(0, (2, N, 3))
    loss, gradient = loss_and_gradient(integer_loss, z, jnp.array([[0, 1, 4], [3, -1, 2]]), axis=1)
    np.testing.assert_array_equal(np.isnan(loss), [[False, False, True], [False, True, False]])
    np.testing.assert_array_equal(np.isnan(gradient), np.broadcast_to(np.isnan(loss)[:, None], z.shape))
    loss = integer_loss(z, jnp.array([5, 6, -1, 0]), (0, 2))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    assert np.isnan(integer_loss(z, jnp.array(z.size), None)) and np.isfinite(
        integer_loss(z, jnp.array(z.size - 1), None)
    )


@each_option
def test_masked_label_is_invalid(options):
    z, labels, where = logits(), jnp.array([1, 2, 3, 4]), jnp.ones((N, K), bool).at[:, 0].set(False)
    valid = loss_and_gradient(integer_loss, z, labels, where=where, **options)
    loss, gradient = loss_and_gradient(integer_loss, z, labels, where=where.at[1, 2].set(False), **options)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    np.testing.assert_array_equal(gradient[1, [0, 2]], 0)  # classes that are not there
    assert np.isnan(gradient[1, [1, 3, 4]]).all()
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(loss[others], valid[0][others])
    np.testing.assert_array_equal(gradient[others], valid[1][others])


# Rows that do not take part

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
    z, labels = logits().at[1].set(jnp.array(content)), jnp.array([first, label, 3, 4])
    assert_row_is_absent(z, labels, ignore_index=jnp.array(label))


@each_content
@pytest.mark.parametrize("mask", ["row", "row, kept axis", "every class"])
def test_masked_row_is_not_there(content, mask):
    z = logits().at[1].set(jnp.array(content))
    rows = jnp.array([True, False, True, True])
    where = {"row": rows, "row, kept axis": rows[:, None], "every class": jnp.broadcast_to(rows[:, None], z.shape)}[
        mask
    ]
    for label in (0, -1):
        assert_row_is_absent(z, jnp.array([1, label, 3, 4]), where=where)


@jax.jit
def dense_gradients(z, t, options, cotangent, where):
    loss, pullback = jax.vjp(lambda z, t, o: dense_loss(z, t, where=where, **o), z, t, options)
    return loss, *pullback(cotangent)


@each_content
def test_masked_row_of_dense_targets_is_not_there(content):
    z, t = (
        logits().at[1].set(jnp.array(content)),
        jax.nn.softmax(logits(1)).at[:, 0].set(0).at[1].set(jnp.array(content)),
    )
    where, rest = jnp.array([True, False, True, True]), np.array([0, 2, 3])

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


@each_option
def test_masked_class_is_not_there(options):
    z, labels, bad = logits(), jnp.array([1, 2, 3, 4]), jnp.array([np.nan, np.inf, -np.inf, 3e38])
    where = jnp.ones(K, bool).at[0].set(False)[None]
    weights = options.get("class_weights")
    fewer = options if weights is None else options | {"class_weights": weights[1:]}
    loss, gradient = loss_and_gradient(integer_loss, z.at[:, 0].set(bad), labels, where=where, **options)
    wanted, wanted_gradient = loss_and_gradient(integer_loss, z[:, 1:], labels - 1, **fewer)
    assert_close(jnp.asarray(loss), wanted, jnp.float32)
    assert (gradient[:, 0] == 0).all()
    assert_close(jnp.asarray(gradient[:, 1:]), wanted_gradient, jnp.float32)
    closer, _ = loss_and_gradient(integer_loss, z[:, 1:] - 0.01 * wanted_gradient, labels - 1, **fewer)
    assert (closer < wanted).all()  # which zeros, or the gradient's negative, would not do

    t = jax.nn.softmax(logits(1))
    loss, gradient = loss_and_gradient(dense_loss, z.at[:, 0].set(bad), t.at[:, 0].set(bad), where=where, **options)
    wanted, wanted_gradient = loss_and_gradient(dense_loss, z[:, 1:], t[:, 1:], **fewer)
    assert_close(jnp.asarray(loss), wanted, jnp.float32)
    assert (gradient[:, 0] == 0).all()
    assert_close(jnp.asarray(gradient[:, 1:]), wanted_gradient, jnp.float32)


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


# Smoothing over the classes that are there


def test_class_mask_and_smoothing_smooth_over_unmasked_classes_only():
    z, where = logits(), jnp.array([True, True, False, True, False])
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
        assert_close(jnp.asarray(loss), -(smoothed * log_o).sum(-1), jnp.float32)
        assert_close(jnp.asarray(got), gradient, jnp.float32)


# Infinities


def test_minus_inf_logits_without_target_do_not_count():
    z, labels = logits().at[:, 2].set(-jnp.inf), jnp.array([0, 1, 3, 4])
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
        assert_close(jnp.asarray(got[0]), wanted[0], jnp.float32)
        assert_close(jnp.asarray(got[1][:, rest]), wanted[1], jnp.float32)
        assert (got[1][:, 2] == 0).all()


@pytest.mark.parametrize("name", ["class_weights", "logit_cap", "z_loss"])
@pytest.mark.parametrize("dense", [False, True])
def test_minus_inf_logits_without_target_leave_the_gradient_of_options_finite(dense, name):
    z, labels = logits().at[:, 2].set(-jnp.inf), jnp.array([0, 1, 3, 4])
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


def test_logit_cap_makes_infinite_logits_finite():
    z, labels = logits().at[:, 2].set(-jnp.inf).at[0, 4].set(jnp.inf), jnp.array([0, 1, 2, 4])
    capped = (3 * jnp.tanh(z / 3)).at[0, 4].set(3)
    loss, gradient = loss_and_gradient(integer_loss, z, labels, logit_cap=3)
    wanted, wanted_gradient = loss_and_gradient(integer_loss, capped, labels)
    assert_close(jnp.asarray(loss), wanted, jnp.float32)
    slope = np.asarray(1 - jnp.tanh(z / 3) ** 2)
    assert (gradient[:, 2] == 0).all() and gradient[0, 4] == 0
    assert_close(jnp.asarray(gradient), wanted_gradient * slope, jnp.float32, factor=4)


def test_target_mass_on_minus_inf_is_inf():
    z, t = logits().at[:, 2].set(-jnp.inf), jnp.full((N, K), 0.2)
    loss, gradient = loss_and_gradient(dense_loss, z, t)
    assert (loss == np.inf).all()
    assert_close(jnp.asarray(gradient), np.asarray(jax.nn.softmax(z)) - 0.2, jnp.float32)
    loss, gradient = loss_and_gradient(integer_loss, z, jnp.full(N, 2))
    assert (loss == np.inf).all()
    assert_close(jnp.asarray(gradient), np.asarray(jax.nn.softmax(z)) - np.eye(K)[2], jnp.float32)
    loss, _ = loss_and_gradient(integer_loss, z, jnp.array([0, 1, 3, 4]), label_smoothing=0.1)
    assert (loss == np.inf).all()
    # Weight 0 is no mass, and so is no smoothing where the class is masked.
    weights = jnp.ones(K).at[2].set(0)
    selections: list[dict[str, Any]] = [{"class_weights": weights}, {"where": jnp.isfinite(z)}]
    for options in selections:
        assert np.isfinite(dense_loss(z, t, **options)).all()
        assert np.isfinite(integer_loss(z, jnp.array([0, 1, 3, 4]), label_smoothing=0.1, **options)).all()
    assert (integer_loss(z, jnp.full(N, 2), class_weights=weights) == 0).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_row_without_a_finite_maximum_is_nan(bad, dense):
    z, labels = logits(), jnp.array([1, 2, 3, 4])
    call, targets = (dense_loss, jax.nn.one_hot(labels, K)) if dense else (integer_loss, labels)
    valid = loss_and_gradient(call, z, targets)
    assert_only_row_is_nan(*loss_and_gradient(call, z.at[1, 0].set(bad), targets), 1, valid)
    assert_only_row_is_nan(*loss_and_gradient(call, z.at[1].set(-jnp.inf), targets), 1, valid)


# Options out of range


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": -0.1}, {"label_smoothing": 1.1}, {"logit_cap": 0.0}, {"logit_cap": -1}, {"z_loss": -1.0}],
)
@pytest.mark.parametrize("loss_fn", [dense_loss, integer_loss])
def test_option_out_of_range(loss_fn, option):
    z = logits()
    labels = jnp.zeros(N, jnp.int32) if loss_fn is integer_loss else jax.nn.softmax(z)
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


# checkify

LABELS = jnp.array([0, 4, 2, 1])
TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda z, y: f(z, y).sum()),
    "value_and_grad of jit": lambda f: jax.value_and_grad(lambda z, y: jax.jit(f)(z, y).sum()),
    "jvp": lambda f: lambda z, y: jax.jvp(lambda z: f(z, y), (z,), (z,)),
    "vmap": jax.vmap,
    "scan": lambda f: lambda z, y: jax.lax.scan(lambda total, row: (total + f(*row), None), 0.0, (z, y))[0],
    "checkpoint": lambda f: jax.grad(jax.checkpoint(lambda z, y: f(z, y).sum())),
    "cond": lambda f: lambda z, y: jax.lax.cond(z[0, 0] < 1e9, f, lambda z, y: jnp.zeros(N), z, y),
    "while_loop": lambda f: (
        lambda z, y: jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + f(z, y)), (0, jnp.zeros(N)))
    ),
    "shard_map": lambda f: jax.jit(
        jax.shard_map(
            f,
            mesh=jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=P("rows"),
            out_specs=P("rows"),
        )
    ),
}


def checked_loss(z, y, **options):
    jaxce.check_labels(y, K, **options)
    return integer_loss(z, y, **options)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_check_disturbs_no_transform(transform):
    transformed = transform(checked_loss)
    results = transformed(logits(), LABELS)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(results))
    again = transformed(logits(), LABELS.at[1].set(K))
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(again))


@pytest.mark.parametrize(
    "name", ["plain", "jit", "grad", "value_and_grad of jit", "jvp", "scan", "vmap", "checkpoint", "cond"]
)
def test_checkify_names_row_and_label(name):
    checked = jax.jit(checkify.checkify(TRANSFORMS[name](checked_loss)))
    error, _ = checked(logits(), LABELS)
    assert error.get() is None
    error, _ = checked(logits(), LABELS.at[2].set(17))
    message = error.get()
    assert message is not None and message.startswith("check_labels: labels has 17 in row ")
    if name not in ("scan", "vmap"):  # there the function sees single rows
        assert "in row 2 " in message
    assert f"wanted 0 to {K - 1}" in message
    with pytest.raises(checkify.JaxRuntimeError, match="labels has -1 in row"):
        checked(logits(), LABELS.at[1].set(-1))[0].throw()


def test_checkify_is_content_with_rows_that_do_not_take_part():
    z, labels = logits(), LABELS.at[2].set(17)
    selections: list[dict[str, Any]] = [{"ignore_index": 17}, {"where": jnp.array([True, True, False, True])}]
    for options in selections:
        error, loss = checkify.checkify(lambda z, y, o=options: checked_loss(z, y, **o))(z, labels)
        assert error.get() is None and loss[2] == 0
