"""A wide layer, its activation and a head of one output, beside both in torch."""

import pytest
import torch
import torch.nn.functional as F
from checked import DEVICE, cells, shapes, timed

from rewardzip_kernels import quantize_rows, reward_head

NAMES = ("fp32", "AMP bf16", "bf16", "int8", "int8, bf16 rows")


@cells
@shapes
@pytest.mark.parametrize("name", NAMES)
def test_reward_head(benchmark, name, shape, rows):
    torch.manual_seed(0)
    (k, n), dtype = shape, torch.bfloat16 if name.startswith(("bf16", "int8, bf16")) else torch.float32
    weight, bias = torch.randn(n, k, device=DEVICE) / k**0.5, torch.randn(n, device=DEVICE)
    head, many = torch.randn(1, n, device=DEVICE) / n**0.5, torch.randn(max(rows, 256), k, device=DEVICE)
    exact = torch.relu(many.double() @ weight.double().t() + bias.double()) @ head.double().t()
    many = many.to(dtype)
    if name.startswith("int8"):
        q, scale = quantize_rows(weight)

        def run(x):
            return reward_head(x, q, scale, bias, head, None, "relu")
    else:
        w, b, v = weight.to(dtype), bias.to(dtype), head.to(dtype)

        def dense(x):
            return F.linear(torch.relu(F.linear(x, w, b)), v)

        def amp(x):
            with torch.autocast(DEVICE, torch.bfloat16):
                return dense(x)

        run = amp if "AMP" in name else dense
    group = f"reward_head: {k} -> {n} -> 1, {rows} rows"
    timed(benchmark, group, lambda: run(many), exact, then=lambda: run(many[:rows]))
