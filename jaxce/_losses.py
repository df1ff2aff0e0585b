"""The losses of logits: the rule of `_rule`, with options."""

from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.experimental import checkify
from jax.typing import ArrayLike

from . import _checks
from ._arguments import classes_last, labelled_rows, with_masks
from ._checks import Arrays, Axes
from ._labels import ignored, signed
from ._options import Options, Selection, Values, combined, statistics_dtype, values_of
from ._rule import Row
from ._sharding import in_auto
from ._softmax import row_statistics


def softmax_cross_entropy(
    logits: Arrays,
    labels: Arrays,
    axis: Axes = -1,
    where: Arrays | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: Arrays | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of each row with dense targets: E = −Σ_j y_j log o_j, where o = softmax(logits).

    The gradient is analytic: ∂E/∂z = o·Σ_j y_j − y, which is `o − y` for targets that sum to one, and ∂E/∂y = −log o.
    Every differentiation mode works. Options may be traced. A drop-in for `optax.losses.softmax_cross_entropy`.

    Args:
        logits: unnormalized log-probabilities, floating, with shape [..., num_classes].
        labels: target probabilities, or any real weights, that broadcast against `logits`. They need not sum to one.
        axis: the class axis, a tuple for several, or None for all.
        where: bool, True for what takes part. With as many axes as `logits` it masks classes: a masked class has o = 0,
            and its target counts as 0. With the axes of the result it masks rows.
        label_smoothing: ε in [0, 1]. Targets become (1−ε)·y + ε·Σy/K for K unmasked classes (as in PyTorch; not K−1).
        class_weights: real, with shape [num_classes]. They multiply the smoothed targets; nothing is divided by them.
        logit_cap: a soft-cap > 0. Logits become cap·tanh(logits/cap) before anything else.
        z_loss: λ ≥ 0. Adds λ·lse², where lse = log Σ_k exp(logits_k), which keeps the log-normalizer near 0.
        axis_name: inside `jax.shard_map`, the mesh axis that the classes are split over. Each shard passes its part of
            what has a class axis. All hold equally many classes: mask any excess.

    Returns:
        The loss of each row, with shape [...], in float32, or float64 if logits or labels are. Nothing is averaged.
        A row has loss 0 and gradient exactly 0, whatever it holds, if it or all its classes are masked. A logit of −inf
        is a class of probability 0: with target 0 it adds 0 to the loss and to every gradient, else the loss is +inf.
        A row whose largest logit is not finite has loss NaN.

    Raises:
        TypeError: logits are not floating, labels or options not real, `where` not bool, or axes not ints.
        ValueError: shapes do not fit, axes are out of range or repeated, there is no class, or an option is out of
            range. A traced one makes the loss NaN instead.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> z, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 0.5, 0.5])
        >>> bool(jnp.allclose(jax.grad(jaxce.softmax_cross_entropy)(z, y), jax.nn.softmax(z) - y))
        True
        >>> print(f"{jaxce.softmax_cross_entropy(z, y, where=z > 1, label_smoothing=0.1, z_loss=1e-4):.4f}")
        0.8144

    Source: Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990; derived in
    `jaxce/_rule.py`. Label smoothing: arXiv:1512.00567. z-loss: arXiv:2204.02311, section 5. Cap: arXiv:2408.00118.
    """
    function = "softmax_cross_entropy"
    z = _checks.floating(function, "logits", logits)
    targets = _checks.real(function, "labels", labels)
    axes = _checks.class_axes(function, axis, z.shape)
    shape = _checks.dense_shape(function, labels, targets.shape, z.shape, axes)
    z, selection, shards = with_masks(function, jnp.broadcast_to(z, shape), axes, where, axis_name)
    targets = classes_last(targets.reshape((1,) * (len(shape) - targets.ndim) + targets.shape), axes, shape)
    dtype = statistics_dtype(z, targets)
    options = Options.of(function, dtype, z.ndim, shards, label_smoothing, class_weights, logit_cap, z_loss)
    values = values_of(z, targets, z.shape, options, selection, shards)
    row, _ = row_statistics(values, selection, shards)
    return combined(row, options, selection, shards)


def softmax_cross_entropy_with_integer_labels(
    logits: Arrays,
    labels: Arrays,
    axis: Axes = -1,
    where: Arrays | None = None,
    *,
    ignore_index: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: Arrays | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of each row with an integer label: E = −log o_y, where o = softmax(logits).

    The gradient is analytic, `o − onehot(y)`, without a one-hot array. Confident predictions are exact: the usual
    formula rounds their loss, and the gradient at the label, to 0; here both keep float32's accuracy. Every mode of
    differentiation works. Options may be traced. A drop-in for the function of this name in `optax.losses`.

    Args:
        logits: unnormalized log-probabilities, floating, with shape [..., num_classes].
        labels: integer, with shape [...], in [0, num_classes), counted over all shards. Axes of size 1 broadcast.
        axis: the class axis, a tuple for several (labels index the classes flattened in that order), or None for all.
        where: bool, True for what takes part: classes, with as many axes as `logits`, or rows, with those of `labels`.
        ignore_index: rows with this label are masked. Any integer, a class or not.
        label_smoothing, class_weights, logit_cap, z_loss, axis_name: see `softmax_cross_entropy`, where y is onehot(y).

    Returns:
        The loss of each row, with shape [...], in float32, or float64 for float64 logits. Nothing is averaged.
        A row has loss 0 and gradient exactly 0, whatever it holds, if it or all its classes are masked. In other rows a
        label outside [0, num_classes), or of a masked class, makes loss and gradient NaN; `check_labels` finds it. A
        label whose logit is −inf has loss +inf. A row whose largest logit is not finite has loss NaN.

    Raises:
        TypeError: labels or `ignore_index` are not integer, or as for `softmax_cross_entropy`.
        ValueError: as for `softmax_cross_entropy`.

    Example:
        >>> import jax.numpy as jnp, jaxce
        >>> z, y = jnp.array([[1.0, 2.0, 3.0], [30.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), jnp.array([1, 0, -100])
        >>> print([f"{x:.4g}" for x in jaxce.softmax_cross_entropy_with_integer_labels(z, y, ignore_index=-100)])
        ['1.408', '1.872e-13', '0']
    """
    function = "softmax_cross_entropy_with_integer_labels"
    z, selection, shards = labelled_rows(function, logits, labels, axis, where, ignore_index, axis_name)
    dtype = statistics_dtype(z)
    options = Options.of(function, dtype, z.ndim, shards, label_smoothing, class_weights, logit_cap, z_loss)
    values = values_of(z, None, z.shape, options, selection, shards)
    row, _ = row_statistics(values, selection, shards)
    return combined(row, options, selection, shards)


class LabelStatistics(NamedTuple):
    """The four arrays that `label_statistics` and `linear_label_statistics` return, with shape [...]."""

    log_prob: Array
    log_normalizer: Array
    entropy: Array
    correct: Array


def label_statistics(
    logits: Arrays,
    labels: Arrays,
    axis: Axes = -1,
    where: Arrays | None = None,
    *,
    ignore_index: ArrayLike | None = None,
    logit_cap: ArrayLike | None = None,
    axis_name: str | None = None,
) -> LabelStatistics:
    """What policies and metrics need of each row: its label's log-probability, log-normalizer, entropy and accuracy.

    Accelerators compute them in one pass. Every differentiation mode works, by these rules (see `jaxce/_rule.py`):

        ∂ log_prob/∂z = onehot(y) − o        ∂ log_normalizer/∂z = o        ∂ entropy/∂z = −o·(log o + entropy)

    Args:
        logits, labels, axis, where, ignore_index: see `softmax_cross_entropy_with_integer_labels`.
        logit_cap, axis_name: see `softmax_cross_entropy`.

    Returns:
        `LabelStatistics`, a named tuple of arrays [...]: log_prob = log o_y, log_normalizer = log Σ_k exp z_k and
        entropy = −Σ_j o_j log o_j, in nats, in float32 (float64 for float64 logits); and correct, bool, whether the
        label is the arg max (the first of equal logits). Masked rows have 0, 0, 0, False. Rows with an invalid label
        have NaN, NaN, NaN, False. A label whose logit is −inf has log_prob −inf.

    Raises:
        TypeError: logits are not floating, labels or `ignore_index` not integer, or another dtype is wrong.
        ValueError: a shape, an axis or `logit_cap` is wrong, or there is no class.

    Example: a policy gradient with an entropy bonus.
        >>> import jax, jax.numpy as jnp, jaxce
        >>> def loss(logits, action, advantage):
        ...     stats = jaxce.label_statistics(logits, action)
        ...     return -(stats.log_prob * advantage + 0.01 * stats.entropy)
        >>> print([f"{g:.3f}" for g in jax.grad(loss)(jnp.array([1.0, 2.0]), 1, 0.5)])
        ['0.133', '-0.133']
    """
    function = "label_statistics"
    z, selection, shards = labelled_rows(function, logits, labels, axis, where, ignore_index, axis_name)
    options = Options.of(function, statistics_dtype(z), z.ndim, shards, cap=logit_cap)
    row, correct = row_statistics(Values(z, logit_cap=options.logit_cap), selection, shards, with_entropy=True)
    return statistics_of(row, correct > 0, selection)


def statistics_of(row: Row, correct: Array, selection: Selection) -> LabelStatistics:
    """Of rows with labels, 0 and False for those that do not count."""
    found = LabelStatistics(-row.loss, row.shift + row.log_sum, row.entropy, correct)
    mask = selection.row_mask
    return found if mask is None else jax.tree.map(lambda a: jnp.where(mask, a, jnp.zeros_like(a)), found)


def check_labels(
    labels: Arrays, num_classes: SupportsIndex, where: Arrays | None = None, *, ignore_index: ArrayLike | None = None
) -> None:
    """Under `jax.experimental.checkify.checkify`, turns an invalid label into an error that names it and its row.

    Call it beside a loss that is NaN, and run the caller under `checkify` with its user checks. Called with concrete
    labels, outside `jit`, it raises at once. Elsewhere it does nothing, but a compiled caller is dispatched five times
    slower, which is why the losses contain no check.

    Args:
        labels: integer, of any shape.
        num_classes: of all shards together. Labels in [0, num_classes) are valid.
        where: bool, with the shape of `labels`, True for rows that take part.
        ignore_index: rows with this label do not take part.

    Raises:
        TypeError: labels, `num_classes` or `ignore_index` are not integer, or `where` is not bool.
        ValueError: `where` has another shape than `labels`, there is no class, or concrete labels are invalid.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> from jax.experimental.checkify import checkify
        >>> error, _ = jax.jit(checkify(lambda labels: jaxce.check_labels(labels, 5)))(jnp.array([0, 4, 5]))
        >>> print(error.get())
        check_labels: labels has 5 in row 2 (of the flattened batch), wanted 0 to 4 (`check` failed)
    """
    function = "check_labels"
    given = _checks.integer(function, "labels", labels)
    last, labels = _checks.index(function, "num_classes", num_classes, "an int") - 1, signed(given)
    if last < 0:
        raise _checks.value_error(function, "num_classes", num_classes, "at least 1")
    valid = (labels >= 0) & (labels <= min(last, jnp.iinfo(labels.dtype).max))
    if ignore_index is not None:
        valid = valid | ignored(function, given, ignore_index)
    if where is not None:
        mask = _checks.boolean(function, "where", where)
        valid = valid | ~_checks.shape(function, "where", mask, labels.shape, "as labels")
    if labels.size == 0:
        return
    message = f"{function}: labels has {{label}} in row {{row}} (of the flattened batch), wanted 0 to {last}"

    def check(labels, valid):
        row = jnp.argmin(valid.ravel())
        label, good = labels.ravel()[row], valid.all()
        if not isinstance(good, Tracer) and not good:
            raise ValueError(message.format(label=label, row=row))
        checkify.debug_check(good, message, label=label, row=row)

    in_auto(check, labels, 0, labels, valid)
