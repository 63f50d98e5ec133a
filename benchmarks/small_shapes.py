"""Every kernel once, on shapes with every tail, checked: what compute-sanitizer watches."""

import torch

from rewardzip_kernels.fused_mlp import fused_mlp_reference
from rewardzip_kernels.gpu.fused_mlp import fused_mlp
from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear
from rewardzip_kernels.gpu.int8_linear import int8_linear
from rewardzip_kernels.gpu.reward_head import reward_head
from rewardzip_kernels.int8_linear import int8_linear_reference
from rewardzip_kernels.mlp_layout import layout
from rewardzip_kernels.reward_head import reward_head_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    torch.manual_seed(0)
    for m, n, k in ((1, 7, 9), (5, 17, 23), (20, 70, 2100), (70, 33, 64), (1100, 9, 32)):
        x = torch.randn(m, k, device=DEVICE)
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
        scale, bias = torch.rand(n, device=DEVICE) / 100, torch.randn(n, device=DEVICE)
        expected = int8_linear_reference(x, weight, scale, bias, "relu")
        for op in (int8_linear, int8_dynamic_linear):
            report(f"{op.__name__:22} {m:5} x {n:3} x {k:5}", op(x, weight, scale, bias, "relu"), expected)
        head = torch.randn(3, n, device=DEVICE)
        y = reward_head(x, weight, scale, bias, head, None, "relu", None)
        expected = reward_head_reference(x, weight, scale, bias, head, None, "relu", None)
        report(f"reward_head            {m:5} x {n:3} x {k:5}", y, expected)
    for layers in ("17+6: 20 relu, 1", "9: 70 layer_norm mish, 33 elu, 5", "24: 256 relu, 256 relu, 1"):
        for m in (1, 70, 5000 if DEVICE == "cuda" else 130):
            net = layout(layers, True)
            weights = torch.randint(-127, 128, (2 * net.weights,), dtype=torch.int8, device=DEVICE)
            params = torch.rand(2 * net.params, device=DEVICE) / 100
            inputs = [torch.randn(m, k, device=DEVICE) for k in net.layers[0].pieces]
            arguments = inputs, weights, params, layers, 2, "none", torch.float16, None
            report(f"fused_mlp {m:5} x {layers}", fused_mlp(*arguments), fused_mlp_reference(*arguments))


def report(name: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y - expected).norm() / expected.norm()
    print(f"{name}  relative error {error:.1e}")
    assert error < 0.03


if __name__ == "__main__":
    main()
