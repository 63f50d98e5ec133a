"""Tensors in, tensors out: the ops of RewardZip. Each has a reference, a Triton kernel and a CPU kernel.

Importing registers ``torch.ops.rewardzip``; it compiles nothing and looks for no GPU.
"""

from .block_sparse_linear import block_sparse_linear as block_sparse_linear
from .fused_mlp import fused_mlp as fused_mlp
from .int8_dynamic_linear import int8_dynamic_linear as int8_dynamic_linear
from .int8_linear import int8_linear as int8_linear
from .quantize import quantize_rows as quantize_rows
from .reward_head import reward_head as reward_head
from .sparse24_linear import sparse24_linear as sparse24_linear
from .sparse_rows_linear import sparse_rows_linear as sparse_rows_linear
