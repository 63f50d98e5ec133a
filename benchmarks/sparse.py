"""The table of one pruned Linear + ReLU layer: its blocks, against dense layers and torch's sparse ones.

    python benchmarks/sparse.py [--sizes 256 1024 ...] [--rows 1 32 ...] [--sparsity 0.5 ...] [--threads N]
                                [--out FOLDER] [--quick] [--models]

Square layers, pruned in blocks of each shape by the blocks' norms. Prints microseconds (median of rivals in turn), the
ratio to eager fp32 of the dense layer, and where blocks begin to be faster than this package's dense int8; writes one
JSON object a cell, which counts as read and multiplied what a form stores. A provider whose result is wrong gets no
time. --models instead times reward models whose middle layer is pruned: the whole MLP in one launch, dense, against
three layers of which that one is in blocks.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from linear import TOLERANCE
from measured import Weights, csr_weights, halved_weights, in_words, machine, rows_dtype, weights_of, work, write
from providers import providers
from torch import Tensor, nn

import rewardzip as rz
from rewardzip import forms
from rewardzip.fuse import FusedForward
from rewardzip.nn import BlockSparseLinear
from rewardzip.timing import interleaved
from rewardzip_kernels.blocks import cut

SIZES = (256, 1024, 4096)
ROWS = (1, 32, 1024, 65536)
SPARSITY = (0.5, 0.75, 0.9, 0.95)
BLOCKS = {"cpu": ((16, 4), (64, 64)), "cuda": ((64, 64), (32, 32), (16, 4))}
DENSE = ("fp32", "AMP bf16", "bf16", "fp16", "rewardzip int8", "rewardzip int8 x int8")

# multiply-adds of the dense layer; on a CPU, cells beyond it take minutes, and have one shape of blocks
CPU_WORK = 1e11
# those that torch's CSR makes there, about a nanosecond each, and those of fp16, a twelfth of one
CSR_WORK, FP16_WORK = 5e9, 5e10
# seconds after which a cell has each call timed three times alone
LONGEST = 5.0
# rows that are enough to tell a wrong result
CHECKED = 1024


@dataclass(frozen=True)
class Way:
    """How to run the layer, the type of the rows it is given, and the weights it multiplies."""

    call: Callable[[], Tensor]
    dtype: torch.dtype
    weights: Weights | int


def pruned(size: int, block: tuple[int, int], sparsity: float, device: str) -> nn.Linear:
    """A square layer whose blocks of least norm are zero."""
    layer = nn.Linear(size, size, device=device).requires_grad_(False)
    # norms of equal blocks are all alike: their spread is what training gives, here a factor of each block's own
    norms = cut(layer.weight, block).flatten(2).norm(dim=2)
    order = (norms * torch.rand_like(norms)).flatten().argsort()
    keep = torch.ones(norms.numel(), device=device)
    keep[order[: round(sparsity * norms.numel())]] = 0
    mask = keep.view(norms.shape).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    layer.weight.mul_(mask[:size, :size])
    return layer


def csr(layer: nn.Linear, x: Tensor) -> Way:
    weight, columns = layer.weight.to_sparse_csr(), x.t().contiguous()
    return Way(lambda: torch.relu((weight @ columns).t() + layer.bias), x.dtype, csr_weights(weight))


def semi_structured(layer: nn.Linear, x: Tensor) -> Way:
    """fp16, two of every four inputs zeroed: torch's kernel skips no more. Another function, timed all the same."""
    weight = layer.weight.half().clone()
    weight.view(weight.shape[0], -1, 4)[:, :, 2:] = 0
    sparse, rows, bias = torch.sparse.to_sparse_semi_structured(weight), x.half(), layer.bias.half()
    call = partial(nn.functional.linear, rows, sparse, bias)
    return Way(lambda: torch.relu(call()), rows.dtype, halved_weights(weight))


def blocks(layer: nn.Linear, x: Tensor, block: tuple[int, int], values: str, rows: str) -> Way:
    packed = BlockSparseLinear.from_linear(layer, block, values, rows)
    return Way(lambda: packed(x, "relu"), x.dtype, weights_of(packed))


def ways(layer: nn.Linear, x: Tensor, block: tuple[int, int]) -> tuple[dict[str, Way], list[str]]:
    """(what can be timed, what gave a wrong result)."""
    some = slice(None, None, -(-len(x) // CHECKED))
    exact = torch.relu(x[some].double() @ layer.weight.double().t() + layer.bias.double())
    dense = {name: call for name, call in providers(layer, x, compile=False).items() if name in DENSE}
    if not x.is_cuda and len(x) * layer.weight.numel() > FP16_WORK:
        del dense["fp16"]
    made = {name: Way(call, rows_dtype(name), layer.weight.numel()) for name, call in dense.items()}
    if x.is_cuda or len(x) * layer.weight.count_nonzero() < CSR_WORK:
        made["torch CSR"] = csr(layer, x)
    made["rewardzip blocks, int8"] = blocks(layer, x, block, "int8", "float")
    made["rewardzip blocks, int8 x int8"] = blocks(layer, x, block, "int8", "dynamic")
    if x.is_cuda:
        # as in an fp16 model
        made["rewardzip blocks, fp16"] = blocks(layer, x.half(), block, "float16", "float")
        made["rewardzip blocks, int8, fp16 rows"] = blocks(layer, x.half(), block, "int8", "float")
        made["rewardzip blocks, int8 x int8, fp16 rows"] = blocks(layer, x.half(), block, "int8", "dynamic")
    good, wrong = {}, []
    for name, way in made.items():
        error = (way.call()[some].double() - exact).norm() / exact.norm()
        if error <= TOLERANCE:
            good[name] = way
        else:
            wrong.append(name)
    if x.is_cuda:
        good["torch 2:4 fp16"] = semi_structured(layer, x)
    return good, wrong


def swapped(model: nn.Module, config: rz.Int8, table: tuple[forms.Form, ...]) -> nn.Module:
    """The model under another route table."""
    before, forms.FORMS = forms.FORMS, table
    try:
        return rz.swap(model, config)
    finally:
        forms.FORMS = before


def layer_by_layer(model: nn.Module) -> nn.Module:
    """The model without its one launch for few rows."""
    for module in model.modules():
        for chain in module.rz_chains if isinstance(module, FusedForward) else ():
            chain.few = 0
    return model


def models(options: argparse.Namespace, told: dict[str, str]) -> list[dict[str, object]]:
    """23-256-256-1, the middle layer pruned."""
    written = []
    (make,) = (form.make for form in forms.FORMS if form.name == "blocks")
    blocks_alone = forms.Form("blocks", lambda p: p.sparsity > 0.4, lambda p, d, r: "asked", make)
    for rows in options.rows:
        inputs = torch.randn(rows, 17), torch.randn(rows, 6)
        for sparsity in options.sparsity:
            model = rz.RewardMLP(17, 6, (256, 256)).eval().requires_grad_(False)
            model.net[2].weight.copy_(pruned(256, (16, 4), sparsity, "cpu").weight)
            forms_of = {"fp32": model}
            for kind, config in (("int8", rz.Int8()), ("int8 x int8", rz.Int8(activations="dynamic"))):
                forms_of[f"one launch, {kind}"] = swapped(model, config, ())
                forms_of[f"blocks alone, {kind}"] = layer_by_layer(swapped(model, config, (blocks_alone,)))
                forms_of[f"swapped, {kind}"] = swapped(model, config, forms.FORMS)
            with torch.no_grad():
                calls = {name: partial(form, *inputs) for name, form in forms_of.items()}
                taken = interleaved(calls, "cpu", options.seconds)
            print(f"\n23-256-256-1, {rows} rows, {100 * sparsity:g} % of the middle layer in blocks of 16x4")
            for name, t in taken.items():
                done = work(name, rows, 24, weights_of(forms_of[name]), t.p50, told["device"], dtype=torch.float32)
                print(f"  {name:30} {t.p50 * 1e6:10.1f} us {taken['fp32'].p50 / t.p50:7.2f}x  {in_words(done)}")
                cell = {"op": "pruned model", "model": "23-256-256-1", "rows": rows, "sparsity": sparsity}
                written.append(cell | {"provider": name} | asdict(t) | done | told)
    return written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tiny layer, a moment each")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITY)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--seconds", type=float, default=0.6, help="time for each cell")
    parser.add_argument("--models", action="store_true", help="whole models on a CPU instead")
    parser.add_argument("--out", type=Path, help="folder for sparse-SIZE-N-threads.json")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.rows, options.sparsity, options.seconds = [64], [1, 20], [0.5], 0.05
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    told, written = machine(), []
    print("  ".join(f"{k}: {v}" for k, v in told.items()))
    if options.models:
        written = models(options, told)
        if options.out:
            write(options.out / f"sparse-models-{options.threads}-threads.json", written)
        return
    for size in options.sizes:
        for block in BLOCKS[device]:
            for rows in options.rows:
                if device == "cpu" and rows * size * size > CPU_WORK and block != BLOCKS[device][0]:
                    continue
                wins = None
                for sparsity in sorted(options.sparsity):
                    layer = pruned(size, block, sparsity, device)
                    made, wrong = ways(layer, torch.randn(rows, size, device=device), block)
                    with torch.no_grad():
                        calls = {name: way.call for name, way in made.items()}
                        taken = interleaved(calls, device, options.seconds, longest=LONGEST)
                    shape = partial("{}x{}".format, *block)()
                    print(f"\n{size} x {size}, {rows} rows, {100 * sparsity:g} % in blocks of {shape}")
                    for name, t in taken.items():
                        way, ratio = made[name], taken["fp32"].p50 / t.p50
                        done = work(name, rows, 2 * size, way.weights, t.p50, told["device"], dtype=way.dtype)
                        print(f"  {name:30} {t.p50 * 1e6:10.1f} us {ratio:7.2f}x  {in_words(done)}")
                        cell = {"op": "block_sparse_linear", "size": size, "rows": rows, "block": shape}
                        cell |= {"sparsity": sparsity, "provider": name}
                        written.append(cell | asdict(t) | done | told)
                    for name in wrong:
                        print(f"  {name:30} wrong result: not timed")
                    ours = [t.p50 for name, t in taken.items() if name.startswith("rewardzip blocks")]
                    rest = [t.p50 for name, t in taken.items() if name.startswith("rewardzip int8")]
                    wins = sparsity if wins is None and ours and min(ours) < min(rest) else wins
                    if options.out:  # whole after each cell
                        mine = [row for row in written if row["size"] == size]
                        write(options.out / f"sparse-{size}-{options.threads}-threads.json", mine)
                print(f"  blocks beat dense int8 from {'nowhere' if wins is None else f'{100 * wins:g} %'}")


if __name__ == "__main__":
    main()
