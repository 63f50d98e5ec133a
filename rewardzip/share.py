"""``Share``: weights that share a value, neurons that share a place, layers that share a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .calibrate import layer_inputs
from .clustering import clusters
from .constraints import Codebook, Mask, check_packable, constrain, constraint_of, is_constrained, linears, settle
from .data import Data
from .fuse import MODULES
from .nn import SharedLinear
from .steps import Step, Work, check_numbers
from .swap import install, put

# what may stand between two layers whose neurons are merged: anything that takes each number by itself
ELEMENTWISE = (*MODULES, nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Share(Step):
    """of="weights": each layer's weights become the entries of a codebook of ``clusters`` values (k-means).

    of="neurons": of hidden neurons whose outputs on the data correlate by ``similarity`` or more, one stays; the next
    layer makes the others from it. of="layers": layers of one shape whose weights have that cosine become one.
    """

    clusters: int = 16
    of: Literal["weights", "neurons", "layers"] = "weights"
    similarity: float = 0.98
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        check_numbers(self, real=("similarity",))
        if type(self.clusters) is not int or not 16 <= self.clusters <= 256:
            raise ValueError(f"Share: clusters is {self.clusters!r}; it must be a whole number from 16 to 256")
        if self.of not in ("weights", "neurons", "layers"):
            raise ValueError(f"Share: of is {self.of!r}; it must be 'weights', 'neurons' or 'layers'")
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"Share: similarity is {self.similarity}; it must be from -1 to 1")

    def check(self, model: nn.Module, data: Data | None) -> None:
        if self.of == "weights":
            check_packable("Share", linears(model, self.skip))
        if self.of == "neurons":
            Work(model, data).needs_data(self)

    def apply(self, model: nn.Module, work: Work) -> nn.Module:
        if self.of == "weights":
            return self._share_weights(model, work)
        return self._merge_neurons(model, work) if self.of == "neurons" else self._share_layers(model, work)

    def _share_weights(self, model: nn.Module, work: Work) -> nn.Module:
        bits = (self.clusters - 1).bit_length()
        for name, layer in linears(model, self.skip).items():
            count = layer.weight.numel()
            if layer.out_features == 1:
                continue
            if count * bits / 8 + 4 * self.clusters >= count * layer.weight.element_size():
                work.notes.append(f"Share: {name} has {count} weights; with a codebook they would not be smaller")
                continue
            weight, mask = layer.weight.detach(), constraint_of(layer, Mask)
            settle(layer)
            if mask is None:
                indices, _ = clusters(weight.float(), self.clusters)
            else:
                indices = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)
                indices[mask.mask] = 1 + clusters(weight[mask.mask].float(), self.clusters - 1)[0]
            constrain(layer, Codebook(indices, self.clusters, zero=mask is not None))
        return model

    def pack(self, model: nn.Module, work: Work) -> nn.Module:
        """Settle every constraint and put codebook layers where a codebook was."""
        books = {name: book for name, layer in linears(model).items() if (book := constraint_of(layer, Codebook))}
        if self.of != "weights" or not books:
            return model
        tables = {
            name: book.table(model.get_submodule(name).parametrizations["weight"].original.detach())  # type: ignore[index, union-attr]
            for name, book in books.items()
        }
        settle(model)
        packed = {
            name: SharedLinear.from_codebook(model.get_submodule(name), book.indices, tables[name])  # type: ignore[arg-type]
            for name, book in books.items()
        }
        return install(model, packed, work.notes)

    def _merge_neurons(self, model: nn.Module, work: Work) -> nn.Module:
        pairs = [(a, b) for a, b in _consecutive(model) if a in linears(model, self.skip)]
        if not pairs:
            work.notes.append("Share: found no two layers with only an activation between them in an nn.Sequential")
        for first, second in pairs:
            one, two = model.get_submodule(first), model.get_submodule(second)
            assert isinstance(one, nn.Linear)
            assert isinstance(two, nn.Linear)
            rows = layer_inputs(model, [second], work.needs_data(self))[second]
            keep, mix, shift = merge(rows, self.similarity)
            if len(keep) == one.out_features:
                work.notes.append(f"Share: no two neurons of {first} correlate by {self.similarity} or more")
                continue
            narrow = _resized(one, one.weight[keep], None if one.bias is None else one.bias[keep])
            moved = two.weight.float() @ shift
            bias = moved if two.bias is None else two.bias + moved
            wide = _resized(two, two.weight.float() @ mix, bias)
            model = put(model, {first: narrow, second: wide})
            work.notes.append(f"Share: {one.out_features - len(keep)} of {one.out_features} neurons of {first} merged")
        return model

    def _share_layers(self, model: nn.Module, work: Work) -> nn.Module:
        kept: list[tuple[str, nn.Linear]] = []
        for name, layer in linears(model, self.skip).items():
            alike = [(n, k) for n, k in kept if _shape(k) == _shape(layer) and not is_constrained(k)]
            found = [
                (float(F.cosine_similarity(k.weight.detach().flatten(), layer.weight.detach().flatten(), 0)), n, k)
                for n, k in alike
            ]
            cosine, other, one = max(found, key=lambda f: f[0], default=(-2.0, "", layer))
            if found:
                verdict = "one layer from here on" if cosine >= self.similarity else "left apart"
                work.notes.append(f"Share: {name} and {other} have the cosine {cosine:.3f}: {verdict}")
            if not found or cosine < self.similarity or is_constrained(layer):
                kept.append((name, layer))
                continue
            with torch.no_grad():
                for mine, theirs in zip(one.parameters(), layer.parameters(), strict=True):
                    mine.copy_((mine + theirs) / 2)
            model = put(model, {name: one})
        return model


def merge(rows: Tensor, similarity: float) -> tuple[Tensor, Tensor, Tensor]:
    """(keep [k], mix [n, k], shift [n]) for the outputs [R, n] of n neurons: all ~= kept @ mix.T + shift.

    The liveliest come first; one that correlates enough with a kept one is a line through it, one that never changes
    is its mean.
    """
    mean, centred = rows.double().mean(0), rows.double() - rows.double().mean(0)
    moment = centred.T @ centred / len(rows)
    variance = moment.diagonal()
    live = variance > 1e-12 * variance.max()
    correlation = moment / (variance[:, None] * variance).sqrt().clamp(min=1e-300)
    keep: list[int] = []
    stands_for: dict[int, int] = {}
    for i in variance.argsort(descending=True, stable=True).tolist():
        if not live[i]:
            continue
        best = max(keep, key=lambda j: abs(float(correlation[i, j])), default=None)
        if best is not None and abs(float(correlation[i, best])) >= similarity:
            stands_for[i] = best
        else:
            keep.append(i)
            stands_for[i] = i
    # a layer of no neurons at all is none
    keep = sorted(keep) or [0]
    mix, shift = torch.zeros(len(mean), len(keep), dtype=torch.double, device=rows.device), mean.clone()
    for i, j in stands_for.items():
        slope = moment[i, j] / variance[j]
        mix[i, keep.index(j)] = slope
        shift[i] = mean[i] - slope * mean[j]
    return torch.tensor(keep, device=rows.device), mix.float(), shift.float()


def _consecutive(model: nn.Module) -> list[tuple[str, str]]:
    """Names of layers that follow one another in an nn.Sequential, used once, with only activations between."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    pairs = []
    for name, module in model.named_modules():
        if type(module) is not nn.Sequential:
            continue
        last = None
        for child, part in module.named_children():
            if parametrize.type_before_parametrizations(part) is nn.Linear and len(names[id(part)]) == 1:
                here = f"{name}.{child}" if name else child
                if last is not None:
                    pairs.append((last, here))
                last = None if is_constrained(part) else here
            elif type(part) not in ELEMENTWISE:
                last = None
    return pairs


def _resized(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n, k = weight.shape
    made = nn.Linear(k, n, bias is not None, layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made.train(layer.training).requires_grad_(layer.weight.requires_grad)


def _shape(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None
