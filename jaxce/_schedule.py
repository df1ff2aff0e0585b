"""The schedule of the rule on logits: the tricks by which XLA reads them seldom and holds no copy, each by its name.

The mathematics is in `_rule`. Without this module it would be as right, but slower and larger. The note of each trick
says the symptom, the remedy, the test that fails without it, and the versions it is for, if not all.

On accelerators every number of a row comes from one pass over its logits, a `lax.reduce` whose combiner is
`_rule.joined`. On a CPU that is 40 % slower than a pass for the maximum and others for the sums, over blocks of rows
that stay in its caches.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _labels
from ._checks import known
from ._elementary import exp, finite
from ._listed import is_here, zeroed_at
from ._matmuls import selected_by_platform
from ._options import Selection, Values, listed_vjp, prepared, statistics_dtype
from ._rule import Sums, joined, row_of, sums
from ._sharding import ClassShards, devices

SMALL = 64 * 2**20  # bytes of float32 logits, below which XLA's buffers are recycled and blocks would not pay
BLOCK = 4 * 2**20  # bytes of float32 logits in a block: within the caches, and enough work for each thread


def class_sums(shards: ClassShards, with_entropy, differentiated, values: Values, selection: Selection) -> Sums:
    """The `Sums` of this shard's classes for each row. `differentiated`: their gradient will follow."""
    on_cpu = functools.partial(_on_cpu, shards, with_entropy, differentiated)
    on_accelerators = functools.partial(_on_accelerators, shards, with_entropy)
    return selected_by_platform("cpu", on_cpu, on_accelerators, values, selection)


def _on_accelerators(shards: ClassShards, with_entropy: bool, values: Values, selection: Selection) -> Sums:
    z, t = prepared(values, selection)
    labels, ids = selection.labels, class_iota(z, shards) if with_entropy else None
    if labels is None:
        return one_pass(z, None, t, ids)
    in_place = reads_label_in_place(values.logits)
    s = one_pass(z, is_label(labels, class_iota(z, shards)), t, ids, in_place)
    if in_place:
        return s._replace(logit=nan_if_invalid(s.logit, labels))
    return s._replace(logit=rounded_alike(_gathered_logit(values, selection, shards), s.shift, values.logit_cap))


def one_pass(z: Array, at_label: Array | None, t: Array | None, ids: Array | None, in_place: bool = True) -> Sums:
    """The `Sums` of logits z [..., K], with those for the entropy and the arg max if the classes' `ids` are given.

    Symptom: a maximum, sums, a target loss and an entropy are 2 to 4 passes over the logits on GPUs and TPUs. XLA for
    GPUs also writes capped logits to memory, in float32, where two operands of a reduce need them.
    Remedy: one variadic reduce joins single classes. The label's logit is 0 in it, unless it is to be read `in_place`.
    Test: test_a_loss_of_logits_reads_them_twice_and_writes_its_gradient.
    """
    t, ids = (None if a is None else jnp.broadcast_to(a, z.shape) for a in (t, ids))
    last = None if ids is None else jnp.array(jnp.iinfo(ids.dtype).max, ids.dtype)
    no_label, no_target = (None if a is None else jnp.zeros((), a.dtype) for a in (at_label, t))
    each, nothing = single(z, at_label, t, ids), single(jnp.full((), -jnp.inf, z.dtype), no_label, no_target, last)
    if at_label is not None and not in_place:
        each = each._replace(logit=jnp.zeros_like(z))
    return lax.reduce(each, nothing, joined, (z.ndim - 1,))


def single(z: Array, at_label: Array | None, t: Array | None, ids: Array | None) -> Sums:
    """The `Sums` of each class by itself. With `ids`, also what the entropy and the arg max need."""
    zero = jnp.zeros_like(z)
    logit = None if at_label is None else jnp.where(at_label, z, 0)
    rest = zero if at_label is None or ids is not None else jnp.where(at_label, zero, 1)
    distance, moment = None if t is None else zero, None if ids is None else zero
    return Sums(shift=z, rest=rest, logit=logit, mass=t, distance=distance, moment=moment, argmax=ids)


def sums_of_block(on_cpu: bool, z: Array, at_label: Array | None, t: Array | None, ids: Array | None) -> Sums:
    """The `Sums` of a block of logits [..., C] that is not kept."""
    if not on_cpu:
        return one_pass(z, at_label, t, ids)
    logit = None if at_label is None else jnp.where(at_label, z, 0).sum(-1)
    return sums(z, z.max(-1), at_label, logit, t, ids)


def _on_cpu(shards: ClassShards, with_entropy, differentiated, values: Values, selection: Selection) -> Sums:
    separate = functools.partial(_separate_passes, shards, with_entropy)
    label_alone = selection.labels is not None and values.targets is None and not with_entropy
    if differentiated and label_alone and keeps_exponentials(values, selection):
        return separate((values, selection))
    cheap = about_label if label_alone and shards.axis_name is None else None
    if selection.listed_ids is not None and values.targets is None:
        cheap = about_listed
    return in_row_blocks(separate, values.logits, (values, selection), cheap)


def _separate_passes(shards: ClassShards, with_entropy: bool, arguments: tuple[Values, Selection]) -> Sums:
    values, selection = arguments
    values = rounded_once(values)
    z, t = prepared(values, selection)
    m, logit, at_label = z.max(-1), None, None
    if selection.listed_ids is not None and t is None:
        return _sums_of_others(values, selection, m)[0]
    if selection.labels is not None:
        values, logit = label_logit(values, selection, m, shards)
        z, t = prepared(values, selection)  # again, as the logits are now behind a barrier
        at_label = is_label(selection.labels, class_iota(z, shards))
    return sums(z, m, at_label, logit, t, class_iota(z, shards) if with_entropy else None)


def about_label(arguments: tuple[Values, Selection]) -> tuple[Sums, Array]:
    """The `Sums` where there is but a label, and for which rows they are good.

    Symptom: the maximum takes a pass and a copy of the block, half of a large loss's time.
    Remedy: shift by the label's own logit instead. exp(z_j − z_y) overflows once the loss exceeds 88; already at 32 its
    rounding costs o about 1e-6. Rows above 32 are redone about their maximum.
    Test: test_a_maximum_is_taken_at_a_second_look_only, test_losses_of_any_size for the values; the benchmark's time.
    """
    values, selection = arguments
    shards = ClassShards(values.logits.shape[-1])
    # The barrier has the label's logit computed once per row, not for each class.
    logit = lax.optimization_barrier(_gathered_logit(values, selection, shards))
    z, _ = prepared(values, selection)
    s = sums(z, logit, is_label(selection.labels, class_iota(z, shards)), logit)
    return s, (row_of(s).loss < 32) | jnp.isnan(logit)


def about_listed(arguments: tuple[Values, Selection]) -> tuple[Sums, Array]:
    """The `Sums` of the classes beside those listed, without targets, and for which rows they are good.

    As in `about_label`, at first about the largest logit of those listed. No class is left out. The shift is then moved
    by a whole number to near the log-normalizer, so that no other class is far above it.
    Test: test_top_k_labels_leave_little for the memory; the benchmark, top-k labels, for the time.
    """
    values, selection = arguments
    here = is_here(selection.listed_ids, values.logits.shape[-1])
    listed = jnp.where(here, listed_vjp(values, selection)[0], -jnp.inf)
    m = lax.optimization_barrier(listed.max(-1, initial=-jnp.inf))
    s, total = _sums_of_others(values, selection, m)
    return s, (total > 1e-13) & (total < 1e13)


def _sums_of_others(values: Values, selection: Selection, m: Array) -> tuple[Sums, Array]:
    """As `about_listed`, about m; and Σ exp(z − m). Masked before exp, logits would be one more array."""
    z, _ = prepared(values, selection._replace(listed_ids=None))
    e = exp(z - finite(m)[..., None])
    total = zeroed_at(e, selection.listed_ids).sum(-1)
    shift = m + jnp.round(jnp.log(total))
    # `row_of` adds 1 for the class left out. Here none is left out, so we subtract 1.
    return Sums(shift, total * exp(m - shift) - 1, None), total


def keeps_exponentials(values: Values, selection: Selection) -> bool:
    """Whether XLA is to make the gradient, in place, of the very exponentials that the forward pass summed.

    Symptom: on rows of fewer than 128 classes a second exp costs more than a pass over memory. And jax 0.10 does not
    write the gradient over logits that a loop has read.
    Remedy: there the forward pass takes no blocks, so that XLA merges its exponentials with the gradient's.
    Test: test_gradient_of_narrow_rows_is_made_of_their_exponentials; the benchmark, on jax 0.10, logits from a matmul.
    """
    unchanged = values.logit_cap is None and selection.class_mask is None and selection.row_mask is None
    uncast = values.logits.dtype == statistics_dtype(values.logits)
    return unchanged and uncast and (known(values.logits.shape[-1], 128) < 128 or jax.__version_info__[:2] == (0, 10))


def rounded_once(values: Values) -> Values:
    """Symptom: XLA recomputes logits that are a product in each pass, rounded differently: z_y − m is not exactly 0.
    Remedy: a barrier materializes them once.
    Test: none fails on jax 0.10 and 0.12, which happen to round once; an FMA of a product and the shift is possible.
    """
    return values._replace(logits=lax.optimization_barrier(values.logits))


def listed_anew(selection: Selection) -> Selection:
    """Symptom: XLA keeps which classes are listed, 1 byte for each logit, from one pass to the next.
    Remedy: a barrier has the bits of `is_listed` made anew.
    Test: test_a_loss_of_logits_reads_them_twice_and_writes_its_gradient, top-k labels.
    """
    ids = selection.listed_ids
    return selection if ids is None else selection._replace(listed_ids=lax.optimization_barrier(ids))


def label_logit(values: Values, selection: Selection, m: Array, shards: ClassShards) -> tuple[Values, Array]:
    """The label's logit, and the values to go on with.

    Symptom: gathering first delays the CPU's threads; gathering last keeps the logits alive, so that exp needs a second
    buffer; gathering after the cast makes TPUs cast all logits.
    Remedy: barriers fix the order max, gather, exp, and the cast comes after the gather. Exponentials of capped logits
    do not overwrite the logits, and with a barrier a CPU would cap them twice.
    Test: test_large_logits_leave_no_temporary, gradient; test_capped_logits_are_capped_once.
    """
    late = lax.optimization_barrier((values.logits, m))[0]
    logit = rounded_alike(_gathered_logit(values._replace(logits=late), selection, shards), m, values.logit_cap)
    if values.logit_cap is not None:
        return values, logit
    late, logit = lax.optimization_barrier((late, logit))
    return values._replace(logits=late), logit


def _gathered_logit(values: Values, selection: Selection, shards: ClassShards) -> Array:
    """z_y as the rule sees it; 0 where the label is on another shard, NaN where it is INVALID."""
    index, here = _labels.local_index(selection.labels, shards)
    picked = jnp.take_along_axis(values.logits, index[..., None], -1, mode="promise_in_bounds")
    z, _ = prepared(Values(picked, logit_cap=values.logit_cap), Selection(row_mask=selection.row_mask))
    return nan_if_invalid(jnp.where(here, z[..., 0], 0), selection.labels)


def nan_if_invalid(logit: Array, labels: Array) -> Array:
    return jnp.where(labels == _labels.INVALID, jnp.nan, logit)


def rounded_alike(logit: Array, m: Array, cap: Array | None) -> Array:
    """Symptom: a capped label, compiled apart from the others, can be one rounding off the maximum that it is. The gap
    costs a confident row's loss its digits.
    Remedy: within 4 ulp it is the maximum. The derivative stays the label's own.
    Test: test_loss_of_probabilities_is_not_negative.
    """
    if cap is None:
        return logit
    gap = lax.stop_gradient(m - logit)
    return logit + jnp.where(jnp.abs(gap) <= 4 * jnp.finfo(m.dtype).eps * jnp.abs(m), gap, 0)


def reads_label_in_place(logits: Array) -> bool:
    """Symptom: with classes split over devices, gathering z_y would communicate.
    Remedy: it is read where it lies: on accelerators summed in the pass, and in the gradient at one expm1 per logit.
    Test: test_three_numbers_per_row_are_summed_over_classes_and_none_for_the_gradient.
    """
    return devices(logits) > 1


def class_iota(z: Array, shards: ClassShards) -> Array:
    """The class of each logit. A comparison with an iota is part of the pass that uses it; a one-hot scatter is not."""
    return shards.offset() + lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)


def is_label(labels: Array | None, ids: Array) -> Any:
    """Whether each class is the row's label; None without labels."""
    return None if labels is None else ids == labels[..., None]


def rows_per_block(logits: Array) -> int | None:
    """How many rows of `logits` [..., K] make a block; None where all are to be taken at once.

    Contiguous rows of a sharded array would not be local. Under `jit` we cannot see whether it is sharded, so blocks
    are for a single device only, and not where an Explicit mesh shards it.
    """
    rows, row_bytes = math.prod(logits.shape[:-1]), 4 * logits.shape[-1]
    if known(rows * row_bytes, 0) < SMALL or jax.device_count() > 1 or any(jax.typeof(logits).sharding.spec):
        return None
    size = max(1, BLOCK // row_bytes)
    return size if size < rows else None


def in_row_blocks(f: Callable[[Any], Any], logits: Array, args: Any, cheap: Callable[[Any], Any] | None = None) -> Any:
    """`f(args)`, arrays of one number for each row of `logits` [..., K]. `f` sees all rows, or blocks of them.

    An array in `args` has the leading axes of `logits`; or it has size 1 there, or is a scalar, and serves all rows.
    With any other there are no blocks.
    `cheap`, if given, makes the numbers of a block more cheaply, and says for which rows they are good: `f` sees the
    blocks where not all are. This is never differentiated.

    Symptom: XLA on CPU materializes every intermediate. Buffers above 32 MiB are freshly mapped, and their page faults
    cost more than the arithmetic.
    Remedy: a few MiB of rows at a time stay in cache.
    Test: test_large_logits_fault_no_pages_but_the_gradients.
    """
    lead, size = logits.shape[:-1], rows_per_block(logits)
    ones = (1,) * len(lead)
    if size is None or any(a.shape[: len(lead)] not in (lead, ones, ()) for a in jax.tree.leaves(args)):
        return f(args)
    return _in_row_blocks(f, cheap, lead, size, args)


def _in_row_blocks(f, cheap, lead: tuple[int, ...], size: int, args):
    rows = math.prod(lead)
    blocks = -(-rows // size)

    def part(a, i):
        if a.shape[: len(lead)] != lead:
            return a.reshape(1, *a.shape[len(lead) :]) if a.ndim else a
        start = jnp.minimum(i * size, rows - size)  # the last block repeats some rows, which `join` drops
        return lax.dynamic_slice_in_dim(a.reshape(rows, *a.shape[len(lead) :]), start, size)

    def block(i):
        return jax.tree.map(lambda a: part(a, i), args)

    def join(a):  # [blocks, size]
        return jnp.concatenate([a[:-1].ravel(), a[-1, blocks * size - rows :]]).reshape(lead)

    def numbers(i):
        return f(block(i)) if cheap is None else _second_look(f, cheap, block, i, blocks)

    return jax.tree.map(join, lax.map(numbers, jnp.arange(blocks, dtype=jnp.int32)))


def _second_look(f, cheap, block, i, blocks):
    """Symptom: vmap turns a cond into both of its branches; and XLA moves out of a loop what does not depend on it.
    Remedy: a while_loop that runs at most once, whose step reads the index that it changes.
    Test: test_a_maximum_is_taken_at_a_second_look_only; for the index, test_large_logits_leave_no_temporary, gradient.
    """
    numbers, good = cheap(block(i))

    def again(state):
        _, i = state
        return f(block(i)), i + blocks

    return lax.while_loop(lambda state: state[1] < blocks, again, (numbers, jnp.where(good.all(), blocks, i)))[0]
