"""Who is measured: jaxce, the floors, and every peer that is installed, each as a function that runs once."""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

from .problems import COMPILING, DENSE, DONATED, FROM_MATMUL, LINEAR, LOSS_ONLY, TOP_K, Problem


class Contender(NamedTuple):
    prepare: Callable[[], tuple]  # untimed, before each run: what `run` gets
    run: Callable[..., Any]
    result: Callable[[Any], tuple[Any, tuple]]  # of a run: the loss and the gradients, as NumPy has them
    compile_seconds: float | None = None
    temp_mib: float | None = None


def installed(module: str) -> bool:
    package = module.partition(".")[0]  # without which a module of it would not be looked for, but raise
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None


def contenders(problem: Problem, arguments: tuple[jax.Array, ...]) -> dict[str, Callable[[], Contender]]:
    """By name; called, each is compiled."""
    made: dict[str, Callable[[], Contender]] = {"floor": lambda: floor(problem, arguments)}
    if problem.kind == LINEAR:
        made["floor by blocks"] = partial(compiled, step(problem, matmuls_by_blocks), arguments, problem)
    losses = linear_losses() if problem.kind == LINEAR else logits_losses(problem)
    for name, loss in losses.items():
        made[name] = partial(compiled, step(problem, loss), arguments, problem)
    if installed("torch") and problem.kind not in (COMPILING, TOP_K):
        for name, loss in torch_losses(problem).items():
            made[name] = partial(in_torch, problem, loss, arguments)
    return made


def compiled(f: Callable, arguments: tuple, problem: Problem) -> Contender:
    donated = problem.kind == DONATED

    def compile_it(*arguments):
        return jax.jit(f, donate_argnums=(0,) if donated else ()).lower(*arguments).compile()

    start = time.perf_counter()
    executable = compile_it(*arguments)
    seconds = time.perf_counter() - start

    def prepare():
        if problem.kind == COMPILING:
            jax.clear_caches()
        return jax.block_until_ready((jnp.copy(arguments[0]), *arguments[1:])) if donated else arguments

    def result(out):
        loss, *gradients = jax.tree.leaves(out)
        return np.asarray(loss, np.float64), tuple(gradients)

    memory = executable.memory_analysis()
    temp_mib = None if memory is None else memory.temp_size_in_bytes / 2**20
    if problem.kind == COMPILING:
        return Contender(prepare, compile_it, lambda made: result(made(*arguments)), seconds, temp_mib)
    return Contender(
        prepare,
        lambda *arguments: jax.block_until_ready(executable(*arguments)),
        result,
        seconds,
        temp_mib,
    )


def step(problem: Problem, loss: Callable) -> Callable:
    """The mean loss and what gradients the problem asks for."""
    if problem.kind == LINEAR:
        return jax.value_and_grad(loss, (0, 1))
    if problem.kind == LOSS_ONLY:
        return lambda x, w, labels: loss(x @ w, labels).mean()
    if problem.kind == FROM_MATMUL:
        return lambda x, w, labels: jax.value_and_grad(lambda z: loss(z, labels).mean())(x @ w)
    return jax.value_and_grad(lambda z, *targets: loss(z, *targets).mean())


def floor(problem: Problem, arguments: tuple[jax.Array, ...]) -> Contender:
    """What no loss can do without: three bare matmuls with fresh outputs, or one reading and writing of the logits.

    Of top-k labels, the loss and gradient of the first as an integer label.
    """
    if problem.kind == LINEAR:
        x, w, labels = arguments
        dz = jnp.broadcast_to(x[:, :1], (len(x), w.shape[1])) + 0
        return compiled(lambda x, w, dz: (x @ w, dz @ w.T, x.T @ dz), (x, w, dz), problem)
    if problem.kind in (FROM_MATMUL, LOSS_ONLY):
        return compiled(lambda x, w, labels: x @ w, arguments, problem)
    if problem.kind == TOP_K:
        logits, ids, _ = arguments
        loss = jaxce.softmax_cross_entropy_with_integer_labels
        return compiled(step(problem, loss), (logits, ids[:, 0]), problem)
    return compiled(lambda z, targets: z * 2, arguments, problem)


def matmuls_by_blocks(x, w, labels):
    """Σz²/2, whose gradient with respect to the logits is z: what jaxce's blocks of rows cost without a softmax."""
    return jaxce.fused_linear(lambda z: (z * z).sum(-1) / 2)(x, w)


def linear_losses() -> dict[str, Callable]:
    losses: dict[str, Callable] = {
        "jaxce": jaxce.linear_cross_entropy,
        "jaxce, recompute": partial(jaxce.linear_cross_entropy, recompute=True),
    }
    if installed("optax"):
        import optax

        def materialized(x, w, labels):
            logits = (x @ w).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        losses["optax"] = materialized
    if installed("tokamax"):
        from tokamax import linear_softmax_cross_entropy_loss

        for name in ("xla", "chunked_xla"):
            f = partial(linear_softmax_cross_entropy_loss, reduction="mean", implementation=name)
            losses[f"tokamax {name}"] = lambda x, w, labels, f=f: f(x, labels, w)
    if installed("jax_cce"):
        import jax_cce

        losses["jax-cce"] = lambda x, w, labels: jax_cce.linear_cross_entropy(x, w.T, labels)
    if installed("levanter.kernels"):
        from levanter.kernels.pallas import fused_cross_entropy_loss as levanter

        xla = levanter.fused_cross_entropy_loss_and_logsumexp_penalty
        weighted = levanter.linear_softmax_cross_entropy_weighted_sum
        losses["levanter xla"] = lambda x, w, labels: xla(x, labels, w, implementation="xla")
        mean = partial(weighted, logsumexp_weight=0.0, token_block_size=256)
        losses["levanter gradient in forward"] = lambda x, w, labels: mean(
            x, labels, w, jnp.full(labels.shape, 1 / labels.size, jnp.float32)
        )
    return losses


def logits_losses(problem: Problem) -> dict[str, Callable]:
    if problem.kind == TOP_K:
        return {"jaxce": jaxce.softmax_cross_entropy_with_top_k_labels, "dense targets": dense_of_top_k}
    name = "softmax_cross_entropy" if problem.kind == DENSE else "softmax_cross_entropy_with_integer_labels"
    losses = {"jaxce": getattr(jaxce, name), "naive": getattr(jaxce.reference, name)}
    if installed("optax"):
        import optax

        losses["optax"] = getattr(optax, name)
    return losses


def dense_of_top_k(logits, ids, targets):
    rows = jnp.arange(len(logits))[:, None]
    return jaxce.softmax_cross_entropy(logits, jnp.zeros_like(logits).at[rows, ids].add(targets))


def torch_losses(problem: Problem) -> dict[str, Callable]:
    import torch
    from torch.nn import functional

    def cross_entropy(logits, targets):
        return functional.cross_entropy(logits.float(), targets)

    if problem.kind != LINEAR:
        return {"torch": cross_entropy}
    losses: dict[str, Callable] = {"torch": lambda x, w, labels: cross_entropy(x @ w, labels)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["torch chunked"] = lambda x, w, labels: functional.linear_cross_entropy(
            x, w.T, labels, options=torch.nn.LinearCrossEntropyOptions()
        )
    return losses


def in_torch(problem: Problem, loss: Callable, arguments: tuple[jax.Array, ...]) -> Contender:
    import torch

    def tensor(a):
        if a.dtype == jnp.int32:
            return torch.tensor(np.asarray(a), dtype=torch.int64)
        return torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, str(a.dtype)))

    *operands, targets = map(tensor, arguments)
    multiplied = problem.kind in (FROM_MATMUL, LOSS_ONLY)

    def run(*_):
        if problem.kind == LOSS_ONLY:
            with torch.no_grad():
                return loss(operands[0] @ operands[1], targets), ()
        leaves = [(operands[0] @ operands[1] if multiplied else a).detach().requires_grad_() for a in operands]
        leaves = leaves[:1] if multiplied else leaves
        value = loss(*leaves, targets)
        return value.detach(), torch.autograd.grad(value, leaves)

    def result(out):
        value, gradients = out
        return np.asarray(value.double()), tuple(g.double().numpy() for g in gradients)

    return Contender(lambda: (), run, result)
