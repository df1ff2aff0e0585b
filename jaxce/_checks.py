"""Argument checks, and the one vocabulary of their errors: function, argument, what it got, what it wanted."""

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

Arrays = ArrayLike | Sequence[Any]  # what is converted to an array
Axes = SupportsIndex | Sequence[SupportsIndex] | None


def type_error(function: str, argument: str, got: object, wanted: str) -> TypeError:
    return TypeError(f"{function}: {argument} is {got}, wanted {wanted}")


def value_error(function: str, argument: str, got: object, wanted: str) -> ValueError:
    return ValueError(f"{function}: {argument} is {got}, wanted {wanted}")


def described(value: object) -> str:
    if isinstance(value, Array):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__ + (f" of dtype {value.dtype}" if isinstance(value, np.ndarray | np.generic) else "")


def as_array(function: str, argument: str, value: Any, dtype=None) -> Array:
    try:
        return jnp.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        kind = value_error if isinstance(error, OverflowError) else type_error
        raise kind(function, argument, described(value), f"an array; JAX says: {str(error).strip()}") from None


def floating(function: str, argument: str, value: Arrays) -> Array:
    array = as_array(function, argument, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise type_error(function, argument, f"of dtype {array.dtype}", "a floating dtype")
    return array


def real(function: str, argument: str, value: Arrays) -> Array:
    """A floating array as it is, an integer or boolean one as float32."""
    array = as_array(function, argument, value, jnp.float32 if _is_integer(value) else None)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_:
        return array.astype(jnp.float32)
    raise type_error(function, argument, f"of dtype {array.dtype}", "a real dtype")


def integer(function: str, argument: str, value: Arrays) -> Array:
    array = as_array(function, argument, _within_widest(value) if _is_integer(value) else value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise type_error(function, argument, f"of dtype {array.dtype}", "an integer dtype")
    return array


def _is_integer(value: Any) -> bool:
    """Such a value may have 64 bits, of which JAX without x64 keeps the low 32: 2**32 + 1 would be 1."""
    array = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "iu"
    return array or isinstance(value, int | np.integer)


def _within_widest(value: Any) -> Any:
    dtype = np.asanyarray(value).dtype
    widest = np.iinfo(jax.dtypes.canonicalize_dtype(dtype)) if dtype.kind in "iu" else None
    return value if widest is None else np.clip(value, widest.min, widest.max)


def boolean(function: str, argument: str, value: Arrays) -> Array:
    array = as_array(function, argument, value)
    if array.dtype != jnp.bool_:
        raise type_error(function, argument, f"of dtype {array.dtype}", "dtype bool")
    return array


def shape(function: str, argument: str, array: Array, wanted: tuple[int, ...], meaning: str) -> Array:
    if array.shape != wanted:
        raise value_error(function, argument, f"of shape {array.shape}", f"{wanted}, {meaning}")
    return array


def known(size: int, otherwise: int) -> int:
    """`size`, or `otherwise` where it is a symbol, in `jax.export`."""
    return size if isinstance(size, int) else otherwise


def leading(function: str, argument: str, value: Any, wanted: tuple[int, ...], meaning: str) -> Array:
    array = as_array(function, argument, value)
    if array.shape[: len(wanted)] != wanted:
        raise value_error(function, argument, f"of shape {array.shape}", f"{wanted} first, {meaning}")
    return array


def index(function: str, argument: str, value: Any, wanted: str) -> int:
    """An integer that is known when the program is traced."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise type_error(function, argument, repr(value), wanted)


def one_of(function: str, argument: str, value: Any, choices: tuple, wanted: str) -> None:
    value = value.item() if isinstance(value, np.generic) else value
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise value_error(function, argument, repr(value), wanted)


def mesh_axis(function: str, axis_name: Any) -> Any:
    try:
        if isinstance(axis_name, list) or axis_name == ():
            raise ValueError
        if axis_name is not None:
            lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError):
        wanted = "a mesh axis of the jax.shard_map around this call"
        raise value_error(function, "axis_name", repr(axis_name), wanted) from None
    return axis_name


def class_axes(function: str, axis: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis` as axes counted from the end, so that they mean the same after broadcasting adds leading axes."""
    ndim = len(shape)
    given = range(ndim) if axis is None else axis if isinstance(axis, tuple | list | range) else (axis,)
    axes = tuple(index(function, "axis", a, "an int, a tuple of ints or None") for a in given)
    if not all(-ndim <= a < ndim for a in axes):
        raise value_error(function, "axis", f"{axis!r}", f"axes of logits, which have shape {shape}")
    axes = tuple(a % ndim - ndim for a in axes)
    if not axes or len(set(axes)) < len(axes):
        raise value_error(function, "axis", f"{axis!r}", f"distinct axes of logits, which have shape {shape}")
    if math.prod(shape[a] for a in axes) == 0:
        raise value_error(function, "logits", f"of shape {shape}", f"at least one class along axis {axis!r}")
    return axes


def dense_shape(function: str, labels: Arrays, got: tuple, logits: tuple, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `logits` and dense labels together, which must not change the number of classes."""
    if len(got) < len(logits) and jnp.issubdtype(as_array(function, "labels", labels).dtype, jnp.integer):
        wanted = f"as many axes as logits {logits}, or for class ids {function}_with_integer_labels"
        raise value_error(function, "labels", f"of an integer dtype and shape {got}", wanted)
    try:
        shape = jnp.broadcast_shapes(logits, got)
    except ValueError:
        shape = None
    if shape is None or any(shape[a] != logits[a] for a in axes):
        wanted = f"a shape that broadcasts against logits {logits} and keeps their classes"
        raise value_error(function, "labels", f"of shape {got}", wanted)
    return shape


def label_shape(function: str, got: tuple[int, ...], rows: tuple[int, ...]) -> tuple[int, ...]:
    """The batch shape of integer labels and rows of logits: as many axes each, those of size 1 broadcast."""
    if len(got) == len(rows):
        try:
            return jnp.broadcast_shapes(got, rows)
        except ValueError:
            pass
    raise value_error(function, "labels", f"of shape {got}", f"{rows}, that of logits without their class axes")


def mask(function: str, where: Arrays, logits: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """`where` as a bool array: per class, with as many axes as the logits, or per row, without their class axes."""
    array = boolean(function, "where", where)
    rows = tuple(n for i, n in enumerate(logits) if i - len(logits) not in axes)
    for wanted in (logits, rows):
        if array.ndim == len(wanted) and all(a in (1, n) for a, n in zip(array.shape, wanted, strict=True)):
            return array
    wanted = f"a shape that broadcasts to {logits} (a mask of classes) or {rows} (of rows), with as many axes"
    raise value_error(function, "where", f"of shape {array.shape}", wanted)


def scalar(
    function: str, argument: str, value: ArrayLike, dtype, high: float | None = None, *, open_interval: bool = False
) -> Array:
    """An option of one number, in [0, high] or (0, high). Outside: an error, or NaN where it is traced."""
    with np.errstate(over="ignore"):  # 3.5e38 is inf in float32: it is refused below
        array = real(function, argument, value)
    if array.ndim:
        raise value_error(function, argument, f"of shape {array.shape}", "a scalar")
    if isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_:
        raise type_error(function, argument, "of dtype bool", "a number")
    array = array.astype(dtype)
    if high is None:
        return array

    def inside(number: Any):
        return (number > 0) & (number < high) if open_interval else (number >= 0) & (number <= high)

    value = value if isinstance(value, Array) else getattr(value, "__jax_array__", lambda: value)()
    if isinstance(value, Tracer):
        return jnp.where(inside(array), array, jnp.nan)
    number = np.float64(jax.device_get(value))
    with np.errstate(over="ignore"):
        rounded = number.astype(dtype)
    if not (inside(number) and inside(rounded)):
        brackets = "(0, {})" if open_interval else "[0, {}]"
        raise value_error(function, argument, f"{value}", "a number in " + brackets.format(high))
    return array
