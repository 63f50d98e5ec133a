"""The instruction sets: what each one's dot product of four bytes looks like, and which one this processor gets.

    x  four consecutive inputs of a row, u8 = int8 + zero_point, in each 32-bit lane
    w  four int8 weights of one output in each lane
    acc[lane] += x0 w0 + x1 w1 + x2 w2 + x3 w3, exact in int32

An LLVM intrinsic that the processor lacks aborts the whole process: ``available`` reads the very features that Numba
compiles for, and ``choose`` refuses anything else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features

# (builder, values) -> values
Emit = Callable[..., Any]

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


@dataclass(frozen=True)
class InstructionSet:
    """``rows`` by ``vectors`` is the register tile of int8: its sums and operands fill the registers, none spill."""

    name: str
    features: tuple[str, ...]
    lanes: int
    rows: int
    vectors: int
    zero_point: int
    dot: Emit
    """(builder, acc, what split_x gave, what split_w gave) -> acc"""
    split_x: Emit = lambda builder, x: x
    split_w: Emit = lambda builder, w: w


def call(builder, name, result, *args):
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _vnni(width):
    def dot(builder, acc, x, w):
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{width}", acc.type, acc, x, w)

    return dot


def constant(vector_type, value):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _pairs(builder, v):
    return builder.bitcast(v, ir.VectorType(I16, 2 * v.type.count))


def _avx2_split_x(builder, x):
    """Bytes 0 and 2, then 1 and 3, as 16-bit integers: pairs of products cannot saturate as vpmaddubsw's do."""
    pairs = _pairs(builder, x)
    return builder.and_(pairs, constant(pairs.type, 255)), builder.lshr(pairs, constant(pairs.type, 8))


def _avx2_split_w(builder, w):
    pairs = _pairs(builder, w)
    eight = constant(pairs.type, 8)
    return builder.ashr(builder.shl(pairs, eight), eight), builder.ashr(pairs, eight)


def _avx2_dot(builder, acc, x, w):
    for x_pairs, w_pairs in zip(x, w, strict=True):
        acc = builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, x_pairs, w_pairs))
    return acc


def _neon_dot(builder, acc, x, w):
    bytes_type = ir.VectorType(I8, 16)
    x, w = builder.bitcast(x, bytes_type), builder.bitcast(w, bytes_type)
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, w, x)


def _portable_split_x(builder, x):
    mask = constant(x.type, 255)
    return [builder.and_(builder.lshr(x, constant(x.type, 8 * i)), mask) for i in range(4)]


def signed_byte(builder, w, i):
    """Byte i of each lane as int32."""
    return builder.ashr(builder.shl(w, constant(w.type, 24 - 8 * i)), constant(w.type, 24))


def _portable_split_w(builder, w):
    return [signed_byte(builder, w, i) for i in range(4)]


def _portable_dot(builder, acc, x, w):
    for x_byte, w_byte in zip(x, w, strict=True):
        acc = builder.add(acc, builder.mul(x_byte, w_byte))
    return acc


# best first
INSTRUCTION_SETS = {
    i.name: i
    for i in (
        InstructionSet("avx512_vnni", ("avx512vnni", "avx512f", "avx512bw", "avx512vl"), 16, 6, 4, 128, _vnni(512)),
        InstructionSet("avx_vnni", ("avxvnni",), 8, 6, 2, 128, _vnni(256)),
        InstructionSet("avx2", ("avx2",), 8, 4, 2, 128, _avx2_dot, _avx2_split_x, _avx2_split_w),
        InstructionSet("neon_dot", ("dotprod",), 4, 6, 4, 0, _neon_dot),
        InstructionSet("portable", (), 4, 2, 2, 128, _portable_dot, _portable_split_x, _portable_split_w),
    )
}


@lru_cache
def target() -> tuple[str, str]:
    """(processor, its features) that Numba compiles for: the host's, or NUMBA_CPU_NAME and NUMBA_CPU_FEATURES."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return config.CPU_NAME or llvm.get_host_cpu_name(), features


@lru_cache
def processor_features() -> frozenset[str]:
    return frozenset(f[1:] for f in target()[1].split(",") if f.startswith("+"))


@lru_cache
def available() -> tuple[str, ...]:
    """The names of the instruction sets this processor can run, best first."""
    features = processor_features()
    return tuple(i.name for i in INSTRUCTION_SETS.values() if features.issuperset(i.features))


def choose(name: str | None = None) -> InstructionSet:
    """The named instruction set, or the best there is."""
    if name is None:
        return INSTRUCTION_SETS[available()[0]]
    if name not in available():
        raise ValueError(f"instruction set {name!r} is not among this processor's: {', '.join(available())}")
    return INSTRUCTION_SETS[name]
