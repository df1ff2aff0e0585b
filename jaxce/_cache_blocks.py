"""Numbers per row of large logits, on CPU: a few MiB of rows at a time.

What is computed on the way from logits to numbers per row (exponentials, the float32 copy of bfloat16 logits) XLA makes
as whole buffers on a CPU, and each fresh buffer above 32 MiB costs its page faults, which are more than the arithmetic.
Of a few rows at a time it stays in cache. Backward there is nothing to gain: the gradient is one elementwise pass from
logits to gradient, in place where the logits are dead. So what is here is never differentiated.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

SMALL = 64 * 2**20  # bytes of float32 logits, below which XLA's buffers are recycled and blocks would not pay
BLOCK = 4 * 2**20  # bytes of float32 logits in a block: within the caches, and enough work for each thread


def rows_per_block(logits: Array) -> int | None:
    """How many rows of `logits` [..., K] make a block; None where all are to be taken at once.

    Contiguous rows of an array that is sharded would not be local. Under `jit` we cannot see whether it is, so that is
    for a single device only (nor under an explicit mesh of it).
    """
    rows, row_bytes = math.prod(logits.shape[:-1]), 4 * logits.shape[-1]
    if rows * row_bytes < SMALL or jax.device_count() > 1 or any(jax.typeof(logits).sharding.spec):
        return None
    size = max(1, BLOCK // row_bytes)
    return size if size < rows else None


def in_row_blocks(f: Callable[[Any], Any], logits: Array, args: Any, first: Callable[[Any], Any] | None = None) -> Any:
    """`f(args)`, which is arrays of one number for each row of `logits` [..., K]; `f` may see blocks of rows only.

    An array in `args` has the leading axes of `logits`, or is shared by all rows and has leading axes of size 1.
    `first`, if given, makes those numbers from one pass over a block, and says for which rows they are good (bool, per
    row): `f` sees the blocks where not all are.
    """
    lead, size = logits.shape[:-1], rows_per_block(logits)
    ones = (1,) * len(lead)
    if size is None or any(a.shape[: len(lead)] not in (lead, ones, ()) for a in jax.tree.leaves(args)):
        return f(args)
    return _in_row_blocks(f, first, lead, size, args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # for calls outside jit, which would compile the loop anew
def _in_row_blocks(f, first, lead, size, args):
    rows = math.prod(lead)
    blocks = -(-rows // size)

    def part(a, i):
        if a.shape[: len(lead)] != lead:
            return a.reshape(1, *a.shape[len(lead) :]) if a.ndim else a
        # The last block begins earlier (a slice is moved to be inside the array) and repeats some rows.
        return lax.dynamic_slice_in_dim(a.reshape(rows, *a.shape[len(lead) :]), i * size, size)

    def block(args, i):
        return jax.tree.map(lambda a: part(a, i), args)

    def by_f(args, i):
        # The barrier has the block copied, into cache. Without it XLA casts all logits to float32 outside of the loop.
        return f(lax.optimization_barrier(block(args, i)))

    def by_first(args, i):
        numbers, good = first(block(args, i))  # in one pass, there is nothing to copy for
        # A loop of one step at most, not a cond: under vmap a cond would be both of its branches, always. Its step
        # reads the index that it changes, or XLA would find that it is always the same and take it out of the loop.
        start = numbers, jnp.where(good.all(), blocks, i)
        return lax.while_loop(lambda s: s[1] < blocks, lambda s: (by_f(args, s[1]), s[1] + blocks), start)[0]

    def blocked(args):
        def join(a):  # [blocks, size]
            return jnp.concatenate([a[:-1].ravel(), a[-1, blocks * size - rows :]]).reshape(lead)

        numbers = functools.partial(by_f if first is None else by_first, args)
        return jax.tree.map(join, lax.map(numbers, jnp.arange(blocks, dtype=jnp.int32)))

    # On GPU and TPU XLA fuses all this without buffers.
    return lax.platform_dependent(args, cpu=blocked, default=f)
