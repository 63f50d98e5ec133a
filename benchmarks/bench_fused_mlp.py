"""A whole reward network in one call, and its gradient by state and action, beside its layers in torch."""

import copy
from functools import partial

import pytest
import torch
from checked import DEVICE, cells, timed

import rewardzip as rz


def amp(model):
    def run(*inputs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(*inputs)

    return run


FORMS = {
    "fp32": lambda model: model,
    "AMP bf16": amp,
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


# a gradient is as wrong as its slopes: where a rounding crosses a kink, one changes altogether
OF_SLOPES = 0.2


def gradient(model, *inputs):
    with torch.enable_grad():
        asked = [x.detach().requires_grad_() for x in inputs]
        return torch.cat(torch.autograd.grad(model(*asked).sum(), asked), 1)


@cells
@pytest.mark.parametrize("width", [64, 256], ids=["small", "large"])
@pytest.mark.parametrize("name", FORMS)
def test_gradient(benchmark, name, width, rows):
    torch.manual_seed(0)
    model = rz.RewardMLP(17, 6, hidden=(width, width)).to(DEVICE).eval().requires_grad_(False)
    many = torch.randn(max(rows, 256), 17, device=DEVICE), torch.randn(max(rows, 256), 6, device=DEVICE)
    exact = gradient(copy.deepcopy(model).double(), *[x.double() for x in many])
    run = partial(gradient, FORMS[name](model))
    many = [x.bfloat16() for x in many] if name == "bf16" else many
    group = f"gradient: 17+6, {width}, {width}, 1, {rows} rows"
    timed(benchmark, group, partial(run, *many), exact, OF_SLOPES, partial(run, *[x[:rows] for x in many]))
