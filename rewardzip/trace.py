"""Tracing a module's own code with torch.fx, and only code that tracing cannot misread.

Every child is a leaf. Every Python function is read as it is entered, before it runs, wherever it came from: a
property, a parent's forward, a helper in a table. What is refused: branches but on the module's settings, context
managers, assignments to ``self``, calls for their side effect, and asking what the arguments are.
"""

from __future__ import annotations

import ast
import dis
import gc
import inspect
import sys
import textwrap
import warnings
from functools import lru_cache
from itertools import pairwise
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import fx, nn


class Misreadable(Exception):
    pass


class _Tracer(fx.Tracer):
    # so that a number read from a buffer is read again at each call
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def read(module: nn.Module) -> tuple[fx.Graph, dict[str, Any]] | str:
    """(the graph of the module's own code, the defaults it was read with), or the reason why there is none."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if not isinstance(kind.forward, FunctionType) or hasattr(kind.forward, "__wrapped__"):
        return "its forward is decorated"
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if not {p.kind for p in parameters} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.POSITIONAL_ONLY,
    }:
        return "its forward takes *args, **kwargs or keyword-only arguments"
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if not all(isinstance(value, str | int | float | None) for value in defaults.values()):
        return "its forward has defaults that are no plain values"
    try:
        graph, again = trace(module, defaults), trace(module, defaults)
    except Misreadable as error:
        return str(error)
    except Exception as error:  # whatever the author's code raises when it meets a proxy
        return f"torch.fx cannot trace it ({type(error).__name__})"
    if graph is None or again is None or graph.python_code("self").src != again.python_code("self").src:
        return "it makes tensors or numbers of its own"
    return graph, defaults


def trace(module: nn.Module, defaults: dict[str, Any]) -> fx.Graph | None:
    """The graph of the module's own code; None where tracing it left tensors behind."""
    # tracing writes to the module: here to a twin that shares its children
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    before, profile, collecting = set(twin.__dict__), sys.getprofile(), gc.isenabled()
    # nothing but the author's code shall run: no finalizer, no callback of the collector
    gc.disable()
    sys.setprofile(_read)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(twin, concrete_args=defaults or None)
    finally:
        sys.setprofile(profile)
        if collecting:
            gc.enable()
    return graph if set(twin.__dict__) == before else None


def _read(frame: FrameType, event: str, _: Any) -> None:
    """As a profiler: look at each function entered, except those of torch and of Python itself."""
    if event == "call" and _package(frame) not in _TRUSTED:
        reason = _misread(frame.f_code)
        if reason:
            raise Misreadable(f"{frame.f_code.co_name} {reason}")


def _package(frame: FrameType) -> str:
    name = str(frame.f_globals.get("__name__", ""))
    return name if name in _TRUSTED else name.partition(".")[0]


_TRUSTED = {"torch", "rewardzip.direct", *sys.stdlib_module_names} - {"__main__"}

# what reads differently, or is not seen to be read, while proxies stand for tensors
_HIDDEN = {"training", "isinstance", "hasattr", "callable"}


@lru_cache(maxsize=256)
def _misread(code: CodeType) -> str | None:
    """Why tracing this code could bake in something that is not always so; None where it could not."""
    steps = list(dis.get_instructions(code))
    names = {step.opname for step in steps}
    outside = {step.argval for step in steps if step.opname == "STORE_DEREF"} & set(code.co_freevars)
    dropped = (a.opname.startswith("CALL") and b.opname == "POP_TOP" for a, b in pairwise(steps))
    if "PUSH_EXC_INFO" in names:
        return "has a with or a try"
    if names & {"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_GLOBAL"} or outside:
        return "assigns to what outlives the call"
    if any(dropped):
        return "calls something for its side effect"
    if _HIDDEN & {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))} or "IS_OP" in names:
        return "asks what its arguments are, or whether it is training"
    if any("JUMP" in name and "_IF_" in name for name in names) and not _branches_on_settings(code):
        return "branches on its arguments"
    return None


def _branches_on_settings(code: CodeType) -> bool:
    """Whether every condition reads attributes of ``self`` alone, which are the module's settings."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return False
    branching = (ast.While, ast.BoolOp, ast.Match, ast.Assert, ast.comprehension, ast.Subscript)
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    if any(isinstance(node, branching) for node in ast.walk(tree)):
        return False
    for node in (inner for test in tests for inner in ast.walk(test)):
        if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id != "self"):
            return False
    return True
