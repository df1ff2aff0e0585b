"""Other libraries: options that mean the same there, and the differences that `notebooks/coming_from.ipynb` shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import (
    assert_close,
    dense_loss,
    integer_loss,
    logits,
    loss_and_gradient,
    probabilities,
    with_gradient,
)

N, K = 6, 5
LABELS = jnp.array([0, 4, 2, 2, 1, 3])
WEIGHTS = (0.5, 2.0, 0.0, 1.5, 3.0)

# ------------------------------------------------------------------------------------------------------- as in PyTorch

REDUCTIONS = ("none", "sum", "mean")


def reduced(loss, weights, reduction):
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / weights.sum()}[reduction]


def in_torch(torch, z, targets, **options):
    z = torch.tensor(np.asarray(z), requires_grad=True)
    options = {k: torch.tensor(np.asarray(v)) if k == "weight" and v is not None else v for k, v in options.items()}
    loss = torch.nn.functional.cross_entropy(z, torch.tensor(np.asarray(targets)), **options)
    (loss * torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return loss.detach().numpy(), z.grad.numpy()


def in_jax(loss_fn, z):
    """As `in_torch`: the loss, and its gradient for cotangents from −1 to 2."""
    loss = jax.eval_shape(loss_fn, z)
    return with_gradient(loss_fn, z, jnp.linspace(-1, 2, loss.size, dtype=loss.dtype).reshape(loss.shape))


def assert_as_in_torch(loss_fn, z, targets, row_weights, weights, **torch_options):
    """loss_fn(z, smoothing) per row, in every reduction: value and gradient."""
    torch = pytest.importorskip("torch", reason="torch is in the extra 'torch'")

    @jax.jit
    def ours(z, smoothing):
        return {r: in_jax(lambda z, r=r: reduced(loss_fn(z, smoothing), row_weights, r), z) for r in REDUCTIONS}

    for smoothing in (0.0, 0.1, 1.0):
        got = ours(z, smoothing)
        for reduction in REDUCTIONS:
            options = {"weight": weights, "label_smoothing": smoothing, "reduction": reduction}
            truth, gradient = in_torch(torch, z, targets, **options, **torch_options)
            assert np.abs(gradient).max() > 1e-2
            assert_close(got[reduction][0], truth, "float64")
            assert_close(got[reduction][1], gradient, "float64")


@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("axis", [-1, 1])
def test_integer_labels_as_in_torch(x64, axis, weights, ignore_index):
    z = logits(*((N, K) if axis == -1 else (3, K, 2)), dtype="float64")
    labels = (LABELS if ignore_index != -100 else LABELS.at[1].set(-100)).reshape((N,) if axis == -1 else (3, 2))
    c = None if weights is None else jnp.array(weights)
    counted = jnp.ones(labels.shape, bool) if ignore_index is None else labels != ignore_index
    row_weights = jnp.where(counted, 1.0 if c is None else c[jnp.where(counted, labels, 0)], 0.0)

    def loss(z, smoothing):
        return integer_loss(z, labels, axis, ignore_index=ignore_index, label_smoothing=smoothing, class_weights=c)

    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    assert_as_in_torch(loss, z, np.asarray(labels, np.int64), row_weights, c, **options)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_dense_targets_as_in_torch(x64, weights):
    z, t = logits(N, K, dtype="float64"), probabilities(N, K, dtype="float64")
    c = None if weights is None else jnp.array(weights)

    def loss(z, smoothing):
        return dense_loss(z, t, label_smoothing=smoothing, class_weights=c)

    assert_as_in_torch(loss, z, t, jnp.ones(N), c)


# ------------------------------------------------------------------------------------------------- as in optax and T5X


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_smoothing_as_in_optax(smoothing):
    optax = pytest.importorskip("optax", reason="optax is a test dependency")
    z, one_hot = logits(N, K), jax.nn.one_hot(LABELS, K)
    truth = in_jax(lambda z: optax.softmax_cross_entropy(z, optax.smooth_labels(one_hot, smoothing)), z)
    for loss_fn, targets in ((integer_loss, LABELS), (dense_loss, one_hot)):
        loss, gradient = in_jax(lambda z, f=loss_fn, t=targets: f(z, t, label_smoothing=smoothing), z)
        assert_close(loss, truth[0], "float32")
        assert_close(gradient, truth[1], "float32")


@pytest.mark.parametrize("z_loss", [1e-4, 0.1, 1.0])
def test_z_loss_as_in_t5x(z_loss):
    """t5x.losses.cross_entropy_with_logits, for targets that sum to one."""
    z, one_hot = logits(N, K), jax.nn.one_hot(LABELS, K)

    def t5x(z, targets):
        log_z = jax.nn.logsumexp(z, -1, keepdims=True)
        loss = -(targets * (z - log_z)).sum(-1) + z_loss * log_z[..., 0] ** 2
        return loss, (1 + 2 * z_loss * log_z) * jnp.exp(z - log_z) - targets

    for loss_fn, targets, dense in (
        (integer_loss, LABELS, one_hot),
        (dense_loss, one_hot, one_hot),
        (dense_loss, probabilities(N, K), probabilities(N, K)),
    ):
        loss, gradient = loss_and_gradient(loss_fn, z, targets, z_loss=z_loss)
        truth, wanted = t5x(z, dense)
        assert_close(loss, truth, "float32")
        assert_close(gradient, wanted, "float32")


# ------------------------------------------------------------------------------------------------- the differences

Z = jnp.array([[1.0, 2.0, 3.0]])
PROBABILITIES = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()


def test_differences_to_optax():
    optax = pytest.importorskip("optax", reason="optax is a test dependency")
    peer = optax.softmax_cross_entropy_with_integer_labels
    for label, theirs in ((-1, (PROBABILITIES - np.eye(3)[2])[None]), (3, PROBABILITIES[None])):
        np.testing.assert_allclose(loss_and_gradient(peer, Z, jnp.array([label]))[1], theirs, 1e-5)
        loss, gradient = loss_and_gradient(integer_loss, Z, jnp.array([label]))
        assert np.isnan(loss).all() and np.isnan(gradient).all()
    impossible = logits(N, K).at[:, 1].set(-jnp.inf)
    targets = jax.nn.softmax(logits(N, K, seed=1).at[:, 1].set(-jnp.inf))
    assert np.isnan(optax.softmax_cross_entropy(impossible, targets)).all()
    loss, gradient = loss_and_gradient(dense_loss, impossible, targets)
    safe, wanted = loss_and_gradient(optax.safe_softmax_cross_entropy, impossible, targets)
    assert np.isfinite(safe).all()
    assert_close(loss, safe, "float32")
    assert_close(gradient, wanted, "float32")
    half = Z.astype(jnp.bfloat16), jnp.array([0])
    assert peer(*half).dtype == jnp.bfloat16 and integer_loss(*half).dtype == jnp.float32


def test_differences_to_torch():
    torch = pytest.importorskip("torch", reason="torch is in the extra 'torch'")
    peer = torch.nn.functional.cross_entropy
    z = np.array([[1.0, 2, 3], [1, 2, 3]], np.float32)
    weights, labels = np.array([0.5, 2, 1], np.float32), np.array([0, 1])
    ours = integer_loss(z, labels, class_weights=weights)
    theirs = peer(torch.tensor(z), torch.tensor(labels), weight=torch.tensor(weights))
    np.testing.assert_allclose(theirs, ours.sum() / weights[labels].sum(), 1e-6)
    o = np.broadcast_to(PROBABILITIES, (2, 3)).astype(np.float32)
    theirs = peer(torch.tensor(z), torch.tensor(o), weight=torch.tensor(weights))
    np.testing.assert_allclose(theirs, dense_loss(z, o, class_weights=weights).mean(), 1e-6)

    assert peer(torch.tensor(z), torch.tensor([-100, -100])).isnan()
    none = jaxce.linear_cross_entropy(z, jnp.eye(3), np.array([-100, -100]), ignore_index=-100)
    assert none == 0
    with pytest.raises(IndexError):
        peer(torch.tensor(z), torch.tensor([3, 0]))

    z[0] = np.nan
    theirs = torch.tensor(z, requires_grad=True)
    peer(theirs, torch.tensor([-100, 1]), reduction="sum").backward()
    assert theirs.grad is not None and theirs.grad[0].isnan().all()
    assert (loss_and_gradient(integer_loss, z, jnp.array([-100, 1]), ignore_index=-100)[1][0] == 0).all()

    x, w = np.eye(3, dtype=np.float32)[:2], np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
    theirs = torch.nn.functional.linear_cross_entropy(torch.tensor(x), torch.tensor(w), torch.tensor([4, 1]))
    np.testing.assert_allclose(jaxce.linear_cross_entropy(x, w, np.array([4, 1]), class_axis=0), theirs, 1e-6)


def test_differences_to_t5x():
    """compute_weighted_cross_entropy with label_smoothing, and cross_entropy_with_logits of an all-zero row."""
    smoothing, classes, z_loss = 0.1, 3, 0.01
    low = smoothing / (classes - 1)
    soft = np.where(np.eye(classes)[[1]] == 1, 1 - smoothing, low)
    entropy = -(soft * np.log(soft)).sum(-1)
    lse = np.log(np.exp([1.0, 2.0, 3.0]).sum())
    theirs = -(soft * np.log(PROBABILITIES)).sum(-1) + z_loss * lse**2 - entropy
    ours = integer_loss(Z, jnp.array([1]), label_smoothing=smoothing * classes / (classes - 1), z_loss=z_loss)
    assert_close(ours - entropy.astype(np.float32), theirs, "float32")
    part = z_loss * jaxce.label_statistics(Z, jnp.array([1])).log_normalizer ** 2
    assert_close(part, [z_loss * lse**2], "float32")
    _, gradient = loss_and_gradient(dense_loss, Z, jnp.zeros((1, 3)), z_loss=z_loss)
    assert_close(gradient, 2 * z_loss * lse * PROBABILITIES[None], "float32")
