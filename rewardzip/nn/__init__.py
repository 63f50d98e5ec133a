"""One module per kernel, each made from trained layers by ``from_linear``."""

from .base import CompressedLinear as CompressedLinear
from .grid_linear import GridLinear as GridLinear
from .int8_linear import Int8Linear as Int8Linear
from .shared_linear import SharedLinear as SharedLinear
