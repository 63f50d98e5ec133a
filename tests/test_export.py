"""Models in other runtimes: the same numbers within a bound that is derived, and clear words where there is no way."""

import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import mlp, swapped
from torch import nn
from typer.testing import CliRunner

import rewardzip as rz
from rewardzip import export_onnx
from rewardzip.cli import app
from rewardzip.export import unfused
from rewardzip.parity import error_bound

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

CONFIGS = {
    "dense": None,
    "int8": rz.Int8(),
    "dynamic": rz.Int8(activations="dynamic"),
    "dynamic, last layer too": rz.Int8(activations="dynamic", scalar_outputs=True),
    "static": rz.Int8(activations="static"),
    "bfloat16 products": rz.Int8(compute_dtype="bfloat16"),
}


def inputs(*widths, rows=40):
    return tuple(torch.randn(rows, k) for k in widths)


def integers(path):
    """The sizes of the int8 tensors in the file."""
    return sorted(np.prod(t.dims) for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8)


@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_of_a_reward_of_two_inputs(name, tmp_path, capsys):
    model, given, config = rz.RewardMLP(17, 6, (64, 32)).eval(), inputs(17, 6), CONFIGS[name]
    fast = model if config is None else rz.swap(model, config, given)
    made = rz.export(fast, tmp_path / "reward.onnx", given)
    assert integers(tmp_path / "reward.onnx") == (
        [] if config is None else [32] * config.scalar_outputs + [23 * 64, 64 * 32]
    )
    assert made.error <= made.bound
    assert made.bytes == (tmp_path / "reward.onnx").stat().st_size
    assert capsys.readouterr().out.strip() == str(made)
    # through another door, with other rows, and more of them
    session = onnxruntime.InferenceSession(tmp_path / "reward.onnx")
    assert [i.name for i in session.get_inputs()] == ["state", "action"]
    for rows in (1, 3, 500):
        others = inputs(17, 6, rows=rows)
        (found,) = session.run(None, {"state": others[0].numpy(), "action": others[1].numpy()})
        with torch.no_grad():
            wanted = fast(*others)
        (bound,) = error_bound(unfused(fast), others, torch.float32)
        assert (torch.from_numpy(found).double() - wanted.double()).abs().le(bound).all()


def test_files_are_small_and_hold_no_paths_of_this_machine(tmp_path):
    model, given = rz.RewardMLP(17, 6, (256, 256)).eval(), inputs(17, 6)
    int8 = rz.export(rz.swap(model, rz.Int8()), tmp_path / "int8.onnx", given)
    dense = rz.export(model, tmp_path / "dense.onnx", given)
    assert dense.bytes > 3 * int8.bytes
    assert b".py" not in (tmp_path / "int8.onnx").read_bytes()


ACTIVATIONS = (nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus)


class AllActivations(nn.Module):
    """A branch for each activation, functional ones beside modules, with LayerNorm in between."""

    def __init__(self):
        super().__init__()
        kinds = (*ACTIVATIONS, lambda: nn.GELU(approximate="tanh"))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), kind(), nn.Linear(16, 4)) for kind in kinds
        )
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        out = self.second(F.elu(torch.relu(self.first(x)) - 0.5, 0.7))
        for branch in self.branches:
            out = out + branch(x)
        return torch.tanh(out)


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic")], ids=["int8", "dynamic"])
def test_every_activation_layer_norm_and_functional_forwards(config, tmp_path):
    # layer by layer: one launch of each would compile a kernel of each, which other tests do
    fast = swapped(AllActivations().eval(), config, fuse=False)
    made = rz.export(fast, tmp_path / "all.onnx", inputs(8))
    assert len(integers(tmp_path / "all.onnx")) == 2 * (len(ACTIVATIONS) + 2)
    assert made.error < 1e-5 if config.activations is None else made.error <= made.bound


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2, self.fc3 = (
            nn.Linear(8, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 16),
            nn.Linear(16, 2),
        )

    def forward(self, x):
        return self.fc3(torch.relu(self.norm(self.fc2(torch.relu(self.fc1(x))))))


def test_a_fused_forward_with_layer_norm(tmp_path):
    fast = rz.swap(Functional().eval(), rz.Int8())
    assert {layer.op for layer in rz.explain(fast)} == {"fused_mlp"}
    for suffix in ("onnx", "pt2"):
        assert rz.export(fast, tmp_path / f"a.{suffix}", inputs(8)).error < 1e-6


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic"), rz.Int8(activations="static")], ids=str)
def test_a_row_of_nan_or_inf_stays_visible_and_its_neighbours_clean(config, tmp_path):
    given = inputs(17, 6)
    fast = rz.swap(rz.RewardMLP(17, 6).eval(), config, given)
    rz.export(fast, tmp_path / "a.onnx", given)
    given[0][3, 2], given[1][5, 0] = torch.nan, torch.inf
    (found,) = export_onnx.run_onnx(tmp_path / "a.onnx", given)
    bad = ~found.isfinite()
    assert bad.nonzero().flatten().tolist() == [3, 5]
    with torch.no_grad():
        wanted = fast(*given)
    assert torch.allclose(found[~bad], wanted[~bad], atol=1e-5)


def test_a_model_in_half_precision(tmp_path):
    model = rz.swap(mlp(8, 16).half().eval(), rz.Int8())
    made = rz.export(model, tmp_path / "half.onnx", tuple(x.half() for x in inputs(8)))
    assert 0 < made.bound < 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_pt2_holds_the_ops_and_runs_equal(name, tmp_path):
    model, given, config = rz.RewardMLP(17, 6, (64, 32)).eval(), inputs(17, 6), CONFIGS[name]
    fast = model if config is None else rz.swap(model, config, given)
    made = rz.export(fast, tmp_path / "reward.pt2", given)
    assert made.error == 0
    program = torch.export.load(tmp_path / "reward.pt2")
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # scales that are static are not for the one launch of a chain
    op = {"dense": "aten.linear", "static": "rewardzip.int8_dynamic_linear"}.get(name, "rewardzip.fused_mlp")
    assert f"{op}.default" in called
    for rows in (1, 3, 500):
        others = inputs(17, 6, rows=rows)
        with torch.no_grad():
            assert torch.equal(program.module()(*others), fast(*others))


@pytest.mark.parametrize("name", CONFIGS)
def test_pte_runs_equal_in_executorch(name, tmp_path):
    """Where ExecuTorch is installed: ``pip install executorch``, in an environment of its own."""
    pytest.importorskip("executorch")
    model, given, config = rz.RewardMLP(17, 6, (64, 32)).eval(), inputs(17, 6), CONFIGS[name]
    made = rz.export(model if config is None else rz.swap(model, config, given), tmp_path / "reward.pte", given)
    # rows are rounded alike, but where one lies between two integers
    assert made.error <= min(made.bound, 1e-4 if name in ("dense", "int8") else made.bound)
    dense = rz.export(model, tmp_path / "dense.pte", given)
    assert (tmp_path / "reward.pte").stat().st_size <= (tmp_path / "dense.pte").stat().st_size
    assert dense.error < 1e-5


@pytest.mark.parametrize("scalar_outputs", [False, True])
def test_layers_too_wide_for_one_launch(scalar_outputs, tmp_path):
    fast = rz.swap(mlp(64, 512, 300, outputs=1).eval(), rz.Int8(activations="dynamic", scalar_outputs=scalar_outputs))
    for suffix in ("onnx", "pt2"):
        made = rz.export(fast, tmp_path / f"a.{suffix}", inputs(64))
        assert made.error <= made.bound < 0.02


def test_the_model_is_left_as_it_was(tmp_path):
    model = rz.swap(rz.RewardMLP(17, 6), rz.Int8()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = inputs(17, 6)
    for suffix in ("onnx", "pt2"):
        rz.export(model, tmp_path / f"a.{suffix}", given)
    assert model.training
    assert rz.explain(model)[0].op == "fused_mlp"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.pt2"]


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Head(nn.Module):
    def forward(self, x):
        weight, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4)
        return torch.ops.rewardzip.reward_head(x, weight, scale, None, torch.ones(1, 4))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Bessel(), r"layer '3' \(Bessel\) uses .*bessel_j0"),
        (Head(), r"layer '3' \(Head\) uses rewardzip.reward_head"),
        (Branching(), "torch.export cannot trace Sequential"),
    ],
    ids=["an op torch.onnx lacks", "one of ours", "a branch on values"],
)
def test_what_has_no_form_in_onnx_is_named(last, message, tmp_path):
    (tmp_path / "a.onnx").write_text("older")
    model = swapped(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Identity(), last).eval())
    with pytest.raises(ValueError, match=message):
        rz.export(model, tmp_path / "a.onnx", inputs(8))
    assert (tmp_path / "a.onnx").read_text() == "older"
    assert os.listdir(tmp_path) == ["a.onnx"]


def off_by_one_percent(*arguments):
    scale = arguments[2]
    return int8_linear(arguments[0], arguments[1], export_onnx.need_onnx()[0].Mul(scale, [1.01]), *arguments[3:])


def without_bias(x, weight, scale, bias=None, *others):
    return int8_linear(x, weight, scale, None, *others)


int8_linear = export_onnx._int8_linear


@pytest.mark.parametrize("wrong", [off_by_one_percent, without_bias])
def test_a_wrong_translation_is_noticed_and_leaves_no_file(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "_int8_linear", wrong)
    model = rz.swap(rz.RewardMLP(17, 6).eval(), rz.Int8())
    with pytest.raises(ValueError, match=r"is off by .* where at most .* can be explained"):
        rz.export(model, tmp_path / "a.onnx", inputs(17, 6))
    assert os.listdir(tmp_path) == []


def test_the_bound_is_above_the_error_and_far_below_a_percent():
    """The bound against what fp32 really does, for an MLP and for attention."""
    attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    for model, given in ((mlp(23, 256, 256, outputs=1), inputs(23)), (attention, (torch.randn(20, 5, 16),))):
        with torch.no_grad():
            y = model(*given)
            exact = model.double()(*[x.double() for x in given])
        (bound,) = error_bound(model.float(), given, torch.float32)
        assert ((y.double() - exact).abs() <= bound).all()
        assert bound.max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("a.tflite", (torch.ones(2, 8),), r"ends in '.tflite'; it must be one of .onnx, .pt2, .pte"),
        ("folder.onnx", (torch.ones(2, 8),), "is a folder"),
        ("a.onnx", (), "must be tensors"),
        ("a.onnx", (1.0,), "must be tensors"),
        ("a.onnx", (torch.ones(2, 8), torch.ones(3, 8)), "the first sizes must agree"),
        ("a.onnx", (torch.ones(0, 8),), "the first sizes must agree"),
    ],
)
def test_bad_arguments(path, given, message, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises((ValueError, TypeError), match=message):
        rz.export(mlp(8, 16), tmp_path / path, given)


@pytest.mark.parametrize(
    ("suffix", "module", "extra"), [("onnx", "onnxruntime", r"rewardzip\[onnx\]"), ("pte", "executorch", "executorch")]
)
def test_without_the_extra_it_is_named(suffix, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=extra):
        rz.export(mlp(8, 16), tmp_path / f"a.{suffix}", inputs(8))
    assert os.listdir(tmp_path) == []


def test_the_command_line(tmp_path):
    rz.save(rz.swap(rz.RewardMLP(17, 6), rz.Int8()), tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "reward.onnx"), "--width", "17", "--width", "6"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "largest error" in done.output
    assert CliRunner().invoke(app, arguments[:-2]).exit_code == 2


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("config", [None, rz.Int8(), rz.Fused()], ids=str)
def test_a_model_that_takes_any_number_of_inputs(suffix, config, tmp_path):
    model = rz.MLP((3, 2)).eval()
    made = rz.export(model if config is None else rz.swap(model, config), tmp_path / f"mlp.{suffix}", inputs(3, 2))
    assert made.error <= made.bound


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("reduce", ["none", "mean_std"])
@pytest.mark.parametrize("config", [rz.Int8(), rz.Fused()], ids=str)
def test_an_ensemble(suffix, reduce, config, tmp_path):
    ensemble = rz.fuse_ensemble([rz.RewardMLP(3, 2, (16, 16)) for _ in range(3)], config, reduce)
    made = rz.export(ensemble, tmp_path / f"ensemble.{suffix}", inputs(3, 2))
    assert made.error <= made.bound < 1e-3


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize(
    "step",
    [rz.Quantize(4, per="group"), rz.Quantize(8, scheme="affine"), rz.Share(16)],
    ids=["groups", "affine", "share"],
)
def test_layers_that_other_runtimes_have_no_form_of_are_filled(step, suffix, tmp_path):
    small, _ = rz.run_steps(rz.RewardMLP(3, 2, (64, 64)), [step], None, progress=False)
    made = rz.export(small, tmp_path / f"small.{suffix}", inputs(3, 2))
    assert made.error <= made.bound < 1e-3


def test_a_pt2_file_has_none_of_the_rows_beside_its_examples(tmp_path):
    model, many = rz.RewardMLP(3, 2).eval(), inputs(3, 2, rows=50_000)
    assert rz.export(model, tmp_path / "reward.pt2", tuple(x[:8] for x in many)).bytes < 100_000
