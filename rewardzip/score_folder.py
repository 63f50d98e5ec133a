"""The folder scores are written into: what was asked for is written down, and nothing else is mixed with it."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .score_plan import Plan

MANIFEST = "_rewardzip.json"
WORK = "_ray"
TEMPORARY = re.compile(r"\.(part|manifest)-.*\.tmp")


@contextmanager
def open_folder(output: Path, plan: Plan, settings: dict[str, Any]) -> Iterator[None]:
    """The output folder for this run alone: new, or with an unfinished run of this very plan, leftovers removed."""
    manifest = {
        "format": "rewardzip scores",
        "version": 1,
        **settings,
        "columns": [[name for name, _ in group] for group in plan.columns],
        "keep": list(plan.keep),
        "parts": len(plan.parts),
        "inputs": plan.footers,
    }
    if output.exists() and not output.is_dir():
        raise ValueError(f"score: {output} is a file; scores are written into a folder")
    _check_folder(output, plan, manifest)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        # once more: another run may have written here in the meantime
        names = _check_folder(output, plan, manifest)
        for name in names:
            if TEMPORARY.fullmatch(name):
                (output / name).unlink()
        if MANIFEST not in names:
            write_whole(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        yield


def _check_folder(output: Path, plan: Plan, manifest: dict[str, Any]) -> list[str]:
    """The names in the folder, which belong to this very plan or to nothing of ours."""
    names = sorted(p.name for p in output.iterdir()) if output.exists() else []
    ours: set[str] = set()
    if MANIFEST in names:
        _compare(output, manifest)
        ours = {MANIFEST, WORK, *(part.name for part in plan.parts)}
    others = [name for name in names if name not in ours and not TEMPORARY.fullmatch(name)]
    if others:
        raise ValueError(f"score: {output} holds other files ({', '.join(others[:3])}); give another folder")
    return names


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the system lets go of it however this process ends."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"score: another run is writing into {folder}") from None
        yield
    finally:
        os.close(handle)


def write_whole(target: Path, text: str) -> None:
    draft = target.parent / f".manifest-{secrets.token_hex(4)}.tmp"
    try:
        with open(draft, "x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _compare(output: Path, manifest: dict[str, Any]) -> None:
    """That the folder's own manifest asks for the same scores."""
    try:
        found = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"score: {output / MANIFEST} cannot be read: {error}") from error
    for field in dict.fromkeys((*manifest, *found)):
        here, there = manifest.get(field), found.get(field) if isinstance(found, dict) else None
        if here != there:
            what = "" if isinstance(here, dict) else f" ({there!r}, now {here!r})"
            raise ValueError(
                f"score: {output} holds the scores of another run: its {field} differ{what}; give another folder"
            )
