"""jaxce"""

from . import reference as reference
from ._losses import LabelStatistics as LabelStatistics
from ._losses import label_statistics as label_statistics
from ._losses import softmax_cross_entropy as softmax_cross_entropy
from ._losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels

__version__ = "0.1.0"
