"""The stored form of a matrix in blocks of which only some are kept: one format, whatever the shape of its blocks.

weight [N, K]       cut into blocks of bn outputs x bk inputs, the last ones filled up with zeros
values [S, bn, bk]  the stored blocks, block row by block row, from left to right
columns [S]         int32: the block column of each
starts [rows + 1]   int32: block row r is values[starts[r] : starts[r + 1]]

    [ A ] [   ] [ B ]        values  A B C
    [   ] [   ] [   ]        columns 0 2 1
    [   ] [ C ] [   ]        starts  0 2 2 3
"""

from typing import NamedTuple

import torch
from torch import Tensor

# the largest side of a block: beyond it a block is a layer
MAX_SIDE = 4096


class Blocks(NamedTuple):
    values: Tensor
    columns: Tensor
    starts: Tensor


def default_block(device: torch.device | str) -> tuple[int, int]:
    """What is multiplied fastest: a tile of a GPU's tensor cores, or a dword of inputs by a vector of outputs."""
    return (64, 64) if torch.device(device).type == "cuda" else (16, 4)


def grid(n: int, k: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many block rows and block columns a [n, k] weight has."""
    return -(-n // block[0]), -(-k // block[1])


def cut(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] -> [block rows, block columns, bn, bk], zeros beyond N and K."""
    (n, k), (bn, bk) = weight.shape, block
    padded = torch.nn.functional.pad(weight, (0, -k % bk, 0, -n % bn))
    rows, columns = grid(n, k, block)
    return padded.view(rows, bn, columns, bk).transpose(1, 2)


def occupied(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[block rows, block columns] of bool: which blocks hold anything but zeros."""
    return cut(weight != 0, block).flatten(2).any(2)


def to_blocks(weight: Tensor, kept: Tensor, block: tuple[int, int]) -> Blocks:
    """The stored form of ``weight``, of the blocks where ``kept`` is true."""
    counts = torch.nn.functional.pad(kept.sum(1), (1, 0))
    columns = kept.nonzero()[:, 1].to(torch.int32)
    return Blocks(cut(weight, block)[kept].contiguous(), columns, counts.cumsum(0).to(torch.int32))


def row_of_each(blocks: Blocks) -> Tensor:
    """[S]: the block row that each stored block is in."""
    rows = torch.arange(len(blocks.starts) - 1, device=blocks.starts.device)
    return rows.repeat_interleave(blocks.starts.diff(), output_size=len(blocks.columns))


def to_dense(blocks: Blocks, n: int, k: int) -> Tensor:
    """The [n, k] weight again."""
    bn, bk = blocks.values.shape[1:]
    rows, columns = grid(n, k, (bn, bk))
    dense = blocks.values.new_zeros(rows, columns, bn, bk)
    dense[row_of_each(blocks), blocks.columns.long()] = blocks.values
    return dense.transpose(1, 2).reshape(rows * bn, columns * bk)[:n, :k]


def check_pattern(columns: Tensor, starts: Tensor, n: int, k: int, block: tuple[int, int]) -> None:
    """That ``columns`` and ``starts`` stay inside the weight; a kernel trusts them, so nothing else may reach one."""
    rows, count = grid(n, k, block)
    stored = len(columns)
    if starts.shape != (rows + 1,):
        raise ValueError(
            f"starts has shape {tuple(starts.shape)}, but {n} outputs in blocks of {block[0]} take {rows + 1}"
        )
    ends = int(starts[0]), int(starts[-1])
    if ends != (0, stored) or bool((starts.diff() < 0).any()):
        raise ValueError(f"starts must rise from 0 to the {stored} stored blocks; it goes from {ends[0]} to {ends[1]}")
    if not stored:
        return
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"columns goes from {low} to {high}, but {k} inputs in blocks of {block[1]} are {count} columns"
        )
    inside = torch.ones(stored + 1, dtype=torch.bool, device=columns.device)
    inside[starts.long()] = False
    falls = (columns.diff() <= 0) & inside[1:stored]
    if bool(falls.any()):
        raise ValueError(f"columns must rise within a block row; entry {int(falls.nonzero()[0]) + 1} does not")
