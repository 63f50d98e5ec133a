"""Machine code as a Python function: a C function of CPython's own calling convention around an address.

    entry(self, args, count):  every argument to int64 or float32, the GIL released, the kernel called, None

A ``bytes`` arrives as the address of what it holds.

A third of the cost of ctypes, which matters at one row. It is so small that it is compiled anew in each process.
"""

import ctypes
from typing import Any

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
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.POINTER(_Method), ctypes.c_void_p, ctypes.c_void_p)

_kept_alive: list[Any] = []


def python_function(address: int, arguments: str) -> Any:
    """A callable for the kernel at ``address``; a letter per argument (i int64, f float32, b bytes). It checks none."""
    engine = execution_engine()
    engine.add_module(llvm.parse_assembly(str(_entry(address, arguments))))
    engine.finalize_object()
    method = _Method(b"kernel", engine.get_function_address("entry"), METH_FASTCALL, None)
    _kept_alive.append((engine, method))
    return _new(ctypes.byref(method), None, None)


def execution_engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _entry(address: int, arguments: str) -> ir.Module:
    module = ir.Module()
    i32, i64, f32, f64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
    pointer = ir.IntType(8).as_pointer()

    def python(name, result, *types):
        return ir.Function(module, ir.FunctionType(result, types), name)

    to_integer, to_float = python("PyLong_AsLongLong", i64, pointer), python("PyFloat_AsDouble", f64, pointer)
    to_address = python("PyBytes_AsString", i64, pointer)
    release, take = python("PyEval_SaveThread", pointer), python("PyEval_RestoreThread", ir.VoidType(), pointer)
    keep = python("Py_IncRef", ir.VoidType(), pointer)

    entry = ir.Function(module, ir.FunctionType(pointer, [pointer, pointer.as_pointer(), i64]), "entry")
    builder = ir.IRBuilder(entry.append_basic_block())
    values = []
    for i, letter in enumerate(arguments):
        value = builder.load(builder.gep(entry.args[1], [i64(i)]))
        if letter == "f":
            values.append(builder.fptrunc(builder.call(to_float, [value]), f32))
        else:
            values.append(builder.call(to_address if letter == "b" else to_integer, [value]))
    # Numba's own convention: int32 status(result*, exception**, arguments)
    result, exception = builder.alloca(pointer), builder.alloca(pointer)
    types = [result.type, exception.type, *(v.type for v in values)]
    kernel = builder.inttoptr(i64(address), ir.FunctionType(i32, types).as_pointer())
    state = builder.call(release, [])
    builder.call(kernel, [result, exception, *values])
    builder.call(take, [state])
    none = builder.inttoptr(i64(id(None)), pointer)
    builder.call(keep, [none])
    builder.ret(none)
    return module
