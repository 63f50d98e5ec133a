"""``evaluate``: a compressed model beside its original, on the user's own rows and machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import batch_invariance, finite, varies
from .data import Data
from .epic import Transitions, reward_of
from .fidelity import HIGHER_IS_BETTER, LEAST_ROWS, Figure, compare, flips_by_margin
from .footprint import size
from .gate import Gate
from .layers import layer_errors
from .progress import shown
from .report import Report, Sample, Speed
from .running import device_of, eval_mode, outputs
from .timing import interleaved, machine

Returns = Callable[[nn.Module], float | Sequence[float]]

MOST_ROWS = 50_000
"""More rows narrow no interval that matters; the checks and the errors are of all rows."""
SAMPLE = 1500
LAYER_ROWS = 1024


def evaluate(
    before: nn.Module,
    after: nn.Module,
    data: Data | Sequence[Tensor] | Tensor,
    *,
    gate: Gate | None = None,
    batches: Sequence[int] = (1, 1024),
    next_states: Tensor | None = None,
    discount: float = 0.99,
    returns: Returns | None = None,
    seconds: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """What ``after`` has kept of ``before``, how large it is and how long it takes; against the truth too, where the
    data has rewards or preferences.

    next_states: the state that follows each row, for EPIC: the inputs are then read as (state), (state, action) or
    (state, action, next state). Of three inputs, the third like the first, it is the third where none is given.
    returns: ``returns(model)`` gives the return of acting or planning by a model, or one for each episode. seconds:
    spent timing each of the ``batches``. Both models run in eval mode.
    """
    data = Data.of(before, data)
    device = _same_device(before, after)
    if len(data) < LEAST_ROWS:
        raise ValueError(f"evaluate: {len(data)} rows are too few for figures in hundredths; give {LEAST_ROWS} or more")
    if not batches or min(batches) < 1:
        raise ValueError(f"evaluate: batches must be 1 or more, got {tuple(batches)}")
    stages = ["outputs", "checks", "fidelity", "layers", "returns" if returns else "size"]
    stages += [f"timing {batch} rows" for batch in batches]
    with eval_mode(before, after), shown("evaluate", len(stages), progress) as show:
        now = ((stage, done) for done, stage in enumerate(stages))

        show(*next(now))
        inputs = tuple(t.to(device) for t in data.inputs)
        old, new = outputs(before, inputs), outputs(after, inputs)
        _check_outputs(data, old, new)
        epic = _transitions(inputs, next_states, old.shape[1], discount, seed)
        show(*next(now))
        checks = [finite(new), varies(new), batch_invariance(before, after, inputs, old, new, batches)]
        sound = all(check.passed for check in checks[:2])
        show(*next(now))
        rows = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed), device="cpu")[:MOST_ROWS]
        each = [compare(x, y, seed=seed) for x, y in zip(old[rows].T, new[rows].T, strict=True)] if sound else []
        figures = worst(each)
        if sound and old.shape[1] > 1:
            same = old.argmax(1) == new.argmax(1)
            figures = {"greedy": Figure.mean(same[rows].double(), seed), **figures}
        if sound and epic is not None:
            canonical = [epic.canonical(reward_of(model, len(inputs))) for model in (before, after)]
            figures["epic"] = epic.distance(canonical[0], canonical[1])
        untold = _says_nothing(data, old.shape[1], rows)
        judged = data if untold is None else Data(data.inputs, None, data.rejected)
        truth = _against_truth(before, after, judged, (old, new), rows, seed) if sound else {}
        show(*next(now))
        layers = layer_errors(before, after, tuple(t[:LAYER_ROWS] for t in inputs)) if sound else {}
        show(*next(now))
        played = {n: _played(returns, m, seed) for n, m in (("before", before), ("after", after))} if returns else {}
        sizes = size(before), size(after)
        speeds = []
        for batch in batches:
            show(*next(now))
            speeds.append(_speed(before, after, inputs, batch, seconds))
    return Report(
        machine=f"{machine(device)}",
        rows=len(data),
        outputs=old.shape[1],
        spread=float(old.std(0).mean()),
        figures=figures,
        each_output=tuple(each) if len(each) > 1 else (),
        truth=truth,
        returns=played,
        checks=tuple(checks),
        sizes=sizes,
        speeds=tuple(speeds),
        layers=layers,
        flips=tuple(flips_by_margin(old[rows][:, 0], new[rows][:, 0], seed=seed)) if sound else (),
        gate=gate,
        sample=Sample(old[rows[:SAMPLE]].float(), new[rows[:SAMPLE]].float()),
        notes=() if untold is None else (f"not judged against the rewards in the data: {untold}",),
    )


def check_original(model: nn.Module, data: Data, next_states: Tensor | None = None) -> None:
    """Raise, before anything is spent on another model, what ``evaluate`` would of this one and the data."""
    inputs = tuple(t.to(device_of(model)) for t in data.inputs)
    with eval_mode(model):
        old = outputs(model, inputs)
    _check_outputs(data, old, old)
    _transitions(inputs, next_states, old.shape[1])


def worst(each: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """Of each figure the worst among the outputs."""
    if not each:
        return {}
    return {
        name: (min if HIGHER_IS_BETTER[name] else max)((figures[name] for figures in each), key=lambda f: f.value)
        for name in each[0]
    }


def _check_outputs(data: Data, old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(f"evaluate: the models give {old.shape[1]} and {new.shape[1]} outputs a row")
    if not old.isfinite().all():
        bad = int((~old.isfinite()).any(1).sum())
        raise ValueError(f"evaluate: the original gives inf or NaN for {bad} of {len(old)} rows")
    for i, column in enumerate(old.T):
        if column.min() == column.max():
            which = f"output {i}" if old.shape[1] > 1 else "the output"
            raise ValueError(
                f"evaluate: {which} of the original is {float(column[0]):g} for all rows: no order to keep"
            )
    if data.rewards is not None and data.rewards.numel() != old.numel() and not _are_labels(data, old.shape[1]):
        raise ValueError(
            f"evaluate: the rewards are {tuple(data.rewards.shape)}, the model gives {old.shape[1]} outputs a row"
        )


def _transitions(
    inputs: Sequence[Tensor], next_states: Tensor | None, width: int, discount: float = 0.99, seed: int = 0
) -> Transitions | None:
    if next_states is not None and width > 1:
        raise ValueError(f"evaluate: EPIC compares rewards; the model has {width} outputs")
    return None if width > 1 else Transitions.of(inputs, next_states, discount=discount, seed=seed)


def _are_labels(data: Data, width: int) -> bool:
    rewards = data.rewards
    return rewards is not None and rewards.numel() == len(data) and width > 1 and not rewards.is_floating_point()


def _says_nothing(data: Data, width: int, rows: Tensor) -> str | None:
    """Why the rewards in the data put no rows in an order."""
    if data.rewards is None:
        return None
    if _are_labels(data, width):
        return f"they are labels, one for {width} outputs"
    true = data.rewards.cpu().reshape(len(data), -1)[rows]
    constant = [float(column[0]) for column in true.T if column.min() == column.max()]
    return f"they are {constant[0]:g} for all {len(rows)} rows" if constant else None


def _against_truth(
    before: nn.Module, after: nn.Module, data: Data, both: tuple[Tensor, Tensor], rows: Tensor, seed: int
) -> dict[str, dict[str, Figure]]:
    found: dict[str, dict[str, Figure]] = {"before": {}, "after": {}}
    for figures, model, mine in zip(found.values(), (before, after), both, strict=True):
        if data.rewards is not None:
            true = data.rewards.double().cpu().reshape(len(mine), -1)
            pairs = zip(true[rows].T, mine[rows].T, strict=True)
            figures |= worst([compare(x, y, seed=seed) for x, y in pairs])
        if data.rejected is not None:
            lost = outputs(model, [t.to(device_of(model)) for t in data.rejected])
            figures["preferred"] = Figure.mean((mine[:, 0] > lost[:, 0]).double(), seed)
    return found if any(found.values()) else {}


def _played(returns: Returns, model: nn.Module, seed: int) -> Figure:
    got = returns(model)
    episodes = torch.as_tensor(got, dtype=torch.float64, device="cpu")
    return Figure(float(episodes)) if episodes.dim() == 0 else Figure.mean(episodes, seed)


def _speed(before: nn.Module, after: nn.Module, inputs: Sequence[Tensor], batch: int, seconds: float) -> Speed:
    rows = torch.arange(batch, device=inputs[0].device) % len(inputs[0])
    part = [t[rows] for t in inputs]

    def call(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(*part)

    with torch.no_grad():
        taken = interleaved({"before": call(before), "after": call(after)}, inputs[0].device, seconds)
    return Speed(batch, taken["before"], taken["after"])


def _same_device(before: nn.Module, after: nn.Module) -> torch.device:
    devices = device_of(before), device_of(after)
    if devices[0] != devices[1]:
        raise ValueError(f"evaluate: the original is on {devices[0]}, the other model on {devices[1]}")
    return devices[0]
