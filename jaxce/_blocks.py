"""Row blocks: on CPU, large logits are worked on a few MiB at a time.

What a row-wise function computes on its way (the float32 copy of bf16 logits, the exponentials) XLA makes as whole
buffers on CPU, and each fresh buffer above 32 MiB costs its page faults, more than the arithmetic. Taken in blocks of
rows they stay in cache. On GPU and TPU XLA fuses them away itself, and nothing here is used.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK_BYTES = 4 * 2**20  # of float32 logits in a block: within the caches, and enough work for each thread


def row_blocks(logits: Array) -> int:
    """How many blocks the rows of `logits` [..., K] are taken in; 1 where that would not pay, or could not be local.

    The smallest divisor of the number of rows that makes blocks of at most BLOCK_BYTES, or of one row; 1 if four blocks
    hold everything. Under `jit` an array may be sharded without our knowing, so several devices mean 1 as well.
    """
    rows, wanted = math.prod(logits.shape[:-1]), -(-4 * logits.size // BLOCK_BYTES)
    if wanted <= 4 or rows < 2 or jax.device_count() > 1:
        return 1
    return next(n for n in range(min(wanted, rows), rows + 1) if rows % n == 0)


def in_row_blocks(f: Callable[..., Any], blocks: int, rows: tuple[int, ...], args: tuple, like: Any = None) -> Any:
    """`f(*args)`, on CPU in `blocks` blocks of rows.

    An array in `args` has the leading axes `rows`, or is shared by all rows and has leading axes of size 1. `f` returns
    numbers per row; or a tree like `like`, in which what is shared by all rows is summed over the blocks.
    """
    if blocks == 1:
        return f(*args)

    def of_rows(a):
        return a.shape[: len(rows)] == rows

    def blocked(*args):
        split, shared = _partition(args, jax.tree.map(of_rows, args))
        split = jax.tree.map(lambda a: a.reshape(blocks, -1, *a.shape[len(rows) :]), split)
        shared = jax.tree.map(lambda a: a.reshape(1, a.shape[-1]) if a.ndim else a, shared)
        sums = _partition(like, jax.tree.map(of_rows, like))[1]
        # Zeros made of the arrays themselves: inside shard_map they vary over the same mesh axes.
        start = jax.tree.map(lambda a: jnp.where(False, _wide(a), 0), sums)

        # Differentiated, a scan would stack all that its steps know; checkpointed, a step knows its block only.
        @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
        def on_block(split, shared):
            # Without the barrier XLA computes on all logits, outside the loop, what the blocks were to avoid. (Not for
            # numbers per row: cotangents are among them, and linear operands of a barrier may fail to transpose.)
            split = jax.tree.map(lambda a: lax.optimization_barrier(a) if a.ndim == 2 else a, split)
            return f(*_merge(jax.tree.map(_wide, split), shared))

        def step(sums, split):
            out = on_block(split, shared)
            if like is None:
                return sums, out
            # Behind a barrier, or XLA's loop over exp and cast to bf16 together is three times slower.
            per_row, per_block = _partition(out, jax.tree.map(of_rows, like))
            return jax.tree.map(lambda s, n: s + n.reshape(s.shape).astype(s.dtype), sums, per_block), jax.tree.map(
                lambda o, l: lax.optimization_barrier(o).astype(l.dtype),per_row, _partition(like, jax.tree.map(of_rows, like))[0])

        sums, per_row = lax.scan(step, start, split)
        per_row = jax.tree.map(lambda a: a.reshape(*rows, *a.shape[2:]), per_row)
        return per_row if like is None else jax.tree.map(lambda a, l: a.astype(l.dtype), _merge(per_row, sums), like)

    return lax.platform_dependent(*args, cpu=blocked, default=f)


def _wide(a: Array) -> Array:
    return a.astype(jnp.float32) if a.dtype in (jnp.bfloat16, jnp.float16) else a


def _partition(tree: Any, flags: Any) -> tuple[Any, Any]:
    """The leaves flagged, and the others, each with None in place of what the other has."""
    return (
        jax.tree.map(lambda a, yes: a if yes else None, tree, flags),
        jax.tree.map(lambda a, yes: None if yes else a, tree, flags),
    )


def _merge(some: Any, others: Any) -> Any:
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda a: a is None)
