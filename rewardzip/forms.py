"""Which form a layer is packed into: the route table.

A form *fits* a pattern where it holds every weight that is not zero, and *wins* where it was measured to be faster than
dense int8 on such a device. The first entry that does both is taken, otherwise dense int8. What is measured is in
``benchmarks/results``; where nothing was, nothing is promised, and the layer stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rewardzip_kernels.blocks import default_block

from .chain import WEIGHTS_OF_ONE_CALL
from .nn.base import CompressedLinear, check_source
from .nn.block_sparse_linear import BlockSparseLinear
from .nn.sparse24_linear import Sparse24Linear
from .nn.sparse_linear import reaches
from .nn.sparse_rows_linear import SparseRowsLinear
from .nn.zeros import Zeros
from .patterns import SOME, Pattern, find_pattern

Rows = Literal["float", "dynamic"]

# what the route is measured with
BLOCK = default_block("cpu")


@dataclass(frozen=True)
class Form:
    """fits(pattern); wins(pattern, device, rows): why, or None; make(linear, rows)."""

    name: str
    fits: Callable[[Pattern], bool]
    wins: Callable[[Pattern, str, Rows], str | None]
    make: Callable[[nn.Linear, Rows], CompressedLinear]


def _blocks_win(pattern: Pattern, device: str, rows: Rows) -> str | None:
    """``benchmarks/results/amd-epyc-zen5/sparse-*-1-threads.json``; no GPU was measured."""
    if device != "cpu":
        return None
    empty = 1 - pattern.filled[BLOCK]
    weights = pattern.shape[0] * pattern.shape[1]
    # smaller layers may be part of one call for a whole MLP, and are where rows are few: ``chain.Pruned``
    least = ALONE[rows] if weights >= WEIGHTS_OF_ONE_CALL["blocks"] else IN_CALL
    if not reaches(empty, least) or weights < SMALLEST:
        return None
    return f"{100 * empty:.0f} % of its {BLOCK[0]}x{BLOCK[1]} blocks are zero, from {100 * least:.0f} % on it is faster"


def block_of(linear: nn.Linear, device: str | None = None) -> tuple[int, int]:
    """The block a pruned layer is packed in: the device's own where its zeros lie so, otherwise the smallest."""
    weight, _ = check_source("swap", linear)
    own = default_block(device or weight.device)
    return own if own == BLOCK or find_pattern(weight).block == own else BLOCK


def _scattered(pattern: Pattern) -> bool:
    """Whether the weights take less room one by one than in blocks: a few of them then fill each block."""
    stored = pattern.filled.get(BLOCK, 1.0) * (BLOCK[0] * BLOCK[1] + 4)
    return (1 - pattern.sparsity) * BLOCK[0] * BLOCK[1] * 3 < stored


# the share of zero blocks from which blocks are faster than dense int8; than a whole MLP in one call, where rows are
# many, and from what size on
ALONE: dict[Rows, float] = {"dynamic": 0.5, "float": 0.75}
IN_CALL, SMALLEST = 0.75, 256 * 256

FORMS = (
    Form(
        "rows",
        _scattered,
        lambda pattern, device, rows: SparseRowsLinear.wins(pattern.shape, pattern.sparsity, device, rows),
        lambda linear, rows: SparseRowsLinear.from_linear(linear, "int8"),
    ),
    Form(
        "blocks",
        lambda pattern: BLOCK in pattern.filled,
        _blocks_win,
        lambda linear, rows: BlockSparseLinear.from_linear(linear, block_of(linear), "int8", rows),
    ),
    Form(
        "2:4",
        lambda pattern: pattern.most.get(4, 4) <= 2,
        lambda pattern, device, rows: Sparse24Linear.wins(pattern.shape, pattern.sparsity, device, rows),
        lambda linear, rows: Sparse24Linear.from_linear(linear, "int8", rows),
    ),
)


def choose(pattern: Pattern, device: str, rows: Rows) -> tuple[Form | None, str]:
    """(the form, why); None is dense int8."""
    for form in FORMS:
        if form.fits(pattern) and (why := form.wins(pattern, device, rows)):
            return form, why
    return None, f"{pattern}: no sparse form was measured to be faster on this {device}"


def find_form(linear: nn.Linear, rows: Rows, lacking: str = "") -> tuple[Form | None, Zeros]:
    """(the form that is fastest for the layer's zeros, None for dense int8; what was found).

    lacking: what is asked for that no sparse form has.
    """
    weight, _ = check_source("swap", linear)
    pattern = find_pattern(weight)
    form, why = (None, f"{pattern}: no sparse form has {lacking}")
    if not lacking:
        form, why = choose(pattern, weight.device.type, rows)
    return form, Zeros(pattern.sparsity, str(pattern), why if pattern.sparsity >= SOME else "")
