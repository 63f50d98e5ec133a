"""One linear layer with ReLU on a CPU: eager fp32 beside both int8 ops, in the same interleaved run.

    python benchmarks/cpu_int8.py [--threads 1] [--seconds 0.5]

Times are medians of one call; every result is checked against the op's reference before it is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from rewardzip_kernels import int8_dynamic_linear, int8_linear, quantize_rows
from rewardzip_kernels.int8_dynamic_linear import int8_dynamic_linear_reference
from rewardzip_kernels.int8_linear import int8_linear_reference

SHAPES = [(64, 64), (256, 256), (1024, 1024), (4096, 4096)]
ROWS = [1, 32, 1024]


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds a call takes, each candidate in turn, so that a slow spell of the machine hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(1e-4 / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, repeat, spent in zip(calls, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            spent.append((time.perf_counter() - start) / repeat)
    return [statistics.median(t) for t in times]


def check(name: str, y: torch.Tensor, reference: torch.Tensor) -> None:
    error = (y - reference).abs().max() / reference.abs().max()
    if not error < 1e-5:
        raise SystemExit(f"{name}: off its reference by {error:.1e} of the largest output, not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each line of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'K x N':>12} {'rows':>5} {'fp32 us':>10} {'int8 us':>10} {'dynamic us':>10} {'int8':>6} {'dynamic':>8}")
    for k, n in SHAPES:
        dense, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
        weight, scale = quantize_rows(dense)
        for m in ROWS:
            x = torch.randn(m, k)
            args = x, weight, scale, bias, "relu"
            check("int8_linear", int8_linear(*args), int8_linear_reference(*args))
            check("int8_dynamic_linear", int8_dynamic_linear(*args), int8_dynamic_linear_reference(*args))
            calls = [
                lambda x=x, dense=dense, bias=bias: F.relu(F.linear(x, dense, bias)),
                lambda args=args: int8_linear(*args),
                lambda args=args: int8_dynamic_linear(*args),
            ]
            with torch.inference_mode(False), torch.no_grad():
                eager, weight_only, dynamic = medians(calls, options.seconds)
            print(
                f"{f'{k} x {n}':>12} {m:>5} {eager * 1e6:>10.1f} {weight_only * 1e6:>10.1f} {dynamic * 1e6:>10.1f}"
                f" {eager / weight_only:>5.2f}x {eager / dynamic:>7.2f}x"
            )


if __name__ == "__main__":
    main()
