"""Smaller, faster reward models, and what it cost."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .capture import capture as capture
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import load as load
from .checkpoint import save as save
from .data import Data as Data
from .ensemble import fuse_ensemble as fuse_ensemble
from .explain import explain as explain
from .fit import fit as fit
from .int8 import Fused as Fused
from .int8 import Int8 as Int8
from .models import MLP as MLP
from .models import RewardMLP as RewardMLP
from .swap import refresh as refresh
from .swap import restore as restore
from .swap import swap as swap

if TYPE_CHECKING:
    from .distil import Distil as Distil
    from .evaluate import evaluate as evaluate
    from .export import export as export
    from .finetune import FineTune as FineTune
    from .gate import Gate as Gate
    from .low_rank import LowRank as LowRank
    from .prune import Prune as Prune
    from .prune import prune as prune
    from .quantize import Quantize as Quantize
    from .recipe import compress as compress
    from .recipe import run_steps as run_steps
    from .score import score as score
    from .search import search as search
    from .share import Share as Share

try:
    __version__ = version("rewardzip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0"

# what a program that only runs models does without, by the file it is in: loaded when first asked for
_LATER = {
    "Distil": "distil",
    "FineTune": "finetune",
    "Gate": "gate",
    "LowRank": "low_rank",
    "Prune": "prune",
    "Quantize": "quantize",
    "Share": "share",
    "compress": "recipe",
    "evaluate": "evaluate",
    "export": "export",
    "prune": "prune",
    "run_steps": "recipe",
    "score": "score",
    "search": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


class _Package(ModuleType):
    """Loading ``rewardzip.score`` would make a module of the function ``rewardzip.score``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LATER and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, as any module: cloudpickle knows only the plain type, and Ray sends functions that name us."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
