"""The Numba kernels against their references: same integers, same bound, every instruction set at hand."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from itertools import pairwise

import pytest
import torch
from numerics import assert_dynamic, assert_linear

from rewardzip_kernels import activations as reference_activations
from rewardzip_kernels.cpu import engine, threads
from rewardzip_kernels.cpu.instruction_sets import INSTRUCTION_SETS, available, choose
from rewardzip_kernels.cpu.int8_dynamic_linear import int8_dynamic_linear
from rewardzip_kernels.cpu.int8_linear import int8_linear
from rewardzip_kernels.cpu.packing import packed
from rewardzip_kernels.cpu.quantize_rows import _build as quantize_rows_build
from rewardzip_kernels.cpu.quantize_rows import quantize_rows
from rewardzip_kernels.cpu.tile import Float, Int8, PairsBFloat16
from rewardzip_kernels.int8_dynamic_linear import int8_dynamic_linear_reference, int8_matmul_reference
from rewardzip_kernels.int8_linear import int8_linear_reference
from rewardzip_kernels.quantize import TINY, quantize_rows_reference

SHAPES = [
    (6, 64, 64),  # aligned in everything
    (1, 1, 1),  # the smallest
    (1, 64, 24),  # one row
    (7, 65, 33),  # one more than a tile, a panel, a step
    (5, 63, 31),  # one less
    (3, 1, 257),  # a scalar reward
    (20, 66, 20),  # whole tiles of rows with two outputs in the last panel
    (2, 17, 3),  # fewer inputs than a step
    (49, 130, 1040),  # one more than a block of rows, three panels, a second part of the inputs
    (13, 70, 2500),  # three parts
    (400, 8, 6),  # many blocks
    (0, 5, 7),  # no rows
]
ACTIVATIONS = [*reference_activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.5"]

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture(params=available())
def isa(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(m, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    return x, weight, torch.rand(n, generator=g) * 0.02 + 1e-3, torch.randn(n, generator=g)


def reference_rows(x, static=None):
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    quantize_rows_reference(x, static, q, scale)
    return q, scale


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_integer_sums_are_exact(m, n, k, isa):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (m, k), generator=g).float()
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    y = int8_dynamic_linear(x, weight, torch.ones(n), None, "none", torch.ones(1), isa)
    assert torch.equal(y, int8_matmul_reference(x.to(torch.int8), weight).float())


@pytest.mark.parametrize(("a", "b"), [(127, 127), (127, -127), (-127, 127), (-127, -127), (127, -128), (-127, -128)])
@pytest.mark.parametrize("k", [4, 1030])
def test_saturated_inputs(a, b, k, isa):
    x, weight = torch.full((7, k), float(a)), torch.full((65, k), b, dtype=torch.int8)
    y = int8_dynamic_linear(x, weight, torch.ones(65), None, "none", torch.ones(1), isa)
    assert torch.equal(y, torch.full((7, 65), float(a * b * k)))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dynamic_is_its_reference_to_the_bit(m, n, k, isa):
    x, weight, scale, bias = layer(m, n, k)
    y = int8_dynamic_linear(x, weight, scale, bias, "relu", None, isa)
    assert torch.equal(y, int8_dynamic_linear_reference(x, weight, scale, bias, "relu"))
    assert_dynamic(y, x, weight, scale, bias, "relu", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_weight_only_bound(m, n, k, dtype, isa):
    x, weight, scale, bias = layer(m, n, k)
    x = x.to(dtype)
    y = int8_linear(x, weight, scale, bias, "relu", None, isa)
    assert y.dtype == dtype
    assert_linear(y, x, weight, scale, bias, "relu")


def test_bfloat16_carries_nan_and_inf_as_torch_does(isa):
    """All that 16 bits can be, and of NaN those whose upper bits alone are inf."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16)[:, None]
    one = torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, "none"
    kept = torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x) if PairsBFloat16.multiplies(choose(isa)) else x
    assert torch.allclose(int8_linear(x, *one, None, isa), kept, rtol=0, atol=0, equal_nan=True)
    odd = torch.tensor([[0x7F800001], [-0x7FFFFF]], dtype=torch.int32).view(torch.float32)
    assert int8_linear(odd, *one, torch.bfloat16, isa).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", [None, torch.float16, torch.bfloat16])
def test_dtypes(dtype, compute):
    x, weight, scale, bias = layer(9, 70, 50)
    x = x.to(dtype)
    y = int8_linear(x, weight, scale, bias, "none", compute)
    assert_linear(y, x, weight, scale, bias, "none", compute if compute != dtype else None)
    y = int8_dynamic_linear(x, weight, scale, bias)
    assert torch.equal(y, int8_dynamic_linear_reference(x, weight, scale, bias))


# the error allowed, in units in the last place; of x, not of the result, where results near 0 are differences
ULPS = {"tanh": 6, "sigmoid": 4, "silu": 5, "mish": 8, "softplus": 4, "elu": 3, "gelu": 4, "gelu_tanh": 4}
OF_INPUT = ("gelu", "gelu_tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_error(activation):
    grid = torch.cat([torch.linspace(-30, 30, 20001), torch.logspace(-20, 0, 500), -torch.logspace(-20, 0, 500)])
    y = int8_linear(grid[:, None], torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, activation)[:, 0]
    exact = reference_activations.apply(grid.double(), activation)
    name = activation.partition(":")[0]
    size = grid.double() if name in OF_INPUT else exact
    ulps = (y.double() - exact).abs() / (size.abs() * 2.0**-23 + 1e-38)
    assert ulps.max() <= ULPS.get(name, 1), f"{ulps.max():.2f} ulp at {grid[ulps.argmax()]}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_in_a_layer(activation):
    x, weight, scale, bias = layer(13, 70, 40)
    y = int8_linear(x, weight, scale, bias, activation)
    assert_linear(y, x, weight, scale, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_the_extremes(activation):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 100.0, -100.0, 3e38, -3e38])[:, None]
    y = int8_linear(x, torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, activation)
    # in float64: some of torch's fp32 functions turn inf into NaN
    expected = reference_activations.apply(x.double(), activation).float()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("isa_name", ["avx512_vnni", "portable"])
def test_inf_and_nan(isa_name):
    if isa_name not in available():
        pytest.skip(f"no {isa_name} on this processor")
    x, weight, scale, bias = layer(9, 66, 37)
    x[2, 5], x[4, 36], x[7, 0] = float("inf"), float("nan"), float("-inf")
    y = int8_dynamic_linear(x, weight, scale, bias, "relu", None, isa_name)
    bad = torch.tensor([2, 4, 7])
    assert y[bad].isnan().all()
    clean = torch.tensor([0, 1, 3, 5, 6, 8])
    assert torch.equal(y[clean], int8_dynamic_linear_reference(x[clean], weight, scale, bias, "relu"))
    weight[0, 5] = 0
    y, expected = (f(x, weight, scale, bias) for f in (int8_linear, int8_linear_reference))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[bad][y[bad].isinf()], expected[bad][expected[bad].isinf()])


def rows_to_quantize():
    halves = torch.arange(-254, 255).float() / 2  # with a scale of 1, every half-way case
    g = torch.Generator().manual_seed(2)
    random = torch.randn(64, 509, generator=g) * torch.logspace(-38, 38, 64)[:, None]
    special = torch.zeros(8, 509)
    special[1, 3] = 1e-42  # denormal
    special[2, 508] = TINY / 2
    special[3, 0] = torch.finfo(torch.float32).max
    special[4, 7], special[5, 508], special[6, 0] = float("inf"), float("nan"), float("-inf")
    return torch.cat([halves[None], halves.flip(0)[None], random, special])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("static", [None, 1.0, 0.03])
def test_quantize_rows_to_the_bit(dtype, static):
    x = rows_to_quantize().to(dtype)
    static = None if static is None else torch.tensor([static])
    q, scale = torch.full(x.shape, 55, dtype=torch.int8), torch.full((x.shape[0],), 55.0)
    quantize_rows(x, static, q, scale)
    expected_q, expected_scale = reference_rows(x, static)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale.view(torch.int32)[scale == scale], expected_scale.view(torch.int32)[scale == scale])
    assert torch.equal(scale.isnan(), expected_scale.isnan())


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 31])
def test_quantize_rows_widths(k):
    wide = torch.randn(50, 3 * k)
    for x in (wide[:, :k], torch.randn(k, 50).t(), wide[:, ::3], wide[:1, :k].expand(50, k)):
        q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(50)
        quantize_rows(x, None, q, scale)
        assert all(torch.equal(a, b) for a, b in zip((q, scale), reference_rows(x), strict=True))


@pytest.mark.parametrize(
    ("function", "reference"),
    [(int8_dynamic_linear, int8_dynamic_linear_reference), (int8_linear, int8_linear_reference)],
)
def test_strides_and_leading_dimensions(function, reference):
    _, weight, scale, bias = layer(1, 70, 20)
    base = torch.randn(12, 7, 60)
    for x in (
        base[..., :20],
        base[..., ::3],
        base.transpose(0, 1)[..., 5:25],
        base[3, 2, :20],
        base[:1, :1, :20].expand(4, 3, 20),
        base[:0, :, :20],
    ):
        y = function(x, weight, scale, bias)
        assert y.shape == (*x.shape[:-1], 70)
        torch.testing.assert_close(y, reference(x, weight, scale, bias))
    strided = function(base[0, :, :20], weight, scale.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3])
    assert torch.equal(strided, function(base[0, :, :20].clone(), weight, scale, bias))


@pytest.mark.parametrize("function", [int8_dynamic_linear, int8_linear])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_output_fully_written(function, m, n, k, poisoned):
    x, weight, scale, bias = layer(m, n, k)
    y = function(x, weight, scale, bias)
    assert y.isfinite().all()
    assert (y.abs() < 1e6).all()


@pytest.mark.parametrize("function", [int8_dynamic_linear, int8_linear])
@pytest.mark.parametrize(("m", "n", "k"), [(500, 200, 64), (30, 1000, 200), (1, 4096, 1100), (50, 3, 90)])
def test_rows_stand_alone(function, m, n, k, monkeypatch):
    """A row's result is the same to the bit beside any rows, however many, on any number of threads."""
    monkeypatch.setattr(Int8, "parallel_work", 1)
    monkeypatch.setattr(Float, "parallel_work", 1)
    x, weight, scale, bias = layer(m, n, k)
    together = function(x, weight, scale, bias, "tanh")
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(function(x, weight, scale, bias, "tanh"), together)
    torch.set_num_threads(1)
    for rows in (slice(0, 1), slice(1, 4), slice(m // 3, m)):
        assert torch.equal(function(x[rows], weight, scale, bias, "tanh"), together[rows])


def test_many_python_threads(monkeypatch):
    monkeypatch.setattr(Int8, "parallel_work", 1)
    torch.set_num_threads(2)
    cases = [layer(64, 300 + 8 * i, 256, seed=i) for i in range(8)]
    expected = [int8_dynamic_linear_reference(*case, "relu") for case in cases]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(int8_dynamic_linear(*cases[i], "relu"), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_after_fork(monkeypatch):
    monkeypatch.setattr(Int8, "parallel_work", 1)
    torch.set_num_threads(2)
    case = layer(256, 256, 256)
    expected = int8_dynamic_linear(*case)
    child = os.fork()
    if not child:
        signal.alarm(30)
        y = int8_dynamic_linear(*case)
        # torch's own threads do not survive a fork
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(y, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("function", [int8_dynamic_linear, int8_linear])
@pytest.mark.parametrize("inference", [False, True])
def test_weight_changed_in_place(function, inference):
    with torch.inference_mode(inference):
        x, weight, scale, bias = layer(5, 70, 20)
        function(x, weight, scale, bias)
        for change in (lambda: weight.neg_(), lambda: weight[3].zero_(), lambda: weight.copy_(weight.flip(0))):
            change()
            assert torch.equal(function(x, weight, scale, bias), function(x, weight.clone(), scale, bias))


def test_weight_pointed_elsewhere():
    x, weight, scale, bias = layer(5, 70, 20)
    int8_linear(x, weight, scale, bias)
    weight.data = weight.neg()
    assert torch.equal(int8_linear(x, weight, scale, bias), int8_linear(x, weight.clone(), scale, bias))


def test_weights_freed_and_reallocated():
    x, _, scale, bias = layer(3, 64, 64)
    gc.collect()
    before = len(packed.entries)
    for value in range(50):
        weight = torch.full((64, 64), value, dtype=torch.int8)
        assert torch.equal(int8_linear(x, weight, scale, bias), int8_linear(x, weight.clone(), scale, bias))
    del weight
    assert len(packed.entries) == before


def test_instruction_set_must_exist():
    assert choose().name == available()[0]
    assert available()[-1] == "portable"
    missing = next(name for name in INSTRUCTION_SETS if name not in available())
    with pytest.raises(ValueError, match=missing):
        choose(missing)


def test_compilation_failure_falls_back_once(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setattr(engine, "_load_or_compile", fail)
    from rewardzip_kernels.cpu.linear import prepare

    prepare.cache_clear()
    case = layer(3, 8, 5)
    try:
        with pytest.warns(RuntimeWarning, match="no compiler today"):
            y = int8_dynamic_linear(*case)
        assert torch.equal(y, int8_dynamic_linear_reference(*case))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            int8_dynamic_linear(*case)
    finally:
        prepare.cache_clear()


CHECK = """
import torch
from rewardzip_kernels.cpu.instruction_sets import available
from rewardzip_kernels.cpu.int8_dynamic_linear import int8_dynamic_linear
from rewardzip_kernels.int8_dynamic_linear import int8_dynamic_linear_reference
case = torch.randn(7, 33), torch.randint(-127, 128, (70, 33), dtype=torch.int8), torch.rand(70), torch.randn(70)
assert torch.equal(int8_dynamic_linear(*case), int8_dynamic_linear_reference(*case))
x, w = torch.full((7, 64), -127.0), torch.full((70, 64), -127, dtype=torch.int8)
assert (int8_dynamic_linear(x, w, torch.ones(70), None, "none", torch.ones(1)) == 127 * 127 * 64).all()
print(available()[0])
"""


def run_python(code, **environment):
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    run_python(CHECK, NUMBA_CACHE_DIR=str(tmp_path / "file" / "under"))


def test_damaged_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "cache_folder", lambda: tmp_path)

    def check(compiles):
        counted = []
        run = engine._load_or_compile(("quantize_rows",), lambda: counted.append(1) or quantize_rows_build())
        x, q, scale = torch.randn(3, 5), torch.empty(3, 5, dtype=torch.int8), torch.empty(3)
        run(x.data_ptr(), 5, 3, 5, 0, q.data_ptr(), scale.data_ptr())
        assert torch.equal(q, reference_rows(x)[0])
        assert len(counted) == compiles

    check(1)
    check(0)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:40], b"", whole[:-9] + b"!" + whole[-8:]):
        file.write_bytes(damaged)
        check(1)
        assert file.read_bytes()[32:40] == whole[32:40]
        check(0)


@pytest.mark.skipif("avx_vnni" not in available(), reason="these processors' code needs AVX2 and AVX-VNNI")
@pytest.mark.parametrize(
    ("processor", "features", "name"),
    [
        ("haswell", "+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+sse4.2", "avx2"),
        ("alderlake", "+avxvnni,+avx2,+avx,+fma,+f16c,+bmi,+bmi2,+sse4.2", "avx_vnni"),
        ("generic", "", "portable"),
    ],
)
def test_other_processors(processor, features, name):
    assert run_python(CHECK, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features) == name


def test_importing_compiles_nothing():
    code = "import rewardzip_kernels.cpu.int8_linear, rewardzip_kernels.cpu.engine as e; assert not e._kernels"
    run_python(code)


NEON = """
import llvmlite.binding as llvm
from llvmlite import ir
from rewardzip_kernels.cpu.instruction_sets import INSTRUCTION_SETS
from rewardzip_kernels.cpu.tile import Int8, emit
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
module = ir.Module()
address, integer = ir.IntType(8).as_pointer(), ir.IntType(64)
arguments = [address, integer, address, integer, integer, address, integer, address]
function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "tile")
builder = ir.IRBuilder(function.append_basic_block())
emit(builder, Int8(INSTRUCTION_SETS["neon_dot"]), 6, 4, *function.args)
builder.ret_void()
machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(features="+dotprod", opt=3)
code = machine.emit_assembly(llvm.parse_assembly(str(module)))
print(code.count("sdot"))
"""


def test_neon_tile_selects_its_dot_product():
    assert int(run_python(NEON)) == 24


def test_nobody_waits_for_a_worker_that_has_not_begun(monkeypatch):
    torch.set_num_threads(2)

    class Never(Future):
        def result(self, timeout=None):
            raise AssertionError("waited for it")

    class Asleep:
        def submit(self, work):
            return Never()

    monkeypatch.setattr(threads, "_workers", lambda count: Asleep())
    done = []
    threads.run(lambda start, stop: done.append((start, stop)), [(0, 5), (5, 7), (7, 12)])
    assert done == [(0, 5), (5, 7), (7, 12)]


def test_pieces_are_done_once_and_errors_come_through():
    torch.set_num_threads(2)
    pieces = threads.ranges(1000, 2, 12, 48)
    done = []
    threads.run(lambda start, stop: done.append((start, stop)), pieces)
    assert sorted(done) == pieces
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in pairwise(pieces))

    def fails(start, stop):
        time.sleep(0.01)
        raise RuntimeError("not this one")

    with pytest.raises(RuntimeError, match="not this one"):
        threads.run(fails, pieces)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_workers_keep_off_the_callers_processor():
    torch.set_num_threads(2)
    all_of_them, seen = os.sched_getaffinity(0), {}

    def note(start, stop):
        seen[threading.current_thread().name] = os.sched_getaffinity(0)
        time.sleep(0.05)  # or the caller would have done it all

    me = threading.current_thread().name
    for _ in range(40):  # a worker begins where it is told to only once it is known, and on a busy machine late
        threads.run(note, [(0, 1), (1, 2)])
        if len(seen) > 1 and all(where < all_of_them for name, where in seen.items() if name != me):
            break
    assert seen.pop(me) == all_of_them == os.sched_getaffinity(0), "the caller goes where it likes"
    assert seen
    assert all(len(where) == len(all_of_them) - 1 and where < all_of_them for where in seen.values())
