"""``compress``: steps in a row, on a copy, packed at the end and judged on rows that no step has seen."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import resume as runs
from .constraints import copied, settle
from .data import Data
from .distil import Distil
from .finetune import FineTune
from .identity import data_hash, model_hash
from .low_rank import LowRank
from .nn import CompressedLinear
from .prune import Prune
from .quantize import Quantize  # noqa: F401, a file may name it
from .share import Share
from .steps import Step, Work, from_dict
from .transposed import as_linears, as_they_were

HELD_OUT = 0.2
"""The share of the rows that the report is made from."""
LEAST_HELD = 100
"""Fewer rows say nothing in hundredths."""


@dataclass(frozen=True)
class Result:
    """model: packed, in eval mode. report: what it cost, None where there was no data. notes: for whoever reads it."""

    model: nn.Module
    report: Any
    recipe: tuple[Step, ...]
    notes: tuple[str, ...]


def compress(
    model: nn.Module,
    recipe: Sequence[Step] | str | os.PathLike[str],
    data: Data | Sequence[Tensor] | Tensor | None = None,
    *,
    next_states: Tensor | None = None,
    discount: float = 0.99,
    seed: int = 0,
    progress: bool = True,
    gate: Any = None,
    resume: str | os.PathLike[str] | None = None,
) -> Result:
    """Run the steps on a copy of ``model``; a fifth of the rows is held back for the report.

    recipe: steps, or a JSON or TOML file that ``save_recipe`` could have written. Steps that cannot work after one
    another, or on this model and data, are refused before any has run. gate, next_states, discount: see ``evaluate``.
    resume: a folder for what is being trained; the same call goes on there after a kill, and ends with the same model.
    """
    if isinstance(recipe, Step):
        raise TypeError(f"compress: {recipe} is a step; a recipe is a sequence of them, [{recipe}]")
    steps = read_recipe(recipe) if isinstance(recipe, str | os.PathLike) else tuple(recipe)
    check_order(steps)
    given = None if data is None else Data.of(model, data)
    rows, held = (None, None) if given is None else given.split(HELD_OUT, seed)
    if rows is not None and held is not None and len(held) < LEAST_HELD:
        raise ValueError(
            f"compress: {len(rows) + len(held)} rows leave {len(held)} to judge by; "
            f"give {round(LEAST_HELD / HELD_OUT)} or more"
        )
    if gate is not None and held is None:
        raise ValueError("compress: a gate needs data to judge by, and there is none")
    if next_states is not None and (given is None or len(next_states) != len(given)):
        raise ValueError(f"compress: there are {len(next_states)} next states for {len(given or ())} rows")
    after = None if next_states is None else Data((next_states,)).split(HELD_OUT, seed)[1].inputs[0]
    if held is not None:
        from .evaluate import check_original, evaluate

        check_original(model, held, after)
    small, notes = run_steps(model, steps, rows, seed=seed, progress=progress, resume=resume)
    report = None
    if held is not None:
        report = evaluate(model, small, held, gate=gate, next_states=after, discount=discount, progress=progress)
    return Result(small, report, steps, notes)


def run_steps(
    model: nn.Module,
    steps: Sequence[Step],
    data: Data | None,
    *,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """(the compressed model, notes): the steps on a copy of ``model``, with all of the rows to train on."""
    from rich.console import Console

    check_order(steps)
    packed = [name for name, m in model.named_modules() if isinstance(m, CompressedLinear)]
    if packed:
        raise ValueError(f"compress: layer {packed[0]!r} is packed already; give the dense model, or rz.restore it")
    small, transposed = as_linears(copied(model))
    met = small
    for step in steps:
        step.check(met, data)
        if isinstance(step, Distil) and data is not None:
            # the steps behind it will meet its student
            met = step.make(model, data, seed)
    folder = None if resume is None else Path(resume)
    if folder is not None:
        _claim(folder, model, steps, data, seed)
    work = Work(copied(model).eval(), data, seed, progress, folder=folder)
    console = Console(quiet=not progress)
    for place, step in enumerate(steps, 1):
        console.print(f"{place}/{len(steps)} {step}", markup=False, highlight=False)
        small = step.apply(small, work)
    for step in steps:
        small = step.pack(small, work)
    return as_they_were(settle(small), transposed).eval(), tuple(work.notes)


def _claim(folder: Path, model: nn.Module, steps: Sequence[Step], data: Data | None, seed: int) -> None:
    """That the folder is new, or of a run of the same steps on the same model and rows: those do the same again."""
    settings = {"model": model_hash(model), "data": None if data is None else data_hash(data), "seed": seed}
    settings |= {"steps": len(steps), **{f"step {place}": repr(step) for place, step in enumerate(steps, 1)}}
    if runs.read(folder, settings, "compress") is None:
        runs.write(folder, {"settings": settings})


def check_order(steps: Sequence[Step]) -> None:
    """Refuse what cannot work in the order given."""
    for step in steps:
        if not isinstance(step, Step):
            raise TypeError(f"recipe: {step!r} is {type(step).__name__}, not a step such as Quantize(8)")
    for place, step in enumerate(steps):
        name, before = _name(step), steps[:place]
        fixed = [s for s in before if _packs(s)]
        if fixed and not isinstance(step, FineTune):
            raise ValueError(
                f"recipe: {name} cannot follow {_name(fixed[0])}, which decides what is kept of each weight; "
                f"put {name} before it"
                if not _packs(step)
                else f"recipe: {name} and {_name(fixed[0])} both decide what is kept of each weight; choose one"
            )
        masks = [s for s in before if _leaves_masks(s)]
        if masks and _makes_layers(step):
            raise ValueError(f"recipe: {name} after {_name(masks[0])} would lose its zeros; put {name} first")
        if isinstance(step, Prune) and step.pattern == "neurons" and any(_shares_layers(s) for s in before):
            raise ValueError(
                "recipe: Prune of neurons cannot follow Share of layers, after which a layer may stand in two places; "
                "put Prune first"
            )
        if isinstance(step, Distil) and before:
            raise ValueError(f"recipe: {name} makes a new student and throws {_name(before[-1])} away; put it first")
        if isinstance(step, FineTune) and step.towards == "original" and not before:
            raise ValueError("recipe: FineTune towards the original has nothing to learn before another step")


def _packs(step: Step) -> bool:
    return step.packs or (isinstance(step, Share) and step.of == "weights")


def _shares_layers(step: Step) -> bool:
    return isinstance(step, Share) and step.of == "layers"


def _leaves_masks(step: Step) -> bool:
    return isinstance(step, Prune) and step.pattern != "neurons"


def _makes_layers(step: Step) -> bool:
    neurons = isinstance(step, Prune) and step.pattern == "neurons"
    return neurons or isinstance(step, LowRank) or (isinstance(step, Share) and step.of != "weights")


def _name(step: Step) -> str:
    return type(step).__name__


def save_recipe(steps: Sequence[Step], file: str | os.PathLike[str]) -> None:
    """Write the steps to a .json or .toml file."""
    check_order(steps)
    form = _form(file)
    Path(file).write_text(dumps(steps, form) + "\n", encoding="utf-8")


def read_recipe(file: str | os.PathLike[str]) -> tuple[Step, ...]:
    """Read the steps from a .json or .toml file."""
    form = _form(file)
    return loads(Path(file).read_text(encoding="utf-8"), form)


def _form(file: str | os.PathLike[str]) -> str:
    path = Path(file)
    if path.suffix not in (".json", ".toml"):
        raise ValueError(f"recipe: {path} must end in .json or .toml")
    return path.suffix[1:]


def dumps(steps: Sequence[Step], form: str = "json") -> str:
    """The steps as JSON, {"steps": [{"step": "Quantize", "bits": 8, ...}, ...]}, or as TOML, a table each."""
    if form == "toml":
        # TOML has no null: such fields are left out, and are None by default
        tables = [{key: value for key, value in step.to_dict().items() if value is not None} for step in steps]
        texts = ["\n".join(f"{key} = {json.dumps(v, ensure_ascii=False)}" for key, v in t.items()) for t in tables]
        return "\n\n".join(f"[[steps]]\n{text}" for text in texts)
    return json.dumps({"steps": [step.to_dict() for step in steps]}, indent=2)


def loads(text: str, form: str = "json") -> tuple[Step, ...]:
    """The steps of a JSON text, or of a TOML one, where each is a table ``[[steps]]``."""
    try:
        content = tomllib.loads(text) if form == "toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"recipe: this is not {form.upper()}: {error}") from error
    listed = content.get("steps") if isinstance(content, dict) and set(content) == {"steps"} else None
    if not isinstance(listed, list) or not all(isinstance(fields, dict) for fields in listed):
        raise ValueError('recipe: must hold "steps", a list of tables, and nothing else')
    return tuple(from_dict(fields) for fields in listed)
