"""A default device that is not the CPU, or another default type, changes nothing for models and rows that are there."""

from contextlib import contextmanager

import pytest
import torch
from models import same_state
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.nn import BlockSparseLinear, Int8Linear, Sparse24Linear, SparseRowsLinear
from rewardzip_kernels import reward_head


@contextmanager
def other_type():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# tensors made on meta hold no numbers: their use cannot go unnoticed
@pytest.fixture(params=[lambda: torch.device("meta"), other_type], ids=["device", "type"])
def elsewhere(request):
    return request.param


def halves(layer):
    layer.weight.view(*layer.weight.shape[:1], -1, 4)[..., 2:] = 0
    return layer


LAYERS = {
    "int8": Int8Linear.from_linear,
    "int8 x int8": lambda layer: Int8Linear.from_linear(layer, "dynamic"),
    "blocks": BlockSparseLinear.from_linear,
    "blocks, fp16": lambda layer: BlockSparseLinear.from_linear(layer, values="float16"),
    "2:4": lambda layer: Sparse24Linear.from_linear(halves(layer)),
    "2:4, fp16": lambda layer: Sparse24Linear.from_linear(halves(layer), "float16"),
    "rows": SparseRowsLinear.from_linear,
}


@pytest.mark.parametrize("count", [5, 3000])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers(make, count, elsewhere):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96).requires_grad_(False), torch.randn(count, 64)
    expected = make(layer)(x)
    with elsewhere():
        packed = make(layer)
        # the second call is one looked up
        assert torch.equal(packed(x), expected)
        assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic"), rz.Fused()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3000])
def test_networks(config, dtype, count, elsewhere):
    model, data = trained().to(dtype), rows(count)
    inputs = [t.to(dtype) for t in data.inputs]
    with torch.no_grad():
        expected = rz.swap(model, config)(*inputs)
        with elsewhere():
            fast = rz.swap(model, config)
            assert torch.equal(fast(*inputs), expected)
            assert torch.equal(fast(*inputs), expected)


def test_memory_to_work_in(elsewhere):
    threads = pytest.importorskip("rewardzip_kernels.cpu.threads")
    with elsewhere():
        # more than any call of these tests has asked for
        assert threads.scratch(1 << 24) != 0


def test_gradients(elsewhere):
    model, (state, action) = trained().requires_grad_(False), rows(64).inputs
    x = state.requires_grad_(True)
    (expected,) = torch.autograd.grad(rz.swap(model, rz.Int8())(x, action).sum(), x)
    with elsewhere():
        (found,) = torch.autograd.grad(rz.swap(model, rz.Int8())(x, action).sum(), x)
    assert torch.equal(found, expected)


def test_reward_head(elsewhere):
    torch.manual_seed(0)
    weight, scale, head = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.rand(48), torch.randn(1, 48)
    x = torch.randn(7, 64)
    expected = reward_head(x, weight, scale, None, head, activation="silu")
    with elsewhere():
        assert torch.equal(reward_head(x, weight, scale, None, head, activation="silu"), expected)


RECIPES = {
    "neurons, fine-tuning": (rz.Prune("neurons", 0.5), rz.FineTune(20), rz.Quantize()),
    "blocks": (rz.Prune("block", 0.75, block=(16, 4)), rz.FineTune(20), rz.Quantize(activations="dynamic")),
    "second order": (rz.Prune("neurons", 0.5, importance="second-order"), rz.Quantize(rounding="compensated")),
    "random": (rz.Prune("unstructured", 0.6, importance="random"), rz.Share(16)),
    "low rank": (rz.LowRank(energy=0.9, weighted=True), rz.Quantize(4, ranges="mse")),
    "zero points": (rz.Quantize(scheme="affine"),),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes(recipe, elsewhere):
    model, data = trained(), rows(600)
    expected, _notes = squeeze(model, *recipe, data=data)
    with elsewhere():
        found, _notes = squeeze(model, *recipe, data=data)
    assert same_state(found.state_dict(), expected.state_dict())


def test_students(elsewhere):
    """They are drawn anew, so of another default type they are others, but as good."""
    model, data = trained(), rows(600)
    with elsewhere():
        found, _notes = squeeze(model, rz.Distil((24, 24), steps=400), data=data)
    assert {t.dtype for t in found.parameters()} == {torch.float32}
    assert error(model, found, data) < 0.5 * float(data.rewards.var())


def test_a_report(elsewhere):
    model, data = trained(), rows(600)
    expected = rz.compress(model, [rz.Quantize()], data, progress=False).report
    with elsewhere():
        found = rz.compress(model, [rz.Quantize()], data, progress=False).report
    assert found.figures == expected.figures
    assert found.truth == expected.truth
