"""One module per kernel, each made from trained layers by ``from_linear``."""

from .base import CompressedLinear as CompressedLinear
from .block_sparse_linear import BlockSparseLinear as BlockSparseLinear
from .int8_linear import Int8Linear as Int8Linear
