"""Argument checks, and the one vocabulary of their errors: function, argument, what it got, what it wanted."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def type_error(function: str, argument: str, got: object, wanted: str) -> TypeError:
    return TypeError(f"{function}: {argument} is {got}, wanted {wanted}")


def value_error(function: str, argument: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"{function}: {argument} is {got}, wanted {wanted}")


def _as_array(function: str, argument: str, value: ArrayLike | Sequence) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise type_error(function, argument, type(value).__name__, "an array") from None


def floating(function: str, argument: str, value: ArrayLike | Sequence) -> Array:
    array = _as_array(function, argument, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise type_error(function, argument, f"of dtype {array.dtype}", "a floating dtype")
    return array


def real(function: str, argument: str, value: ArrayLike | Sequence) -> Array:
    """A floating array as it is, an integer or boolean one as float32."""
    array = _as_array(function, argument, value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_:
        return array.astype(jnp.float32)
    raise type_error(function, argument, f"of dtype {array.dtype}", "a real dtype")


def integer(function: str, argument: str, value: ArrayLike | Sequence) -> Array:
    if isinstance(value, int | np.integer | np.ndarray):
        value = _within_widest(np.asarray(value))
    array = _as_array(function, argument, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise type_error(function, argument, f"of dtype {array.dtype}", "an integer dtype")
    return array


def _within_widest(value: np.ndarray) -> np.ndarray:
    """Without x64, JAX keeps the low 32 bits of 64-bit integers: 2**32 + 1 would be the class 1."""
    widest = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype)) if value.dtype.kind in "iu" else None
    return value if widest is None else np.clip(value, widest.min, widest.max)


def boolean(function: str, argument: str, value: ArrayLike | Sequence) -> Array:
    array = _as_array(function, argument, value)
    if array.dtype != jnp.bool_:
        raise type_error(function, argument, f"of dtype {array.dtype}", "dtype bool")
    return array


def shape(function: str, argument: str, array: Array, wanted: tuple[int, ...], meaning: str) -> Array:
    if array.shape != wanted:
        raise value_error(function, argument, f"of shape {array.shape}", f"{wanted}, {meaning}")
    return array


def leading(function: str, argument: str, array: Array, wanted: tuple[int, ...]) -> Array:
    if array.shape[: len(wanted)] != wanted:
        raise value_error(function, argument, f"of shape {array.shape}", f"{wanted} first, as x")
    return array


def class_axes(function: str, axis: int | Sequence[int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as axes counted from the end, so that they mean the same after broadcasting adds leading axes."""
    ndim = len(shape)
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, Sequence) else (axis,)
    for a in axes:
        if isinstance(a, bool) or not hasattr(a, "__index__"):
            raise type_error(function, "axis", f"{axis!r}", "an int, a tuple of ints or None")
        if not -ndim <= a < ndim:
            raise value_error(function, "axis", f"{axis!r}", f"axes of logits, which have shape {shape}")
    axes = tuple(int(a) % ndim - ndim for a in axes)
    if not axes or len(set(axes)) < len(axes):
        raise value_error(function, "axis", f"{axis!r}", f"distinct axes of logits, which have shape {shape}")
    if math.prod(shape[a] for a in axes) == 0:
        raise value_error(function, "logits", f"of shape {shape}", f"at least one class along axis {axis!r}")
    return axes


def broadcast_shape(function: str, argument: str, got: tuple, logits: tuple, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `logits` and dense labels together, which must not change the number of classes."""
    try:
        shape = jnp.broadcast_shapes(logits, got)
    except ValueError:
        shape = None
    if shape is None or any(shape[a] != logits[a] for a in axes):
        wanted = f"a shape that broadcasts against logits {logits} and keeps their classes"
        raise value_error(function, argument, f"of shape {got}", wanted)
    return shape


def label_shape(function: str, got: tuple[int, ...], rows: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape of integer labels and rows of logits: as many axes each, those of size 1 broadcast."""
    if len(got) == len(rows):
        try:
            return jnp.broadcast_shapes(got, rows)
        except ValueError:
            pass
    raise value_error(function, "labels", f"of shape {got}", f"{rows}, that of logits without their class axes")


def mask(function: str, where: ArrayLike, logits: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """`where` as a bool array: per class, with as many axes as the logits, or per row, without their class axes."""
    array = boolean(function, "where", where)
    rows = tuple(n for i, n in enumerate(logits) if i - len(logits) not in axes)
    for wanted in (logits, rows):
        if array.ndim == len(wanted) and all(a in (1, n) for a, n in zip(array.shape, wanted, strict=True)):
            return array
    wanted = f"a shape that broadcasts to {logits} (a mask of classes) or {rows} (of rows), with as many axes"
    raise value_error(function, "where", f"of shape {array.shape}", wanted)


def scalar(
    function: str,
    argument: str,
    value: ArrayLike,
    dtype,
    low: float | None = None,
    high: float | None = None,
    *,
    open_interval: bool = False,
) -> Array:
    """An option of one number, in [low, high] or (low, high). Outside: an error, or NaN where the value is traced."""
    array = (integer if jnp.issubdtype(dtype, jnp.integer) else real)(function, argument, value)
    if array.ndim:
        raise value_error(function, argument, f"of shape {array.shape}", "a scalar")
    array = array.astype(dtype)
    if low is None or high is None:
        return array
    if isinstance(value, int | float) and not (low < value < high if open_interval else low <= value <= high):
        brackets = "({}, {})" if open_interval else "[{}, {}]"
        raise value_error(function, argument, f"{value}", "a number in " + brackets.format(low, high))
    inside = (array > low) & (array < high) if open_interval else (array >= low) & (array <= high)
    return jnp.where(inside, array, jnp.nan)
