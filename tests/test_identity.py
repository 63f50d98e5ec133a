"""Two models are the same one where nothing that they compute by differs."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewardzip as rz
from rewardzip.identity import data_hash, model_hash


class Scaled(nn.Module):
    def __init__(self, scale=1.0, activation=F.relu):
        super().__init__()
        self.net, self.scale, self.activation = nn.Linear(3, 1), scale, activation

    def forward(self, x):
        return self.activation(self.net(x)) * self.scale


class Shifted(Scaled):
    def forward(self, x):
        return self.activation(self.net(x)) + self.scale


def with_(change):
    model = copy.deepcopy(MODEL)
    change(model)
    return model


MODEL = Scaled()
OTHERS = {
    "attribute": with_(lambda m: setattr(m, "scale", 2.0)),
    "table": with_(lambda m: setattr(m, "scale", {"now": torch.ones(1)})),
    "array": with_(lambda m: setattr(m, "scale", np.ones(1))),
    "other array": with_(lambda m: setattr(m, "scale", np.zeros(1))),
    "function": with_(lambda m: setattr(m, "activation", F.elu)),
    "module": with_(lambda m: setattr(m, "activation", nn.ReLU())),
    "code": with_(lambda m: setattr(m, "__class__", Shifted)),
    "weights": with_(lambda m: m.net.weight.data.neg_()),
    "buffer": with_(lambda m: m.register_buffer("mean", torch.zeros(3), persistent=False)),
    "forward": with_(lambda m: setattr(m, "forward", lambda x: x)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_differs_in_anything_is_another(name):
    assert model_hash(OTHERS[name]) != model_hash(MODEL)


def test_others_differ_among_themselves():
    assert len(set(map(model_hash, OTHERS.values()))) == len(OTHERS)


def test_the_same_model_is_the_same():
    fast = rz.swap(rz.RewardMLP(3, 2), rz.Int8())
    before = model_hash(fast)
    fast(torch.randn(4, 3), torch.randn(4, 2))
    assert model_hash(fast) == model_hash(copy.deepcopy(fast)) == before
    assert model_hash(copy.deepcopy(MODEL).train()) == model_hash(copy.deepcopy(MODEL).eval())
    assert model_hash(OTHERS["weights"], weights=False) == model_hash(MODEL, weights=False)
    slopes = [model_hash(m) for m in (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.ELU(0.1), nn.ELU(0.1))]
    assert len(set(slopes)) == 3
    assert slopes[2] == slopes[3]


def test_rows_in_another_order_are_other_data():
    x, y = torch.randn(9, 3), torch.randn(9)
    assert data_hash(rz.Data((x,), y)) == data_hash(rz.Data((x.clone(),), y.clone()))
    others = (rz.Data((x,), y.flip(0)), rz.Data((x,)), rz.Data((x, y)), rz.Data((x.double(),), y))
    assert len({data_hash(d) for d in (rz.Data((x,), y), *others)}) == 5
    assert data_hash(rz.Data((x,), y), [None]) != data_hash(rz.Data((x,), y), [x])
