"""The command line: each command is one call of the library. It ends with 0, 1 (outside the gate) or 2 (an error)."""

from __future__ import annotations

import io
import json
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .report import Report

app = typer.Typer(help="Smaller, faster reward models, and what it cost.", no_args_is_help=True, add_completion=False)

MODEL = "package.module:function, a saved folder, or the weights of an MLP (.safetensors, .pt; activation: w.pt:tanh)"
DATA = "package.module:function, .npz or .parquet: inputs, and 'rewards' where they are known"

Model = Annotated[str, typer.Argument(help=MODEL)]
Rows = Annotated[str, typer.Argument(help=DATA)]
Out = Annotated[Path, typer.Argument(help="the folder to save the model in")]
Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
Page = Annotated[Path | None, typer.Option("--report", help="also write the report as a page, report.html")]
Seed = Annotated[int, typer.Option(help="of rows held back and of training")]
Agreement = Annotated[float, typer.Option(help="gate: the least share of pairs in the same order")]
Epic = Annotated[float, typer.Option(help="gate: the largest EPIC or Pearson distance")]
BestOfN = Annotated[float, typer.Option(help="gate: the largest share lost by picking the best of 16")]


@app.command()
def demo(page: Annotated[Path, typer.Option(help="where the page of plots goes")] = Path("out/demo.html")) -> None:
    """Learn Pendulum's reward and dynamics, compress the reward, plan with both: returns, times, a page of plots."""
    from .demo import main

    main(page)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """What each layer of a model is, and bytes before and after."""
    with _bad_input():
        from . import explain
        from .sources import load_model

        found = explain(load_model(model))
        typer.echo(json.dumps([asdict(layer) for layer in found]) if as_json else str(found))


@app.command()
def evaluate(
    before: Model, after: Model, data: Rows, agreement: Agreement = 0.99, epic: Epic = 0.02, best_of_n: BestOfN = 0.01,
    report: Page = None, as_json: Json = False,
) -> None:  # fmt: skip
    """What the second model has kept of the first, how large it is and how long it takes."""
    with _bad_input():
        from . import Gate
        from . import evaluate as run
        from .page import check as check_page
        from .sources import load_data, load_model

        check_page(report)
        gate, original = Gate(agreement, epic, best_of_n), load_model(before)
        rows, next_states = load_data(data, original)
        found = run(original, load_model(after), rows, gate=gate, next_states=next_states, progress=not as_json)
        _tell(found, {}, report, as_json)


@app.command()
def compress(
    model: Model, recipe: Annotated[Path, typer.Argument(help="steps in a .json or .toml file")], data: Rows, out: Out,
    agreement: Agreement = 0.99, epic: Epic = 0.02, best_of_n: BestOfN = 0.01, seed: Seed = 0, report: Page = None,
    resume: Annotated[Path | None, typer.Option(help="keeps what is trained: a killed run goes on there")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Run a recipe; the model is saved whether or not it is within the gate."""
    with _bad_input():
        from . import Gate, save
        from . import compress as run
        from .checkpoint import check_target
        from .page import check as check_page
        from .sources import load_data, load_model

        check_page(report)
        check_target(out)
        gate, original = Gate(agreement, epic, best_of_n), load_model(model)
        rows, next_states = load_data(data, original)
        settings: dict[str, Any] = {"gate": gate, "seed": seed, "resume": resume}
        result = run(original, recipe, rows, next_states=next_states, progress=not as_json, **settings)
        save(result.model, out)
        _tell(result.report, {"model": str(out), "notes": list(result.notes)}, report, as_json)


@app.command()
def search(
    model: Model, data: Rows, out: Out, budget: Annotated[float, typer.Option(help="seconds")] = 600,
    folder: Annotated[Path | None, typer.Option(help="keeps what is measured: a killed search goes on there")] = None,
    agreement: Agreement = 0.99, epic: Epic = 0.02, best_of_n: BestOfN = 0.01, seed: Seed = 0, report: Page = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find the recipe that makes the model smallest and fastest within the gate."""
    with _bad_input():
        from . import Gate, save
        from .checkpoint import check_target
        from .page import check as check_page
        from .search import search as run
        from .sources import load_data, load_model

        check_page(report)
        check_target(out)
        gate, original = Gate(agreement, epic, best_of_n), load_model(model)
        rows, next_states = load_data(data, original)
        settings: dict[str, Any] = {"gate": gate, "budget": budget, "seed": seed, "folder": folder}
        found = run(original, rows, next_states=next_states, progress=not as_json, **settings)
        save(found.model, out)
        recipe = [step.to_dict() for step in found.recipe]
        _tell(found.report, {"model": str(out), "recipe": recipe}, report, as_json, found.passed)


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="a model saved by rz.save")],
    inputs: Annotated[list[str], typer.Argument(help="parquet files, globs or folders")],
    output: Annotated[Path, typer.Argument(help="a folder for the scores; run again to go on")],
    columns: Annotated[list[str], typer.Option(help="one per input of the model: state, or s0,s1,s2, or 's*'")],
    keep: Annotated[list[str], typer.Option(help="a column to copy to the output")] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="local or ray")] = "local",
    strict: Annotated[bool, typer.Option(help="stop at the first row with null, NaN or inf")] = False,
    as_json: Json = False,
) -> None:
    """Score parquet files into a folder of parquet files; a killed run goes on where it was."""
    from . import score

    with _bad_input():
        settings: dict[str, Any] = {"columns": columns, "keep": keep, "engine": engine, "strict": strict}
        found = score(model, inputs, output, progress=not as_json, **settings)
        typer.echo(_json(found) if as_json else str(found))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="a model saved by rz.save")],
    path: Annotated[Path, typer.Argument(help="where to: .onnx, .pt2 or .pte")],
    width: Annotated[list[int], typer.Option(help="numbers in a row, one per input of the model")],
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, and say how far its outputs are from the model's."""
    import torch

    from . import export, load

    with _bad_input():
        seeded = torch.Generator().manual_seed(0)
        # it prints what it wrote
        with redirect_stdout(io.StringIO() if as_json else sys.stdout):
            made = export(load(model), path, tuple(torch.randn(256, k, generator=seeded, device="cpu") for k in width))
        if as_json:
            typer.echo(_json(made))


@app.command()
def doctor(
    warm: Annotated[bool, typer.Option("--warm", help="compile the usual CPU kernels into their cache now")] = False,
    as_json: Json = False,
) -> None:
    """What this machine has, and which implementation each op will use."""
    import torch

    from rewardzip_kernels.loading import available

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"machine": platform.machine(), "gpus": gpus, "ops": available()}
    say = (lambda line: None) if as_json else typer.echo
    say(f"Python {found['python']}, torch {found['torch']}, {found['machine']}")
    say(f"GPUs: {', '.join(gpus) or 'none'}")
    for op, where in found["ops"].items():
        say(f"{op:22} " + ", ".join(f"{device}: {how}" for device, how in where.items()))
    if "numba" in found["ops"]["int8_linear"]["cpu"].split():
        from rewardzip_kernels.cpu.instruction_sets import choose

        found["cpu_kernels"] = choose(None).name
        say(f"CPU kernels use {found['cpu_kernels']}")
        if warm:
            from rewardzip_kernels.cpu.engine import cache_folder

            from .warm import warm as fill

            taken = fill()
            longest = max(taken, key=lambda name: taken[name])
            found |= {"warmed": taken, "cache": str(cache_folder())}
            say(
                f"{len(taken)} kinds of layer ran in {sum(taken.values()):.1f} s, the longest {longest} in "
                f"{taken[longest]:.2f} s; compiled code is in {cache_folder()}"
            )
    if as_json:
        typer.echo(json.dumps(found))


@app.command()
def tune(
    seconds: Annotated[float, typer.Option(help="stop after so many; what was measured is kept")] = 900,
    file: Annotated[Path | None, typer.Option(help="of the table; default: the cache that kernels look into")] = None,
) -> None:
    """Measure the GPU kernels' tiles on this machine and keep the fastest; without it a written rule chooses them."""
    import torch

    if not torch.cuda.is_available():
        typer.echo("rewardzip: there is no GPU here, and tiles are measured on GPUs only", err=True)
        raise typer.Exit(2)
    with _bad_input():
        from rewardzip_kernels.gpu.tiles import cache_file

        from .tune import cases, sweep

        for i, found in enumerate(sweep(torch.device("cuda"), file or cache_file(), seconds), 1):
            typer.echo(f"{i}/{len(cases())}  {found}")
        typer.echo(f"the tiles that beat the rule are in {file or cache_file()}")


@contextmanager
def _bad_input() -> Iterator[None]:
    """What the library says about its input, in a line and as exit code 2; 1 is the gate's alone."""
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        typer.echo(f"rewardzip: {error}", err=True)
        raise typer.Exit(2) from None
    except Exception:
        traceback.print_exc()
        raise typer.Exit(2) from None


def _json(found: Any) -> str:
    return json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in asdict(found).items()})


def _tell(report: Report, more: dict[str, Any], page: Path | None, as_json: bool, passed: bool | None = None) -> None:
    passed = report.passed if passed is None else passed
    if page is not None:
        report.save(page)
    if as_json:
        typer.echo(json.dumps({**report.to_dict(), **more, "passed": passed}))
    else:
        from rich.console import Console

        Console().print(report)
        for name, value in more.items():
            typer.echo(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
