"""Training what has been compressed: what was decided holds, and the model comes nearer."""

import pytest
import torch
from models import packed
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.constraints import Codebook, Grid, Mask, constrain, copied, linears, masked, settle
from rewardzip.finetune import Blended, imitate, trainable, with_targets
from rewardzip.steps import Work


@pytest.fixture(scope="module")
def model():
    return trained()


def test_gradients_pass_the_rounding_and_stop_at_the_bounds():
    grid = Grid(torch.tensor([[0.5]]), torch.tensor([[-2.0]]), torch.tensor([[2.0]]), group=3)
    weight = torch.tensor([[0.3, -0.9, 4.0]], requires_grad=True)
    rounded = grid(weight)
    assert torch.equal(rounded, torch.tensor([[0.5, -1.0, 1.0]]))
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[1.0, 1.0, 0.0]]))
    # d scale = rounded steps - steps inside, the bound outside; the factor's derivative is that times the scale
    inside = (1 - 0.3 / 0.5) + (-2 + 0.9 / 0.5)
    assert float(grid.log_factor.grad) == pytest.approx(0.5 * (inside + 2), rel=1e-5)


def test_gradients_reach_the_codebook():
    layer = nn.Linear(2, 2, bias=False)
    constrain(layer, Codebook(torch.tensor([[0, 1], [1, 2]]), 3, zero=True))
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.tolist() == [0.0, 2.0, 1.0]
    assert layer.weight[0, 0] == 0


def test_masks_hold_in_training_and_settle(model):
    small = copied(model)
    masks = {name: layer.weight.abs() > 0.2 for name, layer in linears(small).items()}
    for name, layer in linears(small).items():
        masked(layer, masks[name])
    before = settle(copied(small))
    work = Work(model, rows(), progress=False)
    tuned = rz.Quantize(8).pack(rz.FineTune(50).apply(rz.Quantize(8).apply(small, work), work), work)
    for name, mask in masks.items():
        assert not tuned.get_submodule(name).weight[~mask].any()
    assert error(model, tuned, rows()) < 0.5 * error(model, before, rows())


@pytest.mark.parametrize("bits", [2, 3])
def test_weights_end_on_their_grid_and_nearer(model, bits):
    data = rows(1024)
    plain, _ = squeeze(model, rz.Quantize(bits), data=data)
    tuned, _ = squeeze(model, rz.Quantize(bits), rz.FineTune(200), data=data)
    assert error(model, tuned, data) < 0.5 * error(model, plain, data)
    for layer in packed(tuned).values():
        assert layer.int8_weight.abs().max() <= 2 ** (bits - 1) - 1
    # what was trained is what was packed: the same numbers on dense layers
    assert error(tuned, rz.restore(tuned), data) < 1e-9


def test_towards_rewards_and_preferences(model):
    data, blank = rows(1024), rz.RewardMLP(6, 2, (24, 24))
    tuned, _ = squeeze(blank, rz.LowRank(rank=8), rz.FineTune(200, learning_rate=5e-3, towards="rewards"), data=data)
    assert float((tuned(*data.inputs) - data.rewards).square().mean().detach()) < 0.5 * float(data.rewards.var())
    first = data.rewards[:512] > data.rewards[512:]
    won = tuple(torch.where(first[:, None], t[:512], t[512:]) for t in data.inputs)
    lost = tuple(torch.where(first[:, None], t[512:], t[:512]) for t in data.inputs)
    pairs = rz.Data(won, None, lost)
    tuned, _ = squeeze(blank, rz.LowRank(rank=8), rz.FineTune(200, learning_rate=5e-3, towards="rewards"), data=pairs)
    assert float((tuned(*won) > tuned(*lost)).float().mean()) > 0.85
    # towards the original, both sides of a preference count
    targets = with_targets(model, pairs)
    assert float(imitate(model, targets).detach()) < 1e-9
    assert torch.equal(targets.rejected[-1], model(*lost).detach())
    shifted = rz.Data(targets.inputs, None, (*lost, targets.rejected[-1] + 1))
    assert float(imitate(model, shifted).detach()) == pytest.approx(0.5, rel=1e-4)


def test_blended_rows_are_what_they_say_and_both_sides_count():
    states, actions = torch.arange(12.0) ** 2, torch.arange(12.0)
    batch = rz.Data((states[:, None], actions[:, None]))
    seen = []

    def teacher(*inputs):
        seen.append(inputs)
        return inputs[0][:, 0] * 0

    # rows 0, 1, 2 with the action of the row before (the last before the first); rows 3, 4, 5 with 0, 1/2 and all of
    # the row before each; the others as they are
    state = torch.tensor([0.0, 1, 4, 9, 12.5, 16, 36, 49, 64, 81, 100, 121])
    action = torch.tensor([2.0, 0, 1, 3, 3.5, 4, 6, 7, 8, 9, 10, 11])
    cost = Blended(teacher)(lambda s, a: (s + 10 * a)[:, 0], batch)
    assert torch.equal(seen[0][0][:, 0], state)
    assert torch.equal(seen[0][1][:, 0], action)
    assert float(cost) == pytest.approx(float((state + 10 * action).square().mean()))
    pairs = rz.Data(batch.inputs, None, (batch.inputs[0] + 1, batch.inputs[1]))
    both = (float(cost) + float((state + 1 + 10 * action).square().mean())) / 2
    assert float(Blended(teacher)(lambda s, a: (s + 10 * a)[:, 0], pairs)) == pytest.approx(both)


def test_blending_helps_where_rows_are_few(model):
    few, others = rows(48), rows(512, seed=1)
    cut = rz.LowRank(rank=4)
    plain, _ = squeeze(model, cut, rz.FineTune(400), data=few)
    blended, _ = squeeze(model, cut, rz.FineTune(400, blend=True), data=few)
    assert error(model, blended, others) < 0.9 * error(model, plain, others)


def test_mixed_precision_and_frozen_models(model):
    frozen = copied(model).requires_grad_(False)
    for amp in ("float16", "bfloat16"):
        plain, _ = squeeze(frozen, rz.Quantize(3), data=rows())
        tuned, _ = squeeze(frozen, rz.Quantize(3), rz.FineTune(100, amp=amp), data=rows())
        assert error(model, tuned, rows()) < error(model, plain, rows())
        assert not any(p.requires_grad for p in tuned.parameters())
    partly = copied(model)
    partly.net[0].requires_grad_(False)
    tuned, _ = squeeze(partly, rz.LowRank(rank=8, skip=("net.0",)), rz.FineTune(20), data=rows())
    assert torch.equal(tuned.net[0].weight, model.net[0].weight)
    with trainable(partly):
        assert not partly.net[0].weight.requires_grad
        assert partly.net[2].weight.requires_grad


def test_settling_a_copy_leaves_the_model_it_came_from():
    model = nn.Sequential(nn.Linear(4, 4))
    constrain(model[0], Mask(torch.eye(4)))
    weight = model[0].weight.detach().clone()
    settled = settle(copied(model))
    assert type(settled[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(settled[0].weight, weight)


def test_bad_settings(model):
    for settings in ({"steps": 0}, {"learning_rate": 0}, {"batch_size": 0}, {"towards": "fame"}, {"amp": "int8"}):
        with pytest.raises(ValueError, match="FineTune"):
            rz.FineTune(**settings)
    with pytest.raises(ValueError, match="needs data"):
        rz.FineTune().check(model, None)
    with pytest.raises(ValueError, match="needs rewards or preferences"):
        rz.FineTune(towards="rewards").check(model, rz.Data(rows().inputs))
    with pytest.raises(ValueError, match="blend asks the original"):
        rz.FineTune(blend=True, towards="rewards")
    with pytest.raises(ValueError, match="whole numbers"):
        rz.FineTune(blend=True).check(model, rz.Data((torch.randn(4, 6), torch.ones(4, 2, dtype=torch.long))))
