"""``LowRank``: a layer as two thin ones, where that is smaller."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewardzip_kernels.quantize import TINY

from .calibrate import check_enough, layer_inputs
from .constraints import is_constrained, linears
from .data import Data
from .steps import Step, Work, check_numbers
from .swap import put


@dataclass(frozen=True)
class LowRank(Step):
    """W [N, K] ~= A [N, r] B [r, K] by singular values, kept where r (N + K) < N K.

    The rank is given, or the least that keeps a share ``energy`` of the squared singular values, or that stays within
    the relative ``error``. weighted: of all matrices of that rank, the one whose outputs on the data are nearest, not
    the one whose weights are.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    weighted: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        check_numbers(self, real=("energy", "error"))
        given = {k: v for k in ("rank", "energy", "error") if (v := getattr(self, k)) is not None}
        if len(given) != 1:
            raise ValueError(f"LowRank: takes one of rank, energy and error, got {given or 'none'}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise ValueError(f"LowRank: rank is {self.rank!r}; it must be a whole number, 1 or more")
        for name in ("energy", "error"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"LowRank: {name} is {share}; it must be between 0 and 1")

    def check(self, model: nn.Module, data: Data | None) -> None:
        if self.weighted:
            check_enough(model, linears(model, self.skip), Work(model, data).needs_data(self), "LowRank: weighted")

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        layers = linears(model, self.skip)
        held = [name for name, layer in layers.items() if is_constrained(layer)]
        work.notes += [f"LowRank: {name} is constrained by an earlier step and stays as it is" for name in held]
        layers = {name: layer for name, layer in layers.items() if name not in held}
        rows = layer_inputs(model, layers, work.needs_data(self)) if self.weighted else {}
        thin: dict[int, nn.Module] = {}
        for name, layer in layers.items():
            left, values, right = decompose(layer.weight.detach(), rows.get(name))
            rank = self._rank(values)
            n, k = layer.weight.shape
            if rank * (n + k) >= n * k:
                work.notes.append(
                    f"LowRank: {name} [{n}, {k}] stays dense: rank {rank} takes {rank * (n + k)} numbers, not {n * k}"
                )
                continue
            thin[id(layer)] = _pair(layer, (left * values)[:, :rank], right[:rank])
        names = model.named_modules(remove_duplicate=False)
        return put(model, {name: thin[id(module)] for name, module in list(names) if id(module) in thin})

    def _rank(self, values: Tensor) -> int:
        if self.rank is not None:
            return min(self.rank, len(values))
        energy = values.double().square().cumsum(0) / values.double().square().sum().clamp(min=TINY)
        wanted = self.energy if self.energy is not None else 1 - (self.error or 0) ** 2
        return min(int((energy < wanted).sum()) + 1, len(values))


def decompose(weight: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(left [N, R], values [R] from large to small, right [R, K]), whose product is the weight.

    With rows X: S S^T = X^T X / R (and a little, so that it can be inverted), W S = U diag(values) V, right = V S^-1.
    Cut at any rank, the product is the nearest to W in the outputs X W^T.
    """
    weight = weight.double()
    if rows is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left.float(), values.float(), right.float()
    moment = rows.double().T @ rows.double() / len(rows)
    moment += (1e-6 * moment.diagonal().mean() + TINY) * torch.eye(
        len(moment), dtype=torch.float32, device=weight.device
    )
    root = torch.linalg.cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return left.float(), values.float(), right.float()


def _pair(layer: nn.Linear, left: Tensor, right: Tensor) -> nn.Sequential:
    dtype, device = layer.weight.dtype, layer.weight.device
    first = nn.Linear(layer.in_features, len(right), False, device, dtype)
    second = nn.Linear(len(right), layer.out_features, layer.bias is not None, device, dtype)
    with torch.no_grad():
        first.weight.copy_(right)
        second.weight.copy_(left)
        if layer.bias is not None:
            second.bias.copy_(layer.bias)
    return nn.Sequential(first, second).train(layer.training).requires_grad_(layer.weight.requires_grad)
