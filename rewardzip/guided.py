"""Gradients for the inputs of a chain on a CPU: planning and guidance follow them.

The ops' own gradients unpack the weights and run the launch again in torch at every call, which costs several times
what a dense model's gradient does. Here the chain runs in torch on fp32 copies of its weights, made when the first
gradient is asked for and again when a number has changed. Where the launch rounds its rows, the value is the launch's
and the rounding counts as the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .nn import CompressedLinear

if TYPE_CHECKING:
    from .chain import Chain


def wanted(inputs: tuple[Tensor, ...]) -> bool:
    """Whether a gradient for one of these is, and the copies are the way to it."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and all(x.is_cpu and x.dtype == torch.float32 for x in inputs)
        and not is_compiling()
    )


class Guided:
    """The chain on fp32 copies of its compressed weights."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.changed = chain, lambda: True
        self.weights: list[Tensor | None] = []

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.changed():
            look = self.chain.shortcut.look().is_other()
            with torch.no_grad():
                # of the dense ones the parameter itself, which may be learning
                self.weights = [
                    m.weight.float() if isinstance(m, CompressedLinear) else None for m in self.chain.linears
                ]
            self.changed = look
        h: Tensor = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        chain = self.chain
        for (activation, parameter), linear, norm, weight in zip(
            chain.activate, chain.linears, chain.norms, self.weights, strict=True
        ):
            h = linear(h) if weight is None else F.linear(h, weight, linear.fp32_bias)
            h = activation.forward(h if norm is None else norm(h), parameter)
        if not chain.rounds_rows:
            return h
        with torch.no_grad():
            rounded = chain.route.quick(*inputs)
            rounded = chain.run(inputs, -1) if rounded is None else rounded
        if chain.steps[-1].activation == "none":
            # no gradient reads what a product or a sum has put out
            h.data.copy_(rounded)
            return h
        return h + (rounded - h.detach())
