"""One weight in twenty kept, anywhere."""

import torch
from checked import linear_op

from rewardzip.nn import SparseRowsLinear

test_sparse_rows_linear = linear_op(
    "sparse_rows_linear",
    {"rows int8": SparseRowsLinear.from_linear},
    lambda weight: torch.rand_like(weight) >= 0.95,
)
