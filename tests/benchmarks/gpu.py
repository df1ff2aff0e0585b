"""Heads and losses of logits, measured on a GPU: `python -m tests.benchmarks.gpu --json FILE`.

Of value_and_grad of a mean loss:

heads: the median time, beside three bare matmuls that make the same logits and gradients, and beside materialized
optax. By jaxce's default, and by blocks of 512 to 8192 rows and of 1024 to 8192 classes. `difference` is the largest to
the loss and gradients of optax's float32 logits, relative to the largest;
logits: the bandwidth, of the bytes that the loss cannot do without: read, read, write, of dense targets five times the
logits' bytes. `copy` reads and writes them once.

What matters most is measured first. What does not fit into the time budget is listed as left out.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..aot import problems
from .__main__ import machine

HEADS = {name: problems.ALL_HEADS[name] for name in problems.BLOCKS}  # rows, features, classes
ROWS, CLASSES = (512, 1024, 2048, 4096, 8192), (1024, 2048, 4096, 8192)  # per block
QUICK_HEADS, QUICK_LOGITS = {"tiny": (48, 16, 300)}, (16, 300)
QUICK_ROWS, QUICK_CLASSES = (16,), (128,)
WITHOUT_SIZES = ("jaxce", "jaxce, recompute=False", "jaxce, float32 w")

SECONDS = 330  # of the whole command
FEWEST, MOST, RUNS_SECONDS = 5, 30, 1.0  # runs of a program: as many as fit into a second
Row = dict[str, Any]
Arguments = tuple[jax.ShapeDtypeStruct, ...]


class Job(NamedTuple):
    """One program to measure."""

    problem: str
    contender: str
    function: Callable
    arguments: Arguments
    least: float  # a head: flops of its three matmuls; logits: bytes that it cannot do without

    @property
    def is_head(self) -> bool:
        return not self.problem.startswith("logits")


def jobs(quick: bool) -> list[Job]:
    """The first matters most."""
    heads, logits = (QUICK_HEADS, QUICK_LOGITS) if quick else (HEADS, problems.LOGITS)
    rows, classes = (QUICK_ROWS, QUICK_CLASSES) if quick else (ROWS, CLASSES)
    first = [job for name, shape in heads.items() for job in plain(name, shape)]
    losses = [job for problem in problems.LOGITS_DTYPES for job in of_logits(problem, logits)]
    blocked = [job for name, shape in heads.items() for job in by_blocks(name, shape, rows, classes)]
    return [*first, *losses, *blocked]


def three_matmuls(x: Array, w: Array, dz: Array) -> tuple[Array, Array, Array]:
    return x @ w, dz @ w.T, x.T @ dz


def plain(problem: str, shape: tuple[int, int, int]) -> list[Job]:
    """The floor, optax, and jaxce without block sizes."""
    tokens, features, classes = shape
    x, w, _ = problems.head(features, classes, tokens=tokens)
    dz = jax.ShapeDtypeStruct((tokens, classes), w.dtype)
    floor = Job(problem, "three matmuls", three_matmuls, (x, w, dz), 6.0 * tokens * features * classes)
    peers = {name: (loss, w.dtype) for name, loss in problems.peers_of_a_head().items() if name.startswith("optax")}
    ours = {name: problems.OURS[name] for name in WITHOUT_SIZES}
    return [floor, *(of_head(problem, shape, name, *loss) for name, loss in (peers | ours).items())]


def by_blocks(problem: str, shape: tuple[int, int, int], rows: tuple[int, ...], classes: tuple[int, ...]) -> list[Job]:
    plans = problems.blocks_of(classes, [size for size in rows if size <= shape[0]])
    return [of_head(problem, shape, name, *plan) for name, plan in plans.items()]


def of_head(problem: str, shape: tuple[int, int, int], name: str, loss: Callable, w_dtype: Any) -> Job:
    tokens, features, classes = shape
    arguments = problems.head(features, classes, w_dtype, tokens)
    return Job(problem, name, problems.gradients(loss), arguments, 6.0 * tokens * features * classes)


def of_logits(problem: str, shape: tuple[int, int]) -> list[Job]:
    cases = problems.cases_of_logits(problem, shape)
    z = cases[0].arguments[0]
    once = shape[0] * shape[1] * z.dtype.itemsize
    passes = {case.contender: 5 if "dense" in case.contender else 3 for case in cases}
    measured = [Job(problem, c.contender, c.function, c.arguments, passes[c.contender] * once) for c in cases]
    return [Job(problem, "copy", lambda z: z * 2, (z,), 2 * once), *measured]


@functools.lru_cache(maxsize=1)
def data(arguments: Arguments) -> tuple[Array, ...]:
    """Logits have a standard deviation of 1; targets sum to 1; weights are 1, and nothing is masked."""
    first, second = arguments[0], arguments[min(1, len(arguments) - 1)]
    classes = second.shape[-1] if second.ndim == 2 else first.shape[-1]

    def filled(i: int, a: jax.ShapeDtypeStruct, key: Array) -> Array:
        if a.dtype == jnp.int32:
            return jax.random.randint(key, a.shape, 0, classes)
        if a.ndim == 1:
            return jnp.ones(a.shape, a.dtype)
        numbers = jax.random.normal(key, a.shape)
        if i == 1:
            numbers = jax.nn.softmax(numbers) if a.shape == first.shape else numbers / first.shape[-1] ** 0.5
        return numbers.astype(a.dtype)

    keys = jax.random.split(jax.random.key(0), len(arguments))
    return jax.block_until_ready(jax.jit(lambda keys: tuple(map(filled, range(len(keys)), arguments, keys)))(keys))


# --- Measuring ---------------------------------------------------------------------------------------------------


def measured(job: Job, reference: Any, known: dict[str, Row]) -> tuple[Row, Any]:
    """A row, and what optax returned. `known` has the rows by program: the default is some block size too."""
    arguments = data(job.arguments)
    lowered = jax.jit(job.function).lower(*arguments)
    if (text := lowered.as_text()) in known:
        return known[text], None
    start = time.perf_counter()
    program = lowered.compile()
    row: Row = {"compile s": time.perf_counter() - start}
    memory = program.memory_analysis()
    row["temp MiB"] = None if memory is None else memory.temp_size_in_bytes / 2**20
    out = jax.block_until_ready(program(*arguments))
    if job.is_head and reference is not None and job.contender != "three matmuls":
        row["difference"] = float(difference(out, reference))
    result = out if job.contender == "optax" and job.is_head else None
    del out

    milliseconds: list[float] = []
    while len(milliseconds) < FEWEST or (sum(milliseconds) < 1e3 * RUNS_SECONDS and len(milliseconds) < MOST):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        milliseconds.append(1e3 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    row |= {"ms": middle, "quartiles ms": [low, high], "runs": len(milliseconds)}
    row["TFLOP/s" if job.is_head else "GB/s"] = job.least / middle / (1e9 if job.is_head else 1e6)
    known[text] = row
    return row, result


@jax.jit
def difference(got: Any, wanted: Any) -> Array:
    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.abs(a - b).max() / jnp.abs(b).max()

    return jnp.stack(jax.tree.leaves(jax.tree.map(relative, got, wanted))).max()


def compared(rows: list[Row]) -> list[Row]:
    """Each head's time as a multiple of three bare matmuls and of optax's."""
    for name, key in (("three matmuls", "of matmuls"), ("optax", "of optax")):
        heads = [row for row in rows if "TFLOP/s" in row]
        base = {row["problem"]: row["ms"] for row in heads if row["contender"] == name}
        for row in heads:
            if row["problem"] in base:
                row[key] = row["ms"] / base[row["problem"]]
    return rows


def measure(todo: list[Job], seconds: float, progress, save: Callable[[list[Row], list[Row]], None]) -> list[Row]:
    """What fits into so many seconds. `save(rows, left_out)` after each, as a GPU's error may end the process."""
    rows: list[Row] = []
    left_out: list[Row] = []
    known: dict[str, Row] = {}
    start, longest = time.perf_counter(), 0.0
    problem, reference = "", None
    for job in todo:
        begun = time.perf_counter()
        row: Row = {"problem": job.problem, "contender": job.contender}
        progress.set_description(f"{job.problem}, {job.contender}")
        if begun - start + longest > seconds:
            left_out.append(row)
        else:
            if job.problem != problem:
                problem, reference = job.problem, None
            try:
                found, result = measured(job, reference, known)
                row |= found
                reference = result or reference
            except Exception as e:  # out of memory, say: a result, not the end of the benchmark
                row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            rows.append(row)
            longest = max(longest, time.perf_counter() - begun)
        save(compared(rows), left_out)
        progress.update()
    for row in left_out:
        print(f"left out, {seconds:.0f} s are over: {row['problem']}, {row['contender']}")
    return rows


# --- The command -------------------------------------------------------------------------------------------------

COLUMNS = ("ms", "of matmuls", "of optax", "TFLOP/s", "GB/s", "temp MiB", "difference", "compile s")


def print_rows(rows: list[Row]) -> None:
    def cell(row: Row, column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1e}" if column == "difference" else f"{value:.2f}"

    for problem in dict.fromkeys(row["problem"] for row in rows):
        print(f"\n{problem:34}" + "".join(f"{column:>12}" for column in COLUMNS))
        for row in (row for row in rows if row["problem"] == problem):
            note = f"  failed: {row['failed']}" if "failed" in row else ""
            print(f"{row['contender']:34}" + "".join(f"{cell(row, column):>12}" for column in COLUMNS) + note)


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time budget (default {SECONDS})")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a check that it runs, not a measurement")
    parser.add_argument("--cpu", action="store_true", help="do not ask for a GPU; with --quick only")
    options = parser.parse_args(arguments)
    if options.cpu and not options.quick:
        parser.error("--cpu needs --quick: the heads are too large for a CPU")
    device = jax.devices()[0]
    if device.platform != "gpu" and not options.cpu:
        parser.error(f"no GPU: JAX found {device.device_kind!r}. Install jax[cuda12] there; here, try --quick --cpu")
    from tqdm import tqdm

    here = machine() | {"seconds": options.seconds}

    def save(rows: list[Row], left_out: list[Row]) -> None:
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"machine": here, "rows": rows, "left_out": left_out}, file, indent=1)
                file.write("\n")

    todo = jobs(options.quick)
    with tqdm(total=len(todo), unit="program", file=sys.stderr) as progress:
        rows = measure(todo, options.seconds, progress, save)
    print_rows(rows)
    print("\n" + json.dumps(here))
    return 1 if any("failed" in row for row in rows if row["contender"].startswith("jaxce")) else 0


if __name__ == "__main__":
    sys.exit(main())
