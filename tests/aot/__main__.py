"""Time and memory on accelerators, of jaxce and of every installed peer, compiled without them.

Of value_and_grad of a mean loss, as XLA compiled it for the device:
time, of a head: the least that its kernels can take, in units of three bare matmuls at peak;
passes, of a loss of logits: bytes moved, in units of the logits';
kernels: how many it launches, with the trips of its loops;
MiB: temporary memory, beside inputs and outputs.
"""

import argparse
import datetime
import json
import os
import sys
from importlib import metadata
from typing import Any

from .measure import Measured, measured
from .problems import ALL_HEADS, PROBLEMS, TOKENS, Case, cases, shape_of
from .targets import TARGETS, lowered, temp_mib_of

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "optax", "tokamax", "jax-cce", "marin-levanter")
Row = dict[str, Any]
Known = dict[tuple[str, str], Any]  # by target and text: a program that two contenders share is compiled once


def row_of(case: Case, target: str, slowest: int, known: Known) -> Row:
    row: Row = {"problem": case.problem, "contender": case.contender, "target": target}
    try:
        before = lowered(case.function, case.arguments, target)
        key = target, before.as_text()
        program = known[key] if key in known else known.setdefault(key, before.compile())
        row["temp_mib"] = temp_mib_of(program)
        row |= numbers(case, found := measured(program, case.arguments, target), slowest)
    except Exception as e:  # a peer's failure is a result
        row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
    else:
        print_kernels(case, found, slowest)
    return row


def numbers(case: Case, found: Measured, slowest: int) -> Row:
    floor = {"time": found.time} if case.is_head else {"passes": found.passes}
    listed = {"slowest": [kernel._asdict() for kernel in found.roofline.table[:slowest]]} if slowest else {}
    return floor | {"kernels": found.kernels, "seconds": found.roofline.seconds} | listed


def print_kernels(case: Case, found: Measured, slowest: int) -> None:
    if slowest:
        print(f"\n{case.problem}, {case.contender}, {found.target}:")
    for kernel in found.roofline.table[:slowest]:
        flops, size = kernel.flops / 1e9, kernel.bytes / 2**20
        print(
            f"{kernel.seconds * 1e3:10.3f} ms{kernel.trips:10,} trips{flops:12,.0f} GF{size:12,.0f} MiB  {kernel.name}"
        )


def print_table(problem: str, rows: list[Row], targets: list[str]) -> None:
    first = "time" if problem in ALL_HEADS else "passes"
    print(f"\n{problem}: {shape_of(problem)}\n{'':28}" + "".join(f"{target:>30}" for target in targets))
    print(f"{'':28}" + f"{first:>10}{'kernels':>11}{'MiB':>9}" * len(targets))
    cells = {(row["contender"], row["target"]): cell(row, first) for row in rows}
    for contender in dict.fromkeys(row["contender"] for row in rows):
        print(f"{contender:28}" + "".join(cells[contender, target] for target in targets))
    for row in rows:
        if "failed" in row:
            print(f"{row['contender']}, {row['target']} failed: {row['failed']}")


def cell(row: Row, first: str) -> str:
    mib = f"{row['temp_mib']:9,.1f}" if "temp_mib" in row else f"{'':9}"
    if "failed" in row:
        return f"{'failed':>10}{'':11}{mib}"
    return f"{row[first]:10.2f}{row['kernels']:11,}{mib}"


def report(path: str, rows: list[Row]) -> dict[str, Any]:
    """`rows`, with those of other programs that the file at `path` has from the same versions, in one order."""
    result = {"date": datetime.date.today().isoformat(), "versions": versions(), "tokens": TOKENS}
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        measured = {name_of(row) for row in rows}
        if before["versions"] == result["versions"]:
            rows = [row for row in before["rows"] if name_of(row) not in measured] + rows
    order = [case for problem in PROBLEMS for case in cases(problem)]
    names = [(case.problem, case.contender, target) for case in order for target in TARGETS]
    known = [row for row in rows if name_of(row) in names]
    return result | {"rows": sorted(known, key=lambda row: names.index(name_of(row)))}


def name_of(row: Row) -> tuple[str, str, str]:
    return row["problem"], row["contender"], row["target"]


def write(path: str, rows: list[Row]) -> None:
    result = report(path, rows)
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


def versions() -> dict[str, str]:
    return {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__, formatter_class=form)
    parser.add_argument("--problem", action="append", choices=PROBLEMS, help="only this one; may be repeated")
    parser.add_argument("--contender", action="append", help="only this one; may be repeated")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this device; may be repeated")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list each program's N slowest kernels too")
    parser.add_argument("--json", metavar="FILE", help="write what was measured; other programs that FILE has stay")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    from tqdm import tqdm

    targets, problems = options.target or list(TARGETS), options.problem or list(PROBLEMS)
    chosen = [case for problem in problems for case in cases(problem)]
    chosen = [case for case in chosen if case.contender in (options.contender or [case.contender])]
    rows: list[Row] = []
    with tqdm(total=len(chosen) * len(targets), unit="program", file=sys.stderr) as progress:
        for problem in problems:
            known: Known = {}
            for case in (case for case in chosen if case.problem == problem):
                for target in targets:
                    rows.append(row_of(case, target, options.kernels, known))
                    if options.json:
                        write(options.json, rows)
                    progress.update()
    for problem in problems:
        print_table(problem, [row for row in rows if row["problem"] == problem], targets)
    print("\n" + json.dumps({"date": datetime.date.today().isoformat(), "versions": versions()}))
    return 1 if any("failed" in row for row in rows if row["contender"].startswith("jaxce")) else 0


if __name__ == "__main__":
    sys.exit(main())
