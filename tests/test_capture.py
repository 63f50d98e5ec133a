"""capture: buckets, copies and checks, with a stand-in for the graph where there is no GPU."""

import importlib

import pytest
import torch
from conftest import GPU

import rewardzip as rz

# the package has the function under the module's name
module = importlib.import_module("rewardzip.capture")


@pytest.fixture
def recorded(monkeypatch):
    """Graphs replaced by a function that runs the model on the same memory; the batch sizes that were recorded."""
    sizes = []

    def record(model, inputs):
        sizes.append(len(inputs[0]))
        outputs = model(*inputs)
        return lambda: outputs.copy_(model(*inputs)), outputs

    monkeypatch.setattr(module, "record", record)
    return sizes


@torch.no_grad()
def test_every_batch_up_to_the_captured_one(recorded):
    model = rz.swap(rz.RewardMLP(5, 2), rz.Int8())
    captured = module.Captured(model, (torch.randn(20, 5), torch.randn(20, 2)))
    kept = []
    for rows in (1, 2, 3, 5, 16, 17, 20, 3):
        x = torch.randn(rows, 5), torch.randn(rows, 2)
        kept.append((captured(*x), model(*x)))
    for got, expected in kept:
        # compared last: an output must not change with the next call
        torch.testing.assert_close(got, expected)
    assert recorded == [1, 2, 4, 8, 16, 20]


@torch.no_grad()
def test_a_refresh_is_seen(recorded):
    dense = rz.RewardMLP(5, 2)
    fast = rz.swap(dense, rz.Int8())
    captured = module.Captured(fast, (torch.randn(4, 5), torch.randn(4, 2)))
    x = torch.randn(4, 5), torch.randn(4, 2)
    captured(*x)
    for p in dense.parameters():
        p.mul_(2)
    rz.refresh(fast, dense)
    torch.testing.assert_close(captured(*x), fast(*x))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((torch.randn(21, 5), torch.randn(21, 2)), "21 rows, captured with 20"),
        ((torch.randn(0, 5), torch.randn(0, 2)), "0 rows"),
        ((torch.randn(3, 5),), "1 inputs, but 2"),
        ((torch.randn(3, 5), torch.randn(4, 2)), "input 1"),
        ((torch.randn(3, 6), torch.randn(3, 2)), "input 0"),
        ((torch.randn(3, 5).half(), torch.randn(3, 2)), "input 0 is torch.float16"),
    ],
)
def test_bad_calls(recorded, inputs, words):
    captured = module.Captured(rz.RewardMLP(5, 2), (torch.randn(20, 5), torch.randn(20, 2)))
    with pytest.raises(ValueError, match=words):
        captured(*inputs)


def test_on_a_cpu_the_model_comes_back_and_says_so():
    model = rz.RewardMLP(5, 2)
    with pytest.warns(UserWarning, match="no CUDA graphs on a CPU"):
        assert rz.capture(model, (torch.randn(4, 5), torch.randn(4, 2))) is model
    with pytest.raises(ValueError, match="first sizes must agree"):
        rz.capture(model, (torch.randn(4, 5), torch.randn(3, 2)))


@pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs")
@torch.no_grad()
def test_a_real_graph():
    model = rz.swap(rz.RewardMLP(5, 2), rz.Int8()).cuda()
    captured = rz.capture(model, (torch.randn(64, 5).cuda(), torch.randn(64, 2).cuda()))
    for rows in (1, 3, 64):
        x = torch.randn(rows, 5).cuda(), torch.randn(rows, 2).cuda()
        torch.testing.assert_close(captured(*x), model(*x))
