"""`label_statistics` of a linear layer's outputs, by blocks of classes."""

import functools
from typing import SupportsIndex

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from . import _checks
from ._checks import Arrays
from ._class_blocks import class_blocked_rows
from ._linear import compiled_once
from ._linear_arguments import check_options, for_blocks, selected
from ._losses import LabelStatistics, statistics_of
from ._matmuls import Inputs, Layer
from ._options import Options, Selection, Values
from ._row_blocks import row_parts
from ._sharding import ClassShards, in_auto, mesh_axes, varying_over


def linear_label_statistics(
    x: Arrays,
    w: Arrays,
    labels: Arrays,
    *,
    bias: Arrays | None = None,
    where: Arrays | None = None,
    ignore_index: ArrayLike | None = None,
    class_mask: Arrays | None = None,
    logit_cap: ArrayLike | None = None,
    class_axis: SupportsIndex = -1,
    dtype: DTypeLike | None = None,
    block_size: SupportsIndex | None = None,
    axis_name: str | None = None,
) -> LabelStatistics:
    """`label_statistics` of a linear layer's outputs without their logits: what a policy needs of a language model.

    It equals `label_statistics(x @ w + bias, labels)`, by blocks of classes: one matmul, and with gradients of x and w
    four, for any number of the statistics. What is saved is x, w, labels and numbers per row. Every differentiation
    mode works. PPO, GRPO, an entropy bonus or a KL estimate are then plain JAX on numbers per row.

    Args:
        x, w, bias: floating, with shapes [..., num_features], [num_features, num_classes] and [num_classes].
        class_axis: the class axis of w: -1, or 0 for w [num_classes, num_features], as tied embeddings have it.
        labels: integer, with shape [...], in [0, num_classes), counted over all shards.
        where, ignore_index, class_mask, dtype, axis_name: see `linear_cross_entropy`.
        logit_cap: see `softmax_cross_entropy`.
        block_size: classes per block, as in `linear_cross_entropy`.

    Returns:
        `LabelStatistics`, a named tuple of arrays [...], as of `label_statistics`, in float32 (float64 for float64
        operands). Masked and ignored rows have 0, 0, 0, False and gradient exactly 0, whatever `x` holds, and are
        left out as in `linear_cross_entropy`. So have all rows if all classes are masked. Rows with a label that is
        invalid or masked have NaN, NaN, NaN, False.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or an option is wrong, or there is no class.

    Example: a policy gradient with an entropy bonus.
        >>> import jax, jax.numpy as jnp, jaxce
        >>> def loss(w, x, actions, advantages):
        ...     stats = jaxce.linear_label_statistics(x, w, actions)
        ...     return -(stats.log_prob * advantages + 0.01 * stats.entropy).mean()
        >>> x, actions, advantages = jnp.ones((2, 3)), jnp.array([0, 3]), jnp.array([1.0, -0.5])
        >>> print([f"{g:.3f}" for g in jax.grad(loss)(jnp.eye(3, 4), x, actions, advantages)[0]])
        ['-0.425', '0.075', '0.075', '0.276']
    """
    function = "linear_label_statistics"
    class_axis, dtype, block_size = check_options(function, "none", class_axis, dtype, block_size)
    layer, x, w, bias = Layer.of(function, x, w, bias, class_axis, dtype)
    labels = _checks.integer(function, "labels", labels)
    _checks.shape(function, "labels", labels, x.shape[:-1], "one label for each row of x")
    shards = ClassShards(layer.classes, _checks.mesh_axis(function, axis_name))
    options = Options.of(function, layer.sum_dtype, x.ndim, shards, cap=logit_cap)
    selection, _, skips = selected(function, labels.shape, labels, class_mask, ignore_index, where, None, shards)
    statistics = compiled_once(_statistics, 5, axis_name)
    statistics = functools.partial(statistics, layer, shards, skips, block_size, row_parts(x))
    return in_auto(statistics, x, labels.ndim, x, w, bias, selection, options.logit_cap)


def _statistics(
    layer: Layer, shards, skips, block_size, parts, x: Array, w, bias, selection: Selection, cap
) -> LabelStatistics:
    everything = x, w, bias, selection, cap
    x, w, bias, selection, cap = varying_over(mesh_axes(everything) - mesh_axes(shards.offset()), everything)
    x, of_blocks = for_blocks(x, selection, skips)
    inputs = Inputs(x, w, bias, Values(None, logit_cap=cap))
    row, correct = class_blocked_rows(layer, inputs, of_blocks, block_size, shards, parts, with_entropy=True)
    assert correct is not None
    return statistics_of(row, correct > 0, selection)
