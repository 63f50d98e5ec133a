"""The demo in a short form: everything it does, a few steps of each."""

import html.parser
import re
import sys

import pytest
import torch
from rich.table import Table

import rewardzip as rz

pytest.importorskip("gymnasium")
pytest.importorskip("pytorch_mppi")
pytest.importorskip("matplotlib")

from rewardzip.demo import NEXT, main
from rewardzip.demo.candidates import rounded_to_three
from rewardzip.demo.page import write_page
from rewardzip.demo.pendulum import Dynamics, transitions
from rewardzip.demo.planner import fly


class Balanced(html.parser.HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "iframe")
        assert not {"src", "onload"} & {name for name, _ in attributes}
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    page = tmp_path_factory.mktemp("demo") / "out" / "demo.html"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rewardzip.demo.fly", lambda *given: threads.append(torch.get_num_threads()) or fly(*given))
        threads = []
        found = main(page, rows=6000, training_steps=1500, seeds=1, episode_steps=100)
    assert set(threads) == {1}, "a second thread that waits for a busy core makes the demo take many times longer"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
    return found, page


def test_int8_plans_what_fp32_plans_and_ternary_does_not(shown):
    fp32, int8, both, ternary = shown[0]
    assert [c.name for c in shown[0]] == ["fp32", "int8", "int8 x int8", "ternary"]
    for good in (int8, both):
        assert good.agreement > 0.98
        assert abs(good.returned - fp32.returned) < 0.02 * abs(fp32.returned)
        assert fp32.size / good.size > 3.5
    assert ternary.agreement < both.agreement
    assert ternary.returned < fp32.returned - 100


def test_page_is_whole_and_stands_alone(shown):
    candidates, page = shown
    text = page.read_text()
    parsed = Balanced(text)
    assert parsed.open == []
    assert text.count("<svg") == 4
    assert "$" not in "".join(parsed.texts), "a placeholder was left"
    for candidate in candidates:
        assert candidate.name in text
        assert f"{candidate.returned:.1f}" in text
    assert [p.name for p in page.parent.iterdir()] == ["demo.html"]


def test_what_the_page_says_to_try_next_runs(shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<pre>(.*?)</pre>", shown[1].read_text(), re.S)
    line, other = (text.partition(", `")[0] for text in NEXT.partition(": ")[2].split(". Or the best of many: "))
    state, action = torch.randn(800, 3), torch.randn(800, 1)
    for script in (html.unescape(code), f"import rewardzip as rz\n{line}\n{other}"):
        names = {"model": rz.RewardMLP(3, 1, (16,)), "state": state, "action": action}
        exec(script.replace("budget=120", "budget=1"), names)
        assert names["small"].report is not None
        loaded = rz.load("reward/")
        assert torch.equal(loaded(state, action), names["small"].model(state, action))


def test_an_episode_is_fixed_by_its_seed():
    torch.manual_seed(1)
    reward, dynamics = rz.RewardMLP(3, 1, (8,)), Dynamics(8)
    before = torch.get_rng_state()
    first = fly(reward, dynamics, seed=3, steps=4, samples=8, horizon=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = fly(reward, dynamics, seed=3, steps=4, samples=8, horizon=3)
    assert first.angles == again.angles
    assert torch.equal(torch.get_rng_state(), before)
    assert fly(reward, dynamics, seed=4, steps=4, samples=8, horizon=3).angles != first.angles


def test_transitions_are_pendulums_own():
    """The reward's formula, and every angle and speed among the rows."""
    state, action, reward, after = transitions(400)
    angle = torch.atan2(state[:, 1], state[:, 0])
    formula = -(angle**2 + 0.1 * state[:, 2] ** 2 + 0.001 * action[:, 0] ** 2)
    assert torch.allclose(reward, formula, atol=1e-4)
    assert angle.abs().min() < 0.2
    assert angle.abs().max() > 3
    assert state[::20, 2].abs().max() > 6, "episodes start at any speed"
    assert (state[1:20] == after[:19]).all(), "within an episode the next row starts where this one ended"


def test_three_values_a_row():
    model = rz.RewardMLP(3, 1, (16,))
    rounded = rounded_to_three(model).net[0].weight
    assert all(len(row.abs().unique()) <= 2 for row in rounded)
    assert not torch.equal(rounded, model.net[0].weight)


@pytest.mark.parametrize("missing", ["gymnasium", "pytorch_mppi", "matplotlib"])
def test_without_a_package_the_extra_is_named(missing, monkeypatch, shown, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    call = fly, (rz.RewardMLP(3, 1), Dynamics(), 0)
    if missing == "matplotlib":
        call = write_page, (tmp_path / "demo.html", shown[0], torch.zeros(3), Table())
    with pytest.raises(ImportError, match=r"pip install 'rewardzip\[rl,report\]'"):
        call[0](*call[1])
