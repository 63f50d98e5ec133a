"""How large a model is, in memory and on disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from .checkpoint import save
from .fuse import FusedForward


@dataclass(frozen=True)
class Size:
    """Bytes."""

    memory: int
    """Parameters and buffers, and the copies that fused layers have packed of them."""
    disk: int


def size(model: nn.Module) -> Size:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, FusedForward):
            for chain in module.rz_chains:
                tensors += [t for packed in chain.packed.values() for t in (packed.weights, packed.params)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return Size(sum(storages.values()), _disk(model, tensors))


def _disk(model: nn.Module, tensors: list[Tensor]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(model, Path(folder) / "model")
        except (TypeError, ValueError):  # such as a state dict with more than tensors: its tensors alone
            state = {k: t.detach().cpu().clone() for k, t in model.state_dict().items() if isinstance(t, Tensor)}
            (Path(folder) / "model").mkdir(exist_ok=True)
            safetensors.torch.save_file(state, Path(folder) / "model" / "model.safetensors")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
