"""A refreshed model computes what one swapped anew does, also after it has been called: nothing old is kept."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import rewardzip as rz
from rewardzip_kernels import quantize_rows

# one layer; wider than a chain; its last two as one reward_head; a chain; without biases, whose copies count changes
MODELS = {
    "one layer": ((64, 32), True),
    "wide, one launch a layer": ((40, 300, 300, 8), True),
    "a head": ((40, 300, 1), True),
    "a chain": ((20, 64, 64, 1), True),
    "one layer, no bias": ((64, 32), False),
    "wide, no bias": ((40, 300, 8), False),
    "a chain, no bias": ((20, 64, 64, 1), False),
}


def mlp(widths, bias):
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("kind", MODELS)
def test_refreshed_is_swapped_anew(kind, rows, activations):
    model, x = mlp(*MODELS[kind]), torch.randn(rows, MODELS[kind][0][0])
    fast = rz.swap(model, rz.Int8(activations))
    with torch.no_grad():
        for _ in range(3):
            for _ in range(2):
                fast(x)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            rz.refresh(fast, model)
            assert torch.equal(fast(x), rz.swap(model, rz.Int8(activations))(x))


def test_rounding_in_place_counts_as_a_change():
    out = torch.empty(4, 8, dtype=torch.int8), torch.empty(4)
    before = [t._version for t in out]
    quantize_rows(torch.randn(4, 8), out=out)
    assert all(t._version > version for t, version in zip(out, before, strict=True))
    with torch.inference_mode():
        out = torch.empty(4, 8, dtype=torch.int8), torch.empty(4)
        quantize_rows(torch.randn(4, 8), out=out)
