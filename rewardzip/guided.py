"""Gradients for the inputs of a chain: planning and guidance follow them.

Where the chain has one output, its gradient is computed with it, in one call, and kept for the backward pass. Where
the kernel does not take the network, and where the gradient's own gradient is asked for, the chain runs in torch on
fp32 copies of its weights, made when they are needed and again when a number has changed. The ops' own gradients, which
unpack the weights and run the launch again at every call, cost several times what a dense model's do. Where the launch
rounds what it multiplies, the value is the launch's and the rounding counts as the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from rewardzip_kernels.fused_mlp import network, packed_network
from rewardzip_kernels.registration import modes, tracing, transforms

from . import running
from .nn import CompressedLinear

if TYPE_CHECKING:
    from .chain import Chain


def wanted(inputs: tuple[Tensor, ...]) -> bool:
    """Whether a gradient for one of these is, and this is the way to it."""
    if not torch.is_grad_enabled() or is_compiling():
        return False
    learning, device = False, inputs[0].device
    for x in inputs:
        learning = learning or x.requires_grad
        if x.dtype != torch.float32 or not (x.is_cpu or x.is_cuda) or x.device != device:
            return False
    return learning


class Guided:
    """The chain where a gradient for its inputs is wanted."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.watch, self.is_other, self.changed = chain.shortcut.watch, (lambda: True), (lambda: True)
        self.weights: list[Tensor | None] = []
        self.kernels: dict[tuple[int, ...], Any] = {}
        self.device: torch.device | None = None

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        alone = not (self.chain.is_training() or modes() or transforms() is not None or tracing() is not None)
        kernel = self.kernel(inputs) if alone and all(type(x) is Tensor for x in inputs) else None
        if kernel is None:
            return self.dense(inputs)
        y: Tensor = _Follow.apply(self, kernel, *inputs)
        return y

    def kernel(self, inputs: tuple[Tensor, ...]) -> Any:
        """The network that gives its gradient as well, as the numbers are now; None where there is none."""
        if self.is_other():
            self.kernels, self.watch = {}, self.chain.shortcut.look()
            self.is_other, self.device = self.watch.is_other(), self.chain.device()
        leading = inputs[0].shape[:-1]
        for x in inputs:
            if x.shape[:-1] != leading or x.numel() == 0:
                return None
        if inputs[0].device != self.device:
            return None
        widths = tuple([x.shape[-1] for x in inputs])
        if widths not in self.kernels:
            found = self.network(widths, running.on_gpu(inputs[0]))
            self.kernels[widths] = found and found.gradient()
            self.is_other = self.watch.is_other(getattr(found, "changed", None))
        return self.kernels[widths]

    def network(self, widths: tuple[int, ...], gpu: bool) -> Any:
        chain, layers = self.chain, self.chain.describe(widths)
        if not gpu:
            compute = torch.int8 if chain.rounds_rows else torch.float32
            return network([chain.numbers()], layers, None, "none", compute)
        if chain.op != "fused_mlp":
            return None
        return packed_network(lambda: chain.flat(widths), chain.device(), layers, None, "none", chain.compute_dtype)

    def dense(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On fp32 copies, by torch's own means."""
        if self.changed():
            changed = self.chain.shortcut.look().is_other()
            with torch.no_grad():
                # of the dense ones the parameter itself, which may be learning
                self.weights = [
                    m.weight.float() if isinstance(m, CompressedLinear) else None for m in self.chain.linears
                ]
            self.changed = changed
        h: Tensor = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        chain = self.chain
        for (activation, parameter), linear, norm, weight in zip(
            chain.activate, chain.linears, chain.norms, self.weights, strict=True
        ):
            h = linear(h) if weight is None else F.linear(h, weight, linear.fp32_bias)
            h = activation.forward(h if norm is None else norm(h), parameter)
        if not chain.rounds_rows and (chain.shortcut.uncompressed or not running.on_gpu(inputs[0])):
            return h
        with torch.no_grad():
            rounded = chain.route.quick(*inputs)
            rounded = chain.run(inputs, -1) if rounded is None else rounded
        if chain.steps[-1].activation == "none":
            # no gradient reads what a product or a sum has put out
            h.data.copy_(rounded)
            return h
        return h + (rounded - h.detach())


class _Follow(torch.autograd.Function):
    """One output and its gradient by the inputs, from one call. At few rows what is done here is what it costs."""

    @staticmethod
    def forward(ctx: Any, guided: Guided, kernel: Any, *inputs: Tensor) -> Tensor:
        flat = inputs[0].dim() == 2
        y, gradient = kernel([(x if flat else x.reshape(-1, x.shape[-1])).contiguous() for x in inputs])
        ctx.save_for_backward(gradient, *inputs)
        ctx.guided = guided
        shaped: Tensor = y if flat else y.view(*inputs[0].shape[:-1], 1)
        return shaped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (gradient, *inputs), (_, _, *needed) = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient shall have one itself
            # views: one input may have been computed from another, which is not for this function to follow
            own = [x.view_as(x) for x in inputs]
            asked = [x for x, wanted in zip(own, needed, strict=True) if wanted]
            found = iter(torch.autograd.grad(ctx.guided.dense(tuple(own)), asked, grad, create_graph=True))
            return None, None, *(next(found) if wanted else None for wanted in needed)
        ways, start = [], 0
        for x, wanted in zip(inputs, needed, strict=True):
            shape = x.shape
            part = gradient if len(inputs) == 1 else gradient.narrow(1, start, shape[-1])
            start += shape[-1]
            ways.append(grad * (part if len(shape) == 2 else part.reshape(shape)) if wanted else None)
        return None, None, *ways
