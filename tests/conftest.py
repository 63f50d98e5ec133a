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
