"""What is known of the kernels' speed without a GPU: machine code counted, beside the published peaks of the chips.

    python benchmarks/static_evidence.py [--target sm_90 ...] [--case int8_linear ...] [--write docs/static-evidence.md]

Nothing here is a measurement. Each line is one launch of the codegen audit: its resources, the instructions one warp
executes for one tile, and three times this machine code cannot beat: its bytes at the published bandwidth, its
products at the published tensor-core rate, its instructions at one a cycle and scheduler; the last two on the
multiprocessor that gets the most programs.
"""

import argparse
import math
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewardzip_kernels import audit, disassembly
from rewardzip_kernels.mlp_layout import layout


@dataclass(frozen=True)
class Chip:
    """Published peaks of one GPU of the target: bytes and dense tensor-core operations a second, cycles a second."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    operations: dict[str, float]
    registers: int  # of 32 bits, a processor
    shared: int  # bytes a processor
    reserved: int  # bytes of it the system takes a program
    warps: int  # at most, a processor
    lanes: int  # threads of a warp
    cycles: int  # a vector instruction keeps its scheduler
    source: str


KB = 1024
CHIPS = {
    "sm_80": Chip(
        "A100 SXM 80 GB", 108, 1.41e9, 2.039e12, {"tf32": 156e12, "16 bit": 312e12, "int8": 624e12},
        65536, 164 * KB, KB, 64, 32, 1, "NVIDIA A100 datasheet; CUDA programming guide, compute capability 8.0",
    ),
    "sm_90": Chip(
        "H200 SXM", 132, 1.98e9, 4.8e12, {"tf32": 494.5e12, "16 bit": 989e12, "int8": 1979e12},
        65536, 228 * KB, KB, 64, 32, 1,
        "NVIDIA H200 datasheet (its sparse figures halved); the clock is nvidia-smi's highest; CUDA guide, 9.0",
    ),
    "sm_100": Chip(
        "B200 SXM", 148, 1.98e9, 8.0e12, {"tf32": 1.1e15, "16 bit": 2.25e15, "int8": 4.5e15},
        65536, 228 * KB, KB, 64, 32, 1,
        "NVIDIA HGX B200 datasheet (dense); processors and clock as public GPU databases list them; CUDA guide, 10.0",
    ),
    "gfx942": Chip(
        "MI300X", 304, 2.1e9, 5.3e12, {"tf32": 653.7e12, "16 bit": 1307.4e12, "int8": 2614.9e12},
        4 * 512 * 64, 64 * KB, 0, 32, 64, 4,
        "AMD Instinct MI300X datasheet; CDNA 3 white paper and ISA guide: 16 lanes a scheduler, 4 cycles a wave of 64",
    ),
}  # fmt: skip

# what else of a target may be measured: bytes a second
SLOWER_MEMORY = {"H100": ("sm_90", 3.35e12)}

# an audit case: by kernel, how often each loop's body is asked for in one program
CASES: dict[str, dict[str, tuple[float, ...]]] = {
    "int8_linear 1x4096x4096 bfloat16": {"_int8_gemv_kernel": (8,)},
    "int8_linear 16x1024x4096 bfloat16": {"_int8_linear_kernel": (8,), "_sum_splits_kernel": ()},
    "int8_linear 1024x4096x4096 bfloat16": {"_int8_linear_kernel": (64,)},
    "int8_linear 4096x4096x4096 bfloat16": {"_int8_linear_kernel": (64,)},
    "int8_linear 4096x4096x4096 float32": {"_int8_linear_kernel": (128,)},
    "int8_dynamic_linear 4096x4096x4096": {"_quantize_rows_kernel": (2, 2), "_int8_linear_kernel": (32,)},
    "reward_head 16x1 of int8 bfloat16": {"_reward_head_kernel": (32,), "_sum_tiles_kernel": (4,)},
    "reward_head 4096x1 of int8 bfloat16": {"_reward_head_kernel": (64,), "_sum_tiles_kernel": (1,)},
    "fused_mlp 16 x 32: 64 relu, 64 relu, 1": {"_fused_mlp_kernel": ()},
    "fused_mlp 1048576 x 32: 64 relu, 64 relu, 1": {"_fused_mlp_kernel": (math.nan,)},  # a loop over the tiles
    "fused_mlp 16 x 24: 256 relu, 256 relu, 1": {"_fused_mlp_kernel": (4,)},
    "fused_mlp 1048576 x 24: 256 relu, 256 relu, 1": {"_fused_mlp_kernel": (4,)},
    "fused_mlp 8192 x 393: 256 relu, 256 relu, 1": {"_fused_mlp_kernel": (13, 8)},
    "fused_mlp 1048576 x 23: 256 relu, 256 relu, 1 5 mean_std": {"_fused_mlp_kernel": (5, 4)},
    "fused_mlp 16 x 256: 256 layer_norm mish, 256 layer_norm mish, 101": {"_fused_mlp_kernel": (4, 4, 4)},
    "mlp_gradient 17+6: 64 relu, 64 relu, 1 of int8 ": {"_mlp_gradient_kernel": ()},
    "mlp_gradient 24: 256 elu, 256 elu, 1 of int8 ": {"_mlp_gradient_kernel": ()},
    # a tenth of 64 x 64 blocks: 6.4 stored ones a block row
    "block_sparse_linear 1x4096x4096 64x64 of int8 float32": {"_block_gemv_kernel": (2,)},
    "block_sparse_linear 16x4096x4096 64x64 of int8 float32": {"_block_sparse_linear_kernel": (12.8,)},
    "block_sparse_linear 4096x4096x4096 64x64 of int8 int8": {
        "_quantize_rows_kernel": (2, 2),
        "_block_sparse_linear_kernel": (6.4,),
    },
    "sparse24_linear 1x4096x4096 of int8 float32": {"_sparse24_gemv_kernel": (4,)},
    "sparse24_linear 16x4096x4096 of int8 bfloat16": {"_sparse24_kernel": (32,), "_sum_splits_kernel": ()},
    "sparse24_linear 512x4096x4096 of int8 bfloat16": {"_expand_kernel": (), "_int8_linear_kernel": (64,)},
    # a twentieth of the weights, 205 an output
    "sparse_rows_linear 1x4096x4096 of int8 float32": {"_sparse_rows_kernel": (2,)},
}

COLUMNS = (
    "tensor core",
    "load 16",
    "load 8",
    "load 4",
    "load 1, 2",
    "store",
    "shared",
    "conversion",
    "special",
    "other",
)


@dataclass(frozen=True)
class Line:
    case: str
    kernel: str
    tile: str
    warps: int
    registers: int
    shared: int
    programs: int  # that fit a multiprocessor at once
    occupancy: float
    kinds: dict[str, float]
    useful: float | None  # of the tensor cores' work, the part the layers asked for
    memory: float
    tensor: float | None
    issue: float

    def cells(self) -> tuple[str, ...]:
        counts = [f"{self.kinds[kind]:,.0f}" for kind in COLUMNS]
        times = [self.memory, self.tensor, self.issue]
        return (
            self.case, f"`{self.kernel.strip('_').removesuffix('_kernel')}`", self.tile, str(self.warps),
            str(self.registers), f"{self.shared / KB:.4g}", f"{self.programs} ({self.occupancy:.0%})", *counts,
            "-" if self.useful is None else f"{self.useful:.0%}",
            *("-" if time is None else f"{time * 1e6:.3g}" for time in times),
        )  # fmt: skip


HEADINGS = (
    "case", "kernel", "tile", "warps", "registers", "shared KB", "programs (occupancy)", *COLUMNS, "useful",
    "memory us", "tensor us", "issue us",
)  # fmt: skip


def products(case: str) -> float:
    """The multiply-adds a case asks of the tensor cores."""
    op, size, *rest = case.split(" ", 2)
    if op == "fused_mlp":
        layers = rest[0].removeprefix("x ")
        members = 5 if layers.endswith("mean_std") else 1
        net = layout(re.sub(r" 5 mean_std$", "", layers), True)
        used = net.layers if net.layers[-1].width > 4 else net.layers[:-1]
        return int(size) * members * sum(layer.columns * layer.width for layer in used)
    if op == "mlp_gradient":
        net = layout(case.removeprefix("mlp_gradient ").partition(" of ")[0], True)
        return 2 * 512 * sum(layer.columns * layer.width for layer in net.layers[:-1])
    kept = {"block_sparse_linear": 0.1, "sparse24_linear": 0.5}.get(op, 1.0)
    if op == "reward_head":
        return int(size.partition("x")[0]) * 4096 * 4096
    return kept * math.prod(map(int, size.split("x")))


def rate(case: str) -> str:
    if "dynamic" in case or case.endswith("int8 int8"):
        return "int8"
    return "tf32" if case.endswith("float32") else "16 bit"


def roofline(device: str, moved: float, operations: float, kind: str) -> float | None:
    """The seconds that published peaks allow for bytes and operations; None for a device that is not in CHIPS."""
    known = {chip.name.split()[0]: (chip, chip.bandwidth) for chip in CHIPS.values()}
    known |= {name: (CHIPS[target], bandwidth) for name, (target, bandwidth) in SLOWER_MEMORY.items()}
    for name, (chip, bandwidth) in known.items():
        if name in device.replace("-", " ").split():
            return max(moved / bandwidth, operations / chip.operations[kind])
    return None


def fits(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """Programs a multiprocessor holds at once."""
    by_registers = chip.registers // (-(-registers // 8) * 8 * chip.lanes) // 4 * 4
    limits = [min(by_registers, chip.warps) // warps]
    if shared:
        limits.append(chip.shared // (shared + chip.reserved))
    return min(32, *limits)


def tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors(value)


def lines(case: str, target: str) -> list[Line]:
    chip, found = CHIPS[target], []
    for launch in audit.recorded(dict(audit.cases())[case], target):
        kernel = launch.kernel.__name__
        options, parameters = (
            launch.options,
            dict(zip((p.name for p in launch.kernel.params), launch.args, strict=True)),
        )
        compiled = audit.compile_for(launch.kernel, launch.args, options, target)
        registers, _ = audit._usage(compiled)
        programs = math.prod(launch.grid)
        # a resident network's programs walk over the tiles
        tiles = -(-parameters["M"] // parameters["BLOCK_M"]) if parameters.get("RESIDENT") else programs
        steps = tuple(tiles / programs if math.isnan(step) else step for step in CASES[case][kernel])
        run = disassembly.executed(disassembly.instructions(compiled), steps, options["num_stages"] > 1)
        warps, shared = options["num_warps"], compiled.metadata.shared
        together = fits(chip, registers, shared, warps)
        busiest = -(-programs // chip.processors)  # programs that one multiprocessor must take
        asked = products(case) if run.kinds["tensor core"] else None
        issued = None if run.multiply_adds is None else run.multiply_adds * warps * programs
        sizes = [p for p in parameters if p.startswith(audit.SIZES)]
        found.append(
            Line(
                case, kernel, " ".join(str(parameters[size]) for size in sizes), warps, registers, shared, together,
                together * warps / chip.warps,
                {kind: count * programs / tiles for kind, count in run.kinds.items()},
                asked / issued if asked and issued else None,
                sum(t.numel() * t.element_size() for t in tensors(launch.args)) / chip.bandwidth,
                2 * asked / programs * busiest / (chip.operations[rate(case)] / chip.processors) if asked else None,
                run.slots(chip.cycles) * warps * busiest / (min(4, warps * busiest) * chip.clock),
            )
        )  # fmt: skip
    return found


def report(targets: list[str], cases: list[str]) -> str:
    import triton

    jobs = [(case, target) for target in targets for case in cases]
    with ProcessPoolExecutor(2) as pool:
        made = dict(zip(jobs, pool.map(lines, *zip(*jobs, strict=True)), strict=True))
    text = [f"Triton {triton.__version__}; `python benchmarks/static_evidence.py --write docs/static-evidence.md`"]
    for target in targets:
        chip = CHIPS[target]
        rates = ", ".join(f"{name} {rate / 1e12:,.0f}" for name, rate in chip.operations.items())
        text += [
            f"\n### {target}: {chip.name}\n",
            f"{chip.bandwidth / 1e12:.3g} TB/s; {rates} T operations/s; {chip.processors} processors at "
            f"{chip.clock / 1e9:.3g} GHz. Source: {chip.source}.\n",
            "| " + " | ".join(HEADINGS) + " |",
            "|" + "---|" * len(HEADINGS),
        ]
        text += ["| " + " | ".join(line.cells()) + " |" for case in cases for line in made[case, target]]
    return "\n".join(text)


BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def write(page: Path, table: str) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=CHIPS, help="default: all")
    parser.add_argument("--case", action="append", help="cases that begin so; default: all")
    parser.add_argument("--write", type=Path, help="a page whose marked part is replaced")
    options = parser.parse_args()
    cases = [case for case in CASES if case.startswith(tuple(options.case or [""]))]
    table = report(options.target or list(CHIPS), cases)
    if options.write:
        write(options.write, table)
    else:
        print(table)


if __name__ == "__main__":
    main()
