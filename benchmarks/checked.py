"""What every ``bench_<op>.py`` shares: a call is held to the exact result before it is timed, a wrong one gets no time.

    pytest benchmarks/bench_*.py [-k small] [--benchmark-json FILE]

A linear op's file names its forms; the dense rivals, the shapes and the check are here. The full tables, with all
rivals and in turn, are ``linear.py`` and ``models.py``.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from providers import amp, dense
from torch import Tensor, nn

from rewardzip.timing import apart, interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"small": (64, 64), "large": (1024, 1024)}
ROWS = {"1rows": 1, "256rows": 256, "4096rows": 4096}

# the largest relative error, in the norm, that still counts as the same function: 8 bits of weights and rows
TOLERANCE = 0.03

cells = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def timed(
    benchmark: Any,
    group: str,
    call: Callable[[], Tensor],
    exact: Tensor,
    tolerance: float = TOLERANCE,
    then: Callable[[], object] | None = None,
) -> None:
    """Time the call, or ``then`` where one is given, if the call's result is right; fail without a time if not.

    On a GPU ``extra_info`` has the kernels' seconds with a cold cache and a warm one, and those of Python apart.
    """
    benchmark.group = group
    with torch.no_grad():
        error = float((call().double() - exact).norm() / exact.norm())
        if not error <= tolerance:
            pytest.fail(f"wrong by {error:.2g}: not timed")

        call = then or call

        def run() -> None:
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(run, rounds=20, iterations=5, warmup_rounds=2)
        if DEVICE == "cuda":
            # pytest-benchmark's clock has Python and the driver in it: beside it what the tables have
            benchmark.extra_info |= asdict(interleaved({group: call}, DEVICE, 0.1)[group]) | apart(call, DEVICE)


def rivals(layer: nn.Linear, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "fp32": dense(layer, x),
        "AMP bf16": amp(layer, x, torch.bfloat16, False),
        "bf16": dense(layer, x, torch.bfloat16),
    }


def linear_op(
    op: str, forms: dict[str, Callable[[nn.Linear], nn.Module]], mask: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., None]:
    """The benchmark of a linear op with ReLU: modules made of a layer that ``mask`` has pruned, and rivals."""

    @cells
    @shapes
    @pytest.mark.parametrize("name", ["fp32", "AMP bf16", "bf16", *forms])
    def test(benchmark: Any, name: str, shape: tuple[int, int], rows: int) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(*shape, device=DEVICE).requires_grad_(False)
        if mask is not None:
            layer.weight *= mask(layer.weight)
        x = torch.randn(rows, shape[0], device=DEVICE)
        if name in forms:
            packed = forms[name](layer)
            call = lambda: packed(x, "relu")  # noqa: E731
        else:
            call = rivals(layer, x)[name]
        exact = torch.relu(x.double() @ layer.weight.double().t() + layer.bias.double())
        timed(benchmark, f"{op}: {shape[0]} -> {shape[1]}, {rows} rows", call, exact)

    return test
