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
    """The codes that were packed, uint8 in the shape given."""
    if 8 % bits == 0:
        # each byte holds whole codes
        words, place = packed, torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    else:
        words = (packed.view(-1, bits).long() << 8 * torch.arange(bits, device=packed.device)).sum(1)
        place = bits * torch.arange(8, device=packed.device)
    codes: Tensor = (words[:, None] >> place) & (2**bits - 1)
    return codes.flatten()[: torch.Size(shape).numel()].view(shape).to(torch.uint8)
