"""Losses that fused_linear serves (distillation, focal, DPO, …), each equal to itself with all the logits at hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxce import (
    LabelStatistics,
    fused_linear,
    label_statistics,
    linear_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

from ..helpers import assert_all_close, assert_close, head, logits, random_labels

N, D, K = 22, 6, 31


def labels(*shape):
    return random_labels(*shape, classes=K)


def assert_same(fused, materialized, *args):
    """Value and all gradients."""
    every = tuple(range(len(args)))
    got = jax.jit(jax.value_and_grad(fused, every))(*args)
    wanted = jax.jit(jax.value_and_grad(materialized, every))(*args)
    assert_all_close(got, wanted, tolerance=3e-6)


def test_distillation_from_a_teacher_head():
    """KL(teacher ‖ student), the teacher's logits made per block too; the teacher may learn as well."""

    def divergence(z, teacher_x, teacher_w):
        teacher = jax.nn.softmax(teacher_x @ teacher_w)
        entropy = softmax_cross_entropy(jax.nn.log_softmax(teacher_x @ teacher_w), teacher)
        return softmax_cross_entropy(z, teacher) - entropy

    def fused(x, w, teacher_x, teacher_w):
        return fused_linear(lambda z, t: divergence(z, t, teacher_w), block_size=8)(x, w, teacher_x)

    def materialized(x, w, teacher_x, teacher_w):
        return divergence(x @ w, teacher_x, teacher_w).mean()

    assert_same(fused, materialized, logits(N, D), logits(D, K, seed=1), logits(N, 4, seed=2), logits(4, K, seed=3))


def test_focal_loss():
    y = labels(N)

    def focal(z, y, gamma):
        loss = softmax_cross_entropy_with_integer_labels(z, y)
        return (1 - jnp.exp(-loss)) ** gamma * loss

    assert_same(
        lambda x, w, gamma: fused_linear(lambda z, y: focal(z, y, gamma), block_size=8)(x, w, y),
        lambda x, w, gamma: focal(x @ w, y, gamma).mean(),
        logits(N, D),
        logits(D, K, seed=1),
        jnp.float32(2.5),
    )


def test_direct_preference_optimization():
    """Pairs of sequences [pairs, 2, tokens]: log-probabilities per token, summed over each, compared within pairs."""
    y = labels(3, 2, 7)
    reference = -3 * jnp.ones((3, 2))

    def preference(log_likelihoods):
        chosen, rejected = jnp.moveaxis(log_likelihoods.sum(-1) - reference, 1, 0)
        return -jax.nn.log_sigmoid(0.1 * (chosen - rejected)).mean()

    def fused(x, w):
        token_losses = fused_linear(softmax_cross_entropy_with_integer_labels, reduction="none", block_size=8)
        return preference(-token_losses(x, w, y))

    def materialized(x, w):
        return preference(-softmax_cross_entropy_with_integer_labels(x @ w, y))

    assert_same(fused, materialized, logits(3, 2, 7, D), logits(D, K, seed=1))


def test_policy_gradient_with_entropy_bonus():
    actions = labels(N)

    def policy_loss(z, actions, advantage, old_log_p):
        log_o = jax.nn.log_softmax(z)
        entropy = -jnp.sum(jnp.exp(log_o) * log_o, -1)
        ratio = jnp.exp(-softmax_cross_entropy_with_integer_labels(z, actions) - old_log_p)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.minimum(ratio * advantage, clipped * advantage) - 0.01 * entropy

    old = -3.4 + 0.1 * logits(N, seed=4)
    assert_same(
        lambda x, w, advantage: fused_linear(policy_loss, block_size=8)(x, w, actions, advantage, old),
        lambda x, w, advantage: policy_loss(x @ w, actions, advantage, old).mean(),
        0.1 * logits(N, D),
        logits(D, K, seed=1),
        logits(N, seed=2),
    )


def test_accuracy_as_aux():
    x, w, y = logits(N, D), logits(D, K, seed=1), labels(N)

    def with_accuracy(z, y):
        return softmax_cross_entropy_with_integer_labels(z, y), z.argmax(-1) == y

    f = fused_linear(with_accuracy, has_aux=True, block_size=8)
    (loss, correct), dw = jax.jit(jax.value_and_grad(f, 1, has_aux=True))(x, w, y)
    np.testing.assert_array_equal(correct, (x @ w).argmax(-1) == y)
    np.testing.assert_allclose(loss, softmax_cross_entropy_with_integer_labels(x @ w, y).mean(), rtol=1e-6)
    wanted = jax.grad(lambda w: softmax_cross_entropy_with_integer_labels(x @ w, y).mean())(w)
    assert_close(dw, wanted, "float32", tolerance=3e-6)


def test_gradient_of_a_closed_over_python_number():
    """It is weakly typed, as an array is not."""
    x, w, labels = head(5, 3, 4)

    def total(scale):
        return fused_linear(lambda z, y: scale * softmax_cross_entropy_with_integer_labels(z, y))(x, w, labels)

    assert_close(jax.grad(total)(1.3), total(1.0), "float32", factor=4)


def test_typed_keys_as_row_arguments_and_closed_over():
    """Noise of each row, from its own key, and from one that all rows share. Blocks repeat some rows."""
    keys, key = jax.random.split(jax.random.key(1), N), jax.random.key(2)

    def noisy(z, keys):
        own, shared = jax.vmap(lambda k: jax.random.normal(k, (K,)))(keys), jax.random.normal(key, (K,))
        return jax.nn.logsumexp(z + own + shared[None], -1)

    def materialized(x, w):
        return noisy(x @ w, keys).mean(), keys

    for reduction in ("mean", "none"):

        def fused(x, w, reduction: Any = reduction):
            of_rows = fused_linear(lambda z, k: (noisy(z, k), k), reduction=reduction, has_aux=True, block_size=8)
            loss, aux = of_rows(x, w, keys)
            return loss.mean(), aux

        (got, aux), gradients = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(logits(N, D), logits(D, K))
        (wanted, _), truth = jax.jit(jax.value_and_grad(materialized, (0, 1), has_aux=True))(logits(N, D), logits(D, K))
        assert_all_close((got, gradients), (wanted, truth), tolerance=3e-6)
        assert (aux == keys).all()


def test_4_bit_integers_as_labels_and_row_arguments():
    loss, y = softmax_cross_entropy_with_integer_labels, random_labels(N, classes=7)
    by_classes = partial(linear_cross_entropy, recompute=True)
    for few in (y.astype("int4"), y.astype("uint4")):
        for fused in (fused_linear(loss, block_size=8), linear_cross_entropy, by_classes):
            fused_few, materialized = (lambda x, w, f=fused, y=few: f(x, w, y)), (lambda x, w: loss(x @ w, y).mean())
            assert_same(fused_few, materialized, logits(N, D), logits(D, 7))


def test_several_numbers_of_each_row():
    """A pytree: what is floating is differentiated, each with its own cotangent, and the rest returned."""
    y, weights = labels(2, 11), jnp.linspace(0.5, 2, 22).reshape(2, 11)
    f = fused_linear(lambda z, y: {"all": label_statistics(z, y), "best": z.argmax(-1)}, reduction="none", block_size=8)

    def objective(numbers):
        stats = numbers["all"]
        return (jnp.sin(stats.log_prob) * stats.entropy + stats.log_normalizer**2).sum(), numbers

    def fused(x, w):
        return objective(f(x, w, y, weights=weights))

    def materialized(x, w):
        z = x @ w
        stats = label_statistics(z, y)
        log_prob, log_normalizer, entropy = (weights * a for a in stats[:3])
        stats = LabelStatistics(log_prob, log_normalizer, entropy, stats.correct)
        return objective({"all": stats, "best": z.argmax(-1)})

    point = logits(2, 11, D), logits(D, K, seed=1)
    got, wanted = (jax.jit(jax.value_and_grad(g, (0, 1), has_aux=True))(*point) for g in (fused, materialized))
    assert_all_close(got, wanted, tolerance=3e-6)
    assert got[0][1]["all"].correct.dtype == bool and isinstance(got[0][1]["all"], LabelStatistics)
