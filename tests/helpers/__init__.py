"""What the tests share: each thing has one place, and all of it is imported from here.

`oracle`: what the losses should be, the one table of tolerances and its assertions. `rows`: data, options, the loss and
its gradient. `modes`: the one table of differentiation modes. `programs`: memory and text of what was compiled.
`sharding`: meshes.
"""

from .modes import MODES as MODES
from .modes import WRAPPERS as WRAPPERS
from .modes import Function as Function
from .modes import Mode as Mode
from .modes import assert_same_in_mode as assert_same_in_mode
from .modes import cases as cases
from .modes import direction_at as direction_at
from .modes import named as named
from .modes import two_of as two_of
from .oracle import BF16_LOOPS as BF16_LOOPS
from .oracle import NO_BF16_LOOPS as NO_BF16_LOOPS
from .oracle import SKIPS as SKIPS
from .oracle import TOLERANCE as TOLERANCE
from .oracle import Truth as Truth
from .oracle import assert_all_close as assert_all_close
from .oracle import assert_close as assert_close
from .oracle import assert_one_rounding as assert_one_rounding
from .oracle import assert_relative as assert_relative
from .oracle import dense as dense
from .oracle import exact as exact
from .oracle import stable as stable
from .programs import MIB as MIB
from .programs import compiled as compiled
from .programs import matmuls as matmuls
from .programs import row_arguments as row_arguments
from .programs import temp_bytes as temp_bytes
from .programs import temp_bytes_of as temp_bytes_of
from .programs import text_of as text_of
from .rows import FORMS as FORMS
from .rows import LOSSES as LOSSES
from .rows import OPTION_SETS as OPTION_SETS
from .rows import assert_descends as assert_descends
from .rows import dense_loss as dense_loss
from .rows import head as head
from .rows import integer_loss as integer_loss
from .rows import logits as logits
from .rows import loss_and_gradient as loss_and_gradient
from .rows import option_sets as option_sets
from .rows import option_values as option_values
from .rows import probabilities as probabilities
from .rows import random_labels as random_labels
from .rows import targets_of as targets_of
from .rows import with_gradient as with_gradient
from .sharding import mesh_of as mesh_of
from .sharding import on_shards as on_shards
from .sharding import placed as placed
