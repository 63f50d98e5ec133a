"""A whole reward network in one call, beside its layers in torch."""

import copy
from functools import partial

import pytest
import torch
from checked import DEVICE, cells, timed

import rewardzip as rz

FORMS = {
    "fp32": lambda model: model,
    "bf16": lambda model: copy.deepcopy(model).bfloat16(),
    "int8": lambda model: rz.swap(model, rz.Int8()),
    "int8 x int8": lambda model: rz.swap(model, rz.Int8(activations="dynamic")),
    "int8, layer by layer": lambda model: rz.swap(model, rz.Int8(), fuse=False),
}


@cells
@pytest.mark.parametrize("width", [64, 256], ids=["small", "large"])
@pytest.mark.parametrize("name", FORMS)
def test_fused_mlp(benchmark, name, width, rows):
    torch.manual_seed(0)
    model = rz.RewardMLP(17, 6, hidden=(width, width)).to(DEVICE).eval().requires_grad_(False)
    # one row's error says little: the check takes many
    many = torch.randn(max(rows, 256), 17, device=DEVICE), torch.randn(max(rows, 256), 6, device=DEVICE)
    exact = copy.deepcopy(model).double()(*[x.double() for x in many])
    run = FORMS[name](model)
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    inputs = [x.to(dtype) for x in many]
    group = f"fused_mlp: 17+6, {width}, {width}, 1, {rows} rows"
    timed(benchmark, group, partial(run, *inputs), exact, then=partial(run, *[x[:rows] for x in inputs]))
