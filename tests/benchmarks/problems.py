"""What is measured: the problems, their data, and the truth in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """One loss and gradient. `kind` says which, `shape` is (rows, classes) or (rows, features, classes)."""

    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind} {'×'.join(map(str, self.shape))} {self.dtype}"


LINEAR = "linear"  # mean loss and its gradients with respect to x and w
LOGITS = "logits"  # mean loss and its gradient with respect to the logits
DONATED = "logits, donated"  # the gradient may overwrite the logits
FROM_MATMUL = "logits from a matmul"  # made in the same jit
LOSS_ONLY = "loss only, logits from a matmul"  # no gradient
DENSE = "dense targets"
TOP_K = "top-k labels"  # of 64 classes of each row; its floor is the integer-label loss
COMPILING = "tracing and compiling"  # of mean loss and gradient, each time anew

PROBLEMS = [
    Problem(LINEAR, (2048, 512, 32000), "float32"),
    Problem(LINEAR, (1024, 768, 50257), "float32"),
    Problem(LINEAR, (1024, 256, 131072), "float32"),
    Problem(LINEAR, (4096, 1024, 32000), "float32"),
    Problem(LINEAR, (1024, 768, 50257), "bfloat16"),
    Problem(LOGITS, (1024, 1000), "float32"),
    Problem(LOGITS, (1024, 50257), "float32"),
    Problem(LOGITS, (256, 131072), "float32"),
    Problem(LOGITS, (1024, 50257), "bfloat16"),
    Problem(LOGITS, (8192, 32000), "bfloat16"),
    Problem(DONATED, (1024, 50257), "float32"),
    Problem(DONATED, (256, 131072), "float32"),
    Problem(DONATED, (1024, 50257), "bfloat16"),
    Problem(FROM_MATMUL, (1024, 50257), "float32"),
    Problem(LOSS_ONLY, (1024, 50257), "float32"),
    Problem(LOSS_ONLY, (1024, 50257), "bfloat16"),
    Problem(DENSE, (1024, 50257), "float32"),
    Problem(TOP_K, (1024, 50257), "float32"),
    Problem(COMPILING, (8, 10), "float32"),
]
QUICK = [
    Problem(LINEAR, (256, 64, 4099), "float32"),
    Problem(LINEAR, (256, 64, 4099), "bfloat16"),
    *(Problem(kind, (128, 5003), "float32") for kind in (LOGITS, DONATED, FROM_MATMUL, LOSS_ONLY, DENSE, TOP_K)),
    Problem(LOGITS, (128, 5003), "bfloat16"),
    Problem(COMPILING, (8, 10), "float32"),
]
MATMUL_FEATURES = 64  # of the matmul that makes logits
LISTED = 64  # top-k labels of each row


def data(problem: Problem) -> tuple[jax.Array, ...]:
    """Arguments of the loss: (x, w, labels), (logits, labels) or (logits, ids, targets).

    Logits have a standard deviation of 1.
    """
    *shape, classes = problem.shape
    rows, features = shape[0], shape[-1] if problem.kind == LINEAR else MATMUL_FEATURES
    keys = jax.random.split(jax.random.key(0), 3)
    labels = jax.random.randint(keys[2], (rows,), 0, classes)
    if problem.kind in (LINEAR, FROM_MATMUL, LOSS_ONLY):
        x = jax.random.normal(keys[0], (rows, features))
        w = jax.random.normal(keys[1], (features, classes)) / features**0.5
        return x.astype(problem.dtype), w.astype(problem.dtype), labels
    logits = jax.random.normal(keys[0], (rows, classes)).astype(problem.dtype)
    if problem.kind == DENSE:
        return logits, jax.nn.softmax(jax.random.normal(keys[1], (rows, classes)))
    if problem.kind == TOP_K:
        best, ids = jax.lax.top_k(jax.random.normal(keys[1], (rows, classes)), LISTED)
        return logits, ids, jax.nn.softmax(best)
    return logits, labels


class Truth(NamedTuple):
    """In float64, of a sample of the gradients: rows for logits and x, classes for w."""

    loss: float
    rows: Any
    row_gradient: Any
    classes: Any = None
    class_gradient: Any = None


SAMPLE = 64


def truth(problem: Problem, arguments: tuple[jax.Array, ...]) -> Truth:
    *operands, targets = (np.asarray(a, np.float64 if a.dtype != jnp.int32 else None) for a in arguments)
    count, classes = len(operands[0]), problem.shape[-1]
    if problem.kind == TOP_K:
        ids, listed = np.asarray(arguments[1]), targets
        operands, targets = operands[:1], np.zeros((count, classes))
        np.put_along_axis(targets, ids, listed, 1)
    random = np.random.default_rng(0)
    columns = random.choice(classes, min(SAMPLE, classes), replace=False)
    rows = np.arange(min(SAMPLE, count))
    loss, row_gradient, dz_columns = 0.0, None, []
    for start in range(0, count, SAMPLE):
        part = slice(start, start + SAMPLE)
        z = operands[0][part] @ operands[1] if len(operands) == 2 else operands[0][part]
        t: Any = targets[part]
        z = z - z.max(1, keepdims=True)
        log_o = z - np.log(np.exp(z).sum(1, keepdims=True))
        one_hot = t if t.ndim == 2 else np.zeros_like(z)
        if t.ndim == 1:
            one_hot[np.arange(len(t)), t] = 1
        loss -= (one_hot * log_o).sum() / count
        dz = (np.exp(log_o) * one_hot.sum(1, keepdims=True) - one_hot) / count
        dz_columns.append(dz[:, columns])
        if start == 0:
            row_gradient = dz @ operands[1].T if problem.kind == LINEAR else dz
    if problem.kind != LINEAR:
        return Truth(loss, rows, row_gradient)
    return Truth(loss, rows, row_gradient, columns, operands[0].T @ np.concatenate(dz_columns))


def error(truth: Truth, loss: Any, gradients: tuple[Any, ...]) -> float:
    """The largest: of the loss, relative; of each gradient, relative to its largest entry."""

    def relative(got, wanted):
        return float(np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max())

    errors = [relative(loss, np.asarray(truth.loss))]
    if gradients:
        errors.append(relative(gradients[0][truth.rows], truth.row_gradient))
    if len(gradients) == 2:
        errors.append(relative(gradients[1][:, truth.classes], truth.class_gradient))
    return max(errors)
