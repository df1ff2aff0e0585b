"""Examples for `test_fuzz`, and what is true of them, with how large the rounding errors may be.

The oracle computes in NumPy's longest float, with the maximum shifted out and nothing cancelling. Beside each number
it gives the sum of the sizes of what is added up to it: an error of a few units in the last place of that sum is
rounding, anything more is a bug. So a confident row's loss of 1e-15 is checked to float32's relative accuracy.
"""

import math
import random
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

Float = np.longdouble
IGNORED = -100


class Structure(NamedTuple):
    """What an example has that means another compilation."""

    integer: bool
    batch: tuple[int, ...]  # [..., K] with the classes last, before they are moved to `axis`
    classes: tuple[int, ...]
    axis: int | tuple[int, ...] | None
    where: str | None
    label_smoothing: bool
    class_weights: bool
    logit_cap: bool
    z_loss: bool
    ignore_index: bool
    float32_targets: bool
    form: str | None = None  # if not integer or dense labels of logits

    @classmethod
    def draw(cls, rng: random.Random, integer: bool) -> "Structure":
        batch, classes, axis = rng.choice(SHAPES)

        def some():
            return rng.random() < 0.5

        where = rng.choice([None, None, "classes", "classes of all rows", "rows"])
        return cls(integer, batch, classes, axis, where, some(), some(), some(), some(), integer and some(), some())

    def of_head(self, head: str) -> "Structure":
        """Of rows [N, K] with integer labels, which a head takes with a row mask, or one class mask for all, if any.

        Four times as many, if some may be ignored: blocks of classes gather those that count of 16 or more.
        """
        where = self.where if self.where == "rows" else self.where and "classes of all rows"
        batch, classes = (max(1, math.prod(self.batch)) * (4 if self.ignore_index else 1),), (math.prod(self.classes),)
        s = self._replace(form=head, batch=batch, classes=classes, axis=-1, where=where)
        return s._replace(label_smoothing=False, class_weights=False) if head == "statistics" else s


SHAPES = [
    ((5,), (7,), -1),
    ((7,), (5,), 0),
    ((2, 3), (13,), -1),
    ((3, 2), (5,), 1),
    ((4,), (2, 3), (0, 2)),
    ((2,), (3, 2), (-1, 0)),
    ((), (11,), -1),
    ((), (2, 4), None),
    ((0,), (5,), -1),
    ((3, 0), (2,), 0),
    ((1,), (1,), -1),
    ((4,), (1,), 0),
    ((3,), (2,), -1),
    ((2,), (97,), -1),
    ((17,), (3,), 1),
    ((2,), (64,), 0),
]


class Example(NamedTuple):
    """Numbers of N rows: what the oracle sees. `z` and `targets` hold numbers of the dtype under test."""

    z: np.ndarray  # [N, K]
    targets: np.ndarray  # labels [N] or dense targets [N, K]
    where: np.ndarray | None  # [N, K], [1, K] or [N]
    label_smoothing: np.floating | None
    class_weights: np.ndarray | None  # [K]
    logit_cap: np.floating | None
    z_loss: np.floating | None
    ignore_index: int | None
    cotangent: np.ndarray  # [N]


EVENTS = [
    "confident",
    "confidently wrong",
    "tie",
    "-inf",
    "-inf",
    "-inf label",
    "all -inf",
    "+inf",
    "nan",
    "label too large",
    "label -1",
    "ignored",
    "ignored, nan",
    "mask class",
    "mask label",
    "mask row",
    "mask row, nan",
    "no targets",
    "one target",
]

EVENT_LISTS = st.lists(
    st.tuples(st.sampled_from(EVENTS), st.integers(0, 16), st.integers(0, 96), st.floats(5, 60)), max_size=5
)


@st.composite
def examples(draw, structures: list[Structure], dtype: str) -> tuple[Structure, Example]:
    s = draw(st.sampled_from(structures))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-30, 1e-6, 0.03, 10.0, 100.0, 1e4]))
    offset = draw(st.sampled_from([0.0, 0.0, 1.0, 300.0, 1e4, -1e4]))
    n, k = math.prod(s.batch), math.prod(s.classes)
    precise = np.float64 if dtype == "float64" else np.float32

    z = rng.normal(size=(n, k)) * scale + offset
    labels = rng.integers(0, k, n)
    kind = draw(st.sampled_from(["probabilities", "one-hot", "masses", "signed"]))
    dense = {
        "probabilities": rng.dirichlet(np.full(k, 0.3), n),
        "one-hot": np.eye(k)[labels],
        "masses": rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.6),
        "signed": rng.normal(size=(n, k)),
    }[kind]
    where = {None: None, "classes of all rows": rng.random((1, k)) < 0.8, "rows": np.ones(n, bool)}.get(
        s.where, np.ones((n, k), bool)
    )
    hidden_too = np.ones((n, k), bool)
    for event, row, entry, size in draw(EVENT_LISTS) if n else ():
        row, entry = row % n, entry % k
        label = np.clip(labels[row], 0, k - 1)
        match event:
            case "confident":
                z[row, label] = z[row].max() + size
            case "confidently wrong":
                z[row, entry] = z[row].max() + size
            case "tie":
                z[row, entry] = z[row].max()
            case "-inf":
                z[row, entry] = -np.inf
            case "-inf label":
                z[row, label] = -np.inf
            case "all -inf":
                z[row] = -np.inf
            case "+inf":
                z[row, entry] = np.inf
            case "nan":
                z[row, entry] = np.nan
            case "label too large":
                labels[row] = k + entry
            case "label -1":
                labels[row] = -1
            case "ignored" | "ignored, nan":
                labels[row] = IGNORED
                if s.ignore_index and event.endswith("nan"):
                    z[row, entry] = np.nan
            case "mask class" if s.where == "classes":
                where[row, entry] = False
            case "mask label" if s.where == "classes":
                where[row, label] = False
            case "mask row" | "mask row, nan" if s.where in ("classes", "rows"):
                where[row] = False
                hidden_too[row] = event == "mask row"
            case "no targets":
                dense[row] = 0
            case "one target":
                dense[row] = 0
                dense[row, entry] = 1.5
    z, dense = np.where(hidden_too, z, np.nan), np.where(hidden_too, dense, np.nan)
    z = np.where(np.isfinite(z) | (s.form in (None, "top k")), z, 0)  # 0·inf in the matmul would reach all rows
    largest = float(jnp.finfo(dtype).max)
    z = np.where(np.isfinite(z), np.clip(z, -largest, largest), z)

    def number(present, value):
        return precise(value) if present else None

    return s, Example(
        z=z.astype(jnp.dtype(dtype)),
        targets=labels.astype(np.int32) if s.integer else dense.astype(precise if s.float32_targets else dtype),
        where=where,
        label_smoothing=number(s.label_smoothing, draw(st.sampled_from([0.1, 0.0, 0.9, 1.0]) | st.floats(1e-6, 1))),
        class_weights=(rng.exponential(size=k) * (rng.random(k) < 0.9)).astype(precise) if s.class_weights else None,
        logit_cap=number(s.logit_cap, draw(st.sampled_from([0.5, 5.0, 30.0, 1000.0]))),
        z_loss=number(s.z_loss, draw(st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))),
        ignore_index=IGNORED if s.ignore_index else None,
        cotangent=(rng.choice([-1, 1], n) * rng.uniform(0.3, 2, n)).astype(precise),
    )


class Truth(NamedTuple):
    """Of N rows: the numbers, and the sum of the sizes of what is added up to each. Size 0: exactly this number."""

    loss: np.ndarray  # [N]
    loss_size: np.ndarray
    gradient: np.ndarray  # [N, K], of Σ cotangent·loss
    gradient_size: np.ndarray


@np.errstate(all="ignore")
def truth(x: Example, ids: np.ndarray | None = None) -> Truth:
    """`ids` [N, M]: the classes that top-k labels list."""
    z, g = x.z.astype(Float), x.cotangent.astype(Float)[:, None]
    n, k = z.shape
    integer = x.targets.ndim == 1
    without_own = Float(1) - np.eye(k, dtype=Float)  # sums over the other classes, with nothing subtracted

    # Which rows and classes take part.
    shown, keep = np.ones((n, k), bool), np.ones(n, bool)
    if x.where is not None and x.where.ndim == 1:
        keep = x.where
    elif x.where is not None:
        shown = np.broadcast_to(x.where, (n, k))
        keep = shown.any(-1)
    if x.ignore_index is not None:
        keep = keep & (x.targets != x.ignore_index)
    classes = np.maximum(shown.sum(-1), 1).astype(Float)[:, None]

    # Targets, smoothed and then weighted: t = label part (one entry) + dense part.
    eps = Float(0 if x.label_smoothing is None else x.label_smoothing)
    c = np.ones(k, Float) if x.class_weights is None else x.class_weights.astype(Float)

    def smoothed(t):
        return np.where(shown, c * ((1 - eps) * t + eps * t.sum(-1, keepdims=True) / classes), 0)

    valid = keep.copy()
    label = np.zeros((n, k), bool)
    label_part = dense = np.zeros((n, k), Float)
    if integer:
        label = np.arange(k) == x.targets[:, None]
        valid &= (label & shown).any(-1)
        label_part = np.where(label, (1 - eps) * c, 0)
        dense = dense_size = np.where(shown, c * (eps / classes), 0)
    else:
        dense = np.where(shown & keep[:, None], x.targets.astype(Float), 0)
        dense, dense_size = smoothed(dense), smoothed(np.abs(dense))
    t, t_size = label_part + dense, label_part + dense_size

    # Logits, capped and then masked.
    slope, z_rounding = np.ones((n, k), Float), np.zeros((n, 1), Float)
    if x.logit_cap is not None:
        cap = Float(x.logit_cap)
        slope, z = 1 / np.cosh(z / cap) ** 2, cap * np.tanh(z / cap)
        z_rounding = 4 * np.where(shown, np.abs(z), 0).max(-1, keepdims=True)
    z = np.where(shown, z, -np.inf)
    m = z.max(-1, keepdims=True)
    valid &= np.isfinite(m[:, 0])

    # o = exp(d − L), and 1 − o as the sum of the others.
    d = z - m
    e = np.exp(d)
    top = np.arange(k) == d.argmax(-1)[:, None]
    log_sum = np.log1p(np.where(top, 0, e).sum(-1, keepdims=True))
    o = np.exp(d - log_sum)
    others = o @ without_own
    lse, lse_size = m + log_sum, np.abs(m) + z_rounding + log_sum
    o_size = np.where(o > 0, o * (2 + np.abs(d) + log_sum + z_rounding), 0)

    # L is one of the relatively accurate numbers, unless its largest term had to be added to the label's.
    log_sum_size = log_sum + np.where(top, 0, o_size).sum(-1, keepdims=True)
    log_sum_size += (integer & ~(label & (d == 0)).any(-1))[:, None]
    z_loss = Float(0 if x.z_loss is None else x.z_loss)
    terms = np.where(t == 0, 0, t * (log_sum - d))
    loss = terms.sum(-1) + (z_loss * lse**2)[:, 0]
    sizes = np.where(t == 0, 0, t_size * (log_sum_size + np.abs(d) + np.where(d < 0, z_rounding, 0)))
    loss_size = sizes.sum(-1) + (3 * z_loss * lse_size**2)[:, 0]

    # a·o − t + 2·z_loss·lse·o, where o > 1/2 written as (a − t) − a·(1 − o).
    a, pull, pull_size = t.sum(-1, keepdims=True), 2 * z_loss * lse, 2 * z_loss * lse_size
    plain = a * o - t
    gradient = pull * o + np.where(o > 0.5, t @ without_own - a * others, plain)
    a_size = t_size.sum(-1, keepdims=True) + pull_size
    gradient_size = a_size * o_size + t_size
    # At the class left out, the label or for dense targets the largest, a − t is exactly 0 where it should be.
    left_out = label if integer else (d == 0) & (o > 0.5)
    lonely = (dense != 0).sum(-1, keepdims=True) <= 1
    rest_size = dense_size.sum(-1, keepdims=True) + dense_size + pull_size
    rest_size = np.where((not integer) & lonely & (pull_size == 0) & (dense != 0), 0, rest_size)
    gradient_size = np.where(left_out, a_size * (o_size @ without_own) + rest_size, gradient_size)
    if ids is not None:  # what smoothing gives to the other classes is added to each, and then taken away
        unlisted = np.ones((n, k), bool)
        np.put_along_axis(unlisted, ids, False, 1)
        share = np.where(unlisted, e, 0) / np.maximum(
            np.where(unlisted, e, 0).sum(-1, keepdims=True), np.finfo(Float).tiny
        )
        gradient_size = gradient_size + share * np.where(unlisted, dense_size, 0).sum(-1, keepdims=True)
    gradient, gradient_size = slope * gradient, slope * gradient_size + (0 if x.logit_cap is None else np.abs(gradient))

    # The contract of rows that are not ordinary.
    loss = np.where(valid, loss, np.nan)
    gradient = np.where(shown, np.where(valid[:, None], g * gradient, np.nan), 0)
    return Truth(
        np.where(keep, loss, 0),
        np.where(valid, loss_size, 0),
        np.where(keep[:, None], gradient, 0),
        np.where(shown & valid[:, None], np.abs(g) * gradient_size, 0),
    )
