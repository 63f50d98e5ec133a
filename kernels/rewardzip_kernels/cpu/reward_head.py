"""reward_head on a CPU: a network of two layers, as ``fused_mlp.py`` takes a block of rows through it."""

from typing import Any

import torch
from torch import Tensor

from ..checks import dense_rows
from ..kept import Kept
from ..mlp_layout import Linear, layout
from ..reward_head import reward_head_reference
from .fused_mlp import Network


def _network(weight: Tensor, head: Tensor, *rest: Any) -> Network:
    *vectors, given, activation, compute, isa = rest
    left = iter(vectors)
    scale, bias, head_bias = (next(left) if there else None for there in given)
    (n, k), outputs = weight.shape, head.shape[0]
    hidden = Linear(weight, weight.new_zeros(n, dtype=torch.float32) if bias is None else bias, scale)
    last = Linear(head, head.new_zeros(outputs) if head_bias is None else head_bias)
    flat = layout(f"{k}: {n} {activation}, {outputs}", weight.dtype == torch.int8)
    return Network([[hidden, last]], flat, None, "none", compute, isa)


_kept = Kept(_network)


def reward_head(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    activation: str = "none",
    compute_dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> Tensor:
    vectors = scale, bias, head_bias
    given = tuple(vector is not None for vector in vectors)
    tensors = weight, head_weight, *(vector for vector in vectors if vector is not None)
    network = _kept(tensors, given, activation, compute_dtype or x.dtype, isa)
    if network.run is None:
        return reward_head_reference(x, weight, scale, bias, head_weight, head_bias, activation, compute_dtype)
    rows = dense_rows(x.float()).contiguous()
    y = torch.empty(len(rows), head_weight.shape[0], dtype=torch.float32, device="cpu")
    if len(rows):
        network.rows(network.address(rows.data_ptr(), rows.shape[1]), len(rows), y.data_ptr())
    return y.to(x.dtype).reshape(*x.shape[:-1], head_weight.shape[0])
