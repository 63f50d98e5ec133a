"""What one call costs in Python before the GPU's driver takes over, part by part; with a GPU, the whole call too.

    python benchmarks/launch_cost.py

Without a GPU the driver's launch is replaced by a function that does nothing, and the tensors lie on the CPU: what is
timed is all that RewardZip and torch do in Python and in the dispatcher, and nothing of the driver's own time.
"""

import platform
import statistics
import time
from datetime import date

import torch

import rewardzip as rz
from rewardzip.nn import Int8Linear
from rewardzip_kernels import fused_mlp, int8_linear, loading
from rewardzip_kernels.gpu import fused_mlp as gpu_mlp
from rewardzip_kernels.gpu import int8_linear as gpu
from rewardzip_kernels.gpu import launch

GPU = torch.cuda.is_available()


class NoDriver:
    """A compiled kernel whose launch does nothing."""

    function = packed_metadata = None

    def run(self, *args: object) -> None:
        pass


def microseconds(call, repeats: int = 21, calls: int = 2000) -> tuple[float, float, float]:
    """Median, p10 and p90 over repeats of the mean time of one call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        if GPU:
            torch.cuda.synchronize()
    ordered = sorted(times)
    return statistics.median(times), ordered[repeats // 10], ordered[-1 - repeats // 10]


def main() -> None:
    device = "cuda" if GPU else "cpu"
    if not GPU:
        launch.off_gpu = lambda *_: NoDriver()
        launch.current_stream = lambda _: 0
        torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
        loading._found["cpu", "int8_linear"] = gpu.int8_linear
        loading._found["cpu", "fused_mlp"] = gpu_mlp.fused_mlp
    dense = torch.nn.Linear(64, 64, device=device).requires_grad_(False)
    layer = Int8Linear.from_linear(dense)
    x = torch.randn(32, 64, device=device)
    reward = rz.RewardMLP(17, 7, (64, 64)).to(device).requires_grad_(False)
    members = [rz.RewardMLP(17, 7, (64, 64)).to(device).requires_grad_(False) for _ in range(5)]
    fast, ensemble = rz.swap(reward, rz.Int8()), rz.fuse_ensemble(members)
    state, action = (torch.randn(32, width, device=device) for width in (17, 7))
    packed = type(fast.net).rz_chains[0]
    numbers = (*packed.flat((17, 7)), packed.describe((17, 7)))
    arguments = (x, layer.int8_weight, layer.scale, layer.fp32_bias, "relu", None)
    rows = {
        "RewardMLP 17+7-64-64-1, dense": lambda: reward(state, action),
        "the same, swapped": lambda: fast(state, action),
        "its op, past the dispatcher": lambda: fused_mlp([state, action], *numbers),
        "an ensemble of 5 such": lambda: ensemble(state, action),
        "nn.Linear, for scale": lambda: dense(x),
        "Int8Linear module": lambda: layer(x, "relu"),
        "int8_linear, past the dispatcher": lambda: int8_linear(*arguments),
        "int8_linear, through it": lambda: torch.ops.rewardzip.int8_linear.default(*arguments),
        "its GPU function alone": lambda: gpu.int8_linear(*arguments),
    }
    where = torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, no GPU: the driver's launch left out"
    print(f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {date.today()}")
    print(f"{'one call, no gradients':36} {'us':>6} {'p10':>6} {'p90':>6}")
    with torch.no_grad():
        for name, call in rows.items():
            print(f"{name:36} " + " ".join(f"{t:6.2f}" for t in microseconds(call)))


if __name__ == "__main__":
    main()
