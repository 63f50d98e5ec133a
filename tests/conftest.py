"""Where the tests run: with a GPU natively on it, without one in Triton's interpreter."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    # read by Triton when a kernel is defined, so set before any kernel is imported
    os.environ["TRITON_INTERPRET"] = "1"


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
