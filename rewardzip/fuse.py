"""Fused forwards: a module whose own code says ``relu(self.fc1(x))`` gets a forward that says it in one call.

The module stays what it is. Its children are not moved or merged, its class is a subclass of its own, its methods and
state dict are unchanged; only the traced forward differs, and in it ``self.fc1(x, activation="relu")`` stands where
two calls stood. Code that calls the children in another order therefore still gets what it asks for.

Only a module's own code is traced (``torch.fx``, every child a leaf), and only code that tracing cannot misread: no
branches but on the module's settings, no context managers, no assignments to ``self``.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .nn import CompressedLinear

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
    F.gelu: ("gelu", "approximate"),
}


class FusedForward:
    """Mixed into the class of a module whose forward was rewritten; ``fused`` maps its linear layers to activations."""

    fused: dict[str, str]

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        calls = ", ".join(f"{name} + {activation}" for name, activation in self.fused.items())
        return f"{own}\nfused: {calls}" if own else f"fused: {calls}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the class exists in this process only: a copy is made from the author's class and fused again
        return _rebuild, (original_class(self), self.__dict__)


def _rebuild(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    module.__setstate__(state)
    fuse(module)
    return module


def original_class(module: Any) -> type[nn.Module]:
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FusedForward) else kind


def unfuse(module: nn.Module) -> None:
    module.__class__ = original_class(module)


def fuse(module: nn.Module) -> str | None:
    """Rewrite the module's forward where that fuses something; the reason where its code cannot be traced."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    reason = _misreadable(kind.forward, kind)
    if reason:
        return reason
    required = [p for p in inspect.signature(kind.forward).parameters.values()][1:]
    defaults = {p.name: p.default for p in required if p.default is not p.empty}
    sizes = {name: len(v) for name, v in module.__dict__.items() if isinstance(v, list | dict | set)}
    try:
        graph = _Tracer().trace(module, concrete_args=defaults or None)
    except Exception as error:  # whatever the author's code raises when it meets a proxy
        return f"torch.fx cannot trace it ({type(error).__name__})"
    finally:
        constants = [name for name in module.__dict__ if name.startswith("_tensor_constant")]
        for name in constants:
            delattr(module, name)
    if constants or sizes != {n: len(v) for n, v in module.__dict__.items() if isinstance(v, list | dict | set)}:
        return "it makes tensors or keeps a record of its own"
    fused = _fold_activations(module, graph)
    if fused:
        _install(module, fx.GraphModule(module, graph), fused, n_defaults=len(defaults))
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _fold_activations(module: nn.Module, graph: fx.Graph) -> dict[str, str]:
    fused = {}
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        name = str(source.target)
        if not isinstance(module.get_submodule(name), CompressedLinear) or "activation" in source.kwargs:
            continue
        activation = _activation(module, node)
        if activation is not None:
            source.kwargs = {"activation": activation}
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            fused[name] = activation
    return fused


def _activation(module: nn.Module, node: fx.Node) -> str | None:
    """The activation a graph node applies to its first argument, None for anything else."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        describe = MODULES.get(type(child))
        return describe(child) if describe and not has_hooks(child) else None
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


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _install(module: nn.Module, traced: fx.GraphModule, fused: dict[str, str], n_defaults: int) -> None:
    base = type(module)
    forward = type(traced).forward
    if n_defaults:
        values = list(inspect.signature(base.forward).parameters.values())[1:]
        defaults = tuple(p.default for p in values if p.default is not p.empty)
        required, run, original = len(values) - n_defaults, forward, base.forward

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if len(args) == required and not kwargs:
                return run(self, *args, *defaults)
            return original(self, *args, **kwargs)

    names = {"forward": forward, "fused": fused, "__module__": base.__module__, "__qualname__": base.__qualname__}
    module.__class__ = type(base.__name__, (FusedForward, base), names)


def _misreadable(forward: Any, kind: type) -> str | None:
    """Why tracing this forward could bake in something that is not always so; None where it could not."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return "its forward is wrapped or inherited from none"
    kinds = {p.kind for p in inspect.signature(forward).parameters.values()}
    if not kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}:
        return "its forward takes *args, **kwargs or keyword-only arguments"
    for function in _own_functions(forward, kind, set()):
        for code in _codes(function.__code__):
            operations = {i.opname for i in dis.get_instructions(code)}
            if code.co_exceptiontable or any(name.startswith("STORE_ATTR") for name in operations):
                return f"{function.__name__} has a with, a try, or an assignment to an attribute"
            if any("JUMP_IF" in name or name == "STORE_SUBSCR" for name in operations) and not _branches_on_settings(
                function
            ):
                return f"{function.__name__} branches on its arguments"
    return None


def _own_functions(function: FunctionType, kind: type, seen: set[FunctionType]) -> Iterator[FunctionType]:
    """The function and the Python functions it names that are not torch's: methods of the class and globals."""
    seen.add(function)
    yield function
    for code in _codes(function.__code__):
        for name in code.co_names:
            for found in (inspect.getattr_static(kind, name, None), function.__globals__.get(name)):
                if isinstance(found, FunctionType) and found not in seen and not found.__module__.startswith("torch."):
                    yield from _own_functions(found, kind, seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _branches_on_settings(function: FunctionType) -> bool:
    """Whether every condition reads attributes of ``self`` alone, and none of them ``training``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    branching = (ast.While, ast.BoolOp, ast.Match, ast.Assert, ast.comprehension, ast.Subscript)
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    if any(isinstance(node, branching) for node in ast.walk(tree)):
        return False
    for node in (inner for test in tests for inner in ast.walk(test)):
        if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id != "self"):
            return False
        if isinstance(node, ast.Attribute) and node.attr == "training":
            return False
    return True
