"""What every compressed linear layer shares: it looks like ``nn.Linear`` from outside and keeps its scales exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from rewardzip_kernels.registration import nobody_listens

from .watch import Watch
from .zeros import Zeros

# shapes whose calls are kept settled; more than these are no loop of a planner's
SHAPES_KEPT = 64


class CompressedLinear(nn.Module):
    """``act(x @ weight^T + bias)`` from a compressed weight.

    ``dtype`` is that of the model around it: it follows ``.half()`` and ``.to()``, and ``weight`` and ``bias`` read in
    it. The buffers themselves follow the device only, since scales rounded to 16 bits would move every weight.
    """

    in_features: int
    out_features: int
    rows: str
    dtype: torch.dtype
    fp32_bias: Tensor | None

    remark: str = ""
    """What a reader of ``explain`` should know of how the layer is kept or computed."""

    zeros: Zeros | None = None
    """What ``swap`` found in the dense weight, and what it chose for it; None where it is not known."""

    policy: str = ""
    """The policy of stable-baselines3 that the layer is in: see ``refusals.py``."""

    def train(self, mode: bool = True) -> Self:
        if mode and self.policy:
            raise ValueError(
                f"{self.policy} is about to be trained, but its layers are compressed and do not learn: train a dense "
                "policy, after policy.load_state_dict(rz.restore(fast).state_dict())"
            )
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._changed()

    def _changed(self) -> None:
        self.__dict__["settled"] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "settled"}

    settled: Mapping[tuple[torch.Size, str], Callable[[Tensor], Tensor | None]] = {}
    """Shorter ways for inputs of these shapes, until a buffer is replaced."""

    def forward(self, input: Tensor, activation: str = "none") -> Tensor:
        # sizes that are free in a traced call cannot be looked up
        call = None if is_compiling() else self.settled.get((input.shape, activation))
        if call is not None and nobody_listens(input):
            y = call(input)
            if y is not None:
                return y
        y = self.compute(input, activation)
        fits = input.is_cuda or (input.is_cpu and input.dtype in (torch.float32, torch.bfloat16))
        if fits and not is_compiling() and nobody_listens(input):
            # on a GPU what has refused these rows refuses for good; on a CPU it may have seen a weight written
            call = self.settle(input, activation) if call is None or input.is_cpu else None
            others = self.settled if len(self.settled) < SHAPES_KEPT else {}
            if call is not None:
                self.__dict__["settled"] = {**others, (input.shape, activation): self.guarded(call)}
        return y

    def guarded(self, call: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """None where a buffer is another, if only for this call; which were written to, ``call`` sees."""
        watch = Watch([self._buffers])
        return watch.function(f"def f(x): return None if {' or '.join(watch.replaced)} else call(x)", call=call)

    def compute(self, input: Tensor, activation: str) -> Tensor:
        raise NotImplementedError

    def settle(self, input: Tensor, activation: str) -> Callable[[Tensor], Tensor | None] | None:
        """``compute`` for inputs such as this, where the op has a shorter way; it must notice written buffers."""

    @property
    def weight(self) -> Tensor:
        """The dense weight this layer stands for, made anew at each reading."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        return None if self.fp32_bias is None else self.fp32_bias.to(self.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """What the weights take by the formula of this form, without scales and biases."""
        raise NotImplementedError

    def check_tensors(self, tensors: dict[str, Tensor]) -> None:
        """ValueError where buffers of the right types and shapes hold what no such layer can; most hold anything."""

    def check_refresh(self, linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """The weight and bias ``refresh`` would take, or an error where they do not fit."""
        weight, bias = check_source("refresh", linear)
        mine, theirs = (self.out_features, self.in_features), tuple(weight.shape)
        if theirs != mine or (bias is None) != (self.fp32_bias is None):
            raise ValueError(
                f"refresh: the dense layer is {theirs} {'without' if bias is None else 'with'} bias, "
                f"the packed one {mine} {'without' if self.fp32_bias is None else 'with'}"
            )
        return weight, bias

    def refresh(self, linear: nn.Linear) -> None:
        """Take the numbers of ``linear`` over, in place: no buffer moves, so captured graphs stay valid."""
        raise NotImplementedError

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same numbers."""
        linear = nn.Linear(self.in_features, self.out_features, self.fp32_bias is not None, "meta", self.dtype)
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias)
        return linear.train(self.training)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        errors = arguments[-1]
        if f"{prefix}weight" in state:
            errors.append(
                f"{prefix.rstrip('.')!r} is compressed, the state dict has a dense weight for it: load that into the "
                "dense model, then rz.swap or rz.refresh"
            )
        super()._load_from_state_dict(state, prefix, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        probe = next(b for b in before.values() if b is not None)
        self.dtype = fn(probe.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        self._changed()
        for name, exact in before.items():
            moved = self._buffers[name]
            if exact is not None and moved is not None and moved.dtype != exact.dtype:
                self._buffers[name] = exact.to(moved.device)
        return self


def check_source(kind: str, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [out, in], bias) of a dense layer, or an error that says what is wrong with it."""
    if any(map(nn.parameter.is_lazy, linear.parameters())):
        raise ValueError(f"{kind}: {linear} has no weights yet; run one batch through the model first")
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if is_pruned(linear):
        # the masks are applied in hooks before forward: the attributes may lag behind
        hooks: Iterable[Any] = linear._forward_pre_hooks.values()
        masked = {hook._tensor_name: hook.apply_mask(linear) for hook in hooks}
        weight, bias = masked.get("weight", weight), masked.get("bias", bias)
    if is_conv1d(linear):
        weight = weight.t()
    if weight.is_meta:
        raise ValueError(f"{kind}: {linear} is on the meta device; load its weights first")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{kind}: weight is {weight.dtype}; it must be float32, float16 or bfloat16")
    return weight.detach(), None if bias is None else bias.detach()


def is_pruned(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune has put masks on the module, and nothing else is hooked to it."""
    others = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = module._forward_pre_hooks.values()
    return bool(hooks) and not any(others) and all(isinstance(hook, BasePruningMethod) for hook in hooks)


def is_conv1d(module: nn.Module) -> TypeGuard[nn.Linear]:
    """transformers' Conv1D (GPT-2): a linear layer in all but its weight, which is stored [in, out]."""
    kind = parametrize.type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
