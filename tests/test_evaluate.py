"""``rz.evaluate``: two models on the user's rows; the gate; what is always refused."""

import copy
import json

import pytest
import torch
from cheetah import CheetahReward, trained, transitions
from torch import nn

import rewardzip as rz
from rewardzip.timing import Timing

FAST = {"batches": (1, 8), "seconds": 0.01, "progress": False}


def rows(n=400):
    return torch.randn(n, 3), torch.randn(n, 2)


def changed(model, change):
    """A copy whose weights are ``change(weight)``."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(change(layer.weight))
    return model


def with_output(model, change):
    model = copy.deepcopy(model)
    model.register_forward_hook(lambda module, args, output: change(output))
    return model


def test_a_model_is_as_good_as_itself():
    model, data = rz.RewardMLP(3, 2), rows()
    report = rz.evaluate(model, copy.deepcopy(model), data, gate=rz.Gate(), **FAST)
    assert report.passed
    assert report.failures == []
    assert report.figures["agreement"].value == 1
    assert report.figures["max_error"].value == 0
    assert report.smaller == 1
    assert set(report.layers.values()) == {0.0}
    assert [s.batch for s in report.speeds] == [1, 8]


def rounded(bits):
    def change(weight):
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight / scale).round() * scale

    return change


def smallest_to_zero(share):
    return lambda w: torch.where(w.abs() > w.abs().flatten().kthvalue(int(share * w.numel())).values, w, 0.0)


def test_what_good_looks_like_on_half_cheetah():
    """int8 passes the default gate by far, 4 bits are on its edge, half of the weights without fine-tuning fail it."""
    model, held = trained()
    ways = {"8": rounded(8), "4": rounded(4), "half": smallest_to_zero(0.5), "fifth": smallest_to_zero(0.8)}
    reports = {
        name: rz.evaluate(
            model, changed(model, way), held, gate=rz.Gate(), next_states=held.inputs[2], batches=(1,), seconds=0.01,
            progress=False,
        )
        for name, way in ways.items()
    }  # fmt: skip
    agreement = [r.figures["agreement"].value for r in reports.values()]
    epic = [r.figures["epic"].value for r in reports.values()]
    assert agreement == sorted(agreement, reverse=True)
    assert epic == sorted(epic)
    assert reports["8"].passed
    assert agreement[0] > 0.998
    assert epic[0] < 0.003
    assert 0.97 < agreement[1] < 0.995
    for name in ("half", "fifth"):
        assert len(reports[name].failures) == 3, reports[name].failures
    # the truth is in the data: the net is good, and pruned it is worse
    truth = reports["fifth"].truth
    assert truth["before"]["agreement"].value > 0.95 > truth["after"]["agreement"].value + 0.03
    # where rounding hurts: every layer a little, in the order they run
    assert list(reports["8"].layers) == ["net.0", "net.2", "net.4"]
    assert all(0 < error < 0.05 for error in reports["8"].layers.values())


def test_a_swapped_model_is_smaller_faster_and_passes():
    model, held = trained()
    fast = rz.swap(model, rz.Int8(activations="dynamic"))
    report = rz.evaluate(model, fast, held, gate=rz.Gate(), batches=(256,), seconds=0.2, progress=False)
    assert report.passed, report.failures
    assert 3 < report.smaller < 4.2
    assert report.speeds[0].ratio > 1  # a busy machine slows either
    # one launch in use, its layers looked at one by one
    assert list(report.layers) == ["net.0", "net.2", "net.4"]
    # the layers' copy in the launch's own layout counts as memory
    before, after = report.sizes
    assert before.disk < after.disk * 4.2
    assert after.disk < after.memory < before.memory


def test_shaping_has_no_epic_and_a_large_mse():
    """The distance that gates is EPIC where next states are given, and no error in the reward's units."""
    model, (state, action, after) = CheetahReward(16), (t[:600] for t in transitions()[:3])
    potential = nn.Linear(17, 1)

    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.reward, self.potential = model, potential

        def forward(self, state, action, next_state):
            shaping = 0.9 * self.potential(next_state) - self.potential(state)
            return 3 * (self.reward(state, action, next_state) + 0.3 * shaping.squeeze(-1)) + 5

    data = (state, action, after)
    report = rz.evaluate(model, Shaped(), data, gate=rz.Gate(), next_states=after, discount=0.9, **FAST)
    assert report.figures["mse"].value > 1
    assert report.figures["pearson_distance"].value > 0.05
    assert report.figures["epic"].value < 1e-5
    # nobody need say which input is the next state where the third is like the first
    again = rz.evaluate(model, Shaped(), data, discount=0.9, **FAST)
    assert again.figures["epic"] == report.figures["epic"]
    assert "epic" in rz.Gate().limits(report.figures)
    assert "pearson_distance" not in rz.Gate().limits(report.figures)
    assert not any("EPIC" in reason for reason in report.failures)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y.index_fill(0, torch.tensor([0]), torch.nan), "finite: inf or NaN for"),
        (lambda y: y * torch.inf, "finite: inf or NaN for"),
        (lambda y: torch.zeros_like(y), "varies: the output is 0 for all rows"),
        # no figure would notice: the rows of one batch all move alike
        (lambda y: y + (0.1 if len(y) == 1 else 0), "batch invariance: alone or among others"),
    ],
    ids=["a NaN", "inf", "a head that returns 0", "depends on the batch"],
)
@pytest.mark.parametrize("gate", [None, rz.Gate(agreement=0, epic=1, best_of_n=1)])
def test_broken_models_always_fail(change, reason, gate):
    model = rz.RewardMLP(3, 2)
    report = rz.evaluate(model, with_output(model, change), rows(), gate=gate, **FAST)
    assert not report.passed
    assert any(reason in failure for failure in report.failures), report.failures
    assert "failed" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_16_bits_are_not_blamed_for_their_own_roundoff():
    model = rz.RewardMLP(3, 2, (256, 256)).bfloat16()
    data = tuple(t.bfloat16() for t in rows())
    assert rz.evaluate(model, copy.deepcopy(model), data, **FAST).passed


def test_the_gate_says_which_limit_was_missed_and_where():
    model = rz.RewardMLP(3, 2)
    noisy = changed(model, lambda w: w + 0.02 * torch.randn_like(w))
    report = rz.evaluate(model, noisy, rows(), gate=rz.Gate(agreement=0.9999, epic=1, best_of_n=1), **FAST)
    (reason,) = report.failures
    assert reason.startswith("pair agreement is 0.")
    assert "at least 0.9999" in reason
    assert rz.evaluate(model, noisy, rows(), gate=rz.Gate(0.5, 0.5, 0.5), **FAST).passed
    for gate in (rz.Gate(0, 0, 1), rz.Gate(0, 1, 0)):
        assert len(gate.failures(report.figures)) == 1
    with pytest.raises(ValueError, match="agreement is 99"):
        rz.Gate(agreement=99)


def test_a_limit_within_the_interval_is_said_to_be_close():
    model = rz.RewardMLP(3, 2)
    noisy = changed(model, lambda w: w + 0.05 * torch.randn_like(w))
    figures = rz.evaluate(model, noisy, rows(), **FAST).figures
    limit = (figures["agreement"].low + figures["agreement"].value) / 2
    report = rz.evaluate(model, noisy, rows(), gate=rz.Gate(limit, 1, 1), **FAST)
    assert report.passed
    assert "more rows would tell" in str(report)


def test_q_networks_are_judged_by_every_output_and_by_the_greedy_action():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    data = torch.randn(500, 4)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[2].weight[1] *= -1
    report = rz.evaluate(model, broken, data, gate=rz.Gate(), **FAST)
    assert report.outputs == 3
    each = [figures["agreement"].value for figures in report.each_output]
    assert each[0] == each[2] == 1
    assert report.figures["agreement"].value == each[1] < 0.5
    same = float((model(data).argmax(1) == broken(data).argmax(1)).double().mean())
    assert report.figures["greedy"].value == pytest.approx(same)
    # every output in order, and other actions all the same
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted[2].bias += torch.tensor([0.0, 3.0, 0.0])
    report = rz.evaluate(model, shifted, data, gate=rz.Gate(), **FAST)
    assert report.figures["agreement"].value > 0.999
    (reason,) = report.failures
    assert reason.startswith("same greedy action")


def test_preferences_are_a_truth():
    model = rz.RewardMLP(3, 2)
    one, other = rows(), rows()
    wins = (model(*one) > model(*other))[:, None]
    better, worse = (tuple(torch.where(w, x, y) for x, y in zip(one, other, strict=True)) for w in (wins, ~wins))
    turned = with_output(model, lambda y: -y)
    report = rz.evaluate(model, turned, rz.Data(better, rejected=worse), **FAST)
    assert report.truth["before"]["preferred"].value == 1
    assert report.truth["after"]["preferred"].value == 0


def test_returns_are_asked_of_both_models():
    model = rz.RewardMLP(3, 2)
    other = copy.deepcopy(model)
    returned = {id(model): [10.0, 20.0], id(other): 7.0}
    report = rz.evaluate(model, other, rows(), returns=lambda m: returned[id(m)], **FAST)
    assert report.returns["before"].value == 15
    assert (report.returns["before"].low, report.returns["before"].high) == (10, 20)
    assert report.returns["after"] == rz.evaluate(model, other, rows(), returns=lambda m: 7.0, **FAST).returns["after"]
    assert report.returns["after"].low is None


def test_bad_input_is_named_before_anything_runs():
    model, (state, action) = rz.RewardMLP(3, 2), rows()
    for data, said in (
        ((state[:50], action[:50]), "50 rows are too few.*100 or more"),
        ((state, action, torch.randn(400, 2)), r"rewards are \(400, 2\)"),
        ((state,), "takes 2 inputs.*got 1"),
        ((state.index_fill(1, torch.tensor([0]), torch.nan), action), "400 of the 400 rows of input 0"),
    ):
        with pytest.raises(ValueError, match=said):
            rz.evaluate(model, model, data, **FAST)
    with pytest.raises(ValueError, match="original is 0 for all rows"):
        rz.evaluate(with_output(model, torch.zeros_like), model, (state, action), **FAST)
    with pytest.raises(ValueError, match="original gives inf or NaN for 400 of 400"):
        rz.evaluate(with_output(model, lambda y: y / 0), model, (state, action), **FAST)
    with pytest.raises(ValueError, match="1 and 3 outputs"):
        rz.evaluate(nn.Linear(3, 1), nn.Linear(3, 3), state, **FAST)
    with pytest.raises(ValueError, match="original is on cpu, the other model on meta"):
        rz.evaluate(model, copy.deepcopy(model).to("meta"), (state, action), **FAST)
    with pytest.raises(ValueError, match="batches must be 1 or more"):
        rz.evaluate(model, model, (state, action), batches=(0,), seconds=0.01, progress=False)
    with pytest.raises(ValueError, match="EPIC compares rewards; the model has 3 outputs"):
        rz.evaluate(nn.Linear(3, 3), nn.Linear(3, 3), state, next_states=state, **FAST)


def test_models_come_back_as_they_were():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)).train()
    model[2].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = rz.evaluate(model, copy.deepcopy(model), torch.randn(300, 3), **FAST)
    # in eval mode, so that dropout drops nothing
    assert report.figures["max_error"].value == 0
    assert [m.training for m in model] == [True, True, False]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_narrower_layers_are_left_out_of_the_layers():
    model = rz.RewardMLP(3, 2, (16, 16))
    student = rz.RewardMLP(3, 2, (8, 16))
    report = rz.evaluate(model, student, rows(), **FAST)
    assert list(report.layers) == ["net.2", "net.4"]


def test_the_report_for_machines_and_for_eyes():
    model = rz.RewardMLP(3, 2)
    fast = rz.swap(model, rz.Int8())
    report = rz.evaluate(model, fast, (*rows(), torch.randn(400)), gate=rz.Gate(), returns=lambda m: 5.0, **FAST)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["passed"] is True
    assert told["gate"] == {"agreement": 0.99, "epic": 0.02, "best_of_n": 0.01}
    assert told["figures"]["agreement"]["value"] == report.figures["agreement"].value
    assert told["size"]["after"]["disk"] == report.sizes[1].disk
    assert Timing(**told["seconds"][0]["before"]) == report.speeds[0].before
    text = str(report)
    for words in ("passed the gate", "pair agreement", "EPIC" if "epic" in told["figures"] else "Pearson distance",
                  "Against the truth", "return", "on disk", "8 rows", "net.0"):  # fmt: skip
        assert words in text, words
    assert "\x1b" not in text
