"""What a scoring run is to do: which rows of which parquet file make which part, written down before the first row.

The plan depends on the inputs alone, so a run that was killed, or goes on with another engine, cuts the same parts.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Columns = Sequence[str | Sequence[str]]


def need_pyarrow() -> Any:
    """pyarrow with its parquet and compute modules, or an error that names the extra."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("score reads parquet with pyarrow: pip install rewardzip[score]") from error
    return pyarrow


@dataclass(frozen=True)
class Part:
    """Whole row groups of one file, which become one file of scores."""

    name: str
    file: str
    row_groups: tuple[int, ...]
    first_row: int
    rows: int


@dataclass(frozen=True)
class Plan:
    """``columns`` has one entry per input of the model, each (name, width) in order; ``files`` is below ``root``."""

    root: Path
    columns: tuple[tuple[tuple[str, int], ...], ...]
    keep: tuple[str, ...]
    parts: tuple[Part, ...]
    footers: dict[str, str]

    @property
    def widths(self) -> list[int]:
        return [sum(width for _, width in group) for group in self.columns]

    @property
    def names(self) -> list[str]:
        """Every column to read, once."""
        return list(dict.fromkeys([name for group in self.columns for name, _ in group] + list(self.keep)))

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def make_plan(
    inputs: Inputs, columns: Columns, keep: Sequence[str], part_rows: int, output: Path, progress: bool
) -> Plan:
    """Look at every file's footer, and refuse what cannot be scored before anything is written."""
    pa = need_pyarrow()
    if part_rows < 1:
        raise ValueError(f"score: part_rows is {part_rows}; it must be 1 or more")
    files = find_files(inputs, output)
    root = Path(os.path.commonpath([file.parent for file in files]))
    chosen: tuple[tuple[tuple[str, int], ...], ...] = ()
    parts: list[tuple[str, list[int], int, int]] = []
    footers, fields = {}, {}
    from rich.progress import track

    for file in track(files, "reading footers", transient=True, disable=not progress or len(files) < 100):
        name = file.relative_to(root).as_posix()
        footers[name] = _footer_hash(file)
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            if not chosen:
                chosen = _choose(pa, columns, parquet, file)
                for column in keep:
                    fields[column] = _field(schema, column, file).type
            _check_same(pa, chosen, fields, schema, file, files[0])
            parts += [(name, *piece) for piece in _pieces(parquet.metadata, part_rows)]
    if not parts:
        raise ValueError(f"score: the {len(files)} files of {inputs} hold no rows")
    digits = max(6, len(str(len(parts))))
    numbered = (
        Part(f"part-{i:0{digits}}.parquet", file, tuple(groups), first, rows)
        for i, (file, groups, first, rows) in enumerate(parts)
    )
    return Plan(root, chosen, tuple(keep), tuple(numbered), footers)


def find_files(inputs: Inputs, output: Path) -> list[Path]:
    """The parquet files of paths, globs and folders, sorted; in a folder, hidden names and the output are passed by."""
    found: set[Path] = set()
    for given in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        path = Path(given)
        if path.is_dir():
            below = [p for p in path.rglob("*.parquet") if not _hidden(p.relative_to(path))]
            files = [p.resolve() for p in below if not p.resolve().is_relative_to(output)]
        elif path.exists():
            files = [path.resolve()]
        else:
            files = [Path(p).resolve() for p in glob.glob(str(given), recursive=True)]
        if not files:
            raise ValueError(f"score: {given} is no file and no folder of *.parquet, and matches nothing")
        found.update(files)
    if not found:
        raise ValueError("score: there are no inputs")
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _opened(file: Path) -> Any:
    pa = need_pyarrow()
    try:
        return pa.parquet.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise ValueError(f"score: {file} ({size} bytes) is not a whole parquet file: {error}") from error


def _footer_hash(file: Path) -> str:
    """Of the file's size and footer, which has the places and statistics of everything in it."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        length = int.from_bytes(stream.read(8)[:4], "little")
        stream.seek(max(0, size - 8 - length))
        return hashlib.sha256(size.to_bytes(8, "little") + stream.read()).hexdigest()


def _field(schema: Any, name: str, file: Path) -> Any:
    places = schema.get_all_field_indices(name)
    if len(places) != 1:
        has = "twice" if places else "not"
        raise ValueError(f"score: column {name!r} is {has} in {file}, which has {', '.join(schema.names)}")
    return schema.field(places[0])


def _choose(pa: Any, columns: Columns, parquet: Any, file: Path) -> tuple[tuple[tuple[str, int], ...], ...]:
    """(name, width) of each column of each input; wildcards stand for the columns they match, in the file's order."""
    schema = parquet.schema_arrow
    if isinstance(columns, str) or not columns:
        raise ValueError(f"score: columns is {columns!r}; it must be a list with one entry per input of the model")
    groups = []
    for entry in columns:
        given = [name.strip() for name in entry.split(",")] if isinstance(entry, str) else list(entry)
        names: list[str] = []
        for name in given:
            matching = [n for n in schema.names if fnmatch.fnmatchcase(n, name)]
            names += [name] if name in schema.names or not matching else matching
        groups.append(tuple((name, _width(pa, parquet, name, file)) for name in names))
        if not groups[-1]:
            raise ValueError(f"score: columns has an entry without a name: {columns!r}")
    return tuple(groups)


def _width(pa: Any, parquet: Any, name: str, file: Path) -> int:
    kind = _field(parquet.schema_arrow, name, file).type
    _check_number(pa, kind, name, file)
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    if not _is_list(pa, kind):
        return 1
    # a list that happens to be of one length everywhere: the first row that has one says which
    for batch in parquet.iter_batches(batch_size=1024, columns=[name]):
        lengths = pa.compute.list_value_length(batch.column(name)).drop_null()
        if len(lengths):
            return int(lengths[0].as_py())
    raise ValueError(f"score: column {name!r} of {file} is null in every row: how wide it is cannot be seen")


def _is_list(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_number(pa: Any, kind: Any, name: str, file: Path) -> None:
    inner = kind.value_type if _is_list(pa, kind) else kind
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
        raise TypeError(f"score: column {name!r} of {file} is {kind}; it must hold numbers or lists of numbers")


def _check_same(pa: Any, chosen: Any, fields: dict[str, Any], schema: Any, file: Path, first: Path) -> None:
    """That a file has the columns the first one has, as wide."""
    for group in chosen:
        for name, width in group:
            kind = _field(schema, name, file).type
            _check_number(pa, kind, name, file)
            here = kind.list_size if pa.types.is_fixed_size_list(kind) else None if _is_list(pa, kind) else 1
            if here not in (None, width):
                raise ValueError(f"score: column {name!r} is {here} wide in {file}, but {width} in {first}")
    for name, kind in fields.items():
        found = _field(schema, name, file).type
        if found != kind:
            raise TypeError(f"score: column {name!r}, to be kept, is {found} in {file}, but {kind} in {first}")


def _pieces(metadata: Any, part_rows: int) -> Iterable[tuple[list[int], int, int]]:
    """(row groups, first row, rows): as many row groups together as come to ``part_rows`` or just over."""
    groups: list[int] = []
    first = rows = 0
    for i in range(metadata.num_row_groups):
        count = metadata.row_group(i).num_rows
        groups, rows = [*groups, i], rows + count
        if rows >= part_rows:
            yield groups, first, rows
            groups, first, rows = [], first + rows, 0
    if rows:
        yield groups, first, rows
