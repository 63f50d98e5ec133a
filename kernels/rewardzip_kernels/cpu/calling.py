"""Machine code as a Python function: a C function of CPython's own calling convention around an address.

    entry(self, args, count):  every argument to int64 or float32, the GIL released, the kernel called, None

A ``bytes`` arrives as the address of what it holds. A kernel of the argument OWN is no such function but one that takes
Python's arguments as they come, with the GIL, and gives a Python object: ``quick.py``.

A third of the cost of ctypes, which matters at one row. It is so small that it is compiled anew in each process.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

METH_FASTCALL = 0x80


class _Method(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("documentation", ctypes.c_char_p),
    )


_new = ctypes.pythonapi.PyCFunction_NewEx
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.POINTER(_Method), ctypes.py_object, ctypes.c_void_p)

_kept_alive: list[Any] = []


class Code(NamedTuple):
    """Where a kernel lies, a letter per argument (i int64, f float32, b bytes): ``__self__`` of its Python function."""

    address: int
    arguments: str


OWN = "o"
i32, i64, f32, f64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
pointer = ir.IntType(8).as_pointer()


def python_function(address: int, arguments: str) -> Any:
    """A callable for the kernel at ``address``, which checks no argument.

    For OWN, of (block, arguments, their count, where the result goes): a function that binds the first, a ``bytes``.
    """
    code = Code(address, arguments)
    if arguments != OWN:
        return _new(ctypes.byref(_method(_entry(code))), code, None)
    method = _method(_own_entry(address))
    return lambda block: _new(ctypes.byref(method), block, None)


@lru_cache(maxsize=256)
def packed(code: Code) -> int:
    """The address of ``void(int64*)``, which calls the kernel with these words; a float is the bits of one."""
    return _compiled(_packed_entry(code))


def execution_engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _compiled(module: ir.Module) -> int:
    engine = execution_engine()
    engine.add_module(llvm.parse_assembly(str(module)))
    engine.finalize_object()
    _kept_alive.append(engine)
    address: int = engine.get_function_address("entry")
    return address


def _method(module: ir.Module) -> _Method:
    method = _Method(b"kernel", _compiled(module), METH_FASTCALL, None)
    _kept_alive.append(method)
    return method


def _start(result: ir.Type, *types: ir.Type) -> tuple[ir.Module, ir.IRBuilder, Any, Callable[..., Any]]:
    """A module with a function ``entry``, a builder in it, its arguments, and what calls a function of Python's."""
    module = ir.Module()
    entry = ir.Function(module, ir.FunctionType(result, types), "entry")
    builder = ir.IRBuilder(entry.append_basic_block())

    def python(name: str, result: ir.Type, *values: Any) -> Any:
        known = module.globals.get(name)
        function = known or ir.Function(module, ir.FunctionType(result, [v.type for v in values]), name)
        return builder.call(function, values)

    return module, builder, entry.args, python


def _call(builder: ir.IRBuilder, address: int, values: list[Any]) -> None:
    # Numba's own convention: int32 status(result*, exception**, arguments)
    result, exception = builder.alloca(pointer), builder.alloca(pointer)
    types = [result.type, exception.type, *(v.type for v in values)]
    kernel = builder.inttoptr(i64(address), ir.FunctionType(i32, types).as_pointer())
    builder.call(kernel, [result, exception, *values])


def _call_released(builder: ir.IRBuilder, python: Callable[..., Any], address: int, values: list[Any]) -> None:
    state = python("PyEval_SaveThread", pointer)
    _call(builder, address, values)
    python("PyEval_RestoreThread", ir.VoidType(), state)


def _entry(code: Code) -> ir.Module:
    module, builder, arguments, python = _start(pointer, pointer, pointer.as_pointer(), i64)
    values = []
    for i, letter in enumerate(code.arguments):
        value = builder.load(builder.gep(arguments[1], [i64(i)]))
        if letter == "f":
            values.append(builder.fptrunc(python("PyFloat_AsDouble", f64, value), f32))
        else:
            values.append(python("PyBytes_AsString" if letter == "b" else "PyLong_AsLongLong", i64, value))
    _call_released(builder, python, code.address, values)
    none = builder.inttoptr(i64(id(None)), pointer)
    python("Py_IncRef", ir.VoidType(), none)
    builder.ret(none)
    return module


def _own_entry(address: int) -> ir.Module:
    module, builder, arguments, python = _start(pointer, pointer, pointer.as_pointer(), i64)
    block, result = python("PyBytes_AsString", i64, arguments[0]), builder.alloca(pointer)
    places = [builder.ptrtoint(p, i64) for p in (arguments[1], result)]
    _call(builder, address, [block, places[0], arguments[2], places[1]])
    builder.ret(builder.load(result))
    return module


def _packed_entry(code: Code) -> ir.Module:
    module, builder, arguments, python = _start(ir.VoidType(), i64.as_pointer())
    values = [builder.load(builder.gep(arguments[0], [i64(i)])) for i in range(len(code.arguments))]
    for i, letter in enumerate(code.arguments):
        if letter == "f":
            values[i] = builder.bitcast(builder.trunc(values[i], i32), f32)
    _call_released(builder, python, code.address, values)
    builder.ret_void()
    return module
