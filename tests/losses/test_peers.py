"""What the README says of other libraries, where they and jaxce differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers.oracle import assert_close

integer_loss, dense_loss = jaxce.softmax_cross_entropy_with_integer_labels, jaxce.softmax_cross_entropy
Z = jnp.array([[1.0, 2.0, 3.0]])
PROBABILITIES = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()


def with_gradient(loss, z, targets, **options):
    losses, pullback = jax.vjp(lambda z: loss(z, targets, **options), z)
    return losses, pullback(jnp.ones_like(losses))[0]


def test_optax():
    optax = pytest.importorskip("optax", reason="optax is a test dependency")
    peer = optax.softmax_cross_entropy_with_integer_labels
    for label, theirs in ((-1, (PROBABILITIES - np.eye(3)[2])[None]), (3, PROBABILITIES[None])):
        np.testing.assert_allclose(with_gradient(peer, Z, jnp.array([label]))[1], theirs, 1e-5)
        loss, gradient = with_gradient(integer_loss, Z, jnp.array([label]))
        assert np.isnan(loss).all() and np.isnan(gradient).all()
    impossible, targets = jnp.array([[1.0, -jnp.inf, 3.0]]), jnp.array([[0.5, 0.0, 0.5]])
    assert np.isnan(optax.softmax_cross_entropy(impossible, targets)).all()
    np.testing.assert_allclose(
        dense_loss(impossible, targets), optax.safe_softmax_cross_entropy(impossible, targets), 1e-6
    )
    half = Z.astype(jnp.bfloat16), jnp.array([0])
    assert peer(*half).dtype == jnp.bfloat16 and integer_loss(*half).dtype == jnp.float32


def test_torch():
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
    assert (with_gradient(integer_loss, jnp.asarray(z), jnp.array([-100, 1]), ignore_index=-100)[1][0] == 0).all()

    x, w = np.eye(3, dtype=np.float32)[:2], np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
    theirs = torch.nn.functional.linear_cross_entropy(torch.tensor(x), torch.tensor(w), torch.tensor([4, 1]))
    np.testing.assert_allclose(jaxce.linear_cross_entropy(x, w, np.array([4, 1]), class_axis=0), theirs, 1e-6)


def test_t5x():
    """compute_weighted_cross_entropy with label_smoothing, and cross_entropy_with_logits of an all-zero row."""
    smoothing, classes, z_loss = 0.1, 3, 0.01
    low = smoothing / (classes - 1)
    soft = np.where(np.eye(classes)[[1]] == 1, 1 - smoothing, low)
    entropy = -(soft * np.log(soft)).sum(-1)
    lse = np.log(np.exp([1.0, 2.0, 3.0]).sum())
    theirs = -(soft * np.log(PROBABILITIES)).sum(-1) + z_loss * lse**2 - entropy
    ours = integer_loss(Z, jnp.array([1]), label_smoothing=smoothing * classes / (classes - 1), z_loss=z_loss)
    assert_close(ours - entropy.astype(np.float32), theirs, jnp.float32)
    part = z_loss * jaxce.label_statistics(Z, jnp.array([1])).log_normalizer ** 2
    assert_close(part, [z_loss * lse**2], jnp.float32)
    _, gradient = with_gradient(dense_loss, Z, jnp.zeros((1, 3)), z_loss=z_loss)
    assert_close(gradient, 2 * z_loss * lse * PROBABILITIES[None], jnp.float32)
