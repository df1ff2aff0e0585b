"""The losses: options around the rule of `_softmax`. What is here costs numbers per row, never an array of logits."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from . import _checks
from ._arguments import classes_last, labelled_rows, with_masks
from ._labels import ignored, signed
from ._options import Options, Values, combined, masked_mean, statistics_dtype, with_uniform_targets
from ._sharding import in_auto
from ._softmax import row_statistics


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of each row with dense targets: E = −Σ_j y_j log o_j, with o = softmax(logits).

    Its gradient is analytic, ∂E/∂z = o·Σ_j y_j − y, which is `o − y` for targets that sum to one (derived in
    `jaxce._softmax`); ∂E/∂y = −log o. Every differentiation mode works: grad, jvp, jacfwd, hessian, vmap, scan, …
    A drop-in for `optax.losses.softmax_cross_entropy`, with options.

    Args:
        logits: floating, [..., K] for the default axis: unnormalized log-probabilities.
        labels: real, broadcast against `logits`: target probabilities, or any weights (they need not sum to one).
        axis: the class axis, a tuple of them, or None for all; default the last.
        where: bool mask, default none. With as many axes as `logits`: classes that take part; a class masked has
            o = 0, and its target is taken as 0. With the axes of the result: rows that take part.
        label_smoothing: ε in [0, 1], default 0: targets become (1−ε)·t + ε·Σt/K, K the number of classes not masked
            (PyTorch's and optax's convention; not K−1). May be traced.
        class_weights: weights c [K], default none: targets become c ⊙ t, after smoothing (PyTorch's order). The result
            is not divided by anything.
        logit_cap: soft-cap > 0, default none: logits become cap·tanh(logits/cap), before anything else.
        z_loss: λ ≥ 0, default 0: adds λ·lse², lse = log Σ_k exp(logits_k), which keeps the log-normalizer near 0.
        axis_name: inside `jax.shard_map`, the mesh axis that the classes are split over, default none. `logits`,
            dense `labels`, `class_weights` and a class mask are this shard's; integer labels count from the first
            class of the first shard; every shard holds equally many classes (mask what is too many).

    Returns:
        The loss of each row, [...]: in float32, or float64 where logits or labels are float64. Nothing is averaged.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, an axis or an option is wrong, or there is no class. Options that are traced cannot raise:
            out of range, they make the loss NaN.

    A row masked, or with all its classes masked, has loss 0 and gradient exactly 0 whatever it holds. A logit of −inf
    is a class of probability 0: with a target of 0 it contributes 0 to the loss and every gradient, else the loss is
    +inf. A row with no finite maximum has NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> logits = jnp.array([[1.0, 2.0, 3.0], [30.0, 0.0, 0.0]])
        >>> labels = jnp.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
        >>> print([f"{x:.4g}" for x in jaxce.softmax_cross_entropy(logits, labels)])
        ['0.9076', '1.872e-13']
        >>> grad = jax.grad(lambda z: jaxce.softmax_cross_entropy(z, labels).sum())(logits)
        >>> bool(jnp.allclose(grad, jax.nn.softmax(logits) - labels))
        True

    Source: J. S. Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990; label
    smoothing: Szegedy et al., arXiv:1512.00567; z-loss: Chowdhery et al., arXiv:2204.02311, section 5; logit
    soft-cap: Gemma 2, arXiv:2408.00118.
    """
    function = "softmax_cross_entropy"
    z = _checks.floating(function, "logits", logits)
    targets = _checks.real(function, "labels", labels)
    axes = _checks.class_axes(function, axis, z.shape)
    shape = _checks.broadcast_shape(function, "labels", targets.shape, z.shape, axes)
    z, selection, shards = with_masks(function, jnp.broadcast_to(z, shape), axes, where, axis_name)
    targets = classes_last(targets.reshape((1,) * (len(shape) - targets.ndim) + targets.shape), axes, shape)
    given = dict(label_smoothing=label_smoothing, class_weights=class_weights, logit_cap=logit_cap, z_loss=z_loss)
    dtype = statistics_dtype(z, targets)
    options = Options.of(function, dtype, z.ndim, shards, given)

    values = Values(z, targets, class_weights=options.class_weights, logit_cap=options.logit_cap)
    if options.label_smoothing is not None:
        floor = options.label_smoothing * masked_mean(targets, selection, z, dtype, shards)
        values = values._replace(target_scale=1 - options.label_smoothing, target_floor=floor)
    row, _ = row_statistics(values, selection, shards)
    return combined(row, options, selection, shards)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    logit_cap: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> Array:
    """Softmax cross-entropy of each row with an integer label: E = −log o_y, with o = softmax(logits).

    Its gradient is analytic, `o − onehot(y)`, without a one-hot array. Confident predictions are exact: where the
    usual formula rounds loss and gradient of the label to 0, this has them to float32's relative accuracy. Every
    differentiation mode works: grad, jvp, jacfwd, hessian, vmap, scan, …
    A drop-in for `optax.losses.softmax_cross_entropy_with_integer_labels`, with options.

    Args:
        logits: floating, [..., K] for the default axis: unnormalized log-probabilities.
        labels: integer, [...]: the class of each row, in [0, K). Axes of size 1 broadcast against those of `logits`.
        axis: the class axis, a tuple of them (labels then index the classes flattened in that order), or None for
            all; default the last.
        where: bool mask, default none. With as many axes as `logits`: classes that take part; a class masked has
            o = 0. With the axes of `labels`: rows that take part.
        ignore_index: rows with this label do not take part, default none. Any integer, a class or not.
        label_smoothing: ε in [0, 1], default 0: t = onehot(y) becomes (1−ε)·t + ε/K, K the number of classes not masked
            (PyTorch's and optax's convention; not K−1). May be traced.
        class_weights: weights c [K], default none: targets become c ⊙ t, after smoothing (PyTorch's order). The result
            is not divided by anything.
        logit_cap: soft-cap > 0, default none: logits become cap·tanh(logits/cap), before anything else.
        z_loss: λ ≥ 0, default 0: adds λ·lse², lse = log Σ_k exp(logits_k), which keeps the log-normalizer near 0.
        axis_name: inside `jax.shard_map`, the mesh axis that the classes are split over, default none. `logits`,
            `class_weights` and a class mask are this shard's; labels count from the first
            class of the first shard; every shard holds equally many classes (mask what is too many).

    Returns:
        The loss of each row, [...]: in float32, or float64 where logits are float64. Nothing is averaged.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, an axis or an option is wrong, or there is no class. Options that are traced cannot raise:
            out of range, they make the loss NaN.

    A row ignored, masked, or with all its classes masked has loss 0 and gradient exactly 0 whatever it holds. Any other
    row whose label is outside [0, K) (there is no wrap-around; `check_labels` names it), or is a masked class, has loss
    NaN and gradient NaN. A label whose logit is −inf has loss +inf. A row with no finite maximum has NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> logits = jnp.array([[1.0, 2.0, 3.0], [30.0, 0.0, 0.0]])
        >>> loss = jaxce.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 0]))
        >>> print([f"{x:.4g}" for x in loss])
        ['1.408', '1.872e-13']
        >>> ignored = jaxce.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, -100]), ignore_index=-100)
        >>> print([f"{x:.4g}" for x in ignored])
        ['1.408', '0']

    Source: as `softmax_cross_entropy`.
    """
    function = "softmax_cross_entropy_with_integer_labels"
    z, selection, shards = labelled_rows(function, logits, labels, axis, where, ignore_index, axis_name)
    given = dict(label_smoothing=label_smoothing, class_weights=class_weights, logit_cap=logit_cap, z_loss=z_loss)
    dtype = statistics_dtype(z)
    options = Options.of(function, dtype, z.ndim, shards, given)
    values = with_uniform_targets(Values(z, logit_cap=options.logit_cap), options, z.ndim, dtype)
    row, _ = row_statistics(values, selection, shards)
    return combined(row, options, selection, shards)


class LabelStatistics(NamedTuple):
    """What `label_statistics` returns: four arrays, one number per row [...].

    Attributes:
        log_prob: log o_y, in nats; float32, or float64 for float64 logits, as the next two.
        log_normalizer: log Σ_k exp z_k.
        entropy: −Σ_j o_j log o_j, in nats.
        correct: bool, whether the label is the arg max. Not differentiated.
    """

    log_prob: Array
    log_normalizer: Array
    entropy: Array
    correct: Array


def label_statistics(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: ArrayLike | None = None,
    logit_cap: ArrayLike | None = None,
    axis_name: str | None = None,
) -> LabelStatistics:
    """What training loops and reinforcement learning ask of logits besides the loss, from one pass over them.

    Per row, with o = softmax(logits): log_prob = log o_y, log_normalizer = log Σ_k exp z_k, entropy = −Σ_j o_j log o_j,
    and correct, whether the label is the arg max (of equal logits the first is, as for `jnp.argmax`). The first three
    are differentiable in every mode, by their analytic rules:

        ∂ log o_y/∂z = onehot(y) − o        ∂ log_normalizer/∂z = o        ∂ entropy/∂z = −o·(log o + entropy)

    Args:
        logits, labels, axis, where, ignore_index, logit_cap, axis_name: as in
            `softmax_cross_entropy_with_integer_labels`.

    Returns:
        `LabelStatistics`, a named tuple of (log_prob, log_normalizer, entropy, correct), each [...]; the first three in
        float32 (float64 for float64 logits), the last bool. Rows that do not take part have 0, 0, 0, False; rows with
        an invalid label NaN, NaN, NaN, False.

    Raises:
        TypeError, ValueError: as `softmax_cross_entropy_with_integer_labels`.

    Example:
        A policy gradient with an entropy bonus:

        >>> import jax, jax.numpy as jnp, jaxce
        >>> def loss(logits, actions, advantages):
        ...     stats = jaxce.label_statistics(logits, actions)
        ...     return -(stats.log_prob * advantages + 0.01 * stats.entropy).mean()
        >>> logits, actions = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([1, 0])
        >>> print(jax.grad(loss)(logits, actions, jnp.array([1.0, -1.0])).round(3))
        [[ 0.133 -0.133]
         [ 0.25  -0.25 ]]
        >>> print(jaxce.label_statistics(logits, actions).correct)
        [ True  True]

    Source: the derivation in `jaxce._softmax`; ∂H follows from ∂o_j/∂z_i = o_i·(δ_ij − o_j).
    """
    function = "label_statistics"
    z, selection, shards = labelled_rows(function, logits, labels, axis, where, ignore_index, axis_name)
    options = Options.of(function, statistics_dtype(z), z.ndim, shards, dict(logit_cap=logit_cap))
    row, correct = row_statistics(Values(z, logit_cap=options.logit_cap), selection, shards, with_entropy=True)
    numbers, correct = (-row.loss, row.shift + row.log_sum, row.entropy), correct > 0
    if selection.row_mask is not None:
        numbers = [jnp.where(selection.row_mask, n, 0) for n in numbers]
        correct = correct & selection.row_mask
    log_prob, log_normalizer, entropy = numbers
    return LabelStatistics(log_prob, log_normalizer, entropy, correct)


def check_labels(
    labels: ArrayLike, num_classes: int, where: ArrayLike | None = None, *, ignore_index: ArrayLike | None = None
) -> None:
    """A label outside [0, num_classes) becomes an error that names the row and the label, under `checkify`.

    Call it beside a loss that is NaN, and run what calls it under `jax.experimental.checkify.checkify` (its user
    checks). Anywhere else it does nothing, but is not free: JAX dispatches compiled functions that contain a check
    five times slower, which is why the losses do not contain it.

    Args:
        labels: integer, of any shape.
        num_classes: K, of all shards together.
        where: bool mask of `labels`' shape, default none: rows that take part.
        ignore_index: rows with this label do not take part, default none.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, or there is no class.

    Example:
        >>> import jax, jax.numpy as jnp, jaxce
        >>> from jax.experimental import checkify
        >>> def mean_loss(logits, labels):
        ...     jaxce.check_labels(labels, logits.shape[-1])
        ...     return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        >>> error, loss = jax.jit(checkify.checkify(mean_loss))(jnp.zeros((3, 5)), jnp.array([0, 4, 5]))
        >>> print(loss, error.get())
        nan check_labels: labels has 5 in row 2 (of the flattened batch), wanted 0 to 4 (`check` failed)
    """
    function = "check_labels"
    labels = signed(_checks.integer(function, "labels", labels))
    if num_classes < 1:
        raise _checks.value_error(function, "num_classes", num_classes, "at least 1")
    valid = (labels >= 0) & (labels < num_classes)
    if ignore_index is not None:
        valid = valid | ignored(function, labels, ignore_index)
    if where is not None:
        mask = _checks.boolean(function, "where", where)
        valid = valid | ~_checks.shape(function, "where", mask, labels.shape, "as labels")
    if labels.size == 0:
        return
    message = f"{function}: labels has {{label}} in row {{row}} (of the flattened batch), wanted 0 to {num_classes - 1}"

    def check(labels, valid):
        row = jnp.argmin(valid.ravel())
        checkify.debug_check(valid.all(), message, label=labels.ravel()[row], row=row)

    in_auto(check, labels, 0, labels, valid)
