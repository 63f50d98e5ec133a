"""``Quantize``: weights, and if wished the rows between layers, on a grid of 2 to 8 bits.

    symmetric   scale = max|w| / (2^(k-1) - 1)        codes from -(2^(k-1) - 1) to 2^(k-1) - 1
    affine      scale = (max - min) / (2^k - 1)       codes from -z to 2^k - 1 - z, zero point z = round(-min / scale)

with min <= 0 <= max, so that a zero stays a zero. Whatever has one scale an output runs on the int8 kernels: with codes
within a byte (all but 8 bits affine) they need no zero point, it is in the codes already; codes beyond are moved into
the byte, and one input more, minus the sum of the others, makes up for that. Groups are computed in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rewardzip_kernels.quantize import TINY

from .calibrate import check_enough, layer_inputs, layer_outputs
from .constraints import Grid, Mask, check_packable, constrain, constraint_of, linears, settle
from .data import Data
from .nn import CompressedLinear, GridLinear, Int8Linear, ShiftedLinear
from .steps import Step, Work, check_numbers
from .swap import install

CANDIDATES = [1 - 0.01 * i for i in range(81)]
"""Shares of the full range among which the one with the least squared error is looked for."""


@dataclass(frozen=True)
class Quantize(Step):
    """Put the weights on a grid; training goes on through it, and at the end the layers are packed.

    scheme: "symmetric" or "affine" (with a zero point). per: a scale for each output "channel", for a whole "tensor",
    or for each "group" of ``group`` inputs of an output. activations: None, "dynamic" (rows to int8, a scale each) or
    "static" (one scale a layer, from the data). ranges: what a scale must span, of weights and of static rows: all of
    it ("min-max"), ``percentile`` percent of it, or as much as gives the least squared error ("mse"). rounding:
    "compensated" chooses each column's rounding so that the columns after it make up for its error on the data.
    correct_bias: shift biases until each layer's mean output on the data is what it was. Layers with one output stay in
    full precision unless ``scalar_outputs``; names or wildcards in ``skip`` stay as they are.
    """

    packs: ClassVar[bool] = True

    bits: int = 8
    scheme: Literal["symmetric", "affine"] = "symmetric"
    per: Literal["channel", "tensor", "group"] = "channel"
    group: int = 32
    activations: Literal["dynamic", "static"] | None = None
    ranges: Literal["min-max", "percentile", "mse"] = "min-max"
    percentile: float = 99.9
    rounding: Literal["nearest", "compensated"] = "nearest"
    correct_bias: bool = False
    scalar_outputs: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        check_numbers(self, ("group",), ("percentile",))
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"Quantize: bits is {self.bits!r}; it must be a whole number from 2 to 8")
        choices = {
            "scheme": ("symmetric", "affine"),
            "per": ("channel", "tensor", "group"),
            "activations": (None, "dynamic", "static"),
            "ranges": ("min-max", "percentile", "mse"),
            "rounding": ("nearest", "compensated"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Quantize: {name} is {getattr(self, name)!r}; it must be one of {known}")
        if not 50 <= self.percentile <= 100 or self.group < 1:
            raise ValueError(f"Quantize: percentile={self.percentile} must be 50 to 100, group={self.group} 1 or more")
        if self.activations and not self._has_kernel:
            raise ValueError(
                f"Quantize: activations={self.activations!r} multiplies int8 by int8 with one scale an output; "
                f"bits={self.bits}, scheme={self.scheme!r}, per={self.per!r} has none"
            )

    @property
    def _has_kernel(self) -> bool:
        return self.per != "group" and (self.scheme == "symmetric" or self.bits < 8)

    def check(self, model: nn.Module, data: Data | None) -> None:
        check_packable("Quantize", self._layers(model))
        wanted = [self.activations == "static" and "static activations", self.correct_bias and "bias correction"]
        wanted += [self.rounding == "compensated" and "compensated rounding"]
        if data is None and any(wanted):
            raise ValueError(f"Quantize: {next(filter(None, wanted))} needs data, and compress was given none")
        if self.rounding == "compensated" and data is not None:
            check_enough(model, self._layers(model), data, "Quantize: compensated rounding")

    def _layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        layers = linears(model, self.skip)
        return {name: layer for name, layer in layers.items() if self.scalar_outputs or layer.out_features > 1}

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        layers = self._layers(model)
        if not layers:
            work.notes.append("Quantize: no layer to quantise; those there are have one output, hooks, or are skipped")
            return model
        means = {}
        if self.correct_bias or self.rounding == "compensated":
            # in the order they run, each layer seeing what those before it have become
            means = {k: v.mean(0) for k, v in layer_outputs(model, layers, work.needs_data(self)).items()}
            layers = {name: layers[name] for name in means}
        for name, layer in layers.items():
            weight, mask = layer.weight.detach().clone(), constraint_of(layer, Mask)
            grid = self.grid(weight)
            constrain(layer, grid)
            if self.rounding == "compensated":
                rows = layer_inputs(model, [name], work.needs_data(self))[name]
                # through the constraints, to what is trained
                layer.weight = compensated(weight, grid, rows, None if mask is None else mask.mask)
            if self.correct_bias and layer.bias is not None:
                now = layer_outputs(model, [name], work.needs_data(self))[name].mean(0)
                with torch.no_grad():
                    layer.bias.add_(means[name] - now)
        return model

    def grid(self, weight: Tensor) -> Grid:
        """The grid for a weight [N, K], from the range of its values."""
        weight = weight.detach().float()
        n, k = weight.shape
        group = min(self.group, k) if self.per == "group" else k
        if self.per == "tensor":
            runs = weight.reshape(1, 1, -1)
        else:
            # the last group is filled up with a value it has already, so that its range stays its own
            filled = torch.cat([weight, weight[:, -1:].expand(n, -k % group)], 1) if k % group else weight
            runs = filled.view(n, -1, group)
        levels = 2**self.bits - 1
        if self.ranges != "mse":
            share = 1.0 if self.ranges == "min-max" else self.percentile / 100
            scale, low, high = self._scale(*_span(runs, share), levels)
            return Grid(scale, low, high, group)
        best: list[Tensor] = []
        least, most = _span(runs, 1.0)
        for share in CANDIDATES:
            scale, low, high = self._scale(least * share, most * share, levels)
            steps = (runs / scale[..., None]).round().clamp(low[..., None], high[..., None])
            error = (steps * scale[..., None] - runs).square().sum(-1)
            found = [error, scale, low, high]
            best = found if not best else [torch.where(error < best[0], a, b) for a, b in zip(found, best, strict=True)]
        return Grid(best[1], best[2], best[3], group)

    def _scale(self, least: Tensor, most: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.scheme == "symmetric":
            half = levels // 2
            scale = torch.maximum(-least, most).clamp(min=TINY) / half
            return scale, torch.full_like(scale, -half), torch.full_like(scale, half)
        scale = (most - least).clamp(min=TINY) / levels
        low = (least / scale).round()
        return scale, low, low + levels

    def pack(self, model: nn.Module, work: Work) -> nn.Module:
        """Settle every constraint and put packed layers where a grid was."""
        grids = {name: grid for name, layer in linears(model).items() if (grid := constraint_of(layer, Grid))}
        ranges = {}
        if self.activations == "static" and grids:
            rows = layer_inputs(model, grids, work.needs_data(self))
            ranges = {name: self._row_range(x) for name, x in rows.items()}
        codes = {name: grid.codes(_beneath(model.get_submodule(name))) for name, grid in grids.items()}
        settle(model)
        packed: dict[str, CompressedLinear] = {}
        for name, grid in grids.items():
            layer, scale, low = model.get_submodule(name), grid.scale.detach(), grid.low
            assert isinstance(layer, nn.Linear)
            if self._has_kernel:
                scale = scale.expand(layer.out_features, 1)[:, 0]
                packed[name] = Int8Linear.from_codes(
                    layer, codes[name], scale, self.bits, self.activations or "float", ranges.get(name)
                )
            elif self.per != "group":
                scale, low = (t.expand(layer.out_features, 1)[:, 0] for t in (scale, low))
                packed[name] = ShiftedLinear.from_codes(layer, codes[name], scale, low)
            else:
                scale, low = (t.expand(layer.out_features, -1) for t in (scale, low))
                packed[name] = GridLinear.from_codes(layer, codes[name], scale, low, self.bits, grid.group)
        return install(model, packed, work.notes)

    def _row_range(self, rows: Tensor) -> float:
        sizes = rows.abs().flatten()
        if self.ranges == "min-max":
            return max(float(sizes.max()), TINY)
        if self.ranges == "percentile":
            place = max(1, round(self.percentile / 100 * len(sizes)))
            return max(float(sizes.kthvalue(place).values), TINY)
        full = max(float(sizes.max()), TINY)
        errors = [_rounding_error(sizes, share * full) for share in CANDIDATES]
        best: float = CANDIDATES[int(torch.stack(errors).argmin())]
        return best * full


def _rounding_error(sizes: Tensor, limit: float) -> Tensor:
    step = limit / 127
    return ((sizes / step).round().clamp(max=127) * step - sizes).square().mean()


def _span(runs: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(least, most) of each run [N, G, L] that holds 0, leaving out an equal share of both ends."""
    if share == 1.0:
        return runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
    place = max(1, round((1 - share) / 2 * runs.shape[-1]))
    ranked = runs.sort(-1).values
    return ranked[..., place - 1].clamp(max=0), ranked[..., -place].clamp(min=0)


def _beneath(layer: nn.Module) -> Tensor:
    """A layer's weight without its grid, which is the last of its constraints."""
    weights = layer.parametrizations["weight"]  # type: ignore[index]
    value: Tensor = weights.original  # type: ignore[union-attr]
    for constraint in weights:
        if not isinstance(constraint, Grid):
            value = constraint(value)
    return value.detach()


def compensated(weight: Tensor, grid: Grid, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Weights on the grid, column after column; what rounding one changed on ``rows`` the columns after it make up for.

    With H = X^T X / R, the change of a column by e is best made up for by -e * U[i, j] / U[i, i] in each later column
    j, where U is the upper Cholesky factor of the inverse of H.
    """
    n, k = weight.shape
    moment = rows.double().T @ rows.double() / len(rows)
    moment += (0.01 * moment.diagonal().mean() + TINY) * torch.eye(k, dtype=torch.float32, device=weight.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    scale, low, high = (grid.spread(t.detach(), k).expand(n, k).double() for t in (grid.scale, grid.low, grid.high))
    left = weight.double().clone()
    done = torch.zeros_like(left)
    for i in range(k):
        done[:, i] = (left[:, i] / scale[:, i]).round().clamp(low[:, i], high[:, i]) * scale[:, i]
        if mask is not None:
            done[:, i] *= mask[:, i]
        error = (left[:, i] - done[:, i]) / upper[i, i]
        left[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return done.to(weight.dtype)
