"""One module per kernel, each made from trained layers by ``from_linear``."""

from .base import CompressedLinear as CompressedLinear
from .block_sparse_linear import BlockSparseLinear as BlockSparseLinear
from .grid_linear import GridLinear as GridLinear
from .int8_linear import Int8Linear as Int8Linear
from .shared_linear import SharedLinear as SharedLinear
from .shifted_linear import ShiftedLinear as ShiftedLinear
from .sparse24_linear import Sparse24Linear as Sparse24Linear
from .sparse_linear import SparseLinear as SparseLinear
from .sparse_rows_linear import SparseRowsLinear as SparseRowsLinear
