"""Smaller, faster reward models, and what it cost."""

from importlib.metadata import PackageNotFoundError, version

from .capture import capture as capture
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import load as load
from .checkpoint import save as save
from .data import Data as Data
from .distil import Distil as Distil
from .ensemble import fuse_ensemble as fuse_ensemble
from .evaluate import evaluate as evaluate
from .explain import explain as explain
from .export import export as export
from .finetune import FineTune as FineTune
from .fit import fit as fit
from .gate import Gate as Gate
from .int8 import Int8 as Int8
from .low_rank import LowRank as LowRank
from .models import MLP as MLP
from .models import RewardMLP as RewardMLP
from .prune import Prune as Prune
from .prune import prune as prune
from .quantize import Quantize as Quantize
from .recipe import compress as compress
from .recipe import run_steps as run_steps
from .score import score as score
from .search import search as search
from .share import Share as Share
from .swap import refresh as refresh
from .swap import restore as restore
from .swap import swap as swap

try:
    __version__ = version("rewardzip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0"
