"""How an op enters torch's dispatcher, and how a plain call gets past it.

``define`` and ``impl`` on one library cost a third of ``custom_op``; even so the dispatcher and the gradient's Python
kernel are most of a small call. Where nobody is listening (no gradient wanted, nothing compiling, tracing or
transforming) the call goes straight to the kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .loading import implementation

library = torch.library.Library("rewardzip", "DEF")

Function = Callable[..., Any]

modes = torch._C._len_torch_dispatch_stack
forward_mode = torch.autograd.forward_ad
transforms = torch._C._functorch.peek_interpreter_stack
tracing = torch._C._get_tracing_state


def nobody_listens(x: Any) -> bool:
    """Whether a call on ``x`` (or several) is eager, without gradients, and seen by no mode, transform or tracer."""
    if type(x) is Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return False
    else:
        for tensor in x if type(x) in (list, tuple) else (x,):
            if type(tensor) is not Tensor or (tensor.requires_grad and torch.is_grad_enabled()):
                return False
    return not modes() and transforms() is None and tracing() is None and forward_mode._current_level < 0


def register(
    schema: str, *, reference: Function, check: Function, fake: Function, setup_context: Function, backward: Function
) -> Function:
    """Define ``rewardzip::<schema>``: checks, a kernel per device (the reference elsewhere), shape rule, gradient.

    A kernel with the attribute ``checks`` calls ``check`` itself, where it has not seen the like before.
    """
    name = schema.partition("(")[0]
    library.define(schema)

    def kernel(device: str) -> Function:
        def run(*args: Any) -> Any:
            function = implementation(device, name, reference)
            if not getattr(function, "checks", False):
                check(*args)
            return function(*args)

        return run

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    cpu, gpu = kernel("cpu"), kernel("gpu")
    library.impl(name, gpu, "CUDA")
    library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"rewardzip::{name}", checked_fake, lib=library)
    op = getattr(torch.ops.rewardzip, name).default
    torch.library.register_vmap(f"rewardzip::{name}", _rowwise(op), lib=library)
    torch.library.register_autograd(f"rewardzip::{name}", backward, setup_context=setup_context, lib=library)

    def call(*args: Any) -> Any:
        x = args[0]
        if torch.compiler.is_compiling():
            return op(*args)
        if not nobody_listens(x) or _negated(x):
            refuse_forward_mode(name, x)
            return op(*args)
        if type(x) is list:
            x = x[0] if x else args[1]
        if x.is_cuda:
            return gpu(*args)
        return cpu(*args) if x.is_cpu else op(*args)

    return call


def _negated(x: Any) -> bool:
    """Whether numbers stand in memory with the other sign, as the imaginary parts of a conjugate do: torch knows."""
    return x.is_neg() if type(x) is Tensor else any(tensor.is_neg() for tensor in x)


def refuse_forward_mode(name: str, x: Any) -> None:
    """The ops have no forward-mode derivative, and torch would take a silent zero for it."""
    above, rows = transforms(), [t for t in (x if isinstance(x, list) else [x]) if isinstance(t, Tensor)]
    if above is not None and above.key() == torch._C._functorch.TransformType.Jvp:
        asked = any(torch._C._functorch.is_gradtrackingtensor(t) for t in rows)
    else:
        asked = forward_mode._current_level >= 0 and any(forward_mode.unpack_dual(t).tangent is not None for t in rows)
    if asked:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual numbers): take torch.func.grad, vjp or jacrev, "
            "or rz.restore the model"
        )


def _rowwise(op: Any) -> Function:
    """The op under ``torch.vmap``: a batch of rows is more rows, a batch of weights is one call for each."""

    def rule(info: Any, in_dims: tuple[Any, ...], rows: Any, *rest: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[1:]):
            each = [[_pick(a, d, i) for a, d in zip((rows, *rest), in_dims, strict=True)] for i in range(size)]
            return torch.stack([op(*arguments) for arguments in each]), 0
        several = isinstance(rows, list)
        pairs = zip(rows, in_dims[0], strict=True) if several else [(rows, in_dims[0])]
        ahead = [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]
        y = op(ahead if several else ahead[0], *rest)
        # members, or their mean and deviation, stand before the rows
        return y, y.dim() - ahead[0].dim()

    return rule


def _pick(argument: Any, dim: Any, i: int) -> Any:
    if isinstance(argument, list) and dim is not None:
        return [_pick(a, d, i) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)
