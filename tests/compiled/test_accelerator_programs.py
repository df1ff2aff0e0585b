"""What accelerators run, run on this CPU: one pass over the logits, and the blocks of GPUs and TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import _matmuls, _schedule

from ..helpers import assert_all_close, assert_close, dense_loss, integer_loss, stable
from ..losses import test_accuracy, test_differentiation, test_edges, test_masks, test_options, test_statistics

# The internal names that this file knows: what chooses a program by the platform.
LOGITS = (_schedule, "selected_by_platform")
HEADS = (_matmuls.Layer, "by_platform")


def on_accelerators():
    """The program of accelerators, for losses of logits; afterwards, that it was used is checked."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*LOGITS, lambda _, on_cpu, on_accelerators, *args: used.append(1) or on_accelerators(*args))
        jax.clear_caches()
        yield
        jax.clear_caches()
    assert used


accelerators = pytest.fixture(on_accelerators)
accelerators_for_all = pytest.fixture(on_accelerators, scope="class")


@pytest.mark.usefixtures("accelerators_for_all")
class TestInOnePass:
    """Tests of the losses, once more."""

    test_confidently_wrong_rows = staticmethod(test_accuracy.test_confidently_wrong_rows_are_exact)
    test_16_bit_logits = staticmethod(test_accuracy.test_16_bit_logits_of_a_large_vocabulary)
    test_targets_of_any_sum = staticmethod(test_accuracy.test_targets_of_any_sum)
    test_equal_logits = staticmethod(test_accuracy.test_largest_and_equal_logits)
    test_hessian = staticmethod(test_accuracy.test_every_entry_of_a_confident_rows_hessian_is_exact)
    test_saturated_cap = staticmethod(test_accuracy.test_gradient_through_a_saturated_cap_is_exact)
    test_nan_stays_in_its_row = staticmethod(test_edges.test_row_without_a_finite_maximum_is_nan)
    test_class_masks = staticmethod(test_masks.test_masked_classes_are_left_out)
    test_masks_by_row = staticmethod(test_masks.test_each_row_may_mask_other_classes)
    test_row_masks = staticmethod(test_masks.test_masked_row_is_not_there)
    test_masked_statistics = staticmethod(test_statistics.test_masks_and_ignored_rows)
    test_ties = staticmethod(test_statistics.test_ties_are_correct_for_the_first_as_in_argmax)
    test_statistics_of_confident_rows = staticmethod(test_statistics.test_confident_rows_keep_their_digits)
    test_cap = staticmethod(test_options.test_logit_cap_is_a_tanh_before_everything_else)
    test_labels_out_of_range = staticmethod(test_edges.test_label_out_of_range_is_nan_in_its_row_only)
    test_mass_on_minus_inf = staticmethod(test_edges.test_target_mass_on_minus_inf_is_inf)


@pytest.mark.usefixtures("accelerators", "x64")
@pytest.mark.parametrize("variable", ["logits of labels", "logits and dense"])
@pytest.mark.parametrize("mode", ["value_and_grad", "jvp", "jvp of grad"])
def test_modes_in_one_pass(mode, variable):
    test_differentiation.assert_same(mode, variable, lambda losses: lambda v: losses(v) ** 3)


@pytest.mark.usefixtures("accelerators")
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (2, 129)], ids=str)
def test_few_rows_and_classes_in_one_pass(shape):
    z = np.random.default_rng(0).standard_normal(shape).astype("float32")
    labels, targets = np.zeros(shape[0], np.int32), np.full(shape, 1 / shape[1], np.float32)
    for loss, y in ((integer_loss, labels), (dense_loss, targets)):
        losses, pullback = jax.vjp(lambda z, loss=loss, y=y: loss(z, jnp.asarray(y)), jnp.asarray(z))
        truth = stable(z, y)
        assert_close(losses, truth.loss, "float32")
        assert_close(pullback(jnp.ones_like(losses))[0], truth.gradient, "float32")


@pytest.mark.usefixtures("accelerators")
def test_minus_infinity_and_the_entropy_in_one_pass():
    """Classes of −inf before, between and after others; logits so far apart that their difference overflows."""
    inf = jnp.inf
    z = jnp.array([[-inf, 1.0, -inf, 0.0], [0.0, -inf, -inf, -inf], [3e38, -3e38, 1.0, 0.0], [-inf, -inf, 2.0, 2.0]])
    s = jaxce.label_statistics(z, jnp.array([1, 0, 0, 2]))
    p = jax.nn.sigmoid(1.0)
    entropy = -(p * jnp.log(p) + (1 - p) * jnp.log(1 - p))
    assert_close(s.entropy, np.array([entropy, 0, 0, np.log(2)]), "float32")
    assert_close(s.log_prob, np.array([np.log(p), 0, 0, -np.log(2)]), "float32")
    assert s.correct.all()
    targets = jnp.array([[0, 0.5, 0, 0.5], [1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    loss, gradient = jax.value_and_grad(lambda z: dense_loss(z, targets).sum())(z)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert np.isposinf(dense_loss(z[:1], jnp.array([[0.5, 0.5, 0.0, 0.0]]))).all()


@pytest.mark.parametrize("platform, recompute", [("gpu", False), ("gpu", True), ("tpu", False)])  # classes are alike
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("class_axis", [-1, 0])
def test_blocks_of_accelerators(monkeypatch, accelerators, platform, reduction, recompute, class_axis):
    """Several blocks, the last one smaller, of a head with every option."""

    def here(layer, f, *args, platforms=_matmuls.PLATFORMS):
        return f(layer._replace(platform=platform if platform in platforms else "gpu"), *args)

    monkeypatch.setattr(*HEADS, here)
    jax.clear_caches()
    rng = np.random.default_rng(0)
    n, d, k = 10, 6, 300
    x, w = (
        jnp.asarray(rng.standard_normal((n, d)), jnp.float32),
        jnp.asarray(rng.standard_normal((d, k)) / 2, "float32"),
    )
    labels = jnp.asarray(rng.integers(k, size=n), jnp.int32).at[3].set(-1)
    options = {
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "class_weights": jnp.asarray(rng.uniform(0.5, 2, k), jnp.float32),
        "logit_cap": 5.0,
        "z_loss": 0.1,
    }
    head = functools.partial(
        jaxce.linear_cross_entropy, reduction=reduction, recompute=recompute, class_axis=class_axis, block_size=4
    )

    def ours(x, w):
        return head(x, w if class_axis else w.T, labels, **options).sum()

    def materialized(x, w):
        losses = integer_loss(x @ w, labels, **options)
        weights = jnp.where(labels < 0, 0, options["class_weights"][labels])
        return losses.sum() / (weights.sum() if reduction == "mean" else 1)

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (ours, materialized))
    assert_all_close(got, wanted, factor=4)
