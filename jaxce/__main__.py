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
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

# Largest relative error: of the loss row by row; of the gradient, row by row against the row's largest entry.
LOSS_LIMIT = 2e-6
GRADIENT_LIMIT = {"float32": 2e-6, "bfloat16": 2**-8}  # float32's arithmetic; the one rounding to bfloat16
TPU_LIMIT = 1e-3  # exp and log are less accurate there by default
ROWS, FEATURES, CLASSES = 256, 64, 1000
TIMED = 1024, 256, 32000  # rows, features, classes
Errors = tuple[float, float]  # of the loss, and of its gradient


def oracle(logits: Any, targets: Any) -> tuple[Any, Any]:
    """Loss and gradient of each row in NumPy float64, stable: the largest logit is left out of the sum, for log1p."""
    z, t = np.asarray(logits, np.float64), np.asarray(targets, np.float64)
    row, top = np.arange(len(z)), z.argmax(1)
    e = np.exp(z - z[row, top][:, None])
    e[row, top] = 0
    log_sum = np.log1p(e.sum(1, keepdims=True))
    distance = log_sum - (z - z[row, top][:, None])
    grad = np.exp(-distance) * t.sum(1, keepdims=True) - t
    grad[row, top] = (t.sum(1) - t[row, top]) + t.sum(1) * np.expm1(-log_sum[:, 0])
    # At a label that is not the largest, o is at most 1/2 and nothing cancels.
    return (t * distance).sum(1), grad


def logits_and_labels(kind: str, dtype: str) -> tuple[Any, Any]:
    """Random ones, or the label ahead by a margin of 5 to 40."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((ROWS, CLASSES))
    labels = random.integers(0, CLASSES, ROWS)
    if kind == "confident":
        logits[np.arange(ROWS), labels] = logits.max(1) + np.linspace(5, 40, ROWS)
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32)


def head(rows: int, features: int, classes: int, dtype: str) -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (rows, features)).astype(dtype)
    w = (jax.random.normal(keys[1], (features, classes)) / features**0.5).astype(dtype)
    return x, w, jax.random.randint(keys[2], (rows,), 0, classes)


def loss_and_gradient(loss_fn: Callable, logits: Any, labels: Any) -> tuple[Any, Any]:
    loss, pullback = jax.jit(partial(jax.vjp, lambda z: loss_fn(z, labels)))(logits)
    return np.asarray(loss, np.float64), np.asarray(pullback(jnp.ones_like(loss))[0], np.float64)


def errors_of_logits(name: str, dense: bool, kind: str, dtype: str) -> Errors:
    logits, labels = logits_and_labels(kind, dtype)
    one_hot = np.eye(CLASSES)[np.asarray(labels)]
    loss, grad = loss_and_gradient(getattr(jaxce, name), logits, jnp.asarray(one_hot, dtype) if dense else labels)
    true_loss, true_grad = oracle(logits, one_hot)
    size = np.abs(true_grad).max(1, keepdims=True)
    return (np.abs(loss - true_loss) / true_loss).max(), (np.abs(grad - true_grad) / size).max()


def errors_of_autodiff(name: str) -> Errors:
    logits, labels = logits_and_labels("random", "float32")
    loss, grad = loss_and_gradient(getattr(jaxce, name), logits, labels)
    naive_loss, naive_grad = loss_and_gradient(getattr(jaxce.reference, name), logits, labels)
    return (np.abs(loss - naive_loss) / naive_loss).max(), np.abs(grad - naive_grad).max()  # the largest entry is 1


def errors_of_head(recompute: bool, dtype: str) -> Errors:
    x, w, labels = head(ROWS, FEATURES, CLASSES + 1, dtype)
    loss_fn = partial(jaxce.linear_cross_entropy, recompute=recompute, block_size=128)
    loss, grads = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(x, w, labels)
    x, w, *grads = (np.asarray(a, np.float64) for a in (x, w, *grads))
    losses, dz = oracle(x @ w, np.eye(CLASSES + 1)[np.asarray(labels)])
    true_grads = dz @ w.T / ROWS, x.T @ dz / ROWS
    relative = [np.abs(g - t).max() / np.abs(t).max() for g, t in zip(grads, true_grads, strict=True)]
    return abs(float(loss) - losses.mean()) / losses.mean(), np.max(relative)


def checks() -> list[tuple[str, str, Callable[[], Errors], Errors]]:
    """Of each: what it checks, the dtype, the errors, and their limits."""
    integer, dense = "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy"
    found: list[tuple[str, str, Callable[[], Errors], Errors]] = []
    for dtype, limit in GRADIENT_LIMIT.items():
        for kind in ("random", "confident"):
            for name in (integer, dense):
                errors = partial(errors_of_logits, name, name == dense, kind, dtype)
                found.append((f"{name}, {kind}", dtype, errors, (LOSS_LIMIT, limit)))
        for recompute in (False, True):  # the logits' gradients are rounded to the operands' dtype, then the results
            errors = partial(errors_of_head, recompute, dtype)
            found.append((f"linear_cross_entropy, recompute={recompute}", dtype, errors, (LOSS_LIMIT, 2 * limit)))
    naive = partial(errors_of_autodiff, integer)
    return [*found, ("the same as jax.grad of the naive formula", "float32", naive, (1e-5, 1e-5))]  # its own error


def checked(platform: str, check: str, dtype: str, errors: Callable[[], Errors], limits: Errors) -> dict[str, Any]:
    loss_error, gradient_error = map(float, errors())
    loss_limit, gradient_limit = (max(a, TPU_LIMIT) if platform == "tpu" else a for a in limits)
    return {
        "backend": platform,
        "check": check,
        "dtype": dtype,
        "loss_error": loss_error,
        "loss_limit": loss_limit,
        "gradient_error": gradient_error,
        "gradient_limit": gradient_limit,
        "ok": loss_error <= loss_limit and gradient_error <= gradient_limit,
    }


def contenders() -> dict[str, Callable]:
    """Mean losses of (x, w, labels), and of (logits, labels)."""
    integer = jaxce.softmax_cross_entropy_with_integer_labels
    found = {"jaxce": lambda z, y: integer(z, y).mean(), "jaxce, x @ w": jaxce.linear_cross_entropy}
    if version_of("optax"):
        from optax.losses import softmax_cross_entropy_with_integer_labels as peer

        found["optax"] = lambda z, y: peer(z, y).mean()
        found["optax, x @ w"] = lambda x, w, y: peer((x @ w).astype(jnp.float32), y).mean()
    return found


def costs(platform: str, dtype: str) -> list[dict[str, Any]]:
    """Interleaved medians of value_and_grad of the mean loss, and the temp memory XLA compiled it to."""
    x, w, labels = head(*TIMED, dtype)
    arguments = {name: (x, w, labels) if "@" in name else (x @ w, labels) for name in contenders()}
    compiled, seconds = {}, {}
    for name, loss_fn in contenders().items():
        variables = tuple(range(len(arguments[name]) - 1))
        compiled[name] = jax.jit(jax.value_and_grad(loss_fn, variables)).lower(*arguments[name]).compile()
        seconds[name] = []
    for _ in range(7):
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments[name]))
            seconds[name].append(time.perf_counter() - start)
    memory = {name: run.memory_analysis() for name, run in compiled.items()}
    return [
        {
            "backend": platform,
            "function": name,
            "shape": " @ ".join("×".join(map(str, a.shape)) for a in arguments[name][:-1]),
            "dtype": dtype,
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "temp_mib": None if memory[name] is None else memory[name].temp_size_in_bytes / 2**20,
        }
        for name in compiled
    ]


def backends() -> dict[str, Any]:
    """The first device of each platform present."""
    found = {}
    for platform in ("cpu", "gpu", "tpu"):
        try:
            found[platform] = jax.local_devices(backend=platform)[0]
        except RuntimeError:
            continue
    return found


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def run_checks(found: dict[str, Any], say: Callable) -> list[dict[str, Any]]:
    rows = []
    say("relative errors, and their limits:")
    for platform, device in found.items():
        for check in checks():
            with jax.default_device(device):
                row = checked(platform, *check)
            errors = "loss {loss_error:.1e} ({loss_limit:.0e})  gradient {gradient_error:.1e} ({gradient_limit:.0e})"
            say(("{backend}  {dtype:8}  {check:54}  " + errors).format(**row), " ok" if row["ok"] else " WRONG")
            rows.append({key: None if value != value else value for key, value in row.items()})  # JSON has no NaN
    return rows


def run_costs(found: dict[str, Any], say: Callable) -> list[dict[str, Any]]:
    rows = []
    say("\nvalue_and_grad of the mean loss, jitted (median of 7), and its temp memory:")
    for platform, device in found.items():
        for dtype in GRADIENT_LIMIT:
            with jax.default_device(device):
                rows += (measured := costs(platform, dtype))
            for row in measured:
                line = "{backend}  {dtype:8}  {function:12}  {shape:20}  {milliseconds:8.1f} ms  ".format(**row)
                say(line + ("" if row["temp_mib"] is None else f"{row['temp_mib']:8.1f} MiB"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxce", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument("--quick", action="store_true", help="check only, time nothing")
    version = f"jaxce {jaxce.__version__} in {Path(jaxce.__file__).parent}"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args(arguments)

    say = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    found = backends()
    devices = {platform: device.device_kind for platform, device in found.items()}
    say(f"{version}, jax {jax.__version__}, on {', '.join(devices.values())}\n")
    accuracy = run_checks(found, say)
    cost = [] if options.quick else run_costs(found, say)
    ok = all(row["ok"] for row in accuracy)
    say("\nall checks passed" if ok else "\nSOME CHECKS FAILED")
    if options.json:
        versions = {package: version_of(package) for package in ("jax", "jaxlib", "optax")}
        machine = {"jaxce": jaxce.__version__, "python": sys.version.split()[0], "devices": devices}
        print(json.dumps({**machine, "versions": versions, "ok": ok, "accuracy": accuracy, "cost": cost}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
