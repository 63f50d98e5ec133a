"""A launch's calls, settled for the shapes seen before: nothing is looked up or checked that cannot have changed.

One row through a small MLP takes a few tenths of a microsecond; what is asked before it is asked in the cheapest way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from rewardzip_kernels.fused_mlp import network, packed_network
from rewardzip_kernels.mlp_layout import Linear
from rewardzip_kernels.registration import forward_mode, modes, nobody_listens, tracing, transforms

from .nn import CompressedLinear
from .nn.base import SHAPES_KEPT
from .nn.watch import Watch, samples

Quick = Callable[..., Tensor | None]


class Route:
    """The calls settled by the shape of their first input, and the function that finds them while they are right."""

    def __init__(self) -> None:
        self.calls: dict[torch.Size, Quick | None] = {}
        self.quick: Quick = _nothing_settled


class Shortcut:
    """For layers with their norms, whoever's they are; ``numbers`` gives what they hold now, member by member.

    ``straight`` gives what the launch gives, ``flat`` the same without the last dimension, which is one number.
    """

    def __init__(
        self, parts: list[nn.Module], numbers: Callable[[], list[list[Linear]]], members: int | None, reduce: str
    ) -> None:
        self.numbers, self.members, self.reduce = numbers, members, reduce
        self.compressed = [m for m in parts if isinstance(m, CompressedLinear)]
        self.uncompressed = not self.compressed
        # a dense layer's tables, not what is in them: a parameter may be replaced by another
        self.tables = [m._parameters for m in parts if not isinstance(m, CompressedLinear)]
        self.straight, self.flat = Route(), Route()
        self.arity, self.watch, self.changed = 0, self.look(), lambda: True
        self.networks: dict[tuple[int, ...], Any] = {}

    def look(self) -> Watch:
        return Watch([*(m._buffers for m in self.compressed), *self.tables])

    def forget(self, arity: int) -> None:
        self.arity, self.watch, self.networks = arity, self.look(), {}
        self.changed = self.watch.is_other()
        for route in (self.straight, self.flat):
            Route.__init__(route)

    def is_training(self) -> bool:
        if is_grad_enabled():
            for table in self.tables:
                for p in table.values():
                    if p is not None and p.requires_grad:
                        return True
        return False

    def dense(self) -> list[nn.Parameter]:
        return [p for table in self.tables for p in table.values() if p is not None]

    def state(self) -> tuple[int, list[int]]:
        """How often the dense parameters were written to, as far as that is counted, and some of their numbers."""
        dense = self.dense()
        written = sum([0 if p.is_inference() else p._version for p in dense])
        return written, [sample.value for p in dense for sample in samples(p)]

    def settle(
        self,
        inputs: tuple[Tensor, ...],
        layers: str,
        compute: torch.dtype | None,
        packed: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Keep the call for inputs of these shapes, and what must not change for as long as it is used.

        ``packed`` gives what the op takes, which a GPU reads where it lies.
        """
        x = inputs[0]
        if is_compiling() or not nobody_listens(inputs):
            return
        if compute in (None, torch.float16) if x.is_cpu else not x.is_cuda or packed is None:
            return
        if self.uncompressed and len({p.dtype for p in self.dense()}) > 1:
            return
        if len(inputs) != self.arity or self.changed():
            self.forget(len(inputs))
        # what another thread settles meanwhile has its own
        calls, flat, networks, watch = self.straight.calls, self.flat.calls, self.networks, self.watch
        if x.shape in calls:
            return
        if len(calls) == SHAPES_KEPT:
            calls.clear()
            flat.clear()
        widths = tuple(x.shape[-1] for x in inputs)
        found = networks.get(widths)
        if found is None:
            if x.is_cpu and compute is not None:
                found = network(self.numbers(), layers, self.members, self.reduce, compute)
            if found is None and packed is not None:
                found = packed_network(packed, x.device, layers, self.members, self.reduce, compute)
            if found is None:
                return
            networks[widths] = found
        made = found.bound(list(inputs)), found.bound(list(inputs), flat=True)
        if made[0] is None and not x.is_cpu:  # these rows lie badly, others of the shape may not
            return
        calls[x.shape], flat[x.shape] = made
        if self.straight.quick is _nothing_settled:
            # asking costs more than a row's arithmetic: not after scales and biases, which are read where they lie
            live = {id(t) for t in found.live if not isinstance(t, nn.Parameter)}
            changed = watch.changed_by(getattr(found, "changed", None), live)
            self.straight.quick, self.flat.quick = (self.guarded(table.get, watch, changed) for table in (calls, flat))

    def guarded(self, find: Callable[[torch.Size], Any], watch: Watch, changed: str) -> Quick:
        """The settled call of these inputs, if there is one and nothing has changed; otherwise it gives None."""
        inputs = [f"x{i}" for i in range(self.arity)]
        unlike = " or ".join(f"type({x}) is not Tensor" for x in inputs)
        parameters = [name for name, t in watch.names.items() if isinstance(t, nn.Parameter)]
        if self.uncompressed:  # torch's layers take rows of their own type alone
            weight = next(name for name, t in watch.names.items() if isinstance(t, Tensor))
            unlike += "".join(f" or {x}.dtype is not {weight}.dtype" for x in inputs) + " or autocast(x0.device.type)"
        learning = " or ".join(f"{name}.requires_grad" for name in (*inputs, *parameters))
        source = f"""
def f({", ".join(f"{x}=None" for x in inputs)}, *more):
    if more or {unlike}:
        return None
    call = find(x0.shape)
    if call is None or (grads() and ({learning})):
        return None
    if modes() or transforms() is not None or tracing() is not None or dual._current_level >= 0 or {changed}:
        return None
    return call({", ".join(inputs)})
"""
        listening = {"modes": modes, "transforms": transforms, "tracing": tracing, "grads": is_grad_enabled}
        more: dict[str, Any] = {"autocast": torch.is_autocast_enabled, "dual": forward_mode}
        return watch.function(source, find=find, Tensor=Tensor, **listening, **more)


def _nothing_settled(*inputs: Tensor) -> Tensor | None:
    return None
