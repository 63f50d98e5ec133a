"""Fused forwards: a module whose own code says ``relu(self.fc1(x))`` gets a forward that says it in one call.

The module stays what it is. Its children are not moved or merged, its class is a subclass of its own, its methods and
state dict are unchanged; only the traced forward differs, and in it ``self.fc1(x, activation="relu")`` stands where
two calls stood, and one ``Chain`` where a whole MLP did. Code that calls the children in another order therefore still
gets what it asks for.

Only code that tracing cannot misread is rewritten: ``trace.py`` says which.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rewardzip_kernels.mlp_layout import MAX_INPUTS

from . import direct
from .chain import Chain, Dense, Head, Pruned, Step, Wide, fits, fits_dense, fits_for_few, follow, is_head, joined
from .nn import BlockSparseLinear, CompressedLinear, Int8Linear
from .trace import read

MODULES: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.ReLU: lambda m: "relu",
    nn.LeakyReLU: lambda m: f"leaky_relu:{m.negative_slope}",
    nn.ELU: lambda m: f"elu:{m.alpha}",
    nn.Tanh: lambda m: "tanh",
    nn.Sigmoid: lambda m: "sigmoid",
    nn.SiLU: lambda m: "silu",
    nn.GELU: lambda m: "gelu" if m.approximate == "none" else "gelu_tanh",
    nn.Mish: lambda m: "mish",
    nn.Softplus: lambda m: "softplus" if (m.beta, m.threshold) == (1, 20) else None,
}

# what is called, and the keyword that holds its parameter (None: it takes none)
FUNCTIONS: dict[Any, tuple[str, str | None]] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), ("relu", None)),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), ("tanh", None)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), ("sigmoid", None)),
    F.leaky_relu: ("leaky_relu", "negative_slope"),
    F.elu: ("elu", "alpha"),
    F.silu: ("silu", None),
    F.mish: ("mish", None),
    F.softplus: ("softplus", None),
    F.gelu: ("gelu", "approximate"),
}


JOINS = (torch.cat, torch.concat, torch.concatenate)


class FusedForward:
    """Mixed into the class of a module whose forward was rewritten.

    ``rz_fused`` maps its linear layers to activations, ``rz_chains`` are its runs of layers in one launch, ``rz_whole``
    is the chain that is all it does, if there is one, and ``rz_form`` how it does little more. ``rz_dense``: layers
    that are not compressed are chained too. The names are such as no author's module has: the class's come first.
    """

    rz_fused: dict[str, str]
    rz_chains: list[Chain]
    rz_whole: Chain | None
    rz_form: direct.Form | None
    rz_dense: bool

    def __init_subclass__(cls) -> None:
        """Silent to the author's class, which may keep a list of its subclasses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # a slice of an nn.Sequential is made by calling its class: what is made anew is the author's
        unfuse(self)  # type: ignore[arg-type]
        self.__init__(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "training":
            _fuse_anew(self)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)  # type: ignore[misc]
        _fuse_anew(self)

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        lines = [own] if own else []
        chained = {step.layer for chain in self.rz_chains for step in chain.steps}
        alone = [f"{name} {activation}" for name, activation in self.rz_fused.items() if name not in chained]
        if alone:
            lines.append(f"fused: {', '.join(alone)}")
        return "\n".join(lines + [f"{chain.where}: {chain}" for chain in self.rz_chains])

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class exists in this process only: a copy is made from the author's class and fused again
        return _blank, (original_class(self), self.rz_dense), self.__getstate__()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _fuse_anew(self)


def _blank(kind: type[nn.Module], dense: bool) -> Any:
    return copyreg.__newobj__(_subclass(kind, {"rz_dense": dense}))  # type: ignore[attr-defined]


def _subclass(kind: type[nn.Module], names: dict[str, Any]) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **names}
    return type(kind.__name__, (FusedForward, kind), names)


def original_class(module: Any) -> type[nn.Module]:
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FusedForward) else kind


def unfuse(module: nn.Module) -> None:
    # past the module's own __setattr__, which would fuse it again
    object.__setattr__(module, "__class__", original_class(module))


def _fuse_anew(module: Any) -> None:
    before, dense = getattr(type(module), "rz_chains", []), type(module).rz_dense
    unfuse(module)
    fuse(module, dense)
    for old, new in zip(before, getattr(type(module), "rz_chains", []), strict=False):
        new.take_over(old)


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but its class says what the module computes."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" not in module.__dict__ and not any(hooks)


def fuse(module: nn.Module, dense: bool = False) -> str | None:
    """Rewrite the module's forward where that fuses something; the reason where its code cannot be traced.

    dense: chain what is not compressed as well.
    """
    found = read(module)
    if isinstance(found, str):
        return found
    graph, defaults = found
    fused = _fold_activations(module, graph)
    chains = _fold_chains(module, graph, dense)
    if fused or chains or _fold_joins(module, graph):
        _install(module, graph, fused, chains, tuple(defaults.values()), dense)
    return None


def _fold_activations(module: nn.Module, graph: fx.Graph) -> dict[str, str]:
    fused = {}
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        name = str(source.target)
        layer = module.get_submodule(name)
        if not isinstance(layer, CompressedLinear) or not is_plain(layer) or "activation" in source.kwargs:
            continue
        activation = _activation(module, node)
        if activation is not None:
            source.kwargs = {**source.kwargs, "activation": activation}
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            fused[name] = activation
    return fused


def _activation(module: nn.Module, node: fx.Node) -> str | None:
    """The activation a graph node applies to its first argument, None for anything else."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        describe = MODULES.get(type(child))
        return describe(child) if describe and is_plain(child) else None
    if node.op not in ("call_function", "call_method") or node.target not in FUNCTIONS:
        return None
    name, keyword = FUNCTIONS[node.target]
    settings = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if len(node.args) == 2 and keyword and keyword != "approximate":
        settings[keyword] = node.args[1]
    elif len(node.args) > 1:
        return None
    if keyword == "approximate":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(settings.pop("approximate", "none")))
    value = settings.pop(keyword, None) if keyword else None
    if settings or not isinstance(value, int | float | None):
        return None
    return name if value is None else f"{name}:{float(value)}"


def _fold_chains(module: nn.Module, graph: fx.Graph, dense: bool) -> dict[str, Chain]:
    """Put a chain where linear layers follow one another; the names it is called by."""
    chains: dict[str, Chain] = {}
    gone: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in gone or not _is_linear(module, node):
            continue
        kind, run = _longest(module, _run_from(module, node), dense)
        if kind is None:
            continue
        name = f"_chain_{len(chains)}"
        chains[name] = kind(module, tuple(step for step, _ in run))
        source, end = node.args[0], run[-1][1]
        parts = _concatenated(source)
        with graph.inserting_after(end):
            new = graph.call_module(name, *((tuple(parts[0]), {"dim": parts[1]}) if parts else ((source,),)))
        end.replace_all_uses_with(new)
        gone |= _erase_back(graph, end, source)
    return chains


def _longest(
    module: nn.Module, run: list[tuple[Step, fx.Node]], dense: bool
) -> tuple[type[Chain] | None, list[tuple[Step, fx.Node]]]:
    """The longest beginning of a run that is one launch, and of which kind."""
    for length in range(len(run), 1, -1):
        steps = [step for step, _ in run[:length]]
        if steps[-1].norm:  # the ops know none behind the last layer
            continue
        linears = [module.get_submodule(step.layer) for step in steps]
        if fits(linears):
            return Chain, run[:length]
        if fits_for_few(linears):
            return Pruned, run[:length]
        if is_head(linears, steps):
            return Head, run[:length]
        if dense and fits_dense(linears):
            return Dense, run[:length]
    # up to the first layer that has a call of its own
    before = list(takewhile(lambda part: type(module.get_submodule(part[0].layer)) is not BlockSparseLinear, run))
    while before and before[-1][0].norm:
        before.pop()
    if len(before) > 2 and follow([module.get_submodule(step.layer) for step, _ in before]):
        return Wide, before
    return None, []


def _run_from(module: nn.Module, node: fx.Node) -> list[tuple[Step, fx.Node]]:
    """The linear layers that follow one another from this one, each with the last node that belongs to it."""
    run = []
    while True:
        name, activation = str(node.target), str(node.kwargs.get("activation", "none"))
        layer, end, norm = module.get_submodule(name), node, None
        after = _only_user(end)
        if activation == "none" and after is not None and _is_norm(module, after, layer):
            norm, end = str(after.target), after
            after = _only_user(end)
        if activation == "none" and after is not None and (found := _activation(module, after)):
            activation, end = found, after
            after = _only_user(end)
        run.append((Step(name, norm, activation), end))
        if after is None or not _is_linear(module, after):
            return run
        node = after


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that takes this one's value, as its first argument."""
    users = list(node.users)
    if len(users) != 1 or not users[0].args or users[0].args[0] is not node:
        return None
    return users[0]


def _is_linear(module: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or not set(node.kwargs) <= {"activation"}:
        return False
    layer = module.get_submodule(str(node.target))
    return type(layer) in (Int8Linear, BlockSparseLinear, nn.Linear) and is_plain(layer)


def _is_norm(module: nn.Module, node: fx.Node, layer: Any) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    norm = module.get_submodule(str(node.target))
    return type(norm) is nn.LayerNorm and is_plain(norm) and norm.normalized_shape == (layer.out_features,)


def _concatenated(node: Any) -> tuple[list[fx.Node], int] | None:
    """(tensors, dim) of a node that is a torch.cat of a list, None for another."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in JOINS:
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors, dim = given.get("tensors"), given.get("dim", given.get("axis", 0))
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, fx.Node) for t in tensors):
        return None
    return (list(tensors), dim) if isinstance(dim, int) and 2 <= len(tensors) <= MAX_INPUTS else None


def _erase_back(graph: fx.Graph, end: fx.Node, source: Any) -> set[fx.Node]:
    """Erase what led from ``source`` to ``end``, and ``source`` itself if it was a torch.cat nobody else reads."""
    gone = set()
    node = end
    while node is not source and not node.users:
        before = node.args[0]
        graph.erase_node(node)
        gone.add(node)
        assert isinstance(before, fx.Node)
        node = before
    if node is source and not node.users and _concatenated(node):
        graph.erase_node(node)
    return gone


def _fold_joins(module: nn.Module, graph: fx.Graph) -> bool:
    """Hand a child that is one chain the parts of a torch.cat, not their copy."""
    found = False
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        child, source = module.get_submodule(str(node.target)), node.args[0]
        parts = _concatenated(source)
        if parts is None or getattr(type(child), "rz_whole", None) is None:
            continue
        with graph.inserting_before(node):
            owner = graph.get_attr(str(node.target))
            new = graph.call_function(joined, (owner, *parts[0]), {"dim": parts[1]})
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if isinstance(source, fx.Node) and not source.users:
            graph.erase_node(source)
        found = True
    return found


def _install(
    module: nn.Module,
    graph: fx.Graph,
    fused: dict[str, str],
    chains: dict[str, Chain],
    defaults: tuple[Any, ...],
    dense: bool,
) -> None:
    used = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    root = {name: chains.get(name) or _attribute(module, name) for name in used}
    forward = type(fx.GraphModule(root, graph)).forward
    kind = type(module)
    if defaults:
        run, original = forward, kind.forward
        required = len(inspect.signature(original).parameters) - 1 - len(defaults)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(args) == required and not kwargs:
                return run(self, *args, *defaults)
            return original(self, *args, **kwargs)

    operations = [node.op for node in graph.nodes]
    whole = operations == ["placeholder", "call_module", "output"] and "_chain_0" in chains and not defaults
    names = {
        "forward": forward,
        "rz_fused": fused,
        "rz_dense": dense,
        "rz_chains": list(chains.values()),
        "rz_whole": chains["_chain_0"] if whole else None,
    }
    form = names["rz_form"] = None if defaults else direct.find(module, graph, chains)
    if form is not None:
        names["__call__"] = direct.caller(form)
    module.__class__ = _subclass(kind, {**names, **chains})


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found
