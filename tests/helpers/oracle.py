"""What the losses should be: oracles for rows of logits, the one table of tolerances, and what asserts them.

`exact` works with 100 digits (mpmath) and rounds each result once, to float64. `stable` is the textbook computation in
NumPy float64, with the maximum shifted out: enough for ordinary rows, not for confident ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mpmath as untyped_mpmath
import numpy as np
from jax.typing import DTypeLike

mpmath: Any = untyped_mpmath  # its own types do not know that a real number stays one

# The largest error allowed in a result of each dtype, relative to max |truth|. For the 16-bit types it is the worst
# case of one rounding, half a unit in the last place, and a little for the float32 that was rounded.
TOLERANCE = {
    jnp.dtype("float64"): 2e-14,
    jnp.dtype("float32"): 2e-6,
    jnp.dtype("bfloat16"): 1.01 * 2.0**-8,
    jnp.dtype("float16"): 1.01 * 2.0**-11,
}

BF16_LOOPS = jax.__version_info__ >= (0, 11)
SKIPS = jax.__version_info__ >= (0, 11)  # jax 0.10 computes all blocks, of all rows: see `_matmuls.CONDITIONALS`
NO_BF16_LOOPS = "before jax 0.11, XLA on CPU casts bfloat16 arrays to float32 as a whole in any loop"


class Truth(NamedTuple):
    """The numbers of N rows, in float64."""

    loss: np.ndarray  # [N]
    log_normalizer: np.ndarray  # [N]
    gradient: np.ndarray  # [N, K], of the loss with respect to the logits


def exact(logits: np.ndarray, targets: np.ndarray) -> Truth:
    """The truth about these very logits [N, K], whose targets are labels [N] or dense [N, K]."""
    targets = dense(targets, logits.shape[-1])
    with mpmath.workdps(100):
        rows = [_exact_row(z, t) for z, t in zip(_floats(logits), _floats(targets), strict=True)]
    return Truth(*(np.array(column, np.float64) for column in zip(*rows, strict=True)))


def _exact_row(logits: list[float], targets: list[float]) -> tuple[float, float, list[float]]:
    z, t = [mpmath.mpf(v) for v in logits], [mpmath.mpf(v) for v in targets]
    e = [mpmath.exp(v) for v in z]
    total, mass = mpmath.fsum(e), mpmath.fsum(t)
    lse = mpmath.log(total)
    loss = mpmath.fsum(t_j * (lse - z_j) for t_j, z_j in zip(t, z, strict=True) if t_j)  # 0·log 0 = 0
    gradient = [mass * e_j / total - t_j for e_j, t_j in zip(e, t, strict=True)]
    return float(loss), float(lse), [float(g) for g in gradient]


def stable(logits: np.ndarray, targets: np.ndarray) -> Truth:
    """The same in float64, relative errors of 1e-15 or so for loss and gradient entries that do not cancel."""
    z, t = np.asarray(logits).astype(np.float64), dense(targets, logits.shape[-1])
    m = z.max(-1, keepdims=True)
    e = np.exp(z - m)
    log_sum = np.log(e.sum(-1, keepdims=True))
    distance = np.where(t == 0, 0, (m - z) + log_sum)
    gradient = t.sum(-1, keepdims=True) * e / e.sum(-1, keepdims=True) - t
    return Truth((t * distance).sum(-1), (m + log_sum)[..., 0], gradient)


def dense(targets: np.ndarray, classes: int) -> np.ndarray:
    """Labels as one-hot rows; dense targets as they are."""
    targets = np.asarray(targets)
    if not np.issubdtype(targets.dtype, np.integer):
        return targets.astype(np.float64)
    return (targets[..., None] == np.arange(classes)).astype(np.float64)


def _floats(array: np.ndarray) -> list[list[float]]:
    return np.asarray(array).astype(np.float64).tolist()


def assert_close(actual, truth, dtype: DTypeLike, *, factor: float = 1.0, tolerance: float | None = None) -> None:
    """`actual`, of this dtype, is `truth` within `factor` times the dtype's tolerance, relative to max |truth|.

    Another tolerance is given where several roundings, to another dtype, are the result's worst case.
    """
    actual, truth = _pair(actual, truth, dtype)
    scale = np.abs(truth).max(initial=0.0)
    tolerance = TOLERANCE[jnp.dtype(dtype)] if tolerance is None else tolerance
    _assert_errors(np.abs(actual - truth), factor * tolerance * scale, actual, truth)


def assert_all_close(got, wanted, *, factor: float = 1.0, tolerance: float | None = None) -> None:
    """`assert_close` of each array of two trees, in its own dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(g, w, g.dtype, factor=factor, tolerance=tolerance)


def assert_relative(actual, truth, dtype: DTypeLike, tolerance: float) -> None:
    """Each element of `actual` is right to `tolerance` relative to itself, where `truth` is 0 or normal in `dtype`."""
    actual, truth = _pair(actual, truth, dtype)
    checked = (np.abs(truth) >= float(jnp.finfo(dtype).tiny)) | (truth == 0)
    assert checked.mean() > 0.5, "too few elements are normal numbers to check anything"
    _assert_errors(np.where(checked, np.abs(actual - truth), 0), tolerance * np.abs(truth), actual, truth)


def assert_one_rounding(actual, truth, dtype: DTypeLike) -> None:
    """Each element of `actual` is at most one unit in the last place of `dtype` from `truth`."""
    actual, truth = _pair(actual, truth, dtype)
    info = jnp.finfo(dtype)
    # Below the smallest normal number processors may flush to zero.
    unit = np.maximum(2.0 ** np.floor(np.log2(np.abs(truth) + 1e-300)) * float(info.eps), float(info.tiny))
    _assert_errors(np.abs(actual - truth), unit, actual, truth)


def _pair(actual, truth, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    assert jnp.dtype(actual.dtype) == jnp.dtype(dtype), f"dtype {actual.dtype}, wanted {dtype}"
    actual, truth = np.asarray(actual).astype(np.float64), np.asarray(truth).astype(np.float64)
    assert actual.shape == truth.shape, f"shape {actual.shape}, wanted {truth.shape}"
    assert np.isfinite(truth).all(), "the truth is not finite"
    return actual, truth


def _assert_errors(errors: np.ndarray, allowed: np.ndarray, actual: np.ndarray, truth: np.ndarray) -> None:
    allowed = np.broadcast_to(allowed, errors.shape)
    if (errors <= allowed).all():  # never so for NaN
        return
    excess = np.where(np.isnan(errors), np.inf, errors / np.maximum(allowed, 1e-300))
    worst = np.unravel_index(excess.argmax(), errors.shape)
    raise AssertionError(
        f"worst element {tuple(map(int, worst))} of {errors.shape}: got {actual[worst]!r}, wanted {truth[worst]!r}, "
        f"error {errors[worst]:.3g}, allowed {allowed[worst]:.3g}; {np.sum(~(errors <= allowed))} elements are wrong"
    )
