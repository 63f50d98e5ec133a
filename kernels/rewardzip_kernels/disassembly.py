"""What a compiled kernel's machine code does, by kind of instruction, with no GPU.

NVIDIA: SASS, out of the cubin, by the ``cuobjdump`` that Triton ships. AMD: the AMDGCN assembly of the compiler itself.
Each instruction knows the loops it stands in; what one program executes is each instruction times its loops' counts.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# the first pattern that matches names the kind; SASS in capitals, AMDGCN in small letters
KINDS = {
    "tensor core": r"[HIQ]MMA|[HIQ]GMMA|UTC\w*MMA|v_s?mfma",
    "load 16": r"(LDG|LDGSTS)\S*\.128|(global|buffer|flat)_load_dwordx4",
    "load 8": r"(LDG|LDGSTS)\S*\.64|(global|buffer|flat)_load_dwordx2",
    "load 4": r"(LDG|LDGSTS)\b(?!\S*\.[US](8|16)\b)|(global|buffer|flat)_load_dword$",
    "load 1, 2": r"(LDG|LDGSTS)\b|(global|buffer|flat)_load_",
    "store": r"STG|RED|(global|buffer|flat)_store",
    "shared": r"LDSM?\b|STSM?\b|LDTM|STTM|ds_",
    "conversion": r"I2F|F2F|F2I|I2I|v_cvt|v_perm|PRMT",
    "special": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)",
    "other": r"",
}

# multiply-adds of one tensor-core instruction: rows, columns and inputs as its name gives them
SHAPES = (
    (r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", lambda m, n, k: m * n * k // 4),  # by four warps together
    (r"[HI]MMA\.16816", lambda: 16 * 8 * 16),
    (r"[HI]MMA\.1688", lambda: 16 * 8 * 8),
    (r"[HI]MMA\.16832", lambda: 16 * 8 * 32),
    (r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", lambda m, n, k: m * n * k),
)

# backward branches over fewer instructions wait for a barrier
SPIN = 8


@dataclass(frozen=True)
class Instruction:
    name: str
    loops: tuple[int, ...] = ()  # the loops it stands in, outermost first, numbered as they begin


@dataclass(frozen=True)
class Executed:
    """What one warp of one program executes."""

    kinds: dict[str, float]
    vector: float  # AMD: those on the vector units; a scheduler issues the others beside them
    multiply_adds: float | None  # on tensor cores; None where the instructions' names do not tell

    def slots(self, cycles: int) -> float:
        """Cycles of its scheduler, one instruction a cycle, or ``cycles`` for each vector instruction."""
        return self.vector * cycles if self.vector else sum(self.kinds.values())


def tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def sass_text(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-sass", file.name]
        done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def sass(text: str) -> list[Instruction]:
    """Up to the last EXIT: behind it lie waits that are seldom entered, and padding."""
    line = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s*([^;]*);"
    found = [(int(at, 16), name, rest) for at, name, rest in re.findall(line, text)]
    end = max((at for at, name, _ in found if name == "EXIT"), default=0)
    found = [one for one in found if one[0] <= end and one[1] != "NOP"]
    ranges = []
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        if name.startswith("BRA") and target and int(target[1], 16) <= at:
            start = int(target[1], 16)
            if sum(start <= other <= at for other, _, _ in found) >= SPIN:
                ranges.append((start, at))
    # two branches back to one place are one loop
    spans = sorted({start: max(b for a, b in ranges if a == start) for start, _ in ranges}.items())
    return [
        Instruction(name, tuple(i for i, (first, last) in enumerate(spans) if first <= at <= last))
        for at, name, _ in found
    ]


def amdgcn(text: str) -> list[Instruction]:
    """The compiler notes beside each block the loop it is in, and beside a loop's first block the loop's parents."""
    blocks: list[tuple[str, str | None, list[str]]] = []  # label, header of its innermost loop, instructions
    around: dict[str, list[str]] = {}  # a loop's header, its parents' and itself, outermost first
    parents: list[str] = []
    for line in text.partition("; -- End function")[0].splitlines():
        code, _, comment = line.partition(";")
        label = re.match(r"\.L(BB\d+_\d+):", code)
        if label or comment.startswith(" %bb.") or not blocks:
            blocks.append((label[1] if label else "", None, []))
            parents = []
        name, _, names = blocks[-1]
        if inside := re.search(r"in Loop: Header=(BB\d+_\d+)", comment):
            blocks[-1] = name, inside[1], names
        if parent := re.search(r"Parent Loop (BB\d+_\d+)", comment):
            parents.append(parent[1])
        if "Loop Header: Depth" in comment:
            around[name] = [*parents, name]
            blocks[-1] = name, name, names
        if instruction := re.match(r"\s+([sv]_\w+|ds_\w+|(?:global|buffer|flat)_\w+)", code):
            names.append(instruction[1])
    order = {header: i for i, header in enumerate(around)}
    return [
        Instruction(one, tuple(order[loop] for loop in around.get(header or "", ())))
        for _, header, names in blocks
        for one in names
    ]


def instructions(compiled: Any) -> list[Instruction]:
    return amdgcn(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else sass(sass_text(compiled.asm["cubin"]))


def kind(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, name))


def _multiply_adds(name: str) -> int | None:
    for pattern, size in SHAPES:
        if shape := re.match(pattern, name):
            return size(*map(int, shape.groups()))
    return None


def executed(code: Sequence[Instruction], steps: Sequence[float], pipelined: bool) -> Executed:
    """``steps``: how often each loop's body is asked for. A pipelined loop runs some of them before and behind it."""
    loops = 1 + max((loop for one in code for loop in one.loops), default=-1)
    if loops != len(steps):
        raise ValueError(f"the machine code has {loops} loops, {len(steps)} were expected")
    inside = Counter(one.loops for one in code if kind(one.name) == "tensor core")
    counts = list(steps)
    if pipelined and loops == 1 and inside[(0,)]:
        counts[0] -= inside[()] // inside[(0,)]
    kinds = dict.fromkeys(KINDS, 0.0)
    sizes: list[float] = []
    vector = 0.0
    for one in code:
        times = prod(counts[loop] for loop in one.loops)
        kinds[kind(one.name)] += times
        if one.name.startswith("v_") and kind(one.name) != "tensor core":
            vector += times
        if kind(one.name) == "tensor core":
            size = _multiply_adds(one.name)
            sizes.append(float("nan") if size is None else size * times)
    total = sum(sizes)
    return Executed(kinds, vector, None if total != total else total)
