"""Random rows, masks and options against the oracle of `fuzzing`, which knows how large the rounding errors may be."""

import functools
import math
import random
from collections import defaultdict

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

from ..helpers import LOSSES
from .fuzzing import Example, Float, Structure, examples, truth

DTYPES = ("bfloat16", "float16", "float32", "float64")
ROUNDINGS = 12  # units in the last place allowed, of the sum of sizes


def to_shape(rows: np.ndarray, s: Structure) -> np.ndarray:
    """Rows [N, K] as logits of the structure's shape."""
    batch = s.batch if rows.shape[0] == math.prod(s.batch) else (1,) * len(s.batch)  # one mask for all rows
    array = rows.reshape(batch + s.classes)
    axes = range(array.ndim) if s.axis is None else (s.axis,) if isinstance(s.axis, int) else s.axis
    return np.moveaxis(array, range(-len(s.classes), 0), tuple(axes))


def to_rows(array: np.ndarray, s: Structure) -> np.ndarray:
    axes = range(array.ndim) if s.axis is None else (s.axis,) if isinstance(s.axis, int) else s.axis
    array = np.moveaxis(array, tuple(axes), range(-len(s.classes), 0))
    return array.reshape(math.prod(s.batch), math.prod(s.classes))


def statistics_loss(x, w, labels, z_loss=0.0, **options):
    found = jaxce.linear_label_statistics(x, w, labels, block_size=128, **options)
    penalty = jnp.asarray(z_loss, found.log_prob.dtype) * found.log_normalizer**2
    return -found.log_prob + jnp.where(found.log_normalizer == 0, 0, penalty)


def of_head(loss_fn, z, labels, axis, where, **options):
    """The loss of a head whose logits are z and whose gradient of w is that of z: x is the identity."""
    rows, classes = (where, None) if where is None or where.ndim == 1 else (None, where[0])
    return loss_fn(jnp.eye(len(z), dtype=z.dtype), z, labels, where=rows, class_mask=classes, **options)


HEADS = {
    "statistics": functools.partial(of_head, statistics_loss),
    "by classes": functools.partial(of_head, functools.partial(jaxce.linear_cross_entropy, reduction="none")),
    "by rows": functools.partial(
        of_head, functools.partial(jaxce.linear_cross_entropy, reduction="none", recompute=False, block_size=3)
    ),
}
TOP_K, LISTED = "top k", 6


def of_top_k(z, targets, axis, where, **options):
    return jaxce.softmax_cross_entropy_with_top_k_labels(z, targets[0], targets[1], axis, where, **options)


def listed(x: Example) -> tuple[Example, np.ndarray]:
    """The example with targets for a few classes of each row, and these classes."""
    n, k = x.targets.shape
    ids = np.argsort(np.random.default_rng(n * k).random((n, k)), 1)[:, :LISTED].astype(np.int32)
    kept = np.zeros((n, k), bool)
    np.put_along_axis(kept, ids, True, 1)
    return x._replace(targets=np.where(kept, x.targets, 0).astype(x.targets.dtype)), ids


@functools.cache
def compiled(s: Structure):
    """The loss and the gradient of the logits. Compiled once for each structure and dtype."""
    forms = LOSSES | HEADS | {TOP_K: of_top_k}
    loss_fn = forms[s.form or ("integer" if s.integer else "dense")]

    @jax.jit
    def loss_and_gradient(logits, targets, cotangent, where, options):
        loss, pullback = jax.vjp(lambda z: loss_fn(z, targets, s.axis, where, **options), logits)
        return loss, pullback(cotangent)[0]

    return loss_and_gradient


def run(s: Structure, x: Example, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    where = x.where
    if where is not None:
        where = where.reshape(s.batch) if where.ndim == 1 else to_shape(where, s)
    options = {name: getattr(x, name) for name in ("label_smoothing", "class_weights", "logit_cap", "z_loss")}
    options |= {"ignore_index": x.ignore_index} if s.integer else {}
    options = {name: value for name, value in options.items() if value is not None}
    targets = x.targets.reshape(s.batch) if s.integer else to_shape(x.targets, s)
    if ids is not None:
        targets = tuple(a.reshape(*s.batch, ids.shape[1]) for a in (ids, np.take_along_axis(x.targets, ids, 1)))
    loss, gradient = compiled(s)(to_shape(x.z, s), targets, x.cotangent.reshape(s.batch), where, options)
    assert loss.shape == s.batch and gradient.dtype == x.z.dtype
    return np.asarray(loss).ravel(), to_rows(np.asarray(gradient), s)


class Record:
    """Worst errors seen, in units of what is allowed, and how many examples, per dtype."""

    def __init__(self):
        self.examples, self.loss, self.gradient = defaultdict(int), defaultdict(float), defaultdict(float)

    def __str__(self):
        lines = [
            f"{dtype}: {self.examples[dtype]} examples, worst error of what is allowed: loss {self.loss[dtype]:.3f}, "
            f"gradient {self.gradient[dtype]:.3f}"
            for dtype in self.examples
        ]
        return "\n".join([*lines, f"{sum(self.examples.values())} examples"])


def check(s: Structure, x: Example, dtype: str, record: Record) -> None:
    x, ids = listed(x) if s.form == TOP_K else (x, None)
    loss, gradient = run(s, x, ids)
    wanted = truth(x, ids)
    if s.form in HEADS:  # 0·NaN in the matmul reaches the whole class
        wanted.gradient[:, np.isnan(wanted.gradient).any(0)] = np.nan
    precise = jnp.finfo("float64" if dtype == "float64" else "float32")
    assert loss.dtype == precise.dtype
    unit, tiny = Float(precise.eps), 16 * Float(precise.tiny)
    record.examples[dtype] += 1

    allowed = np.where(wanted.loss_size > 0, ROUNDINGS * unit * wanted.loss_size + tiny, 0)
    record.loss[dtype] = max(record.loss[dtype], compare("loss", loss, wanted.loss, allowed))
    # Beyond the largest number of the logits' dtype, rounding gives inf.
    largest = float(jnp.finfo(dtype).max)
    beyond = np.isfinite(wanted.gradient) & (np.abs(wanted.gradient) > 0.99 * largest)
    clipped = np.clip(gradient.astype(Float), -largest, largest), np.clip(wanted.gradient, -largest, largest)
    gradient = np.where(beyond, clipped[0], gradient.astype(Float))
    wanted = wanted._replace(gradient=np.where(beyond, clipped[1], wanted.gradient))
    # One more rounding, to the dtype of the logits, in which numbers may be too small for full accuracy.
    rounding = Float(jnp.finfo(dtype).eps) / 2 * np.abs(wanted.gradient) + Float(jnp.finfo(dtype).smallest_subnormal)
    underflow = tiny * (1 + wanted.gradient_size.max(-1, keepdims=True))  # of exp, before it is scaled
    allowed = ROUNDINGS * unit * wanted.gradient_size + underflow + rounding
    allowed = np.where(wanted.gradient_size > 0, allowed, 0)
    record.gradient[dtype] = max(record.gradient[dtype], compare("gradient", gradient, wanted.gradient, allowed))


@np.errstate(all="ignore")
def compare(name: str, actual: np.ndarray, wanted: np.ndarray, allowed: np.ndarray) -> float:
    """The worst error over what is allowed. NaN, inf and numbers without an allowance must be just that."""
    if actual.size == 0:
        return 0.0
    actual = actual.astype(Float)
    same = (actual == wanted) | (np.isnan(actual) & np.isnan(wanted))
    error = np.where(np.isfinite(wanted) & (allowed > 0), np.abs(actual - wanted) / allowed, np.inf)
    error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
    worst = np.unravel_index(error.argmax(), error.shape)
    where = f"{name}{[int(i) for i in worst]}: got {actual[worst]}, wanted {wanted[worst]}"
    assert error[worst] <= 1, f"{where}, allowed error {allowed[worst]:.3g}, {error[worst]:.3g} times that"
    return float(error[worst])


def settings(number: int, **options) -> hypothesis.settings:
    checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    return hypothesis.settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=checks, print_blob=True, **options
    )


def sweep(dtype: str, structures: list[Structure], record: Record, settings: hypothesis.settings):
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:

        @settings
        @hypothesis.given(examples(structures, dtype))
        def agrees(drawn):
            structure, example = drawn
            check(structure, example, dtype, record)

        agrees()
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("integer", [True, False], ids=["integer", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows_and_options(dtype, integer):
    rng = random.Random(f"{dtype} {integer}")
    structures = [Structure.draw(rng, integer) for _ in range(6)]
    record = Record()
    sweep(dtype, structures, record, settings(270, derandomize=True))
    print(record)
    assert record.examples[dtype] >= 250


@pytest.mark.parametrize("head", [*HEADS, TOP_K])
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=() if d == "float32" else pytest.mark.slow) for d in DTYPES])
def test_any_rows_and_options_of_heads_and_top_k_labels(dtype, head):
    rng = random.Random(f"{dtype} {head}")
    if head == TOP_K:
        structures = [Structure.draw(rng, False)._replace(form=TOP_K) for _ in range(4)]
    else:
        structures = [Structure.draw(rng, True).of_head(head) for _ in range(4)]
    record = Record()
    sweep(dtype, structures, record, settings(270, derandomize=True))
    print(record)
    assert record.examples[dtype] >= 250


@pytest.mark.slow
def test_any_rows_and_options_at_length(capsys):
    seed = random.SystemRandom().randrange(2**32)
    rng, record = random.Random(seed), Record()
    with capsys.disabled():
        print(f"\nstructures from seed {seed}")
        for dtype in DTYPES:
            for integer in (True, False):
                structures = [Structure.draw(rng, integer) for _ in range(40)]
                sweep(dtype, structures, record, settings(6300))
        print(record)
    assert sum(record.examples.values()) >= 50_000
