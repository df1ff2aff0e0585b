"""Losses of a linear layer's outputs that never hold more than a block of the logits.

With logits z = x·W + b, a row-wise loss ℓ and its gradient δ, a step of training has three matmuls: z, dx = δ·Wᵀ and
dW = xᵀ·δ. Two ways not to hold z and δ:

* by blocks of rows (`jaxce._row_blocks`), for any loss. A scalar Σ_i g_i ℓ_i knows the cotangents g beforehand, so the
  loop that computes the losses finishes dx, dW, … while a block's logits are live, and reverse mode only scales them:
  3 matmuls. Without differentiation only the losses are computed: 1 matmul. Losses per row learn g in the backward
  pass, which makes the logits again: 4 matmuls.
* by blocks of classes (`jaxce._class_blocks`), for the softmax cross-entropy: 4 matmuls, and dW needs no accumulator.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _checks, _labels
from ._autodiff import with_backward, with_gradients
from ._class_blocks import class_blocked_rows
from ._losses import softmax_cross_entropy_with_integer_labels
from ._matmuls import Inputs, Layer
from ._options import Options, Selection, Values, combined, with_uniform_targets
from ._row_blocks import row_parts, sweep_of
from ._sharding import ClassShards, in_auto, varying_as

Reduction = Literal["mean", "sum", "none"]


def fused_linear(
    loss_fn: Callable[..., Any],
    *,
    reduction: Reduction = "mean",
    has_aux: bool = False,
    class_axis: int = -1,
    dtype: DTypeLike | None = None,
    block_size: int | None = None,
) -> Callable[..., Any]:
    """Turns a row-wise loss of logits into a loss of the linear layer before it, which never holds all the logits.

    The result is the function `f(x, w, *row_args, bias=None, weights=None, normalizer=None)` that returns what
    `loss_fn(x @ w + bias, *row_args)`, reduced over rows, returns, in about the time of its three matmuls. Every mode
    of differentiation works: grad, jvp, jacfwd, hessian, vmap, scan, checkpoint, … with respect to `x`, `w`, `bias`,
    `weights`, `normalizer`, floating row arguments and arrays that `loss_fn` closes over; what is not asked for costs
    nothing.

    Args:
        loss_fn: maps logits [B, K], float32 (float64 for float64 operands), and a block [B, ...] of each row argument
            to losses [B]; with `has_aux`, to (losses, aux), aux a pytree of arrays [B, ...]. A row's loss must depend
            on that row alone. It sees some row twice when the rows cannot be split evenly.
        reduction: "mean" (default), Σ weights·loss / Σ weights, or / `normalizer`, and 0 where that divisor is 0;
            "sum", Σ weights·loss; or "none", weights·loss of each row.
        has_aux: whether `loss_fn` returns aux, which is not differentiated. Default False.
        class_axis: -1 (default) for w [D, K], 0 for w [K, D], as tied embeddings have it.
        dtype: floating dtype of the matmuls' operands, default that of x @ w. Sums are in float32 (float64) whatever it
            is, and the gradients in the dtypes of their arguments.
        block_size: rows per block, at most; default chosen from D and K (see `jaxce._row_blocks`).

    Returns:
        `f`. Its arguments: x [..., D] and w floating; row arguments, pytrees of arrays [..., any]; bias [K] floating;
        weights [...] real, default all ones; normalizer, a real scalar, for the mean only: a global token count, for
        gradient accumulation and data parallelism. It returns the loss, float32 (float64), [] or [...] for "none"; with
        `has_aux`, (loss, aux), aux arrays [..., any].

    Raises:
        TypeError: a dtype is wrong (here, or when `f` is called).
        ValueError: a shape or an option is wrong, or there is no class.

    With no rows, a sum or mean is 0 with zero gradients. Only operands of dtype bfloat16 or wider keep small gradients:
    the logits' gradients, which contain the 1/N of a mean, are rounded to the operands' dtype.

    Inside `jax.shard_map` (with check_vma=True) rows, classes or both may be split: `loss_fn` sees this shard's logits,
    and reduces over the mesh axis of the classes itself (the losses of this package do so by their `axis_name`).
    Gradients are summed over shards as the types say.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> def focal(logits, labels):
        ...     loss = jaxce.softmax_cross_entropy_with_integer_labels(logits, labels)
        ...     return (1 - jnp.exp(-loss)) ** 2 * loss
        >>> x, w, y = jnp.ones((6, 3)), jnp.eye(3, 5), jnp.array([0, 1, 2, 3, 4, 0])
        >>> loss, (dx, dw) = jax.value_and_grad(jaxce.fused_linear(focal), (0, 1))(x, w, y)
        >>> bool(jnp.allclose(loss, focal(x @ w, y).mean()))
        True

    Source: the three matmuls of a row's loss, in the module `jaxce._linear`.
    """
    return _fused(loss_fn, reduction, has_aux, class_axis, dtype, block_size)


def _fused(loss_fn, reduction, has_aux, class_axis, dtype, block_size, parts=None) -> Callable[..., Any]:
    """`fused_linear`, of x whose leading axes are seen as so many parts (see `jaxce._sharding`)."""
    function = "fused_linear"
    _check_options(function, reduction, class_axis, dtype, block_size)

    def fused(x, w, *row_args, bias=None, weights=None, normalizer=None):
        layer, x, w, bias = Layer.of(function, x, w, bias, class_axis, dtype)
        lead, split = x.shape[:-1], parts or row_parts(x)
        row_args = jax.tree.map(lambda a: _checks.leading(function, "row_args", jnp.asarray(a), lead), row_args)
        weights, normalizer = _check_weights(function, weights, normalizer, lead, reduction, layer)

        def blocked(x, w, bias, row_args, weights, normalizer):
            # In shard_map each shard's own gradients are wanted, of what is the same on all too: they are summed later.
            x = varying_as(x, *jax.tree.leaves(row_args))
            row_args = jax.tree.map(lambda a: varying_as(a, x), row_args)
            sweep, inputs = sweep_of(function, layer, loss_fn, has_aux, split, block_size, x, w, bias, row_args)
            if reduction == "none":
                losses, aux = with_backward(sweep, lambda inputs, _, g, moves: sweep(inputs, g, moves)[0][1])(inputs)
                return losses if weights is None else weights * losses, aux
            return with_gradients(sweep, sweep)(inputs, _row_scale(reduction, weights, normalizer, lead, layer))

        row_axes = len(lead)
        axes = row_axes if reduction == "none" else 0, row_axes
        out, aux = in_auto(blocked, x, axes, x, w, bias, row_args, weights, normalizer)
        return (out, aux) if has_aux else out

    return fused


def linear_cross_entropy(
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    ignore_index: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    class_axis: int = -1,
    dtype: DTypeLike | None = None,
    block_size: int | None = None,
    recompute: bool | None = None,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of a linear layer's outputs, without their logits: the loss of a language model's head.

    Equals `softmax_cross_entropy_with_integer_labels(x @ w + bias, labels, …)`, reduced over rows, in about the time
    of its three matmuls. It is `fused_linear` of that loss: every mode of differentiation works, and what no gradient
    is asked for costs nothing.

    Args:
        x: floating, [..., D].
        w: floating, [D, K], or [K, D] with class_axis=0.
        labels: integer, [...].
        bias: floating, [K], default none.
        weights: real, [...], default all ones: the weight of each row.
        reduction: "mean" (default): Σ weights·loss / Σ weights over the rows not ignored, times the class weight of the
            row's label where `class_weights` is given (as PyTorch does), or / `normalizer`; 0 where that divisor is 0.
            "sum": Σ weights·loss. "none": weights·loss of each row.
        normalizer: real scalar, default none, for the mean only: what to divide by, as a global token count for
            gradient accumulation and data parallelism.
        ignore_index, label_smoothing, class_weights, logit_cap, z_loss: as in
            `softmax_cross_entropy_with_integer_labels`.
        class_axis, dtype: as in `fused_linear`.
        block_size: rows per block as in `fused_linear`; where classes are blocked, classes per block, a multiple of
            128. Default chosen from the shapes (see `jaxce._row_blocks` and `jaxce._class_blocks`).
        recompute: block classes, not rows, and compute the logits again in the backward pass: 4 matmuls instead of 3,
            but no accumulator of the size of `w`. Default False; always so for reduction="none", and on one CPU device
            where `w` is narrower than the sums and no `block_size` is given (it takes about as long there).
        axis_name: inside `jax.shard_map` (with check_vma=True), the mesh axis that the classes are split over, default
            none. `w`, `bias` and `class_weights` are this shard's; labels count from the first class of the first
            shard; every shard holds equally many classes (a bias of −inf masks what is too many, where neither
            label_smoothing nor logit_cap is used).

    Returns:
        The loss, float32 (float64 for float64 operands): [], or [...] for reduction="none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or an option is wrong, or there is no class.

    A row ignored has loss 0 and gradient exactly 0 whatever `x` holds there. When all are ignored, or there are none,
    a mean is 0 with zero gradients. Any other row whose label is outside [0, K) makes the loss NaN; `check_labels`
    names it.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> x, w, labels = jnp.ones((2, 3)), jnp.eye(3, 4), jnp.array([0, 3])
        >>> print(f"{jaxce.linear_cross_entropy(x, w, labels):.4f}")
        1.7143
        >>> dx, dw = jax.grad(jaxce.linear_cross_entropy, (0, 1))(x, w, labels)

    Source: `softmax_cross_entropy_with_integer_labels` and `fused_linear`.
    """
    function = "linear_cross_entropy"
    _check_options(function, reduction, class_axis, dtype, block_size)
    layer, x, w, bias = Layer.of(function, x, w, bias, class_axis, dtype)
    labels = _checks.integer(function, "labels", labels)
    _checks.shape(function, "labels", labels, x.shape[:-1], "one label for each row of x")
    weights, normalizer = _check_weights(function, weights, normalizer, labels.shape, reduction, layer)
    given = dict(label_smoothing=label_smoothing, class_weights=class_weights, logit_cap=logit_cap, z_loss=z_loss)
    shards = ClassShards(layer.classes, axis_name)
    options = Options.of(function, layer.sum_dtype, x.ndim, shards, given)
    x, selection = _masked(function, x, labels, ignore_index, shards)
    if reduction == "mean" and normalizer is None:
        normalizer = _mean_divisor(layer, options, weights, selection, shards)
    narrow = w.dtype.itemsize < layer.sum_dtype.itemsize and layer.devices == 1
    if reduction == "none" or (narrow if recompute is None else recompute):
        scale = weights if reduction == "none" else _row_scale(reduction, weights, normalizer, labels.shape, layer)
        return _by_classes(layer, x, w, bias, selection, scale, reduction, options, block_size, axis_name)
    if options.class_weights is not None:
        given["class_weights"] = options.class_weights.ravel()
    fused_options = reduction, False, class_axis, dtype, block_size, row_parts(x)
    return _by_rows(x, w, bias, labels, selection.row_mask, weights, normalizer, given, axis_name, fused_options)


def _masked(function, x, labels, ignore_index, shards) -> tuple[Array, Selection]:
    """Rows to ignore are masked, and their x set to 0: a NaN there, times a gradient of 0, would reach dw."""
    row_mask = None
    if ignore_index is not None:
        row_mask = ~_labels.ignored(function, labels, ignore_index)
        x = jnp.where(row_mask[..., None], x, 0)
    return x, Selection(_labels.class_ids(labels, None, row_mask, shards), None, row_mask)


def _mean_divisor(layer: Layer, options: Options, weights, selection: Selection, shards: ClassShards) -> Array:
    divisor = jnp.ones(selection.labels.shape, layer.sum_dtype) if weights is None else weights
    if options.class_weights is not None:
        class_weight = _labels.label_weight(selection.labels, options.class_weights, selection.row_mask, shards)
        divisor = divisor * class_weight
    return jnp.sum(divisor if selection.row_mask is None else jnp.where(selection.row_mask, divisor, 0))


def _by_classes(layer, x, w, bias, selection, scale, reduction, options, block_size, axis_name) -> Array:
    """Each loss times `scale`, or their sum. The loss is ordinary JAX of the rows' numbers."""
    shards = ClassShards(layer.classes, axis_name)

    def loss_of(x, w, bias, selection, scale, options):
        # In shard_map varying as the losses do: gradients are then each shard's own, and summed later.
        options = jax.tree.map(lambda a: varying_as(a, x, selection.labels), options)
        others = with_uniform_targets(Values(None, logit_cap=options.logit_cap), options, x.ndim, layer.sum_dtype)
        row = class_blocked_rows(layer, Inputs(x, w, bias, others), selection, block_size, axis_name)
        loss = combined(row, options, selection, shards)
        loss = loss if scale is None else scale * loss
        return loss if reduction == "none" else jnp.sum(loss)

    axes = selection.labels.ndim if reduction == "none" else 0
    return in_auto(loss_of, x, axes, x, w, bias, selection, scale, options)


def _by_rows(x, w, bias, labels, row_mask, weights, normalizer, given, axis_name, fused_options):
    arrays = {name: option for name, option in given.items() if isinstance(option, Array)}

    def loss_of(x, w, labels, row_mask, bias, weights, normalizer, arrays):
        # In shard_map varying as the losses do, as fused_linear asks of what a loss closes over.
        arrays = {name: varying_as(option, x, labels) for name, option in arrays.items()}
        loss_fn = functools.partial(_loss_of_block, **given | arrays, axis_name=axis_name)
        loss = _fused(loss_fn, *fused_options)
        return loss(x, w, labels, row_mask, bias=bias, weights=weights, normalizer=normalizer)

    return in_auto(loss_of, x, 0, x, w, labels, row_mask, bias, weights, normalizer, arrays)


def _loss_of_block(logits, labels, row_mask, **options):
    return softmax_cross_entropy_with_integer_labels(logits, labels, where=row_mask, **options)


def _check_options(function, reduction, class_axis, dtype, block_size):
    if reduction not in ("mean", "sum", "none"):
        raise _checks.value_error(function, "reduction", repr(reduction), "'mean', 'sum' or 'none'")
    if class_axis not in (-1, 0):
        raise _checks.value_error(function, "class_axis", repr(class_axis), "-1 for w [D, K] or 0 for w [K, D]")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise _checks.type_error(function, "dtype", repr(dtype), "a floating dtype")
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise _checks.value_error(function, "block_size", repr(block_size), "a positive int")


def _check_weights(function, weights, normalizer, lead, reduction, layer):
    if weights is not None:
        weights = _checks.real(function, "weights", weights).astype(layer.sum_dtype)
        _checks.shape(function, "weights", weights, lead, "one weight for each row of x")
    if normalizer is not None:
        if reduction != "mean":
            raise _checks.value_error(function, "normalizer", f"given with reduction={reduction!r}", "it with 'mean'")
        normalizer = _checks.scalar(function, "normalizer", normalizer, layer.sum_dtype)
    return weights, normalizer


def _row_scale(reduction, weights, normalizer, lead, layer):
    """g, what each row's loss is multiplied by. Here, not after the sum, so that gradients need no second scaling."""
    scale = jnp.ones(lead, layer.sum_dtype) if weights is None else weights
    if reduction == "sum":
        return scale
    divisor = scale.sum() if normalizer is None else normalizer
    return jnp.where(divisor == 0, 0, scale / jnp.where(divisor == 0, 1, divisor))
