"""`linear_label_statistics`: the numbers of `label_statistics`, of x @ w without their logits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import assert_all_close, assert_same_in_mode, cases, head, logits
from .test_differentiation import IGNORED, LINEAR_MODES
from .test_differentiation import MASK as MASK_OF_130

BLOCK: Any = {"block_size": 128}  # of 300 classes, three blocks
MASK = jnp.arange(300) % 7 != 3
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "ignore_index": {"ignore_index": IGNORED},
    "class_mask": {"class_mask": MASK},
    "logit_cap": {"logit_cap": 2.0},
    "all": {"ignore_index": IGNORED, "class_mask": MASK, "logit_cap": 2.0},
}


def materialized(x, w, labels, bias, class_mask=None, **options):
    z = x @ w if bias is None else x @ w + jnp.expand_dims(bias, range(x.ndim - 1))
    where = None if class_mask is None else jnp.expand_dims(class_mask, range(x.ndim - 1))
    return jaxce.label_statistics(z, labels, where=where, **options)


QUICK_LAYOUTS = {(name, "[D, K]") for name in OPTIONS} | {("all", "[K, D]")}


@pytest.mark.parametrize("options, layout", cases(OPTIONS, ("[D, K]", "[K, D]"), quick=QUICK_LAYOUTS))
def test_equals_label_statistics_of_the_logits(x64, options, layout):
    """Values, and the gradients of x, w and bias by every number's own cotangent; in float64, but for its blocks."""
    x, w, labels = head((3, 5), 6, 300, "float64")
    labels = labels.at[1].set((x[1] @ w).argmax(-1).astype("int32"))
    labels = jnp.where(MASK[labels], labels, labels + 1)
    labels = labels.at[0, 0].set(IGNORED if "ignore_index" in OPTIONS[options] else 0)
    bias, weights = logits(300, seed=3, dtype="float64"), logits(3, 3, 5, seed=4, dtype="float64")

    def ours(x, w, labels, bias, **options):
        w, class_axis = (w, -1) if layout == "[D, K]" else (w.T, 0)
        return jaxce.linear_label_statistics(x, w, labels, bias=bias, class_axis=class_axis, **BLOCK, **options)

    def run(f, x, w, bias):
        def numbers(x, w, bias):
            found = f(x, w, labels, bias, **OPTIONS[options])
            return jnp.stack(found[:3]), found.correct

        found, pullback, correct = jax.vjp(numbers, x, w, bias, has_aux=True)
        return (found, pullback(weights)), correct

    (got, correct), (wanted, wanted_correct) = (jax.jit(partial(run, f))(x, w, bias) for f in (ours, materialized))
    np.testing.assert_array_equal(correct, wanted_correct)
    assert 0 < correct.sum() < 15
    assert_all_close(got, wanted, tolerance=1e-12)


def test_confident_rows_keep_their_digits():
    """At margins up to 40, of a label and of another class: log_prob and entropy against float64."""
    margins = np.linspace(-40, 40, 81)
    x = jnp.asarray(np.eye(3)[np.zeros(81, int)] * np.abs(margins)[:, None], jnp.float32)
    w = jnp.zeros((3, 300)).at[0, 131].set(1).at[1].set(logits(300))
    x = x.at[:, 1].set(1)
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    labels = np.where(margins > 0, 131, 250)
    found = jax.jit(partial(jaxce.linear_label_statistics, **BLOCK))(x, w, jnp.asarray(labels))
    top, others = z[:, 131], np.delete(z, 131, 1)
    log_sum = np.log1p(np.exp(others - top[:, None]).sum(1))  # as the class 131 is the largest, or nearly so
    log_o = z - top[:, None] - log_sum[:, None]
    entropy = -(np.exp(log_o) * log_o).sum(1)
    log_prob = log_o[np.arange(81), labels]
    assert np.abs(found.log_prob / log_prob - 1).max() <= 2e-6
    assert (np.abs(found.entropy - entropy) / np.maximum(entropy, 1e-3)).max() <= 2e-6
    assert np.abs(found.log_normalizer / (top + log_sum) - 1).max() <= 2e-6


QUICK = {(mode,) for mode in ("value_and_grad", "jvp", "jvp of grad", "grad of jvp", "vmap over x", "vmap over heads")}


@pytest.mark.parametrize("mode", cases(LINEAR_MODES, quick=QUICK))
def test_every_mode(x64, mode):
    """Of a number that is not linear in any of the three, with a cap that is differentiated too."""
    x, w, labels = head(5, 3, 130, "float64")
    labels = labels.at[0].set(IGNORED)
    point = (x, w, logits(130, seed=3, dtype="float64"), jnp.asarray(2.0))

    def number(f, **block):
        def objective(v):
            x, w, bias, cap = v
            found = f(x, w, labels, bias=bias, ignore_index=IGNORED, class_mask=MASK_OF_130, logit_cap=cap, **block)
            return (jnp.exp(found.log_prob) * found.entropy + found.log_normalizer**2).sum()

        return objective

    ours, naive = number(jaxce.linear_label_statistics, **BLOCK), number(materialized)
    assert_same_in_mode(LINEAR_MODES[mode], ours, naive, point, tolerance=1e-11)


def test_rows_that_do_not_count():
    """Ignored rows are 0 whatever they hold, an invalid label is NaN in its row, and equal logits are as in arg max."""
    x, w, labels = head(6, 3, 5)
    x, labels = x.at[1].set(jnp.nan).at[5].set(0), labels.at[1].set(IGNORED).at[2].set(5).at[3].set(-1).at[5].set(0)
    statistics = partial(jaxce.linear_label_statistics, ignore_index=IGNORED)

    @jax.jit
    def run(x, w):
        def numbers(x, w):
            found = statistics(x, w, labels)
            return found[:3], found.correct

        found, pullback, correct = jax.vjp(numbers, x, w, has_aux=True)
        return found, correct, pullback((jnp.ones(6),) * 3)

    found, correct, (dx, dw) = run(x, w)
    for number in found:
        assert number[1] == 0 and np.isfinite(number[jnp.array([0, 4, 5])]).all()
        assert np.isnan(number[2:4]).all()
    assert np.isnan(dx[2:4]).all() and np.isnan(dw).all()
    assert (np.asarray(dx[1]) == 0).all() and not correct[1:4].any() and correct[5]
    alone = jax.grad(lambda w: sum(statistics(x, w, labels.at[2:4].set(IGNORED))[0]))(w)
    assert np.isfinite(alone).all()
    nothing = statistics(x, w, labels, class_mask=jnp.zeros(5, bool))
    assert not np.asarray(jax.tree.leaves(nothing)).any()
    assert jaxce.linear_label_statistics(x[:0], w, labels[:0]).entropy.shape == (0,)
