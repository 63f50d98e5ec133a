"""What every row of a table has beside its cell: the machine, the type of the rows, the work in a provider's time."""

import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from static_evidence import roofline
from torch import Tensor, nn

from rewardzip.nn.base import CompressedLinear


def machine() -> dict[str, str]:
    found = {"device": _processor(), "torch": torch.__version__}
    if torch.cuda.is_available():
        import triton

        # a GPU with nothing to do has clocks of its own: it spins while it is asked
        torch.cuda._sleep(3_000_000_000)
        told = _said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        driver, sm, memory = (told.partition("\n")[0].split(", ") + 3 * [""])[:3]
        found |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
        found |= {"driver": driver, "clock": sm, "memory clock": memory}
    commit = _said("git", "rev-parse", "--short", "HEAD")
    return found | {"commit": commit, "date": str(date.today()), "threads": str(torch.get_num_threads())}


def rows_dtype(provider: str) -> torch.dtype:
    """The type in which a provider is given its rows."""
    name = provider.removesuffix(", graph")
    if name == "bf16" or name.endswith("bf16 rows") or name.startswith("torchao"):
        return torch.bfloat16
    if name == "fp16" or name.endswith("fp16 rows") or name.startswith(("gemlite", "bitsandbytes")):
        return torch.float16
    return torch.float32


class Weights(NamedTuple):
    """How many are multiplied, and the bytes they are stored in, indices included."""

    multiplied: int
    stored: int


# the buffer of a compressed layer that holds what is multiplied
VALUES = ("int8_weight", "block_values", "packed_values")


def weights_of(model: nn.Module) -> Weights:
    """Those of its linear layers, dense ones and compressed ones."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            found.append(Weights(layer.weight.numel(), layer.weight.nbytes))
        elif isinstance(layer, CompressedLinear):
            (values,) = (tensor for name, tensor in layer.named_buffers() if name in VALUES)
            found.append(Weights(values.numel(), layer.weight_bytes()))
    return Weights(*map(sum, zip(*found, strict=True)))


def csr_weights(weight: Tensor) -> Weights:
    parts = weight.values(), weight.col_indices(), weight.crow_indices()
    return Weights(len(parts[0]), sum(part.nbytes for part in parts))


def halved_weights(weight: Tensor) -> Weights:
    """torch's 2:4 form of a dense 16-bit weight: a half of the values, 2 bits each to say where they stand."""
    kept = weight.numel() // 2
    return Weights(kept, 2 * kept + kept // 4)


def work(
    provider: str,
    rows: int,
    values: int,
    weights: int | Weights,
    seconds: float,
    device: str,
    *,
    products: str = "16 bit",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The least a provider could do in its time: read and write a row's ``values`` and the weights once, multiply.

    ``products``: what this package's int8 weights are multiplied in where the rows are fp32. ``dtype``: the type of the
    rows, where the name does not tell. The share of the roofline is None for a device whose peaks are not known.
    """
    dtype = dtype or rows_dtype(provider)
    if isinstance(weights, int):
        byte = 1 if "int8" in provider or "torch.ao" in provider else dtype.itemsize
        weights = Weights(weights, byte * weights)
    moved, operations = rows * values * dtype.itemsize + weights.stored, 2 * rows * weights.multiplied
    kind = "int8" if "int8 x int8" in provider else "16 bit" if dtype.itemsize == 2 or "AMP" in provider else "tf32"
    if kind == "tf32" and "rewardzip int8" in provider:
        kind = products
    floor = roofline(device, moved, operations, kind)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "operations": operations,
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": operations / seconds / 1e12,
        "roofline": None if floor is None else floor / seconds,
    }


def in_words(done: dict[str, Any]) -> str:
    share = "" if done["roofline"] is None else f"  {done['roofline']:4.0%} of the roofline"
    return f"{done['GB/s']:8.1f} GB/s {done['TFLOP/s']:8.3f} TFLOP/s{share}"


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {name.strip(): value.strip() for name, value in fields.items()}
    name = told.get("model name", platform.machine())
    return f"{name} (family {told['cpu family']})" if "cpu family" in told else name


def _said(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
