"""Rows to int8: one definition for weights (a row per output channel) and for activations (a row per sample).

    amax    = max(|row|), at least 1e-30        q     = clamp(round(row * inverse), -127, 127), half to even
    inverse = 127 / amax                        scale = amax / 127

so that row ~= q * scale, off by at most scale / 2 (1 + 2^-16). With a static scale, ``inverse`` is 1 / scale and larger
values saturate. Every operation above is one correctly rounded fp32 operation, so the integers are the same to the bit
on every device. A row that holds an inf or a NaN gets the scale NaN and integers 0: all computed from it is NaN.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .loading import implementation

QMAX = 127
TINY = 1e-30  # a row smaller than this rounds to zeros instead of dividing by zero


def quantize_rows(
    x: Tensor, static_scale: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """x [R, K] in fp32, fp16 or bf16 -> (q [R, K] int8, scale [R] fp32); ``out``: the same pair, written in place."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"quantize_rows takes a matrix of floats, got {x.dtype} of shape {tuple(x.shape)}")
    given = out is not None
    if out is None:
        out = (
            torch.empty(x.shape, dtype=torch.int8, device=x.device),
            torch.empty(x.shape[0], dtype=torch.float32, device=x.device),
        )
    if x.numel() == 0:
        out[1].fill_(TINY / QMAX)
        return out
    run = quantize_rows_reference
    if x.device.type in ("cpu", "cuda"):
        run = implementation("gpu" if x.is_cuda else "cpu", "quantize_rows", run)
    run(x, static_scale, *out)
    if given:
        # kernels write to memory past torch, and what was packed from these tensors before must be packed again
        increment_version([t for t in out if not t.is_inference()])
    return out


def quantize_rows_reference(x: Tensor, static_scale: Tensor | None, q: Tensor, scale: Tensor) -> None:
    """The definition, in cache-sized groups of rows."""
    group = max(1, (1 << 16) // x.shape[1])
    for start in range(0, x.shape[0], group):
        rows = x[start : start + group].float()
        amax = torch.linalg.vector_norm(rows, torch.inf, dim=1)
        finite = amax.isfinite()
        if static_scale is None:
            amax = amax.clamp(min=TINY)
            # not ``QMAX / amax``: torch makes that a reciprocal and a product, rounded twice
            step, inverse = amax / QMAX, torch.full_like(amax, QMAX) / amax
        else:
            step, inverse = static_scale.expand_as(amax), (1.0 / static_scale).expand_as(amax)
        scaled = torch.where(finite[:, None], rows * inverse[:, None], 0.0)
        q[start : start + group] = scaled.clamp_(-QMAX, QMAX).round_()
        scale[start : start + group] = torch.where(finite, step, torch.nan)
