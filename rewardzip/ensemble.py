"""An ensemble of reward models, or of Q networks, in one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from rewardzip_kernels import fused_mlp, written
from rewardzip_kernels.mlp_layout import pack

from .chain import Chain, Dense, autocast, compute_for, fits, in_floats
from .direct import Form
from .fuse import FusedForward
from .guided import wanted
from .int8 import Fused, Int8
from .nn import BlockSparseLinear, Int8Linear
from .shortcut import Shortcut
from .swap import packed, swap

Reduce = Literal["none", "mean_std"]


def fuse_ensemble(
    members: Sequence[nn.Module],
    config: Int8 | Fused | None = None,
    reduce: Reduce = "none",
    example_inputs: Any = None,
) -> FusedEnsemble:
    """Networks of the same shape as one module: their MLPs in one launch over the same inputs.

    The result returns all members' outputs stacked in front, or with reduce="mean_std" their mean and torch's standard
    deviation. The members are swapped copies; each must hold one MLP of 2 to 6 layers, each at most 256 wide. By
    ``Fused()`` nothing is rounded, and the one call is a CPU's: elsewhere the members run one by one.
    """
    if not members:
        raise ValueError("fuse_ensemble: there is no member")
    if reduce not in ("none", "mean_std"):
        raise ValueError(f"fuse_ensemble: reduce is {reduce!r}; it must be 'none' or 'mean_std'")
    return FusedEnsemble([_swapped(m, config or Int8(), example_inputs) for m in members], reduce)


def _swapped(member: nn.Module, config: Int8 | Fused, example_inputs: Any) -> nn.Module:
    """With its dead neurons, which are others in each member."""
    return swap(member, config) if isinstance(config, Fused) else packed(member, config, example_inputs, drop=False)


class FusedEnsemble(nn.Module):
    """Swapped ``members``, which hold the numbers and run their own code; one launch serves the MLPs of all."""

    def __init__(self, members: Sequence[nn.Module], reduce: Reduce) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.reduce = reduce
        self._share_launch()

    def _share_launch(self) -> None:
        chains = [_only_chain(member, e) for e, member in enumerate(self.members)]
        _check_alike(list(self.members), [chain for _, _, chain in chains])
        launch = _Launch([chain for _, _, chain in chains])
        object.__setattr__(self, "launch", launch)
        for e, (owner, name, chain) in enumerate(chains):
            slot = _Slot(launch, e, chain)
            setattr(type(owner), name, slot)
            launch.places.append((owner, type(owner)))
            if owner.rz_whole is chain:
                type(owner).rz_whole = slot
        for module in self.members.modules():
            if isinstance(module, FusedForward) and "__call__" in vars(type(module)):
                del type(module).__call__  # past the slot

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._share_launch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "launch"}

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        form = None if named else self.launch.form(self.members, inputs)
        if form is not None:
            outputs = self.launch.run(inputs, form.flat, self.reduce)
        else:
            self.launch.start()
            try:
                outputs = _reduced([member(*inputs, **named) for member in self.members], self.reduce)
            finally:
                self.launch.end()
        return outputs if self.reduce == "none" else outputs.unbind()

    def extra_repr(self) -> str:
        where = self.launch.chains[0].where if self.launch.stands() else "one by one"
        return f"{where} for {len(self.members)} members, reduce={self.reduce}"

    launch: _Launch


def _reduced(outputs: list[Tensor], reduce: Reduce) -> Tensor:
    together = torch.stack(outputs)
    if reduce == "none":
        return together
    deviation = torch.full_like(outputs[0], torch.nan) if len(outputs) == 1 else together.std(0)
    return torch.stack([together.mean(0), deviation])


def _never(members: nn.ModuleList) -> bool:
    return False


class _Launch:
    """The members' MLPs over what reaches the first one, each taking its share; a call is its thread's own."""

    def __init__(self, chains: list[Chain]) -> None:
        self.chains = chains
        self.places: list[tuple[nn.Module, type[nn.Module]]] = []
        self.packed: dict[Any, Any] = {}
        self.seen: tuple[int, list[int]] | None = None
        self.alike: Form | None = None
        self.undisturbed: Callable[[nn.ModuleList], bool] = _never
        self.call = threading.local()
        parts = [part for chain in chains for part in (*chain.linears, *filter(None, chain.norms))]
        self.shortcuts = {
            reduce: Shortcut(parts, lambda: [chain.numbers() for chain in chains], len(chains), reduce)
            for reduce in ("none", "mean_std")
        }
        self.shortcut = self.shortcuts["none"]

    def form(self, members: nn.ModuleList, inputs: tuple[Tensor, ...]) -> Form | None:
        """How the members do nothing but run their MLP on these inputs, or None where one does more."""
        if _global_forward_hooks or _global_forward_pre_hooks or self.shortcut.is_training():
            return None
        if self.alike is None or not self.undisturbed(members):
            self.alike, self.undisturbed = self.look(members)
        form = self.alike
        if form is None or len(inputs) != form.arity or (form.ranks and inputs[0].dim() not in form.ranks):
            return None
        return form

    def look(self, members: nn.ModuleList) -> tuple[Form | None, Callable[[nn.ModuleList], bool]]:
        """The form of all members, or None, and whether what this rests on is still as it was."""
        names: dict[str, Any] = {"table": members._modules}
        asked = [f"members._modules is table and len(table) == {len(self.chains)}"]
        forms: list[Form | None] = [getattr(type(member), "rz_form", None) for member in members]
        first = forms[0] if forms else None
        alike = len(forms) == len(self.chains) and self.stands()
        for e, (member, form, chain) in enumerate(zip(members, forms, self.chains, strict=False)):
            # another member, or a layer that was replaced, has a chain of its own
            if not alike or form is None or first is None or form.chain is not chain or not first.takes(form):
                return None, _never
            expression, more = form.undisturbed(member, f"m{e}")
            asked.append(f"table['{e}'] is m{e} and {expression}")
            names |= more
        for e, (owner, kind) in enumerate(self.places):
            names |= {f"owner{e}": owner, f"owner{e}_kind": kind}
            asked.append(f"type(owner{e}) is owner{e}_kind")
        undisturbed = written.function(f"def f(members): return {' and '.join(asked)}", names)
        return (first, undisturbed) if undisturbed(members) else (None, _never)

    def stands(self) -> bool:
        """Whether the members run by the code that was fused: not once they are restored."""
        return all(type(owner) is kind for owner, kind in self.places)

    def start(self) -> None:
        self.call.running, self.call.outputs = True, None

    def end(self) -> None:
        self.call.running, self.call.outputs = False, None

    def serves(self, e: int) -> bool:
        """Whether an ensemble's call is under way, and has passed the first member."""
        return getattr(self.call, "running", False) and (e == 0 or self.call.outputs is not None)

    def share(self, e: int, inputs: tuple[Tensor, ...]) -> Tensor:
        if e == 0:
            self.call.outputs = self.run(inputs, False, "none")
        share: Tensor = self.call.outputs[e]
        return share

    def run(self, inputs: tuple[Tensor, ...], flat: bool, reduce: Reduce) -> Tensor:
        """[E, ..., outputs], or mean and deviation; ``flat``: without the last dimension, which is one number."""
        shortcut = self.shortcuts[reduce]
        y = None if is_compiling() else (shortcut.flat if flat else shortcut.straight).quick(*inputs)
        if y is not None:
            return y
        y = self.launched(in_floats(inputs), reduce)
        return y.squeeze(-1) if flat else y

    def launched(self, inputs: tuple[Tensor, ...], reduce: Reduce) -> Tensor:
        widths = tuple(x.shape[-1] for x in inputs)
        if isinstance(self.chains[0], Dense):
            return self.of_dense(inputs, widths, reduce)
        if self.chains[0].guidable and wanted(inputs):
            return _reduced([chain.guided(inputs) for chain in self.chains], reduce)
        found = self.packed.get(widths)
        if found is None and is_compiling():
            return _reduced([chain.one_by_one(*inputs) for chain in self.chains], reduce)
        if found is None or (not is_compiling() and found[0]()):
            changed = self.shortcut.look().is_other()
            layers = self.chains[0].describe(widths)
            with torch.inference_mode(False), torch.no_grad():
                new = pack([chain.numbers() for chain in self.chains], layers)
                if found is not None and found[1].device == new[0].device:  # captured graphs read it where it lies
                    new = found[1].copy_(new[0]), found[2].copy_(new[1])
            found = self.packed[widths] = changed, *new, layers
        _, weights, params, layers = found
        compute = compute_for(inputs, self.chains[0].compute_dtype)
        y = fused_mlp(list(inputs), weights, params, layers, len(self.chains), reduce, compute)
        self.shortcuts[reduce].settle(inputs, layers, compute, lambda: (weights, params))
        return y

    def of_dense(self, inputs: tuple[Tensor, ...], widths: tuple[int, ...], reduce: Reduce) -> Tensor:
        like = all(p.dtype == x.dtype for p in self.shortcut.dense() for x in inputs)
        if is_compiling() or not like or autocast(inputs):
            return _reduced([chain.one_by_one(*inputs) for chain in self.chains], reduce)
        if wanted(inputs):
            return _reduced([chain.guided(inputs) for chain in self.chains], reduce)
        # numbers that change from call to call, as in training, are not worth packing
        before, self.seen = self.seen, self.shortcut.state()
        if before in (None, self.seen):
            shortcut = self.shortcuts[reduce]
            shortcut.settle(inputs, self.chains[0].describe(widths), compute_for(inputs, None))
            y = shortcut.straight.quick(*inputs)
            if y is not None:
                return y
        return _reduced([chain.one_by_one(*inputs) for chain in self.chains], reduce)


class _Slot(Chain):
    """Stands where a member's chain stood: its share of the launch inside an ensemble's call, itself outside."""

    def __init__(self, launch: _Launch, e: int, chain: Chain) -> None:
        self.__dict__.update(chain.__dict__)
        self.own, self.shared_launch, self.e = chain, launch, e

    def __call__(self, *inputs: Tensor, dim: int = -1) -> Tensor:
        if self.is_training() or not self.shared_launch.serves(self.e):
            return self.own(*inputs, dim=dim)
        if dim not in (-1, inputs[0].dim() - 1):
            inputs = (torch.cat(inputs, dim),)
        return self.shared_launch.share(self.e, inputs)


def _only_chain(member: nn.Module, e: int) -> tuple[Any, str, Chain]:
    """(the module that runs it, the name it runs it by, the one chain of a member)."""
    found = [
        (module, name, chain)
        for module in member.modules()
        if isinstance(module, FusedForward)
        for name, chain in vars(type(module)).items()
        if isinstance(chain, Chain) and name != "rz_whole"
    ]
    kinds = Int8Linear, BlockSparseLinear
    if len(found) != 1 or not (isinstance(found[0][2], Dense) or fits(found[0][2].linears, kinds)):
        raise ValueError(
            f"fuse_ensemble: member {e} has {len(found)} MLPs that fit one launch; it must have one "
            "(2 to 6 layers, each at most 256 wide, in code that can be traced)"
        )
    return found[0]


def _check_alike(members: list[nn.Module], chains: list[Chain]) -> None:
    """Same shapes, and nothing outside the MLPs that could make the members' inputs differ."""
    widths = (chains[0].linears[0].in_features,)
    first = chains[0].describe(widths)
    outside = _outside(members[0], chains[0])
    for e, (member, chain) in enumerate(zip(members, chains, strict=True)):
        if chain.describe(widths) != first or chain.linears[0].in_features != widths[0]:
            raise ValueError(f"fuse_ensemble: member {e} is {chain.describe(widths)!r}, member 0 {first!r}")
        mine = _outside(member, chain)
        if mine.keys() != outside.keys() or any(not torch.equal(mine[n], outside[n]) for n in mine):
            raise ValueError(
                f"fuse_ensemble: member {e} and member 0 differ outside their MLP, so their MLPs see other inputs"
            )


def _outside(member: nn.Module, chain: Chain) -> dict[str, Tensor]:
    parts = [*chain.linears, *filter(None, chain.norms)]
    inside = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    return {name: t for name, t in (*member.named_parameters(), *member.named_buffers()) if id(t) not in inside}
