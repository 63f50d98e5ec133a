"""A module that does nothing but hand its inputs to one chain: a settled call is answered before torch looks further.

What ``nn.Module.__call__`` does around a forward costs three times as much as the arithmetic of one row. Such a module
gets a ``__call__`` of its own, which looks for hooks, as torch would, and at what the chain has settled. Anything else
goes the usual way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .chain import Chain, joined


class Form(NamedTuple):
    """What such a module does: ``chain`` on its inputs, by itself or through its child ``name`` of type ``kind``."""

    chain: Chain
    name: str
    kind: type[Any]
    arity: int
    flat: bool
    """Whether a row's one output has no dimension of its own."""
    ranks: frozenset[int]
    """The dimensions that inputs may have; any where empty."""

    def takes(self, other: Form) -> bool:
        """Whether this one is called as the other is."""
        return (self.arity, self.flat, self.ranks) == (other.arity, other.flat, other.ranks)

    def undisturbed(self, module: nn.Module, as_: str) -> tuple[str, dict[str, Any]]:
        """Whether nobody has hooked anything to the module since, as an expression and the names in it."""
        names = {as_: module, f"{as_}_kind": type(module), f"{as_}_has": module.__dict__}
        unhooked = "not {0}['_forward_hooks'] and not {0}['_forward_pre_hooks']".format
        asked = f"type({as_}) is {as_}_kind and {unhooked(f'{as_}_has')} and 'forward' not in {as_}_has"
        if self.name:
            # another class: what the child does has changed
            child = module._modules[self.name]
            names |= {f"{as_}_child": child, f"{as_}_child_kind": self.kind, f"{as_}_child_has": child.__dict__}
            asked += f" and {as_}_has['_modules'][{self.name!r}] is {as_}_child and {unhooked(f'{as_}_child_has')}"
            asked += f" and type({as_}_child) is {as_}_child_kind"
        return asked, names


def find(module: nn.Module, graph: fx.Graph, chains: dict[str, Chain]) -> Form | None:
    """The form of a module whose forward is this graph, or None where there is more to it."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    steps, output = nodes[len(inputs) : -1], nodes[-1]
    if type(module).__call__ is not nn.Module.__call__ or not 1 <= len(steps) <= 2 or output.args != (steps[-1],):
        return None
    call, *rest = steps
    given, dim = list(call.args), call.kwargs.get("dim", -1)
    if call.target is joined:
        name = str(given.pop(0).target)
        child = module._modules.get(name)
        chain = getattr(type(child), "rz_whole", None)
    else:
        name, child, chain = "", None, chains.get(str(call.target))
    if chain is None or given != inputs:
        return None
    if rest and not _squeezes(rest[0], call):
        return None
    places = {place for place in (dim, *(node.args[1] for node in rest)) if place != -1}
    if len(places) > 1 or any(place < 0 for place in places):
        return None
    ranks = frozenset(place + 1 for place in places)
    return Form(chain, name, type(child), len(inputs), bool(rest), ranks)


def _squeezes(node: fx.Node, source: fx.Node) -> bool:
    """Whether the node takes a dimension off the chain's outputs."""
    is_squeeze = (node.op, node.target) == ("call_method", "squeeze") or node.target is torch.squeeze
    plain = len(node.args) == 2 and node.args[0] is source and isinstance(node.args[1], int) and not node.kwargs
    return is_squeeze and plain


def caller(form: Form) -> Callable[..., Any]:
    """``__call__`` of a module of this form."""
    chain, name, kind, arity, flat, ranks = form
    route = chain.shortcut.flat if flat else chain.shortcut.straight

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            is_dynamo_compiling()
            or kwargs
            or len(args) != arity
            or type(args[0]) is not Tensor
            or (ranks and args[0].dim() not in ranks)
            or self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or self._compiled_call_impl
        ):
            return nn.Module.__call__(self, *args, **kwargs)
        if name:
            child: Any = self._modules[name]
            # another class: what the child does has changed
            if type(child) is not kind or child._forward_hooks or child._forward_pre_hooks:
                return nn.Module.__call__(self, *args)
        y = route.quick(*args)
        return nn.Module.__call__(self, *args) if y is None else y

    return __call__
