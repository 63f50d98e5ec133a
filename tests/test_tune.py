"""The tile sweep, with a clock that says what the test wants: what is right is timed, the fastest is kept, whole."""

import json
from functools import partial

import pytest
import torch
from conftest import GPU, need_triton
from typer.testing import CliRunner

pytest.importorskip("triton")

from rewardzip import tune
from rewardzip.cli import app
from rewardzip.timing import Timing
from rewardzip_kernels import audit
from rewardzip_kernels.gpu import int8_linear, tiles

HERE = torch.device("cuda" if GPU else "cpu")
INDEX = 0 if GPU else -1
SMALL = {
    "int8_linear": partial(tune.linear, 9, 40, 3, torch.float32),
    "int8_linear, fp16 rows": partial(tune.linear, 9, 40, 40, torch.float16),
    "int8_dynamic_linear": partial(tune.linear, 9, 40, 3, torch.int8),
    "sparse24_linear": partial(tune.sparse24, 9, 128, 70, torch.float16),
    "sparse24_linear, int8 rows": partial(tune.sparse24, 9, 40, 9, torch.int8),
    "reward_head": partial(tune.head, 9, 40, 20, torch.int8),
    "reward_head of fp16": partial(tune.head, 9, 40, 3, torch.float16),
    "fused_mlp": partial(tune.mlp, "5+4: 33 relu, 20 elu, 1", 9),
}


def clock(**seconds):
    """A timer: these seconds for the candidates of these numbers, 1 for the others."""

    def timer(calls, device):
        taken = [seconds.get(f"candidate{i}", 1.0) for i in range(len(calls))]
        return {name: Timing(s, s, s) for name, s in zip(calls, taken, strict=True)}

    return timer


@pytest.mark.skipif(GPU, reason="launches are recorded off GPUs")
@pytest.mark.parametrize("name", SMALL)
def test_a_case_is_measured_on_what_its_op_would_launch(name):
    """Every candidate is right, and timed while it is what the op launches."""
    need_triton()
    case = SMALL[name](HERE)
    case.candidates[3:] = case.candidates[-1:]
    seen = []

    def timer(calls, device):
        for call in calls.values():
            seen.append([(launch.args[-4:], launch.options, launch.grid) for launch in audit.recorded(call)])
        return clock(candidate2=0.5)(calls, device)

    found = tune.measure(case, HERE, timer)
    assert found.failed == {}
    assert found.chosen == case.candidates[2]
    assert len({str(launches) for launches in seen}) == len(case.candidates) == 4


def test_the_fastest_is_kept_and_launched(tmp_path, monkeypatch):
    need_triton()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path / "none")
    make = SMALL["int8_linear"]
    (found,) = tune.sweep(HERE, tiles.cache_file(), 60, [make], clock(candidate4=0.5))
    fastest = make(HERE).candidates[4]
    assert found.chosen == fastest != found.rule
    (table,) = json.loads(tiles.cache_file().read_text())
    assert table == {**tiles.identity(INDEX), "tiles": {found.bucket: list(fastest)}}
    plan = int8_linear.plan(3, 9, 40, 4, 1, torch.float32, "relu", INDEX)
    assert plan.constants[-2:] == fastest[1:3]
    monkeypatch.undo()
    tiles.forget()
    assert str(found).startswith(f"{found.bucket}  {' '.join(map(str, fastest))}: 500000.0 us; the rule's 0 8 512")


def bucket_case(bucket, results, expected=(3.0,)):
    """A case of a made-up op: what each candidate returns, or raises; None leaves the memory as it was."""

    def make(device):
        def call():
            tile = tiles.choose(bucket, -1, ("nothing planted",), lambda: [(name,) for name in results])
            y = torch.empty(len(expected))
            result = results[tile[0]]
            if isinstance(result, Exception):
                raise result
            if result is not None:
                y[:] = torch.tensor(result)
            return y

        torch.full((len(expected),), 3.0)  # the right result, in memory that is free again
        return tune.Case(bucket, [(name,) for name in results], call, torch.tensor(expected))

    return make


def test_what_is_wrong_or_does_not_run_is_never_timed(tmp_path):
    timed = []

    def timer(calls, device):
        timed.extend(calls)
        return clock(candidate1=0.5)(calls, device)

    results = {
        "rule": (1.0, -2.0), "other": (1.01, -2.0), "wrong": (1.0, -1.9), "unwritten": None, "nan": (1.0, torch.nan),
        "raises": RuntimeError("out of shared memory\nand more"), "inf": (torch.inf, -2.0),
    }  # fmt: skip
    make = bucket_case("made up 1", results, expected=(1.0, -2.0))
    (found,) = tune.sweep(torch.device("cpu"), tmp_path / "tiles.json", 60, [make], timer)
    assert timed == ["('rule',)", "('other',)"]
    assert found.chosen == ("other",)
    assert found.failed["unwritten",].endswith(" inf"), "fresh memory must be NaN, not what lay there before"
    assert found.failed["raises",] == "RuntimeError: out of shared memory"
    assert {name for (name,) in found.failed} == {"wrong", "unwritten", "nan", "raises", "inf"}
    assert all("wrong result" in why for (name,), why in found.failed.items() if name != "raises")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_rule_that_is_wrong_is_told_and_replaced(tmp_path):
    make = bucket_case("made up 2", {"rule": (0.0,), "other": (3.0,)})
    (found,) = tune.sweep(torch.device("cpu"), tmp_path / "tiles.json", 60, [make], clock())
    assert found.chosen == ("other",)
    (found,) = tune.sweep(
        torch.device("cpu"), tmp_path / "tiles.json", 60, [bucket_case("made up 2", {"rule": (0.0,)})], clock()
    )
    assert found.chosen == ("rule",), "nothing runs: nothing is written"
    assert json.loads((tmp_path / "tiles.json").read_text())[0]["tiles"] == {}


def test_noise_writes_no_table_and_a_new_measurement_replaces_the_old(tmp_path):
    file, both = tmp_path / "deep" / "tiles.json", {"rule": (3.0,), "other": (3.0,)}
    makes = [bucket_case(f"made up {i}", both) for i in (1, 2)]

    def kept(cases, timer):
        list(tune.sweep(torch.device("cpu"), file, 60, cases, timer))
        return set(json.loads(file.read_text())[0]["tiles"])

    assert kept(makes, clock(candidate1=0.98)) == set()
    assert kept(makes, clock(candidate1=0.96)) == {"made up 1", "made up 2"}
    assert kept(makes[:1], clock(candidate1=0.98)) == {"made up 2"}


def test_it_stops_in_time_and_the_file_is_whole_after_each_case(tmp_path):
    file, both = tmp_path / "tiles.json", {"rule": (3.0,), "other": (3.0,)}
    makes = [bucket_case(f"made up {i}", both) for i in range(3)]
    assert list(tune.sweep(torch.device("cpu"), file, -1, makes, clock(candidate1=0.5))) == []
    running = tune.sweep(torch.device("cpu"), file, 60, makes, clock(candidate1=0.5))
    for done in (1, 2):
        next(running)
        assert len(json.loads(file.read_text())[0]["tiles"]) == done


def test_on_a_gpu_a_candidate_is_recorded_as_a_graph_while_it_is_planted(monkeypatch):
    recorded = []

    def record(model, inputs):
        recorded.append(model().item())
        return (lambda: recorded[-1]), None

    monkeypatch.setattr(tune, "record", record)
    make = bucket_case("made up", {"rule": (3.0,), "other": (3.01,)})
    tune.measure(make(None), torch.device("cuda"), clock())
    assert recorded == [3.0, pytest.approx(3.01)]


def test_no_case_is_measured_twice():
    made = [(part.func, part.args) for part in tune.cases()]
    assert len(set(made)) == len(made) > 100
    assert {part.func for part in tune.cases()[:3]} == {tune.linear, tune.head, tune.mlp}


@pytest.mark.skipif(GPU, reason="for machines without a GPU")
def test_without_a_gpu_tune_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = CliRunner().invoke(app, ["tune"])
    assert told.exit_code == 2
    assert "no GPU" in told.output
    assert list(tmp_path.iterdir()) == []
