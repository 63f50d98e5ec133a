"""Where the outputs of each linear layer go: who reads which neuron, found by following the model's own code.

A value in the traced code is a run of parts side by side: neurons of a layer, or numbers that no layer of the model
made. Activations, dropout and norms keep the neurons apart, ``torch.cat`` puts runs side by side, a linear layer reads
them. What goes anywhere else cannot be removed, and the reason is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .constraints import Mask
from .fuse import FUNCTIONS, MODULES, is_plain
from .models import MLP
from .nn.base import is_pruned
from .trace import read

# each output depends on the input in the same place alone
ELEMENTWISE_MODULES = (*MODULES, nn.Dropout, nn.Identity, nn.ReLU6, nn.CELU, nn.SELU, nn.Hardtanh, nn.Hardswish,
                       nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink)  # fmt: skip
ELEMENTWISE = {*FUNCTIONS, *(getattr(F, name) for name in ("softplus", "dropout", "relu6", "celu", "selu", "hardtanh",
               "hardswish", "hardsigmoid", "logsigmoid", "softsign", "tanhshrink")), torch.clamp, torch.square,
               torch.abs, torch.sin, torch.cos, torch.exp, "clamp", "square", "abs", "sin", "cos", "exp", "contiguous",
               "float", operator.neg, "neg"}  # fmt: skip
# the same, where the other operand is a number
ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.add, torch.sub, torch.mul,
              torch.div, torch.pow, "add", "sub", "mul", "div", "pow"}  # fmt: skip
CONCATENATIONS = (torch.cat, torch.concat)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)


@dataclass(frozen=True)
class Part:
    """A run of the last dimension: the neurons of ``layer``, or ``width`` (None: unknown) numbers of nobody's.

    known: which neurons are the same for every input, and there ``values`` says what they are.
    """

    layer: str | None = None
    width: int | None = None
    known: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Value:
    """A tensor in the traced code. sources: the layers whose outputs reached it through no other linear layer."""

    parts: tuple[Part, ...] = (Part(),)
    sources: frozenset[str] = frozenset()


@dataclass
class Channels:
    """Of a model: its linear layers in the order they run, who reads them, and why some must keep their neurons."""

    model: nn.Module
    layers: list[str] = field(default_factory=list)
    reads: dict[str, tuple[Part, ...]] = field(default_factory=dict)
    """By the name of a linear layer or a norm: the parts side by side that it takes."""
    hidden: set[str] = field(default_factory=set)
    """Layers whose outputs reach another linear layer."""
    fixed: dict[str, str] = field(default_factory=dict)
    """Layers that must keep their neurons, and why."""

    @classmethod
    def of(cls, model: nn.Module) -> Channels:
        found = cls(model)
        names = {module: name for name, module in model.named_modules()}
        found._names = names
        found._fix(found._module(model, []), "the model returns it")
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in found.layers:
                found.fixed.setdefault(name, "the forward does not run it, so what it reads is not known")
        for name in found._raw:
            found._fix(Value(found.reads.get(name, ())), f"the forward reads the parameters of {name!r} itself")
        return found

    def readers(self, layer: str) -> list[str]:
        """The linear layers that take the layer's neurons."""
        return [r for r in self.layers if any(part.layer == layer for part in self.reads[r])]

    def _fix(self, value: Value, reason: str) -> None:
        for part in value.parts:
            if part.layer is not None:
                self.fixed.setdefault(part.layer, reason)

    def _stop(self, values: list[Value], reason: str) -> Value:
        """What comes of values that go where neurons cannot be followed."""
        for value in values:
            self._fix(value, reason)
        return Value(sources=frozenset().union(*(v.sources for v in values)))

    def _module(self, module: nn.Module, given: list[Value]) -> Value:
        name, x = self._names[module], given[0] if given else Value()
        if isinstance(module, nn.Linear):
            if type(module).forward is nn.Linear.forward and "forward" not in module.__dict__:
                return self._linear(module, name, x)
            return self._unread(module, given, f"layer {name!r} has a forward of its own")
        if isinstance(module, ELEMENTWISE_MODULES) and _is_alone(module):
            return _mapped(x, module if not isinstance(module, nn.Dropout) else nn.Identity())
        if isinstance(module, nn.PReLU) and module.num_parameters == 1 and _is_alone(module):
            return _mapped(x, module)
        if isinstance(module, NORMS) and _is_alone(module) and _norm_size(module) is not None:
            return self._norm(module, name, x)
        if type(module) is MLP and is_plain(module):
            # any number of inputs cannot be traced; they are put side by side for the net
            return self._module(module.net, [self._stop(given, "it goes into an MLP among other inputs")])
        found = read(module) if is_plain(module) else "it has hooks"
        if isinstance(found, str):
            what = f"module {name!r}" if name else type(module).__name__
            if type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children()):
                found = f"what a {type(module).__name__} does with neurons is not known"
            return self._unread(module, given, f"{what} cannot be followed: {found}")
        return self._graph(module, found[0], given)

    def _unread(self, module: nn.Module, given: list[Value], reason: str) -> Value:
        inside = {self._names[m] for m in module.modules() if isinstance(m, nn.Linear)}
        for value in given:
            self.hidden |= value.sources if inside else set()
        for layer in inside:
            self.fixed.setdefault(layer, reason)
            self._enter(layer, (Part(),), Value())
        self.hidden |= inside
        return self._stop(given, reason)

    def _linear(self, linear: nn.Linear, name: str, x: Value) -> Value:
        parts = _sized(x.parts, linear.in_features)
        self.hidden |= x.sources
        if parts is None:
            self._fix(x, f"layer {name!r} takes {linear.in_features} inputs, which parts of which is not clear")
            parts = (Part(None, linear.in_features),)
        self._enter(name, parts, x)
        if not is_plain(linear) and not is_pruned(linear):
            self.fixed.setdefault(name, "it has hooks")
            self._fix(x, f"layer {name!r}, which reads it, has hooks")
        if parametrize.is_parametrized(linear) and not _masked_only(linear):
            self.fixed.setdefault(name, "it holds constraints other than masks")
            self._fix(x, f"layer {name!r}, which reads it, holds constraints other than masks")
        known, values = _constant(linear, parts)
        return Value((Part(name, linear.out_features, known, values),), frozenset({name}))

    def _norm(self, norm: Any, name: str, x: Value) -> Value:
        size = _norm_size(norm) or 0
        parts = _sized(x.parts, size)
        if parts is None:
            return self._stop([x], f"norm {name!r} takes {size} inputs, of what is not clear")
        self._enter(name, parts, x)
        # what a norm makes of a constant depends on its neighbours
        return replace(x, parts=tuple(Part(part.layer, part.width) for part in parts))

    def _enter(self, name: str, parts: tuple[Part, ...], x: Value) -> None:
        """Note what a layer or norm reads; several calls must read the same."""
        if isinstance(self.model.get_submodule(name), nn.Linear) and name not in self.layers:
            self.layers.append(name)
        before = self.reads.setdefault(name, parts)
        if [(p.layer, p.width) for p in before] != [(p.layer, p.width) for p in parts]:
            for value in (x, Value(before)):
                self._fix(value, f"{name!r} runs several times, on the outputs of different layers")

    def _graph(self, module: nn.Module, graph: fx.Graph, given: list[Value]) -> Value:
        values: dict[fx.Node, Value] = {}
        waiting = list(given)
        for node in graph.nodes:
            nodes = [values[n] for n in node.all_input_nodes]
            if node.op == "placeholder":
                values[node] = waiting.pop(0) if waiting else Value()
            elif node.op == "get_attr":
                values[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                if isinstance(node.args[0], fx.Node):
                    return values[node.args[0]]
                return self._stop(nodes, "it is returned among other things")
            elif node.op == "call_module":
                child = module.get_submodule(str(node.target))
                plain = not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
                values[node] = (
                    self._module(child, nodes)
                    if plain and len(set(node.args)) == len(nodes)
                    else self._unread(child, nodes, f"{node.target!r} is called with more than tensors")
                )
            else:
                values[node] = self._operation(node, values)
            if len(node.all_input_nodes) == 1 and _in_place(module, node):
                # whoever reads what it was given reads what it made
                values[node.all_input_nodes[0]] = values[node]
        return Value()

    def _attribute(self, module: nn.Module, target: str) -> Value:
        """Numbers of nobody's; a layer whose parameters are read so can no longer be followed."""
        owner, _, _ = target.rpartition(".")
        holder = module.get_submodule(owner)
        if isinstance(holder, nn.Linear):
            name = self._names[holder]
            self._raw.add(name)
            self.fixed.setdefault(name, "the forward reads its parameters itself")
        return Value()

    def _operation(self, node: fx.Node, values: dict[fx.Node, Value]) -> Value:
        nodes = [values[n] for n in node.all_input_nodes]
        if not any(v.sources for v in nodes):
            return Value()
        numbers = all(not isinstance(a, list | tuple | dict | slice) for a in (*node.args, *node.kwargs.values()))
        if len(nodes) == 1 and numbers and node.target in ELEMENTWISE | ARITHMETIC:
            return _mapped(nodes[0], _as_function(node))
        if node.target in CONCATENATIONS:
            settings = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
            tensors, dim = settings["tensors"], settings.get("dim", settings.get("axis", 0))
            # whether dim 1 is the last one shows when a layer takes the sum of the widths
            if dim in (-1, 1) and isinstance(tensors, list | tuple):
                joined = [values[n] for n in tensors if isinstance(n, fx.Node)]
                return Value(tuple(p for v in joined for p in v.parts), frozenset().union(*(v.sources for v in joined)))
        if node.target in ARITHMETIC or node.target in (operator.iadd, "add_"):
            return self._stop(nodes, "it is combined with another tensor, as in a residual connection")
        if node.target is F.layer_norm:
            return self._stop(nodes, "it goes into F.layer_norm, whose size is in the code; an nn.LayerNorm can shrink")
        what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return self._stop(nodes, f"it goes into {what!r}")

    def __post_init__(self) -> None:
        self._names: dict[nn.Module, str] = {}
        self._raw: set[str] = set()


def _in_place(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write into the tensor it is given."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or bool(node.kwargs.get("inplace"))


def _norm_size(norm: Any) -> int | None:
    """The neurons a norm takes, if they are the last dimension alone."""
    if isinstance(norm, nn.BatchNorm1d):
        return norm.num_features
    return norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else None


def _is_alone(module: nn.Module) -> bool:
    """Whether the module computes what its class says."""
    return is_plain(module) and type(module).__module__.startswith("torch.")


def _masked_only(layer: Any) -> bool:
    return all(isinstance(c, Mask) for name in layer.parametrizations for c in layer.parametrizations[name])


def _sized(parts: tuple[Part, ...], width: int) -> tuple[Part, ...] | None:
    """The parts once those of unknown width share what is left of ``width``; None where that is not clear."""
    merged: list[Part] = []
    for part in parts:
        if merged and part.layer is None and merged[-1].layer is None:
            widths = (part.width, merged[-1].width)
            merged[-1] = Part(None, None if None in widths else sum(w for w in widths if w is not None))
        else:
            merged.append(part)
    left = width - sum(part.width or 0 for part in merged)
    unknown = [part for part in merged if part.width is None]
    if len(unknown) > 1 or (left > 0) != bool(unknown) or left < 0:
        return None
    return tuple(replace(part, width=left) if part.width is None else part for part in merged)


@torch.no_grad()
def _constant(linear: nn.Linear, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor]:
    """Which outputs are the same for every input, since what reaches them is, or meets a zero; and what they are."""
    weight = linear.weight
    none = [torch.zeros(part.width or 0, dtype=torch.float32, device=weight.device) for part in parts]
    known = torch.cat([none[i].bool() if p.known is None else p.known for i, p in enumerate(parts)])
    values = torch.cat([none[i] if p.values is None else p.values for i, p in enumerate(parts)]).to(weight.dtype)
    return ((weight == 0) | known).all(1), F.linear(values * known, weight, linear.bias)


def _mapped(x: Value, function: Callable[[Tensor], Tensor]) -> Value:
    """A value after a function that treats every number alike."""

    def after(part: Part) -> Part:
        if part.known is None or part.values is None or not part.known.any():
            return replace(part, known=None, values=None)
        with torch.no_grad():
            # numbers that are not constant are not looked at
            return replace(part, values=function(part.values.masked_fill(~part.known, 0.5).clone()))

    return replace(x, parts=tuple(map(after, x.parts)))


def _as_function(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """What a graph node does, of its one tensor."""

    def run(x: Tensor) -> Tensor:
        args = [x if isinstance(a, fx.Node) else a for a in node.args]
        kwargs = {k: x if isinstance(a, fx.Node) else a for k, a in node.kwargs.items()}
        if node.target is F.dropout:
            return x
        target: Any = getattr(x, node.target) if isinstance(node.target, str) else node.target
        result: Tensor = target(*args[1:], **kwargs) if isinstance(node.target, str) else target(*args, **kwargs)
        return result

    return run
