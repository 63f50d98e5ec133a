"""Where the tests run: with a GPU natively on it, without one in Triton's interpreter."""

import os
from importlib.metadata import PackageNotFoundError, version

import numpy
import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # read by Triton when a kernel is defined, so set before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"


def need_triton() -> None:
    """Skip where Triton's kernels cannot run: not installed, or an interpreter that this numpy breaks."""
    try:
        triton = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        pytest.skip("Triton is not installed")
    if not GPU and triton < (3, 7) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")


@pytest.fixture
def device() -> str:
    """Where Triton's kernels take their tensors."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every fresh tensor is full of NaN (integers: of their largest value), so an element never written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
