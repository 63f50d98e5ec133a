"""Measure tiles on this machine: each candidate is checked against the op's reference, then timed, the fastest kept.

Nothing calls this but ``rewardzip tune`` and the benchmarks. What is kept and when it is used: ``gpu/tiles.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .capture import record
from .timing import Timing, interleaved

Tile = tuple[Any, ...]
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, Timing]]

# the rule's tile stays unless another takes at most this share of its time: noise writes no table
GAIN = 0.97

# the largest error beside an element and the elements' size: roundings are far below it, a wrong kernel is not
TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    """A call whose tile is looked up in ``bucket``; the rule's is the first of ``candidates``."""

    bucket: str
    candidates: list[Tile]
    call: Callable[[], Tensor]
    expected: Tensor
    unrecorded: tuple[Tile, ...] = ()
    """What a CUDA graph cannot hold: timed call by call."""


@dataclass(frozen=True)
class Measured:
    """What one case's candidates took, the rule's first, and why others have no time."""

    bucket: str
    times: dict[Tile, Timing]
    failed: dict[Tile, str]
    rule: Tile

    @property
    def chosen(self) -> Tile:
        best = min(self.times, key=lambda tile: self.times[tile].p50, default=self.rule)
        if self.rule in self.times and self.times[best].p50 > GAIN * self.times[self.rule].p50:
            return self.rule
        return best

    def __str__(self) -> str:
        def told(tile: Tile) -> str:
            took = f"{self.times[tile].p50 * 1e6:.1f} us" if tile in self.times else self.failed[tile]
            return f"{' '.join(str(int(size)) for size in tile)}: {took}"

        better = f"{told(self.chosen)}; " if self.chosen != self.rule else ""
        failed = f"; {len(self.failed)} candidates failed" if self.failed else ""
        return f"{self.bucket}  {better}the rule's {told(self.rule)}{failed}"


def linear(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> Case:
    """int8 weights times float rows, or times rows rounded to int8."""
    from rewardzip_kernels.gpu import int8_linear as op
    from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear
    from rewardzip_kernels.gpu.tiles import linear_bucket
    from rewardzip_kernels.int8_dynamic_linear import int8_dynamic_linear_reference
    from rewardzip_kernels.int8_linear import int8_linear_reference

    weight, scale, bias = _layer(n, k, device)
    x, size = torch.randn(m, k, device=device), dtype.itemsize
    run: Callable[..., Tensor] = op.int8_linear
    reference: Callable[..., Tensor] = int8_linear_reference
    if dtype == torch.int8:
        run, reference = int8_dynamic_linear, int8_dynamic_linear_reference
    else:
        x = x.to(dtype)
    arguments = x, weight, scale, bias, "relu"
    bucket = linear_bucket("int8_linear", m, n, k, size, 1)
    return Case(bucket, list(op.candidates(m, n, k, size)), partial(run, *arguments), reference(*arguments))


def sparse24(n: int, k: int, m: int, dtype: torch.dtype, device: torch.device) -> Case:
    """2:4 int8 weights times float rows, or times rows rounded to int8: up to how many rows packed, where torch's."""
    from rewardzip_kernels.gpu import semi_structured
    from rewardzip_kernels.gpu import sparse24_linear as op
    from rewardzip_kernels.gpu.tiles import linear_bucket
    from rewardzip_kernels.sparse24_layout import pack
    from rewardzip_kernels.sparse24_linear import sparse24_linear_reference

    weight, scale, bias = _layer(n, k, device)
    keep = torch.rand(n, k // 4, 4, device=device).argsort(2) < 2
    x, size = torch.randn(m, k, device=device), dtype.itemsize
    compute = torch.int8 if dtype == torch.int8 else None
    x = x if dtype == torch.int8 else x.to(dtype)
    arguments = x, *pack(weight * keep.view(n, k)), scale, k, bias, "relu", compute
    bucket = linear_bucket("sparse24_linear", m, n, k, size, 1)
    expected = sparse24_linear_reference(*arguments)
    found = op.candidates(m, n, k, size, 1)
    if op.TORCH in found and semi_structured.sums(*arguments[:4]) is None:
        found.remove(op.TORCH)  # torch refuses: the dense way would be timed again
    return Case(bucket, list(found), partial(op.sparse24_linear, *arguments), expected, (op.TORCH,))


def head(n: int, k: int, m: int, stored: torch.dtype, device: torch.device) -> Case:
    from rewardzip_kernels.gpu import reward_head as op
    from rewardzip_kernels.gpu.tiles import linear_bucket
    from rewardzip_kernels.reward_head import reward_head_reference

    weight, scale, bias = _layer(n, k, device)
    x, out = torch.randn(m, k, device=device).half(), torch.randn(1, n, device=device) / n**0.5
    known = (weight, scale) if stored == torch.int8 else ((weight * scale[:, None]).to(stored), None)
    arguments = x, *known, bias, out, None, "relu"
    bucket = linear_bucket("reward_head", m, n, k, 2, stored.itemsize)
    expected = reward_head_reference(*arguments)
    return Case(bucket, list(op.candidates(m, n, k, 2)), partial(op.reward_head, *arguments), expected)


def mlp(layers: str, m: int, device: torch.device) -> Case:
    from rewardzip_kernels.fused_mlp import fused_mlp_reference
    from rewardzip_kernels.gpu import fused_mlp as op
    from rewardzip_kernels.mlp_layout import Linear, layout, pack

    net = layout(layers, True)
    tensors = [_layer(layer.width, sum(layer.pieces), device) for layer in net.layers]
    network = [Linear(weight, bias, scale) for weight, scale, bias in tensors[:-1]]
    weight, scale, bias = tensors[-1]
    weights, params = pack([[*network, Linear(weight * scale[:, None], bias)]], layers)
    inputs = [torch.randn(m, width, device=device) for width in net.layers[0].pieces]
    case = net, op.row_class(m), False, torch.float16
    call = partial(op.fused_mlp, inputs, weights, params, layers)
    expected = fused_mlp_reference(inputs, weights, params, layers, None, "none", torch.float16)
    found = op.candidates(*case, op.major(inputs[0].get_device()))
    return Case(op.bucket(*case), list(found), call, expected)


def _layer(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random int8 weights, scales that keep values near 1, biases."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return weight, (0.5 + torch.rand(n, device=device)) / (73 * k**0.5), torch.randn(n, device=device)


# outputs, inputs: layers of reward networks, and of 7B language models with a reward head
SHAPES = ((256, 256), (4096, 4096), (64, 64), (512, 1024))
TYPES = (torch.float32, torch.bfloat16, torch.int8)
ROWS = (16, 4096, 1, 256, 65536, 4, 64, 1024, 16384, 32)
NETWORKS = (
    "17+6: 64 relu, 64 relu, 1",
    "17+6: 256 relu, 256 relu, 1",
    "17+6: 32 relu, 32 relu, 1",
    "36+12: 256 elu, 128 elu, 1",
    "376+17: 256 relu, 256 relu, 1",
)
# what swap may pack so: from 2^20 weights on
PRUNED = ((4096, 4096), (1024, 1024))
NETWORK_ROWS = (1 << 20, 4096, 32768)


def cases() -> list[Callable[[torch.device], Case]]:
    """What is measured, the ops in turn and the commoner shapes first, so that a run cut short has some of each."""
    networks = [partial(mlp, layers, m) for m in NETWORK_ROWS for layers in NETWORKS]
    linears = [partial(linear, n, k, m, dtype) for m in ROWS for n, k in SHAPES for dtype in TYPES]
    heads = [partial(head, 4096, 4096, m, stored) for m in ROWS[:-1] for stored in (torch.int8, torch.float16)]
    pruned = [partial(sparse24, n, k, m, dtype) for m in ROWS for n, k in PRUNED for dtype in TYPES[1:]]
    return [case for four in zip_longest(networks, linears, heads, pruned) for case in four if case is not None]


def measure(case: Case, device: torch.device, timer: Timer) -> Measured:
    """Check every candidate with memory full of NaN, then time those that were right, in turn."""
    from rewardzip_kernels.gpu.tiles import planted

    def under(tile: Tile) -> Tensor:
        with planted({case.bucket: tile}):
            return case.call()

    calls: dict[str, Callable[[], object]] = {}
    named: dict[str, Tile] = {}
    failed: dict[Tile, str] = {}
    for tile in case.candidates:
        try:
            with planted({case.bucket: tile}):
                _check(case)
                recorded = device.type == "cuda" and tile not in case.unrecorded
                run = record(lambda *_: case.call(), [case.expected])[0] if recorded else None
        except Exception as error:  # a tile that this device cannot run is noted, not fatal
            failed[tile] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        named[str(tile)] = tile
        calls[str(tile)] = run or partial(under, tile)
    times = timer(calls, device) if calls else {}
    return Measured(case.bucket, {named[name]: t for name, t in times.items()}, failed, case.candidates[0])


def _check(case: Case) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
    try:
        y = case.call().float()
    finally:
        torch.use_deterministic_algorithms(before)
    expected = case.expected.float()
    error = (y - expected).abs() / (expected.abs() + expected.square().mean().sqrt())
    if not bool((error <= TOLERANCE).all()):
        raise ArithmeticError(f"wrong result, an error of {float(error.nan_to_num(nan=torch.inf).max()):.2g}")


def _timed(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Timing]:
    return interleaved(calls, device, 0.1)


def sweep(
    device: torch.device,
    file: Path,
    seconds: float,
    chosen: list[Callable[[torch.device], Case]] | None = None,
    timer: Timer = _timed,
) -> Iterator[Measured]:
    """Measure ``chosen`` cases, all by default, until the time is up; the file is whole after each of them."""
    from rewardzip_kernels.gpu import tiles

    index = torch.cuda.current_device() if device.type == "cuda" else -1
    end = time.monotonic() + seconds
    table = tiles.load(file, index)
    for make in cases() if chosen is None else chosen:
        if time.monotonic() > end:
            return
        found = measure(make(device), device, timer)
        table.pop(found.bucket, None)
        if found.chosen != found.rule:
            table[found.bucket] = found.chosen
        tiles.save(file, index, table)
        yield found
