"""Every kernel once, on shapes with every tail, checked: what compute-sanitizer watches."""

import importlib

import torch
from torch import nn

from rewardzip.nn import BlockSparseLinear, Sparse24Linear, SparseRowsLinear
from rewardzip_kernels import loading
from rewardzip_kernels.fused_mlp import fused_mlp_reference
from rewardzip_kernels.gpu.fused_mlp import fused_mlp
from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear
from rewardzip_kernels.gpu.int8_linear import int8_linear
from rewardzip_kernels.gpu.mlp_gradient import gradient
from rewardzip_kernels.gpu.reward_head import reward_head
from rewardzip_kernels.int8_linear import int8_linear_reference
from rewardzip_kernels.mlp_layout import layout
from rewardzip_kernels.reward_head import reward_head_reference

OPS = {
    BlockSparseLinear: "block_sparse_linear",
    Sparse24Linear: "sparse24_linear",
    SparseRowsLinear: "sparse_rows_linear",
}
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
        gradients(layers)
    sparse()


def gradients(layers: str) -> None:
    net = layout(layers, True)
    call = gradient(
        torch.randint(-127, 128, (net.weights,), dtype=torch.int8, device=DEVICE),
        torch.rand(net.params, device=DEVICE) / 100,
        layers,
        None,
    )
    for m in (1, 70) if call else ():
        y, slopes = call([torch.randn(m, k, device=DEVICE) for k in net.layers[0].pieces])
        print(f"mlp_gradient {m:5} x {layers}")
        assert y.isfinite().all()
        assert slopes.isfinite().all()


def sparse() -> None:
    for m, n, k in ((1, 70, 96), (37, 70, 130), (300, 33, 64)):
        layer = nn.Linear(k, n, device=DEVICE).requires_grad_(False)
        blocks = torch.rand(-(-n // 16), -(-k // 4), device=DEVICE) < 0.3
        pruned = {
            BlockSparseLinear: blocks.repeat_interleave(16, 0).repeat_interleave(4, 1)[:n, :k],
            Sparse24Linear: (torch.arange(k, device=DEVICE) % 4 < 2).expand(n, k),
            SparseRowsLinear: torch.rand(n, k, device=DEVICE) < 0.1,
        }
        x, weight = torch.randn(m, k, device=DEVICE), layer.weight.clone()
        for kind, mask in pruned.items():
            layer.weight.copy_(weight * mask)
            packed = kind.from_linear(layer)
            call = getattr(importlib.import_module(f"rewardzip_kernels.gpu.{OPS[kind]}"), OPS[kind])
            loading._found["gpu" if DEVICE == "cuda" else "cpu", OPS[kind]] = call
            report(f"{OPS[kind]:22} {m:5} x {n:3} x {k:5}", packed(x, "relu"), torch.relu(layer(x)))


def report(name: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    error = (y - expected).norm() / expected.norm()
    print(f"{name}  relative error {error:.1e}")
    assert error < 0.03


if __name__ == "__main__":
    main()
