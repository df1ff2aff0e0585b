"""The least time that a compiled program takes on a device: the roofline of its optimized HLO.

time ≥ Σ over kernels × loop trips of max(flops / peak, bytes / bandwidth)

A kernel is an instruction that runs: a fusion, a matmul, a copy, …, of the entry, a loop's body, a called
computation or a conditional's dearest branch. It reads its operands once and writes its result once. Of an operand
it reads the elements that it uses: a slice, what it gathers. An update in place (dynamic-update-slice, scatter)
moves what it updates: where the buffer is still needed, XLA has put a copy before it. Buffers in a TPU's on-chip
memory, S(1), are free. What only names a buffer (tuple, bitcast, parameter, …) does not run. An asynchronous
instruction runs once, where it is done.

Flops are those of matmuls. The peak is bfloat16's, for float32 matmuls too. Not counted: vector arithmetic,
launches (a kernel's costs 2 to 5 µs on a GPU), the padding of a TPU's tiles, caches. Kernels do not overlap.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .hlo import Computation, Instruction, Program, Shape, matmul_flops, parsed, trip_count

PEAKS = {  # bfloat16 flops per second, bytes per second
    "H100": (989e12, 3.352e12),
    "TPU v5e": (197e12, 0.819e12),
    "TPU v5p": (459e12, 2.765e12),
    "TPU v6e": (918e12, 1.64e12),
}
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain"),
    *("opt-barrier", "optimization-barrier", "partition-id", "replica-id"),
}
FREE_CALLS = {"AllocateBuffer"}
OPAQUE_CALLS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2"}  # kernels of Pallas
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is what they write
WHOLE = {  # whose result may need more elements of an operand than it has itself
    *("dot", "convolution", "reduce", "reduce-window", "select-and-scatter", "sort", "custom-call", "fft"),
    *("cholesky", "triangular-solve", "rng-bit-generator"),
}


class Kernel(NamedTuple):
    """What an instruction costs, over all its trips."""

    name: str
    op: str
    trips: int
    seconds: float
    flops: int
    bytes: int


class Roofline(NamedTuple):
    seconds: float
    flops: int
    bytes: int
    kernels: int  # launched, trips included
    table: tuple[Kernel, ...]  # the slowest first


def roofline(text: str, target: str) -> Roofline:
    """Of the optimized HLO `text`, as `compiled.as_text()` has it. ValueError where a loop's trips are not known."""
    program = parsed(text)
    table = sorted(_run(program, program.entry, PEAKS[target]), key=lambda kernel: -kernel.seconds)
    return Roofline(
        sum(kernel.seconds for kernel in table),
        sum(kernel.flops for kernel in table),
        sum(kernel.bytes for kernel in table),
        sum(kernel.trips for kernel in table),
        tuple(table),
    )


def _run(program: Program, computation: Computation, peaks: tuple[float, float]) -> Iterator[Kernel]:
    """The kernels of one run of a computation."""
    for i in computation.values():
        if i.op.endswith("-done") and i.op != "async-done":
            i = _finished(computation, i)
        if i.op == "while":
            trips = trip_count(program, computation, i)
            for kernel in _run(program, program[i.attribute("body")], peaks):
                yield _repeated(kernel, trips)
        elif i.op == "conditional":
            branches = [list(_run(program, program[name], peaks)) for name in i.branches]
            yield from max(branches, key=lambda kernels: sum(kernel.seconds for kernel in kernels))
        elif i.op in ("call", "async-start"):
            yield from _run(program, program[i.attribute("to_apply|calls")], peaks)
        elif not _free(i):
            yield _kernel(program, computation, i, peaks)


def _free(i: Instruction) -> bool:
    """Whether it does not run; the start of an asynchronous instruction is counted at its end."""
    call = i.op == "custom-call" and i.attribute("custom_call_target") in FREE_CALLS
    return call or i.op in FREE or i.op.endswith(("-start", "-update", "-done"))


def _repeated(kernel: Kernel, trips: int) -> Kernel:
    name, op, before, seconds, flops, size = kernel
    return Kernel(name, op, trips * before, trips * seconds, trips * flops, trips * size)


def _finished(computation: Computation, done: Instruction) -> Instruction:
    """The instruction that was started, with the result that it has when it is done."""
    start = computation[done.operands[0]]
    while start.op.endswith("-update"):
        start = computation[start.operands[0]]
    return start._replace(op=done.op.removesuffix("-done"), shapes=done.shapes)


def _kernel(program: Program, computation: Computation, i: Instruction, peaks: tuple[float, float]) -> Kernel:
    target = i.attribute("custom_call_target")
    if target in OPAQUE_CALLS:
        raise ValueError(f"{i.name} calls {target}: nobody but its author knows its flops")
    operands = [computation[name] for name in i.operands]
    body = program.inlined(i.attribute("calls")) if i.op == "fusion" else _alone(i, operands)
    flops = sum(matmul_flops(j, body) for j in body.values())
    size = _read(body, operands) + _written(body, i, gemm=flops > 0 and i.op == "custom-call")
    seconds = max(flops / peaks[0], size / peaks[1])
    return Kernel(i.name, i.op, 1, seconds, flops, size)


def _alone(i: Instruction, operands: list[Instruction]) -> Computation:
    """The computation that does just `i`."""
    parameters = (j._replace(op="parameter", operands=(), text=str(k), root=False) for k, j in enumerate(operands))
    return Computation([*parameters, i._replace(root=True)])


def _read(body: Computation, operands: list[Instruction]) -> int:
    """Bytes that a kernel reads of its operands."""
    used = _used(body)
    size: dict[str, float] = {}  # by name: an operand that is passed twice is read once
    for parameter in body.parameters:
        operand = operands[int(parameter.text)]
        part = used[parameter.name] / max(operand.elements, 1)
        size[operand.name] = max(size.get(operand.name, 0), part * _nbytes(operand.shapes))
    return math.ceil(sum(size.values()))


def _used(body: Computation) -> dict[str, int]:
    """How many elements of each value a kernel uses. To store a value where it is already uses none."""
    kept = {name for value in body.stored for name in _in_place(body, value)}
    used: dict[str, int] = {}
    for i in reversed(body.values()):  # users first
        stored = i.elements if i.name in body.stored and i.name not in kept else 0
        used[i.name] = min(i.elements, stored + sum(_used_by(user, i, body, used) for user in body.users[i.name]))
    return used


def _used_by(user: Instruction, i: Instruction, body: Computation, used: dict[str, int]) -> int:
    """How many elements of the value `i` its `user` uses, of whose result some are used."""
    if user.op == "tuple":
        return 0  # counted where it is stored
    if user.op in WHOLE or (user.op in UPDATES and i.name in user.operands[1:]):
        return i.elements
    if user.op == "scatter":
        return used[user.name] + body[user.operands[2]].elements  # it adds to what is there
    return used[user.name]  # one for one, if not fewer: so do slices and gathers


def _written(body: Computation, i: Instruction, gemm: bool) -> int:
    """Bytes that a kernel writes; of a library's matmul, the first result: the second is its workspace."""
    if gemm or len(body.stored) != len(i.shapes):
        return _nbytes(i.shapes[:1] if gemm else i.shapes)
    return sum(_stored(body, value, shape) for value, shape in zip(body.stored, i.shapes, strict=True))


def _stored(body: Computation, value: str, shape: Shape) -> int:
    if shape.on_chip:
        return 0
    updates = [body[name] for name in _in_place(body, value) if body[name].op in UPDATES]
    if not updates:
        return _nbytes([shape])
    return math.ceil(shape.itemsize * sum(body[i.operands[UPDATES[i.op]]].elements for i in updates))


def _in_place(body: Computation, value: str) -> list[str]:
    """From a stored value back to the parameter whose buffer it updates; empty if it does not."""
    chain = []
    while body[value].op in UPDATES or body[value].op == "bitcast":
        chain.append(value)
        value = body[value].operands[0]
    updated = any(body[name].op in UPDATES for name in chain)
    return chain if updated and body[value].op == "parameter" else []


def _nbytes(shapes: Iterable[Shape]) -> int:
    return math.ceil(sum(shape.elements * shape.itemsize for shape in shapes if not shape.on_chip))
