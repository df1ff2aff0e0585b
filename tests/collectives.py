"""What devices exchange in a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

OPERATION = re.compile(
    r"= (.+?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|ragged-all-to-all)(-start)?\("
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


class Collective(NamedTuple):
    operation: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result, on one device
    times: int  # how often a device runs it: the product of the trip counts of the loops around it

    @property
    def numbers(self) -> int:
        """In the results, all times together."""
        return self.times * sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> int:
        return self.times * sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)


def collectives(text: str) -> list[Collective]:
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)

    def within(name: str, times: int) -> list[Collective]:
        found = []
        for line in computations.get(name, ()):
            if (match := OPERATION.search(line)) and not _alone(line):
                arrays = [
                    (dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in ARRAY.findall(match[1])
                ]
                # The asynchronous forms, but for all-reduce, return their operands too, first.
                arrays = arrays[len(arrays) // 2 :] if match[3] and match[2] != "all-reduce" else arrays
                found.append(Collective(match[2], tuple(arrays), times))
            if body := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                # CPUs and GPUs note how long a loop is; for TPUs it is the one number in its condition.
                trips = re.findall(r"known_trip_count[^\d]*(\d+)", line)
                trips = trips or re.findall(r" constant\((\d+)\)", "\n".join(computations[body[1]]))
                assert len(trips) == 1, f"a loop of unknown length: {line}"
                found += within(body[2], times * int(trips[0]))
            else:
                for called in re.findall(r"(?:to_apply|calls|computation)=%?([\w.\-]+)", line):
                    found += within(called, times)
                for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                    found += [c for branch in branches.split(",") for c in within(branch.strip(" %"), times)]
        return found

    assert entry, "no entry computation in the text"
    return within(entry, 1)


def _alone(line: str) -> bool:
    """Whether the groups are of one device each, which exchange nothing."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return all(sizes[axis.strip()] == "1" for axis in named[2].split(","))
    return bool(re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<=)", line))
