"""Classes that a row lists, M of its K: which they are, and how their gradients come to be among those of the others.

`class_ids` [..., M] are places in the logits at hand [..., K], each class once; any other number is none of them.

Comparing each logit with each id needs no array, but takes longer than the pass it is in. So the mask of listed classes
is kept as bits, 1/32 of float32 logits, and their gradients are scattered into that of the others, in place. XLA for
TPUs scatters into a copy of the gradient: there we compare. In blocks of classes we scatter on TPUs too: the copy is
small, while for w of fewer than 2048 features each comparison would be an array of the block's size (4 GiB, and 50
times the matmuls' time).
Test: test_a_loss_of_logits_reads_them_twice_and_writes_its_gradient, top-k labels;
test_top_k_labels_of_a_head_take_little_more.
"""

import jax.numpy as jnp
from jax import Array

from ._matmuls import selected_by_platform
from ._sharding import parts_of

MOST_COMPARED = 256  # ids; of more, XLA for TPUs makes copies too


def is_here(class_ids: Array, classes: int) -> Array:
    return (class_ids >= 0) & (class_ids < classes)


def is_listed(class_ids: Array, logits: Array, in_block: bool) -> Array:
    """Whether each class of these logits is listed: [..., K]. `in_block`: they are a block of classes."""
    classes, parts = logits.shape[-1], parts_of(logits, logits.ndim - 1)
    if in_block or class_ids.shape[-1] > MOST_COMPARED:
        return _by_bits(class_ids, classes, parts)
    compared, by_bits = (lambda ids: _chosen(ids, classes, None)), (lambda ids: _by_bits(ids, classes, parts))
    return selected_by_platform("tpu", compared, by_bits, class_ids)


def added_at(gradient: Array, class_ids: Array, update: Array, in_block: bool) -> Array:
    """`gradient` [..., K], which is 0 at the listed classes, with `update` [..., M] there. The sum with 0 is exact."""
    if in_block or class_ids.shape[-1] > MOST_COMPARED:
        return _scattered(gradient, class_ids, update)
    args = gradient, class_ids, update.astype(gradient.dtype)
    return selected_by_platform("tpu", lambda g, ids, u: g + _chosen(ids, g.shape[-1], u), _scattered, *args)


def zeroed_at(a: Array, class_ids: Array) -> Array:
    """`a` [..., K], with 0 at the listed classes."""
    zero = jnp.vectorize(lambda row, ids: row.at[ids].set(0, mode="drop"), signature="(k),(m)->(k)")
    return zero(a, _or_dropped(class_ids, a.shape[-1]))


def _scattered(a: Array, class_ids: Array, update: Array) -> Array:
    add = jnp.vectorize(lambda row, ids, u: row.at[ids].add(u, mode="drop"), signature="(k),(m),(m)->(k)")
    return add(a, _or_dropped(class_ids, a.shape[-1]), update.astype(a.dtype))


def _or_dropped(class_ids: Array, classes: int) -> Array:
    return jnp.where(is_here(class_ids, classes), class_ids, classes)


def _by_bits(class_ids: Array, classes: int, parts: int) -> Array:
    """`is_listed`, for classes seen as `parts` (see `_sharding`), each of which has words of its own."""
    lead, words = class_ids.shape[:-1], -(-(classes // parts) // 32)
    part, place = jnp.divmod(class_ids, classes // parts)
    word = jnp.where(is_here(class_ids, classes), part * words + place // 32, -1)
    bits = jnp.zeros((*lead, parts * words), jnp.uint32)
    bits = _scattered(bits, word, jnp.uint32(1) << (place % 32).astype(jnp.uint32)).reshape(*lead, parts, words, 1)
    bits = bits >> jnp.expand_dims(jnp.arange(32, dtype=jnp.uint32), range(bits.ndim - 1))
    return ((bits & 1).reshape(*lead, parts, words * 32)[..., : classes // parts] > 0).reshape(*lead, classes)


def _chosen(class_ids: Array, classes: int, update: Array | None) -> Array:
    """By M comparisons: whether each class is listed, or its update, else 0."""
    ids = jnp.expand_dims(jnp.arange(classes, dtype=class_ids.dtype), range(class_ids.ndim - 1))
    chosen = jnp.zeros((*class_ids.shape[:-1], classes), bool if update is None else update.dtype)
    for m in range(class_ids.shape[-1]):
        value = True if update is None else update[..., m : m + 1]
        chosen = jnp.where(class_ids[..., m : m + 1] == ids, value, chosen)
    return chosen
