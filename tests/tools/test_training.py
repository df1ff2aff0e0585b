"""The losses train: in an optax step, with a Flax NNX and with an Equinox model, as the losses of optax do."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import FORMS, assert_close, dense, logits

optax = pytest.importorskip("optax")


@pytest.fixture(autouse=True)
def standard_promotion():
    """The optimizers of optax need JAX's default promotion (integer step counts, powers of Python floats)."""
    with jax.numpy_dtype_promotion("standard"):
        yield


N, D, K, STEPS = 64, 5, 3, 30
each_form = pytest.mark.parametrize("form", FORMS)
SEEDS = pytest.mark.parametrize("seed", [0], ids="seed{}".format)


def separable_data(seed: int, form: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, their classes, and the classes as the loss of this form takes them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, D))
    y = (x @ rng.standard_normal((D, K))).argmax(-1)
    targets = jnp.asarray(y, jnp.int32) if form == "integer" else jnp.asarray(dense(y, K), jnp.float32)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32), targets


def loss_of(library, form: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return library.softmax_cross_entropy_with_integer_labels if form == "integer" else library.softmax_cross_entropy


def assert_trains(train: Callable[[Callable], tuple[jax.Array, jax.Array]], form: str, labels: jax.Array) -> None:
    """`train`, from a loss to (the loss of each step, the last logits), learns, and along the curve of optax."""
    losses, last = train(loss_of(jaxce, form))
    assert losses[-1] < 0.3 * losses[0]
    assert (last.argmax(-1) == labels).mean() > 0.9
    peer_losses, _ = train(loss_of(optax, form))
    np.testing.assert_allclose(losses, peer_losses, rtol=1e-4)


@each_form
@SEEDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flax itself, importing names that jax deprecates
def test_flax_nnx(form, seed):
    nnx = pytest.importorskip("flax.nnx")
    x, labels, targets = separable_data(seed, form)

    def train(loss):
        model = nnx.Linear(D, K, rngs=nnx.Rngs(seed))
        optimizer = nnx.Optimizer(model, optax.adam(0.2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, gradient = nnx.value_and_grad(lambda model: loss(model(x), targets).mean())(model)
            optimizer.update(model, gradient)
            return value

        return jnp.array([step(model, optimizer) for _ in range(STEPS)]), model(x)

    assert_trains(train, form, labels)


@each_form
@SEEDS
def test_equinox(form, seed):
    eqx = pytest.importorskip("equinox")
    x, labels, targets = separable_data(seed, form)

    def train(loss):
        model = eqx.nn.Linear(D, K, key=jax.random.key(seed))
        optimizer = optax.adam(0.2)
        state = optimizer.init(eqx.filter(model, eqx.is_array))

        @eqx.filter_jit
        def step(model, state):
            value, gradient = eqx.filter_value_and_grad(lambda model: loss(jax.vmap(model)(x), targets).mean())(model)
            updates, state = optimizer.update(gradient, state)
            return eqx.apply_updates(model, updates), state, value

        losses = []
        for _ in range(STEPS):
            model, state, value = step(model, state)
            losses.append(value)
        return jnp.array(losses), jax.vmap(model)(x)

    assert_trains(train, form, labels)


@each_form
@SEEDS
def test_gradient_is_o_minus_y(form, seed):
    """With respect to the logits; and so a bias's is its mean over the rows, and a kernel's is xᵀ(o − y)/N."""
    x, labels, targets = separable_data(seed, form)
    w, b, loss = logits(D, K, seed=seed), logits(K, seed=seed + 1), loss_of(jaxce, form)

    def model(w, b):
        return jnp.matmul(x, w) + b[None]

    o = jaxce.reference.softmax(model(w, b))
    o_minus_y = np.asarray(o, np.float64) - dense(np.asarray(labels), K)
    gradient = jax.grad(lambda z: loss(z, targets).sum())(model(w, b))
    assert_close(gradient, o_minus_y, "float32")
    dw, db = jax.grad(lambda w, b: loss(model(w, b), targets).mean(), (0, 1))(w, b)
    assert_close(dw, np.asarray(x, np.float64).T @ o_minus_y / N, "float32", factor=5)
    assert_close(db, o_minus_y.mean(0), "float32", factor=5)
