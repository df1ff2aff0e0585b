"""The linear layer z = x·W + b by blocks: its three matmuls, for either layout of W, and loops over its classes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import _checks
from ._sharding import devices, in_shard_map, parts_of

PLATFORMS = "cpu", "gpu", "tpu"


class Inputs(NamedTuple):
    """What the loss of a linear layer is differentiated with respect to."""

    x: Any  # [..., D]
    w: Any
    bias: Any  # [K] or None
    others: Any  # pytree: what the loss needs besides the logits


class Layer(NamedTuple):
    """What is known of the layer before it is run. B rows, D features, K classes."""

    classes: int  # K, on this shard
    class_axis: int  # of w: 1 for [D, K], 0 for [K, D]
    operand_dtype: jnp.dtype
    sum_dtype: jnp.dtype  # float32 or float64
    devices: int  # that XLA may split x and w over
    parts: int  # that the classes are seen as (see `_sharding`)
    platform: str = "gpu"  # one of PLATFORMS, set by `by_platform`

    @classmethod
    def of(cls, function, x, w, bias, class_axis, dtype) -> tuple["Layer", Array, Array, Array | None]:
        x, w = _checks.floating(function, "x", x), _checks.floating(function, "w", w)
        if w.ndim != 2:
            raise _checks.value_error(function, "w", f"of shape {w.shape}", "two axes, [D, K] or [K, D]")
        classes, features = w.shape[class_axis], w.shape[1 + class_axis]  # class_axis is −1 or 0, the other 0 or 1
        if x.ndim == 0 or x.shape[-1] != features:
            wanted = f"[..., {features}], for w {w.shape}"
            wanted += f" (or class_axis={-1 - class_axis})" if x.shape[-1:] == (classes,) else ""
            raise _checks.value_error(function, "x", f"of shape {x.shape}", wanted)
        if classes == 0:
            raise _checks.value_error(function, "w", f"of shape {w.shape}", "at least one class")
        if bias is not None:
            bias = _checks.floating(function, "bias", bias)
            _checks.shape(function, "bias", bias, (classes,), "one number for each class")
        operands = jnp.result_type(x, w) if dtype is None else jnp.dtype(dtype)
        sums = jnp.dtype(jnp.float64 if operands == jnp.float64 else jnp.float32)
        return cls(classes, class_axis % 2, operands, sums, devices(x, w), parts_of(w, class_axis)), x, w, bias

    @property
    def on_cpu(self) -> bool:
        return self.platform == "cpu"

    def by_platform(self, f: Callable[..., Any], *args: Any, platforms: Sequence[str] = PLATFORMS) -> Any:
        """`f(layer, *args)`, with the platform that the program is compiled for; "gpu" for any not in `platforms`.

        All branches are traced, which takes most of the time that tracing does. Only one is compiled.
        """
        branches = {name: functools.partial(f, self._replace(platform=name)) for name in platforms}
        return lax.platform_dependent(*args, default=branches.pop("gpu"), **branches)

    def logits(self, x: Array, w: Array, bias: Array | None) -> Array:
        z = self._dot(x, [x.ndim - 1], w, [1 - self.class_axis])
        return z if bias is None else z + jnp.expand_dims(bias.astype(self.sum_dtype), range(x.ndim - 1))

    def dx(self, dz: Array, w: Array) -> Array:
        return self._dot(dz, [dz.ndim - 1], w, [self.class_axis])  # [..., B, D]

    def dx_of_few(self, dz: Array, w: Array) -> Array:
        """dx of a small block; on CPU, for w [D, K], as dxᵀ = w·dzᵀ: 5 to 25 % faster, in bfloat16 up to 50 %.

        The barrier stops XLA from undoing the transpose. For many rows use `dx`: dxᵀ would be an extra large buffer.
        Test: test_dx_of_a_block_is_made_transposed.
        """
        if self.class_axis == 0 or not self.on_cpu:
            return self.dx(dz, w)
        return jnp.moveaxis(lax.optimization_barrier(self._dot(w, [1], dz, [dz.ndim - 1])), 0, -1)

    def dw(self, x: Array, dz: Array, x_transposed: Array | None = None, apart: int = 0) -> Array:
        """Of the rows together, or for each index of the first `apart` axes."""
        rows = range(apart, x.ndim - 1)
        if x_transposed is not None and self.class_axis:
            return self._dot(x_transposed, [1], dz.reshape(-1, dz.shape[-1]), [0])
        return self._dot(x, rows, dz, rows, apart) if self.class_axis else self._dot(dz, rows, x, rows, apart)

    def transposed(self, x: Array) -> Array | None:
        """xᵀ [D, rows] for `dw`, made before a loop, on CPU only: elsewhere it would be a copy of x for nothing.

        On CPU a matmul that reads x transposed is a fifth slower in float32, and half as fast in bfloat16, because it
        is done in float32. Some bfloat16 matmuls of a vmapped loss are not implemented at all. The barrier keeps XLA
        from folding the transpose back into the matmul.
        Test: test_no_matmul_reads_a_transposed_x.
        """
        if not self.on_cpu or self.devices > 1:
            return None
        return lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T.astype(self.operand_dtype))

    def add_dw(self, total: Array, x: Array, dz: Array) -> Array:
        """total + dw(x, dz). On CPU in place and tile by tile: at once, the update would be a buffer of w's size.

        On accelerators the sum is the matmul's epilogue, or one pass; 1002 tiles of a head of 128,256 classes were as
        many matmuls bound by reading x. On several devices tiles would not be where their classes are.
        """
        if not self.on_cpu or self.devices > 1:
            return total + self.dw(x, dz, apart=total.ndim - 2)

        x_transposed = self.transposed(x)

        def add(total, start, size):
            # The barrier hides where the last, smaller tile starts. XLA does not update what it also reads, at a known
            # index, in place: it copied all of dw for each block of rows, and a head took 2.4 times as long.
            # Test: test_the_last_classes_of_dw_are_updated_in_place.
            start = lax.optimization_barrier(jnp.asarray(start, jnp.int32))
            update = self.dw(x, lax.dynamic_slice_in_dim(dz, start, size, 1), x_transposed)
            update = update + lax.dynamic_slice_in_dim(total, start, size, self.class_axis)
            return lax.dynamic_update_slice_in_dim(total, update, start, self.class_axis)

        return over_classes(add, total, self.classes, DW_TILE // max(1, _checks.known(x.shape[1], 2**10)))

    def take(self, a: Array, start, size: int, axis: int = 0) -> Array:
        """Of an array with all classes along `axis`, those of the block: `size` of each part, from `start`."""
        if self.parts == 1:
            return lax.dynamic_slice_in_dim(a, start, size, axis)
        axis = axis % a.ndim
        block = lax.dynamic_slice_in_dim(self._by_parts(a, axis), start, size, axis + 1)
        return block.reshape(*a.shape[:axis], self.parts * size, *a.shape[axis + 1 :])

    def take_w(self, w: Array, start, size: int) -> Array:
        """A block of w. XLA for TPUs would hoist its cast to bfloat16, and make a copy of all of w.

        `reduce_precision` rounds as the cast to come does, and stays in the loop.
        Test: test_heads_of_language_models_need_little_beside_their_accumulators, float32 w, recompute.
        """
        w = self.take(w, start, size, self.class_axis)
        if self.operand_dtype == jnp.bfloat16:
            w = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)
        return w

    def put(self, total: Array, block: Array, start, axis: int = 0) -> Array:
        """`total` with the block that `take` would take replaced."""
        block, axis = block.astype(total.dtype), axis % total.ndim
        if self.parts == 1:  # without a reshape, on a TPU, no copy of w is made
            return lax.dynamic_update_slice_in_dim(total, block, start, axis)
        block = self._by_parts(block, axis)
        return lax.dynamic_update_slice_in_dim(self._by_parts(total, axis), block, start, axis + 1).reshape(total.shape)

    def _by_parts(self, a: Array, axis: int) -> Array:
        return a.reshape(*a.shape[:axis], self.parts, -1, *a.shape[axis + 1 :])

    def _dot(self, a: Array, a_axes: Sequence[int], b: Array, b_axes: Sequence[int], apart: int = 0) -> Array:
        a, b, both = a.astype(self.operand_dtype), b.astype(self.operand_dtype), range(apart)
        return lax.dot_general(a, b, ((a_axes, b_axes), (both, both)), preferred_element_type=self.sum_dtype)


def selected_by_platform(platform: str, there: Callable[..., Any], elsewhere: Callable[..., Any], *args: Any) -> Any:
    """The result of one of the two, by the device that the program is compiled for, ahead of time too.

    Symptom: `lax.platform_dependent` is a cond, and vmap copies its operands to move their batch axis to the front.
    Remedy: both are traced, a constant for the platform selects one, and XLA drops the other.
    Test: test_vmap_needs_at_most_one_array_to_move_its_axes.
    """
    here: Any = lax.platform_dependent(**{platform: lambda: jnp.array(True)}, default=lambda: jnp.array(False))
    return jax.tree.map(functools.partial(jnp.where, here), there(*args), elsewhere(*args))


def scan_blocks(layer: Layer, block: Callable[..., Any], start: Any, slices: Any) -> Any:
    """`lax.scan`. On GPUs the first block comes before the loop: dw then starts from it, not from zeros.

    XLA leaves out the sum with zeros, but not the pass over memory that makes them: 2 % of a head's time on an H100.
    The barrier has the loop reuse the first block's memory. For TPUs XLA does not, and would hold its logits twice. In
    `jax.shard_map`, jax 0.10 gives all that passes a barrier the mesh axes of each: there it is the plain loop.
    Test: test_the_sum_of_dw_starts_from_its_first_block_on_gpus.
    """
    x = jax.tree.leaves(slices)[0]
    if layer.platform != "gpu" or x.shape[0] < 2 or in_shard_map(x):
        return lax.scan(block, start, slices)
    totals, first = block(start, jax.tree.map(lambda a: a[0], slices))
    totals, first, slices = lax.optimization_barrier((totals, first, slices))

    def at(totals, i):  # by an index: slices[1:] would be a copy
        return block(totals, jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), slices))

    totals, rest = lax.scan(at, totals, jnp.arange(1, x.shape[0]))
    return totals, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


# On jax 0.10 XLA for CPUs aborts (`dot_op_emitter`) where vmap makes a batch of matmuls in a conditional. All are
# computed there. Test: test_any_loss_in_every_mode, vmap over heads.
CONDITIONALS = jax.__version_info__ >= (0, 11)


def checkpointed(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(*arrays, size)` under `jax.checkpoint`, whose static_argnums would keep what `step` closes over for good.

    Test: test_arrays_are_not_kept.
    """

    def of_size(*args):
        *arrays, size = args
        return jax.checkpoint(lambda *arrays: step(*arrays, size), prevent_cse=False)(*arrays)

    return of_size


DW_TILE = 2**19  # numbers: 2 MiB of sums, which stay in the caches


def over_classes(step: Callable[..., Any], carry: Any, classes: int, max_classes: int) -> Any:
    """`step(carry, start, size)` for blocks of at most about `max_classes` classes, the last one smaller.

    Nothing is padded. Sizes are multiples of 128 (for others XLA:TPU copies all of w). Among ¾ to all of the most that
    fit, the one with the smallest remainder is taken, as odd widths are slow on CPU.
    Test: test_no_copy_of_w_for_an_odd_number_of_classes.
    """
    if not isinstance(classes, int):  # a symbol, in `jax.export`
        return step(carry, 0, classes)
    most = max(1, min(max_classes, classes) // 128)
    size = 128 * min(range(-(-3 * most // 4), most + 1), key=lambda lanes: (classes // 128 % lanes, -lanes))
    size = classes if max_classes >= classes else min(classes, size)
    whole = classes // size
    indices = jnp.arange(whole, dtype=jnp.int32)
    carry, _ = lax.scan(lambda carry, i: (step(carry, i * size, size), None), carry, indices)
    rest = classes - whole * size
    return step(carry, whole * size, rest) if rest else carry
