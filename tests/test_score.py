"""Bulk scoring on this machine: what is written, what is refused, and that a killed run goes on as if nothing was."""

import errno
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rewardzip as rz
from rewardzip import score_folder, score_parts, score_ray, score_rows
from rewardzip.cli import app
from rewardzip.identity import model_hash
from rewardzip.score_plan import make_plan

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parent.parent
S, A = 3, 2
COLUMNS = ["state", "action"]


@pytest.fixture
def model():
    return rz.RewardMLP(S, A, (16, 16)).eval()


def values(rows, seed=0):
    make = np.random.default_rng(seed)
    return make.standard_normal((rows, S)).astype("f4"), make.standard_normal((rows, A)).astype("f4")


def lists(x):
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])


def table(state, action, first=0):
    return pa.table({"id": np.arange(first, first + len(state)), "state": lists(state), "action": lists(action)})


def transitions(folder, counts=(700, 500), row_group=100):
    """Files of rows with an id, and all their values."""
    folder.mkdir()
    every, first = [], 0
    for i, count in enumerate(counts):
        rows = values(count, i)
        pq.write_table(table(*rows, first), folder / f"{i}.parquet", row_group_size=row_group)
        every.append(rows)
        first += count
    return tuple(np.concatenate(side) for side in zip(*every, strict=True))


def told(model, *inputs):
    with torch.no_grad():
        return model(*[torch.from_numpy(x) for x in inputs]).numpy()


def run(model, inputs, output, **settings):
    return rz.score(model, inputs, output, **{"columns": COLUMNS, "progress": False, **settings})


def same_folders(a, b):
    names = sorted(os.listdir(a))
    assert names == sorted(os.listdir(b))
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_rows_keep_their_order_and_can_be_joined_back(model, tmp_path):
    state, action = transitions(tmp_path / "in")
    scores = run(model, tmp_path / "in", tmp_path / "out", keep=["id"], part_rows=300, batch_size=64)
    assert (scores.rows, scores.parts, scores.bad_rows, scores.not_finite) == (1200, 5, 0, 0)
    written = pq.read_table(tmp_path / "out")
    assert written["id"].to_pylist() == list(range(1200))
    assert written["file"].to_pylist() == ["0.parquet"] * 700 + ["1.parquet"] * 500
    assert written["row"].to_pylist() == [*range(700), *range(500)]
    wanted = told(model, state, action)
    # the same sums, in blocks of 64 rows: a few roundings apart
    assert np.abs(written["score"].to_numpy() - wanted).max() <= 8 * 2.0**-24 * np.abs(wanted).max()
    assert sorted(os.listdir(tmp_path / "out")) == ["_rewardzip.json", *(f"part-00000{i}.parquet" for i in range(5))]


@pytest.mark.parametrize(
    "columns",
    [
        ["state", "action"],
        ["s_0,s_1,s_2", "a_0,a_1"],
        ["s_*", "a_*"],
        [["s_0", "s_1", "s_2"], ["a_0", "a_1"]],
        ["s_0, pair", "a_*"],
        ["ragged", "action"],
        ["large", "half"],
        ["double", "action"],
    ],
    ids=str,
)
def test_every_way_to_name_the_columns_gives_the_same(model, tmp_path, columns):
    state, action = (x.astype("f2").astype("f4") for x in values(200))
    held = table(state, action)
    for name, column in {
        **{f"s_{i}": pa.array(state[:, i]) for i in range(S)},
        **{f"a_{i}": pa.array(action[:, i].astype("f8")) for i in range(A)},
        "pair": lists(np.ascontiguousarray(state[:, 1:])),
        "ragged": pa.array(list(state)),
        "large": pa.array(list(state), pa.large_list(pa.float32())),
        "double": pa.array(list(state.astype("f8")), pa.list_(pa.float64(), S)),
        "half": lists(action.astype("f2")),
    }.items():
        held = held.append_column(name, column)
    pq.write_table(held, tmp_path / "in.parquet")
    run(model, tmp_path / "in.parquet", tmp_path / "out", columns=columns)
    run(model, tmp_path / "in.parquet", tmp_path / "plain")
    assert pq.read_table(tmp_path / "out").equals(pq.read_table(tmp_path / "plain"))


def test_integers_and_booleans_are_numbers(tmp_path):
    counts, flags = np.arange(50), np.arange(50) % 2 == 0
    pq.write_table(pa.table({"n": counts, "flag": flags}), tmp_path / "in.parquet")
    model = nn.Linear(2, 1).eval()
    run(model, tmp_path / "in.parquet", tmp_path / "out", columns=["n,flag"])
    wanted = told(model, np.stack([counts, flags], 1).astype("f4"))[:, 0]
    assert np.allclose(pq.read_table(tmp_path / "out")["score"].to_numpy(), wanted, rtol=1e-6)


def damaged(state, action):
    """Rows 5 to 11, each bad in a way of its own; row 11 in two."""
    rows = [[None if i == 5 else list(map(float, row)) for i, row in enumerate(x)] for x in (state, action)]
    rows[0][6][1] = float("nan")
    rows[1][7][0] = float("inf")
    rows[1][8][1] = 1e300
    rows[0][9] = [1.0, 2.0]
    rows[1][10][0] = None
    rows[0][11][0], rows[1][11] = float("-inf"), None
    return pa.table({name: pa.array(x, pa.list_(pa.float64())) for name, x in zip(COLUMNS, rows, strict=True)})


def test_bad_rows_are_counted_and_the_others_are_as_without_them(model, tmp_path):
    state, action = values(300)
    pq.write_table(table(state, action), tmp_path / "good.parquet")
    pq.write_table(damaged(state, action), tmp_path / "bad.parquet")
    good = run(model, tmp_path / "good.parquet", tmp_path / "a", batch_size=32)
    scores = run(model, tmp_path / "bad.parquet", tmp_path / "b", batch_size=32)
    assert (good.bad_rows, scores.bad_rows) == (0, 7)
    assert scores.bad == {
        "state: null": (1, 5),
        "action: null": (3, 5),
        "state: NaN": (1, 6),
        "action: inf": (2, 7),
        "state: not 3 long": (1, 9),
        "state: inf": (1, 11),
    }
    written = pq.read_table(tmp_path / "b")["score"]
    assert np.flatnonzero(written.is_null()).tolist() == list(range(5, 12))
    wanted, keep = pq.read_table(tmp_path / "a")["score"].to_numpy(), written.is_valid().to_numpy()
    assert np.array_equal(written.drop_null().to_numpy(), wanted[keep])
    assert "7 rows have no score" in str(scores)
    assert "action: inf: 2 rows, the first is row 7" in str(scores)
    # an unfinished part is counted once, a finished one from its footer
    assert run(model, tmp_path / "bad.parquet", tmp_path / "b", batch_size=32).bad == scores.bad


class Picky(nn.Module):
    def forward(self, state, action):
        if not (state.isfinite().all() and action.isfinite().all()):
            raise ValueError("not finite")
        return state[:, 0] + action[:, 0]


def test_the_model_never_sees_a_bad_value(tmp_path):
    pq.write_table(damaged(*values(300)), tmp_path / "in.parquet")
    assert run(Picky().eval(), tmp_path / "in.parquet", tmp_path / "out").bad_rows == 7


def test_strict_names_the_first_bad_row_and_keeps_what_is_finished(model, tmp_path):
    state, action = values(300)
    state[250, 1] = np.nan
    pq.write_table(table(state, action), tmp_path / "in.parquet", row_group_size=100)
    with pytest.raises(ValueError, match=r"in\.parquet, row 250: state: NaN"):
        run(model, tmp_path / "in.parquet", tmp_path / "out", part_rows=100, strict=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["_rewardzip.json", "part-000000.parquet", "part-000001.parquet"]
    assert run(model, tmp_path / "in.parquet", tmp_path / "out", part_rows=100).scored == 100


def test_what_an_actor_of_ray_finds_wrong_survives_the_way_back(model, tmp_path):
    """It is written down, and its part left out of what is done."""
    state, action = values(40)
    state[17, 1] = np.nan
    pq.write_table(table(state, action), tmp_path / "rows.parquet")
    folder = tmp_path / "out"
    folder.mkdir()
    plan = make_plan(tmp_path / "rows.parquet", COLUMNS, (), 100, folder, False)
    actor = score_ray.Actor(model, plan, folder, 16, True, "cpu")
    assert len(actor({"id": np.array([0])})["id"]) == 0
    told = score_ray.noted_error(folder)
    assert type(told) is ValueError
    assert "row 17: state: NaN" in str(told)
    # the others do no more work
    actor.scorer = None
    assert len(actor({"id": np.array([0])})["id"]) == 0
    score_ray.note_error(OSError(28, "No space left on device"), folder)
    assert score_ray.noted_error(folder).errno == 28


def test_scores_that_are_not_finite_are_told(tmp_path):
    model = nn.Linear(S, 1).eval()
    with torch.no_grad():
        model.weight.fill_(3e38)
    state, action = values(100)
    pq.write_table(table(np.abs(state), action), tmp_path / "in.parquet")
    scores = run(model, tmp_path / "in.parquet", tmp_path / "out", columns=["state"])
    infinite = np.isinf(pq.read_table(tmp_path / "out")["score"].to_numpy()).sum()
    assert 0 < scores.not_finite == infinite
    assert scores.bad_rows == 0


class Several(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.net = shape, nn.Linear(S, 4)

    def forward(self, state):
        y = self.net(state)
        return {
            "pair": (y.mean(1), y.std(1)),
            "wide": y,
            "rows in the second place": y.t(),
            "integers": y.long(),
            "a dict": {"reward": y},
        }[self.shape]


def test_several_outputs_and_wide_ones(tmp_path):
    state, action = values(100)
    state[3] = np.nan
    pq.write_table(table(state, action), tmp_path / "in.parquet")
    for shape in ("pair", "wide"):
        model = Several(shape).eval()
        run(model, tmp_path / "in.parquet", tmp_path / shape, columns=["state"])
    pair, wide = (pq.read_table(tmp_path / shape) for shape in ("pair", "wide"))
    assert pair.column_names == ["file", "row", "score_0", "score_1"]
    assert wide["score"].type == pa.list_(pa.float32(), 4)
    assert pair["score_1"].null_count == wide["score"].null_count == 1
    assert np.allclose(wide["score"][7].as_py(), told(model, state[7:8])[0], rtol=1e-6)


@pytest.mark.parametrize("shape", ["rows in the second place", "integers", "a dict"])
def test_outputs_that_are_no_scores_are_refused(shape, tmp_path):
    pq.write_table(table(*values(10)), tmp_path / "in.parquet")
    with pytest.raises((ValueError, TypeError), match=r"must (be|give)"):
        run(Several(shape), tmp_path / "in.parquet", tmp_path / "out", columns=["state"])
    assert not (tmp_path / "out").exists()


def test_the_model_and_the_process_stay_as_they_were(model, tmp_path):
    transitions(tmp_path / "in")
    model.train()
    threads, before = torch.get_num_threads(), {k: v.clone() for k, v in model.state_dict().items()}
    inside = []
    model.net[0].register_forward_hook(lambda *_: inside.append((torch.get_num_threads(), threading.get_ident())))
    run(model, tmp_path / "in", tmp_path / "out")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.get_num_threads() == threads
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [threads]


def test_the_bytes_do_not_depend_on_the_number_of_threads(model, tmp_path, monkeypatch):
    monkeypatch.setattr(score_rows, "READ_BYTES", 2000)
    transitions(tmp_path / "in")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            run(model, tmp_path / "in", tmp_path / str(count), batch_size=32, part_rows=250)
    finally:
        torch.set_num_threads(threads)
    assert same_folders(tmp_path / "1", tmp_path / "3")


def test_only_a_few_batches_are_in_memory(model, tmp_path, monkeypatch):
    """One row group of all rows, read in steps: reading may be ahead of writing by the pool's batches and no more."""
    monkeypatch.setattr(score_rows, "READ_BYTES", 2000)
    transitions(tmp_path / "in", counts=(20_000,), row_group=20_000)
    read = written = ahead = 0
    batches, write, score = score_parts._batches, score_parts.PartWriter.write, score_rows.Scorer.score

    def counted(*arguments):
        nonlocal read, ahead
        for batch in batches(*arguments):
            read += 1
            ahead = max(ahead, read - written)
            yield batch

    def noted(*arguments):
        nonlocal written
        written += 1
        write(*arguments)

    def slow(*arguments):
        time.sleep(0.002)
        return score(*arguments)

    monkeypatch.setattr(score_parts, "_batches", counted)
    monkeypatch.setattr(score_parts.PartWriter, "write", noted)
    monkeypatch.setattr(score_rows.Scorer, "score", slow)
    run(model, tmp_path / "in", tmp_path / "out", batch_size=50)
    assert read == written == 200
    assert ahead <= torch.get_num_threads() + 2


SCRIPT = """
import sys, rewardzip as rz
rz.score(*sys.argv[1:4], columns=["state", "action"], part_rows=200, batch_size=64, progress=False)
"""


def child(tmp_path, output):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path / "model", tmp_path / "in", output], env=environment
    )


def test_killed_at_random_moments_every_row_is_there_once_and_the_bytes_are_the_same(model, tmp_path):
    transitions(tmp_path / "in", counts=(20_000, 9_900), row_group=200)
    rz.save(model, tmp_path / "model")
    run(model, tmp_path / "in", tmp_path / "whole", part_rows=200, batch_size=64)
    output, moments = tmp_path / "killed", random.Random(0)
    for after in sorted(moments.sample(range(140), 3)):
        process = child(tmp_path, output)
        while process.poll() is None and not (output / f"part-{after:06}.parquet").exists():
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.005))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
        parts = list(output.glob("part-*"))
        assert after < len(parts) < 150
        # whoever reads the folder meanwhile sees whole parts only
        assert all(pq.read_metadata(part).num_rows == 200 or part.name == "part-000149.parquet" for part in parts)
    assert child(tmp_path, output).wait() == 0
    assert same_folders(tmp_path / "whole", output)
    written = pq.read_table(output, columns=["file", "row"]).to_pydict()
    wanted = [("0.parquet", i) for i in range(20_000)] + [("1.parquet", i) for i in range(9_900)]
    assert list(zip(written["file"], written["row"], strict=True)) == wanted


class Stop(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("call", [("os", "replace"), ("os", "fsync"), ("PartWriter", "write")], ids=lambda c: c[1])
def test_stopped_at_every_step_a_run_goes_on(model, tmp_path, monkeypatch, call):
    transitions(tmp_path / "in")
    run(model, tmp_path / "in", tmp_path / "whole", part_rows=300)
    owner = os if call[0] == "os" else score_parts.PartWriter
    original = getattr(owner, call[1])
    for step in range(1, 8):
        calls = 0

        def stopping(*arguments, step=step):
            nonlocal calls
            calls += 1
            if calls == step:
                raise Stop
            return original(*arguments)

        output = tmp_path / f"{step}"
        with monkeypatch.context() as patched:
            patched.setattr(owner, call[1], stopping)
            try:
                run(model, tmp_path / "in", output, part_rows=300)
            except Stop:
                assert not [n for n in os.listdir(output) if n.endswith(".tmp")], (
                    "left behind although it could tidy up"
                )
        run(model, tmp_path / "in", output, part_rows=300)
        assert same_folders(tmp_path / "whole", output)


def test_what_a_killed_process_left_is_removed_and_a_part_cut_short_is_written_anew(model, tmp_path):
    transitions(tmp_path / "in")
    run(model, tmp_path / "in", tmp_path / "whole", part_rows=300)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / ".part-000001.parquet-0123abcd.tmp").write_bytes(b"half")
    part = tmp_path / "out" / "part-000002.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    shutil.copy(tmp_path / "out" / "part-000000.parquet", tmp_path / "out" / "part-000004.parquet")
    assert run(model, tmp_path / "in", tmp_path / "out", part_rows=300).scored == 300
    assert same_folders(tmp_path / "whole", tmp_path / "out")
    again = run(model, tmp_path / "in", tmp_path / "out", part_rows=300)
    assert again.scored == 0
    assert "nothing was left to do" in str(again)


def test_a_full_disk_is_an_error_that_loses_nothing(model, tmp_path, monkeypatch):
    transitions(tmp_path / "in")
    run(model, tmp_path / "in", tmp_path / "whole", part_rows=300)
    room = 7000

    class Sink:
        """A file on a disk with little room."""

        closed = False

        def __init__(self, *arguments):
            self.file = open(*arguments)  # noqa: SIM115

        def write(self, data):
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patched:
        patched.setattr(score_parts, "open", Sink, raising=False)
        with pytest.raises(OSError, match=r"no room to write into .* \d of 5 parts are finished") as caught:
            run(model, tmp_path / "in", tmp_path / "out", part_rows=300)
    assert caught.value.errno == errno.ENOSPC
    names = os.listdir(tmp_path / "out")
    assert not [n for n in names if n.endswith(".tmp")]
    assert 1 < len(names) < 6
    run(model, tmp_path / "in", tmp_path / "out", part_rows=300)
    assert same_folders(tmp_path / "whole", tmp_path / "out")


def test_the_results_of_other_settings_are_not_mixed(model, tmp_path):
    transitions(tmp_path / "in")
    run(model, tmp_path / "in", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    other = rz.RewardMLP(S, A, (16, 16)).eval()
    tanh = nn.Sequential(nn.Linear(S + A, 4), nn.Tanh(), nn.Linear(4, 1))
    relu = nn.Sequential(tanh[0], nn.ReLU(), tanh[2])
    assert model_hash(tanh) != model_hash(relu)
    for what, arguments in {
        "model": {"model": other},
        "columns": {"columns": ["state", "id,id"]},
        "keep": {"keep": ["id"]},
        "batch_size": {"batch_size": 7},
        "part_rows": {"part_rows": 300},
        "inputs": {"inputs": tmp_path / "in" / "0.parquet"},
    }.items():
        given = {"model": model, "inputs": tmp_path / "in", **arguments}
        with pytest.raises(ValueError, match=rf"another run: its ({what}|parts) differ"):
            run(given.pop("model"), given.pop("inputs"), tmp_path / "out", **given)
    # the same name, other numbers
    pq.write_table(table(*values(500, 9), 700), tmp_path / "in" / "1.parquet", row_group_size=100)
    with pytest.raises(ValueError, match="its inputs differ"):
        run(model, tmp_path / "in", tmp_path / "out")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_a_folder_that_holds_something_else_is_left_alone(model, tmp_path):
    transitions(tmp_path / "in")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        run(model, tmp_path / "in", tmp_path / "notes")
    with pytest.raises(ValueError, match="is a file; scores are written into a folder"):
        run(model, tmp_path / "in", tmp_path / "file")
    assert os.listdir(tmp_path / "notes") == ["thesis.txt"]
    run(model, tmp_path / "in", tmp_path / "out")
    (tmp_path / "out" / "part-000009.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds other files \(part-000009"):
        run(model, tmp_path / "in", tmp_path / "out")


def test_two_runs_do_not_write_into_one_folder(model, tmp_path):
    pytest.importorskip("fcntl")
    transitions(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with score_folder._alone(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing"):
        run(model, tmp_path / "in", tmp_path / "out")
    run(model, tmp_path / "in", tmp_path / "out")


BAD = {
    "no such file": ("nothing.parquet", {}, "is no file and no folder"),
    "an empty file": (b"", {}, r"\(0 bytes\) is not a whole parquet file"),
    "not parquet": (b"id,state\n1,2\n", {}, "is not a whole parquet file"),
    "cut short": ("cut", {}, "is not a whole parquet file"),
    "no rows": (table(*values(0)), {}, "hold no rows"),
    "a missing column": (
        table(*values(9)),
        {"columns": ["state", "actoin"]},
        "'actoin' is not in .* id, state, action",
    ),
    "a missing column to keep": (table(*values(9)), {"keep": ["key"]}, "'key' is not in"),
    "keeping a name that is taken": (
        table(*values(9)).append_column("row", pa.array([0] * 9)),
        {"keep": ["row"]},
        "'row' cannot be kept",
    ),
    "text": (pa.table({"state": ["a"], "action": ["b"]}), {}, "'state' of .* is string; it must hold numbers"),
    "times": (pa.table({"t": pa.array([0], pa.timestamp("s"))}), {"columns": ["t"]}, "is timestamp.*must hold numbers"),
    "lists of text": (pa.table({"t": [["a"]]}), {"columns": ["t"]}, "must hold numbers"),
    "lists that are all null": (
        pa.table({"t": pa.array([None], pa.list_(pa.float32()))}),
        {"columns": ["t"]},
        "null in",
    ),
    "one input too few": (
        table(*values(9)),
        {"columns": ["state"]},
        r"\[3\] wide, RewardMLP takes \[3, 2\]",
    ),
    "too wide": (
        table(*values(9)),
        {"columns": ["state,id", "action"]},
        r"\[4, 2\] wide, RewardMLP takes \[3, 2\]",
    ),
    "in another order": (table(*values(9)), {"columns": ["action", "state"]}, r"are \[2, 3\] wide, .* takes \[3, 2\]"),
    "columns as one string": (table(*values(9)), {"columns": "state"}, "a list with one entry per input"),
    "no columns": (table(*values(9)), {"columns": []}, "a list with one entry per input"),
    "no batch": (table(*values(9)), {"batch_size": 0}, "batch_size is 0"),
    "no part": (table(*values(9)), {"part_rows": 0}, "part_rows is 0"),
    "another engine": (table(*values(9)), {"engine": "spark"}, "'spark'; it must be 'local' or 'ray'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(model, tmp_path, name):
    given, settings, message = BAD[name]
    file = tmp_path / "in.parquet"
    if given == "cut":
        pq.write_table(table(*values(500)), file)
        file.write_bytes(file.read_bytes()[:-100])
    elif isinstance(given, bytes):
        file.write_bytes(given)
    elif isinstance(given, pa.Table):
        pq.write_table(given, file)
    with pytest.raises((ValueError, TypeError), match=message):
        run(model, file, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_files_that_disagree_are_refused(model, tmp_path):
    transitions(tmp_path / "in")
    state, action = values(10)
    pq.write_table(
        pa.table({"id": [0] * 10, "state": lists(action), "action": lists(action)}), tmp_path / "in/2.parquet"
    )
    with pytest.raises(ValueError, match=r"'state' is 2 wide in .*2\.parquet, but 3 in .*0\.parquet"):
        run(model, tmp_path / "in", tmp_path / "out")
    pq.write_table(
        pa.table({"id": ["a"] * 10, "state": lists(state), "action": lists(action)}), tmp_path / "in/2.parquet"
    )
    with pytest.raises(TypeError, match=r"'id', to be kept, is string in .*2\.parquet, but int64"):
        run(model, tmp_path / "in", tmp_path / "out", keep=["id"])


def test_a_damaged_page_is_named_and_what_is_finished_stays(model, tmp_path):
    transitions(tmp_path / "in", counts=(600,), row_group=200)
    file = tmp_path / "in" / "0.parquet"
    at = pq.read_metadata(file).row_group(1).column(1).data_page_offset
    damaged = bytearray(file.read_bytes())
    damaged[at : at + 40] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"0\.parquet cannot be read from row 200 on"):
        run(model, tmp_path / "in", tmp_path / "out", part_rows=200)
    assert sorted(os.listdir(tmp_path / "out")) == ["_rewardzip.json", "part-000000.parquet"]


def test_globs_folders_and_what_is_passed_by(model, tmp_path):
    transitions(tmp_path / "in")
    for name in ("_temporary", ".hidden"):
        transitions(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not parquet")
    inside = tmp_path / "in" / "scores"
    for given in (
        tmp_path / "in",
        str(tmp_path / "in" / "*.parquet"),
        [tmp_path / "in/1.parquet", tmp_path / "in/0.parquet"],
    ):
        assert run(model, given, inside).rows == 1200
        # now there are scores below the inputs
        assert run(model, given, inside).scored == 0
        shutil.rmtree(inside)


def test_swapped_models_and_saved_ones(model, tmp_path):
    transitions(tmp_path / "in")
    fast = rz.swap(model, rz.Int8())
    rz.save(fast, tmp_path / "model")
    run(fast, tmp_path / "in", tmp_path / "a")
    run(tmp_path / "model", tmp_path / "in", tmp_path / "b")
    assert same_folders(tmp_path / "a", tmp_path / "b")
    run(model.half(), tmp_path / "in", tmp_path / "half")
    assert pq.read_schema(tmp_path / "half" / "part-000000.parquet").field("score").type == pa.float16()


def test_the_command_line(model, tmp_path):
    transitions(tmp_path / "in")
    rz.save(model, tmp_path / "model")
    names = ["--columns", "state", "--columns", "action", "--engine", "local", "--keep", "id"]
    files = [str(tmp_path / "in" / f"{i}.parquet") for i in range(2)]
    done = CliRunner().invoke(app, ["score", str(tmp_path / "model"), *files, str(tmp_path / "out"), *names])
    assert done.exit_code == 0, done.output
    assert "1,200 rows in 2 parts" in done.output
    run(model, tmp_path / "in", tmp_path / "wanted", keep=["id"])
    assert same_folders(tmp_path / "out", tmp_path / "wanted")
    done = CliRunner().invoke(app, ["score", str(tmp_path / "model"), files[0], str(tmp_path / "out"), *names])
    assert done.exit_code == 2
    assert "another run" in done.output


def test_progress_off_a_terminal_is_plain_lines(model, tmp_path, monkeypatch, capsys):
    from rewardzip import score as module

    monkeypatch.setattr(sys.modules[module.__module__], "SAY_EVERY", 0.0)
    transitions(tmp_path / "in")
    run(model, tmp_path / "in", tmp_path / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("score: 100.0%, ")
    assert lines[-1].endswith("rows/s, 0 s left")


def test_without_pyarrow_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"rewardzip\[score\]"):
        run(model, tmp_path, tmp_path / "out")
