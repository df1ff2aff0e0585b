"""The softmax cross-entropy for JAX, with its analytic gradient o − y.

Names used throughout, in the field's and the derivation's letters:

    z    logits [..., K]: unnormalized log-probabilities
    o    softmax(z) [..., K]: probabilities
    y    labels: integer [...], or dense targets [..., K]
    t    targets after smoothing and weighting;  a = Σ_j t_j
    E    loss [...], in nats, one per row
    lse  log-normalizer log Σ_k exp z_k [...] = m + L, with the shift m = max z

    N rows (any number of leading axes), K classes
"""

from . import reference as reference
from ._linear import fused_linear as fused_linear
from ._linear import linear_cross_entropy as linear_cross_entropy
from ._losses import LabelStatistics as LabelStatistics
from ._losses import check_labels as check_labels
from ._losses import label_statistics as label_statistics
from ._losses import softmax_cross_entropy as softmax_cross_entropy
from ._losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels

__version__ = "0.1.0"
