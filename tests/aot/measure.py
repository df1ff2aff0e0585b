"""What a function needs on a device, as the compiler for it knows: memory, and the least time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from .roofline import PEAKS, Roofline, roofline
from .targets import compiled, temp_mib_of


class Measured(NamedTuple):
    target: str
    arguments: Any
    temp_mib: float  # beside inputs and outputs
    roofline: Roofline

    @property
    def kernels(self) -> int:
        """Launched, trips of loops included."""
        return self.roofline.kernels

    @property
    def time(self) -> float:
        """Of a head with arguments x [N, D], w [D, K] or [K, D], …: in units of three bare matmuls at peak."""
        x, w = self.arguments[:2]
        return self.roofline.seconds / (3 * 2 * x.shape[0] * math.prod(w.shape) / PEAKS[self.target][0])

    @property
    def passes(self) -> float:
        """Of a loss of logits, its first argument: bytes moved, in units of the logits'."""
        logits = self.arguments[0]
        return self.roofline.bytes / (math.prod(logits.shape) * logits.dtype.itemsize)


def measure(f: Callable, arguments: tuple[jax.ShapeDtypeStruct, ...], target: str) -> Measured:
    """`f`, compiled once. ValueError if its time is unknown: a loop without a trip count, a Pallas kernel."""
    return measured(compiled(f, arguments, target), arguments, target)


def measured(program: Any, arguments: tuple[jax.ShapeDtypeStruct, ...], target: str) -> Measured:
    return Measured(target, arguments, temp_mib_of(program), roofline(program.as_text(), target))
