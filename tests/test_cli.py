"""The command line: each command is one call of the library."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import rewardzip as rz
from rewardzip.cli import app
from rewardzip.recipe import save_recipe
from rewardzip.sources import load_data, load_model
from rewardzip.timing import interleaved as timed


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


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model in each form, and data in each form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("rewardzip.evaluate", "rewardzip.search"):
        monkeypatch.setattr(
            importlib.import_module(module), "interleaved", lambda calls, device, seconds: timed(calls, device, 0.01)
        )
    model = rz.RewardMLP(3, 1)
    rz.save(model, "dense")
    rz.save(rz.swap(model, rz.Int8()), "fast")
    rz.save(rz.RewardMLP(3, 1), "other")
    torch.save(model.net.state_dict(), "mlp.pt")
    safetensors.torch.save_file(model.net.state_dict(), "mlp.safetensors")
    state, action, reward = torch.randn(900, 3), torch.randn(900, 1), torch.randn(900)
    np.savez("rows.npz", state=state, action=action, rewards=reward)
    (tmp_path / "named_by_test.py").write_text(
        "import torch, rewardzip as rz\n"
        "def model(): return rz.load('dense')\n"
        "def data():\n"
        "    import numpy as np\n"
        "    rows = np.load('rows.npz')\n"
        "    return [torch.from_numpy(rows[k]) for k in ('state', 'action', 'rewards')]\n"
        "def wrong(): return 3\n"
        "def broken(): raise RuntimeError('no licence')\n"
    )
    yield model, (state, action, reward)
    sys.modules.pop("named_by_test", None)


def test_evaluate_passes_fails_and_tells(work, tmp_path):
    told = run("evaluate", "dense", "fast", "rows.npz", "--json", "--report", "page.html")
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert found["passed"]
    assert found["truth"]["before"]["agreement"]
    assert found["rows"] == 900
    assert (tmp_path / "page.html").exists()
    told = run("evaluate", "dense", "other", "rows.npz")
    assert told.exit_code == 1
    assert "failed: pair agreement" in told.output
    # the limits are those of the command
    told = run("evaluate", "dense", "other", "rows.npz", "--agreement", "0", "--epic", "1", "--best-of-n", "9")
    assert told.exit_code == 0, told.output


@pytest.mark.parametrize("model", ["dense", "mlp.pt", "mlp.pt:relu", "mlp.safetensors", "named_by_test:model"])
def test_models_by_every_name_are_the_same(work, model):
    dense, (state, action, _) = work
    loaded = load_model(model)
    data, _ = load_data("rows.npz", loaded)
    assert torch.equal(loaded(*data.inputs).flatten(), dense(state, action))


def test_an_activation_is_named_behind_the_weights(work):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2, bias=False))
    torch.save(net.state_dict(), "q.pt")
    x = torch.randn(5, 4)
    assert torch.equal(load_model("q.pt:tanh")(x), net(x))
    with pytest.raises(ValueError, match=r"'swish' is not one of relu"):
        load_model("q.pt:swish")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_more_than_ten_layers_are_in_the_order_of_their_numbers(work, suffix):
    net = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(6, 6), nn.ReLU()))).append(nn.Linear(6, 1))
    state = dict(sorted(net.state_dict().items()))
    torch.save(state, "deep.pt")
    safetensors.torch.save_file(state, "deep.safetensors")
    x = torch.randn(5, 6)
    assert torch.equal(load_model(f"deep.{suffix}")(x), net(x))


def test_names_without_numbers_have_an_order_in_pt_alone(work):
    state = {"out.weight": torch.randn(6, 6), "hidden.weight": torch.randn(6, 6)}
    torch.save(state, "named.pt")
    safetensors.torch.save_file(state, "named.safetensors")
    assert torch.equal(load_model("named.pt")[0].weight, state["out.weight"])
    with pytest.raises(ValueError, match="tell the order of the layers"):
        load_model("named.safetensors")


def test_columns_are_in_the_order_of_their_numbers(work):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    x = torch.randn(20, 12)
    columns = {f"x_{i}": x[:, i].tolist() for i in sorted(range(12), key=str)}
    parquet.write_table(pyarrow.table(columns), "rows.parquet")
    assert torch.equal(load_data("rows.parquet", nn.Linear(12, 1))[0].inputs[0], x)
    parquet.write_table(pyarrow.table({**columns, "x": columns["x_0"]}), "rows.parquet")
    with pytest.raises(ValueError, match="the column 'x' and others"):
        load_data("rows.parquet", nn.Linear(12, 1))


@pytest.mark.parametrize("form", ["npz", "parquet", "function"])
def test_data_by_every_name_are_the_same(work, form):
    model, tensors = work
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        state, action, reward = (t.tolist() for t in tensors)
        columns = {f"state_{i}": [row[i] for row in state] for i in range(3)}
        parquet.write_table(pyarrow.table({"reward": reward, **columns, "action": action}), "rows.parquet")
    name = {"npz": "rows.npz", "parquet": "rows.parquet", "function": "named_by_test:data"}[form]
    data, _ = load_data(name, model)
    assert [tuple(t.shape) for t in data.inputs] == [(900, 3), (900, 1)]
    for mine, its in zip((*data.inputs, data.rewards), tensors, strict=True):
        assert torch.equal(mine, its)


def test_rejected_rows_are_known_by_their_names(work):
    model, (state, action, _) = work
    np.savez("pairs.npz", action=action, state=state, rejected_action=-action, rejected_state=-state)
    data, _ = load_data("pairs.npz", model)
    assert torch.equal(data.inputs[0], state), "in the order of the forward's parameters"
    assert torch.equal(data.rejected[0], -state)
    assert torch.equal(data.rejected[1], -action)


def test_compress_runs_a_recipe_and_saves_the_model(work):
    model, (state, action, _) = work
    with open("recipe.json", "w") as file:
        json.dump({"steps": [{"step": "Quantize", "bits": 8}]}, file)
    told = run("compress", "mlp.pt", "recipe.json", "rows.npz", "small", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["model"] == "small"
    small = rz.load("small")(torch.cat([state, action], 1)).flatten()
    assert 0 < (small - model(state, action)).abs().max() < 0.05
    assert run("compress", "mlp.pt", "recipe.json", "rows.npz", "small", "--resume", "run").exit_code == 0
    told = run("compress", "mlp.pt", "recipe.json", "rows.npz", "small", "--resume", "run", "--seed", "1")
    assert (told.exit_code, "the run in run has" in told.output) == (2, True)
    with open("coarse.json", "w") as file:
        json.dump({"steps": [{"step": "Quantize", "bits": 2}]}, file)
    told = run("compress", "dense", "coarse.json", "rows.npz", "small")
    assert told.exit_code == 1, told.output


@pytest.mark.parametrize("step", [rz.Distil((8,), steps=2), rz.FineTune(2, towards="rewards")])
def test_rewards_of_a_chain_need_no_dimension_of_their_own(work, step):
    save_recipe([*[rz.LowRank(rank=2)] * isinstance(step, rz.FineTune), step], "learn.json")
    told = run("compress", "mlp.pt", "learn.json", "rows.npz", "small")
    assert told.exit_code in (0, 1), told.output
    assert Path("small").exists(), told.output


@pytest.mark.parametrize("command", [("compress", "dense", "learn.json", "rows.npz"), ("search", "dense", "rows.npz")])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("taken",), "taken holds other files (thesis.tex)"),
        (("taken/thesis.tex/small",), "small is below a file"),
        (("small", "--report", "nowhere/page.html"), "nowhere is not a folder to write page.html in"),
    ],
)
def test_where_to_write_is_looked_at_before_any_work(work, monkeypatch, command, given, said):
    monkeypatch.setattr("rewardzip.sources.load_data", lambda *given: pytest.fail("it has begun"))
    save_recipe([rz.Quantize(8)], "learn.json")
    Path("taken").mkdir()
    Path("taken/thesis.tex").write_text("years")
    told = run(*command, *given)
    assert told.exit_code == 2, told.output
    assert said in told.output.replace("\n", "")


def test_an_error_nobody_expected_is_not_the_gates_code(work, monkeypatch):
    def fail(*given, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rewardzip.sources.load_data", fail)
    told = run("evaluate", "dense", "fast", "rows.npz")
    assert told.exit_code == 2


@pytest.mark.parametrize("name", ["next_state", "next_states"])
def test_next_states_in_a_file_are_for_epic(work, name):
    _, (state, action, _) = work
    np.savez("steps.npz", state=state, action=action, **{name: state + 1})
    told = run("evaluate", "dense", "fast", "steps.npz", "--json")
    assert told.exit_code == 0, told.output
    assert "epic" in json.loads(told.output)["figures"]
    save_recipe([rz.Quantize(8)], "learn.json")
    told = run("compress", "dense", "learn.json", "steps.npz", "small", "--json")
    assert "epic" in json.loads(told.output)["figures"]
    with pytest.warns(UserWarning, match="Sequential takes one input"):
        data, following = load_data("steps.npz", load_model("mlp.pt"))
    assert following is None
    assert data.inputs[0].shape == (900, 4)


def test_score_export_and_doctor_for_machines(work):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    _, (state, action, _) = work
    columns = {f"s{i}": state[:, i].tolist() for i in range(3)}
    parquet.write_table(pyarrow.table({**columns, "a": action[:, 0].tolist()}), "rows.parquet")
    told = run("score", "fast", "rows.parquet", "scores", "--columns", "s*", "--columns", "a", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["rows"] == 900
    told = run("doctor", "--json")
    assert json.loads(told.output)["ops"]["int8_linear"]
    told = run("export", "fast", "fast.pt2", "--width", "3", "--width", "1", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.output)["path"] == "fast.pt2"


def test_search_tells_what_it_found(work, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("rewardzip.search"),
        "candidates",
        lambda model, data: [(rz.Quantize(8),), (rz.Quantize(2),)],
    )
    arguments = ("search", "named_by_test:model", "named_by_test:data", "small", "--budget", "20", "--folder", "kept")
    told = run(*arguments, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert found["recipe"][0]["step"] == "Quantize"
    assert found["recipe"][0]["bits"] == 8
    assert 1 <= len(found["front"]) <= 3, "two recipes and the dense model, but for those slower than a smaller one"
    assert rz.explain(rz.load("small"))
    told = run(*arguments, "--agreement", "1", "--epic", "0")
    assert told.exit_code == 1, told.output
    assert "no recipe is within the gate" in told.output


def test_inspect_for_machines(work):
    told = run("inspect", "fast", "--json")
    assert [layer["name"] for layer in json.loads(told.output)] == ["net.0", "net.2", "net.4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "dense", "fast", "missing.npz"), "missing.npz"),
        (("evaluate", "dense", "nothing", "rows.npz"), "nothing is neither a folder"),
        (("evaluate", "dense", "mlp.pth", "rows.npz"), "mlp.pth does not exist"),
        (("evaluate", "named_by_test:missing", "fast", "rows.npz"), "cannot be imported"),
        (("evaluate", "named_by_test:wrong", "fast", "rows.npz"), "gives int, not a torch.nn.Module"),
        (("evaluate", "dense", "fast", "rows.npz", "--agreement", "99"), "agreement is 99"),
        (("evaluate", "dense", "fast", "wide.npz"), "RewardMLP takes 3 numbers"),
        (("evaluate", "dense", "fast", "nan.npz"), "rows of input 0 hold inf or NaN"),
        (("evaluate", "dense", "fast", "few.npz"), "50 rows are too few"),
        (("evaluate", "pickle.pt", "fast", "rows.npz"), "cannot be read as weights alone"),
        (("evaluate", "conv.pt", "fast", "rows.npz"), "is not of an MLP alone"),
        (("evaluate", "gap.pt", "fast", "rows.npz"), "gives 8 numbers, '1.' after it takes 9"),
        (("compress", "dense", "recipe.txt", "rows.npz", "small"), "recipe.txt"),
        (("search", "dense", "rows.npz", "small", "--budget", "0"), "budget is 0"),
        (("evaluate", "named_by_test:broken", "fast", "rows.npz"), "RuntimeError: no licence"),
        (("compress", "dense", "student.json", "rows.npz", "small"), "has no attribute 'nothere'"),
        (("compress", "mlp.pt", "tune.json", "wide.npz", "small"), "does not take inputs of the shapes"),
    ],
)
def test_bad_input_is_code_2_and_a_line(work, tmp_path, arguments, said):
    _, (state, action, _) = work
    np.savez("wide.npz", state=torch.randn(900, 9), action=action)
    np.savez("nan.npz", state=state.index_fill(1, torch.tensor([0]), torch.nan), action=action)
    np.savez("few.npz", state=state[:50], action=action[:50])
    torch.save(rz.RewardMLP(3, 1), "pickle.pt")
    torch.save(nn.Conv2d(1, 1, 3).state_dict(), "conv.pt")
    torch.save({"0.weight": torch.randn(8, 4), "1.weight": torch.randn(1, 9)}, "gap.pt")
    save_recipe([rz.Distil("named_by_test:nothere")], "student.json")
    save_recipe([rz.LowRank(rank=2), rz.FineTune(3)], "tune.json")
    told = run(*arguments)
    assert told.exit_code == 2, told.output
    assert said in told.output.replace("\n", ""), told.output
    assert "Traceback" not in told.output
    assert not (tmp_path / "small").exists()


def test_doctor_warms_the_cache(tmp_path, monkeypatch):
    from rewardzip import warm

    monkeypatch.setattr(warm, "ACTIVATIONS", (torch.nn.ReLU,))
    monkeypatch.setattr(warm, "CONFIGS", (rz.Int8(),))
    result = CliRunner().invoke(app, ["doctor", "--warm"])
    assert result.exit_code == 0, result.output
    assert "5 kinds of layer ran in" in result.output
