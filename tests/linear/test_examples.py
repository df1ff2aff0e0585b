"""Losses of a head to copy. Each equals the formula of all its logits, and holds a few blocks of them.

x is [..., D], w [D, K], and what has a number for each row [...]. T is the axis of time. A label is the class that its
row should predict, and -1 where the row does not count: in prompts, and in padding.
"""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.nn import log_softmax, logsumexp, softmax

from jaxce import fused_linear, linear_cross_entropy, linear_label_statistics

from ..helpers import assert_all_close, compiled, head, logits, probabilities, temp_bytes_of


def dpo(x, w, labels, reference_log_probs, beta=0.1):
    """Direct preference optimization (Rafailov et al., 2023)."""
    # labels, reference_log_probs [pairs, 2, T]: of the chosen answer, and of the rejected one
    log_probs = linear_label_statistics(x, w, labels, ignore_index=-1).log_prob
    gains = (log_probs - reference_log_probs).sum(-1, where=labels != -1)
    return -jax.nn.log_sigmoid(beta * (gains[:, 0] - gains[:, 1])).mean()


def ppo(x, w, actions, old_log_probs, advantages, clip=0.2):
    """Proximal policy optimization: a clipped ratio, and an entropy bonus (Schulman et al., 2017)."""
    stats = linear_label_statistics(x, w, actions)
    ratio = jnp.exp(stats.log_prob - old_log_probs)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    return -(gain + 0.01 * stats.entropy).mean()


def grpo(x, w, labels, old_log_probs, reference_log_probs, rewards, clip=0.2):
    """Group relative policy optimization, with its KL penalty (DeepSeekMath: Shao et al., 2024)."""
    # labels and log_probs [groups, answers, T], rewards [groups, answers]
    log_probs = linear_label_statistics(x, w, labels, ignore_index=-1).log_prob
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, keepdims=True) + 1e-4)
    advantages = advantages[..., None]
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    change = reference_log_probs - log_probs
    penalty = jnp.exp(change) - change - 1
    return -(gain - 0.04 * penalty).mean(-1, where=labels != -1).mean()


def gspo(x, w, labels, old_log_probs, rewards, clip=3e-4):
    """Group sequence policy optimization: one ratio for each answer (Zheng et al., 2025)."""
    # labels and old_log_probs [groups, answers, T], rewards [groups, answers]
    log_probs = linear_label_statistics(x, w, labels, ignore_index=-1).log_prob
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, keepdims=True) + 1e-4)
    ratio = jnp.exp((log_probs - old_log_probs).mean(-1, where=labels != -1))
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.minimum(ratio * advantages, clipped * advantages).mean()


def forward_kl(x, w, teacher_x, teacher_w, temperature=2.0):
    """Distillation from a teacher's head, KL(teacher ‖ student) with a temperature (Hinton et al., 2015)."""

    @jax.checkpoint  # what lies between logits and loss is computed again, not kept
    def divergence(z, teacher_z):  # [rows, K] each
        log_q, log_p = (a - logsumexp(a, -1, keepdims=True) for a in (z, teacher_z))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    loss = fused_linear(lambda z, teacher_x: divergence(z, teacher_x @ teacher_w))
    return temperature**2 * loss(x / temperature, w, teacher_x / temperature)


def reverse_kl(x, w, teacher_x, teacher_w, temperature=2.0):
    """Distillation that seeks the teacher's modes, KL(student ‖ teacher) (MiniLLM: Gu et al., 2023)."""

    @jax.checkpoint  # as in forward_kl
    def divergence(z, teacher_z):
        log_q, log_p = (a - logsumexp(a, -1, keepdims=True) for a in (z, teacher_z))
        return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)

    loss = fused_linear(lambda z, teacher_x: divergence(z, teacher_x @ teacher_w))
    return temperature**2 * loss(x / temperature, w, teacher_x / temperature)


def jensen_shannon(x, w, teacher_x, teacher_w, beta=0.3, temperature=2.0):
    """Generalized Jensen-Shannon divergence of a teacher and a student (GKD: Agarwal et al., 2023)."""

    @jax.checkpoint  # as in forward_kl
    def divergence(z, teacher_z):  # of both from their mixture m
        log_q, log_p = (a - logsumexp(a, -1, keepdims=True) for a in (z, teacher_z))
        larger = lax.stop_gradient(jnp.maximum(log_p, log_q))  # subtracted, as both exp may be 0
        log_m = larger + jnp.log(beta * jnp.exp(log_p - larger) + (1 - beta) * jnp.exp(log_q - larger))
        return (beta * jnp.exp(log_p) * (log_p - log_m) + (1 - beta) * jnp.exp(log_q) * (log_q - log_m)).sum(-1)

    loss = fused_linear(lambda z, teacher_x: divergence(z, teacher_x @ teacher_w))
    return loss(x / temperature, w, teacher_x / temperature)


def top_k_distillation(x, w, class_ids, probs, temperature=2.0):
    """Distillation from a teacher's k largest probabilities, and all others as one (Hinton et al., 2015)."""
    # class_ids and probs [..., k], probs of this temperature
    return temperature**2 * linear_cross_entropy(x / temperature, w, (class_ids, probs), tail=True)


def multi_token(x, heads, tokens):
    """Multi-token prediction: head n predicts the n-th token from here (Gloeckle et al., 2024)."""
    # heads: a list of w; tokens [..., T]
    loss = 0.0
    for n, w in enumerate(heads, 1):
        labels = jnp.roll(tokens, -n, -1).at[..., -n:].set(-1)
        loss += linear_cross_entropy(x, w, labels, ignore_index=-1)
    return loss


def dynamic_fine_tuning(x, w, labels):
    """Dynamic fine-tuning: a label's loss times its probability, which is held constant (Wu et al., 2025)."""
    log_probs = linear_label_statistics(x, w, labels, ignore_index=-1).log_prob
    return -(lax.stop_gradient(jnp.exp(log_probs)) * log_probs).mean(where=labels != -1)


def focal(x, w, labels, gamma=2.0):
    """Focal loss: what is right already counts less (Lin et al., 2017)."""
    log_probs = linear_label_statistics(x, w, labels, ignore_index=-1).log_prob
    return ((-jnp.expm1(log_probs)) ** gamma * -log_probs).mean(where=labels != -1)


# The formulas, of all the logits.


def log_prob(x, w, labels):
    """Of labels that count, else 0."""
    log_o = jnp.take_along_axis(log_softmax(x @ w), jnp.maximum(labels, 0)[..., None], -1)
    return jnp.where(labels == -1, 0, log_o[..., 0])


def mean_of_counted(a, labels, axis=None):
    counts = jnp.where(labels == -1, 0.0, 1.0)
    return (counts * a).sum(axis) / counts.sum(axis)


def clipped_gain(ratio, advantages, clip):
    return advantages * jnp.where(advantages > 0, jnp.minimum(ratio, 1 + clip), jnp.maximum(ratio, 1 - clip))


def standardized(rewards):
    """Of groups of two."""
    half = (rewards - rewards[:, ::-1]) / 2
    return half / (jnp.abs(half) + 1e-4)


def dpo_formula(x, w, labels, reference):
    of_answers = log_prob(x, w, labels).sum(-1) - jnp.where(labels == -1, 0, reference).sum(-1)
    return jnp.log(1 + jnp.exp(0.1 * (of_answers[:, 1] - of_answers[:, 0]))).mean()


def ppo_formula(x, w, actions, old, advantages):
    o = softmax(x @ w)
    gain = clipped_gain(jnp.exp(log_prob(x, w, actions)) / jnp.exp(old), advantages, 0.2)
    return (0.01 * (o * jnp.log(o)).sum(-1) - gain).mean()


def grpo_formula(x, w, labels, old, reference, rewards):
    log_o = log_prob(x, w, labels)
    gain = clipped_gain(jnp.exp(log_o - old), standardized(rewards)[..., None], 0.2)
    penalty = jnp.exp(reference) / jnp.exp(log_o) - (reference - log_o) - 1
    return mean_of_counted(0.04 * penalty - gain, labels, -1).mean()


def gspo_formula(x, w, labels, old, rewards):
    ratio = jnp.exp(mean_of_counted(log_prob(x, w, labels) - old, labels, -1))
    return -clipped_gain(ratio, standardized(rewards), 3e-4).mean()


def kl(p, q):
    return (p * jnp.log(p / q)).sum(-1).mean()


def forward_kl_formula(x, w, teacher_x, teacher_w):
    return 4 * kl(softmax(teacher_x @ teacher_w / 2), softmax(x @ w / 2))


def reverse_kl_formula(x, w, teacher_x, teacher_w):
    return 4 * kl(softmax(x @ w / 2), softmax(teacher_x @ teacher_w / 2))


def jensen_shannon_formula(x, w, teacher_x, teacher_w):
    p, q = softmax(teacher_x @ teacher_w / 2), softmax(x @ w / 2)
    return 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q)


def top_k_distillation_formula(x, w, class_ids, probs):
    o = jnp.take_along_axis(softmax(x @ w / 2), class_ids, -1)
    tail = (1 - probs.sum(-1)) * jnp.log(1 - o.sum(-1))
    return -4 * ((probs * jnp.log(o)).sum(-1) + tail).mean()


def multi_token_formula(x, heads, tokens):
    total = 0
    for n in range(len(heads)):
        labels = tokens[..., n + 1 :]
        total -= mean_of_counted(log_prob(x[..., : -n - 1, :], heads[n], labels), labels)
    return total


def dynamic_fine_tuning_formula(x, w, labels):
    log_o = log_prob(x, w, labels)
    return -mean_of_counted(lax.stop_gradient(jnp.exp(log_o)) * log_o, labels)


def focal_formula(x, w, labels):
    log_o = log_prob(x, w, labels)
    return -mean_of_counted((1 - jnp.exp(log_o)) ** 2 * log_o, labels)


EXAMPLES = {
    dpo: dpo_formula,
    ppo: ppo_formula,
    grpo: grpo_formula,
    gspo: gspo_formula,
    forward_kl: forward_kl_formula,
    reverse_kl: reverse_kl_formula,
    jensen_shannon: jensen_shannon_formula,
    top_k_distillation: top_k_distillation_formula,
    multi_token: multi_token_formula,
    dynamic_fine_tuning: dynamic_fine_tuning_formula,
    focal: focal_formula,
}
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)


@functools.cache
def data(rows, features, classes):
    """Every argument of the examples, by its name. Rows are [groups, answers, T]."""
    x, w, actions = head(rows, features, classes)
    teacher_x, teacher_w, _ = head(rows, features, classes, seed=1)
    labels = jnp.where(logits(*rows, seed=2) < -0.5, -1, actions)
    reference = 0.3 * logits(*rows, seed=3) - (math.log(classes) + 0.5)
    old = reference + 0.5 * logits(*rows[:-1], 1, seed=4)  # some answers are likelier now, others less likely
    ids = jnp.stack([(actions + n) % classes for n in range(0, 28, 7)], -1)
    heads = [head((), features, classes, seed=seed)[1] for seed in range(2)]
    policy = dict(actions=actions, old_log_probs=old, reference_log_probs=reference, advantages=logits(*rows, seed=5))
    teacher = dict(teacher_x=teacher_x, teacher_w=teacher_w, class_ids=ids, probs=0.8 * probabilities(*rows, 4))
    rewards = logits(*rows[:-1], seed=6)
    return dict(x=x, w=w, heads=heads, labels=labels, tokens=labels, rewards=rewards, **policy, **teacher)


def arguments(example, *sizes):
    given = inspect.signature(example).parameters.values()
    return [data(*sizes)[p.name] for p in given if p.default is p.empty]


@each_example
def test_at_most_12_lines(example):
    """Beside its docstring, a line that ends with the paper and its year."""
    lines = [line for line in inspect.getsource(example).splitlines() if line.strip()]
    assert re.fullmatch(r' +""".+\(.+ et al\., 20\d\d\)\."""', lines[1]) and len(lines) - 1 <= 12


@each_example
def test_equals_its_formula(x64, example):
    """Value and gradients in float32, of 3 blocks of rows, are those of all the logits in float64."""
    args = arguments(example, (3, 2, 43), 6, 31)
    wide = jax.tree.map(lambda a: a.astype("float64") if jnp.issubdtype(a.dtype, jnp.floating) else a, args)
    got = jax.jit(jax.value_and_grad(example, (0, 1)))(*args)
    wanted = jax.jit(jax.value_and_grad(EXAMPLES[example], (0, 1)))(*wide)
    assert_all_close(got, wanted)


BLOCK = 128 * 65536 * 4
LIMITS = dict.fromkeys(EXAMPLES, 2) | {top_k_distillation: 2.1}  # in blocks
# With a teacher's head there are logits of two at once, and their gradient.
LIMITS |= {forward_kl: 3.1, reverse_kl: 3.1, jensen_shannon: 4.1}
if jax.__version_info__ < (0, 12):
    LIMITS |= {forward_kl: 4.1, jensen_shannon: 5.1}


@each_example
def test_holds_few_blocks_of_logits(example):
    """Of 128 rows, a CPU's default; and a tenth for a tile of dw and copies of x."""
    args = arguments(example, (8, 2, 128), 32, 65536)
    quick = {"xla_backend_optimization_level": 0}  # LLVM's: it changes no buffer, and takes half of the time
    executable = compiled(jax.value_and_grad(example, (0, 1)), *args, compiler_options=quick)
    assert temp_bytes_of(executable) < LIMITS[example] * BLOCK
