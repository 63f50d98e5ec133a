"""Rows of parquet to scores: columns side by side as the model's inputs; rows that cannot be scored are found here."""

from __future__ import annotations

import copy
import queue
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .int8 import Fused
from .nn import CompressedLinear
from .score_plan import Part, Plan, need_pyarrow
from .swap import swap

# what is read at once, in bytes of one batch's inputs; a few batches are in memory at any time
READ_BYTES = 4 << 20
# a model up to this size is copied for each thread, a larger one is shared and uses all threads for one batch
COPIED_BYTES = 64 << 20


@dataclass
class Found:
    """What was wrong with the rows of one part; goes into its footer as JSON."""

    bad_rows: int = 0
    not_finite: int = 0
    """Rows whose inputs were right and whose score is inf or NaN."""
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """"column: what" to (rows, the first of them in its file)."""

    def add(self, other: Found) -> None:
        self.bad_rows += other.bad_rows
        self.not_finite += other.not_finite
        for what, (count, first) in other.bad.items():
            known, earlier = self.bad.get(what, (0, first))
            self.bad[what] = known + count, earlier


class Scorer:
    """A model and how its inputs are made from a plan's columns."""

    def __init__(self, model: nn.Module, plan: Plan, batch_size: int, strict: bool) -> None:
        self.pa = need_pyarrow()
        self.plan, self.batch_size, self.strict = plan, batch_size, strict
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self.device, self.dtype = placement(model)
        on_cpu = self.device.type == "cpu"
        self.workers = torch.get_num_threads() if on_cpu and size <= COPIED_BYTES else 1
        self.outputs = self._probe(model)
        if on_cpu and size <= COPIED_BYTES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what cannot be fused runs as it is
                model = swap(model, Fused())
        self.schema = self._schema()
        self.models: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        for i in range(self.workers):
            self.models.put(copy.deepcopy(model) if i else model)
        row_bytes = 4 * sum(plan.widths)
        self.read_rows = max(1, READ_BYTES // (row_bytes * batch_size)) * batch_size

    def _probe(self, model: nn.Module) -> list[tuple[int | None, Any]]:
        """(width, or None for a number a row, and numpy type) of each output, from two rows of zeros."""
        shapes = [(2, width) for width in self.plan.widths]
        try:
            given = self.run(model, [torch.zeros(shape, dtype=self.dtype, device="cpu") for shape in shapes])
        except Exception as error:  # whatever the model's code raises for inputs it does not take
            raise ValueError(
                f"score: {type(model).__name__} cannot take inputs of the shapes {shapes}, which the columns make: "
                f"{type(error).__name__}: {error}"
            ) from error
        found = []
        for y in given:
            if y.dim() not in (1, 2) or y.shape[0] != 2 or not y.is_floating_point():
                raise ValueError(
                    f"score: for 2 rows the model gives {y.dtype} {tuple(y.shape)}; it must be floats [2] or [2, n]"
                )
            found.append((None if y.dim() == 1 or y.shape[1] == 1 else y.shape[1], numpy_of(y).dtype))
        return found

    def run(self, model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            y = model(*[x.to(self.device, non_blocking=True) for x in inputs])
        outputs = list(y) if isinstance(y, tuple | list) else [y]
        if not outputs or not all(isinstance(y, Tensor) for y in outputs):
            raise TypeError(f"score: the model gives {type(y).__name__}; it must give a tensor, or a tuple of them")
        return outputs

    def _schema(self) -> Any:
        """What is written: where the row came from, the columns kept, the scores."""
        pa = self.pa
        own = [pa.field("file", pa.dictionary(pa.int32(), pa.string())), pa.field("row", pa.int64())]
        first = pa.parquet.read_schema(self.plan.root / self.plan.parts[0].file)
        kept = [first.field(name).remove_metadata() for name in self.plan.keep]
        names = ["score"] if len(self.outputs) == 1 else [f"score_{i}" for i in range(len(self.outputs))]
        for name in self.plan.keep:
            if name in ("file", "row", *names) or self.plan.keep.count(name) > 1:
                raise ValueError(f"score: column {name!r} cannot be kept: the output has {', '.join(names)}, file, row")
        scores = []
        for name, (width, dtype) in zip(names, self.outputs, strict=True):
            kind = pa.from_numpy_dtype(dtype)
            scores.append(pa.field(name, kind if width is None else pa.list_(kind, width)))
        return pa.schema([*own, *kept, *scores])

    def score(self, batch: Any, part: Part, first_row: int) -> tuple[Any, Found]:
        """One batch as it is written, and what was wrong with it; on a thread of the pool."""
        inputs: list[np.ndarray] = []
        faults: dict[str, np.ndarray] = {}
        for group in self.plan.columns:
            x, wrong = self._input(batch, group)
            inputs.append(x)
            faults |= wrong
        found, bad = Found(), np.zeros(batch.num_rows, bool)
        for what, rows in faults.items():
            found.bad[what] = int(rows.sum()), first_row + int(rows.argmax())
            bad |= rows
        found.bad_rows = int(bad.sum())
        if faults and self.strict:
            what, (_, row) = next(iter(found.bad.items()))
            raise ValueError(f"score: {part.file}, row {row}: {what}; without strict such rows get no score")
        tensors = [torch.from_numpy(x).to(self.dtype) for x in inputs]
        model = self.models.get()
        try:
            blocks = [
                [numpy_of(y) for y in self.run(model, [x[i : i + self.batch_size] for x in tensors])]
                for i in range(0, batch.num_rows, self.batch_size)
            ]
        finally:
            self.models.put(model)
        scores = [np.concatenate(ys) for ys in zip(*blocks, strict=True)]
        finite = np.logical_and.reduce([np.isfinite(y).reshape(len(y), -1).all(1) for y in scores])
        found.not_finite = int((~finite & ~bad).sum())
        return self._table(batch, part, first_row, scores, bad if faults else None), found

    def _input(self, batch: Any, group: tuple[tuple[str, int], ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The columns of one input side by side, and the rows of each that cannot be scored, which are zeros here."""
        exact = np.float64 if self.dtype == torch.float64 else np.float32
        x = np.empty((batch.num_rows, sum(width for _, width in group)), exact)
        faults: dict[str, np.ndarray] = {}
        place = 0
        for name, width in group:
            part = x[:, place : place + width]
            faults |= self._fill(part, batch.column(name), name)
            place += width
        # one sum says that all is well; only where it is not finite is it worth looking which row it is
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(x.sum()):
                place = 0
                for name, width in group:
                    part = x[:, place : place + width]
                    place += width
                    for what, rows in (("NaN", np.isnan(part)), ("inf", np.isinf(part))):
                        if rows.any():
                            faults[f"{name}: {what}"] = np.asarray(rows.any(1))
        for rows in faults.values():
            x[rows] = 0
        return x, faults

    def _fill(self, part: np.ndarray, column: Any, name: str) -> dict[str, np.ndarray]:
        """Write a column into its place; the rows that have no value, or a list of another length."""
        pc, width = self.pa.compute, part.shape[1]
        faults: dict[str, np.ndarray] = {}
        good: np.ndarray | None = None
        if column.null_count:
            good = column.is_valid().to_numpy(zero_copy_only=False)
            faults[f"{name}: null"] = ~good
        nested = self.pa.types.is_nested(column.type)
        if nested and not self.pa.types.is_fixed_size_list(column.type):
            lengths = pc.fill_null(pc.list_value_length(column), width).to_numpy(zero_copy_only=False)
            if (lengths != width).any():
                faults[f"{name}: not {width} long"] = lengths != width
                good = (lengths == width) if good is None else good & (lengths == width)
        if good is not None:
            part[...] = 0
            column = column.filter(self.pa.array(good))
        values = column.flatten() if nested else column
        if values.null_count:  # a null inside a list
            inner = ~values.is_valid().to_numpy(zero_copy_only=False).reshape(-1, width).all(1)
            rows, column_nulls = np.zeros(len(part), bool), faults.get(f"{name}: null")
            rows[slice(None) if good is None else good] = inner
            faults[f"{name}: null"] = rows if column_nulls is None else rows | column_nulls
            values = pc.fill_null(values, False if self.pa.types.is_boolean(values.type) else 0)
        numbers = values.to_numpy(zero_copy_only=False).reshape(-1, width)
        with np.errstate(over="ignore", invalid="ignore"):
            # a float64 beyond fp32 becomes inf, and is found as that
            part[slice(None) if good is None else good] = numbers
        return faults

    def _table(self, batch: Any, part: Part, first_row: int, scores: list[np.ndarray], bad: Any) -> Any:
        pa, n = self.pa, batch.num_rows
        file = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([part.file]))
        arrays = [file, pa.array(np.arange(first_row, first_row + n)), *(batch.column(k) for k in self.plan.keep)]
        for (width, _), y in zip(self.outputs, scores, strict=True):
            if width is None:
                arrays.append(pa.array(y.reshape(-1), mask=bad))
            else:
                mask = None if bad is None else pa.array(bad)
                arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(y.reshape(-1)), width, mask=mask))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model's numbers are, and the type of its inputs."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = {t.dtype for t in model.parameters() if t.is_floating_point()}
    kinds |= {m.dtype for m in model.modules() if isinstance(m, CompressedLinear)}
    return tensors[0].device if tensors else torch.device("cpu"), kinds.pop() if len(kinds) == 1 else torch.float32


def numpy_of(y: Tensor) -> np.ndarray:
    y = y.detach().float() if y.dtype == torch.bfloat16 else y.detach()
    return y.cpu().numpy()
