"""A call's parts on a GPU, with a stand-in for it; and what the tables count as work."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rewardzip import timing

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class Gpu:
    """Stands for torch.cuda: a queue worked off at ``synchronize``, a launch takes 2 ms, 1 ms with a warm cache."""

    def __init__(self):
        self.queue, self.now, self.warm = [], 0.0, False

    def launch(self):
        time.sleep(1e-3)  # Python
        if "spin" not in self.queue:
            self.queue.append("idle")  # nothing to do until the kernel is there
        self.queue.append("kernel")

    def synchronize(self, *_):
        for item in self.queue:
            if item == "kernel":
                self.now += 1.0 if self.warm else 2.0
                time.sleep(2e-3)
                self.warm = True
            elif item in ("spin", "idle"):
                self.now += 0.5
            else:
                item.time = self.now
        self.queue.clear()

    def _sleep(self, cycles):
        assert cycles == timing.SPIN
        self.queue.append("spin")

    def Event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu, self.time = gpu, None

    def record(self):
        self.gpu.queue.append(self)

    def synchronize(self):
        self.gpu.synchronize()

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.fixture
def gpu(monkeypatch):
    stand_in = Gpu()
    for name in ("synchronize", "_sleep", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    return stand_in


def test_a_call_with_a_cold_cache_is_its_kernels_alone(gpu, monkeypatch):
    """The GPU is kept busy while Python launches: its wait for Python is no part of the call's time."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=64))
    sample = timing._gpu_sampler(torch.device("cpu"))
    assert sample(gpu.launch, 1) == pytest.approx(2e-3)


def test_a_calls_parts(gpu):
    parts = timing.apart(gpu.launch, "cuda", 3)
    assert set(parts) == {"warm", "python", "wall"}
    assert parts["warm"] == pytest.approx(1e-3), "the kernel alone, its data in the cache"
    assert 1e-3 <= parts["python"] < parts["wall"]
    assert parts["wall"] >= 3e-3


@pytest.mark.parametrize(("longest", "rounds"), [(60.0, 7), (0.0, 3)])
def test_what_takes_long_is_called_less_often(longest, rounds):
    calls = []
    timing.interleaved({"a": lambda: time.sleep(2e-3) or calls.append("a")}, "cpu", 0.0, longest=longest)
    assert len(calls) == 2 + rounds, "a call to warm, one to see how long it takes, and the rounds"


@pytest.fixture
def benchmarks(monkeypatch):
    """The tables' modules, each loaded from its file: the tests have a ``models`` of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_a_layers_bytes_and_share_of_the_roofline(benchmarks):
    m, n, k = 4096, 1024, 512

    def work(name, m, n, k, seconds, device):
        return benchmarks("measured").work(name, m, k + n, n * k, seconds, device, products="tf32")

    rows = m * (n + k)
    moved = {"fp32": 4 * rows + 4 * n * k, "AMP bf16": 4 * rows + 4 * n * k, "bf16": 2 * rows + 2 * n * k}
    moved |= {"rewardzip int8": 4 * rows + n * k, "rewardzip int8, bf16 rows": 2 * rows + n * k}
    moved |= {
        "gemlite int8": 2 * rows + n * k,
        "bf16, graph": 2 * rows + 2 * n * k,
        "torch.ao dynamic": 4 * rows + n * k,
    }
    for name, expected in moved.items():
        done = work(name, m, n, k, 1e-3, "some CPU")
        assert (done["bytes"], done["operations"], done["roofline"]) == (expected, 2 * m * n * k, None)
        assert done["GB/s"] == pytest.approx(expected / 1e6)
        assert done["TFLOP/s"] == pytest.approx(2 * m * n * k / 1e9)
        assert done["dtype"] == ("float16" if "gemlite" in name else "bfloat16" if expected < 3 * rows else "float32")
    # memory is the floor of few rows, products of many
    assert work("rewardzip int8, bf16 rows", 1, n, k, 1e-6, "NVIDIA H200")["roofline"] == pytest.approx(
        (2 * (n + k) + n * k) / 4.8e12 / 1e-6
    )
    many = {"rewardzip int8": 494.5e12, "bf16": 989e12, "AMP fp16": 989e12, "rewardzip int8 x int8": 1979e12}
    for name, rate in many.items():
        share = work(name, 1 << 16, 4096, 4096, 1e-2, "NVIDIA H200")["roofline"]
        assert share == pytest.approx(2 * (1 << 16) * 4096 * 4096 / rate / 1e-2)
    assert work("bf16", m, n, k, 1.0, "NVIDIA A100-SXM4-80GB")["roofline"] is not None
    assert work("bf16", 1, n, k, 1e-6, "NVIDIA H100 80GB HBM3")["roofline"] == pytest.approx(
        2 * (n + k + n * k) / 3.35e12 / 1e-6
    )
    assert work("bf16", m, n, k, 1.0, "NVIDIA GeForce RTX 4090")["roofline"] is None


def test_the_machine_is_told_without_its_tools(benchmarks, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = benchmarks("measured").machine()
    assert told["commit"] == ""
    assert told["device"]


class OnGpu:
    """Stands for rows on a GPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def __len__(self):
        return 256

    def to(self, dtype):
        return OnGpu(dtype)


def test_a_graph_of_every_way_to_run_a_model(benchmarks, monkeypatch):
    models, skipped = benchmarks("models"), {}
    monkeypatch.setattr(torch, "compile", lambda model, **_: torch.nn.Sequential(model))
    monkeypatch.setattr(models.rz, "capture", lambda model, rows: (model, rows[0].dtype))
    for name in ("32-64-64-1", "23-256-256-1 x 5", "TD-MPC2 512-512-512-101"):
        shape = models.MODELS[name]
        model = models.Ensemble(shape) if shape.members > 1 else models.Reward(shape)
        made = models.providers(model.requires_grad_(False), (OnGpu(), OnGpu()), True, skipped)
        alone = [name for name in made if not name.endswith(", graph")]
        assert {"fp32, TF32", "AMP fp16", "fp16", "compile", "rewardzip int8, fp16 rows"} <= set(alone)
        for name in alone:
            if name == models.REDUCED:
                assert f"{name}, graph" not in made
            else:
                captured, dtype = made[f"{name}, graph"]
                assert captured is made[name]
                assert dtype == models.rows_dtype(name)
    assert not skipped


def test_a_rival_that_cannot_run_here_is_named_and_the_others_are_timed(benchmarks, monkeypatch):
    models, skipped = benchmarks("models"), {}

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(models, "amp", broken)
    model = models.Reward(models.MODELS["24-64-64-1"]).requires_grad_(False)
    made = models.providers(model, (torch.zeros(4, 18), torch.zeros(4, 6)), False, skipped)
    assert skipped == dict.fromkeys(("AMP bf16", "AMP bf16, training"), "RuntimeError: no such kernel")
    assert {"fp32", "bf16", "rewardzip int8"} <= set(made)


@pytest.mark.parametrize("table", ["models", "linear"])
def test_a_rival_that_fails_at_its_first_call_does_not_end_the_table(benchmarks, monkeypatch, capsys, tmp_path, table):
    def fails(*_):
        raise RuntimeError("cannot compile")

    module, failing = benchmarks(table), torch.nn.Module()
    failing.forward = fails
    make = module.providers
    monkeypatch.setattr(module, "providers", lambda *given: make(*given) | {"AMP bf16": failing})
    monkeypatch.setattr(sys, "argv", [table, "--quick", "--no-compile", "--out", str(tmp_path)])
    module.main()
    assert "not run: AMP bf16: RuntimeError: cannot compile" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"fp32", "rewardzip int8"} <= {row["provider"] for row in rows}
    assert {"dtype", "bytes", "operations", "GB/s", "TFLOP/s", "roofline", "device", "commit"} <= set(rows[0])


ROW = {"op", "rows", "dtype", "provider", "p10", "p50", "p90", "bytes", "operations", "GB/s", "TFLOP/s", "roofline"}
ROW |= {"device", "torch", "commit", "date", "threads"}


@pytest.fixture
def quick(benchmarks, monkeypatch, tmp_path):
    """The rows that a table writes in a moment; of those with certain words, the only one."""

    def run(table, *options):
        out = tmp_path / "rows.json" if table == "sparse24" else tmp_path
        monkeypatch.setattr(sys, "argv", [table, "--quick", "--out", str(out), *options])
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        benchmarks(table).main()
        (file,) = tmp_path.glob("*.json")
        written = [json.loads(line) for line in file.read_text().splitlines()]
        for row in written:
            assert set(row) >= ROW
            assert row["GB/s"] == pytest.approx(row["bytes"] / row["p50"] / 1e9)

        def counted(**words):
            (row,) = (row for row in written if row["rows"] == 20 and words.items() <= row.items())
            return row["bytes"], row["operations"]

        return counted

    return run


DENSE, MOVED = 64 * 64, 4 * 20 * (64 + 64)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_blocks_count_what_they_store(quick):
    counted, half = quick("sparse"), DENSE // 2
    fp32 = MOVED + 4 * DENSE, 2 * 20 * DENSE
    for block, stored in (("16x4", half + 4 * 32 + 4 * 5), ("64x64", DENSE + 4 + 4 * 2)):
        assert counted(block=block, provider="fp32") == fp32
        assert counted(block=block, provider="rewardzip int8") == (MOVED + DENSE, 2 * 20 * DENSE)
        blocks = counted(block=block, provider="rewardzip blocks, int8 x int8")
        assert blocks == (MOVED + stored, 2 * 20 * (half if block == "16x4" else DENSE))
    assert counted(block="16x4", provider="torch CSR") == (MOVED + (4 + 8) * half + 8 * 65, 2 * 20 * half)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_wrong_row_among_many_gets_no_time(benchmarks):
    sparse = benchmarks("sparse")
    layer, x = sparse.pruned(64, (16, 4), 0.5, "cpu"), torch.randn(5000, 64)
    make = sparse.blocks

    def wrong(*given):
        way = make(*given)
        call = lambda: way.call().index_fill(0, torch.arange(4000, 4100), 9.0)  # noqa: E731
        return sparse.Way(call, way.dtype, way.weights)

    sparse.blocks = wrong
    good, refused = sparse.ways(layer, x, (16, 4))
    assert set(refused) == {"rewardzip blocks, int8", "rewardzip blocks, int8 x int8"}
    assert {"fp32", "rewardzip int8"} <= set(good)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_cells_that_take_long_are_timed_a_few_times(quick, benchmarks, monkeypatch):
    limits = []
    monkeypatch.setattr(timing, "interleaved", lambda *_, longest: limits.append(longest) or sys.exit())
    with pytest.raises(SystemExit):
        quick("sparse")
    assert limits == [benchmarks("sparse").LONGEST]


def test_only_4096_wide_at_65536_rows_is_left_out(benchmarks):
    sparse = benchmarks("sparse")
    left_out = [(size, rows) for size in sparse.SIZES for rows in sparse.ROWS if rows * size * size > sparse.CPU_WORK]
    assert left_out == [(4096, 65536)]


def test_a_pruned_model_counts_the_form_of_each_layer(quick):
    counted, moved, outer = quick("sparse", "--models"), 4 * 20 * (23 + 1), 256 * 23 + 256
    fp32 = counted(provider="fp32")
    assert fp32 == (moved + 4 * (outer + 256 * 256), 2 * 20 * (outer + 256 * 256))
    alone, dense = counted(provider="blocks alone, int8"), counted(provider="one launch, int8")
    assert dense[1] - alone[1] == 2 * 20 * 256 * 128
    assert alone[0] < dense[0] < fp32[0]


def test_2_of_4_and_compressed_rows_count_what_they_store(quick):
    counted = quick("sparse24")
    assert counted(pattern="2:4", provider="int8") == (MOVED + DENSE, 2 * 20 * DENSE)
    assert counted(pattern="2:4", provider="2:4 int8") == (MOVED + DENSE * 5 // 8, 20 * DENSE)
    assert counted(pattern="2:4", provider="2:4 fp16") == (MOVED + DENSE * 9 // 8, 20 * DENSE)
    kept = counted(pattern="98 %", provider="rows int8")[1] // (2 * 20)
    assert 0 < kept < DENSE // 20
    assert counted(pattern="98 %", provider="rows int8")[0] == MOVED + 3 * kept + 4 * 65
    assert counted(pattern="98 %", provider="torch CSR") == (MOVED + (4 + 8) * kept + 8 * 65, 2 * 20 * kept)


def test_torchs_2_of_4_form_has_9_bits_a_weight(benchmarks):
    assert benchmarks("measured").halved_weights(torch.zeros(64, 64)) == (DENSE // 2, DENSE * 9 // 8)
