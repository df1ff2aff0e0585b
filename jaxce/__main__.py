"""`python -m jaxce`: is this install right on this machine?

On every backend present: losses and analytic gradients against `jax.grad` of the naive formula and against a float64
oracle, confident predictions included, with the time and the temp memory of a training step's loss beside optax's.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

# Largest relative error: of the loss row by row; of the gradient, row by row against the row's largest entry.
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8}  # float32's arithmetic; the one rounding to bfloat16
TPU_TOLERANCE = 1e-3  # exp and log are less accurate there by default
ROWS, CLASSES = 256, 1000
TIMED_SHAPE = (1024, 32000)


def oracle(logits: Any, targets: Any) -> tuple[Any, Any]:
    """Loss and gradient of each row in NumPy float64, stable: the largest logit is left out of the sum, for log1p."""
    z, t = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    row, top = np.arange(len(z)), z.argmax(1)
    e = np.exp(z - z[row, top][:, None])
    e[row, top] = 0
    log_sum = np.log1p(e.sum(1, keepdims=True))
    distance = log_sum - (z - z[row, top][:, None])
    o = np.exp(-distance)
    grad = o * t.sum(1, keepdims=True) - t
    grad[row, top] = (t.sum(1) - t[row, top]) + t.sum(1) * np.expm1(-log_sum[:, 0])
    # At a label that is not the largest, o is at most 1/2 and nothing cancels.
    return (t * distance).sum(1), grad


def problem(kind: str, dtype: str) -> tuple[Any, Any]:
    """Logits and labels: random ones, or the label ahead by a margin of 5 to 40."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((ROWS, CLASSES))
    labels = random.integers(0, CLASSES, ROWS)
    if kind == "confident":
        logits[np.arange(ROWS), labels] = logits.max(1) + np.linspace(5, 40, ROWS)
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32)


def errors(loss_and_grad: Callable, logits, labels, targets) -> tuple[float, float]:
    loss, grad = jax.jit(loss_and_grad)(logits, labels)
    true_loss, true_grad = oracle(logits, targets)
    size = np.abs(true_grad).max(1, keepdims=True)
    loss_error = np.abs(np.asarray(loss, np.float64) - true_loss) / true_loss
    grad_error = np.abs(np.asarray(grad, np.float64) - true_grad) / size
    return float(loss_error.max()), float(grad_error.max())


def per_row(loss_fn: Callable) -> Callable:
    def loss_and_grad(logits, labels):
        loss, pullback = jax.vjp(lambda z: loss_fn(z, labels), logits)
        return loss, pullback(jnp.ones_like(loss))[0]

    return loss_and_grad


def accuracy_table(platform: str, device) -> list[dict[str, Any]]:
    integer = jaxce.softmax_cross_entropy_with_integer_labels
    naive = jaxce.reference.softmax_cross_entropy_with_integer_labels
    rows = []
    with jax.default_device(device):
        for kind in ("random", "confident"):
            for dtype in GRADIENT_TOLERANCE:
                logits, labels = problem(kind, dtype)
                one_hot = np.eye(CLASSES)[np.asarray(labels)]
                for name, function, target in (
                    ("integer labels", integer, labels),
                    ("dense labels", jaxce.softmax_cross_entropy, jnp.asarray(one_hot, dtype)),
                ):
                    loss_error, grad_error = errors(per_row(function), logits, target, one_hot)
                    limits = (LOSS_TOLERANCE, GRADIENT_TOLERANCE[dtype])
                    check = f"{name}, {kind}, against float64"
                    rows.append(verdict(platform, check, dtype, (loss_error, grad_error), limits))
        rows.append(against_autodiff(platform, integer, naive))
    return rows


def against_autodiff(platform: str, integer: Callable, naive: Callable) -> dict[str, Any]:
    """The analytic gradient against `jax.grad` of the naive formula, at logits where that formula holds."""
    logits, labels = problem("random", "float32")
    (loss, grad), (naive_loss, naive_grad) = (per_row(f)(logits, labels) for f in (integer, naive))
    loss_error = float(jnp.max(jnp.abs(loss - naive_loss) / naive_loss))
    grad_error = float(jnp.max(jnp.abs(grad - naive_grad)))  # of gradients whose largest entry is 1
    limits = (1e-5, 1e-5)  # the naive formula's own float32 error
    check = "integer labels, random, against jax.grad of the naive formula"
    return verdict(platform, check, "float32", (loss_error, grad_error), limits)


def verdict(platform: str, check: str, dtype: str, errors: tuple, limits: tuple) -> dict[str, Any]:
    if platform == "tpu":
        limits = tuple(max(limit, TPU_TOLERANCE) for limit in limits)
    return {
        "backend": platform,
        "check": check,
        "dtype": dtype,
        "loss error": errors[0],
        "gradient error": errors[1],
        "limits": "{:.0e}, {:.0e}".format(*limits),
        "ok": all(error <= limit for error, limit in zip(errors, limits, strict=True)),
    }


def peers() -> dict[str, Callable]:
    functions = {"jaxce": jaxce.softmax_cross_entropy_with_integer_labels}
    try:
        import optax
    except ImportError:
        return functions
    return functions | {"optax": optax.losses.softmax_cross_entropy_with_integer_labels}


def cost_table(platform: str, device) -> list[dict[str, Any]]:
    """Interleaved medians of value_and_grad of the mean loss, and the temp memory XLA compiled it to."""

    def step(loss_fn, logits, labels):
        return jax.value_and_grad(lambda z: loss_fn(z, labels).mean())(logits)

    rows = []
    with jax.default_device(device):
        for dtype in GRADIENT_TOLERANCE:
            logits = jax.random.normal(jax.random.key(0), TIMED_SHAPE, jnp.float32).astype(dtype)
            labels = jax.random.randint(jax.random.key(1), TIMED_SHAPE[:1], 0, TIMED_SHAPE[1])
            compiled = {n: jax.jit(partial(step, f)).lower(logits, labels).compile() for n, f in peers().items()}
            seconds: dict[str, list[float]] = {name: [] for name in compiled}
            for _ in range(7):
                for name, run in compiled.items():
                    start = time.perf_counter()
                    jax.block_until_ready(run(logits, labels))
                    seconds[name].append(time.perf_counter() - start)
            for name, run in compiled.items():
                memory = run.memory_analysis()
                rows.append(
                    {
                        "backend": platform,
                        "function": name,
                        "shape": list(TIMED_SHAPE),
                        "dtype": dtype,
                        "milliseconds": 1e3 * statistics.median(seconds[name]),
                        "temp MiB": None if memory is None else memory.temp_size_in_bytes / 2**20,
                    }
                )
    return rows


def backends() -> dict[str, Any]:
    """The first device of each platform present."""
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        try:
            found[platform] = jax.local_devices(backend=platform)[0]
        except RuntimeError:
            continue
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value):
        if isinstance(value, bool):
            return "ok" if value else "WRONG"
        if isinstance(value, float):
            return f"{value:.1f}" if value >= 1 else f"{value:.1g}"
        return str(value)

    table = [list(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxce", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    as_json = parser.parse_args(arguments).json

    found = backends()
    accuracy = [row for platform, device in found.items() for row in accuracy_table(platform, device)]
    cost = [row for platform, device in found.items() for row in cost_table(platform, device)]
    ok = all(row["ok"] for row in accuracy)
    machine = {
        "jaxce": jaxce.__version__,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "devices": {platform: device.device_kind for platform, device in found.items()},
    }
    if as_json:
        print(json.dumps({**machine, "ok": ok, "accuracy": accuracy, "cost": cost}, indent=2))
        return 0 if ok else 1
    print(f"jaxce {jaxce.__version__}, jax {jax.__version__}, on {', '.join(found)}\n")
    print("Largest relative errors:")
    print_table(accuracy)
    print("value_and_grad of the mean loss, jitted (median of 7):")
    print_table(cost)
    print("all checks passed" if ok else "SOME CHECKS FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
