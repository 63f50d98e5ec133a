"""The bound every kernel is held to, and the checks the tests and the planted bugs share.

Against float64 from the same quantised weights, per element, with unit roundoffs u, S = |x| @ |w|^T * scale + |bias|:

    |y - ref| <= C * (u_out |ref| + sqrt(K) u_sum S + u_in (|pre| + sqrt(x^2 @ w^2)) + e_act)

The terms: rounding the result; K fp32 additions (their roundings add up like a random walk); rounding x to the type
the products are made of, where it is narrower; the activation's own approximation. C = 3, settled once.
"""

import torch
from torch import Tensor

from rewardzip_kernels import activations
from rewardzip_kernels.quantize import quantize_rows_reference

C = 3.0
UNIT = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    "tf32": 2.0**-10,
    None: 0.0,
}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}

# M, N, K, and why
SHAPES = [
    (1, 1, 1, "the smallest"),
    (1, 64, 64, "one row, all aligned"),
    (4, 65, 130, "the last size of the one-row kernel, tails in N and K"),
    (5, 17, 23, "the first size of the tiled kernel, everything odd"),
    (16, 64, 128, "one full tile"),
    (17, 130, 64, "a row over the tile, a tail in N"),
    (64, 1, 257, "one output, one input over a power of two"),
    (65, 63, 31, "less than a tile in N and K"),
    (6, 64, 2048, "K split over programs"),
    (9, 70, 2100, "K split, the last part short"),
    (1100, 8, 32, "the tile for many rows"),
    (3, 1000, 7, "many outputs, few inputs"),
]


def quantized(n: int, k: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random int8 weights that use the whole range, scales over three decades, and a bias."""
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = 10.0 ** (torch.rand(n, device=device) * 3 - 4)
    return q, scale, torch.randn(n, device=device) * scale * k**0.5 * 60


def reference(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(pre), pre, S) in float64."""
    w = q.double() * scale.double()[:, None]
    pre, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    if bias is not None:
        pre, size = pre + bias.double(), size + bias.double().abs()
    return activations.apply(pre, activation), pre, size


def assert_linear(
    y: Tensor,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    compute: object = None,
) -> None:
    """Hold a weight-only result to the bound; ``compute`` is the type x was rounded to where it is narrower."""
    ref, pre, size = reference(x, q, scale, bias, activation)
    assert y.dtype == x.dtype
    assert y.shape == ref.shape
    spread = ((x.double() ** 2) @ (q.double() * scale.double()[:, None]).t() ** 2).sqrt()
    bound = UNIT[x.dtype] * ref.abs() + q.shape[1] ** 0.5 * UNIT[torch.float32] * size
    bound += UNIT[compute] * (pre.abs() + spread) + activation_error(pre, activation)
    assert_within(y, ref, C * bound + SMALLEST[x.dtype])


def assert_dynamic(
    y: Tensor,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    x_scale: Tensor | None,
) -> None:
    """Hold an int8 x int8 result to its bound: the sums are exact, only the epilogue rounds."""
    qx = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(x.shape[0], device=x.device)
    quantize_rows_reference(x, x_scale, qx, row_scale)
    ref, pre, spread = reference(qx.double() * row_scale.double()[:, None], q, scale, bias, activation)
    size = (pre - (0 if bias is None else bias.double())).abs() + (0 if bias is None else bias.double().abs())
    bound = UNIT[x.dtype] * ref.abs() + 2 * UNIT[torch.float32] * size + activation_error(pre, activation)
    bound += 2.0**-52 * spread  # the reference's own rounding, where its sum cancels
    assert y.dtype == x.dtype
    assert_within(y, ref, C * bound + SMALLEST[x.dtype])


def activation_error(pre: Tensor, activation: str) -> Tensor:
    """What ``gpu/activations.py`` promises, a third of it: the caller multiplies by C."""
    name, _, parameter = activation.partition(":")
    if name in ("none", "relu", "leaky_relu"):
        return torch.zeros_like(pre)
    least = max(1.0, abs(float(parameter or 1))) if name == "elu" else 1.0
    return UNIT[torch.float32] * pre.abs().clamp(min=least) * 4 / 3


def assert_within(y: Tensor, ref: Tensor, bound: Tensor) -> None:
    error = (y.double() - ref).abs()
    worst = (error - bound).nan_to_num(nan=torch.inf).max() if y.numel() else torch.tensor(-1.0)
    where = int((error / bound).nan_to_num(nan=torch.inf).argmax()) if y.numel() else 0
    assert worst <= 0, (
        f"element {where}: {y.flatten()[where]} for {ref.flatten()[where]}, bound {bound.flatten()[where]}; "
        f"{int((~(error <= bound)).sum())} of {y.numel()} outside"
    )
