"""Every function of jaxce against every installed peer, interleaved in one process.

For each problem: the median time and its spread, its ratio to the best peer and to the floor (three bare matmuls, or
one pass over the logits; beside it "floor by blocks", the matmuls by the blocks of rows of `fused_linear`), temp memory
and minor page faults (each is 4 KiB of memory that was not there before), the time of compilation and of the first
call, and the error against float64. A peer that is wrong is marked so and is not compared with.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import sys
import time
from importlib import metadata
from typing import Any

import jax

from . import problems
from .contenders import Contender, contenders
from .problems import Problem

# Errors above these are called wrong; half precision is rounded anywhere by some peers, at best at the end.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
SHORT = 1_000  # milliseconds: a problem of which many runs of each contender fit into it is run as often
MOST_MILLISECONDS = 25_000  # of one contender at one problem, beyond which it is not run again
PEERS = ("jax", "jaxlib", "optax", "torch", "tokamax", "jax-cce", "marin-levanter")


def measure(problem: Problem, repeats: int, skipped: list[str], progress) -> list[dict[str, Any]]:
    arguments = jax.block_until_ready(problems.data(problem))
    truth = problems.truth(problem, arguments)
    rows, running = [], {}
    for name, compile_one in contenders(problem, arguments).items():
        if name in skipped:
            continue
        row: dict[str, Any] = {"problem": problem.name, "contender": name}
        rows.append(row)
        try:
            contender = compile_one()
            row |= {"compile s": contender.compile_seconds, "temp MiB": contender.temp_mib}
            out, row["first call ms"], _ = once(contender)
            if not is_floor(row):
                row["error"] = problems.error(truth, *contender.result(out))
                row["wrong"] = not row["error"] <= TOLERANCE[problem.dtype]
            running[name] = (contender, row, [], [])
            del out
        except Exception as e:  # a peer's failure is a result, not the end of the benchmark
            row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
        progress.update()
    slowest = max((row["first call ms"] for _, row, _, _ in running.values()), default=1)
    for _ in range(max(repeats, min(200, int(SHORT / slowest)))):
        for contender, _, milliseconds, faults in running.values():
            progress.update()
            if sum(milliseconds) > MOST_MILLISECONDS:
                continue
            once(contender)  # what another left behind, in caches, threads and the allocator, is not timed
            _, duration, new_faults = once(contender)
            milliseconds.append(duration)
            faults.append(new_faults)
    for _, row, milliseconds, faults in running.values():
        low, middle, high = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else milliseconds * 3
        row |= {"ms": middle, "quartiles ms": [low, high], "page faults": int(statistics.median(faults))}
        row["runs"] = len(milliseconds)
    return compared(rows)


def is_floor(row: dict[str, Any]) -> bool:
    return row["contender"].startswith("floor")


def once(contender: Contender) -> tuple[Any, float, int]:
    """The result of one run, its milliseconds and its minor page faults."""
    arguments = contender.prepare()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    out = contender.run(*arguments)
    duration = 1e3 * (time.perf_counter() - start)
    return out, duration, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    floor = next((row["ms"] for row in rows if row["contender"] == "floor" and "ms" in row), None)
    optax = next((row["ms"] for row in rows if row["contender"] == "optax" and "ms" in row), None)
    peers = [r for r in rows if "ms" in r and not is_floor(r) and not r["contender"].startswith("jaxce")]
    best = min((row["ms"] for row in peers if not row["wrong"]), default=None)
    for row in rows:
        if "ms" in row:
            row |= {f"of {k}": row["ms"] / v for k, v in (("floor", floor), ("optax", optax), ("best peer", best)) if v}
    return rows


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    versions = {}
    for peer in PEERS:
        try:
            versions[peer] = metadata.version(peer)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind if device.platform != "cpu" else model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: str, rows: list[dict[str, Any]]) -> None:
    """`rows` as JSON, in the order of PROBLEMS, with those of other problems that the file has from here and today."""
    here, measured = machine(), {row["problem"] for row in rows}
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        if before["machine"] == here:
            rows = [row for row in before["rows"] if row["problem"] not in measured] + rows
    names = [problem.name for problem in (*problems.PROBLEMS, *problems.QUICK)]
    rows = sorted(rows, key=lambda row: names.index(row["problem"]))
    with open(path, "w") as file:
        json.dump({"machine": here, "rows": rows}, file, indent=1)
        file.write("\n")


COLUMNS = ("ms", "of floor", "of optax", "of best peer", "temp MiB", "page faults", "compile s", "error")


def print_rows(rows: list[dict[str, Any]]) -> None:
    def cell(row, column):
        value = row.get(column)
        if value is None:
            return "–"
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1e}" if column == "error" else f"{value:.2f}"

    print(f"\n{rows[0]['problem']}")
    print(f"{'':28}" + "".join(f"{column:>14}" for column in COLUMNS))
    for row in rows:
        note = "  WRONG" if row.get("wrong") else f"  failed: {row['failed']}" if "failed" in row else ""
        print(f"{row['contender']:28}" + "".join(f"{cell(row, column):>14}" for column in COLUMNS) + note)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Time and temp memory of each contender, a panel for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["problem"] for row in rows))
    figure, panels = pyplot.subplots(len(names), 2, figsize=(11, 0.5 + 2.1 * len(names)), squeeze=False)
    for name, (left, right) in zip(names, panels, strict=True):
        shown = [row for row in rows if row["problem"] == name and "ms" in row][::-1]
        labels = [row["contender"] + (" (wrong)" if row.get("wrong") else "") for row in shown]
        ours = [row["contender"].startswith("jaxce") for row in shown]
        colours = ["C0" if our else "0.7" for our in ours]
        left.barh(labels, [row["ms"] for row in shown], color=colours)
        right.barh(labels, [row["temp MiB"] or 0 for row in shown], color=colours)
        right.set_yticks([])
        left.set_title(f"{name}: ms", fontsize=9, loc="left")
        right.set_title("temp MiB (torch: not known)", fontsize=9, loc="left")
        for panel in (left, right):
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: a check that it runs, not a measurement")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name contains TEXT")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a contender to leave out")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each contender, if not short (default 7)")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write what was measured; other problems that FILE has from the same day and machine stay",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw times and memory")
    options = parser.parse_args(arguments)
    from tqdm import tqdm

    chosen = [p for p in (problems.QUICK if options.quick else problems.PROBLEMS) if options.only in p.name]
    if not chosen:
        parser.error(f"no problem's name contains {options.only!r}")
    rows: list[dict[str, Any]] = []
    with tqdm(unit="run", file=sys.stderr) as progress:
        for problem in chosen:
            progress.set_description(problem.name)
            measured = measure(problem, options.repeats, options.skip, progress)
            print_rows(measured)
            rows += measured
    print("\n" + json.dumps(machine()))
    if options.json:
        write(options.json, rows)
    if options.plot:
        plot(rows, options.plot)
    ours = [row for row in rows if row["contender"].startswith("jaxce")]
    return 1 if any(row.get("wrong") or "failed" in row for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
