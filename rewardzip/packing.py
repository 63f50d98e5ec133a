"""Small integers side by side in bytes: how weights of fewer than 8 bits are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """The length of ``pack(codes, bits)`` for ``count`` codes."""
    return (count + 7) // 8 * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1, any shape -> uint8 [ceil(n / 8) * bits]: 8 codes in ``bits`` bytes."""
    flat = codes.flatten().long()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    words = (flat << bits * torch.arange(8, device=flat.device)).sum(1)
    return ((words[:, None] >> 8 * torch.arange(bits, device=flat.device)) & 255).to(torch.uint8).flatten()


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that were packed, int64 in the shape given."""
    place = torch.arange(bits, device=packed.device)
    words = (packed.view(-1, bits).long() << 8 * place).sum(1)
    codes: Tensor = (words[:, None] >> bits * torch.arange(8, device=packed.device)) & (2**bits - 1)
    return codes.flatten()[: torch.Size(shape).numel()].view(shape)
