"""The cached launch: what it keys on, and that a hit goes straight to the compiled kernel. Needs no GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")


class Compiled:
    """Stands for Triton's compiled kernel: keeps what it was run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *args):
        self.runs.append(args)


@pytest.fixture
def recorded(monkeypatch):
    """A launch module whose kernels are compiled by a stand-in; the list of what was compiled."""
    from rewardzip_kernels.gpu import launch

    compiled = []

    def stand_in(kernel, grid, args, options):
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(launch, "off_gpu", stand_in)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return compiled


def test_a_hit_runs_the_compiled_kernel_with_every_argument(recorded):
    from rewardzip_kernels.gpu.launch import launch

    x = torch.ones(4)
    for grid in ((1, 1, 1), (2, 1, 1), (3, 2, 1)):
        launch("kernel", grid, ("key",), (x, 5, 16), num_warps=4)
    assert len(recorded) == 1
    expected = ("stream", "function", "metadata", None, None, None, x, 5, 16)
    assert recorded[0].runs == [(2, 1, 1, *expected), (3, 2, 1, *expected)]


def test_whatever_specialises_compiles_again(recorded):
    """Batch sizes share a kernel within their class; types, alignment, sizes and strides do not."""
    from rewardzip_kernels.gpu.int8_linear import int8_linear

    q, scale = torch.zeros(64, 64, dtype=torch.int8), torch.ones(64)
    store = torch.zeros(100 * 80)
    base = store[: 30 * 64].view(30, 64)

    def compiles(x, weight=q, **options):
        before = len(recorded)
        int8_linear(x, weight, scale[: len(weight)], **options)
        return len(recorded) - before

    assert compiles(base) == 1
    assert compiles(base) == 0
    assert compiles(base[:20]) == 0, "the same class of batch sizes"
    assert compiles(base[:3]) == 1, "the one-row kernel"
    assert compiles(store[1 : 1 + 30 * 64].view(30, 64)) == 1, "rows that start off a 16-byte boundary"
    assert compiles(store[: 30 * 80].view(30, 80)[:, :64]) == 1, "another row stride"
    assert compiles(base.half()) == 1
    assert compiles(base, compute_dtype=torch.float16) == 1
    assert compiles(base, activation="relu") == 1
    assert compiles(base, activation="leaky_relu:0.2") == 1
    assert compiles(base, activation="leaky_relu:0.3") == 1
    assert compiles(base, bias=scale) == 1
    assert compiles(base, q[:48]) == 1
    assert compiles(base, q[:48]) == 0


def test_a_profiler_hook_takes_the_slow_way(recorded, monkeypatch):
    from rewardzip_kernels.gpu.launch import launch

    launch("kernel", (1, 1, 1), (), (torch.ones(1),))
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
    launch("kernel", (1, 1, 1), (), (torch.ones(1),))
    assert len(recorded) == 2
    assert recorded[0].runs == []
