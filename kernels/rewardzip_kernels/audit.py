"""Every kernel compiled for several architectures, with no GPU: registers, spills, shared memory, instructions.

    python -m rewardzip_kernels.audit [--json] [--target sm_90 ...]

The host code runs on meta tensors and its launches are recorded, so what is compiled is what would be launched: the
same tiles, types, alignment and options. The machine code is read with the tools that Triton ships.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# bytes of shared memory one block may use
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# how the parameters that make a tile begin
SIZES = ("BLOCK", "SPLIT", "SLICE", "OUT")

TENSOR_CORE = {
    "wgmma, A in registers": r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*\{",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "mfma": r"v_mfma",
}


@dataclass(frozen=True)
class Row:
    """One kernel in one tile on one target."""

    case: str
    kernel: str
    target: str
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: str


def _linear(op: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    from .gpu.int8_dynamic_linear import int8_dynamic_linear
    from .gpu.int8_linear import int8_linear

    x = torch.empty(m, k, dtype=dtype, device="meta")
    weight = torch.empty(n, k, dtype=torch.int8, device="meta")
    scale = torch.empty(n, device="meta")
    runs: dict[str, Any] = {"int8_linear": int8_linear, "int8_dynamic_linear": int8_dynamic_linear}
    runs[op](x, weight, scale, scale, "relu")


def _mlp(
    layers: str,
    m: int,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype = torch.int8,
    compute: torch.dtype | None = None,
    members: int | None = None,
    reduce: str = "none",
) -> None:
    from .gpu.fused_mlp import fused_mlp
    from .mlp_layout import layout

    net = layout(layers, stored == torch.int8)
    inputs = [torch.empty(m, k, dtype=dtype, device="meta") for k in net.layers[0].pieces]
    weights = torch.empty((members or 1) * net.weights, dtype=stored, device="meta")
    params = torch.empty((members or 1) * net.params, device="meta")
    scales = None if dtype.is_floating_point else torch.empty(len(inputs), 2, device="meta")
    fused_mlp(inputs, weights, params, layers, members, reduce, compute, scales)


def _gradient(layers: str, stored: torch.dtype, compute: torch.dtype | None) -> None:
    from .gpu.mlp_gradient import gradient
    from .mlp_layout import layout

    net = layout(layers, stored == torch.int8)
    weights = torch.empty(net.weights, dtype=stored, device="meta")
    call = gradient(weights, torch.empty(net.params, device="meta"), layers, compute)
    if call is None:
        raise ValueError(f"{layers!r} has no gradient kernel")
    call([torch.empty(512, k, device="meta") for k in net.layers[0].pieces])


def _head(m: int, n_out: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    from .gpu.reward_head import reward_head

    x = torch.empty(m, 4096, dtype=dtype, device="meta")
    weight = torch.empty(4096, 4096, dtype=stored, device="meta")
    scale = torch.empty(4096, device="meta")
    head = torch.empty(n_out, 4096, device="meta")
    reward_head(x, weight, scale if stored == torch.int8 else None, scale, head, head[:, 0], "silu")


def _sparse24(m: int, n: int, k: int, dtype: torch.dtype, stored: torch.dtype, compute: torch.dtype | None) -> None:
    from .gpu.sparse24_linear import sparse24_linear
    from .sparse24_layout import width

    x = torch.empty(m, k, dtype=dtype, device="meta")
    values = torch.empty(n, 4, width(k), dtype=stored, device="meta")
    indices = torch.empty(n, width(k), dtype=torch.uint8, device="meta")
    scale = torch.empty(n, device="meta")
    sparse24_linear(x, values, indices, scale if stored == torch.int8 else None, k, scale, "relu", compute)


def _sparse_rows(m: int, k: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    from .gpu.sparse_rows_linear import sparse_rows_linear
    from .sparse_rows_linear import column_type

    x = torch.empty(m, k, dtype=dtype, device="meta")
    values = torch.empty(4096 * k // 20, dtype=stored, device="meta")
    columns = torch.empty(values.shape, dtype=column_type(k), device="meta")
    starts, scale = torch.empty(4097, dtype=torch.int32, device="meta"), torch.empty(4096, device="meta")
    sparse_rows_linear(x, values, columns, starts, scale if stored == torch.int8 else None, k, scale, "relu")


def _blocks(m: int, block: tuple[int, int], k: int, dtype: torch.dtype, stored: torch.dtype, dynamic: bool) -> None:
    from .blocks import grid
    from .gpu.block_sparse_linear import block_sparse_linear

    rows, columns = grid(4096, k, block)
    x = torch.empty(m, k, dtype=dtype, device="meta")
    values = torch.empty(rows * columns // 10, *block, dtype=stored, device="meta")
    where = torch.empty(len(values), dtype=torch.int32, device="meta")
    starts = torch.empty(rows + 1, dtype=torch.int32, device="meta")
    scale = torch.empty(4096, device="meta")
    arguments = scale if stored == torch.int8 else None, scale, "relu", dynamic
    block_sparse_linear(x, values, where, starts, 4096, k, *arguments)


# (layers, further arguments of ``_mlp``), and why
MLPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("32: 64 relu, 64 relu, 1", {}),  # weights on chip, 4 warps
    ("17+6: 64 relu, 64 relu, 1", {"dtype": torch.bfloat16, "stored": torch.bfloat16}),  # two inputs
    ("17+6: 64 relu, 64 relu, 1", {"dtype": torch.uint8}),  # a quantised replay buffer
    ("23: 32 relu, 32 relu, 1", {"members": 5}),  # an ensemble, weights on chip
    ("32: 128 relu, 128 relu, 1", {}),  # weights on chip, 8 warps
    ("60: 64 layer_norm mish, 64 layer_norm mish, 16", {}),  # the most that 64 wide keeps
    ("100: 128 mish, 128 mish, 128 mish, 128 mish, 16", {}),  # weights that do not fit
    ("24: 256 relu, 256 relu, 1", {}),  # one wide layer kept
    ("48: 256 elu, 128 elu, 1", {}),
    ("24: 256 silu, 256 silu, 16", {}),  # slices of 32 beside the outputs' sums
    ("24: 256 mish, 256 mish, 1", {}),  # a heavy activation: 16 rows
    ("23: 256 relu, 256 relu, 1", {"members": 5, "reduce": "mean_std"}),  # a loop over members
    ("393: 256 relu, 256 relu, 1", {}),  # a loop over inputs
    ("24: 256 relu, 256 relu, 256 relu, 1", {}),  # two wide layers kept
    ("24: 256 relu, 256 relu, 256 relu, 256 relu, 256 relu, 1", {}),  # 16 rows from here on
    ("256: 256 layer_norm mish, 256 layer_norm mish, 101", {}),
    ("256: 256 layer_norm mish, 256 layer_norm mish, 256", {"compute": torch.float32}),
    ("1024: 1", {}),  # no hidden layer
)


GRADIENTS: tuple[tuple[str, torch.dtype, torch.dtype | None], ...] = (
    ("17+6: 64 relu, 64 relu, 1", torch.int8, None),
    ("24: 256 elu, 256 elu, 1", torch.int8, None),
    ("24: 256 tanh, 256 tanh, 1", torch.bfloat16, None),
    ("17+6: 128 softplus, 128 relu, 1", torch.int8, None),
    ("250: 256 relu, 256 relu, 256 relu, 1", torch.int8, None),  # the most that is taken
    ("250: 256 relu, 256 relu, 1", torch.int8, torch.float32),
)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Host calls that between them launch every kernel in every tile class its rule can give."""
    for m, n, k in (
        (1, 4096, 4096),
        (16, 1024, 4096),
        (64, 4096, 4096),
        (1024, 4096, 4096),
        (4096, 4096, 4096),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            yield f"int8_linear {m}x{n}x{k} {name}", partial(_linear, "int8_linear", m, n, k, dtype)
        yield (
            f"int8_dynamic_linear {m}x{n}x{k}",
            partial(_linear, "int8_dynamic_linear", m, n, k, torch.float32),
        )
    yield "int8_linear 4096x65x23 float32", partial(_linear, "int8_linear", 4096, 65, 23, torch.float32)
    for m, n_out in ((1, 1), (16, 1), (64, 16), (1024, 1), (4096, 1)):
        for stored, dtype in (
            (torch.int8, torch.float32),
            (torch.int8, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ):
            name = f"reward_head {m}x{n_out} of {stored} {dtype}".replace("torch.", "")
            yield name, partial(_head, m, n_out, dtype, stored)
    for m, n, k in (
        (1, 4096, 4096),
        (16, 4096, 4096),
        (64, 4096, 4096),
        (256, 4096, 4096),
        (64, 70, 393),
        (4, 70, 393),
        (512, 4096, 4096),
    ):
        for stored, dtype, compute in (
            (torch.int8, torch.float32, None),
            (torch.int8, torch.bfloat16, None),
            (torch.int8, torch.float32, torch.int8),
            (torch.float16, torch.float32, None),
            (torch.float16, torch.float16, None),
            (torch.bfloat16, torch.bfloat16, None),
        ):
            rows = "int8" if compute == torch.int8 else dtype
            name = f"sparse24_linear {m}x{n}x{k} of {stored} {rows}".replace("torch.", "")
            yield name, partial(_sparse24, m, n, k, dtype, stored, compute)
    for m, k, dtype, stored in (
        (1, 4096, torch.float32, torch.int8),
        (32, 4096, torch.float32, torch.float32),
        (32, 4096, torch.bfloat16, torch.int8),
        (8, 65536, torch.float16, torch.float16),
    ):
        name = f"sparse_rows_linear {m}x4096x{k} of {stored} {dtype}".replace("torch.", "")
        yield name, partial(_sparse_rows, m, k, dtype, stored)
    for block, k, sizes in (((64, 64), 4096, (1, 16, 4096)), ((16, 4), 4096, (1, 16, 4096)), ((24, 5), 4001, (4096,))):
        for m in sizes:
            for stored, dtype, dynamic in (
                (torch.int8, torch.float32, False),
                (torch.int8, torch.float32, True),
                (torch.bfloat16, torch.bfloat16, False),
            ):
                rows = "int8" if dynamic else dtype
                name = f"block_sparse_linear {m}x4096x{k} {block[0]}x{block[1]} of {stored} {rows}"
                yield name.replace("torch.", ""), partial(_blocks, m, block, k, dtype, stored, dynamic)
    for layers, options in MLPS:
        details = "".join(f" {str(v).removeprefix('torch.')}" for v in options.values())
        for m in (16, 8192, 1 << 20):
            yield f"fused_mlp {m} x {layers}{details}", partial(_mlp, layers, m, **options)
    for layers, stored, compute in GRADIENTS:
        details = f"{stored} {compute or ''}".replace("torch.", "")
        yield f"mlp_gradient {layers} of {details}", partial(_gradient, layers, stored, compute)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def recorded(case: Callable[[], object], target: str = "sm_90") -> list[Launch]:
    """The launches of a host call on the target, nothing run."""
    from .gpu import fused_mlp, launch

    launches: list[Launch] = []
    before = launch.off_gpu, fused_mlp.off_gpu_major
    launch.off_gpu = lambda *told: launches.append(Launch(*told))
    # ROCm names gfx942's capability 9
    fused_mlp.off_gpu_major = int(target[3:-1]) if target.startswith("sm_") else 9
    fused_mlp.plan.cache_clear()
    try:
        case()
    finally:
        launch.off_gpu, fused_mlp.off_gpu_major = before
        fused_mlp.plan.cache_clear()
    return launches


def _specialised(parameter: Any, where: tuple[int, ...], value: Any) -> tuple[str, dict[Any, Any], dict[Any, Any]]:
    """One argument as Triton would see it: (its type, itself if it is a constant, its alignment if it has one)."""
    fixed = value == 1 and not parameter.do_not_specialize if isinstance(value, int) else value is None
    if parameter.is_constexpr or fixed:
        return "constexpr", {where: value}, {}
    divisible = {where: [["tt.divisibility", 16]]}
    if isinstance(value, torch.Tensor):
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8"}
        dtype = str(value.dtype).removeprefix("torch.")
        return "*" + names.get(dtype, dtype.replace("int", "i")), {}, divisible
    aligned = value % 16 == 0 and not parameter.do_not_specialize
    return "i32" if value < 2**31 else "i64", {}, divisible if aligned else {}


def compile_for(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], target: str) -> Any:
    """Triton's compiled kernel, specialised for ``args`` as a launch would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter, value in zip(kernel.params, args, strict=True):
        if isinstance(value, tuple):
            parts = [_specialised(parameter, (parameter.num, i), part) for i, part in enumerate(value)]
            signature[parameter.name] = tuple(kind for kind, _, _ in parts)
        else:
            parts = [_specialised(parameter, (parameter.num,), value)]
            signature[parameter.name] = parts[0][0]
        for _, constant, attribute in parts:
            constants |= constant
            attributes |= attribute
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)


def _usage(compiled: Any) -> tuple[int, int]:
    """(registers a thread, bytes of stack) out of the machine code."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return (
            int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),  # type: ignore[index]
            int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]),  # type: ignore[index]
        )
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__path__[0]) / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def _instructions(compiled: Any) -> str:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    for name, pattern in TENSOR_CORE.items():
        if re.search(pattern, text):
            types = re.search(r"(?:wgmma\.mma_async\S+?|mma\.sync\S+?)\.(m\d+n\d+k\d+\S*)", text)
            return f"{name} {types[1]}" if types else name
    return "-"


def rows_of(case: str, target: str) -> list[Row]:
    rows = []
    for kernel, _, args, options in recorded(dict(cases())[case], target):
        compiled = compile_for(kernel, args, options, target)
        registers, stack = _usage(compiled)
        tile = {p.name: v for p, v in zip(kernel.params, args, strict=True) if p.name.startswith(SIZES)}
        sizes = " ".join(str(size) for size in tile.values())
        used = (options["num_warps"], registers, stack, compiled.metadata.shared, _instructions(compiled))
        rows.append(Row(case, kernel.__name__, target, sizes, *used))
    return rows


def audit(targets: tuple[str, ...] = TARGETS, workers: int = 1) -> list[Row]:
    """Compile everything; the same launch met in two cases is listed once."""
    jobs = [(case, target) for target in targets for case, _ in cases()]
    with ProcessPoolExecutor(workers) as pool:
        found = [row for rows in pool.map(rows_of, *zip(*jobs, strict=True)) for row in rows]
    seen: dict[tuple[Any, ...], Row] = {}
    for row in found:
        seen.setdefault((row.kernel, row.target, row.tile, row.instructions, row.registers, row.stack, row.shared), row)
    return list(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rewardzip_kernels.audit", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--json", action="store_true", help="one object a row instead of the table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = audit(tuple(options.target or TARGETS), options.workers)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
        return
    table = [("case", "kernel", "target", "tile", "warps", "regs", "stack", "shared", "instruction")]
    table += [tuple(str(v) for v in asdict(row).values()) for row in rows]  # type: ignore[misc]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
