"""Settled calls on a CPU, in machine code and as what stands in where this torch is another: the same to the letter."""

import copy
import ctypes
import gc
import resource
import sys
import threading

import pytest
import torch
from torch import nn

import rewardzip as rz

quick = pytest.importorskip("rewardzip_kernels.cpu.quick")

from rewardzip import shortcut  # noqa: E402
from rewardzip.nn.watch import samples  # noqa: E402
from rewardzip_kernels.cpu.instruction_sets import choose  # noqa: E402
from rewardzip_kernels.cpu.tile import PairsBFloat16  # noqa: E402
from rewardzip_kernels.fused_mlp import network  # noqa: E402


@pytest.fixture(params=["machine code", "python"])
def form(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(quick, "_found", lambda: None)
    elif quick._found() is None:
        pytest.skip("this torch is another")
    return request.param


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="what other versions have is theirs to say")
def test_the_torch_that_tests_run_with_has_it():
    assert quick._found() is not None


def mlp(width=64, out=1):
    layers = nn.Linear(24, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
    return nn.Sequential(*layers).requires_grad_(False)


def pruned(pattern, amount):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU()).requires_grad_(False)
    return rz.prune(model, rz.Prune(pattern, amount))


MODELS = {
    "a small net": lambda: rz.swap(mlp(), rz.Int8(activations="dynamic")),
    "scratch of its own": lambda: rz.swap(mlp(320, 3), rz.Int8()),
    "dense": lambda: rz.swap(mlp(), rz.Fused()),
    "an ensemble": lambda: rz.fuse_ensemble([mlp(), mlp()], rz.Int8()),
    "a layer": lambda: rz.swap(nn.Sequential(nn.Linear(24, 40)).requires_grad_(False), rz.Int8()),
    "a layer, int8 rows": lambda: rz.swap(
        nn.Sequential(nn.Linear(24, 40)).requires_grad_(False), rz.Int8(activations="dynamic")
    ),
    "a layer, bfloat16": lambda: rz.swap(nn.Sequential(nn.Linear(24, 40)).bfloat16().requires_grad_(False), rz.Int8()),
    "blocks": lambda: rz.swap(pruned("block", 0.9), rz.Int8()),
    "rows": lambda: rz.swap(pruned("unstructured", 0.99), rz.Int8()),
}


def width(name):
    return 256 if name in ("blocks", "rows") else 24


def rows(name, *shape):
    return torch.randn(*shape, width(name), dtype=torch.bfloat16 if "bfloat16" in name else torch.float32)


def test_a_layer_settles_rows_of_its_type():
    if not PairsBFloat16.multiplies(choose()):
        pytest.skip("this processor does not multiply bfloat16")
    fast = MODELS["a layer, bfloat16"]()
    (layer,), x = fast, rows("a layer, bfloat16", 4)
    fast(x)
    (call,) = layer.settled.values()
    assert torch.equal(call(x), fast(x))
    assert call(x.float()) is None, "fp32 is not read as bfloat16"
    assert fast(x.float()).dtype == torch.float32
    torch.testing.assert_close(fast(x.float()), fast(x).float(), rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("name", MODELS)
def test_settled_calls_give_what_the_first_gave(name, form):
    fast = MODELS[name]()
    for shape in ((1,), (5,), (2, 3), (60,), ()):
        x = rows(name, *shape)
        first = fast(x)
        for given in (x, x.clone(), x.clone().requires_grad_()[...].detach()):
            again = fast(given)
            assert torch.equal(again, first)
            assert again.shape == first.shape
            assert again.stride() == first.stride()
            assert again.device == first.device
            assert again.is_contiguous()


@pytest.mark.parametrize("count", [2, 2000])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_that_stand_negated(name, count, form):
    fast, x = MODELS[name](), rows(name, count)
    stored = (-x)._neg_view()
    assert stored.is_neg()
    first = fast(stored)
    expected = fast(x)
    # by another road, whose sums may be in another order; a sign forgotten is far off
    torch.testing.assert_close(first, expected, msg="before anything is settled")
    fast(x)
    for _ in range(2):
        torch.testing.assert_close(fast(stored), expected, msg="once it was settled")


@pytest.mark.parametrize("name", MODELS)
def test_other_inputs_are_not_taken_for_those(name, form):
    fast, k = MODELS[name](), width(name)
    x = rows(name, 4)
    y = fast(x)
    assert torch.equal(fast(x), y)
    assert torch.equal(fast(x.t().contiguous().t()), y)
    assert torch.allclose(fast(torch.nn.Parameter(x, requires_grad=False)), y, atol=1e-6)
    if name != "dense":
        assert torch.allclose(fast(x.bfloat16()).float(), y.float(), rtol=0.1, atol=0.1)
    assert torch.equal(fast(x[:3]), fast(x[:3].clone()))
    assert torch.equal(fast(x.expand(2, 4, k))[1], fast(x.expand(2, 4, k).clone())[1])
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        fast(torch.randn(4, k + 1))
    with pytest.raises((ValueError, RuntimeError, TypeError, NotImplementedError)):
        fast(x.to_sparse())
    with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError)):
        fast(x.numpy())
    assert torch.equal(fast(x), y)


def test_modes_of_torch_are_kept(form):
    fast, x = MODELS["a small net"](), torch.randn(2, 24)
    fast(x), fast(x)
    assert not fast(x).is_inference()
    with torch.inference_mode():
        assert fast(x).is_inference()
    assert not fast(x).requires_grad
    seen = x.clone().requires_grad_()
    assert fast(seen).requires_grad
    assert not fast(x).requires_grad


def test_many_inputs(form):
    model = rz.RewardMLP(17, 6).requires_grad_(False)
    fast = rz.swap(model, rz.Int8())
    state, action = torch.randn(3, 17), torch.randn(3, 6)
    first = fast(state, action)
    assert torch.equal(fast(state, action), first)
    # the same shapes, each in its own storage and with other strides
    assert torch.equal(fast(torch.randn(17, 3).t().copy_(state), action), first)
    with pytest.raises((ValueError, RuntimeError)):
        fast(state, action[:2])


@pytest.fixture
def no_garbage():
    """What other tests have left goes now, and not while references are counted."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_leaks(form, no_garbage):
    fast, x = MODELS["a small net"](), torch.randn(1, 24)
    fast(x), fast(x)
    held = sys.getrefcount(x), sys.getrefcount(None)
    outputs = [fast(x) for _ in range(100)]
    plain = [x.new_empty(1) for _ in range(100)]
    assert sys.getrefcount(outputs[0]) == sys.getrefcount(plain[0])
    del outputs
    for _ in range(20_000):
        fast(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200_000):
        fast(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16_384, "kilobytes: 80 bytes a call"
    assert sys.getrefcount(x) == held[0]
    assert abs(sys.getrefcount(None) - held[1]) < 50_000, "one a call would be 220,000"


def test_refusals_do_not_leak(no_garbage):
    found = quick._found()
    if found is None:
        pytest.skip("this torch is another")
    fast, x = MODELS["a layer"](), torch.randn(1, 24)
    fast(x), fast(x)
    (call,) = [c.cell_contents for c in _settled(fast).__closure__ if type(c.cell_contents) is type(len)]
    none = sys.getrefcount(None)
    for _ in range(5000):
        for wrong in (torch.randn(2, 24), x.double(), x.t(), "x", None, 3, x.to("meta")):
            assert call(wrong, 0) is None
        assert call() is None
        assert call(x) is None
    assert abs(sys.getrefcount(None) - none) < 10_000, "one a call would be 45,000"
    assert found is quick._found()


def _settled(fast):
    (guarded,) = fast[0].settled.values()
    return guarded.__globals__["call"]


def test_one_module_in_many_threads(form):
    fast = MODELS["scratch of its own"]()
    inputs = [torch.randn(n, 24) for n in (1, 2, 3, 7)]
    expected = [fast(x) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(400):
            if not torch.equal(fast(inputs[i % 4]), expected[i % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["a small net", "dense", "a layer", "blocks", "rows"])
def test_what_changes_is_seen(name, form):
    fast, k = MODELS[name](), width(name)
    x = torch.randn(2, k)
    fast(x)
    before = fast(x)
    tensors = [t for t in (*fast.buffers(), *fast.parameters()) if t.is_floating_point()]
    for tensor in tensors:
        tensor.mul_(1.5)
        now = fast(x)
        assert not torch.equal(now, before), "a tensor was written to"
        assert torch.allclose(now, copy.deepcopy(fast)(x), atol=1e-5)
        before = fast(x)


LEARNING = {
    "a small net": lambda: rz.swap(mlp(), rz.Fused()),
    "many outputs": lambda: rz.swap(mlp(64, 40), rz.Fused()),
    "a dense last layer": lambda: rz.swap(mlp(), rz.Int8(), skip=["4"]),
    "an ensemble": lambda: rz.fuse_ensemble([mlp(), mlp()], rz.Fused()),
    "bfloat16": lambda: rz.swap(mlp().bfloat16(), rz.Fused()),
    "layer by layer": lambda: rz.swap(mlp(320), rz.Fused()),
}


@pytest.mark.parametrize("count", [1, 2000])
@pytest.mark.parametrize("name", LEARNING)
def test_what_is_written_through_data_is_seen(name, count, form):
    """As target networks follow: nothing counts such writes."""
    fast = LEARNING[name]()
    dtype = next(p.dtype for p in fast.parameters())
    x = torch.randn(count, 24, dtype=dtype)
    for step in range(6):
        before = fast(x)
        assert torch.equal(fast(x), before)
        for p in fast.parameters():
            p.data.lerp_(torch.randn_like(p.data), 0.3)
        # one call after each write, and some
        for _ in range(1 + step % 3):
            now = fast(x)
        assert not torch.equal(now, before), f"step {step}"
        # by torch's layers or by ours, which round bfloat16 at other places
        afresh = copy.deepcopy(fast)(x).double()
        assert (now.double() - afresh).norm() < 0.02 * afresh.norm()


def test_numbers_written_before_every_call_are_not_packed(monkeypatch):
    """That takes longer than torch's layers."""
    fast, x, packed = LEARNING["a small net"](), torch.randn(1, 24), []
    monkeypatch.setattr(shortcut, "network", lambda *given: packed.append(given) or network(*given))
    fast(x)
    assert len(packed) == 1
    for _ in range(5):
        for p in fast.parameters():
            p.data.mul_(0.9)
        fast(x)
    assert len(packed) == 1
    fast(x)
    assert len(packed) == 2


def test_what_another_process_writes_is_seen(form):
    fast, x = LEARNING["a small net"]().share_memory(), torch.randn(1, 24)
    before = fast(x)
    assert torch.equal(fast(x), before)
    writer = torch.multiprocessing.get_context("fork").Process(target=_halve, args=(list(fast.parameters()),))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert not torch.equal(fast(x), before)
    torch.testing.assert_close(fast(x), copy.deepcopy(fast)(x))


def _halve(parameters):
    for p in parameters:
        p.detach().mul_(0.5)


def test_samples_lie_in_the_tensor():
    for t in (torch.randn(1), torch.randn(3, 5), torch.randn(5, 3).t(), torch.randn(1, 4).expand(6, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            p = t.to(dtype) if t.is_contiguous() else t
            size = p.untyped_storage().nbytes()
            places = [ctypes.addressof(c) - p.data_ptr() for c in samples(p)]
            assert all(place >= 0 and place + 4 <= size for place in places)
            assert places or size < 4
    assert samples(torch.empty(0, 4)) == []
    assert samples(torch.empty(3, 4, device="meta")) == []
    given_up = torch.randn(3, 4)
    given_up.untyped_storage().resize_(0)
    assert samples(given_up) == []


@pytest.mark.parametrize("part", ["_tensor_at", "_keys"])
def test_a_layout_that_is_not_known_means_python(part, monkeypatch):
    quick._found.cache_clear()
    monkeypatch.setattr(quick, part, lambda: None)
    try:
        fast, x = MODELS["a small net"](), torch.randn(1, 24)
        assert torch.equal(fast(x), fast(x))
        assert quick._found() is None
    finally:
        quick._found.cache_clear()


def test_a_library_without_the_symbols_means_python(monkeypatch):
    missing = quick.types.ExternalFunction("aoti_torch_no_such_function", quick.types.int64())
    monkeypatch.setattr(quick, "FROM_TORCH", (*quick.FROM_TORCH, missing))
    assert not quick._known_to_llvm()
