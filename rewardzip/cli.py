"""The command line: each command is one call of the library."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Smaller, faster reward models, and what it cost.", no_args_is_help=True, add_completion=False)


@app.command()
def demo() -> None:
    """Learn Pendulum's reward, swap its layers, print fidelity and timing beside fp32 and AMP."""
    from .demo import main

    main()


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="a model saved by rz.save")]) -> None:
    """What each layer of a saved model is, and bytes before and after."""
    from . import CheckpointError, explain, load

    try:
        typer.echo(str(explain(load(folder))))
    except CheckpointError as error:
        typer.echo(f"rewardzip: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="a model saved by rz.save")],
    inputs: Annotated[list[str], typer.Argument(help="parquet files, globs or folders")],
    output: Annotated[Path, typer.Argument(help="a folder for the scores; run again to go on")],
    columns: Annotated[list[str], typer.Option(help="one per input of the model: state, or s0,s1,s2, or 's*'")],
    keep: Annotated[list[str], typer.Option(help="a column to copy to the output")] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="local or ray")] = "local",
    strict: Annotated[bool, typer.Option(help="stop at the first row with null, NaN or inf")] = False,
) -> None:
    """Score parquet files into a folder of parquet files; a killed run goes on where it was."""
    from . import score

    with _told():
        typer.echo(str(score(model, inputs, output, columns=columns, keep=keep, engine=engine, strict=strict)))  # type: ignore[arg-type]


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="a model saved by rz.save")],
    path: Annotated[Path, typer.Argument(help="where to: .onnx, .pt2 or .pte")],
    width: Annotated[list[int], typer.Option(help="numbers in a row, one per input of the model")],
) -> None:
    """Write a model for another runtime, and say how far its outputs are from the model's."""
    import torch

    from . import export, load

    with _told():
        seeded = torch.Generator().manual_seed(0)
        export(load(model), path, tuple(torch.randn(256, k, generator=seeded) for k in width))


@contextmanager
def _told() -> Iterator[None]:
    """What a user can put right, in one line."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"rewardzip: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def doctor() -> None:
    """What this machine has, and which implementation each op will use."""
    import torch

    from rewardzip_kernels.loading import available

    typer.echo(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"GPUs: {', '.join(gpus) or 'none'}")
    for op, where in available().items():
        typer.echo(f"{op:22} " + ", ".join(f"{device}: {how}" for device, how in where.items()))
    if "numba" in available()["int8_linear"]["cpu"].split():
        from rewardzip_kernels.cpu.instruction_sets import choose

        typer.echo(f"CPU kernels use {choose(None).name}")


if __name__ == "__main__":
    app()
