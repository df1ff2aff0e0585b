r"""Losses of a linear layer's outputs that never hold more than a block of the logits.

For a block of B rows x, logits z = x·W + b, a row-wise loss ℓ, and the losses' cotangents g, with δ = g ⊙ ∂ℓ/∂z:

    dx = δ·Wᵀ        dW = Σ_blocks xᵀ·δ        db = Σ_rows δ

`_sweep` is this loop, over blocks of rows. It differentiates ℓ with `jax.vjp` and knows nothing else of it. Then

* a scalar Σ_i g_i ℓ_i knows g beforehand. Its derivative along (ẋ, Ẇ, …) is ⟨dx, ẋ⟩ + ⟨dW, Ẇ⟩ + …, so the sweep that
  computes the losses finishes dx, dW, … while a block's logits are live, and reverse mode, which transposes that sum,
  only scales them: 3 matmuls. Without differentiation only the losses are computed: 1 matmul.
* losses per row learn g in the backward pass: their pullback is the sweep, 4 matmuls.

Softmax cross-entropy can also be blocked over classes (`_class_blocks_forward`), in 4 matmuls and without a float32
accumulator of W's size: its loss needs of a row only the running sums that the log-normalizer is made of.

Blocks of rows
--------------
Every block reads all of W and updates all of dW, which costs about 19/B of the matmuls' time, so B should not be below
128; beyond 512 nothing is gained. In between, B is the largest power of two whose float32 logits fit in 32 MiB (larger
buffers are new pages each time on a CPU), and is then made smaller to split the rows evenly. Block j holds the rows
j, n + j, 2n + j, … of n blocks, so that a sharded batch axis stays where it is. dW is updated in place in tiles of
about 3·2¹⁸ numbers, 3 MiB; updated at once, the update would be a second buffer of W's size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

from . import _checks
from ._losses import _Options, softmax_cross_entropy_with_integer_labels

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
    `loss_fn(x @ w + bias, *row_args)`, reduced over rows, returns, and takes the time of its three matmuls. Every mode
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
        block_size: rows per block, at most; default chosen from K (see `jaxce._linear`).

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
    function = "fused_linear"
    _check_options(function, reduction, class_axis, dtype, block_size)

    def fused(x, w, *row_args, bias=None, weights=None, normalizer=None):
        layer, x, w, bias = _Layer.of(function, x, w, bias, class_axis, dtype)
        lead = x.shape[:-1]
        row_args = jax.tree.map(lambda a: _checks_lead(function, "row_args", jnp.asarray(a), lead), row_args)
        weights, normalizer = _check_weights(function, weights, normalizer, lead, reduction, layer)

        rows = _Rows.of(lead, block_size or _rows_per_block(layer.classes))
        x, row_args = jax.tree.map(rows.split, (x, row_args))
        block_loss, consts = _hoist(function, loss_fn, has_aux, layer, x, row_args)
        inputs = _Inputs(x, w, bias, row_args, consts)
        sweep = functools.partial(_sweep, layer, block_loss)
        if reduction == "none":
            losses, aux = _with_pullback(sweep, lambda inputs, _, g, moving: sweep(inputs, g, moving)[0][1])(inputs)
            out = rows.join(losses)
            out = out if weights is None else weights * out
        else:
            scale = _row_scale(reduction, weights, normalizer, lead, layer)
            out, aux = _with_gradients(sweep)(inputs, rows.split(scale, repeat=False))
        return (out, jax.tree.map(rows.join, aux)) if has_aux else out

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
    recompute: bool = False,
) -> Array:
    """Softmax cross-entropy of a linear layer's outputs, without their logits: the loss of a language model's head.

    Equals `softmax_cross_entropy_with_integer_labels(x @ w + bias, labels, …)`, reduced over rows, and takes the time
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
            128. Default chosen from the shapes (see `jaxce._linear`).
        recompute: block classes, not rows, and compute the logits again in the backward pass: 4 matmuls instead of 3,
            but no accumulator of the size of `w`. Default False; always so for reduction="none".

    Returns:
        The loss, float32 (float64 for float64 operands): [], or [...] for reduction="none".

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or an option is wrong, or there is no class.

    A row ignored has loss 0 and gradient exactly 0 whatever `x` holds there. When all are ignored, or there are none,
    a mean is 0 with zero gradients. Any other row whose label is outside [0, K) makes the loss NaN.

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
    layer, x, w, bias = _Layer.of(function, x, w, bias, class_axis, dtype)
    lead = x.shape[:-1]
    labels = _checks_lead(function, "labels", _checks.integer(function, "labels", labels), lead, exact=True)
    weights, normalizer = _check_weights(function, weights, normalizer, lead, reduction, layer)

    like = jax.ShapeDtypeStruct((1, layer.classes), layer.sums)
    options = _Options.of(function, like, None, label_smoothing, class_weights, logit_cap, z_loss)

    kept = None
    if ignore_index is not None:
        kept = labels != _checks.scalar(function, "ignore_index", ignore_index, labels.dtype)
        x = jnp.where(kept[..., None], x, 0)  # or a NaN there, times a gradient of 0, would reach dw
        labels = jnp.where(kept, labels, 0)
    if reduction == "mean" and normalizer is None:
        counted = jnp.ones(lead, layer.sums) if weights is None else weights
        if options.class_weights is not None:
            counted = counted * _class_weight_of(labels, options.class_weights)
        normalizer = jnp.sum(counted if kept is None else jnp.where(kept, counted, 0))

    if recompute or reduction == "none":
        losses = _class_blocked_losses(layer, x, w, bias, labels, options, block_size)
        losses = losses if kept is None else jnp.where(kept, losses, 0)
        if reduction == "none":
            return losses if weights is None else weights * losses
        return jnp.sum(_row_scale(reduction, weights, normalizer, lead, layer) * losses)

    def loss_fn(logits, labels, kept):
        return softmax_cross_entropy_with_integer_labels(
            logits,
            labels,
            where=kept,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            logit_cap=logit_cap,
            z_loss=z_loss,
        )

    loss = fused_linear(loss_fn, reduction=reduction, class_axis=class_axis, dtype=dtype, block_size=block_size)
    return loss(x, w, labels, kept, bias=bias, weights=weights, normalizer=normalizer)


def _class_weight_of(labels, class_weights):
    """NaN where the label is no class; reading class_weights[-1] there, as indexing would, could hide it."""
    known = (labels >= 0) & (labels < class_weights.size)
    return jnp.where(known, class_weights.ravel()[jnp.where(known, labels, 0)], jnp.nan)


# Arguments


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
        weights = _checks.real(function, "weights", weights).astype(layer.sums)
        _checks.shape(function, "weights", weights, lead, "one weight for each row of x")
    if normalizer is not None:
        if reduction != "mean":
            raise _checks.value_error(
                function, "normalizer", f"given for reduction={reduction!r}", "one for the mean only"
            )
        normalizer = _checks.scalar(function, "normalizer", normalizer, layer.sums)
    return weights, normalizer


def _checks_lead(function, argument, array, lead, exact=False):
    if array.shape[: array.ndim if exact else len(lead)] != lead:
        raise _checks.value_error(
            function, argument, f"of shape {array.shape}", f"{lead}{'' if exact else ' first'}, as x"
        )
    return array


def _row_scale(reduction, weights, normalizer, lead, layer):
    """g, what each row's loss is multiplied by. Here, not after the sum, so that gradients need no second scaling."""
    scale = jnp.ones(lead, layer.sums) if weights is None else weights
    if reduction == "sum":
        return scale
    divisor = scale.sum() if normalizer is None else normalizer
    return jnp.where(divisor == 0, 0, scale / jnp.where(divisor == 0, 1, divisor))


def _rows_per_block(classes: int) -> int:
    fitting = (32 * 2**20) // (4 * classes)
    return min(512, max(128, 2 ** max(0, fitting.bit_length() - 1)))


class _Rows(NamedTuple):
    """How arrays [*lead, ...] are split into n blocks of B rows, [n, B, ...]; a few rows are repeated to fill them."""

    lead: tuple[int, ...]
    blocks: int  # n
    size: int  # B

    @classmethod
    def of(cls, lead: tuple[int, ...], most: int) -> "_Rows":
        rows = math.prod(lead)
        blocks = -(-rows // most)
        return cls(lead, blocks, max(1, -(-rows // max(1, blocks))))

    def split(self, a: Array, repeat: bool = True) -> Array:
        rows, rest = math.prod(self.lead), a.shape[len(self.lead) :]
        a = a.reshape(rows, *rest)
        if extra := self.blocks * self.size - rows:
            # Rows of zeros could make a loss NaN that is not; rows that are there already cannot. Their g is 0.
            fill = a[:extra] if repeat else jnp.zeros((extra, *rest), a.dtype)
            a = jnp.concatenate([a, fill])
        return jnp.moveaxis(a.reshape(self.size, self.blocks, *rest), 1, 0)

    def join(self, a: Array) -> Array:
        rest = a.shape[2:]
        a = jnp.moveaxis(a, 0, 1).reshape(self.blocks * self.size, *rest)
        return a[: math.prod(self.lead)].reshape(*self.lead, *rest)


class _Layer(NamedTuple):
    """The three matmuls, for either layout of W."""

    classes: int  # K
    class_axis: int  # of w: 1 for [D, K], 0 for [K, D]
    operands: jnp.dtype
    sums: jnp.dtype  # of what is accumulated: float32 or float64

    @classmethod
    def of(cls, function, x, w, bias, class_axis, dtype) -> tuple["_Layer", Array, Array, Array | None]:
        x, w = _checks.floating(function, "x", x), _checks.floating(function, "w", w)
        if w.ndim != 2:
            raise _checks.value_error(function, "w", f"of shape {w.shape}", "two axes, [D, K] or [K, D]")
        classes, features = w.shape[class_axis], w.shape[1 + class_axis]
        if x.ndim == 0 or x.shape[-1] != features:
            raise _checks.value_error(function, "x", f"of shape {x.shape}", f"[..., {features}], for w {w.shape}")
        if classes == 0:
            raise _checks.value_error(function, "w", f"of shape {w.shape}", "at least one class")
        if bias is not None:
            bias = _checks.floating(function, "bias", bias)
            _checks.shape(function, "bias", bias, (classes,), "one number for each class")
        operands = jnp.result_type(x, w) if dtype is None else jnp.dtype(dtype)
        sums = jnp.dtype(jnp.float64 if operands == jnp.float64 else jnp.float32)
        return cls(classes, class_axis % 2, operands, sums), x, w, bias

    def logits(self, x: Array, w: Array, bias: Array | None) -> Array:
        z = self._dot(x, 1, w, 1 - self.class_axis)
        return z if bias is None else z + bias.astype(self.sums)[None]  # [B, K]

    def dx(self, dz: Array, w: Array) -> Array:
        return self._dot(dz, 1, w, self.class_axis)  # [B, D]

    def dw(self, x: Array, dz: Array) -> Array:
        return self._dot(x, 0, dz, 0) if self.class_axis else self._dot(dz, 0, x, 0)

    def add_dw(self, total: Array, x: Array, dz: Array) -> Array:
        """total + dw(x, dz), in place and tile by tile."""

        def add(total, start, size):
            update = self.dw(x, lax.dynamic_slice_in_dim(dz, start, size, 1))
            update = update + lax.dynamic_slice_in_dim(total, start, size, self.class_axis)
            return lax.dynamic_update_slice_in_dim(total, update, start, self.class_axis)

        return _over_classes(add, total, self.classes, 3 * 2**18 // max(1, x.shape[1]))

    def _dot(self, a: Array, a_axis: int, b: Array, b_axis: int) -> Array:
        a, b = a.astype(self.operands), b.astype(self.operands)
        return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=self.sums)


def _over_classes(step, carry, classes: int, fitting: int):
    """`step(carry, start, size)` for blocks of about `fitting` classes, the last one smaller: nothing is padded.

    Their size is a multiple of 128: with any other, a TPU copies the whole of w.
    """
    size = min(classes, max(128, fitting // 128 * 128))
    whole = classes // size
    carry, _ = lax.scan(lambda carry, i: (step(carry, i * size, size), None), carry, jnp.arange(whole, dtype=jnp.int32))
    rest = classes - whole * size
    return step(carry, whole * size, rest) if rest else carry


# The sweep over blocks of rows


class _Inputs(NamedTuple):
    """What a sweep can be differentiated with respect to."""

    x: Array  # [n, B, D]
    w: Array
    bias: Array | None  # [K]
    rows: Any  # row arguments, [n, B, ...]
    consts: list[Array]  # arrays that the loss closes over


def _hoist(function, loss_fn, has_aux, layer, x, rows):
    """`loss_fn` as a function of what it closes over too, which the rules below could not see otherwise.

    `jax.closure_convert` does this for floating tracers only; a closed-over integer tracer would leak.
    """

    def block_loss(logits, *rows):
        losses, aux = loss_fn(logits, *rows) if has_aux else (loss_fn(logits, *rows), None)
        size = logits.shape[0]
        if jnp.shape(losses) != (size,) or not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
            got = f"{jnp.result_type(losses)}{list(jnp.shape(losses))}"
            raise _checks.value_error(function, "the result of loss_fn", got, f"floating losses of shape ({size},)")
        aux = jax.tree.map(lambda a: _checks_lead(function, "aux of loss_fn", jnp.asarray(a), (size,)), aux)
        return losses.astype(layer.sums), aux

    logits = jax.ShapeDtypeStruct((x.shape[1], layer.classes), layer.sums)
    block = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
    closed, shapes = jax.make_jaxpr(block_loss, return_shape=True)(logits, *block)
    treedef = jax.tree.structure(shapes)

    def hoisted(consts, logits, *rows):
        outs = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves((logits, rows)))
        return jax.tree.unflatten(treedef, outs)

    return hoisted, [jnp.asarray(c) for c in closed.consts]


def _sweep(layer, block_loss, inputs: Any, g: Any = None, moving: Any = None):
    """((losses [n, B], gradients), aux): the gradients of Σ g·losses, with None for inputs not `moving`."""
    w = inputs.w.astype(layer.operands)

    # Where the sweep is itself differentiated, the checkpoint keeps the residuals of a block from being stacked.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(totals, slices):
        x, rows, g = slices
        z = layer.logits(x, w, inputs.bias)
        if g is None:
            return totals, block_loss(inputs.consts, z, *rows)

        def loss(z, others):
            rows, consts = others
            return block_loss(consts, z, *rows)

        losses, aux, dz, (drows, dconsts) = _pull_moving(
            loss, z, (rows, inputs.consts), (moving.rows, moving.consts), g
        )
        dw, dbias, total_dconsts = totals
        dx = layer.dx(dz, w).astype(inputs.x.dtype) if moving.x else None
        dw = layer.add_dw(dw, x, dz) if moving.w else None
        dbias = dbias + dz.sum(0) if moving.bias else None
        dconsts = jax.tree.map(jnp.add, total_dconsts, dconsts)
        return (dw, dbias, dconsts), (losses, aux, dx, drows)

    if g is None:
        _, (losses, aux) = lax.scan(block, None, (inputs.x, inputs.rows, None))
        return losses, aux

    def zeros(a, moves, dtype):
        return jnp.zeros(a.shape, dtype) if moves else None

    totals = (
        zeros(inputs.w, moving.w, layer.sums),
        zeros(inputs.bias, moving.bias, layer.sums),
        jax.tree.map(lambda c, moves: zeros(c, moves, c.dtype), inputs.consts, moving.consts),
    )
    (dw, dbias, dconsts), (losses, aux, dx, drows) = lax.scan(block, totals, (inputs.x, inputs.rows, g))
    dw = dw.astype(inputs.w.dtype) if moving.w else None
    dbias = dbias.astype(inputs.bias.dtype) if moving.bias else None
    return (losses, _Inputs(dx, dw, dbias, drows, dconsts)), aux


def _pull_moving(loss, z, others, moving, g):
    """losses, aux, and the pullback of g to z and to those of `others` that move (None for the rest)."""
    leaves, treedef = jax.tree.flatten(others)
    flags = jax.tree.leaves(moving)

    def of_moving(z, values):
        values = iter(values)
        merged = [next(values) if moves else a for a, moves in zip(leaves, flags, strict=True)]
        return loss(z, jax.tree.unflatten(treedef, merged))

    values = [a for a, moves in zip(leaves, flags, strict=True) if moves]
    losses, pull, aux = jax.vjp(of_moving, z, values, has_aux=True)
    dz, dvalues = pull(g)
    dvalues = iter(dvalues)
    dothers = jax.tree.unflatten(treedef, [next(dvalues) if moves else None for moves in flags])
    return losses, aux, dz, dothers


# Cross-entropy by blocks of classes


class _Head(NamedTuple):
    x: Array  # [N, D]
    w: Array
    bias: Array | None  # [K]
    logit_cap: Array | None  # []
    class_weights: Array | None  # [K], of the smoothed targets
    labels: Array  # [N] int32, −1 for what is no class


class _HeadStatistics(NamedTuple):
    """Per row [N]; the letters are those of `jaxce._softmax`."""

    label_loss: Array  # −log o_y
    spread: Array | None  # −Σ_k c_k log o_k, for label smoothing
    shift: Array  # m, not differentiated: in m + L it cancels
    log_sum: Array  # L


def _class_blocked_losses(layer, x, w, bias, labels, options, block_size):
    lead, rows = labels.shape, labels.size
    if block_size is not None and block_size % 128:
        raise _checks.value_error("linear_cross_entropy", "block_size", block_size, "a multiple of 128 classes")
    fitting = block_size or 2**23 // max(1, rows)  # float32 logits of 32 MiB
    smooth = options.label_smoothing is not None
    c = None if options.class_weights is None else options.class_weights.ravel()
    known = (labels >= 0) & (labels < layer.classes)
    labels = jnp.where(known, labels, 0).astype(jnp.int32) - (~known).astype(jnp.int32)
    head = _Head(x.reshape(rows, x.shape[-1]), w, bias, options.logit_cap, c if smooth else None, labels.ravel())
    forward = functools.partial(_head_forward, layer, fitting, smooth)
    stats, _ = _with_pullback(forward, functools.partial(_head_pullback, layer, fitting))(head)

    loss = stats.label_loss
    if c is not None:
        loss = _class_weight_of(head.labels, c) * loss
    if smooth:
        loss = (1 - options.label_smoothing) * loss + options.label_smoothing / layer.classes * stats.spread
    if options.z_loss is not None:
        loss = loss + options.z_loss * (stats.shift + stats.log_sum) ** 2
    return loss.reshape(lead)


def _head_block(layer, head, start, size):
    """w, class weights [1, C], uncapped logits [N, C], and which of them are the labels', for one block of classes."""
    w = lax.dynamic_slice_in_dim(head.w, start, size, layer.class_axis)
    bias = None if head.bias is None else lax.dynamic_slice_in_dim(head.bias, start, size)
    c = jnp.ones((1, 1), layer.sums)
    if head.class_weights is not None:
        c = lax.dynamic_slice_in_dim(head.class_weights, start, size)[None]
    z = layer.logits(head.x, w, bias)
    label = start + lax.broadcasted_iota(jnp.int32, z.shape, 1) == head.labels[:, None]
    return w, c, z, label


def _cap(z, logit_cap):
    return z if logit_cap is None else logit_cap * jnp.tanh(z / logit_cap)


def _head_forward(layer, fitting, smooth, head):
    """Running maximum m and Σ exp(z − m) without the label, as in `jaxce._softmax`, which explains why without."""
    rows = head.labels.size
    lowest = jnp.finfo(layer.sums).min  # not −inf: −inf − −inf is NaN

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
    def step(carry, start, size):
        m, rest, label_logit, spread, mass = carry
        _, c, z, label = _head_block(layer, head, start, size)
        z = _cap(z, head.logit_cap)
        label_logit = label_logit + jnp.where(label, z, 0).sum(1)
        new_m = jnp.maximum(m, z.max(1))
        rest = rest * jnp.exp(m - new_m) + jnp.where(label, 0, jnp.exp(z - new_m[:, None])).sum(1)
        if smooth:
            spread = spread + mass * (new_m - m) + jnp.where(c == 0, 0, c * (new_m[:, None] - z)).sum(1)
            mass = mass + (c.sum() if c.size == size else size)
        return new_m, rest, label_logit, spread, mass

    zeros = jnp.zeros((rows,), layer.sums)
    carry = (zeros + lowest, zeros, jnp.where(head.labels < 0, jnp.nan, zeros), zeros, jnp.zeros((), layer.sums))
    m, rest, label_logit, spread, mass = _over_classes(step, carry, layer.classes, fitting)
    log_sum = jnp.log1p(rest + jnp.expm1(label_logit - m))
    log_sum = jnp.where(jnp.isfinite(m) & (m > lowest), log_sum, jnp.nan)
    return _HeadStatistics((m - label_logit) + log_sum, spread + mass * log_sum if smooth else None, m, log_sum), None


def _head_pullback(layer, fitting, head, stats, g, moving):
    """dz_k = A·o_k − g_y·onehot_k − g_s·c_k, A = g_y + g_s·Σc + g_lse; at the label, o_y − 1 = expm1(−label_loss)."""
    m, log_sum = stats.shift[:, None], stats.log_sum[:, None]
    g_label, g_lse = g.label_loss[:, None], g.log_sum[:, None]
    g_spread = None if g.spread is None else g.spread[:, None]
    if g_spread is not None:
        g_lse = g_lse + g_spread * (layer.classes if head.class_weights is None else head.class_weights.sum())

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
    def step(grads, start, size):
        w, c, raw, label = _head_block(layer, head, start, size)
        z, uncap = jax.vjp(_cap, raw, head.logit_cap)
        o = jnp.exp((z - m) - log_sum)
        dz = jnp.where(label, g_label * jnp.expm1(-stats.label_loss)[:, None] + g_lse * o, (g_label + g_lse) * o)
        dz = dz if g_spread is None else dz - g_spread * c
        draw, dcap = uncap(dz)

        def put(total, part, axis=0):
            return lax.dynamic_update_slice_in_dim(total, part.astype(total.dtype), start, axis)

        return grads._replace(
            x=grads.x + layer.dx(draw, w) if moving.x else None,
            w=put(grads.w, layer.dw(head.x, draw), layer.class_axis) if moving.w else None,
            bias=put(grads.bias, draw.sum(0)) if moving.bias else None,
            logit_cap=grads.logit_cap + dcap if moving.logit_cap else None,
            class_weights=put(grads.class_weights, jnp.sum(g_spread * ((m - z) + log_sum), 0))
            if moving.class_weights
            else None,
        )

    zeros = jax.tree.map(lambda a, moves: jnp.zeros_like(a) if moves else None, head, moving)
    zeros = zeros if zeros.x is None else zeros._replace(x=zeros.x.astype(layer.sums))
    grads = _over_classes(step, zeros, layer.classes, fitting)
    return grads if grads.x is None else grads._replace(x=grads.x.astype(head.x.dtype))


# Rules of differentiation


def _with_gradients(sweep):
    """(inputs, g) → (Σ g·losses, aux), whose rule for the tangent has the gradients from the same sweep."""

    @jax.custom_jvp
    def total(inputs, g):
        losses, aux = sweep(inputs)
        return jnp.sum(g * losses), aux

    def jvp(primals, rates):
        inputs, g = primals
        (losses, grads), aux = _whole(functools.partial(sweep, moving=_moving(rates[0])))(inputs, g)
        gradients = [*jax.tree.leaves(grads), *([] if _is_zero(rates[1]) else [losses])]
        products = [
            jnp.sum(gradient.astype(losses.dtype) * rate.astype(losses.dtype))
            for gradient, rate in zip(gradients, _nonzero(rates), strict=True)
        ]
        return (jnp.sum(g * losses), aux), (sum(products, jnp.zeros((), losses.dtype)), _zero_rates(aux))

    total.defjvp(jvp, symbolic_zeros=True)
    return total


def _with_pullback(forward, pull):
    """inputs → (out, aux), differentiated by `pull(inputs, out, cotangent, moving)`, the gradients of the inputs.

    The pullback is linear in the cotangent, so its transpose is the rule for the tangent (see `jaxce._autodiff`). The
    checkpoint makes `inputs` and `out` all that is saved.
    """

    @jax.custom_jvp
    def rule(inputs):
        return forward(inputs)

    def jvp(primals, rates):
        (inputs,) = primals
        moving = _moving(rates[0])
        out, aux = rule(inputs)
        gradients = _whole(lambda *args: (jax.tree.leaves(pull(*args, moving)), None))

        def push(inputs, out, rates):
            # jax.linear_transpose would do, but before jax 0.10 it cannot transpose a scan.
            pullback = lambda g: gradients(inputs, out, g)[0]  # noqa: E731
            return jax.vjp(pullback, jax.tree.map(jnp.zeros_like, out))[1](rates)[0]

        return (out, aux), (_lean(push)(inputs, out, _nonzero(rates)), _zero_rates(aux))

    rule.defjvp(jvp, symbolic_zeros=True)
    return rule


def _whole(f):
    """`f`, which returns (out, aux), for use inside a rule of differentiation.

    While a rule is evaluated, JAX splits every scan in it into what depends on tangents and what does not, even if
    nothing does; that drops its checkpoints and moves loop-invariant arrays of the logits' size out of the loop (three
    times the memory). A custom_jvp function is not split, and says how to be differentiated if it must be.
    """

    @jax.custom_jvp
    def whole(*args):
        return f(*args)

    def jvp(args, rates):
        leaves, treedef = jax.tree.flatten(args)
        flags = jax.tree.leaves(_moving(rates))

        def along(leaves, rates):
            def of_moving(values):
                values = iter(values)
                merged = [next(values) if moves else a for a, moves in zip(leaves, flags, strict=True)]
                return f(*jax.tree.unflatten(treedef, merged))

            values = [a for a, moves in zip(leaves, flags, strict=True) if moves]
            return jax.jvp(of_moving, (values,), (rates,), has_aux=True)

        out, rate, aux = _lean(along)(leaves, _nonzero(rates))
        return (out, aux), (rate, _zero_rates(aux))

    whole.defjvp(jvp, symbolic_zeros=True)
    return whole


def _lean(f):
    return jax.checkpoint(f, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)


def _is_zero(rate) -> bool:
    return isinstance(rate, SymbolicZero)


def _moving(rates):
    return jax.tree.map(lambda rate: not _is_zero(rate), rates, is_leaf=_is_zero)


def _nonzero(rates) -> list[Array]:
    return [rate for rate in jax.tree.leaves(rates, is_leaf=_is_zero) if not _is_zero(rate)]


def _zero_rates(aux):
    def zero(a):
        floating = jnp.issubdtype(a.dtype, jnp.inexact)
        return jnp.zeros_like(a) if floating else np.zeros(a.shape, jax.dtypes.float0)

    return jax.tree.map(zero, aux)
