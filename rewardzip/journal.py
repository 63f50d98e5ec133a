"""Measurements on disk as they are made, one line of JSON each, so that a killed search goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FILE = "search.jsonl"


class Journal:
    """What has been measured, by key. Without a folder it is kept in memory alone."""

    def __init__(self, folder: str | os.PathLike[str] | None, subject: dict[str, Any]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.file = None if folder is None else Path(folder) / FILE
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        if self.file.exists():
            text = self.file.read_bytes()
            # a line cut short by a kill is a measurement that was not made
            whole = text[: text.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        theirs = lines[0]["subject"] if lines else subject
        changed = [key for key in subject if not isinstance(theirs, dict) or theirs.get(key) != subject[key]]
        if changed:
            raise ValueError(f"search: {self.file} is of another {' and another '.join(changed)}; give another folder")
        if not lines:
            self.file.write_bytes(b"")
            self._append({"subject": subject})
        elif len(whole) < self.file.stat().st_size:
            os.truncate(self.file, len(whole))
        self.entries = {line["key"]: line for line in lines[1:]}

    def add(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = {"key": key, **entry}
        self._append(self.entries[key])

    def _append(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
