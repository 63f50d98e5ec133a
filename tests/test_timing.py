"""A call's parts on a GPU, with a stand-in for it; and what the tables count as work."""

import runpy
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


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return runpy.run_path(str(BENCHMARKS / "linear.py"))


def test_a_providers_bytes_and_share_of_the_roofline(table):
    work, m, n, k = table["work"], 4096, 1024, 512
    rows = m * (n + k)
    moved = {"fp32": 4 * rows + 4 * n * k, "AMP bf16": 4 * rows + 4 * n * k, "bf16": 2 * rows + 2 * n * k}
    moved |= {"rewardzip int8": 4 * rows + n * k, "rewardzip int8, bf16 rows": 2 * rows + n * k}
    for name, expected in moved.items():
        assert work(name, m, n, k, 1e-3, "some CPU") == (expected, 2 * m * n * k, None)
    # memory is the floor of few rows, products of many
    assert work("rewardzip int8, bf16 rows", 1, n, k, 1e-6, "NVIDIA H200")[2] == pytest.approx(
        (2 * (n + k) + n * k) / 4.8e12 / 1e-6
    )
    many = {"rewardzip int8": 494.5e12, "bf16": 989e12, "rewardzip int8 x int8": 1979e12}
    for name, rate in many.items():
        share = work(name, 1 << 16, 4096, 4096, 1e-2, "NVIDIA H200")[2]
        assert share == pytest.approx(2 * (1 << 16) * 4096 * 4096 / rate / 1e-2)
    assert work("bf16", m, n, k, 1.0, "NVIDIA A100-SXM4-80GB")[2] is not None
    assert work("bf16", 1, n, k, 1e-6, "NVIDIA H100 80GB HBM3")[2] == pytest.approx(
        2 * (n + k + n * k) / 3.35e12 / 1e-6
    )
    assert work("bf16", m, n, k, 1.0, "NVIDIA GeForce RTX 4090")[2] is None


def test_the_least_a_model_could_do(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    models = runpy.run_path(str(BENCHMARKS / "models.py"))
    net = models["Reward"]((5, 3), (16,), torch.nn.ReLU)
    weights = 8 * 16 + 16
    rows = 4 * 100 * (5 + 3 + 1)
    inputs = torch.zeros(100, 5), torch.zeros(100, 3)
    for name, byte in {
        "fp32": 4,
        "AMP bf16": 4,
        "bf16": 2,
        "rewardzip int8": 1,
        "rewardzip int8 x int8, graph": 1,
    }.items():
        least = models["work"](name, net, inputs, 1e-6, "NVIDIA H200")
        assert least["bytes"] == rows + byte * weights
        assert least["operations"] == 2 * 100 * weights
        assert least["roofline"] == pytest.approx(least["bytes"] / 4.8e12 / 1e-6)
    assert models["work"]("fp32", net, inputs, 1e-6, "some CPU")["roofline"] is None
