"""From a Python function to the address of machine code, compiled at first use and kept on disk.

A kernel's arguments are integers (addresses, counts) and floats. ``calling.py`` makes it callable, not Numba's dispatch
nor the wrapper of a ``cfunc``: all that wrapper adds is the road from a Numba exception to Python, and kernels raise
none. So its object code needs nothing but libc, and is kept in a file named by a hash of all it depends on: this
folder's sources, the versions of Numba and llvmlite, the processor, its key. Loading it starts neither Numba's type
system nor its compiler. A file that cannot be read, written or trusted (its first 32 bytes are the hash of the rest)
means compiling again, never an error.
"""

import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import compiler, compiler_lock, config, types
from numba.core.registry import cpu_target

from .calling import OWN, execution_engine, python_function
from .instruction_sets import target

Build = Callable[[], tuple[Callable[..., None], str]]

_lock = threading.Lock()
_kernels: dict[tuple[str, ...], Any] = {}
_kept_alive: list[Any] = []

_TYPES = {"i": (types.int64,), "f": (types.float32,), "b": (types.int64,), OWN: (types.int64,) * 4}


def kernel(key: tuple[str, ...], build: Build) -> Any:
    """The compiled kernel of this key; None, with one warning, where it cannot be compiled.

    ``build`` gives the Python function and its argument letters: ``calling.py``.
    """
    try:
        return _kernels[key]
    except KeyError:
        pass
    with _lock:
        if key not in _kernels:
            try:
                _kernels[key] = _load_or_compile(key, build)
            except Exception as error:
                _kernels[key] = None
                warnings.warn(
                    f"Numba could not compile {' '.join(key)}, which runs as plain torch, right but slow: {error!r}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return _kernels[key]


def _load_or_compile(key: tuple[str, ...], build: Build) -> Any:
    path = _path(key)
    try:
        arguments, name, code = _unpack(path.read_bytes())
        address = _link(name, code)
    except (OSError, ValueError):
        function, arguments = build()
        name, code, address = _compile(function, arguments)
        _write(path, _pack(arguments, name, code))
    return python_function(address, arguments)


def _compile(function: Callable[..., None], arguments: str) -> tuple[str, bytes, int]:
    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    contexts = cpu_target.typing_context, cpu_target.target_context
    types_ = tuple(kind for letter in arguments for kind in _TYPES[letter])
    with compiler_lock.global_compiler_lock:
        compiled = compiler.compile_extra(*contexts, function, types_, types.void, flags, {})
        name, library = compiled.fndesc.llvm_func_name, compiled.library
        address = library.get_pointer_to_function(name)
    _kept_alive.append(compiled)
    return name, library._get_compiled_object(), address


def _link(name: str, code: bytes) -> int:
    engine = execution_engine()
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept_alive.append(engine)
    address: int = engine.get_function_address(name)
    if not address:
        raise ValueError(f"the object code holds no function {name}")
    return address


def _pack(arguments: str, name: str, code: bytes) -> bytes:
    body = f"{arguments} {name}\n".encode() + code
    return hashlib.sha256(body).digest() + body


def _unpack(data: bytes) -> tuple[str, str, bytes]:
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("the cached kernel is damaged")
    header, _, code = body.partition(b"\n")
    arguments, _, name = header.decode().partition(" ")
    return arguments, name, code


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: another process may be reading, or writing the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        pass


def _path(key: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(_environment())
    digest.update("\0".join(key).encode())
    return cache_folder() / f"{'-'.join(key)}-{digest.hexdigest()[:24]}.o"


@lru_cache
def _environment() -> bytes:
    digest = hashlib.sha256("\0".join((numba.__version__, llvmlite.__version__, *target())).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


def cache_folder() -> Path:
    """``rewardzip`` in NUMBA_CACHE_DIR where that is set, otherwise in the user's cache folder."""
    parent = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(parent) / "rewardzip"
