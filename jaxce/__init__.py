"""Softmax cross-entropy for JAX, with its analytic gradient `o − y`. `python -m jaxce` verifies an install.

    you have                                              use
    integer labels                                        softmax_cross_entropy_with_integer_labels(logits, labels)
    target probabilities, one-hot or soft                 softmax_cross_entropy(logits, labels)
    targets for a few classes of each row, such as top k  softmax_cross_entropy_with_top_k_labels(logits, ids, targets)
    a language model's head x @ w, with too many logits   linear_cross_entropy(x, w, labels)
    any other loss of such logits                         fused_linear(loss_fn)(x, w, *row_args)
    a policy or a metric: log-probability, entropy, …     label_statistics(logits, labels)
    the same of such a head                               linear_label_statistics(x, w, labels)
    a NaN loss, and perhaps a label out of range          check_labels(labels, num_classes), under checkify
    a proof to follow                                     jaxce.reference, the naive formulas

In the letters of the derivation, with N rows (any number of leading axes), K classes, D features and blocks of B rows:

    z    logits [..., K]: unnormalized log-probabilities
    o    softmax(z) [..., K]: probabilities
    y    labels: integer [...], or dense targets [..., K]
    t    targets after smoothing and weighting;  a = Σ_j t_j
    E    loss [...], in nats, one per row
    lse  log-normalizer log Σ_k exp z_k [...] = m + L, with a shift m, in general max z
"""

from . import reference as reference
from ._linear import fused_linear as fused_linear
from ._linear import linear_cross_entropy as linear_cross_entropy
from ._linear_statistics import linear_label_statistics as linear_label_statistics
from ._losses import LabelStatistics as LabelStatistics
from ._losses import check_labels as check_labels
from ._losses import label_statistics as label_statistics
from ._losses import softmax_cross_entropy as softmax_cross_entropy
from ._losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels
from ._top_k import softmax_cross_entropy_with_top_k_labels as softmax_cross_entropy_with_top_k_labels

__all__ = ["LabelStatistics", "check_labels", "fused_linear", "label_statistics", "linear_cross_entropy"]
__all__ += ["linear_label_statistics", "reference", "softmax_cross_entropy"]
__all__ += ["softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy_with_top_k_labels"]
__version__ = "0.1.0"
