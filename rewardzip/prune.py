"""Pruning: fewer weights in a pattern that kernels can use, or fewer neurons, at once or in rounds of fine-tuning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rewardzip_kernels.blocks import default_block, grid

from .channels import Channels
from .constraints import copied, masked
from .data import Data
from .finetune import FineTune
from .importance import (
    IMPORTANCES,
    Importance,
    keep_highest,
    keep_of_each,
    relative,
    scored,
    spread,
)
from .moments import Moments, check_rows, dense, moments, refit, sizes
from .neurons import choose, neuron_scores, prunable, shrink
from .nn.base import is_conv1d
from .prunable import adopt, check_unshared, layers_to_prune, linears, skipped
from .steps import Step, Work

# rows that the norm of an input is estimated from, at least
NORM_ROWS = 32


@dataclass(frozen=True)
class Prune(Step):
    """Which weights go.

    pattern: "unstructured"; "n:m" (such as "2:4"), which keeps n of each m consecutive inputs; "block", whole blocks of
        weights; "neurons", which really makes the layers smaller.
    amount: the share of the weights, blocks or neurons that is gone afterwards, in [0, 1); zeros that were there count
        and stay. threshold: in its place for "unstructured", weights smaller than this in magnitude go.
    importance: "magnitude" (L1 norms for groups); "activation", weighted by the inputs' norms (Wanda); "second-order",
        by the loss that is left once the other weights made up for it, which they do (SparseGPT; for neurons, the next
        layer is fitted anew); "random", as a control. The middle two need data. With data, what a neuron gave on
        average moves into the next bias under any of them.
    scope: whether the amount holds for each "layer", or for the whole "model", the least important going first.
    block: (outputs, inputs); None is what the layer's device multiplies best, (16, 4) on a CPU and (64, 64) on a GPU.
        Blocks at the edges may be cut short.
    rounds: pruned in so many steps, large ones first (cubic), and trained after each for finetune_steps towards the
        outputs of the original; amp as in ``FineTune``.
    skip: names or shell wildcards of layers to leave alone. Layers with one output always are.
    """

    pattern: str
    amount: float | None = None
    _: KW_ONLY
    threshold: float | None = None
    importance: Importance = "magnitude"
    scope: Literal["layer", "model"] = "layer"
    block: tuple[int, int] | None = None
    rounds: int = 1
    finetune_steps: int = 0
    amp: Literal["float16", "bfloat16"] | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.block, list):
            object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        if self.pattern not in ("unstructured", "block", "neurons") and self._of_each is None:
            raise ValueError(
                f"Prune: pattern is {self.pattern!r}; it must be 'unstructured', 'block', 'neurons', or n:m with "
                "1 <= n < m, such as '2:4'"
            )
        if self._of_each is not None and (self.amount, self.threshold) != (None, None):
            raise ValueError(
                f"Prune: pattern {self.pattern!r} says how much goes; amount and threshold have no meaning"
            )
        if self._of_each is None and (self.amount is None) == (self.threshold is None):
            raise ValueError(f"Prune: one of amount={self.amount} and threshold={self.threshold} must be given")
        if self.amount is not None and not (isinstance(self.amount, Real) and 0 <= self.amount <= 1):
            raise ValueError(f"Prune: amount is {self.amount!r}; it must be in [0, 1)")
        if self.amount == 1:
            raise ValueError("Prune: amount is 1, which would remove everything")
        if self.threshold is not None and (self.pattern, self.importance) != ("unstructured", "magnitude"):
            raise ValueError(
                f"Prune: threshold is for 'unstructured' and 'magnitude', not {self.pattern!r} and {self.importance!r}"
            )
        if self.threshold is not None and not (isinstance(self.threshold, Real) and 0 < self.threshold < math.inf):
            raise ValueError(f"Prune: threshold is {self.threshold!r}; it must be positive")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"Prune: importance is {self.importance!r}; it must be one of {', '.join(IMPORTANCES)}")
        if self.scope not in ("layer", "model") or (self.scope == "model" and self.amount is None):
            raise ValueError(f"Prune: scope is {self.scope!r}; it must be 'layer', or 'model' where there is an amount")
        if self.block is not None and not _is_block(self.block):
            raise ValueError(f"Prune: block is {self.block!r}; it must be (outputs, inputs), 1 or more each")
        whole = type(self.rounds) is int and type(self.finetune_steps) is int
        if not whole or self.rounds < 1 or self.finetune_steps < 0:
            raise ValueError(
                f"Prune: rounds={self.rounds!r} must be 1 or more, finetune_steps={self.finetune_steps!r} 0 or more, "
                "both whole numbers"
            )
        if self.amp is not None:
            FineTune(amp=self.amp)  # which refuses what it does not know

    @property
    def _of_each(self) -> tuple[int, int] | None:
        """(n, m) of a pattern n:m."""
        found = re.fullmatch(r"(\d+):(\d+)", str(self.pattern))
        n, m = map(int, found.groups()) if found else (0, 0)
        return (n, m) if 1 <= n < m else None

    @property
    def _needs_moments(self) -> bool:
        return self.importance in ("activation", "second-order")

    def check(self, model: nn.Module, data: Data | None) -> None:
        layers = layers_to_prune(model, self.skip)
        for name, layer in layers.items():
            inputs = sizes(layer)[1]
            if self._of_each is not None and inputs < self._of_each[1]:
                raise ValueError(f"Prune: layer {name!r} has {inputs} inputs, too few for {self.pattern}; skip it")
        self._check_amount(layers)
        readers = list(layers)
        if self.pattern == "neurons":
            channels = Channels.of(model)
            readers = [r for name in prunable(channels, skipped(model, self.skip)) for r in channels.readers(name)]
        if data is None and (self._needs_moments or self.finetune_steps):
            why = f"importance={self.importance!r}" if self._needs_moments else "finetune_steps"
            raise ValueError(f"Prune: {why} needs data, and there is none")
        if data is not None:
            _check_runs(model, data)
        if data is not None and self._needs_moments:
            inputs_of = {name: sizes(model.get_submodule(name))[1] for name in readers}
            second = self.importance == "second-order"
            needed = {name: inputs if second else NORM_ROWS for name, inputs in inputs_of.items()}
            check_rows(copied(model), needed, data, "Prune")

    def _block_of(self, layer: Any) -> tuple[int, int]:
        if self.pattern != "block":
            return 1, 1
        return self.block or default_block(layer.weight.device)

    def _check_amount(self, layers: Mapping[str, Any]) -> None:
        """That some of each layer goes and some stays, or of the model."""
        if self.amount is None or self.pattern == "neurons":
            return
        blocks = {name: self._block_of(layer) for name, layer in layers.items()}
        parts = {f"layer {n!r}": math.prod(grid(*sizes(layer), blocks[n])) for n, layer in layers.items()}
        if self.scope == "model":
            parts = {"the model": sum(parts.values())}
        kinds = " and ".join(map(str, dict.fromkeys(blocks.values())))
        for whose, count in parts.items():
            what = f"{count} blocks of {kinds}" if self.pattern == "block" else f"{count} weights"
            gone = round(self.amount * count)
            if self.pattern == "block" and gone == 0 < self.amount:
                raise ValueError(
                    f"Prune: {self.amount} of the {what} of {whose} are none; take more, or smaller blocks"
                )
            if gone == count:
                raise ValueError(
                    f"Prune: {self.amount} of the {what} of {whose} would be all of them; skip it, take less, or use "
                    "scope='model'"
                )

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        adopt(model)
        widths = {}
        if self.pattern == "neurons":
            names = prunable(Channels.of(model), skipped(model, self.skip))
            widths = {name: sizes(model.get_submodule(name))[0] for name in names}
        for part in range(1, self.rounds + 1):
            share = 1 - (1 - part / self.rounds) ** 3
            if self.pattern == "neurons":
                self._remove_neurons(model, work, share, widths)
            else:
                self._remove_weights(model, work, share)
            if self.finetune_steps:
                FineTune(self.finetune_steps, amp=self.amp).apply(model, work)
        return model

    def _moments(self, model: nn.Module, layers: Iterable[str], work: Work) -> dict[str, Moments]:
        if not self._needs_moments:
            return {}
        return moments(model, layers, work.needs_data(self), steepness=self.importance == "second-order")

    def _remove_neurons(self, model: nn.Module, work: Work, share: float, widths: Mapping[str, int]) -> None:
        assert self.amount is not None
        channels, layers = Channels.of(model), list(widths)
        readers = dict.fromkeys(r for name in layers for r in channels.readers(name))
        inputs = self._moments(model, readers, work)
        before = copied(model)
        generator = torch.Generator().manual_seed(work.seed)
        scores = neuron_scores(channels, layers, self.importance, inputs, generator)
        if self.scope == "model" and self.importance != "second-order":
            scores = relative(scores)
        gone = {n: widths[n] - len(scores[n]) for n in layers}
        removed: dict[str, int] | int
        if self.scope == "model":
            removed = round(self.amount * share * sum(widths.values())) - sum(gone.values())
        else:
            removed = {n: round(self.amount * share * widths[n]) - gone[n] for n in layers}
        kept = choose(scores, removed)
        for name in shrink(channels, kept):
            if work.data is not None:
                refit(before, model, name, work.data, self.importance == "second-order", kept.get(name))

    def _remove_weights(self, model: nn.Module, work: Work, share: float) -> None:
        layers = layers_to_prune(model, self.skip)
        inputs = self._moments(model, layers, work)
        before = copied(model)
        keep = self._masks(layers, inputs, work.seed, share)
        for name, mask in keep.items():
            if not mask.any():
                raise ValueError(f"Prune: {self} would remove all {mask.numel()} weights of layer {name!r}")
        for name, mask in keep.items():
            masked(layers[name], mask.t() if is_conv1d(layers[name]) else mask)
        if self.importance == "second-order":
            for name in inputs:
                refit(before, model, name, work.needs_data(self))

    def _masks(self, layers: dict[str, Any], inputs: dict[str, Any], seed: int, share: float) -> dict[str, Tensor]:
        """[outputs, inputs] of each layer: what stays once this share of the amount is gone; zeros go first."""
        generator = torch.Generator().manual_seed(seed)
        weights = {name: dense(layer) for name, layer in layers.items()}
        if self.threshold is not None:
            theta = self.threshold * share
            return {name: (w.abs() >= theta) & (w != 0) for name, w in weights.items()}
        blocks = {name: self._block_of(layer) for name, layer in layers.items()}
        scores = {}
        for name, weight in weights.items():
            block = blocks[name]
            score = scored(weight, self.importance, inputs.get(name), generator, block)
            there = scored(weight, "magnitude", None, generator, block) > 0
            scores[name] = score.masked_fill(~there, -1.0)
        if self._of_each is not None:
            n, m = self._of_each
            kept = {name: keep_of_each(s, round(m - (m - n) * share), m) for name, s in scores.items()}
        elif self.scope == "model":
            kept = self._over_model(scores, share)
        else:
            assert self.amount is not None
            kept = {name: keep_highest(s, round(self.amount * share * s.numel())) for name, s in scores.items()}
        return {name: spread(k, blocks[name], weights[name].shape) & (weights[name] != 0) for name, k in kept.items()}

    def _over_model(self, scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        assert self.amount is not None
        comparable = relative(scores) if self.importance == "activation" else scores
        flat = torch.cat([s.flatten().to("cpu") for s in comparable.values()])
        mask = keep_highest(flat, round(self.amount * share * len(flat))).split([s.numel() for s in scores.values()])
        return {n: m.view(s.shape).to(s.device) for (n, s), m in zip(scores.items(), mask, strict=True)}


@torch.no_grad()
def _check_runs(model: nn.Module, data: Data) -> None:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        copied(model).eval()(*data[:1].to(device).inputs)
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in data.inputs)
        kind = type(model).__name__
        raise ValueError(f"Prune: {kind} does not run on inputs of the shapes {shapes}: {error}") from error


def _is_block(block: Any) -> bool:
    return isinstance(block, tuple) and len(block) == 2 and all(type(side) is int and side >= 1 for side in block)


def prune(
    model: nn.Module,
    step: Prune | None = None,
    data: Data | Sequence[Tensor] | Tensor | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A pruned copy of ``model``. Zeros are held by masks, through any training, until ``swap`` or ``save`` fix them.

    masks: in place of a step, by the layer's name: a tensor of the weight's shape, zero or False where weights go.
    """
    if (step is None) == (masks is None):
        raise ValueError(f"prune: one of step={step} and masks={'given' if masks else masks} must be given")
    if step is not None and not isinstance(step, Prune):
        raise TypeError(f"prune: takes a Prune, got {type(step).__name__}")
    rows = None if data is None else Data.of(model, data)
    copy = copied(model)
    if masks is not None:
        _mask(copy, masks)
        return copy
    assert step is not None
    step.check(copy, rows)
    return step.apply(copy, Work(copied(model).eval(), rows, seed, progress))


def _mask(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    layers = linears(model)
    for name, mask in given.items():
        if name not in layers:
            raise ValueError(f"prune: there is no linear layer {name!r} for a mask; there are {', '.join(layers)}")
        if not isinstance(mask, Tensor):
            raise TypeError(f"prune: the mask of layer {name!r} is {type(mask).__name__}, not a tensor")
        shape = tuple(layers[name].weight.shape)
        if tuple(mask.shape) != shape:
            raise ValueError(f"prune: the mask of layer {name!r} is {tuple(mask.shape)}, its weight {shape}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"prune: the mask of layer {name!r} holds other values than 0 and 1")
        if not mask.any():
            raise ValueError(f"prune: the mask of layer {name!r} removes everything")
    check_unshared(model, given)
    adopt(model)
    for name, mask in given.items():
        masked(layers[name], mask.bool().to(layers[name].weight.device))
