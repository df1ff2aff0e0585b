"""Temp memory of the heads of language models on accelerators: jaxce and every installed peer, compiled without them.

What value_and_grad needs beside inputs and outputs, in MiB, as XLA's compiler for the device says.
"""

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from ..benchmarks.contenders import installed, linear_losses
from . import problems
from .problems import HEADS, LOGITS, OURS, TOKENS, gradients, head, logits
from .targets import TARGETS, temp_mib

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "optax", "tokamax", "jax-cce", "marin-levanter")


def cases(models: list[str]) -> list[tuple[str, str, Callable, tuple]]:
    """(problem, contender, function, arguments)."""
    peers = {name: loss for name, loss in linear_losses().items() if not name.startswith("jaxce")}
    if installed("optax"):
        import optax

        xent = optax.softmax_cross_entropy_with_integer_labels
        peers["optax, bfloat16 logits"] = lambda x, w, labels: xent(x @ w, labels).mean()
    found: list[tuple[str, str, Callable, tuple]] = []
    for model in models:
        for name, (loss, dtype) in OURS.items():
            found.append((model, name, gradients(loss), head(*HEADS[model], dtype)))
        for name, loss in peers.items():
            found.append((model, name, gradients(loss), head(*HEADS[model])))
    losses: dict[str, Callable] = {
        "jaxce": problems.mean_loss,
        "jaxce, every option": problems.mean_loss_with_every_option,
    }
    if installed("optax"):
        losses["optax"] = lambda z, y, *_: xent(z, y).mean()
    for name, loss in losses.items():
        found.append(("logits", name, jax.value_and_grad(loss), logits()))
    return found


def measure(chosen: list[tuple], targets: list[str], progress) -> list[dict[str, Any]]:
    rows = []
    for problem, contender, function, arguments in chosen:
        for target in targets:
            row: dict[str, Any] = {"problem": problem, "contender": contender, "target": target}
            try:
                row["temp MiB"] = temp_mib(function, arguments, target)
            except Exception as e:  # a peer's failure is a result
                row["failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            rows.append(row)
            progress.update()
    return rows


def print_rows(rows: list[dict[str, Any]], targets: list[str]) -> None:
    cells = {(r["problem"], r["contender"], r["target"]): r for r in rows}
    for problem in dict.fromkeys(r["problem"] for r in rows):
        shape = [TOKENS, *HEADS[problem]] if problem in HEADS else LOGITS
        print(f"\n{problem} {list(shape)} bfloat16, MiB\n{'':30}" + "".join(f"{target:>12}" for target in targets))
        for contender in dict.fromkeys(r["contender"] for r in rows if r["problem"] == problem):
            found = [cells[problem, contender, target].get("temp MiB") for target in targets]
            print(f"{contender:30}" + "".join(f"{'failed' if v is None else f'{v:.1f}':>12}" for v in found))


def versions() -> dict[str, str]:
    return {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("--model", action="append", choices=HEADS, help="only this model; may be repeated")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this device; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    options = parser.parse_args(arguments)
    from tqdm import tqdm

    targets = options.target or list(TARGETS)
    chosen = cases(options.model or list(HEADS))
    with tqdm(total=len(chosen) * len(targets), unit="program", file=sys.stderr) as progress:
        rows = measure(chosen, targets, progress)
    print_rows(rows, targets)
    result = {"date": datetime.date.today().isoformat(), "versions": versions(), "tokens": TOKENS, "rows": rows}
    print("\n" + json.dumps({k: result[k] for k in ("date", "versions")}))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 1 if any("failed" in row for row in rows if row["contender"].startswith("jaxce")) else 0


if __name__ == "__main__":
    sys.exit(main())
