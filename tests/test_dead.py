"""Dead neurons go when a model is swapped: exactly, where that is possible, and in every later step."""

import copy
import warnings

import pytest
import torch
from models import mlp, packed, same_state, swapped
from torch import nn
from torch.nn.utils import prune

import rewardzip as rz
from rewardzip.dead import drop_dead
from rewardzip.nn import BlockSparseLinear


def kill(linear, share=0.5):
    """Make neurons constant."""
    with torch.no_grad():
        gone = torch.randperm(linear.out_features)[: round(share * linear.out_features)]
        linear.weight[gone] = 0
        linear.bias[gone] = torch.randn(len(gone))
    return linear


def half_dead(model):
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]:
        kill(linear)
    return model.eval()


class Norms(nn.Module):
    """Half its neurons are behind a norm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.relu(self.norm(self.a(x))))))


def sizes(model):
    return [(m.out_features, m.in_features) for m in model.modules() if hasattr(m, "out_features")]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Mish])
def test_nothing_but_the_neurons_goes(activation):
    model, x = half_dead(mlp(6, 16, 32, activation=activation)), torch.randn(50, 6)
    small = copy.deepcopy(model)
    assert drop_dead(small) == {"0": 8, "2": 16}
    assert sizes(small) == [(8, 6), (16, 8), (3, 16)]
    assert torch.allclose(small(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_nobody_reads_goes_and_then_what_only_that_read():
    model, x = mlp(6, 8, 8).eval(), torch.randn(9, 6)
    with torch.no_grad():
        model[4].weight[:, 2:] = 0
        model[2].weight[:2, 3:] = 0
    small = copy.deepcopy(model)
    assert drop_dead(small) == {"0": 5, "2": 6}
    assert torch.allclose(small(x), model(x), rtol=1e-6, atol=1e-6)


def test_swap_drops_them_and_says_so(tmp_path):
    model, inputs = half_dead(rz.RewardMLP(17, 6, (256, 256))), (torch.randn(40, 17), torch.randn(40, 6))
    state = copy.deepcopy(model.state_dict())
    fast = rz.swap(model, rz.Int8())
    assert sizes(fast) == [(128, 23), (128, 128), (1, 128)]
    assert fast.hidden == (128, 128)
    assert same_state(state, model.state_dict())
    exact = model(*inputs)
    assert (fast(*inputs) - exact).norm() < 0.02 * exact.norm()
    told = rz.explain(fast)
    assert ["128 of 256 neurons were dead: dropped" in layer.why for layer in told] == [True, True, False]

    rz.save(fast, tmp_path / "fast")
    again = rz.load(tmp_path / "fast")
    assert torch.equal(again(*inputs), fast(*inputs))
    assert str(rz.explain(again)) == str(told)
    dense = rz.restore(fast)
    assert sizes(dense) == sizes(fast)

    # other numbers of the same neurons; then more of them than there is room for
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    for _ in range(2):
        rz.refresh(fast, model)
        assert torch.equal(fast(*inputs), rz.swap(model, rz.Int8())(*inputs))
    assert "128 of 256 neurons were dead" in rz.explain(fast)[0].why
    with torch.no_grad():
        model.net[0].weight[:200] = 1.0
    with pytest.raises(ValueError, match=r"swap dropped 128 dead neurons of layer 'net.0'"):
        rz.refresh(fast, model)


def test_under_masks_of_torch():
    model, x = mlp(6, 16, 16).eval(), torch.randn(20, 6)
    prune.ln_structured(model[0], "weight", 0.5, n=1, dim=0)
    expected = swapped(model, fuse=False, filter="4")(x)
    fast = swapped(model, filter=["0", "2"])
    assert sizes(fast) == [(8, 6), (16, 8), (3, 16)]
    assert prune.is_pruned(model)
    assert (fast(x) - expected).norm() < 0.02 * expected.norm()
    rz.refresh(fast, model)
    assert torch.equal(fast(x), swapped(model, filter=["0", "2"])(x))


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x))))).squeeze(-1)


def test_a_saved_model_of_ones_own_class_is_read_into_one_of_full_width(tmp_path):
    fast, x = rz.swap(half_dead(Custom()), rz.Int8()), torch.randn(9, 6)
    assert sizes(fast) == [(8, 6), (4, 8), (1, 4)]
    rz.save(fast, tmp_path / "fast")
    for skeleton in (Custom(), swapped(Custom()), copy.deepcopy(fast)):
        again = rz.load(tmp_path / "fast", into=skeleton)
        assert sizes(again) == sizes(fast)
        assert torch.equal(again(x), fast(x))
    small = Custom()
    small.b = nn.Linear(16, 3)
    with pytest.raises(rz.CheckpointError, match=r"layer 'b' is \(4, 8, True\) \(out, in, bias\), in Custom \(3, 16"):
        rz.load(tmp_path / "fast", into=small)
    assert sizes(small) == [(16, 6), (3, 16), (1, 8)]


def test_what_stays():
    x = torch.randn(30, 6)
    # a norm's mean is over all of them
    model = half_dead(Norms())
    fast = swapped(model)
    assert sizes(fast) == [(16, 6), (8, 16), (1, 8)]
    # skipped layers keep their shape, and so do the layers that skipped ones read
    model = half_dead(mlp(6, 16, 16))
    assert sizes(swapped(model, skip="2")) == sizes(model)
    # 16-bit biases would be rounded with what a constant gave
    fast = swapped(half_dead(mlp(6, 16, activation=nn.Sigmoid)).half())
    assert sizes(fast) == [(16, 6), (3, 16)]
    # shared weights, an ensemble's common shape
    model = half_dead(mlp(16, 16, 16, outputs=16))
    model[2].weight = model[4].weight
    assert sizes(swapped(model))[1:] == [(16, 16), (16, 16)]
    members = [half_dead(mlp(6, 16, outputs=1)), mlp(6, 16, outputs=1).eval()]
    y = rz.fuse_ensemble(members, rz.Int8())(x)
    for mine, member in zip(y, members, strict=True):
        assert torch.allclose(mine, member(x), atol=0.05)
    # what cannot be traced
    model = half_dead(mlp(6, 16))
    model.forward = lambda x: nn.Sequential.forward(model, x) if x.sum() < 9e9 else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sizes(rz.swap(model, rz.Int8())) == [(16, 6), (3, 16)]


def test_blocks_keep_their_places():
    """Zeros that a sparse form skips are left where they are: without a few neurons blocks would be cut anew."""
    model = mlp(256, 512, 512).eval()
    step = rz.Prune("block", 0.9, block=(16, 4), skip=("0",))
    fast = rz.swap(rz.prune(model, step), rz.Int8(), skip="4")
    assert type(packed(fast)["2"]) is BlockSparseLinear
    assert sizes(fast) == sizes(model)


def test_nothing_is_traced_without_cause(monkeypatch):
    monkeypatch.setattr("rewardzip.dead.living", lambda *_: 1 / 0)
    rz.swap(rz.RewardMLP(5, 2), rz.Int8())


def test_a_layer_that_has_not_learnt_yet_stays():
    model = rz.RewardMLP(17, 6, (64, 64)).requires_grad_(False)
    torch.nn.init.zeros_(model.net[-1].weight)
    fast = rz.swap(model, rz.Int8())
    assert [m.out_features for m in fast.net if hasattr(m, "out_features")] == [64, 64, 1]
    rz.refresh(fast, rz.RewardMLP(17, 6, (64, 64)))
