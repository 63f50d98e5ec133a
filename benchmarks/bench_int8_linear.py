"""pytest-benchmark on one layer: ``pytest benchmarks/bench_int8_linear.py``. The full table is ``linear.py``."""

import pytest
import torch
from providers import providers
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("fp32", "AMP bf16", "bf16", "rewardzip int8", "rewardzip int8 x int8")


@pytest.mark.parametrize("rows", [1, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (1024, 1024)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_linear_relu(benchmark, name, shape, rows):
    benchmark.group = f"{shape[0]} -> {shape[1]}, {rows} rows"
    torch.manual_seed(0)
    layer = nn.Linear(*shape, device=DEVICE).requires_grad_(False)
    x = torch.randn(rows, shape[0], device=DEVICE)
    call = providers(layer, x, compile=False)[name]
    exact = torch.relu(layer(x))
    assert (call().float() - exact).norm() / exact.norm() < 0.03, "a wrong result is not timed"

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(run, rounds=20, iterations=5, warmup_rounds=2)
