"""What a compiled program needs, and what it is made of."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

MIB = 2**20


def row_arguments(shape: tuple[int, ...], dtype: DTypeLike = "float32") -> tuple[jax.ShapeDtypeStruct, ...]:
    """Logits and labels of this shape, to compile for."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), jax.ShapeDtypeStruct(shape[:-1], jnp.int32)


def compiled(f: Callable, *arguments, **jit_options) -> Any:
    """The arguments are arrays, or of `jax.ShapeDtypeStruct`."""
    return jax.jit(f, **jit_options).lower(*arguments).compile()


def temp_bytes_of(executable: Any) -> int:
    """What it needs beside arguments and results."""
    statistics = executable.memory_analysis()
    assert statistics is not None
    return statistics.temp_size_in_bytes


def temp_bytes(f: Callable, *arguments) -> int:
    return temp_bytes_of(compiled(f, *arguments))


def text_of(f: Callable, *arguments) -> str:
    text = compiled(f, *arguments).as_text()
    assert text
    return text


def matmuls(text: str) -> int:
    return len(re.findall(r" dot\(", text))
