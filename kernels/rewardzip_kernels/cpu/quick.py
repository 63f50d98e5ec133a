"""What surrounds a kernel at a settled call, in machine code: the inputs looked at, the output made, the kernel called.

At one row Python's own frames and attribute look-ups cost ten times what the arithmetic does. torch's C interface (the
one that its compiled models use) tells a tensor's sizes and makes the output; the two of its functions that are C++
are looked for by name. Where anything is missing or elsewhere than expected there is none of this, and what is written
in Python does the same.

    settled(...)  a function of the inputs, and of an address to work at where the kernel needs one: the output, or None
                  where an input is not dense, of this type and sizes, on a CPU, or a watched tensor was written to
    changed(...)  a function that says whether tables hold other tensors, or tensors were written to or given other data
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from . import threads
from .calling import OWN, packed
from .engine import kernel
from .pointers import bits_of, i32, i64, load, stack, store

WORDS = 64
HEADER = (
    "none", "tensor_type", "tensor_at", "run", "inputs", "words", "y_dim", "y_at", "scratch_at", "table_at",
    "table_from", "watched", "version", "dtype", "keys_at", "negated",
)  # fmt: skip
DTYPES, CPU, STRIDED = {torch.float32: 6, torch.bfloat16: 15}, 0, 0

_sizes = types.ExternalFunction("aoti_torch_get_sizes", types.int32(types.int64, types.int64))
_dim = types.ExternalFunction("aoti_torch_get_dim", types.int32(types.int64, types.int64))
_dtype = types.ExternalFunction("aoti_torch_get_dtype", types.int32(types.int64, types.int64))
_device = types.ExternalFunction("aoti_torch_get_device_type", types.int32(types.int64, types.int64))
_layout = types.ExternalFunction("aoti_torch_get_layout", types.int32(types.int64, types.int64))
_is_contiguous = types.ExternalFunction("aoti_torch_is_contiguous", types.int32(types.int64, types.int64))
_data = types.ExternalFunction("aoti_torch_get_data_ptr", types.int32(types.int64, types.int64))
_int32, _int64 = types.int32, types.int64
_empty = types.ExternalFunction(
    "aoti_torch_empty_strided", _int32(_int64, _int64, _int64, _int32, _int32, _int32, _int64)
)
_delete = types.ExternalFunction("aoti_torch_delete_tensor_object", types.int32(types.int64))
_wrap = types.ExternalFunction("_Z16THPVariable_WrapRKN2at10TensorBaseE", types.int64(types.int64))
_version = types.ExternalFunction("_ZNK2at10TensorBase8_versionEv", types.int64(types.int64))
_keep = types.ExternalFunction("Py_IncRef", types.void(types.int64))
_number = types.ExternalFunction("PyLong_AsLongLong", types.int64(types.int64))
_find = types.ExternalFunction("PyDict_GetItem", types.int64(types.int64, types.int64))

FROM_TORCH = (_sizes, _dim, _dtype, _device, _layout, _is_contiguous, _data, _empty, _delete, _wrap, _version)


@intrinsic
def _run(typing_context, address, words):
    def emit(context, builder, signature, args):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word.as_pointer()]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], word.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


_words_memory, _small_memory = stack(types.int64, WORDS), stack(types.int64, 8)


def _build_settled():
    header = len(HEADER)

    def settled(block, arguments, count, result):
        none, tensor_type, tensor_at, run, inputs, size, y_dim = (
            load(i64(block), 0), load(i64(block), 1), load(i64(block), 2), load(i64(block), 3), load(i64(block), 4),
            load(i64(block), 5), load(i64(block), 6),
        )  # fmt: skip
        y_at, scratch_at, table_at, table_from, watched, version, dtype, keys_at, negated = (
            load(i64(block), 7), load(i64(block), 8), load(i64(block), 9), load(i64(block), 10), load(i64(block), 11),
            load(i64(block), 12), load(i64(block), 13), load(i64(block), 14), load(i64(block), 15),
        )  # fmt: skip
        words, small = _words_memory(), _small_memory()
        at = block + header * 8
        fits = count == inputs + (1 if scratch_at >= 0 else 0)
        if fits:
            # of the tensors' versions only the sum is asked
            for i in range(watched):
                version -= _version(load(i64(at), i))
            fits = version == 0
        at += watched * 8
        if fits:
            for i in range(size):
                store(i64(words), i, load(i64(at), i))
        at += size * 8
        for i in range(inputs):
            dim, place = load(i64(at), 0), load(i64(at), 1)
            if fits:
                x = load(i64(arguments), i)
                fits = load(i64(x), 1) == tensor_type
                x += tensor_at
            if fits:
                store(i64(small), 1, 0)
                store(i64(small), 2, 0)
                store(i64(small), 3, 0)
                failed = _dim(x, small) + _dtype(x, small + 8) + _device(x, small + 16) + _layout(x, small + 24)
                kind = load(i64(small), 1) == dtype and load(i64(small), 2) == CPU and load(i64(small), 3) == STRIDED
                fits = failed == 0 and kind and load(i64(small), 0) == dim
            if fits:
                store(i64(small), 2, 0)
                failed = _sizes(x, small) + _data(x, small + 8) + _is_contiguous(x, small + 16)
                keys = load(i64(load(i64(x), 0) + keys_at), 0)
                fits = failed == 0 and load(i64(small), 2) != 0 and keys & negated == 0
                sizes = load(i64(small), 0)
                for j in range(dim):
                    fits = fits and load(i64(sizes), j) == load(i64(at), 2 + j)
                store(i64(words), place, load(i64(small), 1))
            at += (2 + dim) * 8
        if fits:
            fits = _empty(y_dim, at, at + y_dim * 8, dtype, CPU, -1, small) == 0
        if fits:
            y = load(i64(small), 0)
            _data(y, words + y_at * 8)
            if scratch_at >= 0:
                store(i64(words), scratch_at, _number(load(i64(arguments), inputs)))
            if table_at >= 0:
                store(i64(words), table_at, words + table_from * 8)
            _run(run, words)
            store(i64(result), 0, _wrap(y))
            _delete(y)
        else:
            _keep(none)
            store(i64(result), 0, none)

    return settled, OWN


def _build_changed():
    def changed(block, arguments, count, result):
        false, true, entries, watched, version, moved, samples = (
            load(i64(block), 0), load(i64(block), 1), load(i64(block), 2), load(i64(block), 3), load(i64(block), 4),
            load(i64(block), 5), load(i64(block), 6),
        )  # fmt: skip
        place = _small_memory()
        at = block + 56
        same = True
        for _ in range(entries):
            same = same and _find(load(i64(at), 0), load(i64(at), 1)) == load(i64(at), 2)
            at += 24
        for _ in range(watched):
            version -= _version(load(i64(at), 0))
            at += 8
        for _ in range(moved):
            same = same and _data(load(i64(at), 0), place) == 0 and load(i64(place), 0) == load(i64(at), 1)
            at += 16
        if same:
            # their memory is where it was
            for _ in range(samples):
                same = same and load(i32(load(i64(at), 0)), 0) == load(i64(at), 1)
                at += 16
        answer = false if same and version == 0 else true
        _keep(answer)
        store(i64(result), 0, answer)

    return changed, OWN


def settled(
    run: Any,
    words: Sequence[int | float],
    inputs: Sequence[tuple[torch.Size, int]],
    shape: Sequence[int],
    *,
    y_at: int,
    scratch_at: int = -1,
    table: tuple[int, int] = (-1, 0),
    watched: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Tensor | None] | None:
    """``run`` called with these words, once the addresses of the inputs, of the output and of scratch stand in them.

    ``inputs`` are shapes, each with the word where its address goes; ``table`` is a word for the address of another,
    where the kernel reads a table. The caller keeps alive what words and ``watched`` point to.
    """
    found, dim, code = _found(), len(shape), run.__self__
    if found is None or len(words) > WORDS or dim > 8 or any(len(s) > 8 for s, _ in inputs):
        return None
    at, keys, make, _ = found
    letters = code.arguments.ljust(len(words), "i")
    bits = [bits_of(word) if letter == "f" else int(word) for word, letter in zip(words, letters, strict=True)]
    strides = [1] * dim
    for i in reversed(range(dim - 1)):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    block = [id(None), id(Tensor), at, packed(code), len(inputs), len(words), dim, y_at, scratch_at, *table]
    block += len(watched), sum([t._version for t in watched]), DTYPES[dtype], *keys
    block += *[id(t) + at for t in watched], *bits
    for size, place in inputs:
        block += len(size), place, *size
    call: Callable[..., Tensor | None] = make(_bytes([*block, *shape, *strides]))
    return call


def settled_rows(
    run: Any,
    before: Sequence[int | float],
    after: Sequence[int],
    x: Tensor,
    out: Sequence[int],
    size: int,
    watched: Sequence[Tensor],
    held: Any,
) -> Callable[[Tensor], Tensor | None]:
    """``settled`` for one layer and rows like x: ``run(*before, scratch, x, rows, y, *after)``, with ``size`` bytes.

    ``held`` is kept alive with the call, which sees what is written there.
    """
    m, at, version = x.shape[:-1].numel(), len(before), sum([t._version for t in watched])
    words, inputs, dtype = [*before, 0, 0, m, 0, *after], [(x.shape, at + 1)], x.dtype
    quick = settled(run, words, inputs, out, y_at=at + 3, scratch_at=at, watched=watched, dtype=dtype)
    if quick is not None:
        return _with_scratch(quick, size, (watched, held))

    def call(x: Tensor, held: Any = held) -> Tensor | None:
        if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous() or x.is_neg():
            return None
        if sum([t._version for t in watched]) != version:
            return None
        y = x.new_empty(*out)
        run(*before, threads.scratch(size), x.data_ptr(), m, y.data_ptr(), *after)
        return y

    return call


def _with_scratch(quick: Callable[..., Tensor | None], size: int, held: Any) -> Callable[[Tensor], Tensor | None]:
    def call(x: Tensor, held: Any = held) -> Tensor | None:
        return quick(x, threads.scratch(size))

    return call


def changed(
    entries: Sequence[tuple[Any, str, Tensor | None]],
    watched: Sequence[Tensor],
    version: int,
    moved: Sequence[tuple[Tensor, int]],
    samples: Sequence[tuple[int, int]],
) -> Callable[[], bool] | None:
    """Whether a table gives another tensor for a key, ``watched`` have been written to, ``moved`` lie elsewhere, or at
    an address another int32 stands than the one that ``samples`` has for it.

    The caller keeps alive all that is named here.
    """
    found = _found()
    if found is None:
        return None
    at, _, _, make = found
    block = [id(False), id(True), len(entries), len(watched), version, len(moved), len(samples)]
    for table, key, tensor in entries:
        block += id(table), id(key), 0 if tensor is None and key not in table else id(tensor)
    block += [id(t) + at for t in watched]
    for t, address in moved:
        block += id(t) + at, address
    for sample in samples:
        block += sample
    made: Callable[[], bool] = make(_bytes(block))
    return made


def _bytes(block: Sequence[int]) -> bytes:
    return struct.pack(f"{len(block)}q", *block)


@lru_cache
def _found() -> tuple[int, tuple[int, int], Any, Any] | None:
    """Where a tensor lies in its Python object, where in it its keys are and which of their bits says that its numbers
    stand negated, and what makes the functions; None where this torch is another.
    """
    at, keys = _tensor_at(), _keys()
    if at is None or keys is None or not _known_to_llvm():
        return None
    made = kernel(("settled",), _build_settled), kernel(("changed",), _build_changed)
    return None if None in made else (at, keys, *made)


def _tensor_at() -> int | None:
    tensor = torch.empty(1, dtype=torch.float32, device="cpu")
    for at in (16, 24):
        words = ctypes.cast(id(tensor) + at, ctypes.POINTER(ctypes.c_uint64))
        if words[0] == tensor._cdata:
            return at
    return None


def _keys() -> tuple[int, int] | None:
    tensor = torch.empty(1, dtype=torch.float32, device="cpu")
    try:
        both = tensor, tensor._neg_view()
        plain, negated = (torch._C._dispatch_keys(t).raw_repr() for t in both)
    except AttributeError:
        return None
    words = [ctypes.cast(t._cdata, ctypes.POINTER(ctypes.c_uint64)) for t in both]
    for i in range(24):
        if (words[0][i], words[1][i]) == (plain, negated):
            return 8 * i, plain ^ negated
    return None


def _known_to_llvm() -> bool:
    folder = Path(torch.__file__).parent / "lib"
    try:
        libraries = [ctypes.CDLL(str(next(folder.glob(f"libtorch_{name}.*")))) for name in ("cpu", "python")]
    except (OSError, StopIteration):
        return False
    for function in FROM_TORCH:
        places = [getattr(library, function.symbol, None) for library in libraries]
        place = next((p for p in places if p is not None), None)
        if place is None:
            return False
        llvm.add_symbol(function.symbol, ctypes.cast(place, ctypes.c_void_p).value)
    return True
