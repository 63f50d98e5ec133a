"""Putting compressed layers into a trained model, taking them out again, and keeping them up to date."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .constraints import copied as _copy
from .constraints import settle_masked, unmasked
from .fuse import FusedForward, is_plain, unfuse
from .fuse import fuse as fuse_forward
from .int8 import Fused, Int8
from .nn import CompressedLinear
from .nn.base import is_conv1d, is_pruned
from .refusals import allow_saving, refuse_what_fails

Choice = str | Iterable[str] | Callable[[nn.Module, str], bool]


def swap(
    model: nn.Module,
    config: Int8 | Fused,
    example_inputs: Any = None,
    *,
    skip: Choice = (),
    filter: Choice | None = None,
    fuse: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """A copy of ``model`` with its linear layers, and the activations behind them, on fused kernels.

    skip, filter: names, shell wildcards, or ``(module, name) -> bool``; what ``skip`` matches, or ``filter`` does not,
    stays dense, and as wide as it is: of other layers neurons that do nothing are dropped. example_inputs: one batch (a
    tensor, or a tuple of the forward's arguments), needed by static scales and by float16 products. fuse=False leaves
    the model's forwards alone: a launch per layer, activations apart. Layers with one output stay dense unless the
    config says otherwise; ``explain`` tells of each layer what became of it and why.
    """
    if isinstance(config, Fused):
        if skip or filter is not None or not fuse:
            raise ValueError(
                "swap: Fused() only fuses, and layers with others: it takes no skip, no filter, no fuse=False"
            )
        settled = settle_masked(model, inplace=inplace)
        return _only_fused(unmasked(settled if inplace or settled is not model else _copy(settled)))
    return packed(model, config, example_inputs, skip, filter, fuse, inplace)


def packed(
    model: nn.Module,
    config: Int8,
    example_inputs: Any = None,
    skip: Choice = (),
    filter: Choice | None = None,
    fuse: bool = True,
    inplace: bool = False,
    drop: bool = True,
) -> nn.Module:
    """``swap`` to ``Int8``. drop=False: dead neurons stay, so that models of one shape still have one."""
    settled = settle_masked(model, inplace=inplace)
    model, inplace = settled, inplace or settled is not model
    _check_choice(model, "skip", skip)
    _check_choice(model, "filter", filter)
    lost: dict[str, int] = {}
    if drop and may_have_dead(model):
        model, inplace, lost = _without_dead(model, config, skip, filter, inplace)
    if config.needs_range and example_inputs is None:
        raise ValueError(f"swap: {config} needs example_inputs to see how large each layer's inputs are")
    linears: dict[nn.Linear, list[str]] = {}
    for name, linear in _dense_layers(model):
        linears.setdefault(linear, []).append(name)
    if not linears:
        raise ValueError(f"swap: {type(model).__name__} has no nn.Linear to replace")
    reasons = {linear: reason_to_leave(names, linear, config, skip, filter) for linear, names in linears.items()}
    left = {linears[linear][0]: reason for linear, reason in reasons.items() if reason}
    chosen = {linear: names for linear, names in linears.items() if not reasons[linear]}
    ranges = _input_ranges(model, chosen, example_inputs) if config.needs_range else {}

    made = {linear: config.make(linear, names[0], ranges.get(names[0])) for linear, names in chosen.items()}
    for linear, names in chosen.items():
        zeros = made[linear].zeros
        made[linear].zeros = zeros and replace(zeros, dropped=sum(lost.get(name, 0) for name in names))
    if inplace:
        model = put(model, {name: made[linear] for linear, names in chosen.items() for name in names})
    else:
        # the copy finds each replaced layer copied already
        model = _copy(model, {id(linear): layer for linear, layer in made.items()})
    refuse_what_fails(model)
    notes = fuse_forwards(model) if fuse else {}
    if not chosen:
        warnings.warn(f"swap changed nothing: {_listed(left)}", UserWarning, stacklevel=3)
    if notes:
        warnings.warn(f"some activations are not fused: {_listed(notes)}", UserWarning, stacklevel=3)
    return model


def may_have_dead(model: nn.Module) -> bool:
    """Whether an output or an input of a layer has no weights: without that no neuron is dead."""
    for _, linear in _dense_layers(model):
        if not linear.weight.is_meta:
            used = linear.weight != 0
            if not (bool(used.any(1).all()) and bool(used.any(0).all())):
                return True
    return False


def _without_dead(
    model: nn.Module, config: Int8, skip: Choice, filter: Choice | None, inplace: bool
) -> tuple[nn.Module, bool, dict[str, int]]:
    """(the model without dead neurons, whether that is a copy or may be changed, how many each layer lost)."""
    from .dead import drop_dead, living  # and torch.fx with it: few models have any

    names: dict[nn.Linear, list[str]] = {}
    for name, linear in _dense_layers(model):
        names.setdefault(linear, []).append(name)
    asked = "skipped", "not in filter"
    keep = {
        name
        for linear, mine in names.items()
        if reason_to_leave(mine, linear, config, skip, filter) in asked or config.skips_zeros(linear)
        for name in mine
    }
    if not living(model, keep):
        return model, inplace, {}
    model = unmasked(model if inplace else _copy(model))
    return model, True, drop_dead(model, keep)


def restore(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a swapped model on ``nn.Linear`` again, with the numbers its compressed layers stand for."""
    if not inplace:
        model = _copy(model)
    made: dict[int, nn.Module] = {}
    dense = {}
    for name, layer in _modules(model):
        if isinstance(layer, FusedForward):
            unfuse(layer)
        allow_saving(layer)
        if isinstance(layer, CompressedLinear):
            dense[name] = made.setdefault(id(layer), layer.to_linear())
    if inplace and dense and (owners := _optimizer_owners(model)):
        message = f"the optimizer of {', '.join(owners)} does not know the restored layers; make it anew to train them"
        warnings.warn(message, UserWarning, stacklevel=2)
    return put(model, dense)


def refresh(fast: nn.Module, model: nn.Module) -> None:
    """Re-pack ``fast`` from the dense ``model`` it was made of, in place; what was left dense is copied too."""
    model = _as_narrow(fast, settle_masked(model))
    pairs = []
    for name, layer in _modules(fast):
        if isinstance(layer, CompressedLinear):
            try:
                source = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"refresh: the packed model has a layer {name!r}, the dense one has none") from None
            if not isinstance(source, nn.Linear) and not is_conv1d(source):
                raise ValueError(f"refresh: layer {name!r} is {type(source).__name__}, not a dense linear layer")
            layer.check_refresh(source)
            pairs.append((layer, source))
    packed = {id(t) for layer, _ in pairs for t in layer.buffers()}
    theirs = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    copies = []
    for name, tensor in (*fast.named_parameters(), *fast.named_buffers()):
        if id(tensor) in packed:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            found = tuple(theirs[name].shape) if name in theirs else "none"
            raise ValueError(f"refresh: {name!r} has shape {tuple(tensor.shape)}, in the dense model {found}")
        copies.append((tensor, theirs[name]))
    with torch.no_grad():
        for layer, source in pairs:
            layer.refresh(source)
            if layer.zeros is not None:  # of the new weights; past what forgets the settled calls
                layer.__dict__["zeros"] = replace(layer.zeros, share=0.0, pattern="", why="")
        for tensor, dense in copies:
            tensor.copy_(dense)
    for module in fast.modules():
        if isinstance(module, FusedForward):
            for chain in module.rz_chains:
                chain.repack()


def _as_narrow(fast: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` without the neurons that ``swap`` has dropped, if they are still dead."""
    theirs = dict(_modules(model))
    dropped = {
        name: layer.zeros.dropped
        for name, layer in _modules(fast)
        if isinstance(layer, CompressedLinear) and layer.zeros and layer.zeros.dropped
        if isinstance(dense := theirs.get(name), nn.Linear) and dense.out_features != layer.out_features
    }
    if not dropped:
        return model
    from .dead import drop_dead

    same = {n for n, m in _modules(fast) if n in theirs and _shape(m) == _shape(theirs[n])}
    model = unmasked(_copy(model))
    drop_dead(model, same)
    for name, count in dropped.items():
        if _shape(model.get_submodule(name)) != _shape(fast.get_submodule(name)):
            raise ValueError(
                f"refresh: swap dropped {count} dead neurons of layer {name!r}, and in this dense model not as many "
                "are dead; swap it anew"
            )
    return model


def _shape(layer: nn.Module) -> tuple[Any, Any]:
    return getattr(layer, "out_features", None), getattr(layer, "in_features", None)


def fuse_forwards(model: nn.Module) -> dict[str, str]:
    """Fuse every module that calls compressed layers; the reasons for those that own some and could not be."""
    notes = {}
    # children first: a parent hands the parts of a torch.cat to a child that is one chain
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, CompressedLinear | FusedForward | nn.ModuleList | nn.ModuleDict):
            continue
        if any(isinstance(m, CompressedLinear) for m in module.modules()):
            reason = fuse_forward(module)
            if reason and _owns_activated(module):
                notes[name or type(module).__name__] = reason
    return notes


def _only_fused(model: nn.Module) -> nn.Module:
    reasons = {}
    for name, module in reversed(list(model.named_modules())):
        if not isinstance(module, CompressedLinear | FusedForward | nn.Linear | nn.ModuleList | nn.ModuleDict):
            reason = fuse_forward(module, dense=True)
            if reason and any(type(child) is nn.Linear for child in module.children()):
                reasons[name] = reason
    if not any(isinstance(module, FusedForward) for module in model.modules()):
        sizes = "at most 2^25 weights"
        why = _listed(reasons) or f"it has no MLP of 2 to 6 nn.Linear layers with {sizes}"
        warnings.warn(f"swap changed nothing: {why}", UserWarning, stacklevel=3)
    return model


def install(model: nn.Module, layers: Mapping[str, nn.Module], notes: list[str]) -> nn.Module:
    """Put packed layers in by one of their names each, in place, and fuse what can be."""
    made = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    model = put(model, {name: made[id(module)] for name, module in _modules(model) if id(module) in made})
    notes += [f"{name}: its activations are not fused, {reason}" for name, reason in fuse_forwards(model).items()]
    return model


def _owns_activated(module: nn.Module) -> bool:
    """Whether the module's own code runs compressed layers and seems to run an activation behind them."""
    children = list(module.children())
    for child in children:
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            children += child.children()
    names = set(type(module).forward.__code__.co_names) if hasattr(type(module).forward, "__code__") else set()
    active = bool(names & {"relu", "relu_", "tanh", "sigmoid", "elu", "leaky_relu", "silu", "mish", "gelu"})
    active |= any(type(child).__module__ == "torch.nn.modules.activation" for child in children)
    return active and any(isinstance(child, CompressedLinear) for child in children)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name it has, as a list: the model may be changed on the way."""
    yield from list(model.named_modules(remove_duplicate=False))


def _dense_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in _modules(model):
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"swap: {name!r} is {type(module).__name__}: run one batch through the model first")
        # subclasses override forward: replacing them would drop what they add
        if type(module) is nn.Linear or is_conv1d(module):
            yield name, module


def reason_to_leave(
    names: list[str], linear: nn.Linear, config: Int8, skip: Choice = (), filter: Choice | None = None
) -> str | None:
    """Why a layer stays dense, None where nothing speaks against it; a shared layer goes by several names."""
    outputs = linear.weight.shape[1] if is_conv1d(linear) else linear.weight.shape[0]
    if any(_matches(skip, linear, name) for name in names):
        return "skipped"
    if filter is not None and not any(_matches(filter, linear, name) for name in names):
        return "not in filter"
    if outputs == 1 and not config.scalar_outputs:
        return "one output, kept in full precision"
    if "forward" in linear.__dict__:
        return "its forward was replaced"
    if not is_plain(linear) and not is_pruned(linear):
        return "it has hooks"
    return None


def _optimizer_owners(model: nn.Module) -> list[str]:
    """Modules that keep the optimizer of their parameters, as the policies of stable-baselines3 do."""

    def owns(module: nn.Module) -> bool:
        return any(isinstance(value, torch.optim.Optimizer) for value in vars(module).values())

    return [type(module).__name__ for module in model.modules() if owns(module)]


def _matches(choice: Choice, module: nn.Module, name: str) -> bool:
    if callable(choice):
        return choice(module, name)
    patterns = [choice] if isinstance(choice, str) else choice
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_choice(model: nn.Module, kind: str, choice: Choice | None) -> None:
    if choice is None or callable(choice):
        return
    names = [name for name, _ in _dense_layers(model)]
    for pattern in [choice] if isinstance(choice, str) else choice:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"swap: {kind} {pattern!r} matches no linear layer; there are {', '.join(names)}")


def _input_ranges(model: nn.Module, chosen: dict[nn.Linear, list[str]], example_inputs: Any) -> dict[str, float]:
    """The largest input magnitude each layer sees while the model runs on the example inputs."""
    # a copy, since running a model may change it: batch norms, counters
    model = _copy(model).eval()
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():
                amax = float(args[0].detach().abs().max())
                if not math.isfinite(amax):
                    raise ValueError(f"swap: with the example inputs, layer {name!r} sees inf or NaN")
                largest[name] = max(largest.get(name, 0.0), amax)

        return note

    for name, *_ in chosen.values():
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(*example_inputs) if isinstance(example_inputs, tuple | list) else model(example_inputs)
    unseen = [name for name, *_ in chosen.values() if name not in largest]
    if unseen:
        raise ValueError(f"swap: the example inputs never reach layer {unseen[0]!r}; skip it or give others")
    return largest


def put(model: nn.Module, layers: dict[str, Any]) -> nn.Module:
    """Set modules by name; the root itself goes by the empty name."""
    for name, layer in layers.items():
        if not name:
            return layer  # type: ignore[no-any-return]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name or 'the model'}: {reason}" for name, reason in reasons.items())
