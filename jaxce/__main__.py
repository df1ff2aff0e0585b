"""`python -m jaxce`: is this install right on this machine?

Compares losses and gradients on every backend with a float64 oracle and with `jax.grad` of the naive formula, and times
them beside optax's, if installed, with their temp memory. Exits with 0 if every error is within its limit, else with 1.
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
FEATURES, TIMED_FEATURES = 64, 256  # of x, for a loss of x @ w


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


def linear_table(platform: str, device) -> list[dict[str, Any]]:
    rows = []
    with jax.default_device(device):
        for dtype in GRADIENT_TOLERANCE:
            x, w, labels = linear_problem(ROWS, FEATURES, CLASSES + 1, dtype)
            x64, w64 = (np.asarray(a, np.float64) for a in (x, w))
            losses, dz = oracle(x64 @ w64, np.eye(CLASSES + 1)[np.asarray(labels)])
            wanted = losses.mean(), (dz @ w64.T / ROWS, x64.T @ dz / ROWS)
            for recompute in (False, True):
                loss_fn = partial(jaxce.linear_cross_entropy, recompute=recompute, block_size=128)
                loss, grads = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(x, w, labels)
                grad_error = max(
                    np.abs(np.asarray(g, np.float64) - t).max() / np.abs(t).max()
                    for g, t in zip(grads, wanted[1], strict=True)
                )
                check = f"linear, by blocks of {'classes' if recompute else 'rows'}, against float64"
                # The logits' gradients are rounded to the operands' dtype, then the results.
                limits = (LOSS_TOLERANCE, 2 * GRADIENT_TOLERANCE[dtype])
                loss_error = abs(float(loss) - wanted[0]) / wanted[0]
                rows.append(verdict(platform, check, dtype, (loss_error, float(grad_error)), limits))
    return rows


def linear_problem(rows: int, features: int, classes: int, dtype: str) -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (rows, features)).astype(dtype)
    w = (jax.random.normal(keys[1], (features, classes)) / features**0.5).astype(dtype)
    return x, w, jax.random.randint(keys[2], (rows,), 0, classes)


def against_autodiff(platform: str, integer: Callable, naive: Callable) -> dict[str, Any]:
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


def timed() -> dict[str, dict[str, Callable]]:
    integer = jaxce.softmax_cross_entropy_with_integer_labels
    logits = {"jaxce": lambda z, labels: integer(z, labels).mean()}
    linear: dict[str, Callable] = {"jaxce, linear": jaxce.linear_cross_entropy}
    try:
        import optax
    except ImportError:
        return {"logits": logits, "linear": linear}
    peer = optax.losses.softmax_cross_entropy_with_integer_labels
    logits["optax"] = lambda z, labels: peer(z, labels).mean()
    linear["optax, x @ w"] = lambda x, w, labels: peer((x @ w).astype(jnp.float32), labels).mean()
    return {"logits": logits, "linear": linear}


def cost_table(platform: str, device) -> list[dict[str, Any]]:
    """Interleaved medians of value_and_grad of the mean loss, and the temp memory XLA compiled it to."""
    rows = []
    with jax.default_device(device):
        for dtype in GRADIENT_TOLERANCE:
            x, w, labels = linear_problem(TIMED_SHAPE[0], TIMED_FEATURES, TIMED_SHAPE[1], dtype)
            for kind, losses in timed().items():
                arguments = (x, w, labels) if kind == "linear" else (x @ w, labels)
                rows += cost(platform, losses, arguments, dtype)
    return rows


def cost(platform: str, losses: dict[str, Callable], arguments: tuple, dtype: str) -> list[dict[str, Any]]:
    variables = tuple(range(len(arguments) - 1))
    compiled = {n: jax.jit(jax.value_and_grad(f, variables)).lower(*arguments).compile() for n, f in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(7):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, run in compiled.items():
        memory = run.memory_analysis()
        rows.append(
            {
                "backend": platform,
                "function": name,
                "shape": " @ ".join("×".join(map(str, a.shape)) for a in arguments[:-1]),
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
    accuracy = [row for p, device in found.items() for row in accuracy_table(p, device) + linear_table(p, device)]
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
