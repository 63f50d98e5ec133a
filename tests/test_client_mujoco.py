"""A MuJoCo task: transitions of HalfCheetah fit a reward, and planning by what is left of it earns what it earned."""

import pytest
import torch
from cheetah import scale, trained
from integrations import run_section

import rewardzip as rz
from rewardzip.demo.candidates import rounded_to_three

pytest.importorskip("mujoco")

pytestmark = pytest.mark.clients


def test_what_planning_earns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs
    model, held = trained()
    mean, std = scale()
    names = run_section("Gymnasium and MuJoCo", model=model, data=held.inputs, mean=mean, std=std)
    returns, report = names["returns"], names["report"]
    before, after = (report.returns[which].value for which in ("before", "after"))
    ruined = float(returns(rz.swap(rounded_to_three(model), rz.Int8())).mean())
    blind = float(returns(lambda state, action, after: torch.zeros(state.shape[:-1])).mean())
    print(f"HalfCheetah, planned: {before:.2f} dense, {after:.2f} int8, {ruined:.2f} ternary, {blind:.2f} by chance")
    assert before > blind + 10, "these episodes cannot tell a good reward from none"
    assert after > before - 0.1 * (before - blind)
