"""Every mode of differentiation, of any order, against plain autodiff of the reference formulas in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import jaxce

from ..helpers import (
    FORMS,
    LOSSES,
    MODES,
    OPTION_SETS,
    WRAPPERS,
    Function,
    assert_close,
    assert_same_in_mode,
    cases,
    logits,
    option_values,
    probabilities,
    random_labels,
    targets_of,
    with_gradient,
)

pytestmark = pytest.mark.usefixtures("x64")

N, K = 2, 4
VARIABLES = ("logits of labels", "logits of dense", "dense", "logits and dense")
# Logits and dense targets that vary together cover each of them; alone they are quick in two modes only.
BOTH = ("logits of labels", "logits and dense")


def losses_of(variable: str, library) -> tuple[Function, jax.Array]:
    """The losses of N rows as a function of `variable`, by `jaxce` or its `reference`, and a point [..., N, K]."""
    z, t, labels = logits(N, K, dtype="float64"), probabilities(N, K, dtype="float64"), random_labels(N, classes=K)
    t = 1.3 * t  # which do not sum to one
    integer, dense = library.softmax_cross_entropy_with_integer_labels, library.softmax_cross_entropy
    if variable == "logits of labels":
        return lambda z: integer(z, labels), z
    if variable == "logits of dense":
        return lambda z: dense(z, t), z
    if variable == "dense":
        return lambda t: dense(z, t), t
    return lambda v: dense(v[0], v[1]), jnp.stack([z, t])


def assert_same(mode: str, variable: str, wrap=lambda f: f, *, jit: bool = True) -> None:
    """The mode gives the same for jaxce as for the reference."""
    ours, point = losses_of(variable, jaxce)
    truth, _ = losses_of(variable, jaxce.reference)
    assert_same_in_mode(mode, wrap(ours), wrap(truth), point, jit=jit)


def cubed(losses: Function) -> Function:
    """Losses of dense targets are linear in them: without this, some derivatives were 0."""
    return lambda v: losses(v) ** 3


FIRST_ORDER_AND_PRODUCTS = (
    "value_and_grad",
    "vjp",
    "jvp",
    "linearize",
    "linear_transpose",
    "jacfwd",
    "jacrev",
    "jvp of grad",
    "grad of jvp",
    "grad of grad",
    "hessian of a number",
)
QUICK_FIRST = {(mode, variable) for mode in FIRST_ORDER_AND_PRODUCTS for variable in BOTH}
QUICK_FIRST |= {(mode, variable) for mode in ("value_and_grad", "jvp") for variable in VARIABLES}


@pytest.mark.parametrize("mode, variable", cases(FIRST_ORDER_AND_PRODUCTS, VARIABLES, quick=QUICK_FIRST))
def test_first_order_and_products(mode, variable):
    assert_same(mode, variable)


SECOND_ORDER = ("jacfwd of jacfwd", "jacfwd of jacrev", "jacrev of jacfwd", "jacrev of jacrev")
THIRD_ORDER = ("jacfwd of jacfwd of jacfwd", "jacrev of jacrev of jacrev", "jacfwd of jacrev of jacfwd")
QUICK_HIGHER = {(mode, variable) for mode in SECOND_ORDER for variable in BOTH}
QUICK_HIGHER |= {("jacfwd of jacrev of jacfwd", "logits and dense")}


@pytest.mark.parametrize("mode, variable", cases(SECOND_ORDER + THIRD_ORDER, BOTH, quick=QUICK_HIGHER))
def test_second_and_third_order(mode, variable):
    assert_same(mode, variable, cubed)


QUICK_WRAPPED = {(wrapper, "grad of jvp", "logits of labels") for wrapper in WRAPPERS}
QUICK_WRAPPED |= {(wrapper, "value_and_grad", "logits and dense") for wrapper in WRAPPERS}


@pytest.mark.parametrize(
    "wrapper, mode, variable", cases(WRAPPERS, ("value_and_grad", "grad of jvp"), BOTH, quick=QUICK_WRAPPED)
)
def test_through_transformations(wrapper, mode, variable):
    assert_same(mode, variable, WRAPPERS[wrapper])


QUICK_EAGER = {(mode, variable) for mode in ("value_and_grad", "jvp") for variable in BOTH}


@pytest.mark.parametrize(
    "mode, variable", cases(("value_and_grad", "jvp", "jacfwd of jacrev"), BOTH, quick=QUICK_EAGER)
)
def test_without_jit(mode, variable):
    assert_same(mode, variable, jit=False)


# ------------------------------------------------------------------------------------------ every option in every mode

OPTION_MODES = (
    "jacrev",
    "jacfwd",
    "linearize",
    "jacfwd of jacrev",
    "jacrev of jacfwd",
    "jacrev of jacrev",
    "jacfwd of jacfwd",
    "jvp of hessian",
    "scan",
    "checkpoint",
    "vmap of jacrev",
)
MASKED_FORMS = (*FORMS, "integer, masked", "dense, masked")
# By default every mode with all options together, for one form or both, and each option alone in forward mode.
QUICK_OPTIONS = {
    ("integer", "all", mode) for mode in OPTION_MODES if mode not in ("jvp of hessian", "jacrev of jacfwd")
}
QUICK_OPTIONS |= {
    ("dense, masked", "all", mode)
    for mode in ("jacrev", "jacfwd of jacrev", "jvp of hessian", "vmap of jacrev", "scan")
}
QUICK_OPTIONS |= {("integer, masked", "all", "jacrev of jacfwd")}
QUICK_OPTIONS |= {(form, options, "jacfwd") for form in ("integer, masked", "dense") for options in OPTION_SETS}


@pytest.mark.parametrize("form, options, mode", cases(MASKED_FORMS, OPTION_SETS, OPTION_MODES, quick=QUICK_OPTIONS))
def test_every_option_in_every_mode(form, options, mode):
    """One vector holds logits, dense targets and options: cross derivatives are compared as well."""
    values = {name: jnp.asarray(option_values(3)[name], "float64") for name in OPTION_SETS[options]}
    arguments = {"logits": logits(2, 3, dtype="float64")} | values
    if form.startswith("dense"):
        arguments["labels"] = 1.3 * probabilities(2, 3, dtype="float64")
    where = {"where": jnp.array([[True, True, True], [True, False, True]])} if form.endswith("masked") else {}
    vector, unravel = ravel_pytree(arguments)

    def of(module):
        integer, dense = module.softmax_cross_entropy_with_integer_labels, module.softmax_cross_entropy

        def loss(vector):
            values = unravel(vector)
            if "labels" in values:
                return dense(**values, **where)
            return integer(labels=jnp.array([1, 2]), **values, **where)

        return loss

    assert_same_in_mode(mode, of(jaxce), of(jaxce.reference), vector, factor=4)


# --------------------------------------------------------------------------------------------- check_grads and float32


@pytest.mark.parametrize("variable", VARIABLES)
def test_check_grads(variable):
    losses, point = losses_of(variable, jaxce)
    check_grads(losses, (point,), order=2)


@pytest.mark.parametrize("variable", VARIABLES[:2])
def test_float32_logits_have_float32_derivatives(variable):
    """Of first and second order, for logits that float32 holds exactly."""
    losses, point = losses_of(variable, jaxce)
    reference, _ = losses_of(variable, jaxce.reference)
    point = point.astype(jnp.float32)
    for name in ("jacfwd", "jacrev", "jacfwd of jacrev", "jacrev of jacfwd"):
        mode: Any = MODES[name]
        got, wanted = jax.jit(lambda z, mode=mode: (mode(losses, z, z), mode(reference, z.astype("float64"), z)))(point)
        dtype = "float32" if variable == "logits of labels" else got.dtype
        assert_close(got, wanted, dtype, factor=2)


# ----------------------------------------------------------------------------------------------- dtypes and vmap's axes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variable", VARIABLES[:3])
def test_tangents_and_cotangents_have_the_dtype_of_their_variable(variable, dtype):
    z, t, labels = logits(N, K, dtype=dtype), probabilities(N, K, dtype=dtype), random_labels(N, classes=K)
    losses, point = {
        "logits of labels": (lambda z: LOSSES["integer"](z, labels), z),
        "logits of dense": (lambda z: LOSSES["dense"](z, t), z),
        "dense": (lambda t: LOSSES["dense"](z, t), t),
    }[variable]
    out, rate = jax.eval_shape(lambda v: jax.jvp(losses, (v,), (v,)), point)
    assert out.dtype == rate.dtype == jnp.float32
    assert jax.eval_shape(jax.grad(lambda v: losses(v).sum()), point).dtype == dtype
    assert jax.eval_shape(jax.hessian(lambda v: losses(v).sum()), point).dtype == dtype


@pytest.mark.parametrize(
    "in_axes, out_axes",
    [((0, 0), 0), ((1, 0), 1), ((2, 1), 0), ((-1, None), -1), ((None, 0), 1), ((1, -1), 0)],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_vmap_is_the_batched_loss(form, in_axes, out_axes):
    """For any in_axes, of losses and gradients; an axis of None is shared by the batch."""
    batch, loss = 4, LOSSES[form]
    z, targets = np.asarray(logits(batch, N, K, dtype="float64")), np.asarray(targets_of(form, batch, N, K))
    targets = targets if form == "integer" else targets.astype("float64")

    def gradient(z, t):
        return with_gradient(lambda z: loss(z, t) ** 2, z)[1]

    arguments = [a[0] if axis is None else a for a, axis in zip((z, targets), in_axes, strict=True)]
    moved = [a if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip(arguments, in_axes, strict=True)]
    batched = [
        np.broadcast_to(a, (batch, *a.shape[-n:])) for a, n in zip(arguments, (2, targets.ndim - 1), strict=True)
    ]
    for f in (loss, gradient):
        got = jax.jit(jax.vmap(f, in_axes, out_axes))(*moved)
        assert_close(jnp.moveaxis(got, out_axes, 0), f(*batched), "float64")
