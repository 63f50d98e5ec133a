"""The pytest-benchmark files: each runs, and a wrong result gets no time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rewardzip.timing import Timing

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "benchmarks").glob("bench_*.py"))


def test_every_op_has_a_file():
    from rewardzip_kernels.loading import OPS

    assert {file.stem.removeprefix("bench_") for file in FILES} == set(OPS)


def test_each_file_runs_on_the_smallest_shape():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-disable", "-v"]
    command += [*map(str, FILES), "-k", "small and 1rows"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout
    for file in FILES:
        assert f"{file.name}::" in done.stdout
    assert " skipped" not in done.stdout


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import checked

    return checked


class Benchmark:
    """Stands for the fixture: counts what was timed."""

    def __init__(self):
        self.timed, self.extra_info = 0, {}

    def pedantic(self, run, **rounds):
        run()
        self.timed += 1


class Off(nn.Module):
    """A layer whose result is off by a share of it."""

    def __init__(self, layer, share):
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, x, activation):
        return torch.relu(self.layer(x)) * (1 + self.share)


@pytest.mark.parametrize(("share", "right"), [(0.0, True), (0.01, True), (0.05, False), (float("nan"), False)])
def test_a_wrong_result_is_not_timed(checked, share, right):
    test, benchmark = checked.linear_op("an op", {"ours": lambda layer: Off(layer, share)}), Benchmark()
    if right:
        test(benchmark, "ours", (64, 64), 16)
    else:
        with pytest.raises(pytest.fail.Exception, match="not timed"):
            test(benchmark, "ours", (64, 64), 16)
    assert benchmark.timed == right


def test_what_was_pruned_is_what_a_form_is_held_to(checked):
    """A form of the dense weight, where half of it should be zeros, is wrong."""
    dense = []

    def unpruned(layer):
        dense.append(nn.Linear(64, 64).requires_grad_(False))
        torch.manual_seed(0)
        dense[0].reset_parameters()
        dense[0].bias.copy_(layer.bias)
        return Off(dense[0], 0.0)

    test = checked.linear_op("an op", {"ours": unpruned}, lambda weight: torch.rand_like(weight) > 0.5)
    benchmark = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="not timed"):
        test(benchmark, "ours", (64, 64), 16)
    assert benchmark.timed == 0


def test_on_a_gpu_the_tables_own_timing_stands_beside(checked, monkeypatch):
    monkeypatch.setattr(checked, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        checked, "interleaved", lambda calls, device, seconds: {name: Timing(2.0, 1.0, 3.0) for name in calls}
    )
    monkeypatch.setattr(checked, "apart", lambda call, device: {"warm": 1.5, "python": 0.5})
    benchmark, x = Benchmark(), torch.randn(3)
    checked.timed(benchmark, "an op", lambda: x, x.double())
    assert benchmark.extra_info == {"p50": 2.0, "p10": 1.0, "p90": 3.0, "warm": 1.5, "python": 0.5}


def test_every_ops_rivals_have_amp_and_bf16():
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *map(str, FILES)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    ).stdout  # fmt: skip
    for file in FILES:
        if file.stem != "bench_quantize_rows":  # no product, so nothing to run in mixed precision
            for rival in ("fp32", "AMP bf16", "bf16"):
                assert re.search(rf"{file.name}::\w+\[{rival}-", told), (file.name, rival)
