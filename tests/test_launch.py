"""The cached launch: what it keys on, and that a hit goes straight to the compiled kernel. Needs no GPU."""

import importlib
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn

import rewardzip as rz
from rewardzip_kernels import loading

triton = pytest.importorskip("triton")


class Compiled:
    """Stands for Triton's compiled kernel: keeps what it was run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


@pytest.fixture
def recorded(monkeypatch):
    """A launch module whose kernels are compiled by a stand-in; the list of what was compiled."""
    from rewardzip_kernels.gpu import launch

    compiled = []

    def stand_in(kernel, grid, args, options):
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(launch, "off_gpu", stand_in)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return compiled


def test_a_hit_runs_the_compiled_kernel_with_every_argument(recorded):
    from rewardzip_kernels.gpu.launch import launch

    x = torch.ones(4)
    for grid in ((1, 1, 1), (2, 1, 1), (3, 2, 1)):
        launch("kernel", grid, ("key",), (x, 5, 16), num_warps=4)
    assert len(recorded) == 1
    expected = ("stream", "function", "metadata", None, None, None, x, 5, 16)
    assert recorded[0].runs == [(2, 1, 1, *expected), (3, 2, 1, *expected)]


def test_whatever_specialises_compiles_again(recorded):
    """Batch sizes share a kernel within their class; types, alignment, sizes and strides do not."""
    from rewardzip_kernels.gpu.int8_linear import int8_linear

    q, scale = torch.zeros(64, 64, dtype=torch.int8), torch.ones(64)
    store = torch.zeros(100 * 80)
    base = store[: 30 * 64].view(30, 64)

    def compiles(x, weight=q, **options):
        before = len(recorded)
        int8_linear(x, weight, scale[: len(weight)], **options)
        return len(recorded) - before

    assert compiles(base) == 1
    assert compiles(base) == 0
    assert compiles(base[:20]) == 0, "the same class of batch sizes"
    assert compiles(base[:3]) == 1, "the one-row kernel"
    assert compiles(store[1 : 1 + 30 * 64].view(30, 64)) == 1, "rows that start off a 16-byte boundary"
    assert compiles(store[: 30 * 80].view(30, 80)[:, :64]) == 1, "another row stride"
    assert compiles(base.half()) == 1
    assert compiles(base, compute_dtype=torch.float16) == 1
    assert compiles(base, activation="relu") == 1
    assert compiles(base, activation="leaky_relu:0.2") == 1
    assert compiles(base, activation="leaky_relu:0.3") == 1
    assert compiles(base, bias=scale) == 1
    assert compiles(base, q[:48]) == 1
    assert compiles(base, q[:48]) == 0


def test_a_profiler_hook_takes_the_slow_way(recorded, monkeypatch):
    from rewardzip_kernels.gpu.launch import launch

    launch("kernel", (1, 1, 1), (), (torch.ones(1),))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
    launch("kernel", (1, 1, 1), (), (torch.ones(1),))
    assert len(recorded) == 2
    assert recorded[0].runs == []


@pytest.fixture
def on_gpu_kernels(recorded, monkeypatch):
    """Modules on the CPU run what they would on a GPU, up to the driver."""
    for op in ("fused_mlp", "int8_linear"):
        module = importlib.import_module(f"rewardzip_kernels.gpu.{op}")
        monkeypatch.setitem(loading._found, ("cpu", op), getattr(module, op))
    return recorded


def launched(run, y):
    """What a launch was given, tensors by place and size; its output, argument y and new, by its size alone."""

    def plain(x):
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        return (x.data_ptr(), x.shape.numel(), x.dtype) if isinstance(x, torch.Tensor) else x

    head, arguments = run[:9], list(run[9:])
    arguments[y] = (arguments[y].numel(), arguments[y].dtype)
    return (*head, *map(plain, arguments))


def dense(*sizes):
    torch.manual_seed(0)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


# a module, the widths of its inputs, and which of its kernel's arguments is y
CASES = {
    "two inputs": (lambda: rz.swap(rz.RewardMLP(5, 3, (32, 32)).requires_grad_(False), rz.Int8()), (5, 3), 0),
    "one input": (lambda: rz.swap(dense(16, 32, 4), rz.Int8()), (16,), 0),
    "three members": (lambda: rz.fuse_ensemble([dense(16, 32, 1) for _ in range(3)]), (16,), 0),
    "a layer": (lambda: rz.nn.Int8Linear.from_linear(nn.Linear(64, 32)), (64,), 5),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request, on_gpu_kernels):
    make, widths, y = CASES[request.param]
    fast = make()

    def runs(*inputs):
        """The answer, and every launch of compiled kernels that it took."""
        before = [len(kernel.runs) for kernel in on_gpu_kernels]
        answer = fast(*inputs)
        after = [run for kernel, n in zip(on_gpu_kernels, before, strict=False) for run in kernel.runs[n:]]
        return answer, [launched(run, y) for run in after]

    return fast, widths, runs


def forget(fast):
    for m in fast.modules():
        if isinstance(m, rz.nn.CompressedLinear):
            m._changed()
        for chain in getattr(type(m), "rz_chains", []):
            chain.shortcut.forget(0)
    if hasattr(fast, "launch"):
        fast.launch.shortcut.forget(0)


def looks_nothing_up(monkeypatch):
    for op in ("fused_mlp", "int8_linear"):
        monkeypatch.setattr(f"rewardzip_kernels.gpu.{op}.launch", lambda *_, **__: pytest.fail("it was looked up"))


@pytest.mark.parametrize("rows", [(6,), (7, 2), (300,), ()])
def test_a_settled_call_launches_what_the_whole_one_does(case, rows, monkeypatch):
    fast, widths, runs = case
    inputs = [torch.randn(*rows, width) for width in widths]
    first = fast(*inputs)
    forget(fast)
    whole = runs(*inputs)[1][0]
    looks_nothing_up(monkeypatch)
    y, (settled,) = runs(*inputs)
    assert settled == whole
    assert (y.shape, y.dtype) == (first.shape, first.dtype)
    other = [x.clone() for x in inputs]
    assert runs(*other)[1] != [settled], "it reads what it is given"


def test_what_is_not_settled_is_looked_up(case, monkeypatch):
    fast, widths, runs = case
    inputs = [torch.randn(6, width) for width in widths]
    for _ in range(2):
        fast(*inputs)

    def looked_up(*given):
        with monkeypatch.context() as inside:
            looks_nothing_up(inside)
            with pytest.raises(pytest.fail.Exception, match="looked up"):
                fast(*given)
        return True

    store = [torch.zeros(1000) for _ in widths]
    assert looked_up(*[x[:5] for x in inputs])
    with monkeypatch.context() as inside:  # on a CPU they would be made dense
        inside.setattr("rewardzip.running.on_gpu", lambda x: True)
        assert looked_up(*[s[: 12 * w].view(6, 2 * w)[:, :w] for s, w in zip(store, widths, strict=True)])
    assert looked_up(*[s[1 : 1 + 6 * w].view(6, w) for s, w in zip(store, widths, strict=True)])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    assert looked_up(*inputs)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    assert len(runs(*inputs)[1]) == 1
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    assert looked_up(*inputs)


def test_a_settled_call_sees_new_numbers_where_the_old_ones_were(case):
    """A captured graph reads the same memory."""
    fast, widths, runs = case
    inputs = [torch.randn(6, width) for width in widths]
    for _ in range(2):
        fast(*inputs)
    before = runs(*inputs)[1]
    layer = next(m for m in fast.modules() if isinstance(m, rz.nn.Int8Linear))
    layer.scale.mul_(2)
    fast(*inputs)
    assert runs(*inputs)[1] == before
    packed = next((c for m in fast.modules() for c in getattr(type(m), "rz_chains", []) if c.packed), None)
    if hasattr(fast, "launch"):
        params = fast.launch.packed[widths][2]
    elif packed is None:
        return
    else:
        params = packed.packed[widths].params
    assert torch.isin(layer.scale, params).all()


def test_settled_calls_of_16_bit_rows(recorded):
    """Modules on a CPU do not ask for them."""
    from rewardzip_kernels.gpu.fused_mlp import Network, fused_mlp
    from rewardzip_kernels.gpu.int8_linear import int8_linear

    (chain,) = type(rz.swap(dense(16, 32, 4), rz.Int8())).rz_chains
    layer = rz.nn.Int8Linear.from_linear(nn.Linear(16, 4))
    x = torch.randn(6, 16).half()
    numbers = layer.int8_weight, layer.scale, layer.fp32_bias, "relu"
    network = Network(*chain.flat((16,)), chain.describe((16,)), None, "none", None)
    for whole, settle, y_at in (
        (lambda: fused_mlp([x], *network.arguments), lambda: network.bound([x]), 0),
        (lambda: int8_linear(x, *numbers), lambda: int8_linear.settled(*numbers, None, x), 5),
    ):
        whole()  # compiles
        whole()
        first = launched(recorded[-1].runs[-1], y_at)
        call = settle()
        y = call(x)
        assert launched(recorded[-1].runs[-1], y_at) == first
        assert (y.shape, y.dtype) == ((6, 4), torch.float16)
        assert call(x.float()) is None
        assert call(x.bfloat16()) is None


def test_what_the_op_refuses_is_not_launched(on_gpu_kernels):
    fast = CASES["two inputs"][0]()
    with pytest.raises(ValueError, match="input 1 has shape"):
        fast(torch.randn(6, 5), torch.randn(2, 3))
    with pytest.raises(TypeError):
        fast(torch.randn(6, 5).double(), torch.randn(6, 3).double())
    assert not on_gpu_kernels
    wide, x = CASES["one input"][0](), torch.randn(6, 16)
    wide(x)


def test_what_cannot_be_settled_is_launched_once(case, monkeypatch):
    fast, widths, runs = case
    off = [torch.zeros(1000)[1 : 1 + 6 * width].view(6, width) for width in widths]
    for _ in range(3):
        fast(*off)
    assert len(runs(*off)[1]) == 1
    dense = [torch.zeros(6, width) for width in widths]
    for _ in range(3):
        fast(*dense)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    assert len(runs(*dense)[1]) == 1
