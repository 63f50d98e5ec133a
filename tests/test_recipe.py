"""Recipes: in files and out, refused before any work, run on a copy, judged on rows that no step has seen."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from models import packed, same_state
from recipes import error, rows, trained
from torch import nn

import rewardzip as rz
from rewardzip.recipe import check_order, dumps, loads, read_recipe, run_steps, save_recipe
from rewardzip.steps import STEPS, Step, from_dict

RECIPE = (rz.LowRank(energy=0.9, weighted=True), rz.FineTune(50), rz.Quantize(4, skip=("net.0",)), rz.FineTune(20))


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture
def judged(monkeypatch):
    """What ``evaluate`` is called with."""
    calls = []

    def evaluate(before, after, data, *, gate=None, next_states=None, discount=None, progress=True):
        calls.append((before, after, data, gate) if next_states is None else (data, next_states, discount))
        return f"report {len(calls)}"

    monkeypatch.setitem(
        sys.modules, "rewardzip.evaluate", types.SimpleNamespace(evaluate=evaluate, check_original=lambda *given: None)
    )
    return calls


def test_a_recipe_from_end_to_end(tmp_path, model, judged):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    kinds, data = [type(m) for m in model.modules()], rows(1000)
    result = rz.compress(model, RECIPE, data, progress=False, gate="gate")
    assert result.report == "report 1"
    assert result.recipe == RECIPE
    assert not any(m.training for m in result.model.modules())
    assert set(packed(result.model)) == {"net.0.0", "net.0.1", "net.2.0", "net.2.1"} - {"net.0"}
    # the original: its weights, its classes, its mode
    assert same_state(model.state_dict(), weights)
    assert [type(m) for m in model.modules()] == kinds
    (before, after, held, gate) = judged[0]
    assert after is result.model
    assert gate == "gate"
    assert same_state(before.state_dict(), weights)
    assert len(held) == 200
    _rest, expected = data.split(0.2, 0)
    assert torch.equal(held.inputs[0], expected.inputs[0])
    assert error(model, result.model, held) < 0.3 * float(data.rewards.var())
    rz.save(result.model, tmp_path / "m")
    assert torch.equal(rz.load(tmp_path / "m")(*held.inputs), result.model(*held.inputs))
    again = rz.compress(model, RECIPE, data, progress=False)
    assert same_state(again.model.state_dict(), result.model.state_dict())
    other = rz.compress(model, RECIPE, data, progress=False, seed=1)
    assert not same_state(other.model.state_dict(), result.model.state_dict())


def test_the_next_states_of_the_report_are_those_of_its_rows(model, judged):
    data = rows(1000)
    followed = data.inputs[0] + 1
    rz.compress(model, RECIPE, data, next_states=followed, discount=0.7, progress=False)
    held, after, discount = judged[0]
    assert torch.equal(after, held.inputs[0] + 1)
    assert discount == 0.7
    with pytest.raises(ValueError, match="999 next states for 1000 rows"):
        rz.compress(model, RECIPE, data, next_states=followed[1:], progress=False)


def test_no_step_sees_the_rows_of_the_report(model, judged, monkeypatch):
    seen = []

    class Look(Step):
        def check(self, model, data):
            seen.append(data)

        def apply(self, model, work):
            seen.append(work.data)
            return model

    monkeypatch.delitem(STEPS, "Look")
    x = torch.arange(500.0)
    data = rz.Data((x[:, None].expand(500, 6), x[:, None].expand(500, 2)), x)
    rz.compress(model, [Look()], data, progress=False)
    held = judged[0][2].rewards
    assert len(held) == 100
    for each in seen:
        assert not set(each.rewards.tolist()) & set(held.tolist())
        assert len(each) == 400


def test_without_data_there_is_no_report(model):
    result = rz.compress(model, [rz.Quantize(8)], progress=False)
    assert result.report is None
    assert torch.equal(result.model(*rows().inputs), rz.swap(model, rz.Int8())(*rows().inputs))
    with pytest.raises(ValueError, match="a gate needs data"):
        rz.compress(model, [], progress=False, gate="gate")
    same = rz.compress(model, [], progress=False).model
    assert same is not model
    assert same_state(same.state_dict(), model.state_dict())


def test_progress_is_printed(model, capsys):
    rz.compress(model, [rz.LowRank(rank=4), rz.Quantize(8)])
    out = capsys.readouterr().out
    assert "1/2 LowRank(rank=4" in out
    assert "2/2 Quantize(bits=8" in out


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_any_module_and_functional_activations():
    torch.manual_seed(0)
    model, x = Functional(), torch.randn(200, 6)
    for steps in ([rz.Quantize(8)], [rz.Share(16)], [rz.LowRank(rank=3), rz.Quantize(6)]):
        result = rz.compress(model, steps, progress=False)
        assert type(result.model).__name__ == "Functional"
        assert (result.model(x) - model(x)).square().mean() < 0.6 * model(x).var()
        assert packed(result.model)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([rz.Quantize(8), rz.Quantize(4)], "both decide"),
        ([rz.Quantize(8), rz.Share(16)], "Share and Quantize both decide"),
        ([rz.Share(16), rz.Quantize(8)], "Quantize and Share both decide"),
        ([rz.Quantize(8), rz.LowRank(rank=2)], "LowRank cannot follow Quantize.*before"),
        ([rz.Share(16), rz.Share(of="neurons")], "cannot follow Share"),
        ([rz.Quantize(8), rz.FineTune(), rz.Distil((4,))], "cannot follow Quantize"),
        ([rz.LowRank(rank=2), rz.Distil((4,))], "throws LowRank away"),
        ([rz.Distil((4,)), rz.Distil((4,))], "throws Distil away"),
        ([rz.Share(of="layers"), rz.FineTune(), rz.Prune("neurons", 0.5)], "cannot follow Share of layers"),
        ([rz.FineTune(), rz.Quantize(8)], "nothing to learn before"),
        ([rz.FineTune()], "nothing to learn before"),
    ],
)
def test_orders_that_cannot_work_are_refused_before_any_work(monkeypatch, model, steps, match):
    for kind in (rz.Quantize, rz.LowRank, rz.Share, rz.Distil, rz.FineTune):
        monkeypatch.setattr(kind, "apply", lambda *a: pytest.fail("worked"))
    with pytest.raises(ValueError, match=match):
        rz.compress(model, steps, rows(), progress=False)
    with pytest.raises(ValueError, match=match):
        check_order(steps)


def test_orders_that_can_work():
    tune = rz.FineTune()
    check_order([rz.Distil((4,)), rz.Share(of="neurons"), tune, rz.LowRank(rank=2), tune, rz.Quantize(8), tune, tune])
    check_order([rz.Share(of="layers"), rz.Share(16), tune])
    check_order([rz.FineTune(towards="rewards"), rz.Quantize(8)])
    check_order([rz.Share(of="layers"), rz.Prune("2:4")])


def test_masks_are_not_lost_on_the_way(model):
    masks, neurons = rz.Prune("2:4"), rz.Prune("neurons", 0.5)
    for step in (rz.LowRank(rank=2), rz.Share(of="neurons"), neurons):
        with pytest.raises(ValueError, match="after Prune would lose its zeros"):
            check_order([masks, step])
        check_order([neurons, step])
    with pytest.raises(ValueError, match="Prune cannot follow Quantize"):
        check_order([rz.Quantize(8), neurons])
    for last in (rz.Quantize(4), rz.Share(16)):
        small, _ = run_steps(model, [masks, last, rz.FineTune(20)], rows(), progress=False)
        for layer in packed(small).values():
            assert (layer.weight.view(len(layer.weight), -1, 4) != 0).sum(-1).max() <= 2
    small, _ = run_steps(model, [neurons, rz.FineTune(20), rz.Quantize(8)], rows(), progress=False)
    assert small.net[0].out_features == 12


@pytest.mark.parametrize("steps", [[rz.Quantize(8), rz.FineTune()], [rz.LowRank(rank=2, weighted=True)], [rz.Distil()]])
def test_steps_that_need_data_say_so_before_any_work(monkeypatch, model, steps):
    monkeypatch.setattr(type(steps[0]), "apply", lambda *a: pytest.fail("worked"))
    with pytest.raises(ValueError, match="needs data, and compress was given none"):
        rz.compress(model, steps, progress=False)


def test_what_is_no_recipe_or_no_dense_model(model):
    with pytest.raises(TypeError, match="'int8' is str, not a step"):
        rz.compress(model, ["int8"], progress=False)
    with pytest.raises(TypeError, match=r"compress: Quantize\(.*is a step"):
        rz.compress(model, rz.Quantize(8), progress=False)
    with pytest.raises(TypeError, match=r"search: Quantize\(.*recipes are sequences of them"):
        rz.search(model, rows(1000), recipes=[rz.Quantize(8)], progress=False)
    with pytest.raises(ValueError, match=r"'net.0' is packed already.*restore"):
        rz.compress(rz.swap(model, rz.Int8()), [rz.Quantize(8)], progress=False)
    with pytest.raises(ValueError, match="490 rows leave 98 to judge by; give 500"):
        rz.compress(model, [rz.Quantize(8)], rows(490), progress=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: rz.FineTune("5"), "FineTune: steps is '5'; it must be a whole number"),
        (lambda: rz.FineTune(5, learning_rate="fast"), "FineTune: learning_rate is 'fast'; it must be a number"),
        (lambda: rz.Distil(64), r"Distil: student is 64; it must be widths like \(64, 64\)"),
        (lambda: rz.Distil((8.5,)), r"Distil: student is \(8.5,\)"),
        (lambda: rz.Distil(steps=2.5), "Distil: steps is 2.5; it must be a whole number"),
        (lambda: rz.Quantize(group=2.5), "Quantize: group is 2.5; it must be a whole number"),
        (lambda: rz.LowRank(energy="most"), "LowRank: energy is 'most'; it must be a number"),
        (lambda: rz.Share(similarity=None), "Share: similarity is None"),
    ],
)
def test_fields_of_the_wrong_kind_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


EVERY = (
    rz.Distil((8, 4), form="pairwise", temperature=2.0, features=(("net.0", "net.0"),)),
    rz.Share(of="neurons", similarity=0.9, skip=("a", "b*")),
    rz.LowRank(error=0.1),
    rz.Quantize(3, scheme="affine", per="group", group=8, ranges="mse", rounding="compensated", correct_bias=True),
    rz.FineTune(10, towards="rewards", amp="float16", early_stop=5),
)


def test_files(tmp_path):
    for name in ("r.json", "every.toml"):
        save_recipe(EVERY, tmp_path / name)
        assert read_recipe(tmp_path / name) == EVERY
    odd = (rz.Quantize(4, skip=('a "name"', "b\\c", "\u00e9")), rz.FineTune(3, learning_rate=1e-6))
    save_recipe(odd, tmp_path / "odd.toml")
    assert read_recipe(tmp_path / "odd.toml") == odd
    with pytest.raises(ValueError, match="must end in"):
        save_recipe(EVERY, tmp_path / "r.txt")
    assert read_recipe(tmp_path / "r.json") == EVERY == loads(dumps(EVERY))
    assert json.loads((tmp_path / "r.json").read_text())["steps"][3]["bits"] == 3
    (tmp_path / "r.toml").write_text(
        '[[steps]]\nstep = "Distil"\nstudent = [8]\n[[steps]]\nstep = "Quantize"\nbits = 4\nskip = ["net.0"]\n'
    )
    assert read_recipe(tmp_path / "r.toml") == (rz.Distil((8,)), rz.Quantize(4, skip=("net.0",)))
    assert from_dict(rz.Share(32).to_dict()) == rz.Share(32)


def test_a_recipe_from_a_file_runs(tmp_path, model):
    save_recipe([rz.LowRank(rank=4), rz.Quantize(6)], tmp_path / "r.json")
    a = rz.compress(model, tmp_path / "r.json", progress=False).model
    b = rz.compress(model, [rz.LowRank(rank=4), rz.Quantize(6)], progress=False).model
    assert same_state(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", 'must hold "steps"'),
        ('{"steps": [1]}', "list of tables"),
        ('{"steps": [], "author": "me"}', "nothing else"),
        ('{"steps": [{"step": "Shrink"}]}', "'Shrink' is not one of"),
        ('{"steps": [{"step": "Quantize", "bit": 4}]}', "no field 'bit'"),
        ('{"steps": [{"step": "Quantize", "bits": 40}]}', "2 to 8"),
        ('{"steps": [{"bits": 4}]}', "None is not one of"),
    ],
)
def test_bad_files(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        loads(text)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"must end in \.json or \.toml"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="not TOML"):
        loads("a = ", "toml")


def test_a_file_may_name_every_step():
    names = ("Prune", "Quantize", "LowRank", "Share", "Distil", "FineTune")
    code = f"import rewardzip.recipe; from rewardzip.steps import STEPS; assert set({names}) <= set(STEPS), STEPS"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_would_stop_the_report_is_said_before_any_work(monkeypatch, model):
    monkeypatch.setattr(rz.Quantize, "apply", lambda *given: pytest.fail("it was run"))
    data = rows(1000)
    state, action = data.inputs
    constant = nn.Sequential(nn.Linear(6, 1))
    nn.init.zeros_(constant[0].weight)
    for given, said, more in (
        (data, "EPIC: states, actions and next states", {"next_states": action}),
        (rz.Data(data.inputs, torch.randn(1000, 2)), "the rewards are", {}),
    ):
        with pytest.raises(ValueError, match=said):
            rz.compress(model, [rz.Quantize(8)], given, progress=False, **more)
    with pytest.raises(ValueError, match="for all rows: no order to keep"):
        rz.compress(constant, [rz.Quantize(8)], state, progress=False)


@pytest.mark.parametrize("find", [rz.search, rz.compress])
def test_rewards_that_are_all_equal_are_left_out_of_the_report(model, find):
    data = rows(2000)
    given = {"recipes": [[rz.Quantize(8)]], "budget": 5} if find is rz.search else {"recipe": [rz.Quantize(8)]}
    report = find(model, data=rz.Data(data.inputs, torch.zeros(2000)), progress=False, **given).report
    assert report.truth == {}
    assert any("not judged against the rewards in the data: they are 0 for all" in note for note in report.notes)


def test_labels_are_no_truth_for_several_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    steps = [rz.Distil((8,), form="softmax", steps=2)]
    data = rz.Data((torch.randn(600, 6),), torch.randint(3, (600,)))
    report = rz.compress(model, steps, data, progress=False).report
    assert report.truth == {}
    assert any("they are labels, one for 3 outputs" in note for note in report.notes)


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Speaking(nn.Module):
    """A model that answers as transformers' do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x):
        return Answer(self.net(x))


@pytest.mark.parametrize(
    "steps",
    [
        (rz.Distil((8,), steps=2),),
        (rz.Distil((8,), steps=2, task=0.0, blend=True),),
        (rz.Quantize(8), rz.FineTune(2)),
        (rz.Quantize(8), rz.FineTune(2, blend=True)),
        (rz.Quantize(8), rz.FineTune(2, towards="rewards")),
        (rz.Quantize(8, activations="static"),),
        (rz.Prune("unstructured", 0.5, importance="second-order"),),
    ],
    ids=lambda steps: " ".join(type(step).__name__ for step in steps),
)
def test_models_that_answer_with_logits(steps):
    torch.manual_seed(0)
    x = torch.randn(600, 6)
    assert rz.compress(Speaking(), steps, rz.Data((x,), x[:, :1]), progress=False).report.figures


def test_float64_is_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(rz.FineTune, "apply", lambda *given: pytest.fail("it was run"))
    data = rows(600)
    double = rz.Data([t.double() for t in data.inputs])
    big = type(model)(6, 2).double()
    for steps, said in (
        ([rz.LowRank(rank=2), rz.FineTune(5), rz.Quantize(8)], r"Quantize: layer 'net.0' is torch.float64"),
        ([rz.LowRank(rank=2), rz.FineTune(5), rz.Share()], r"Share: layer 'net.0' is torch.float64"),
        ([rz.Distil((8,)), rz.FineTune(5)], r"takes float32, the data has torch.float64"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            rz.compress(big, steps, double, progress=False)


def test_the_transposed_layers_of_gpt2_are_compressed_and_those_left_stay_of_their_class():
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__ = "transformers.pytorch_utils"
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(16, 6), nn.ReLU(), Conv1D(16, 16), nn.ReLU(), Conv1D(1, 16)).requires_grad_(False)
    x = torch.randn(50, 6)
    small, _ = run_steps(net, [rz.Quantize(8, skip=("2",))], None, progress=False)
    assert set(packed(small)) == {"0"}
    assert type(small[2]) is type(net[2])
    assert torch.equal(small[2].weight, net[2].weight)
    assert float((small(x) - net(x)).abs().max() / net(x).std()) < 0.05
    thin, _ = run_steps(net, [rz.Prune("neurons", 0.5)], None, progress=False)
    assert [(layer.nx, layer.nf, tuple(layer.weight.shape)) for layer in thin[::2]] == [
        (6, 8, (6, 8)),
        (8, 8, (8, 8)),
        (8, 1, (8, 1)),
    ]


RESUMED = """
import os, signal, sys, torch
import rewardzip as rz
from recipes import rows
from rewardzip import resume
from rewardzip.recipe import run_steps
torch.manual_seed(0)
torch.set_num_threads(1)
folder, out, kill = sys.argv[1] or None, sys.argv[2], int(sys.argv[3])
write, written = resume.write, []
def dying(*args):
    write(*args)
    written.append(args[0].name)
    if len(written) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
resume.write = dying
recipe = [
    rz.Distil((12, 8), steps=120), rz.Prune("neurons", 0.25, rounds=2, finetune_steps=120),
    rz.FineTune(250, blend=True), rz.Quantize(4), rz.FineTune(150, amp="float16", early_stop=140),
]
small, notes = run_steps(rz.RewardMLP(6, 2, (24,)), recipe, rows(300), progress=False, resume=folder)
torch.save({"weights": small.state_dict(), "notes": notes, "written": written}, out)
"""


def test_killed_in_any_training_and_gone_on_is_never_killed(tmp_path):
    def run(folder, out, kill=0):
        command = [sys.executable, "-c", RESUMED, str(folder), str(tmp_path / out), str(kill)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=100)
        assert done.returncode == (-signal.SIGKILL if kill else 0)
        return None if kill else torch.load(tmp_path / out, weights_only=True)

    whole = run("", "whole.pt")
    # in a student, in the second round of pruning, in fine-tuning of floats and of the grid
    for kill in (4, 12, 3, 2):
        run(tmp_path / "run", "never.pt", kill)
    last = run(tmp_path / "run", "last.pt")
    assert same_state(whole["weights"], last["weights"])
    assert whole["notes"] == last["notes"]
    # the end of the last: everything else was read
    assert last["written"] == ["training-10"]
    assert not whole["written"]


def test_another_run_in_the_same_folder_is_refused(tmp_path, model):
    steps, data = (rz.Quantize(8), rz.FineTune(3)), rz.Data(rows(60).inputs)
    folder = tmp_path / "run"
    first, _ = run_steps(model, steps, data, progress=False, resume=folder)
    again, _ = run_steps(model, steps, data, progress=False, resume=folder)
    assert same_state(first.state_dict(), again.state_dict())
    for change, match in (
        ({"steps": (rz.Quantize(7), rz.FineTune(3))}, r"compress: .*step 1=.Quantize\(bits=8.*, this one .*bits=7"),
        ({"steps": (*steps, rz.FineTune(3))}, "steps=2, this one 3"),
        ({"data": rz.Data(rows(61).inputs)}, "data=.*, this one"),
        ({"seed": 1}, "seed=0, this one 1"),
        ({"model": trained(steps=2)}, "model=.*, this one"),
    ):
        with pytest.raises(ValueError, match=match):
            run_steps(**{"model": model, "steps": steps, "data": data, **change}, progress=False, resume=folder)
    (folder / "fit.pt").write_bytes(b"no run")
    with pytest.raises(ValueError, match=r"compress: .*fit.pt cannot be read"):
        run_steps(model, steps, data, progress=False, resume=folder)
