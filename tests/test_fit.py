"""The training loop on rewards that can be learned, and on data that cannot."""

import pytest
import torch
from torch import nn

import rewardzip as rz


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small spend their time on waking threads, the more so beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transitions(rows: int = 512):
    """States, actions and a reward that a small net can learn."""
    state, action = torch.randn(rows, 3), torch.randn(rows, 2)
    return state, action, state[:, 0] * action[:, 0] - state[:, 1].abs()


def test_mse_drives_the_error_down():
    model, data = rz.RewardMLP(3, 2), transitions()
    losses = rz.fit(model, data, steps=300, learning_rate=5e-3, progress=False)
    assert len(losses) == 300
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])
    assert model.training


def test_bradley_terry_ranks_the_preferred_first():
    state, action, reward = transitions(1024)
    first = (reward[:512] > reward[512:])[:, None]
    pairs = [torch.where(first, t[:512], t[512:]) for t in (state, action)]
    pairs += [torch.where(first, t[512:], t[:512]) for t in (state, action)]
    model = rz.RewardMLP(3, 2)
    rz.fit(model, pairs, "bradley-terry", steps=300, learning_rate=5e-3, progress=False)
    assert float((model(*pairs[:2]) > model(*pairs[2:])).float().mean()) > 0.9


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision(amp):
    model = rz.RewardMLP(3, 2)
    losses = rz.fit(model, transitions(), steps=100, learning_rate=5e-3, amp=amp, progress=False)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_same_seed_same_model():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        runs.append(rz.fit(rz.RewardMLP(3, 2), transitions(), steps=5, seed=seed, progress=False))
    assert runs[0] == runs[1] != runs[2]


def test_flags_and_progress(capsys):
    model = rz.RewardMLP(3, 2).eval()
    rz.fit(model, transitions(), steps=2)
    assert not model.training
    assert "fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, a, r: (s, a, r[:-1]), r"\[512, 512, 511\] rows"),
        (lambda s, a, r: (s[:0], a[:0], r[:0]), r"\[0, 0, 0\] rows"),
        (lambda s, a, r: (), "rows"),
        (lambda s, a, r: (r,), "the inputs and the rewards, got 1"),
        (lambda s, a, r: (s, a, r * torch.nan), "tensor 2 of the data holds inf or NaN"),
        (lambda s, a, r: (s / 0, a, r), "tensor 0 of the data holds inf or NaN"),
        (lambda s, a, r: (s, a, r[:, None]), r"the model gives \(256,\), the rewards are \(256, 1\)"),
    ],
)
def test_bad_data(change, match):
    model = rz.RewardMLP(3, 2).eval()
    with pytest.raises(ValueError, match=match):
        rz.fit(model, change(*transitions()), progress=False)
    assert not model.training


def test_bad_settings():
    data = transitions()
    with pytest.raises(ValueError, match="'mse' or 'bradley-terry'"):
        rz.fit(rz.RewardMLP(3, 2), data, "hinge", progress=False)
    with pytest.raises(ValueError, match="got 3 tensors"):
        rz.fit(rz.RewardMLP(3, 2), data, "bradley-terry", progress=False)
    with pytest.raises(ValueError, match="no parameters to train"):
        rz.fit(nn.ReLU(), data, progress=False)
    with pytest.raises(ValueError, match="no parameters to train"):
        rz.fit(rz.RewardMLP(3, 2).requires_grad_(False), data, progress=False)
