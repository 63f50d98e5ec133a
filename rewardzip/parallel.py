"""Data parallel training under torchrun: the processes that train together, or the one that trains alone."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Team:
    """Joins the process group there is, or the one that torchrun's environment describes.

    What was joined is left when the process ends: a group can be set up only once from torchrun's
    environment, and one that ends with a DistributedDataParallel module still there can hang.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        ready = dist.is_available() and dist.is_initialized()
        if not ready and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
            ready = True
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes, and its weights those of the first."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the batch all have drawn."""
        return rows.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> float:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return float(value)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape and type."""
        if self.size == 1:
            return [tensor]
        mine = tensor.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.to(tensor.device) for part in parts]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
