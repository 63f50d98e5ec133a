"""The command line: each command is one call of the library."""

import torch
from typer.testing import CliRunner

import rewardzip as rz
from rewardzip.cli import app


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_doctor_says_what_runs_each_op():
    told = run("doctor")
    assert told.exit_code == 0, told.output
    for words in (torch.__version__, "int8_linear", "fused_mlp", "reward_head", "CPU kernels use"):
        assert words in told.output


def test_inspect_prints_the_table(tmp_path):
    model = rz.swap(rz.RewardMLP(3, 1), rz.Int8())
    rz.save(model, tmp_path / "reward")
    told = run("inspect", str(tmp_path / "reward"))
    assert told.exit_code == 0, told.output
    assert str(rz.explain(model)) in told.output


def test_inspect_of_something_else_says_so(tmp_path):
    told = run("inspect", str(tmp_path))
    assert told.exit_code == 2
    assert "has no config.json" in told.output
