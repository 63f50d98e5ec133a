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


def test_inspect_shows_zeros_and_bytes_by_theory(tmp_path):
    linear = torch.nn.Linear(512, 512)
    with torch.no_grad():
        linear.weight[:, 128:] = 0
    rz.save(rz.swap(torch.nn.Sequential(linear), rz.Int8()).eval(), tmp_path / "reward")
    told = run("inspect", str(tmp_path / "reward"))
    # 32 x 32 blocks of 16 x 4 in int8 with an index, and 33 starts
    for words in ("BlockSparseLinear", "75 %", "384 dead inputs", str(32 * 32 * (64 + 4) + 4 * 33), str(513 * 512 * 4)):
        assert words in told.output


def test_inspect_of_something_else_says_so(tmp_path):
    told = run("inspect", str(tmp_path))
    assert told.exit_code == 2
    assert "has no config.json" in told.output
