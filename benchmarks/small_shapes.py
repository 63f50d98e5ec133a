"""Every kernel once, on shapes with every tail, checked: what compute-sanitizer watches."""

import torch

from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear
from rewardzip_kernels.gpu.int8_linear import int8_linear
from rewardzip_kernels.int8_linear import int8_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    torch.manual_seed(0)
    for m, n, k in ((1, 7, 9), (5, 17, 23), (20, 70, 2100), (70, 33, 64), (1100, 9, 32)):
        x = torch.randn(m, k, device=DEVICE)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
        scale, bias = torch.rand(n, device=DEVICE) / 100, torch.randn(n, device=DEVICE)
        expected = int8_linear_reference(x, weight, scale, bias, "relu")
        for op in (int8_linear, int8_dynamic_linear):
            error = (op(x, weight, scale, bias, "relu") - expected).norm() / expected.norm()
            print(f"{op.__name__:22} {m:5} x {n:3} x {k:5}  relative error {error:.1e}")
            assert error < 0.03


if __name__ == "__main__":
    main()
