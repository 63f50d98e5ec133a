"""Scoring on a Ray cluster: each row of the Ray dataset is one part of the plan, scored whole by an actor.

Rows of transitions never enter Ray's object store: an actor reads its part from the shared file system and writes it
there, as the local engine does and to the same bytes. Ray's checkpoint holds the parts done, not the rows, so it stays
small: 10^11 rows are 10^5 parts.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .score_folder import WORK, write_whole
from .score_parts import finished, leftover, score_parts
from .score_plan import Part, Plan
from .score_rows import Found, Scorer

Advance = Callable[[int], None]

# Ray's own cost per block is tens of milliseconds: beyond this many parts, some share a block
MAX_BLOCKS = 10_000


def need_ray() -> Any:
    """ray with ray.data, or an error that names the extra."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine='ray' is Ray Data: pip install rewardzip[ray]") from error
    return ray


# what a part can be wrong by, from the narrow to the wide
KINDS = (OSError, TypeError, ValueError)


def note_error(error: Exception, folder: Path) -> None:
    """Write down what went wrong in an actor, for all to see.

    Not raised there: Ray would cancel the tasks that run, and when one of them ends at that moment Ray 2.60 aborts the
    program that asked (ray-project/ray, pull request 54738).
    """
    kind = next(kind.__name__ for kind in KINDS if isinstance(error, kind))
    arguments = [error.errno, error.strerror] if isinstance(error, OSError) and error.errno else [str(error)]
    folder.joinpath(WORK).mkdir(exist_ok=True)
    write_whole(folder / WORK / "error.json", json.dumps([kind, arguments]))


def noted_error(folder: Path) -> Exception | None:
    try:
        kind, arguments = json.loads((folder / WORK / "error.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {k.__name__: k for k in KINDS}[kind](*arguments)


class Actor:
    """A process of the cluster that holds the model and scores parts by their numbers."""

    def __init__(self, model: nn.Module, plan: Plan, folder: Path, batch_size: int, strict: bool, device: str) -> None:
        self.scorer, self.folder = Scorer(model.to(device), plan, batch_size, strict), folder

    def __call__(self, numbers: dict[str, Any]) -> dict[str, Any]:
        if noted_error(self.folder):
            return {"id": numbers["id"][:0]}
        parts = [self.scorer.plan.parts[int(number)] for number in numbers["id"]]
        # a killed run may have finished a part that Ray has not heard of
        todo = [part for part in parts if finished(self.folder, part) is None]
        try:
            for _ in score_parts(self.scorer, todo, self.folder):
                pass
        except KINDS as error:
            note_error(error, self.folder)
            return {"id": numbers["id"][:0]}
        return {"id": numbers["id"]}


def cluster_device() -> str:
    """What the actors compute on; connects to the cluster, or starts one on this machine."""
    ray = need_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def score_on_ray(scorer: Scorer, model: nn.Module, device: str, folder: Path, advance: Advance) -> Found:
    """Have the cluster write the parts that are missing, an actor for each GPU, or for each CPU if there are none."""
    plan = scorer.plan
    missing, told, _ = leftover(plan, folder)
    # a second time without Ray's checkpoint, should parts be gone that it knows as done
    for _ in range(2):
        if missing:
            with _watching(folder, missing, advance):
                _run(scorer, model, device, folder)
        shutil.rmtree(folder / WORK, ignore_errors=True)
        missing, told, _ = leftover(plan, folder)
    if missing:
        raise RuntimeError(f"score: Ray is done, but {missing[0].name} and {len(missing) - 1} others are not there")
    return told


def _run(scorer: Scorer, model: nn.Module, device: str, folder: Path) -> None:
    ray = need_ray()
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    settings = {
        "checkpoint_config": CheckpointConfig("id", str(folder / WORK / "checkpoint")),
        "enable_progress_bars": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in settings}
    for name, value in settings.items():
        setattr(context, name, value)
    (folder / WORK / "error.json").unlink(missing_ok=True)
    parts = scorer.plan.parts
    arguments = (model, scorer.plan, folder, scorer.batch_size, scorer.strict, device)
    try:
        numbers = ray.data.range(len(parts), override_num_blocks=min(len(parts), MAX_BLOCKS))
        done = numbers.map_batches(
            Actor,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=None),
            **({"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}),
        )
        done.write_parquet(str(folder / WORK / "done"))
    except ray.exceptions.RayTaskError as error:
        # a disk so full that not even the error could be written there
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    finally:
        for name, value in before.items():
            setattr(context, name, value)
    if wrong := noted_error(folder):
        raise wrong


@contextmanager
def _watching(folder: Path, missing: list[Part], advance: Advance) -> Iterator[None]:
    """Tell of parts as they appear, from a thread."""
    waited = {part.name: part.rows for part in missing}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            for entry in os.scandir(folder):
                advance(waited.pop(entry.name, 0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
