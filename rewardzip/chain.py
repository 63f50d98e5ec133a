"""A run of linear layers, with their norms and activations, in one launch.

The layers stay where they are and hold the numbers: a chain packs a copy of them into the two flat tensors of the
``fused_mlp`` op, and packs again, in place, when one of them has changed. At the sizes that fit one launch the copy is
small. Where the one launch is not what is wanted (a dense layer of the chain is being trained), the layers run one by
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from rewardzip_kernels import activations, fused_mlp, reward_head
from rewardzip_kernels.fused_mlp import multiplies_bfloat16
from rewardzip_kernels.mlp_layout import MAX_INPUTS, MAX_LAYERS, MAX_WIDTH, Linear, pack
from rewardzip_kernels.registration import nobody_listens, transforms
from rewardzip_kernels.reward_head import MAX_OUT

from . import running
from .guided import Guided, wanted
from .nn import BlockSparseLinear, CompressedLinear, Int8Linear, SparseLinear
from .shortcut import Shortcut

# beyond this the first layer alone is worth a launch of its own
MAX_INPUT_WIDTH = 1024

# weights of a network up to which one call is faster on a CPU than a call a layer, whose outputs threads can share, by
# what the layers before the last are: docs/benchmarks.md
WEIGHTS_OF_ONE_CALL = {"compressed": 1 << 22, "dense": 1 << 25, "blocks": 1 << 20}

# up to so many multiply-adds, zeros and all, one call is faster than a call a layer without empty blocks, by what the
# rows are: docs/benchmarks.md
FEW = {"float": 1 << 22, "dynamic": 1 << 25}

HALVES = (torch.float16, torch.bfloat16)

# of a dense bfloat16 model with more weights than these, torch is faster from so many multiply-adds on, on CPUs with
# instructions for bfloat16 that the kernels do not use
SMALL_BFLOAT16, MUCH_BFLOAT16 = 1 << 14, 1 << 23

# multiply-adds from which torch shares a few rows among threads, and the rows that are one thread's here
SHARED, ROWS_OF_A_BLOCK = 1 << 22, 48


@dataclass(frozen=True)
class Step:
    """One linear layer of a chain by its name in the module, its norm's name, and the activation behind them."""

    layer: str
    norm: str | None = None
    activation: str = "none"


@dataclass
class _Packed:
    changed: Callable[[], bool]
    weights: Tensor
    params: Tensor
    layers: str


class Chain:
    """The steps of one module as a function of its inputs, which are read side by side."""

    op = "fused_mlp"

    def __init__(self, module: nn.Module, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.linears: list[Any] = [module.get_submodule(step.layer) for step in steps]
        self.norms: list[Any] = [step.norm and module.get_submodule(step.norm) for step in steps]
        first = self.linears[0]
        self.rounds_rows = getattr(first, "rows", "float") == "dynamic"
        self.compute_dtype: torch.dtype | None = (
            torch.int8 if self.rounds_rows else getattr(first, "compute_dtype", None)
        )
        self.activate = [activations.parse(step.activation) for step in steps]
        self.packed: dict[tuple[int, ...], _Packed] = {}
        parts = [*self.linears, *filter(None, self.norms)]
        self.shortcut = Shortcut(parts, lambda: [self.numbers()], None, "none")
        self.dense, self.is_training = self.shortcut.dense, self.shortcut.is_training
        self.route, self.guided = self.shortcut.straight, Guided(self)
        self.guidable = self.compute_dtype in (None, torch.float32, torch.int8)

    def __call__(self, *inputs: Tensor, dim: int = -1) -> Tensor:
        # what is settled is not looked at in a traced call: it may be settled anew
        slow = is_dynamo_compiling() or (dim != -1 and dim != inputs[0].dim() - 1)
        y = None if slow else self.route.quick(*inputs)
        if y is not None:
            return y
        inputs = in_floats(inputs)
        if self.guidable and dim in (-1, inputs[0].dim() - 1) and wanted(inputs):
            return self.guided(inputs)
        return self.run(inputs, dim)

    def run(self, inputs: tuple[Tensor, ...], dim: int) -> Tensor:
        """A call that has to look at everything."""
        if dim not in (-1, inputs[0].dim() - 1):
            inputs = (torch.cat(inputs, dim),)
        # on a GPU, rounding rows between layers in one launch would be slower than what it saves
        if self.is_training() or (self.rounds_rows and running.on_gpu(inputs[0])):
            return self.one_by_one(*inputs)
        y = self.settled(inputs)
        widths = tuple([int(x.shape[-1]) for x in inputs])
        if y is not None:
            self.flat(widths)  # what is compiled or exported reads it
            return y
        packed = self.packed.get(widths)
        if is_compiling():
            if packed is None:
                return self.one_by_one(*inputs)
        elif packed is None or packed.changed():
            if transforms() is not None:  # numbers lent for this call
                return self.one_by_one(*inputs)
            packed = self.pack(widths)
        compute = compute_for(inputs, self.compute_dtype)
        return fused_mlp(list(inputs), packed.weights, packed.params, packed.layers, None, "none", compute)

    def settled(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        """Of a plain call, the same from the first one on. On a CPU rows are made dense."""
        if is_compiling():
            return None
        if inputs[0].is_cpu and not running.on_gpu(inputs[0]):
            inputs = tuple([x.contiguous() for x in inputs])
        widths = tuple([int(x.shape[-1]) for x in inputs])
        compute = compute_for(inputs, self.compute_dtype)
        self.shortcut.settle(inputs, self.describe(widths), compute, lambda: self.flat(widths))
        return self.route.quick(*inputs)

    def one_by_one(self, *inputs: Tensor, layers: int | None = None) -> Tensor:
        """The first ``layers``, or all."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        parts = zip(self.steps, self.linears, self.norms, self.activate, strict=True)
        for step, linear, norm, (activation, parameter) in list(parts)[:layers]:
            if norm is None and isinstance(linear, CompressedLinear):
                x = linear(x, step.activation)
            else:
                x = activation.forward(linear(x) if norm is None else norm(linear(x)), parameter)
        return x

    def pack(self, widths: tuple[int, ...]) -> _Packed:
        """The layers' numbers in flat tensors: in those there are, so that captured graphs see them, or in new ones."""
        changed, layers = self.shortcut.look().is_other(), self.describe(widths)
        with torch.inference_mode(False), torch.no_grad():
            weights, params = pack([self.numbers()], layers)
            old = self.packed.get(widths)
            if old is not None and old.weights.device == weights.device:
                weights, params = old.weights.copy_(weights), old.params.copy_(params)
        self.packed[widths] = _Packed(changed, weights, params, layers)
        return self.packed[widths]

    def flat(self, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What the op takes, as the layers are now."""
        packed = self.packed.get(widths)
        if packed is None or packed.changed():
            packed = self.pack(widths)
        return packed.weights, packed.params

    def take_over(self, old: Chain) -> None:
        """Keep what an equal chain over the same layers has packed: a captured or compiled graph may read it."""
        if old.steps == self.steps and all(a is b for a, b in zip(old.linears, self.linears, strict=True)):
            self.packed = old.packed

    def describe(self, widths: tuple[int, ...]) -> str:
        """The chain as ``fused_mlp`` takes it."""
        return f"{'+'.join(map(str, widths))}: " + ", ".join(
            f"{linear.out_features}{f' layer_norm:{norm.eps}' if norm else ''} {step.activation}"
            for step, linear, norm in zip(self.steps, self.linears, self.norms, strict=True)
        )

    def numbers(self) -> list[Linear]:
        hidden = [True] * (len(self.steps) - 1) + [False]
        return [_numbers(*parts) for parts in zip(self.linears, self.norms, hidden, strict=True)]

    def device(self) -> torch.device:
        """Where the layers are."""
        first: nn.Module = self.linears[0]
        tensors = [*first.parameters(), *first.buffers()]
        return tensors[0].device

    def repack(self) -> None:
        for widths in list(self.packed):
            self.pack(widths)

    @property
    def where(self) -> str:
        return "one call on a CPU, layer by layer on a GPU" if self.rounds_rows else "one launch"

    def __str__(self) -> str:
        return ", ".join(f"{step.layer} {step.activation}" for step in self.steps)


def in_floats(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Whole numbers and truth values beside floats as torch.cat would make them: floats."""
    kinds = [x.dtype for x in inputs]
    if not any(kind.is_floating_point for kind in kinds) or all(kind.is_floating_point for kind in kinds):
        return inputs
    kind = reduce(torch.promote_types, kinds)
    return tuple([x if x.is_floating_point() else x.to(kind) for x in inputs])


def compute_for(inputs: tuple[Tensor, ...], wish: torch.dtype | None) -> torch.dtype | None:
    """What products are made of: the user's wish; else on a GPU what the op takes for these rows, on a CPU bfloat16 for
    rows of it, which many multiply in one instruction, and float32 for others."""
    if wish is not None or running.on_gpu(inputs[0]):
        return wish
    return torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in inputs) else torch.float32


def autocast(inputs: tuple[Tensor, ...]) -> bool:
    """Whether torch's own layers would compute in another type here."""
    return torch.is_autocast_enabled(inputs[0].device.type)


def _numbers(linear: Any, norm: nn.LayerNorm | None, hidden: bool) -> Linear:
    n = linear.out_features
    if hidden and isinstance(linear, SparseLinear):
        weight, scale, bias = linear.unpacked(), linear.scale, linear.fp32_bias
    elif hidden and isinstance(linear, Int8Linear):
        weight, scale, bias = linear.int8_weight, linear.scale, linear.fp32_bias
    elif isinstance(linear, Int8Linear):
        weight, scale, bias = linear.int8_weight.float() * linear.scale[:, None], None, linear.fp32_bias
    elif hidden and running.on_gpu(linear.weight):  # 16 bits are read as they are
        weight, scale, bias = linear.weight, None, linear.bias
    else:
        weight, scale, bias = linear.weight.float(), None, linear.bias
    bias = torch.zeros(n, dtype=torch.float32, device=weight.device) if bias is None else bias
    if norm is None:
        return Linear(weight, bias, scale)
    ones, zeros = (
        torch.ones(n, dtype=torch.float32, device=weight.device),
        torch.zeros(n, dtype=torch.float32, device=weight.device),
    )
    return Linear(
        weight, bias, scale, ones if norm.weight is None else norm.weight, zeros if norm.bias is None else norm.bias
    )


def follow(linears: list[Any], kinds: tuple[type[CompressedLinear], ...] = (Int8Linear,)) -> bool:
    """Whether these layers, one after the other, are a network that the ops know, whatever its widths."""
    hidden, last = linears[:-1], linears[-1]
    return (
        2 <= len(linears) <= MAX_LAYERS
        and all(type(m) in kinds and m.rows != "static" for m in hidden)
        and len({(m.rows, m.compute_dtype) for m in hidden}) == 1
        and (type(last) is Int8Linear or type(last) is nn.Linear)
        and all(a.out_features == b.in_features for a, b in pairwise(linears))
    )


def fits(linears: list[Any], kinds: tuple[type[CompressedLinear], ...] = (Int8Linear,)) -> bool:
    """Whether they can be one launch of ``fused_mlp``."""
    return is_narrow(linears) and follow(linears, kinds)


def is_narrow(linears: list[Any]) -> bool:
    return all(m.out_features <= MAX_WIDTH for m in linears) and linears[0].in_features <= MAX_INPUT_WIDTH


def is_one_call(linears: list[Any]) -> bool:
    """Whether one thread takes a row through all of them on a CPU."""
    kinds = {type(m) for m in linears[:-1]}
    form = "blocks" if BlockSparseLinear in kinds else "dense" if kinds == {nn.Linear} else "compressed"
    most = WEIGHTS_OF_ONE_CALL[form]
    return bool(sum(m.in_features * m.out_features for m in linears) <= most)


def fits_for_few(linears: list[Any]) -> bool:
    """Whether they can be a ``Pruned`` chain: blocks among them, and a last layer that reads its rows as they are."""
    blocks = [m for m in linears if type(m) is BlockSparseLinear]
    return (
        bool(blocks)
        and is_one_call(linears)
        and all(m.scale is not None for m in blocks)
        and follow(linears, (Int8Linear, BlockSparseLinear))
        and getattr(linears[-1], "rows", "float") == "float"
    )


def fits_dense(linears: list[Any]) -> bool:
    """Whether they can be a ``Dense`` chain."""
    return (
        2 <= len(linears) <= MAX_LAYERS
        and all(type(m) is nn.Linear for m in linears)
        and is_one_call(linears)
        and all(a.out_features == b.in_features for a, b in pairwise(linears))
    )


def joined(module: nn.Module, *inputs: Tensor, dim: int) -> Any:
    """``module(torch.cat(inputs, dim))``, without the copy where the module is one chain."""
    whole = getattr(type(module), "rz_whole", None)
    if whole is None or len(inputs) > MAX_INPUTS or module._forward_hooks or module._forward_pre_hooks:
        return module(torch.cat(inputs, dim))
    return whole(*inputs, dim=dim)


class Wide(Chain):
    """Layers too wide for one launch: one call on a CPU if they are small enough for one thread to take a row through
    all of them; elsewhere one by one, and on a GPU the last two as a ``Head`` if they can be."""

    op = ""
    tail: Head | None = None

    def __init__(self, module: nn.Module, steps: tuple[Step, ...]) -> None:
        super().__init__(module, steps)
        self.weights = sum(m.in_features * m.out_features for m in self.linears)
        self.one_call = is_one_call(self.linears)
        if len(steps) > 2 and is_head(self.linears[-2:], steps[-2:]):
            self.tail = Head(module, steps[-2:])

    @property
    def where(self) -> str:
        cpu = "one call" if self.one_call else "layer by layer"
        return f"{cpu} on a CPU, on a GPU layer by layer{' but for the last two, one launch' if self.tail else ''}"

    def run(self, inputs: tuple[Tensor, ...], dim: int) -> Tensor:
        if dim not in (-1, inputs[0].dim() - 1):
            inputs = (torch.cat(inputs, dim),)
        if running.on_gpu(inputs[0]) and self.tail is not None:
            return self.tail(self.one_by_one(*inputs, layers=len(self.steps) - 2))
        if inputs[0].is_cpu and self.one_call and not self.is_training():
            y = self.settled(inputs)
            if y is not None:
                return y
        return self.one_by_one(*inputs)


class Pruned(Wide):
    """Layers of which some leave empty blocks out: for few rows one call, zeros and all; for more one by one."""

    def __init__(self, module: nn.Module, steps: tuple[Step, ...]) -> None:
        super().__init__(module, steps)
        self.few = FEW[self.linears[0].rows] // self.weights

    @property
    def where(self) -> str:
        return f"one call on a CPU up to {self.few} rows, beyond layer by layer and without the empty blocks"

    def run(self, inputs: tuple[Tensor, ...], dim: int) -> Tensor:
        if dim not in (-1, inputs[0].dim() - 1):
            inputs = (torch.cat(inputs, dim),)
        # a traced call may get any number of rows
        if is_compiling() or inputs[0].shape[:-1].numel() > self.few:
            return self.one_by_one(*inputs)
        return super().run(inputs, -1)


class Dense(Wide):
    """Layers that are not compressed, in one call on a CPU that adds in another order and changes nothing else."""

    seen: tuple[int, list[int]] | None = None

    def __init__(self, module: nn.Module, steps: tuple[Step, ...]) -> None:
        super().__init__(module, steps)
        self.narrow = is_narrow(self.linears)

    @property
    def where(self) -> str:
        return f"one call on a CPU, on a GPU {'one launch of 16-bit rows' if self.narrow else 'layer by layer'}"

    def __call__(self, *inputs: Tensor, dim: int = -1) -> Tensor:
        # what is settled has asked the same, more cheaply
        y = None if is_dynamo_compiling() or dim != -1 else self.route.quick(*inputs)
        if y is not None:
            return y
        alike = is_compiling() or all(p.dtype == x.dtype for p in self.dense() for x in inputs)
        if self.is_training() or not alike or autocast(inputs):
            return self.one_by_one(*inputs if dim == -1 else (torch.cat(inputs, dim),))
        return super().__call__(*inputs, dim=dim)

    def run(self, inputs: tuple[Tensor, ...], dim: int) -> Tensor:
        if is_compiling() or not nobody_listens(inputs):
            return self.one_by_one(*inputs if dim == -1 else (torch.cat(inputs, dim),))
        # numbers that change from call to call, as in training, are not worth packing
        before, self.seen = self.seen, self.shortcut.state()
        x = inputs[0]
        much = x.dtype == torch.bfloat16 and self.weights > SMALL_BFLOAT16 and not multiplies_bfloat16()
        much = much and x.is_cpu and x.shape[:-1].numel() * self.weights > MUCH_BFLOAT16
        if much or before not in (None, self.seen) or (x.is_cpu and self.is_shared_by_torch(x.shape[:-1].numel())):
            return self.one_by_one(*inputs if dim == -1 else (torch.cat(inputs, dim),))
        if running.on_gpu(x) and self.narrow and x.dtype in HALVES:
            return Chain.run(self, inputs, dim)
        return super().run(inputs, dim)

    def is_shared_by_torch(self, rows: int) -> bool:
        """Whether torch's layers, twice as slow on a thread, have more than twice the threads to share the work.

        It is shared there from some million multiply-adds on, outputs and all; here by blocks of rows.
        """
        return rows * self.weights > SHARED and torch.get_num_threads() > 2 * max(1, rows // ROWS_OF_A_BLOCK)


class Head(Wide):
    """Two layers too wide for one MLP launch: a hidden layer that is never stored, and its product with few outputs."""

    op = "reward_head"

    def __init__(self, module: nn.Module, steps: tuple[Step, ...]) -> None:
        super().__init__(module, steps)
        self.last_changed: Callable[[], bool] = lambda: True
        self.last: Linear | None = None

    @property
    def where(self) -> str:
        cpu = "one call" if self.one_call else "layer by layer"
        return f"one launch on a GPU, on a CPU {cpu}"

    def run(self, inputs: tuple[Tensor, ...], dim: int) -> Tensor:
        if not running.on_gpu(inputs[0]) or self.is_training():
            return super().run(inputs, dim)
        return self.fused(inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim))

    def fused(self, x: Tensor) -> Tensor:
        """The one launch; right anywhere, worth it on a GPU."""
        hidden, last = self.linears[0], self.in_full()
        weights = hidden.int8_weight, hidden.scale, hidden.fp32_bias, last.weight, last.bias
        return reward_head(x, *weights, self.steps[0].activation, hidden.compute_dtype)

    def in_full(self) -> Linear:
        """The last layer in fp32: its own tensors where they are, otherwise copies, written anew where they lie."""
        linear = self.linears[1]
        if linear.weight.dtype == torch.float32 and type(linear) is nn.Linear:
            return Linear(linear.weight, linear.bias)
        if not is_compiling() and (self.last is None or self.last_changed()):
            self.repack()
        return self.last or _numbers(linear, None, False)

    def repack(self) -> None:
        super().repack()
        self.last_changed = self.shortcut.look().is_other()
        with torch.inference_mode(False), torch.no_grad():
            weight, bias, *_ = _numbers(self.linears[1], None, False)
            new, old = Linear(weight.float(), bias.float()), self.last
            if old is not None and old.weight.device == weight.device:  # captured graphs read it where it lies
                new = Linear(old.weight.copy_(new.weight), old.bias.copy_(new.bias))
        self.last = new


def is_head(linears: list[Any], steps: Sequence[Step]) -> bool:
    """Whether these two layers can be one ``reward_head``."""
    return (
        len(linears) == 2
        and type(linears[0]) is Int8Linear
        and linears[0].rows == "float"
        and type(linears[1]) in (nn.Linear, Int8Linear)
        and getattr(linears[1], "rows", "float") == "float"
        and linears[1].out_features <= MAX_OUT
        and linears[0].out_features == linears[1].in_features
        and not any(step.norm for step in steps)
        and steps[1].activation == "none"
    )
