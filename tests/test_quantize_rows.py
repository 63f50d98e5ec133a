"""quantize_rows: the same integers and scales to the bit everywhere, corners included."""

import pytest
import torch
from conftest import GPU, need_triton

from rewardzip_kernels import quantize_rows
from rewardzip_kernels.quantize import TINY, quantize_rows_reference


def triton_quantize_rows(x, static_scale=None):
    need_triton()
    from rewardzip_kernels.gpu.quantize_rows import quantize_rows

    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], device=x.device)
    quantize_rows(x, static_scale, q, scale)
    return q, scale


@pytest.fixture(params=["function", "triton"])
def run(request):
    return quantize_rows if request.param == "function" else triton_quantize_rows


def by_hand(x, static_scale=None):
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
    quantize_rows_reference(x.cpu(), None if static_scale is None else static_scale.cpu(), q, scale)
    return q, scale


SHAPES = [(1, 1), (3, 7), (5, 2048), (2, 2049), (4, 5000), (300, 16), (7, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_bit(run, shape, dtype, device, poisoned):
    x = (torch.randn(shape) * 10 ** torch.randn(shape[0], 1)).to(dtype).to(device)
    for static in (None, torch.tensor([0.02], device=device)):
        q, scale = run(x, static)
        expected_q, expected_scale = by_hand(x, static)
        assert torch.equal(q.cpu(), expected_q)
        assert torch.equal(scale.cpu(), expected_scale)


def test_definition_with_exact_arithmetic():
    """The reference itself, against fractions rounded by hand: 127 / amax is one division."""
    x = torch.randn(200, 33)
    q, scale = quantize_rows(x)
    amax = x.abs().amax(1).double()
    inverse = (127.0 / amax).float()
    product = (x.double() * inverse.double()[:, None]).float()
    assert torch.equal(q, product.round().clamp(-127, 127).to(torch.int8))
    assert torch.equal(scale, (amax / 127).float())


def test_halves_go_to_even(run, device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=device)
    assert run(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_error_is_half_a_step(run, device):
    x = torch.randn(50, 300, device=device)
    q, scale = run(x)
    error = (q.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] / 2 * (1 + 2**-15)).all()
    assert (q.abs().amax(1) == 127).all()


def test_rows_of_zeros_tiny_and_huge(run, device):
    x = torch.stack([torch.zeros(5), torch.full((5,), 1e-38), torch.full((5,), 3e38)]).to(device)
    q, scale = run(x)
    assert q.tolist() == [[0] * 5, [0] * 5, [127] * 5]
    assert scale.isfinite().all()
    assert scale[0] == torch.tensor(TINY) / 127


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("static", [False, True])
def test_a_row_with_inf_or_nan_is_marked(run, value, static, device):
    x = torch.randn(3, 3000, device=device)
    x[1, 2500] = value
    q, scale = run(x, torch.tensor([0.01], device=device) if static else None)
    assert scale.isnan().tolist() == [False, True, False]
    assert (q[1] == 0).all()


def test_static_scale_saturates(run, device):
    x = torch.tensor([[1.0, 200.0, -200.0, 0.49]], device=device)
    q, scale = run(x, torch.tensor([1.0], device=device))
    assert q.tolist() == [[1, 127, -127, 0]]
    assert scale.tolist() == [1.0]


def test_strided_rows_and_no_rows(run, device):
    x = torch.randn(20, 40, device=device)
    for view in (x[::3, 5:25], x.t(), x[:, ::2]):
        assert torch.equal(run(view)[0].cpu(), by_hand(view)[0])
    assert run(x[:0])[0].shape == (0, 40)


def test_written_in_place(device):
    x = torch.randn(4, 6, device=device)
    out = torch.empty(4, 6, dtype=torch.int8, device=device), torch.empty(4, device=device)
    q, scale = quantize_rows(x, out=out)
    assert q.data_ptr() == out[0].data_ptr()
    assert scale.data_ptr() == out[1].data_ptr()
    assert torch.equal(q.cpu(), by_hand(x)[0])


def test_bad_input():
    with pytest.raises(ValueError, match="takes a matrix of floats"):
        quantize_rows(torch.randn(3))
    with pytest.raises(ValueError, match="takes a matrix of floats"):
        quantize_rows(torch.ones(3, 3, dtype=torch.int8))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cpu_and_gpu_agree_on_a_million_values():
    x = torch.randn(1000, 1000) * 10 ** torch.randn(1000, 1)
    q, scale = quantize_rows(x.cuda())
    assert torch.equal(q.cpu(), quantize_rows(x)[0])
    assert torch.equal(scale.cpu(), quantize_rows(x)[1])
