"""Large outputs come in large pages: no more is asked of the system than lies in the tensor, and it is quicker."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

import rewardzip as rz
from rewardzip.nn import BlockSparseLinear, Int8Linear, SparseRowsLinear
from rewardzip_kernels.cpu import outputs

resource = pytest.importorskip("resource")
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def asked(monkeypatch):
    """The ranges that were asked for."""
    ranges = []
    monkeypatch.setattr(outputs, "_advise", lambda start, size, advice: ranges.append((start, size)))
    return ranges


@pytest.mark.parametrize("skipped", [0, 1, 1023, 1024])
def test_whole_pages_of_the_tensor(asked, skipped):
    y = torch.empty(outputs.LARGE // 4 + 5000)[skipped:]
    assert outputs.in_large_pages(y) is y
    ((start, size),) = asked
    first, last = y.data_ptr(), y.data_ptr() + y.nbytes
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert 0 <= start - first < mmap.PAGESIZE
    assert 0 <= last - (start + size) < mmap.PAGESIZE


def test_what_the_allocator_keeps_is_left_to_it(asked):
    outputs.in_large_pages(torch.empty(outputs.LARGE // 4))
    assert asked == []


def test_without_such_pages(monkeypatch):
    monkeypatch.setattr(outputs, "_advise", None)
    y = torch.empty(outputs.LARGE // 4 + 1)
    assert outputs.in_large_pages(y) is y


LAYERS = {
    "int8": Int8Linear.from_linear,
    "int8 x int8": lambda layer: Int8Linear.from_linear(layer, "dynamic"),
    "blocks": BlockSparseLinear.from_linear,
    "rows": SparseRowsLinear.from_linear,
    "MLP": lambda layer: rz.swap(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), layer), rz.Int8()),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_every_kernel_asks_for_them(make, asked):
    layer = make(nn.Linear(8, 136)).requires_grad_(False)
    x = torch.randn(outputs.LARGE // 4 // 128, 8)
    y = layer(x)
    assert [start - y.data_ptr() < mmap.PAGESIZE for start, _ in asked] == [True]
    # its values are those of parts that are small
    parts = [layer(part) for part in x.split(8192)]
    assert len(asked) == 1
    torch.testing.assert_close(y, torch.cat(parts), rtol=0, atol=0)


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="needs Linux's transparent huge pages")
def test_far_fewer_pages_are_faulted_in():
    layer, x = Int8Linear.from_linear(nn.Linear(8, 136)), torch.randn(outputs.LARGE // 4 // 128, 8)
    layer(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = layer(x)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < y.nbytes // mmap.PAGESIZE // 4
