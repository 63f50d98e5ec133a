"""patterns and forms: what pruning left is named right, and each layer goes to the form the route table says."""

import pytest
import torch
from torch import nn

import rewardzip as rz
from rewardzip import constraints, forms
from rewardzip.nn import BlockSparseLinear
from rewardzip.patterns import find_pattern

# the masks below are made when the file is read
torch.manual_seed(0)


def masked(mask):
    return torch.randn(mask.shape).clamp(min=0.1) * mask


def blocks(n, k, block, share):
    grid = torch.zeros(-(-n // block[0]) * -(-k // block[1]))
    grid[: round(share * len(grid))] = 1
    grid = grid[torch.randperm(len(grid))].view(-(-n // block[0]), -1)
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]


def semi_structured(n, k, kept, group):
    order = torch.rand(n, -(-k // group), group).argsort(2)
    return (order < kept).float().flatten(1)[:, :k]


def dead(n, k, outputs, inputs):
    mask = torch.ones(n, k)
    mask[torch.randperm(n)[:outputs]] = 0
    mask[:, torch.randperm(k)[:inputs]] = 0
    return mask


PATTERNS = [
    (torch.ones(70, 90), "dense"),
    ((torch.rand(70, 90) > 0.03).float(), "dense"),
    ((torch.rand(128, 128) > 0.6).float(), "unstructured"),
    ((torch.rand(300, 300) < 0.1).float(), "unstructured"),
    (blocks(256, 256, (16, 4), 0.25), "blocks 16x4"),
    (blocks(256, 256, (16, 16), 0.25), "blocks 16x16"),
    (blocks(256, 256, (32, 32), 0.25), "blocks 32x32"),
    (blocks(256, 256, (64, 64), 0.25), "blocks 64x64"),
    (blocks(250, 131, (16, 4), 0.5), "blocks 16x4"),
    (semi_structured(64, 64, 2, 4), "2:4"),
    (semi_structured(64, 64, 1, 4), "1:4"),
    (semi_structured(64, 66, 2, 4), "2:4"),
    (semi_structured(64, 64, 4, 8), "4:8"),
    (dead(64, 100, 20, 0), "20 dead outputs, 0 dead inputs"),
    (dead(64, 100, 10, 30), "10 dead outputs, 30 dead inputs"),
    (torch.zeros(20, 30), "20 dead outputs, 30 dead inputs"),
]


@pytest.mark.parametrize(("mask", "name"), PATTERNS, ids=[f"{i} {name}" for i, (_, name) in enumerate(PATTERNS)])
def test_the_pattern_is_named(mask, name):
    found = find_pattern(masked(mask))
    assert str(found) == name
    assert found.sparsity == pytest.approx(1 - float(mask.mean()), abs=1e-6)
    assert found.shape == mask.shape


def test_shares_of_blocks_are_counted():
    mask = blocks(256, 256, (32, 32), 0.25)
    found = find_pattern(masked(mask))
    assert found.filled[32, 32] == found.filled[16, 4] == 0.25
    assert 0.25 < found.filled[64, 64] < 1
    assert found.block == (32, 32)


def form_of(weight, device="cpu", rows="float"):
    form, why = forms.choose(find_pattern(weight), device, rows)
    return None if form is None else form.name, why


def test_the_route():
    wide = masked(blocks(512, 512, (16, 4), 0.25))
    assert form_of(wide)[0] == "blocks"
    assert form_of(masked(blocks(512, 512, (64, 64), 0.25)))[0] == "blocks"
    half = masked(blocks(1024, 1024, (16, 4), 0.5))
    assert form_of(half)[0] is None
    assert form_of(half, rows="dynamic")[0] == "blocks"
    assert form_of(masked(blocks(512, 512, (16, 4), 0.75)), rows="dynamic")[0] is None
    assert form_of(masked((torch.rand(512, 512) < 0.1).float()))[0] is None
    assert form_of(masked(blocks(64, 64, (16, 4), 0.02)))[0] is None
    assert form_of(masked(blocks(256, 256, (16, 4), 0.25)), rows="dynamic")[0] == "blocks"
    assert form_of(masked(blocks(256, 256, (16, 4), 0.3)), rows="dynamic")[0] is None
    # up to 2^20 weights it may be part of one call
    assert form_of(masked(blocks(512, 512, (16, 4), 0.4)), rows="dynamic")[0] is None
    # weights too few to fill their blocks
    assert form_of(masked((torch.rand(1024, 1024) < 0.01).float()), rows="dynamic")[0] == "rows"
    assert form_of(masked(blocks(1024, 1024, (16, 4), 0.01)), rows="dynamic")[0] == "blocks"
    assert form_of(masked(semi_structured(1024, 1024, 2, 4)))[0] == "2:4"
    assert form_of(masked(semi_structured(512, 512, 2, 4)))[0] is None


@pytest.mark.parametrize(
    ("step", "shape", "rows", "form"),
    [
        (rz.Prune("unstructured", 0.95), (1024, 1024), "float", "rows"),
        (rz.Prune("unstructured", 0.98), (1024, 1024), "dynamic", "rows"),
        (rz.Prune("block", 0.75, block=(16, 4)), (272, 268), "float", "blocks"),
        (rz.Prune("block", 0.5, block=(16, 4)), (1040, 1012), "dynamic", "blocks"),
    ],
)
def test_an_amount_that_is_the_limit_reaches_it(step, shape, rows, form):
    """Whole weights and blocks go: the share of zeros is a little less here."""
    weight = constraints.settle(rz.prune(nn.Linear(*shape[::-1]), step)).weight
    assert form_of(weight, rows=rows)[0] == form


@pytest.mark.parametrize(
    ("zeros", "device", "block"), [(64, "cuda", (64, 64)), (64, "cpu", (16, 4)), (32, "cuda", (16, 4))]
)
def test_zeros_are_packed_as_they_lie(zeros, device, block):
    linear = nn.Linear(512, 512)
    with torch.no_grad():
        linear.weight.mul_(blocks(512, 512, (zeros, zeros), 0.25))
    assert forms.block_of(linear, device) == block


def test_no_promise_without_a_measurement():
    form, why = form_of(masked(blocks(512, 512, (16, 4), 0.1)), "cuda")
    assert form is None
    assert "was measured to be faster on this cuda" in why


def test_a_form_is_one_entry(monkeypatch):
    """What fits and wins first is taken; the layer is made by it."""
    linear = nn.Linear(16, 16)
    entry = forms.Form("mine", lambda p: True, lambda p, d, r: f"{d} {r}", BlockSparseLinear.from_linear)
    entry = forms.Form(entry.name, entry.fits, entry.wins, lambda layer, rows: BlockSparseLinear.from_linear(layer))
    monkeypatch.setattr(forms, "FORMS", (forms.Form("never", lambda p: False, lambda p, d, r: "", None), entry))
    assert isinstance(rz.Int8(activations="dynamic").make(linear, "", None), BlockSparseLinear)
    assert form_of(linear.weight) == ("mine", "cpu float")


def test_nothing_is_lost():
    linear = nn.Linear(512, 512)
    with torch.no_grad():
        linear.weight.mul_(blocks(512, 512, (16, 4), 0.2))
    layer = rz.Int8().make(linear, "", None)
    assert isinstance(layer, BlockSparseLinear)
    error = (layer.weight - linear.weight).abs()
    assert (error <= linear.weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()
