"""Tiles measured on a device, where somebody measured some; elsewhere each op's written rule stands.

A file of them is JSON, a list of tables, one a device and set of versions:

    [{"device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.7.1", "rewardzip": "0.1.0",
      "tiles": {"int8_linear 16x4096x4096 4": [16, 64, 64, 4, 4, 4], ...}}, ...]

Two files are looked into, once a process, when the first launch is planned: the one this package ships, whose device
and Triton must be this one's, and over it the user's, which ``rewardzip tune`` writes, where all four must agree. What
cannot be read, or names a tile that the op would not try, counts as not there: the rule is right, only perhaps slower.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

SHIPPED = Path(__file__).with_name("measured_tiles.json")

# rows that share a bucket: up to the first, up to the second, ...; more than the last are with it
ROWS = (1, 4, 16, 32, 64, 256, 1024, 4096, 16384, 65536)

Tile = TypeVar("Tile", bound=NamedTuple)
Tiles = dict[str, tuple[Any, ...]]

_plans: list[Any] = []
_planted: Tiles | None = None


def cache_file() -> Path:
    """The user's own tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "rewardzip" / "tiles.json"


def identity(device: int) -> dict[str, str]:
    """What a table was measured with; the device's number is -1 off GPUs."""
    try:
        own = version("rewardzip")
    except PackageNotFoundError:  # a checkout on the path, not installed
        own = "0"
    name = torch.cuda.get_device_name(device) if device >= 0 else "interpreter"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "rewardzip": own}


def read(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    tables = found if isinstance(found, list) else []
    return [table for table in tables if isinstance(table, dict) and isinstance(table.get("tiles"), dict)]


def save(file: Path, device: int, tiles: Tiles) -> None:
    """Put the device's table into the file, whole or not at all; other devices' and versions' tables stay."""
    mine = identity(device)
    others = [table for table in read(file) if not _agrees(table, mine, tuple(mine))]
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps([*others, {**mine, "tiles": tiles}], indent=1) + "\n", encoding="utf-8")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    forget()


def _agrees(table: dict[str, Any], mine: dict[str, str], names: tuple[str, ...]) -> bool:
    return all(table.get(name) == mine[name] for name in names)


def load(file: Path, device: int, names: tuple[str, ...] = ("device", "torch", "triton", "rewardzip")) -> Tiles:
    """The tiles of the file's tables that agree with the device in what is named."""
    mine = identity(device)
    tables = [table["tiles"] for table in read(file) if _agrees(table, mine, names)]
    return {bucket: tuple(tile) for table in tables for bucket, tile in table.items() if isinstance(tile, list)}


@lru_cache
def _table(device: int) -> Tiles:
    if _planted is not None:
        return _planted
    return load(SHIPPED, device, ("device", "triton")) | load(cache_file(), device)


def choose(bucket: str, device: int, rule: Tile, candidates: Callable[[], list[Tile]]) -> Tile:
    """The bucket's measured tile if it is among ``candidates()``, the rule's otherwise."""
    found = _table(device).get(bucket)
    return rule if found is None else next((tile for tile in candidates() if tile == found), rule)


def planned(function: Callable[..., Any]) -> Any:
    """Remember what a function that chooses tiles returned, until the tables are others."""
    _plans.append(lru_cache(maxsize=4096)(function))
    return _plans[-1]


def forget() -> None:
    """Read the files again at the next launch."""
    for cached in (_table, *_plans):
        cached.cache_clear()


@contextmanager
def planted(tiles: Tiles) -> Iterator[None]:
    """These tiles and no file's, on every device: for what measures tiles, and for tests."""
    global _planted
    before, _planted = _planted, tiles
    forget()
    try:
        yield
    finally:
        _planted = before
        forget()


def up(size: int) -> int:
    """The power of two that a size shares its bucket with."""
    return 1 << (size - 1).bit_length()


def linear_bucket(op: str, m: int, n: int, k: int, *element_bytes: int) -> str:
    """Rows in classes, outputs and inputs up to powers of two; inputs that load in wide words apart."""
    rows = next((most for most in ROWS if m <= most), ROWS[-1])
    return f"{op} {rows}x{up(n)}x{up(k)} {' '.join(map(str, element_bytes))}{' odd' if k % 16 else ''}"
