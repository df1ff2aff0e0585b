"""Optimized HLO, read from its text: computations and their instructions, loop trips, flops of matmuls."""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
NAME = re.compile(r"%([\w.\-]+)")
PASSED_ON = ("bitcast", "copy", "convert", "reshape")  # what may stand between a loop's counter and its use


class Shape(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes: the first number of a dtype's name is its bits. A token has none."""
        bits = re.search(r"\d+", self.dtype)
        return int(bits.group()) / 8 if bits else float(self.dtype == "pred")


class Instruction(NamedTuple):
    name: str
    op: str
    shapes: tuple[Shape, ...]  # of a tuple: of its leaves
    operands: tuple[str, ...]
    text: str  # in the parentheses: of a constant its value, of a parameter its number
    attributes: str
    root: bool

    @property
    def elements(self) -> int:
        return sum(shape.elements for shape in self.shapes)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.shapes[0].dims

    def attribute(self, key: str) -> str:
        """The value of an attribute, "" if there is none."""
        found = re.search(rf'(?:^|[ ,])(?:{key})=(?:%|"|\{{)?([^\s,"}}]*)', self.attributes)
        return found.group(1) if found else ""

    def numbers(self, key: str) -> list[int]:
        """Of an attribute that lists them."""
        found = re.search(rf'\b{key}"?[=:][{{\[]([\d,"]*)', self.attributes)
        return [int(n) for n in re.findall(r"\d+", found.group(1))] if found else []

    @property
    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return NAME.findall(listed.group(1))
        return [self.attribute("true_computation"), self.attribute("false_computation")]


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    def __init__(self, instructions: Iterable[Instruction]):
        super().__init__((i.name, i) for i in instructions)

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @functools.cached_property
    def stored(self) -> tuple[str, ...]:
        """The names of what it returns."""
        return self.root.operands if self.root.op == "tuple" else (self.root.name,)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        return sorted((i for i in self.values() if i.op == "parameter"), key=lambda i: int(i.text))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self}
        for i in self.values():
            for name in dict.fromkeys(i.operands):
                users[name].append(i)
        return users


class Program(dict[str, Computation]):
    """Computations by name."""

    entry: Computation

    def inlined(self, name: str) -> Computation:
        """A computation, with the instructions of its fusions in their places."""
        found: dict[str, Instruction] = {}
        known_as: dict[str, str] = {}

        def named(name: str) -> str:
            while name in known_as:
                name = known_as[name]
            return name

        for i in self[name].values():
            i = i._replace(operands=tuple(map(named, i.operands)))
            if i.op == "fusion":
                body = self.inlined(i.attribute("calls"))
                known_as |= {f"{i.name}/{p.name}": i.operands[int(p.text)] for p in body.parameters}
                known_as[i.name] = f"{i.name}/{body.root.name}"
                for j in body.values():
                    if j.op != "parameter":
                        operands = tuple(named(f"{i.name}/{operand}") for operand in j.operands)
                        found[f"{i.name}/{j.name}"] = j._replace(name=f"{i.name}/{j.name}", operands=operands)
            elif i.op == "get-tuple-element" and found[i.operands[0]].op == "tuple":
                known_as[i.name] = found[i.operands[0]].operands[int(i.attribute("index"))]
            else:
                found[i.name] = i
        root = named(self[name].root.name)
        return Computation(i._replace(root=i.name == root) for i in found.values())


def parsed(text: str) -> Program:
    program, name, instructions = Program(), "", []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := COMPUTATION.match(line):
            name, instructions = head.group(2), []
            entry = head.group(1)
        elif line.startswith("}") and name:
            program[name] = Computation(instructions)
            if entry:
                program.entry = program[name]
            name = ""
        elif name and (start := INSTRUCTION.match(line)):
            instructions.append(_instruction(start, line[start.end() :]))
    return program


def _instruction(start: re.Match, line: str) -> Instruction:
    end = _closing(line) if line.startswith("(") else line.index(" ")
    shapes, line = line[:end], line[end:].lstrip()
    op, line = line[: line.index("(")], line[line.index("(") :]
    end = _closing(line)
    inside = line[1 : end - 1]
    return Instruction(
        start.group(2), op, _shapes(shapes), tuple(NAME.findall(inside)), inside, line[end:], bool(start.group(1))
    )


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), "S(1)" in layout)
        for dtype, dims, layout in SHAPE.findall(text)
    )


def _closing(text: str) -> int:
    """Where the parenthesis ends that `text` begins with."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket.group() == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
    """How often a loop of `computation` runs: XLA says so, or it counts from a constant to a constant by a constant."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known.group(1))
    try:
        return len(_counted(program, computation, loop))
    except (KeyError, IndexError, ValueError) as e:
        raise ValueError(f"the trip count of the loop {loop.name} is not known: {e}") from e


def _counted(program: Program, computation: Computation, loop: Instruction) -> range:
    condition = program.inlined(loop.attribute("condition"))
    compare = _source(condition, condition.root.name)
    if compare.op != "compare":
        raise ValueError(f"its condition is {compare.op}, not a comparison")
    left, right = (_source(condition, name) for name in compare.operands)
    direction = compare.attribute("direction")
    if left.op == "constant":
        left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
    index = _state_index(condition, left)
    start = _constant(_source(computation, computation[loop.operands[0]].operands[index]))
    stop = _constant(right) + {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": -1}[direction]
    return range(start, stop, _step(program.inlined(loop.attribute("body")), index))


def _step(body: Computation, index: int) -> int:
    """What a loop's body adds to the counter, element `index` of its state."""
    add = _source(body, body.root.operands[index])
    left, right = (_source(body, name) for name in add.operands)
    if left.op == "constant":
        left, right = right, left
    if add.op != "add" or _state_index(body, left) != index:
        raise ValueError(f"its counter becomes {add.op} of {', '.join(add.operands)}")
    return _constant(right)


def _source(computation: Computation, name: str) -> Instruction:
    """Where a value comes from, whatever it was copied to since."""
    while computation[name].op in PASSED_ON:
        name = computation[name].operands[0]
    return computation[name]


def _constant(i: Instruction) -> int:
    if i.op != "constant":
        raise ValueError(f"{i.name} is no constant")
    return int(i.text)


def _state_index(computation: Computation, i: Instruction) -> int:
    """Which element of a loop's state `i` is."""
    if i.op != "get-tuple-element" or computation[i.operands[0]].op != "parameter":
        raise ValueError(f"{i.name} is no element of its state")
    return int(i.attribute("index"))


def matmul_flops(i: Instruction, computation: Computation) -> int:
    """2·m·n·k; 0 for what is no matmul."""
    if i.op == "dot":
        return 2 * i.elements * _contracted(computation[i.operands[0]], i.numbers("lhs_contracting_dims"))
    if i.op == "convolution":
        return _convolution_flops(i, computation[i.operands[0]], computation[i.operands[1]])
    if i.op == "custom-call" and re.match(r"__cublas\$(gemm|lt)", i.attribute("custom_call_target")):
        contracted = _contracted(computation[i.operands[0]], i.numbers("lhs_contracting_dimensions"))
        return 2 * i.shapes[0].elements * contracted  # beside it is a workspace
    return 0


def _contracted(lhs: Instruction, axes: list[int]) -> int:
    return math.prod(lhs.dims[axis] for axis in axes)


def _convolution_flops(i: Instruction, lhs: Instruction, rhs: Instruction) -> int:
    """A matmul on a TPU; the axes of its batch are windows, most of whose places hold nothing."""
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    assert labels, i
    inputs, kernel, outputs = labels.groups()
    flops = 2 * i.dims[outputs.index("b")] * i.dims[outputs.index("f")] * rhs.dims[kernel.index("i")]
    for axis in range(len(kernel) - 2):
        sizes = (dims[names.index(str(axis))] for dims, names in ((lhs.dims, inputs), (i.dims, outputs)))
        flops *= _places(i.attributes, axis, *sizes)
    return flops


def _places(attributes: str, axis: int, size: int, outputs: int) -> int:
    """How many pairs of an output and a place in its window meet an input, along an axis."""
    fields = dict(re.findall(r"(\w+)=(\S+)", re.findall(r"window=\{([^}]*)\}", attributes)[0]))
    values = {key: value.split("x")[axis] for key, value in fields.items()}
    stride, dilate, dilate_window = (int(values.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(values.get("pad", "0_0").split("_")[0])
    window = np.arange(int(values["size"])) * dilate_window - before
    place = np.arange(outputs)[:, None] * stride + window
    return int(np.sum((place >= 0) & (place <= (size - 1) * dilate) & (place % dilate == 0)))
