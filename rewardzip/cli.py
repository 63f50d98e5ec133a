"""The command line: each command is one call of the library."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Smaller, faster reward models, and what it cost.", no_args_is_help=True, add_completion=False)


@app.command()
def demo(page: Annotated[Path, typer.Option(help="where the page of plots goes")] = Path("out/demo.html")) -> None:
    """Learn Pendulum's reward and dynamics, compress the reward, plan with both: returns, times, a page of plots."""
    from .demo import main

    main(page)


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
