"""Losses of a linear layer's outputs, which hold one block of the logits z = x·W + b at a time.

Training takes three matmuls: z, and from the loss's gradient δ, dx = δ·Wᵀ and dW = xᵀ·δ. There are two kinds of blocks:

* Of rows, for any loss ℓ. A sum Σ_i g_i ℓ_i knows g beforehand: dx and dW are finished while a block's z is live, and
  reverse mode only scales them. Losses per row learn g in the backward pass, and compute z again: 4 matmuls.
* Of classes, for the softmax cross-entropy. The backward pass reads x, W, labels and numbers per row, and computes z
  again: 4 matmuls. dW needs no accumulator.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, Literal, SupportsIndex

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from . import _checks
from ._autodiff import with_backward, with_gradients
from ._checks import Arrays
from ._class_blocks import class_blocked_rows
from ._elementary import weighted
from ._linear_arguments import (
    check_options,
    check_weights,
    for_blocks,
    labelled_rows,
    mean_divisor,
    row_scale,
    rows_that_count,
)
from ._matmuls import Inputs, Layer
from ._options import Options, values_of
from ._row_blocks import check_constants, coupled, losses_axes, row_parts, sweep_of
from ._sharding import ClassShards, in_auto, mesh_axes, reduced_as, varying_as, varying_over
from ._softmax import row_statistics
from ._top_k import loss_of_rows

Reduction = Literal["mean", "sum", "none"]


def fused_linear(
    loss_fn: Callable[..., Any],
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    class_axis: SupportsIndex = -1,
    dtype: DTypeLike | None = None,
    block_size: SupportsIndex | None = None,
) -> Callable[..., Any]:
    """Turns a row-wise loss of logits into a loss `f` of the linear layer before it, which never holds all the logits.

    `f(x, w, *row_args, bias=None, weights=None, normalizer=None, where=None)` equals, reduced over rows,
    `loss_fn(x @ w + bias, *row_args)`, in about the time of its three matmuls (`jaxce/_linear.py` tells how). Every
    differentiation mode works, for floating arguments and arrays that `loss_fn` closes over. Gradients not asked for
    cost nothing.

    Args:
        loss_fn: maps a block of logits [rows, num_classes], in float32 (float64 for float64 operands), and of row
            arguments [rows, ...] to losses [rows], each of its row alone. It may see some rows twice. With "none", to a
            pytree of arrays [rows], such as `LabelStatistics`: floating ones are differentiated, others returned. It is
            traced as by `jax.jit`: once, unless it is made anew.
        reduction: "mean" is Σ weights·loss / Σ weights, or / `normalizer`, and 0 where that divisor is 0. "sum" is
            Σ weights·loss, and "none" is weights·loss of each row.
        has_aux: whether `loss_fn` returns (losses, aux), aux a pytree of arrays [rows, ...]. It is not differentiated.
        class_axis: -1 for w [num_features, num_classes], 0 for its transpose, as tied embeddings have it.
        dtype: floating dtype of the matmuls' operands, by default that of x @ w. The logits' gradients are rounded to
            it; in float16 multiply the loss by a loss scale. Sums are always in float32 (float64), and
            gradients in their arguments' dtypes.
        block_size: rows per block and device, at most. Default: 1024; on a CPU 128 to 512, fewer for many classes.

    Returns:
        `f`. It takes floating x [..., num_features] and w; row arguments, pytrees of arrays [..., any]; a floating bias
        [num_classes]; real weights [...], default all ones; and for a mean, a real scalar `normalizer`, such as the
        global token count of data parallelism or gradient accumulation; and `where`, bool [...], True for rows that
        take part. A row masked by it, or of weight 0, has loss, aux and gradients 0, whatever it holds, and costs
        nothing: the other rows are gathered first. It returns the loss, in float32 (float64), a
        scalar or [...] for "none"; with `has_aux`, (loss, aux). Without rows, a sum or mean is 0.

    Raises:
        TypeError: a dtype is wrong, here or when `f` is called.
        ValueError: a shape or an option is wrong, there is no class, or `normalizer` is given without a mean.

    Inside `jax.shard_map` (with check_vma=True) rows, classes or both may be split. `loss_fn` then sees its shard's
    logits, and reduces over the classes' mesh axis itself, as this package's losses do by `axis_name`. Gradients are
    summed over shards as the types say. To differentiate a closed-over array that shards share, `jax.lax.pcast` it.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> def focal(logits, labels):
        ...     loss = jaxce.softmax_cross_entropy_with_integer_labels(logits, labels)
        ...     return (1 - jnp.exp(-loss)) ** 2 * loss
        >>> x, w, labels = jnp.ones((2, 3)), jnp.eye(3, 4), jnp.array([0, 3])
        >>> loss, (dx, dw) = jax.value_and_grad(jaxce.fused_linear(focal), (0, 1))(x, w, labels)
        >>> bool(jnp.allclose(loss, focal(x @ w, labels).mean()))
        True
    """
    function = "fused_linear"
    class_axis, dtype, block_size = check_options(function, reduction, class_axis, dtype, block_size)
    _checks.one_of(function, "has_aux", has_aux, (True, False), "a bool")
    if not callable(loss_fn):
        raise _checks.type_error(function, "loss_fn", _checks.described(loss_fn), "a function of logits and row_args")

    # A loss that holds nothing has one program for all calls of `fused_linear`. Any other has one for each `fused`:
    # when that goes, so do the program and what the loss holds.
    compiled = _compiled_by_rows if _holds_nothing(loss_fn) else _compiled_by_rows.__wrapped__
    by_rows = compiled(loss_fn, has_aux, reduction, block_size)

    def fused(x, w, *row_args, bias=None, weights=None, normalizer=None, where=None, **unknown):
        if unknown:
            raise _checks.type_error(function, "row_args", f"given as {', '.join(unknown)}=", "them by position")
        layer, x, w, bias = Layer.of(function, x, w, bias, class_axis, dtype)
        lead = x.shape[:-1]
        meaning = "as x; what is not of a row, loss_fn may close over"
        row_args = jax.tree.map(lambda a: _checks.leading(function, "row_args", a, lead, meaning), row_args)
        weights, normalizer = check_weights(function, weights, normalizer, lead, reduction, layer)
        row_mask, weights = rows_that_count(function, where, weights, [], lead)
        if weights is None and row_mask is not None and reduction != "none":
            weights = row_mask.astype(layer.sum_dtype)
        scale = row_scale(reduction, weights, normalizer, lead, layer)
        blocked = functools.partial(by_rows, layer, row_parts(x))
        axes = len(lead) if reduction == "none" else 0, len(lead)
        out, aux = in_auto(blocked, x, axes, x, w, bias, row_args, row_mask, scale)
        return (out, aux) if has_aux else out

    return fused


@functools.cache
def compiled_once(f: Callable[..., Any], static: int, axis_name: str | None) -> Callable[..., Any]:
    """`f`, whose first arguments are static, for eager calls.

    With an axis_name it stays as it is: of a jit in `jax.vmap(axis_name=...)`, JAX's derivatives fail where results are
    the same on all shards. Test: test_is_the_naive_formula_in_every_world, vmap.
    """
    return jax.jit(f, static_argnums=range(static), inline=True) if axis_name is None else f


def _holds_nothing(f: Callable[..., Any]) -> bool:
    """Neither an object, as a method does, nor what it closes over, nor an array as a default."""
    if not isinstance(f, types.FunctionType) or f.__closure__ is not None:
        return False
    defaults = *(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()
    return all(value is None or isinstance(value, int | float | str) for value in defaults)


@functools.lru_cache(maxsize=64)
def _compiled_by_rows(*static):
    return jax.jit(functools.partial(_by_rows, *static), static_argnums=(0, 1), inline=True)


def _by_rows(loss_fn, has_aux: bool, reduction, block_size, layer: Layer, parts, x, w, bias, row_args, row_mask, scale):
    """(each loss times `scale`, or their sum; aux), by blocks of rows."""
    several, arrays = reduction == "none", (varying_as(x, scale, row_mask), w, bias, row_args, row_mask)
    sweep, inputs, closed = sweep_of(layer, loss_fn, has_aux, several, parts, block_size, *arrays)
    if not several and mesh_axes(scale) <= losses_axes(closed) and not coupled(closed):
        return _summed(sweep, closed, inputs, scale, layer)

    def backward(inputs, _, g, perturbed):  # g comes in equal copies where shards share the losses
        g, treedef = jax.tree.flatten(g)
        like = [varying_over(losses_axes(closed, i), jnp.zeros(())) for i in range(len(g))]
        g = jax.tree.unflatten(treedef, [reduced_as(a, b, lax.pmean) for a, b in zip(g, like, strict=True)])
        gradients = sweep(inputs, g, perturbed)[0][1]
        return jax.tree.map(lambda a, d: None if d is None else d.astype(a.dtype), inputs, gradients)

    losses, (others, aux) = with_backward(sweep, backward)(inputs)
    losses = losses if scale is None else jax.tree.map(functools.partial(weighted, scale), losses)
    if not several:
        return jnp.sum(losses), aux
    return jax.tree.map(lambda a, b: b if a is None else a, losses, others, is_leaf=lambda a: a is None), aux


def _summed(sweep, closed, inputs: Inputs, scale: Array, layer: Layer):
    """(Σ scale·losses, aux), whose gradients are made in the forward pass.

    With float16, in units of the largest |scale|: 1/N of a mean would round them to nothing, and reverse mode brings
    the loss scale too late. Other dtypes do without, as this is one more pass over the gradients.
    """

    def gradients(inputs, g, perturbed):
        check_constants(closed, inputs, perturbed)
        return sweep(inputs, g, perturbed)

    # JAX cannot transpose the tangent of a cond that vmap made a select, as it does over `where` or weights.
    # Test: test_any_loss_in_every_mode, grad of vmap over masks.
    without_conditionals = functools.partial(sweep, skips=False)
    unit, dtypes = None, [layer.operand_dtype, *(a.dtype for a in jax.tree.leaves(inputs))]
    if jnp.float16 in dtypes and scale.size:
        unit = lax.stop_gradient(jnp.abs(scale).max())
        unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    scale = varying_over(losses_axes(closed), scale if unit is None else scale / unit)
    total, (_, aux) = with_gradients(sweep, gradients, without_conditionals)(inputs, scale)
    return total if unit is None else total * unit, aux


def linear_cross_entropy(
    x: Arrays,
    w: Arrays,
    labels: Arrays | tuple[Arrays, Arrays],
    *,
    bias: Arrays | None = None,
    weights: Arrays | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    where: Arrays | None = None,
    ignore_index: ArrayLike | None = None,
    class_mask: Arrays | None = None,
    tail: bool = False,
    label_smoothing: ArrayLike = 0.0,
    class_weights: Arrays | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    class_axis: SupportsIndex = -1,
    dtype: DTypeLike | None = None,
    block_size: SupportsIndex | None = None,
    recompute: bool | None = None,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of a linear layer's outputs without their logits: the loss of a language model's head.

    It equals `softmax_cross_entropy_with_integer_labels(x @ w + bias, labels)`, reduced over rows, in about the time of
    its matmuls (`jaxce/_linear.py` tells how). Every differentiation mode works. Gradients not asked for cost nothing.

    Args:
        x, w, bias: floating, with shapes [..., num_features], [num_features, num_classes] and [num_classes].
        class_axis: the class axis of w: -1, or 0 for w [num_classes, num_features], as tied embeddings have it.
        labels: integer, with shape [...], in [0, num_classes), counted over all shards. Or floating targets, with shape
            [..., num_classes], as of `softmax_cross_entropy`. Or a pair (class_ids, targets), each with shape [..., M],
            as of `softmax_cross_entropy_with_top_k_labels`.
        tail: with such a pair, whether all other classes are one class more.
        weights: real, with shape [...], default all ones. They multiply the rows' losses.
        where: bool, with shape [...], True for rows that take part.
        reduction, normalizer, dtype: see `fused_linear`. A mean without normalizer divides by Σ weights of the rows not
            ignored, each times its integer label's class weight, as PyTorch does.
        ignore_index: rows with this integer label are ignored. Any integer, a class or not.
        class_mask: bool, with shape [num_classes], True for the classes that take part, such as those of a vocabulary
            without its padding. A masked class has probability 0; its part of `w`, gradient 0, must still be finite.
        label_smoothing, class_weights, logit_cap, z_loss: see `softmax_cross_entropy`, where y is onehot(y).
        block_size: rows per block, as in `fused_linear`; or classes per block and device, rounded up to a multiple of
            128, by default those whose float32 logits fit in 64 MiB, and at least 2048 (on a CPU, in 16 MiB).
        recompute: True for blocks of classes (4 matmuls, no accumulator of w's size), False for blocks of rows (3).
            Default: classes where w is narrower than the float32 sums (a bfloat16 w), on one device or in
            `jax.shard_map`; else rows. With reduction="none" the default is classes. True, or a `jax.checkpoint`, is
            for `jax.grad` of a `lax.scan` over microbatches: rows would keep one dw for each.
        axis_name: inside `jax.shard_map` (with check_vma=True), the mesh axis that the classes are split over. `w`,
            `bias`, `class_weights` and `class_mask` are the shard's. All shards hold equally many classes: mask any
            excess.

    Returns:
        The loss, in float32 (float64 for float64 operands), a scalar or [...] for "none". A row that is masked, ignored
        or of weight 0 has loss and gradient exactly 0, whatever it holds. Blocks of rows leave such rows out; blocks of
        classes are of 5, 10 or 16 sixteenths of the rows (with a target for every class, of all). Of sharded rows, each
        part that a device may hold leaves out its own: with an Explicit mesh that is what it holds; with plain jit the
        split is not known, and both axes of [batch, sequence] count as split. If all rows are such, or all classes are
        masked, or there are no rows, loss and gradients are 0 (w being finite). In other rows a label that is invalid,
        or of a masked class, makes the loss NaN; `check_labels` finds those out of range.

        `jax.vmap` over x makes logits, and a gradient of w, for each example. Leading axes of x, and reduction="none",
        do not.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or an option is wrong, there is no class, or `normalizer` is given without a mean.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> x, w, labels = jnp.ones((2, 3)), jnp.eye(3, 4), jnp.array([0, 3])
        >>> loss, (dx, dw) = jax.value_and_grad(jaxce.linear_cross_entropy, (0, 1))(x, w, labels)
        >>> print(f"{loss:.4f}, {jaxce.linear_cross_entropy(x, w, labels, ignore_index=3, recompute=True):.4f}")
        1.7143, 1.2143
    """
    function = "linear_cross_entropy"
    class_axis, dtype, block_size = check_options(function, reduction, class_axis, dtype, block_size)
    _checks.one_of(function, "recompute", recompute, (None, True, False), "a bool or None")
    layer, x, w, bias = Layer.of(function, x, w, bias, class_axis, dtype)
    rows = x.shape[:-1]
    weights, normalizer = check_weights(function, weights, normalizer, rows, reduction, layer)
    shards = ClassShards(layer.classes, _checks.mesh_axis(function, axis_name))
    given = label_smoothing, class_weights, logit_cap, z_loss
    options = Options.of(function, layer.sum_dtype, x.ndim, shards, *given)
    labelled, weights, skips = labelled_rows(
        function, layer, rows, labels, tail, ignore_index, class_mask, where, weights, options, shards
    )
    if reduction == "mean" and normalizer is None:
        normalizer = mean_divisor(layer, rows, options, weights, labelled[0], shards)
    scale = row_scale(reduction, weights, normalizer, rows, layer)
    if recompute is None:
        recompute = reduction == "none" or (w.dtype.itemsize < layer.sum_dtype.itemsize and layer.devices == 1)
    loss_of = compiled_once(_loss_of, 7, axis_name)
    loss_of = functools.partial(loss_of, layer, shards, recompute, skips, reduction, block_size, row_parts(x))
    axes = len(rows) if reduction == "none" else 0
    return in_auto(loss_of, x, axes, x, w, bias, labelled, scale, options)


def _loss_of(
    layer: Layer, shards, by_classes, skips, reduction, block_size, parts, x, w, bias, labelled, scale, options
):
    """Each loss times `scale`, or their sum. The loss is ordinary JAX of the rows' numbers."""
    everything = x, w, bias, labelled, scale, options
    axes = mesh_axes(everything) - mesh_axes(shards.offset())
    x, w, bias, (selection, targets, listed), scale, options = varying_over(axes, everything)

    x, of_blocks = for_blocks(x, selection, skips)
    if by_classes:
        values = values_of(None, targets, (*x.shape[:-1], layer.classes), options, selection, shards)
        found = class_blocked_rows(layer, Inputs(x, w, bias, values), of_blocks, block_size, shards, parts)
        loss = loss_of_rows(*found, listed, options, selection, shards)
        loss = loss if scale is None else weighted(scale, loss)
        return loss if reduction == "none" else jnp.sum(loss)

    # Blocks are [B, K], so that what all rows share becomes [1, K].
    per_class = options.class_weights, selection.class_mask
    class_weights, class_mask = jax.tree.map(lambda a: a.reshape(1, -1), per_class)
    of_block = options._replace(class_weights=class_weights)

    def loss_of_block(logits, selection, targets, listed):
        selection = selection._replace(class_mask=class_mask)
        values = values_of(logits, targets, logits.shape, of_block, selection, shards)
        return loss_of_rows(*row_statistics(values, selection, shards), listed, of_block, selection, shards)

    rows = selection._replace(class_mask=None, row_mask=None if skips else selection.row_mask), targets, listed
    by_rows = functools.partial(_by_rows, loss_of_block, False, reduction, block_size, layer, parts)
    return by_rows(x, w, bias, rows, of_blocks.row_mask, scale)[0]
