"""Models for other runtimes: ``.onnx``, ``.pt2`` and ``.pte``, compared with the model before the file is there."""

from __future__ import annotations

import copy
import inspect
import io
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .chain import Wide
from .ensemble import FusedEnsemble
from .fuse import FusedForward, unfuse
from .nn import GridLinear, Int8Linear, SharedLinear, ShiftedLinear, SparseLinear
from .parity import error_bound, tensors
from .score_rows import placement
from .swap import put, restore

# rows that are compared, at most
COMPARED = 1024


@dataclass(frozen=True)
class Exported:
    """A file, and how near its outputs are to the model's."""

    path: Path
    runtime: str
    bytes: int
    dense_bytes: int
    """What the weights take in fp32."""
    rows: int
    error: float
    bound: float
    """The bound where the error came nearest to it."""

    def __str__(self) -> str:
        parity = "equal to the bit" if self.error == 0 else f"largest error {self.error:.2g}, bound {self.bound:.2g}"
        return (
            f"{self.path}: {self.bytes:,} bytes (the weights in fp32: {self.dense_bytes:,}); "
            f"{self.runtime} against the model on {self.rows} rows: {parity}"
        )


def export(model: nn.Module, path: str | os.PathLike[str], example_inputs: Tensor | tuple[Tensor, ...]) -> Exported:
    """Write ``model`` for another runtime, run it there, and print and return how far the outputs are apart.

    path: ``.onnx`` (standard operators, int8 weights stay int8), ``.pt2`` (torch.export; ``import rewardzip`` before
    loading it) or ``.pte`` (ExecuTorch, up to 1024 rows a call). example_inputs: the forward's tensors, whose first
    dimension is the batch and stays free. The file appears only if all outputs lie within the bound of ``parity.py``.
    What is written computes on the CPU as the model does there.
    """
    target = Path(path)
    writers: dict[str, Callable[..., tuple[str, Run]]] = {".onnx": _onnx, ".pt2": _pt2, ".pte": _pte}
    if target.suffix not in writers:
        raise ValueError(f"export: {target} ends in {target.suffix!r}; it must be one of {', '.join(writers)}")
    if target.is_dir():
        raise ValueError(f"export: {target} is a folder; a model is exported as one file")
    inputs = _check_inputs(example_inputs)
    model = copy.deepcopy(model).cpu().eval()
    dtype = placement(model)[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem}-{secrets.token_hex(4)}{target.suffix}")
    try:
        runtime, run = writers[target.suffix](model, inputs, draft)
        error, bound = _compare(runtime, run, model, inputs, dtype)
        # the batch is free
        _compare(runtime, run, model, tuple(x[:1] for x in inputs), dtype)
        size = draft.stat().st_size
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    dense = 4 * sum(p.numel() for p in restore(model).parameters())
    made = Exported(target, runtime, size, dense, len(inputs[0]), error, bound)
    print(made)
    return made


Run = Callable[[tuple[Tensor, ...]], list[Tensor]]


def _check_inputs(example_inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"export: example_inputs is {[type(x).__name__ for x in inputs]}; it must be tensors")
    if any(x.dim() == 0 or len(x) != len(inputs[0]) or len(x) == 0 for x in inputs):
        raise ValueError(f"export: inputs of shapes {[tuple(x.shape) for x in inputs]}; the first sizes must agree")
    # a .pt2 file holds them: without the rest of the rows they are cut from
    inputs = tuple(x.detach().cpu()[:COMPARED].clone() for x in inputs)
    # a batch of one is traced as a constant
    return inputs if len(inputs[0]) > 1 else tuple(torch.cat([x, x]) for x in inputs)


def _compare(
    runtime: str, run: Run, model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[float, float]:
    """(the error, the bound) where they are nearest; an error beyond its bound is an error."""
    with torch.no_grad():
        expected = tensors(model(*inputs))
    found = run(inputs)
    bounds = error_bound(unfused(model), inputs, dtype)
    nearest = (-1.0, 0.0, 0.0)
    for y, wanted, bound in zip(found, expected, bounds, strict=True):
        if y.shape != wanted.shape or y.dtype != wanted.dtype:
            raise ValueError(
                f"export: {runtime} gives {y.dtype} {tuple(y.shape)}, the model {wanted.dtype} {tuple(wanted.shape)}"
            )
        errors = torch.where(y == wanted, 0.0, (y.double() - wanted.double()).abs())
        share = torch.where(errors == 0, 0.0, errors / bound).nan_to_num(nan=torch.inf)
        at = int(share.argmax())
        nearest = max(nearest, (float(share.flatten()[at]), float(errors.flatten()[at]), float(bound.flatten()[at])))
    worst, error, limit = nearest
    if not worst <= 1:
        raise ValueError(f"export: {runtime} is off by {error:.3g} where at most {limit:.3g} can be explained")
    return error, limit


def unfused(model: nn.Module) -> nn.Module:
    """A copy that runs layer by layer and computes the same: its layers are what other runtimes know, zeros and all."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FusedForward):
            for chain in module.rz_chains:
                last = chain.linears[-1]
                one_call = not isinstance(chain, Wide) or chain.one_call
                if one_call and isinstance(last, Int8Linear):
                    # the last layer of one call takes its rows as they are
                    last.rows, last.compute_dtype, last.x_scale = "float", None, None
            unfuse(module)
    known: dict[nn.Module, nn.Module] = {m: m.filled() for m in model.modules() if isinstance(m, SparseLinear)}
    known |= {m: m.to_linear() for m in model.modules() if isinstance(m, GridLinear | SharedLinear | ShiftedLinear)}
    known |= {m: _Apart(m) for m in model.modules() if isinstance(m, FusedEnsemble)}
    # the model itself comes last: what takes its place holds its parts
    named = reversed(list(model.named_modules(remove_duplicate=False)))
    return put(model, {name: known[m] for name, m in named if m in known})


class _Apart(nn.Module):
    """The members of an ensemble one by one, which need no launch to share."""

    def __init__(self, ensemble: FusedEnsemble) -> None:
        super().__init__()
        self.members, self.reduce = ensemble.members, ensemble.reduce

    def forward(self, *inputs: Tensor) -> Any:
        outputs = torch.stack([member(*inputs) for member in self.members])
        if self.reduce == "none":
            return outputs
        return outputs.mean(0), outputs.std(0)


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], most_rows: int = 2**31 - 1) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=1, max=most_rows)
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    shapes: tuple[Any, ...] = ({0: rows},) * len(inputs)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        # what *inputs takes is one argument to torch.export
        shapes = (*shapes[: len(named)], shapes[len(named) :])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # whatever the author's code raises when it is traced
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(
            f"export: torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {first}"
        ) from error


def _onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> tuple[str, Run]:
    from .export_onnx import need_onnx, run_onnx, write_onnx

    _, onnxruntime = need_onnx()
    if any(t.dtype == torch.bfloat16 for t in (*inputs, *model.parameters())):
        raise TypeError("export: the model is bfloat16, which onnxruntime does not run; export model.float()")
    write_onnx(_trace(unfused(model), inputs), path)
    return f"onnxruntime {onnxruntime.__version__}", lambda given: run_onnx(path, given)


def _pt2(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> tuple[str, Run]:
    with torch.no_grad():
        # an MLP is packed for its one launch at the first call, and is traced as that from then on
        model(*inputs)
    program = _trace(model, inputs)
    # written to memory first: on a full disk torch's own writer ends the process
    made = io.BytesIO()
    torch.export.save(program, made)
    path.write_bytes(made.getbuffer())
    loaded = torch.export.load(path).module()

    def run(given: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            return tensors(loaded(*given))

    return "torch.export", run


def _pte(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> tuple[str, Run]:
    from .export_pte import need_executorch, run_pte, write_pte

    need_executorch()
    write_pte(_trace(unfused(model), inputs, COMPARED), path)
    return "ExecuTorch", lambda given: tensors(run_pte(path, given))
