"""fused_linear and linear_cross_entropy against the formulas with all the logits, in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import (
    fused_linear,
    linear_cross_entropy,
    linear_label_statistics,
    softmax_cross_entropy,
    softmax_cross_entropy_with_top_k_labels,
)

from ..helpers import (
    assert_all_close,
    assert_close,
    cases,
    head,
    integer_loss,
    logits,
    option_values,
    probabilities,
)
from .test_differentiation import LINEAR_MODES

IGNORED = -100
by_blocks = pytest.mark.parametrize("recompute", [False, True], ids=["rows", "classes"])


def truth(x, w, labels, scale=None):
    """Loss, dx and dw of Σ scale·loss in NumPy float64; scale: by default that of the mean."""
    x, w, labels = np.asarray(x, np.float64), np.asarray(w, np.float64), np.asarray(labels)
    rows = np.arange(len(x))
    scale = np.full(len(x), 1 / max(1, len(x))) if scale is None else scale
    e = np.exp(x @ w)
    o = e / e.sum(-1, keepdims=True)
    loss = -(scale * np.log(o[rows, labels])).sum()
    o[rows, labels] -= 1
    dz = scale[:, None] * o
    return loss, (dz @ w.T, x.T @ dz)


# ----------------------------------------------------------------------------------------------------- sizes and dtypes

SOME_ROWS = (0, 1, 127, 128, 129, 391)
QUICK_ROWS = {(rows, "rows") for rows in SOME_ROWS} | {(rows, "classes") for rows in (0, 391)}


@pytest.mark.parametrize("rows, blocked", cases(SOME_ROWS, ("rows", "classes"), quick=QUICK_ROWS))
def test_any_number_of_rows(rows, blocked):
    x, w, labels = head(rows, 33, 300)
    loss = partial(linear_cross_entropy, block_size=128, recompute=blocked == "classes")
    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x, w, labels)
    assert_close(got, wanted, "float32", tolerance=1e-6)
    assert_all_close(grads, wanted_grads)


SOME_CLASSES = (1, 2, 127, 128, 129, 300, 2049)
LAYOUTS = ("[D, K]", "[K, D]")  # of w
# Blocks of classes end at multiples of 128; blocks of rows take all classes, whose number matters little there.
QUICK_CLASSES = {(classes, layout, "classes") for classes in (1, 129, 2049) for layout in LAYOUTS}
QUICK_CLASSES |= {(2, "[D, K]", "classes"), (127, "[K, D]", "classes")}
QUICK_CLASSES |= {(128, "[D, K]", "classes"), (300, "[K, D]", "classes")}
QUICK_CLASSES |= {(1, "[D, K]", "rows"), (2, "[K, D]", "rows"), (300, "[D, K]", "rows"), (2049, "[K, D]", "rows")}


@pytest.mark.parametrize(
    "classes, layout, blocked", cases(SOME_CLASSES, LAYOUTS, ("rows", "classes"), quick=QUICK_CLASSES)
)
def test_any_number_of_classes(classes, layout, blocked):
    x, w, labels = head(37, 7, classes)
    options: dict[str, Any] = {"recompute": blocked == "classes", "block_size": 128 if blocked == "classes" else 16}

    def loss(x, w):
        if layout == "[K, D]":
            return linear_cross_entropy(x, w.T, labels, class_axis=0, **options)
        return linear_cross_entropy(x, w, labels, **options)

    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w)
    wanted, wanted_grads = truth(x, w, labels)
    assert_close(got, wanted, "float32", tolerance=1e-6)
    assert_all_close(grads, wanted_grads)


@by_blocks
def test_default_blocks_of_a_large_head(recompute):
    x, w, labels = head(67, 65, 50257)
    got, grads = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute), (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x, w, labels)
    assert_close(got, wanted, "float32", tolerance=1e-6)
    assert_all_close(grads, wanted_grads)


@pytest.mark.parametrize("options", [{"block_size": 256}, {"recompute": True}], ids=["rows", "classes"])
@pytest.mark.parametrize("rows", [1000, 65536])
def test_bfloat16_is_accumulated_in_float32(options, rows):
    x, w, labels = head(rows, 16, 130, jnp.bfloat16)
    got, (_, dw) = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, **options), (0, 1)))(x, w, labels)
    wanted, (_, wanted_dw) = truth(x, w, labels)
    assert_close(got, wanted, "float32", tolerance=1e-5)
    rounding = np.abs(np.asarray(wanted_dw.astype(jnp.bfloat16), np.float64) - wanted_dw).max()
    error = np.abs(np.asarray(dw, np.float64) - wanted_dw).max()
    assert dw.dtype == jnp.bfloat16
    assert error <= rounding + np.abs(wanted_dw).max() / 256


@pytest.mark.parametrize("mode", ["value_and_grad", "jvp", "jvp of grad", "vmap over heads"])
def test_what_is_blocked_by_platform(mode):
    """A narrow w and no block_size: rows, or on CPU classes, in every mode."""
    x, w, labels = head(64, 16, 130, jnp.bfloat16)

    def run(**options):
        f = partial(linear_cross_entropy, labels=labels, **options)
        return jax.jit(lambda v: LINEAR_MODES[mode](lambda v: f(*v), v, v))((x, w))

    got, wanted = jax.tree.map(lambda a: a.astype(jnp.float32), (run(), run(block_size=32)))
    assert_all_close(got, wanted, tolerance=1 / 64)


@by_blocks
def test_float32_parameters_with_bfloat16_matmuls(recompute):
    x, w, labels = head(64, 16, 130)
    loss = partial(linear_cross_entropy, recompute=recompute, dtype=jnp.bfloat16)
    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels)
    wanted, wanted_grads = truth(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), labels)
    assert {g.dtype for g in grads} == {jnp.dtype("float32")}
    assert_close(got, wanted, "float32", tolerance=1e-5)
    assert_all_close(grads, wanted_grads, tolerance=1 / 256)
    assert (grads[1].astype(jnp.bfloat16).astype(jnp.float32) != grads[1]).any()  # summed in float32, and never rounded


@by_blocks
def test_confident_rows_are_exact(recompute):
    margins = np.array([15.0, 30.0, 60.0], np.float32)
    w = jnp.eye(3, 140)
    x = jnp.asarray(np.diag(margins))
    f = jax.jit(partial(linear_cross_entropy, reduction="none" if recompute else "sum"))
    losses = jnp.stack([f(x[i : i + 1], w, jnp.array([i])).sum() for i in range(3)])
    wanted = np.log1p(139 * np.exp(-margins.astype(np.float64)))
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)
    # Row i of w has nothing but its label's logit, so dx_ii is the gradient there, o − 1.
    dx = jax.jit(jax.grad(lambda x: f(x, w, jnp.arange(3)).sum()))(x)
    np.testing.assert_allclose(np.diagonal(dx), np.expm1(-wanted), rtol=2e-6)


# ------------------------------------------------------------------------------------ reductions, masks, invalid labels


@by_blocks
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_to_average_is_zero(recompute, rows):
    x, w, _ = head(rows, 3, 5)
    labels = jnp.full(rows, IGNORED)
    loss = partial(linear_cross_entropy, ignore_index=IGNORED, recompute=recompute)
    value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for weights in (None, jnp.ones(rows), jnp.zeros(rows)):
        got = value_and_gradients(x, w, labels, weights=weights)
        assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(got))


def soft(x, w, labels, **options):
    """Dense targets, or with `top_k` those of two listed classes, which are NaN in rows that are left out."""
    targets = jnp.where(KEPT[..., None], jax.nn.one_hot(labels, 5), jnp.nan)
    if options.pop("top_k", False):
        targets = jnp.stack([labels, labels * 0], -1), jnp.stack([targets.sum(-1), 0 * targets[..., 0]], -1)
    return linear_cross_entropy(x, w, targets, **options)


HEADS: dict[str, Any] = {
    "rows": partial(linear_cross_entropy, block_size=4, recompute=False),
    "classes": partial(linear_cross_entropy, block_size=128, recompute=True),
    "none": lambda *a, **k: linear_cross_entropy(*a, reduction="none", **k).sum() / float(KEPT.sum()),
    "soft, rows": partial(soft, block_size=4, recompute=False),
    "soft, classes": partial(soft, block_size=128, recompute=True),
    "top k, classes": partial(soft, block_size=128, recompute=True, top_k=True),
    "any loss": lambda *a, **k: fused_linear(integer_loss, block_size=4)(*a, **k),
    "any loss, none": lambda *a, **k: (
        fused_linear(integer_loss, reduction="none", block_size=4)(*a, **k).sum() / float(KEPT.sum())
    ),
}
KEPT = np.arange(38).reshape(2, 19) % 3 == 1
LEFT_OUT: dict[str, Any] = {
    "ignore_index": lambda labels: {"ignore_index": IGNORED},
    "where": lambda labels: {"where": jnp.asarray(KEPT)},
    "weight 0": lambda labels: {"weights": jnp.where(KEPT, 1.0, 0.0)},
    "NaN weight": lambda labels: {"where": jnp.asarray(KEPT), "weights": jnp.where(KEPT, 1.0, jnp.nan)},
    "all": lambda labels: {"where": jnp.zeros(KEPT.shape, bool)},
}
# Only integer labels of cross-entropy are ignored; soft targets try two of the ways.
LEFT_OUT_CASES = [(h, o) for h in HEADS for o in LEFT_OUT if o != "ignore_index" or h in ("rows", "classes", "none")]
LEFT_OUT_CASES = [(h, o) for h, o in LEFT_OUT_CASES if "," not in h or "any" in h or o in ("where", "all")]


@pytest.mark.parametrize("head_, left_out", LEFT_OUT_CASES)
def test_rows_that_do_not_count_are_as_if_left_out_whatever_they_hold(head_, left_out):
    x, w, labels = head((2, 19), 3, 5)
    x, labels = jnp.where(KEPT[..., None], x, jnp.nan), jnp.where(KEPT, labels, IGNORED)
    f, options = HEADS[head_], LEFT_OUT[left_out](labels)
    got, (dx, dw) = jax.jit(jax.value_and_grad(lambda x, w: f(x, w, labels, **options), (0, 1)))(x, w)
    if left_out == "all":
        assert all((np.asarray(a) == 0).all() for a in (got, dx, dw))
        return
    wanted, (wanted_dx, wanted_dw) = truth(x[KEPT], w, labels[KEPT])
    assert_all_close((got, dx[KEPT], dw), (wanted, wanted_dx, wanted_dw))
    assert (np.asarray(dx[~KEPT]) == 0).all()


OF_FEW = {
    "rows": partial(linear_cross_entropy, recompute=False),
    "classes": partial(linear_cross_entropy, recompute=True),
    "statistics": lambda *a, **o: (lambda s: (s.entropy - s.log_prob).sum())(linear_label_statistics(*a, **o)),
}


@pytest.mark.parametrize("head_", OF_FEW)
def test_what_stands_in_for_rows_that_do_not_count_has_no_numbers(head_):
    """Logits near −200, and, where no row counts, one of 100: about the shift of another row, exp would be inf."""
    x, w, labels = head(40, 3, 256)
    x, w = jnp.concatenate([x, jnp.ones((40, 1))], 1), jnp.concatenate([w, jnp.full((1, 256), -200.0)])

    def gradients(x, labels, bias, kept):
        return jax.jit(jax.grad(lambda x, w, b: OF_FEW[head_](x, w, labels, bias=b, where=kept), (0, 1, 2)))(x, w, bias)

    kept = jnp.arange(40) % 8 == 3
    dx, *got = gradients(x, labels, jnp.zeros(256), kept)
    wanted_dx, *wanted = gradients(x[kept], labels[kept], jnp.zeros(256), None)
    assert_all_close([dx[kept, :3], *got], [wanted_dx[:, :3], *wanted], factor=4)  # by the last feature it is 0
    nothing = gradients(x, labels, jnp.zeros(256).at[3].set(300.0), jnp.zeros(40, bool))
    assert all((np.asarray(a) == 0).all() for a in nothing)


@by_blocks
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "logit_cap": 2.0, "z_loss": 0.1}], ids=["", "options"]
)
def test_masked_classes_are_as_if_left_out(recompute, options):
    x, w, _ = head(9, 3, 300)
    mask, labels, bias = jnp.arange(300) % 7 != 3, jnp.arange(9) * 28, logits(300, seed=3)
    loss = partial(linear_cross_entropy, recompute=recompute, block_size=128 if recompute else 4, **options)
    gradient = jax.jit(jax.value_and_grad(lambda x, w, labels, **o: loss(x, w, labels, **o), (0, 1)))
    got, (dx, dw) = gradient(x, w, labels, bias=bias, class_mask=mask)
    wanted, (wanted_dx, wanted_dw) = gradient(x, w[:, mask], labels // 7 * 6, bias=bias[mask])
    assert_all_close((got, dx, dw[:, mask]), (wanted, wanted_dx, wanted_dw))
    assert (np.asarray(dw[:, ~mask]) == 0).all()
    hidden, (dx, _) = gradient(x, w, labels.at[2].set(3), bias=bias, class_mask=mask)
    assert np.isnan(hidden) and np.isnan(dx[2]).all()
    nothing = gradient(x.at[0].set(jnp.nan), w, labels, bias=bias, class_mask=jnp.zeros(300, bool))
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(nothing))


SOFT = ("dense", "top k", "top k, tail")


# By rows two of the three are alike.
QUICK_OF_LOGITS = {(form, blocked) for form in SOFT for blocked in ("rows", "classes")} - {("top k", "rows")}


@pytest.mark.parametrize("form, blocked", cases(SOFT, ("rows", "classes"), quick=QUICK_OF_LOGITS))
def test_soft_targets_are_those_of_the_logits(x64, form, blocked):
    """Dense, or for some classes; with every option, and each argument's gradient; leading axes are kept."""
    recompute = blocked == "classes"
    x, w, _ = head((2, 5), 3, 300, "float64")
    mask, bias, weights = jnp.arange(300) % 7 != 3, logits(300, seed=3, dtype="float64"), jnp.linspace(0.5, 1, 10)
    weights = weights.reshape(2, 5)
    ids = jnp.asarray(np.random.default_rng(4).integers(0, 300, (2, 5, 4)), jnp.int32)
    ids = ids.at[0, 0].set(jnp.array([3, 9, 9, 299], jnp.int32))
    t = probabilities(2, 5, 300 if form == "dense" else 4, dtype="float64") * 0.9
    values = jax.tree.map(lambda a: jnp.asarray(a, "float64"), option_values(300))
    tail = {"tail": True} if form == "top k, tail" else {}

    def ours(x, w, bias, t, values, reduction):
        labels = t if form == "dense" else (ids, t)
        options = (
            {"recompute": recompute, "block_size": 128 if recompute else 4, "reduction": reduction} | tail | values
        )
        return linear_cross_entropy(x, w, labels, bias=bias, weights=weights, class_mask=mask, **options)

    def wanted(x, w, bias, t, values):
        z = x @ w + jnp.expand_dims(bias, (0, 1))
        options = {"where": jnp.expand_dims(mask, (0, 1))} | values
        if form == "dense":
            return weights * softmax_cross_entropy(z, t, **options)
        return weights * softmax_cross_entropy_with_top_k_labels(z, ids, t, **tail, **options)

    point, every = (x, w, bias, t, values), (0, 1, 2, 3, 4)
    got = jax.jit(jax.value_and_grad(partial(ours, reduction="mean"), every))(*point)
    truth = jax.jit(jax.value_and_grad(lambda *v: wanted(*v).sum() / weights.sum(), every))(*point)
    assert_all_close(got, truth, tolerance=1e-12)
    if recompute:
        assert_all_close(jax.jit(partial(ours, reduction="none"))(*point), wanted(*point), tolerance=1e-12)


@by_blocks
def test_an_invalid_id_is_nan(recompute):
    x, w, _ = head(4, 3, 5)
    ids, t = jnp.arange(8).reshape(4, 2) % 5, jnp.full((4, 2), 0.4)
    value_and_dx = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute)))
    for bad in (-1, 5, 2**30):
        got, dx = value_and_dx(x, w, (ids.at[2, 1].set(bad), t))
        assert np.isnan(got) and np.isnan(dx[2]).all()
        got, dx = value_and_dx(x, w, (ids.at[2, 1].set(bad), t.at[2, 1].set(0)))
        assert np.isfinite(got) and np.isfinite(dx).all()


@by_blocks
def test_an_invalid_label_is_nan(recompute):
    x, w, labels = head(4, 3, 5)
    value_and_dx = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, recompute=recompute)))
    for class_weights in (None, jnp.ones(5)):
        for label in (-1, 5, -100, 2**30):
            got, dx = value_and_dx(x, w, labels.at[2].set(label), class_weights=class_weights)
            assert np.isnan(got)
            assert np.isnan(dx[2]).all()


@by_blocks
def test_gradient_accumulation_equals_one_batch(recompute):
    x, w, labels = head(12, 3, 5)
    labels = labels.at[:5].set(IGNORED)  # the halves have 1 and 6 tokens
    loss = partial(linear_cross_entropy, ignore_index=IGNORED, recompute=recompute)
    dw = jax.jit(jax.grad(loss, 1))
    parts = [dw(x[i : i + 6], w, labels[i : i + 6], normalizer=7) for i in (0, 6)]
    assert_all_close(parts[0] + parts[1], dw(x, w, labels))


def of_teacher(logits, labels, teacher):
    return softmax_cross_entropy(logits, teacher) ** 2 + jnp.asarray(labels, logits.dtype) * logits[:, 2]


OF_A_ROW: dict[str, Callable] = {  # of (x, w), and row arguments
    "integer": lambda x, w, y, t, m, s: linear_cross_entropy(
        x, w, y, weights=s, where=m, bias=w[0], class_weights=w[1] ** 2, label_smoothing=0.1, class_mask=MASK
    ),
    "by rows": lambda x, w, y, t, m, s: linear_cross_entropy(
        x, w, y, weights=s, reduction="sum", recompute=False, logit_cap=w[0, 0] ** 2 + 1, block_size=3
    ),
    "none": lambda x, w, y, t, m, s: linear_cross_entropy(x, w, y, where=m, reduction="none", class_mask=MASK).sum(),
    "dense": lambda x, w, y, t, m, s: linear_cross_entropy(x, w, t, weights=s, class_weights=w[1] ** 2),
    "top k": lambda x, w, y, t, m, s: linear_cross_entropy(
        x, w, (jnp.stack([y, y * 0], -1), t[..., :2]), weights=s, tail=True, class_weights=w[1] ** 2
    ),
    "any loss": lambda x, w, y, t, m, s: fused_linear(of_teacher)(x, w, y, t, weights=s, where=m, bias=w[0]),
    "any losses": lambda x, w, y, t, m, s: fused_linear(of_teacher, reduction="none", block_size=3)(
        x, w, y, t, weights=s
    ).sum(),
    "a loss that closes over w": lambda x, w, y, t, m, s: fused_linear(
        lambda z, t: of_teacher(z, y[0], t) * w[1].sum(), reduction="sum"
    )(x, w, t),
    "statistics": lambda x, w, y, t, m, s: sum(
        (s * a).sum() for a in linear_label_statistics(x, w, y, where=m, class_mask=MASK, bias=w[0])[:3]
    ),
}
MASK = jnp.arange(20) != 7


QUICK_OF_A_ROW = {("options",), ("by rows",), ("none",), ("any losses",), ("statistics",)}


@pytest.mark.parametrize("head_", cases(OF_A_ROW, quick=QUICK_OF_A_ROW))
def test_vmap_is_the_head_of_each_example(x64, head_):
    """Over x and all row arguments, as one batch; and over every second one, twice."""
    x, w, labels = head((4, 5), 6, 20, "float64")
    labels = jnp.where(labels == 7, 8, labels)
    targets = jax.nn.softmax(jnp.sin(jnp.arange(400.0))).reshape(4, 5, 20)
    rows = x, labels, targets, labels % 3 > 0, 1 + jnp.sin(x[..., 0])

    def of_each(x, w, *rows):
        return OF_A_ROW[head_](x, w, *rows)

    def one_by_one(w, rows):
        return jax.lax.map(lambda a: of_each(a[0], w, *a[1:]), rows)

    def mapped(w, rows):
        return jax.vmap(of_each, (0, None, 0, 0, 0, 0))(rows[0], w, *rows[1:])

    def twice(w, rows):
        rows = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]).swapaxes(0, 1), rows)
        inner = jax.vmap(lambda x, others: of_each(x, w, *others))
        return jax.vmap(inner, 1, 1)(rows[0], rows[1:]).T.ravel()

    def all_of(f):
        return jax.jit(jax.value_and_grad(lambda w, x: jnp.sin(f(w, (x, *rows[1:]))).sum(), (0, 1)))(w, x)

    assert_all_close(all_of(mapped), all_of(one_by_one))
    if head_ in ("by rows", "statistics", "any losses"):
        assert_all_close(jax.jit(twice)(w, rows), jax.jit(one_by_one)(w, rows))


def test_reductions_agree_and_leading_axes_are_kept():
    x, w, labels = head(12, 3, 5)
    x, labels = x.reshape(2, 6, 3), labels.reshape(2, 6)
    weights = jnp.linspace(0, 1, 12).reshape(2, 6)
    losses = linear_cross_entropy(x, w, labels, weights=weights, reduction="none")
    assert losses.shape == (2, 6)
    assert_all_close(linear_cross_entropy(x, w, labels, weights=weights, reduction="sum"), losses.sum())
    assert_all_close(linear_cross_entropy(x, w, labels, weights=weights), losses.sum() / weights.sum())
    assert_all_close(linear_cross_entropy(x, w, labels, weights=weights, normalizer=4.0), losses.sum() / 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_aux_is_returned_per_row_and_not_differentiated(reduction):
    x, w, labels = head(12, 3, 5)

    def loss(logits, labels):
        aux = {"best": logits.argmax(-1), "logits": logits[:, :2]}
        return jax.nn.logsumexp(logits, -1), aux

    f = fused_linear(loss, has_aux=True, reduction=reduction, block_size=5)

    def summed(x, w):
        total, aux = f(x, w, labels.reshape(2, 6))
        return total.sum() + aux["logits"].sum(), aux

    (_, aux), dx = jax.jit(jax.value_and_grad(summed, has_aux=True))(x.reshape(2, 6, 3), w)
    assert_all_close(aux["logits"], (x @ w).reshape(2, 6, 5)[..., :2])
    np.testing.assert_array_equal(aux["best"], (x @ w).argmax(-1).reshape(2, 6))
    wanted = jax.grad(lambda x: jax.nn.logsumexp(x @ w, -1).sum() / (12 if reduction == "mean" else 1))(x)
    assert_all_close(dx.reshape(12, 3), wanted)
    rates = jax.jit(lambda *point: jax.jvp(summed, point, point)[1])(x.reshape(2, 6, 3), w)
    assert (np.asarray(rates[1]["logits"]) == 0).all()


@pytest.mark.parametrize("form", ["rows", "classes", "none", "any loss"])
def test_a_loss_scale_reaches_float16_gradients(form):
    """A mean over 2²⁰ tokens: of the unscaled gradients float16 has no digits."""
    total, loss_scale = 2.0**20, 2.0**15
    x, w, labels = head(64, 16, 200, jnp.float16)
    fused = fused_linear(lambda z, y, t: integer_loss(t[:, None].astype(z.dtype) * z, y))

    def loss(x, w, t):
        if form == "any loss":
            return loss_scale * fused(x, w, labels, t, normalizer=total)
        if form == "none":
            return loss_scale * (linear_cross_entropy(x, w, labels, reduction="none").sum() / total)
        return loss_scale * linear_cross_entropy(x, w, labels, normalizer=total, recompute=form == "classes")

    t = jnp.ones(64, jnp.float16)
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, t)
    _, wanted = truth(x, w, labels, np.full(64, loss_scale / total))
    assert_all_close(got[:2], wanted, tolerance=1e-3)
    if form == "any loss":
        (wanted,) = jax.grad(
            lambda t: loss_scale / total * integer_loss(t[:, None] * (x @ w).astype(t.dtype), labels).sum(), (0,)
        )(t.astype(jnp.float32))
        assert_all_close(got[2], wanted, tolerance=4e-3)


def test_sums_of_float16_gradients_do_not_overflow():
    x, w = jnp.ones((2**18, 1), jnp.float16), jnp.zeros((1, 2), jnp.float16)
    loss = partial(linear_cross_entropy, labels=jnp.zeros(2**18, jnp.int32), recompute=False)
    assert_all_close(jax.jit(jax.grad(loss, 1))(x, w), jnp.array([[-0.5, 0.5]]), tolerance=1e-3)


def test_integer_arrays_may_be_closed_over_anywhere():
    x, w, labels = head(4, 3, 5)

    def loss(x, labels):
        return fused_linear(lambda z: jnp.roll(z, labels[0], 1)[:, 0] ** 2, reduction="sum")(x, w)

    wanted = jax.grad(lambda x: (jnp.roll(x @ w, labels[0], 1)[:, 0] ** 2).sum())(x)
    assert_all_close(jax.grad(jax.jit(loss))(x, labels), wanted)
    assert_all_close(jax.vmap(jax.grad(loss), (None, 0))(x, labels[None])[0], wanted)
    assert_all_close(
        jax.grad(lambda x: jax.lax.scan(lambda c, y: (c + loss(x, y), None), 0.0, labels[None])[0])(x), wanted
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_the_weight_of_an_ignored_row_counts_for_nothing(weight, reduction):
    x, w, labels = head(4, 3, 5)
    labels = labels.at[2].set(-100)

    def total(x, w, weights):
        options: Any = {"weights": weights, "ignore_index": -100, "reduction": reduction}
        return jnp.sum(linear_cross_entropy(x, w, labels, **options))

    weights = jnp.array([1.0, 2.0, 0.0, 3.0])
    got, wanted = (jax.value_and_grad(total, (0, 1, 2))(x, w, v) for v in (weights.at[2].set(weight), weights))
    assert wanted[0] > 0
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_labels_may_be_lists():
    x, w, _ = head(2, 4, 3)
    for labels in ([0, 2], [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]):
        assert_all_close(linear_cross_entropy(x, w, labels), linear_cross_entropy(x, w, jnp.array(labels)))
