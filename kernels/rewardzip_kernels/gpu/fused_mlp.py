"""fused_mlp on a GPU: one program takes BLOCK_M rows through every layer; activations never leave its registers.

    x_i [BLOCK_M, K_i]   one dot per input into the same sums: the concatenation costs nothing
    h                    a tuple of [BLOCK_M, SLICE] tiles in 16 bits, each the first operand of the next layer's dots
    y                    a tuple of [BLOCK_M, up to 32] fp32 sums, added to as each slice of the last hidden layer ends

A layer is computed a slice of outputs at a time, so that 256 wide fits the registers: h (64 a thread), the next h, and
one slice of sums. The last hidden layer keeps no h, and walks over its slices in a run-time loop. A wide LayerNorm
needs all sums of a row before any of them can end: its layer is computed twice, moments first. Where the weights of
one network fit on chip they are loaded before the loop over the rows (RESIDENT), elsewhere a tile at a time.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import dense_rows
from ..fused_mlp import _check, compute_type, fused_mlp_reference, new_output
from ..mlp_layout import Layout, layout
from ..written import function
from . import tiles
from .int8_linear import TL_DTYPE
from .launch import aligned, launch, settled
from .mlp_gradient import gradient
from .mlp_layers import network, zeros
from .mlp_tiles import block, depth, get, load_all, member_size


@triton.jit
def _store(y_ptr, ys, m, o0, M, NET: tl.constexpr):
    WIDTH: tl.constexpr = get(NET, depth(NET) - 1, "width")
    for j in tl.static_range(len(ys)):
        o = o0 + j * ys[0].shape[1] + tl.arange(0, ys[0].shape[1])
        inside = (m < M)[:, None] & (o < WIDTH)[None, :]
        tl.store(y_ptr + m[:, None] * WIDTH + o[None, :], ys[j].to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_member(total, mean, squares, ys, e):
    # the sum gives the mean as torch does; the running mean serves the squares alone
    totals, means, more = (), (), ()
    for j in tl.static_range(len(ys)):
        step = ys[j] - mean[j]
        moved = mean[j] + step / (e + 1.0)
        totals = totals + (total[j] + ys[j],)
        means = means + (moved,)
        more = more + (squares[j] + step * (ys[j] - moved),)
    return totals, means, more


@triton.jit
def _rows(
    tile, y_ptr, xs, strides, scales_ptr, weights, params, resident, M,
    NET: tl.constexpr, MEMBERS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
    OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    # rows past the end repeat the last one and are not stored
    rows = tl.minimum(m, M - 1)
    o0 = tl.program_id(2) * OUT
    if MEMBERS == 0:
        ys = network(xs, strides, scales_ptr, rows, o0, weights, params, resident, NET, COMPUTE, SLICE, OUT, EXACT)
        _store(y_ptr, ys, m, o0, M, NET)
    else:
        total, mean, squares = zeros(BLOCK_M, OUT), zeros(BLOCK_M, OUT), zeros(BLOCK_M, OUT)
        for e in tl.range(MEMBERS):
            ys = network(xs, strides, scales_ptr, rows, o0, weights, params, (), NET, COMPUTE, SLICE, OUT, EXACT)
            total, mean, squares = _add_member(total, mean, squares, ys, e)
            weights += member_size(NET, "weights")
            params += member_size(NET, "params")
        averages, deviations = _statistics(total, squares, MEMBERS)
        _store(y_ptr, averages, m, o0, M, NET)
        _store(y_ptr + M.to(tl.int64) * get(NET, depth(NET) - 1, "width"), deviations, m, o0, M, NET)


@triton.jit
def _statistics(total, squares, MEMBERS: tl.constexpr):
    averages, deviations = (), ()
    for j in tl.static_range(len(total)):
        averages = averages + (total[j] / MEMBERS,)
        if MEMBERS == 1:
            deviations = deviations + (squares[j] + float("nan"),)
        else:
            deviations = deviations + (tl.sqrt_rn(squares[j] / (MEMBERS - 1)),)
    return averages, deviations


@triton.jit(do_not_specialize=["M"])
def _fused_mlp_kernel(
    y_ptr, xs, strides, scales_ptr, weights_ptr, params_ptr, M,
    NET: tl.constexpr, MEMBERS: tl.constexpr, COMPUTE: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, SLICE: tl.constexpr, OUT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # MEMBERS 0: programs (row tile, member, block of outputs); otherwise a program goes through all members
    member = tl.program_id(1).to(tl.int64)
    y_ptr += member * M * get(NET, depth(NET) - 1, "width")
    weights = weights_ptr + member * member_size(NET, "weights")
    params = params_ptr + member * member_size(NET, "params")
    if RESIDENT:
        resident = load_all(weights, NET, COMPUTE, SLICE)
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
            _rows(
                tile, y_ptr, xs, strides, scales_ptr, weights, params, resident, M,
                NET, MEMBERS, COMPUTE, BLOCK_M, SLICE, OUT, EXACT,
            )  # fmt: skip
    else:
        # no loop: what it keeps alive from one tile to the next would spill
        _rows(
            tl.program_id(0), y_ptr, xs, strides, scales_ptr, weights, params, (), M,
            NET, MEMBERS, COMPUTE, BLOCK_M, SLICE, OUT, EXACT,
        )  # fmt: skip


class Tile(NamedTuple):
    block_m: int
    slice: int
    out: int
    warps: int
    resident: bool


# rows of the batch classes that share a tile: up to the first, up to the second, more
FEW, SOME = 4096, 32768


def row_class(m: int) -> int:
    return FEW if m <= FEW else SOME if m <= SOME else SOME + 1


# 16-bit weights of one network that stay on chip beside the rows: the smallest shared memory is 64 KiB
RESIDENT_BYTES = 48 * 1024


# activations by the registers they work in: a comparison; (others: one exponential); a logarithm, an error function
LIGHT, HEAVY = {"none", "relu", "leaky_relu"}, {"gelu", "gelu_tanh", "softplus", "mish"}

# the compute capability that is assumed where there is no GPU; the audit sets that of its target
off_gpu_major = 9


def tile(net: Layout, m: int, member_loop: bool, compute: torch.dtype, major: int = 9) -> Tile:
    """The written rule, from what compiles without spilling, not yet from measurements.

    Few rows: 16 a program, to fill the multiprocessors; in so small a tile any network fits the registers. Many rows,
    at most 128 wide: 128 a program, the weights loaded once; 64 beside the sums of 5 to 16 outputs. Wider: 64 or 128
    rows where a program keeps one layer of 256; where it keeps two, a layer and the next, slices of 32, or eight warps
    where groups of warps multiply together (compute capability 9, which CDNA is too, and 10); slices of 32 beside more
    than 4 outputs; 16 rows where it would keep more: a LayerNorm's sums, a heavy activation's terms, more than 16
    outputs, fp32. So do several pairs of wide layers, which compile for a minute otherwise.
    """
    hidden = net.layers[:-1]
    widest = max((layer.width for layer in hidden), default=0)
    names = {layer.activation for layer in hidden}
    width = net.layers[-1].width
    out = triton.next_power_of_2(width) if width <= 4 else block(width, 64)
    few = Tile(16, 64, out, 4, False)
    if m <= FEW or compute == torch.float32 or width > 16:
        return few
    if widest <= 128 and width > 4:
        return Tile(64, 64, out, 4, False)
    if widest <= 128:
        fits = 2 * net.weights <= RESIDENT_BYTES and net.layers[0].columns <= 256 and not member_loop
        return Tile(128, 64, out, 4 if widest <= 64 else 8, fits)
    pairs = sum(layer.width > 128 and layer.columns > 128 for layer in hidden[:-1])
    if pairs > 1 or names & HEAVY or any(layer.eps is not None and layer.width > 128 for layer in hidden):
        return few
    if pairs == 1:
        streamed = hidden[0].columns > 256 and hidden[0].scale is None
        if not names <= LIGHT or streamed:
            return few
        if width > 4 or major not in (9, 10):
            return Tile(64, 32, out, 4, False)
        if m > SOME and (major == 9 or hidden[0].columns <= 256):
            return Tile(128, 64, out, 8, False)
        return Tile(64, 32, out, 4, False) if major == 9 else Tile(64, 64, out, 8, False)
    if width > 4:
        return Tile(64, 32, out, 4, False)
    # the sums over members and 128 rows leave too few registers on capability 10
    return Tile(64, 64, out, 4, False) if m <= SOME or (member_loop and major == 10) else Tile(128, 64, out, 8, False)


def candidates(net: Layout, m: int, member_loop: bool, compute: torch.dtype, major: int = 9) -> list[Tile]:
    """What a sweep measures beside the rule's, which comes first: only that where larger tiles compile for a minute."""
    rule = tile(net, m, member_loop, compute, major)
    pairs = sum(layer.width > 128 and layer.columns > 128 for layer in net.layers[:-2])
    if pairs > 1 or compute == torch.float32 or net.layers[-1].width > 16:
        return [rule]
    narrow = (32, 64) if any(layer.width > 128 for layer in net.layers[:-1]) else (64,)
    shapes = product((16, 32, 64, 128), narrow, (4, 8), {rule.resident, False})
    found = [Tile(rows, size, rule.out, warps, kept) for rows, size, warps, kept in shapes if rows > 32 or warps == 4]
    return list(dict.fromkeys([rule, *found]))


def bucket(net: Layout, m: int, member_loop: bool, compute: torch.dtype) -> str:
    """Networks that compile to much the same: widths up to powers of two, activations, norms, types."""
    layers = [f"{tiles.up(x.width)}{' norm' if x.eps is not None else ''} {x.activation}" for x in net.layers]
    stored = "int8" if net.layers[0].scale is not None else "float"
    kinds = f"{stored} {str(compute).removeprefix('torch.')}{' loop' if member_loop else ''}"
    return f"fused_mlp {m} x {tiles.up(sum(net.layers[0].pieces))}: {', '.join(layers)}; {kinds}"


def major(device: int) -> int:
    """The device's compute capability, without what follows the point; the device's number is -1 off GPUs."""
    return torch.cuda.get_device_capability(device)[0] if device >= 0 else off_gpu_major


@tiles.planned
def plan(
    layers: str, quantised: bool, rows: int, member_loop: bool, compute: torch.dtype, device: int
) -> tuple[Layout, Tile]:
    net = layout(layers, quantised)
    case = net, rows, member_loop, compute
    rule = tile(*case, major(device))
    return net, tiles.choose(bucket(*case), device, rule, lambda: candidates(*case, major(device)))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def fused_mlp(
    inputs: list[Tensor],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None = None,
    reduce: str = "none",
    compute_dtype: torch.dtype | None = None,
    input_scales: Tensor | None = None,
) -> Tensor:
    if compute_dtype == torch.int8:
        return fused_mlp_reference(inputs, weights, params, layers, members, reduce, compute_dtype, input_scales)
    y = new_output(inputs, layers, members, reduce)
    xs = tuple([dense_rows(x) for x in inputs])
    if xs[0].shape[0] == 0:
        return y
    compute = compute_type(inputs, weights, compute_dtype)
    p = _prepare(y, xs, weights, params, layers, members, reduce, compute, input_scales)
    launch(
        _fused_mlp_kernel, p.grid, p.key, (y, xs, p.strides, input_scales, weights, params, *p.rest),
        num_warps=p.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y


class Prepared(NamedTuple):
    """A launch without its tensors; ``rest`` are the arguments behind them."""

    grid: tuple[int, int, int]
    key: tuple[Any, ...]
    strides: tuple[int, ...]
    rest: tuple[Any, ...]
    warps: int


def _prepare(
    y: Tensor,
    xs: tuple[Tensor, ...],
    weights: Tensor,
    params: Tensor,
    layers: str,
    members: int | None,
    reduce: str,
    compute: torch.dtype,
    input_scales: Tensor | None,
) -> Prepared:
    m, strides = xs[0].shape[0], tuple([x.stride(0) for x in xs])
    loop = (members or 0) if reduce == "mean_std" else 0
    net, t = plan(layers, weights.dtype == torch.int8, row_class(m), loop > 0, compute, y.get_device())
    programs = triton.cdiv(m, t.block_m)
    if t.resident:
        programs = min(programs, 2 * _multiprocessors(y.device))
    grid = (programs, 1 if loop else members or 1, triton.cdiv(net.layers[-1].width, t.out))
    # fp32 through the tensor cores to 2^-22, where there are any
    exact = "ieee" if y.device.type == "cpu" else "bf16x6"
    key = (
        tuple([x.dtype for x in xs]), y.dtype, weights.dtype, compute, input_scales is None,
        aligned(y, *xs, weights, params, input_scales), strides, layers, loop, t,
    )  # fmt: skip
    constants = (net, loop, TL_DTYPE[compute], t.resident, t.block_m, t.slice, t.out, exact)
    return Prepared(grid, key, strides, (m, *constants), t.warps)


class Network:
    """Packed networks, read where they lie: the layers' own tensors are not."""

    live: tuple[Tensor, ...] = ()

    def __init__(
        self,
        weights: Tensor,
        params: Tensor,
        layers: str,
        members: int | None,
        reduce: str,
        compute: torch.dtype | None,
    ) -> None:
        self.arguments = weights, params, layers, members, reduce
        self.compute = compute

    def gradient(self) -> Callable[[list[Tensor]], tuple[Tensor, Tensor]] | None:
        """(y [m, 1], its gradient [m, columns]) as a function of fp32 inputs [m, piece], or None."""
        weights, params, layers, members, _ = self.arguments
        return gradient(weights, params, layers, self.compute) if members is None else None

    def bound(self, inputs: list[Tensor], flat: bool = False) -> Callable[..., Tensor | None] | None:
        """The launch as a function of inputs of these shapes and types, or None; it gives None for others.

        ``flat``: the one output of a row has no dimension of its own. Launches once, to have it compiled.
        """
        # one test of the inputs' addresses stands for all
        dense = all(x.is_contiguous() for x in inputs) and aligned(*inputs, *self.arguments[:2]) is True
        if self.compute == torch.int8 or inputs[0].numel() == 0 or not dense:
            return None
        _check(inputs, *self.arguments, self.compute)
        y = fused_mlp(inputs, *self.arguments, self.compute)
        if y.dtype != inputs[0].dtype or (flat and (y.shape[-1] > 1 or y.dim() == 1)):
            return None
        xs = tuple([dense_rows(x) for x in inputs])
        p = _prepare(y, xs, *self.arguments, compute_type(inputs, self.arguments[0], self.compute), None)
        go = settled(_fused_mlp_kernel, p.grid, p.key, y.device)
        if go is None:
            return None
        names = [f"x{i}" for i in range(len(inputs))]
        other = [f"{x}.shape != {x}_shape" for x in names[1:]]
        other += [f"{x}.dtype is not {x}_dtype or {x}.get_device() != device" for x in names]
        other += [f"not {x}.is_contiguous() or {x}.is_neg()" for x in names]
        other.append(f"({' | '.join(f'{x}.data_ptr()' for x in names)}) & 15")
        shape = y.shape[:-1] if flat else y.shape
        # ``new`` of separate sizes is the fastest there is, but for the shape ()
        fresh = f"x0.new({', '.join(f'y{i}' for i in range(len(shape)))})" if shape else "x0.new_empty(())"
        source = f"""
def f({", ".join(names)}):
    if {" or ".join(other)}:
        return None
    y = {fresh}
    return y if go(y, ({", ".join(names)},), strides, None, weights, params, *rest) else None
"""
        place: dict[str, Any] = {"go": go, "device": y.get_device(), "strides": p.strides, "rest": p.rest}
        place |= {"weights": self.arguments[0], "params": self.arguments[1]}
        place |= {f"y{i}": size for i, size in enumerate(shape)}
        for name, x in zip(names, inputs, strict=True):
            place |= {f"{name}_shape": x.shape, f"{name}_dtype": x.dtype}
        return function(source, place)


fused_mlp.packed_network = Network  # type: ignore[attr-defined]
