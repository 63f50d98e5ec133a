"""A training run on disk: all that its next step depends on, in one file that is whole or absent."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

NAME = "fit.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replace the state in the folder, in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    # in memory first: of a full disk torch's own writer says nothing that can be read
    made = io.BytesIO()
    torch.save(state, made)
    handle, draft = tempfile.mkstemp(prefix=f".{NAME}-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(made.getbuffer())
        os.replace(draft, folder / NAME)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def read(folder: Path, settings: dict[str, Any], what: str = "fit") -> dict[str, Any] | None:
    """The state of a run with these settings; None where there is none yet."""
    if not (folder / NAME).exists():
        return None
    try:
        state = torch.load(folder / NAME, map_location="cpu", weights_only=True)
        theirs = state["settings"]
    except Exception as error:
        raise ValueError(f"{what}: {folder / NAME} cannot be read as a training run: {error}") from error
    changed = [key for key in settings if theirs.get(key) != settings[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{what}: the run in {folder} has {key}={theirs.get(key)!r}, this one {settings[key]!r}; "
            "give another folder"
        )
    return state  # type: ignore[no-any-return]


def generator_states(device: torch.device) -> torch.Tensor:
    """What dropout draws from, on the CPU and on the device, as one row of bytes."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def set_generator_states(device: torch.device, states: torch.Tensor) -> None:
    own = len(torch.get_rng_state())
    torch.set_rng_state(states[:own])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[own:], device)
