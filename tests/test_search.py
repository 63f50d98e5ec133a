"""``rz.search`` on steps whose worth is known: what it chooses, what it refuses, and what a kill leaves."""

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from recipes import rows
from torch import nn

import rewardzip as rz
from rewardzip.candidates import at, candidates, title
from rewardzip.epic import Transitions
from rewardzip.journal import FILE
from rewardzip.search import RUNGS, search
from rewardzip.steps import STEPS, Step
from rewardzip.timing import Timing

# the package's own name for it is the function
MODULE = importlib.import_module("rewardzip.search")
RUNS = []
CLOCK = SimpleNamespace(now=0.0, perf_counter=lambda: CLOCK.now)


@dataclass(frozen=True)
class Cut(Step):
    """Hidden neurons to zero, by their number; what is left is made small and fast."""

    gone: int = 0
    noise: float = 0.0
    steps: int = 100
    seconds: float = 0.0

    def apply(self, model, work):
        RUNS.append(self)
        if self.seconds < 0:
            raise KeyboardInterrupt
        CLOCK.now += self.seconds
        first, last = model.net[0], model.net[2]
        keep = first.out_features - self.gone
        small = rz.RewardMLP(model.state_dict()["net.0.weight"].shape[1] - 2, 2, (keep,))
        with torch.no_grad():
            small.net[0].weight.copy_(first.weight[:keep])
            small.net[0].bias.copy_(first.bias[:keep])
            small.net[2].weight.copy_(last.weight[:, :keep] * (1 + self.noise * torch.randn(keep)))
            small.net[2].bias.copy_(last.bias)
        return small


@dataclass(frozen=True)
class Bloat(Step):
    """The same model with ballast."""

    def apply(self, model, work):
        class Heavy(nn.Module):
            def __init__(self):
                super().__init__()
                self.model, self.ballast = model, nn.Linear(500, 500)

            def forward(self, state, action):
                self.ballast(torch.ones(100, 500))
                return self.model(state, action)

        return Heavy()


@dataclass(frozen=True)
class Never(Step):
    def check(self, model, data):
        raise ValueError("Never: not on this model")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    RUNS.clear()
    monkeypatch.setattr(MODULE, "SECONDS", 0.02)


@pytest.fixture(autouse=True, scope="module")
def _unregistered():
    """The steps of this file are none of the package's."""
    for kind in (Cut, Bloat, Never, Shape):
        STEPS.pop(kind.__name__)


@pytest.fixture
def case():
    """A model 256 neurons wide of which the last 192 do nothing."""
    model = rz.RewardMLP(6, 2, (256,))
    with torch.no_grad():
        model.net[2].weight[:, 64:] = 0
    data = torch.randn(1200, 6), torch.randn(1200, 2)
    return model, data


def find(case, recipes, **options):
    model, data = case
    return search(model, data, recipes=recipes, batch=64, **{"progress": False, **options})


def test_the_smallest_within_the_gate_is_chosen(case, monkeypatch):
    # of three times the gain, on a machine with other work as well
    monkeypatch.setattr(MODULE, "SECONDS", 0.2)
    before = {k: v.clone() for k, v in case[0].state_dict().items()}
    found = find(case, [(Cut(64),), (Cut(192),), (Cut(232),)])
    assert found.recipe == (Cut(192),)
    assert found.passed
    assert found.model.hidden == (64,)
    assert found.report.figures["agreement"].value == 1
    listed = {c.name: c for c in found.report.front}
    assert not listed["Cut(gone=232)"].passed
    assert [c.name for c in found.report.front if c.chosen] == ["Cut(gone=192)"]
    assert any("gone=232" in c.name for c in found.front), "the smallest of all is on the front, passed or not"
    assert "chosen: Cut(gone=192)" in str(found.report)
    assert all(torch.equal(case[0].state_dict()[k], v) for k, v in before.items())


def test_a_gate_that_nothing_meets_gives_the_nearest_marked_failed(case):
    found = find(case, [(Cut(216),), (Cut(240),)], gate=rz.Gate(agreement=0.9999))
    assert not found.passed
    assert found.recipe == (Cut(216),)
    assert found.report.failures
    assert any("no recipe is within the gate" in note for note in found.report.notes)


def test_leave_it_dense(case):
    found = find(case, [(Bloat(),)])
    assert found.recipe == ()
    assert found.model is case[0]
    assert found.passed
    assert any("leave it dense" in note for note in found.report.notes)
    assert next(c for c in found.report.front if c.chosen).name == "original"


def test_the_better_half_is_trained_on(case, monkeypatch):
    # size alone decides: neighbours that differ little in speed change places on a busy machine
    monkeypatch.setattr(MODULE, "interleaved", lambda calls, *_: dict.fromkeys(calls, Timing(1.0, 1.0, 1.0)))
    widths = (0, 40, 80, 120, 160, 190)
    find(case, [(Cut(gone, steps=100 + gone),) for gone in widths])
    trained = {}
    for step in RUNS:
        trained.setdefault(step.gone, []).append(step.steps / (100 + step.gone))
    rungs = {gone: len(shares) for gone, shares in trained.items()}
    assert set(rungs) == set(widths)
    assert all(shares == pytest.approx(RUNGS[: len(shares)], abs=0.01) for shares in trained.values())
    # all are within the gate: those that gain most go on
    assert rungs[190] == 3
    assert rungs[0] == 1
    assert sum(n >= 2 for n in rungs.values()) == sum(n == 3 for n in rungs.values()) == 3


def test_a_killed_search_goes_on_where_it_was(case, tmp_path):
    recipes = [(Cut(64),), (Cut(128),), (Cut(192),), (Cut(96, seconds=-1),)]
    with pytest.raises(KeyboardInterrupt):
        find(case, recipes, folder=tmp_path)
    first = (tmp_path / FILE).read_text()
    assert len(first.splitlines()) == 1 + 3
    # killed in the middle of a line
    (tmp_path / FILE).write_text(first[:-20])
    RUNS.clear()
    found = find(case, recipes[:3], folder=tmp_path)
    assert [step for step in RUNS if step.steps == 5] == [Cut(192, steps=5)], "the first two were measured already"
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len({line["key"] for line in lines[1:]}) == len(lines) - 1
    # a finished one answers from what it has, and makes the model again
    RUNS.clear()
    again = find(case, recipes[:3], folder=tmp_path)
    assert again.recipe == found.recipe
    assert len(RUNS) == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), found.model.state_dict().values(), strict=True)
    )


KILLED = """
import sys, torch, rewardzip as rz
from recipes import rows
from test_search import slow
torch.manual_seed(0)
rz.search(rz.RewardMLP(6, 2, (64, 64)), rows(1200).inputs, recipes=slow(), folder=sys.argv[1], progress=False)
"""


def slow():
    return [(rz.LowRank(rank=rank), rz.FineTune(1000), rz.Quantize(8)) for rank in (2, 4, 8, 16, 24, 32)]


def test_a_process_killed_in_a_round_loses_nothing(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment) as process:
        file = tmp_path / FILE
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 2):
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
    kept = file.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 1 + len(slow())
    torch.manual_seed(0)
    model = rz.RewardMLP(6, 2, (64, 64))
    found = search(model, rows(1200).inputs, recipes=slow(), folder=tmp_path, progress=False)
    text = file.read_bytes()
    assert text.startswith(kept), "what was measured before is kept as it was"
    keys = [json.loads(line)["key"] for line in text.splitlines()[1:]]
    assert len(set(keys)) == len(keys), "and is not measured again"
    assert {f"{key[0]} {json.loads(key[2:])[0]['rank']}" for key in keys} >= {f"0 {r}" for r in (2, 4, 8, 16, 24, 32)}
    assert found.report.figures


def test_the_folder_of_another_search_is_refused(case, tmp_path):
    find(case, [(Cut(64),)], folder=tmp_path)
    model, data = case
    other = rz.RewardMLP(6, 2, (256,))
    tanh = copy.deepcopy(model)
    tanh.net[1] = nn.Tanh()
    for given, said in (((other, data), "another model;"), ((tanh, data), "another model;"), (case, "another seed;")):
        with pytest.raises(ValueError, match=said):
            find(given, [(Cut(64),)], folder=tmp_path, seed=int(given is case))


def test_returns_that_were_not_asked_for_before_are_measured_now(case, tmp_path):
    def played(**more):
        return {c.returns for c in find(case, [(Cut(64, steps=0),)], folder=tmp_path, **more).report.front[1:]}

    assert played() == {None}
    assert played(returns=lambda model: 3.0) == {3.0}
    assert played(returns=lambda model: 4.0) == {4.0}


def test_the_budget_is_kept(case, tmp_path, monkeypatch):
    """By a clock that building alone moves: how fast a machine times and judges is not what is asked here."""
    monkeypatch.setattr(MODULE, "time", CLOCK)

    recipes = [(Cut(gone, seconds=1 + gone % 3),) for gone in range(20)]

    def tried(budget: float) -> tuple[int, float]:
        found = find(case, recipes, budget=budget, folder=tmp_path)
        assert found.passed
        spent = [json.loads(line)["spent"] for line in (tmp_path / FILE).read_text().splitlines()[1:]]
        assert len(found.report.front) - 1 == len(spent)
        return len(spent), sum(spent)

    # a quarter is kept for the report; each trial is expected to take what the longest before it took
    assert tried(16) == (6, 12)
    # what was spent before counts, and with more time it goes on
    assert tried(16) == (6, 12)
    assert tried(32) == (12, 24)


@dataclass(frozen=True)
class Shape(Step):
    """Another reward, or the same one by another name: a potential added, the discount .9."""

    noise: float = 0.0

    def apply(self, model, work):
        noise = self.noise

        class Shaped(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = rz.swap(model, rz.Int8())

            def forward(self, state, action, after):
                error = noise * torch.sin(40 * action.sum(1))
                return self.model(state, action, after) + error + 2 * (0.9 * after[:, 0] - state[:, 0])

        return Shaped()


def test_the_gate_is_by_epic_where_the_next_states_are_known():
    model = rz.MLP((4, 2, 4), (64, 64))
    data = torch.randn(1200, 4), torch.randn(1200, 2), torch.randn(1200, 4)
    gate = rz.Gate(agreement=0, epic=0.02, best_of_n=9)
    found = find((model, data), [(Shape(),)], gate=gate, discount=0.9)
    assert found.passed, found.report.failures
    assert found.report.figures["pearson_distance"].value > 0.1 > 0.02 > found.report.figures["epic"].value
    other = find((model, data), [(Shape(0.5),)], gate=gate, discount=0.9)
    assert not other.passed
    assert not any(c.passed for c in other.report.front[1:]), "nor did it choose by another distance"
    # the potential cancels with its own discount alone
    assert not find((model, data), [(Shape(),)], gate=gate, discount=0.5).passed


def test_next_states_go_with_their_rows(case, monkeypatch):
    seen, of = [], Transitions.of
    monkeypatch.setattr(Transitions, "of", lambda *given, **options: seen.append(given) or of(*given, **options))
    state = case[1][0]
    found = find(case, [(Cut(192),)], next_states=state + 1)
    assert {"epic"} <= set(found.report.figures)
    # of the rows that choose, and of those that judge, which are looked at before any work as well
    assert len(seen) == 3
    assert all(torch.equal(inputs[0] + 1, followed) for inputs, followed in seen)
    assert not torch.equal(seen[1][1], seen[2][1])
    with pytest.raises(ValueError, match="1199 next states for 1200 rows"):
        find(case, [(Cut(192),)], next_states=state[1:])


def test_returns_are_asked_of_what_is_fully_trained(case):
    asked = []
    found = find(case, [(Cut(64),), (Cut(192),)], returns=lambda m: asked.append(m) or 5.0)
    assert {c.returns for c in found.report.front} == {None, 5.0}
    assert len(asked) == 2 + 2, "each of two at the end, then both models of the report"
    assert found.report.returns["after"].value == 5


def test_broken_candidates_are_never_chosen(case):
    found = find(case, [(Cut(192, noise=float("nan")),), (Cut(0),)])
    assert [c.passed for c in found.report.front if "nan" in c.name] == [False] * len(
        [c for c in found.report.front if "nan" in c.name]
    )
    assert found.passed


def test_bad_input_is_named(case):
    model, (state, action) = case
    with pytest.raises(ValueError, match=r"600 rows are too few.*give 667"):
        find((model, (state[:600], action[:600])), [(Cut(1),)])
    with pytest.raises(ValueError, match="budget is 0"):
        find(case, [(Cut(1),)], budget=0)
    with pytest.raises(ValueError, match="no recipes"):
        find(case, [])
    with pytest.raises(ValueError, match=r"none of the 1 recipes works.*Never: not on this model"):
        find(case, [(Never(),)])
    found = find(case, [(Never(),), (Cut(192),)])
    assert any("not tried: Never()" in note for note in found.report.notes)


def test_recipes_in_words_and_in_part():
    recipe = (rz.FineTune(steps=2000), rz.Quantize(4))
    assert title(recipe) == "FineTune(steps=2000) + Quantize(bits=4)"
    assert at(recipe, 0.25) == (rz.FineTune(steps=500), rz.Quantize(4))
    assert at((rz.FineTune(steps=3),), 0.05) == (rz.FineTune(steps=1),)


def test_the_usual_candidates_fit_the_usual_model():
    model = rz.RewardMLP(17, 6, (256, 256))
    data = rz.Data((torch.randn(400, 17), torch.randn(400, 6)))
    listed = candidates(model, data)
    assert len(listed) == len(set(listed)) > 10
    for recipe in listed:
        for step in recipe:
            step.check(model, data)


@dataclass(frozen=True)
class Trips(Step):
    def apply(self, model, work):
        raise RuntimeError("over its own feet")


def test_a_recipe_that_raises_anything_is_left_out(case):
    found = find(case, [(Trips(),), (Cut(192),)])
    assert found.passed
    assert any(note.endswith("Trips(): RuntimeError: over its own feet") for note in found.report.notes)
