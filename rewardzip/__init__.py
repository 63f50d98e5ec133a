"""Smaller, faster reward models, and what it cost."""

from importlib.metadata import PackageNotFoundError, version

from .capture import capture as capture
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import load as load
from .checkpoint import save as save
from .data import Data as Data
from .ensemble import fuse_ensemble as fuse_ensemble
from .explain import explain as explain
from .export import export as export
from .fit import fit as fit
from .int8 import Int8 as Int8
from .models import RewardMLP as RewardMLP
from .score import score as score
from .swap import refresh as refresh
from .swap import restore as restore
from .swap import swap as swap

try:
    __version__ = version("rewardzip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0"
