"""torch's own 2:4 product as a way of ``sparse24_linear``: only where a table says so, right, and never stale.

Off a GPU the dense weight stands for torch's form of it.
"""

import pytest
import torch
from conftest import GPU, need_triton
from numerics import assert_linear
from sparse_numerics import sparse24

pytest.importorskip("triton")

from rewardzip import tune
from rewardzip_kernels.gpu import semi_structured, sparse24_linear, tiles
from rewardzip_kernels.gpu.sparse24_linear import DENSE, TORCH

DEVICE = "cuda" if GPU else "cpu"
M, N, K = 70, 64, 128
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)  # the interpreter has no products of bfloat16


@pytest.fixture
def made(monkeypatch):
    """The weights that torch's forms were made of."""
    need_triton()
    weights, torchs = [], torch.sparse.to_sparse_semi_structured

    def make(weight):
        weights.append(weight)
        return torchs(weight) if GPU else weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", make)
    return weights


@pytest.fixture
def layer():
    q, values, indices, scale, bias, _ = sparse24(N, K, DEVICE)
    return q, values, indices, scale, bias


def run(layer, x, activation="relu", tile=TORCH):
    _, values, indices, scale, bias = layer
    with tiles.planted({tiles.linear_bucket("sparse24_linear", len(x), N, K, x.element_size(), 1): tile}):
        return sparse24_linear.sparse24_linear(x, values, indices, scale, K, bias, activation)


def rows(dtype=torch.float16):
    return torch.randn(M, K, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "elu:0.5"])
@pytest.mark.parametrize("biased", [True, False])
def test_where_a_table_says_so_the_product_is_torchs(made, layer, dtype, activation, biased, poisoned):
    q, values, indices, scale, bias = layer
    bias = bias if biased else None
    x = rows(dtype)
    y = run((q, values, indices, scale, bias), x, activation)
    assert_linear(y, x, q, scale, bias, activation, dtype)
    (weight,) = made
    assert weight.dtype == dtype
    assert (weight.double() / q).nan_to_num(1).log2().frac().count_nonzero() == 0, "int8 times a power of two, exactly"


def test_without_a_table_or_for_other_rows_it_is_not(made, layer):
    for m, tile in ((M, None), (16, TORCH), (M, DENSE)):
        run(layer, rows()[:m], tile=tile)
    run(layer, rows(torch.float32))
    assert made == []


@pytest.mark.parametrize(
    ("m", "n", "k", "x_bytes", "value_bytes", "taken"),
    [
        (65, 64, 128, 2, 1, True),
        (64, 64, 128, 2, 1, False),
        (65, 48, 128, 2, 1, False),
        (65, 64, 96, 2, 1, False),
        (65, 64, 128, 4, 1, False),
        (65, 64, 128, 1, 1, False),
        (65, 64, 128, 2, 2, False),
    ],
)
def test_shapes_torch_does_not_take_are_no_candidates(m, n, k, x_bytes, value_bytes, taken):
    found = sparse24_linear.candidates(m, n, k, x_bytes, value_bytes)
    assert (TORCH in found) == taken
    assert found[0] != TORCH, "the written rule never takes it"


@pytest.mark.parametrize("changed", [1, 2, 3], ids=["values", "indices", "scale"])
def test_the_form_is_made_once_and_anew_where_a_buffer_was_written(made, layer, changed):
    x = rows()
    assert torch.equal(run(layer, x), run(layer, x))
    assert len(made) == 1
    layer[changed].copy_(layer[changed].flip(0))
    expected = run(tuple(tensor.clone() for tensor in layer), x)
    assert torch.equal(run(layer, x), expected)
    assert len(made) == 3


def test_the_form_goes_with_the_layer(made):
    before = len(semi_structured.form.entries)
    layer = sparse24(N, K, DEVICE)[:5]
    run(layer, rows())
    assert len(semi_structured.form.entries) == before + 1
    del layer
    assert len(semi_structured.form.entries) == before


def test_what_torch_refuses_goes_the_dense_way(layer, monkeypatch):
    need_triton()
    asked = []

    def refuse(weight):
        asked.append(weight)
        raise RuntimeError("not on this GPU")

    x = rows()
    dense = run(layer, x, tile=DENSE)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    for _ in range(2):
        assert torch.equal(run(layer, x), dense)
    assert len(asked) == 1, "asked once a weight"
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight[:, 1:])
    layer[1].add_(0)
    assert torch.equal(run(layer, x), dense), "its product refuses these rows"


def test_what_cannot_see_numbers_refreshed_in_place_goes_the_dense_way(made, layer, monkeypatch):
    with torch.inference_mode():
        uncounted = tuple(tensor.clone() for tensor in layer)
    run(uncounted, rows())
    monkeypatch.setattr(semi_structured, "recording", lambda: True)
    run(layer, rows())
    assert made == []


def case(device):
    return tune.sparse24(N, K, M, torch.float16, torch.device(device))


def test_tune_measures_it_call_by_call(made, monkeypatch):
    recorded = []

    def record(model, inputs):
        recorded.append(next(iter(tiles._planted.values())))
        return model, None

    monkeypatch.setattr(tune, "record", record)
    found = case(DEVICE)
    assert TORCH in found.candidates
    found.candidates[1:-2] = []
    timed = []
    tune.measure(found, torch.device("cuda"), lambda calls, device: timed.extend(calls) or {})
    assert timed == [str(tile) for tile in found.candidates]
    assert recorded == [tile for tile in found.candidates if tile != TORCH]


def test_tune_does_not_measure_what_torch_refuses(monkeypatch):
    need_triton()

    def refuse(weight):
        raise RuntimeError("not on this GPU")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    assert TORCH not in case(DEVICE).candidates


def test_make_gpu_measures_it():
    """Some case of the sweep has rows and shapes that torch takes."""
    pruned = [part.args for part in tune.cases() if part.func is tune.sparse24]
    assert any(TORCH in sparse24_linear.candidates(m, n, k, dtype.itemsize, 1) for n, k, m, dtype in pruned)
