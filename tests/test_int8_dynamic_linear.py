"""int8_dynamic_linear: integer sums exact everywhere, and the epilogue within its bound."""

import pytest
import torch
from conftest import GPU, need_triton
from numerics import SHAPES, assert_dynamic, quantized
from properties import given, settings, st

from rewardzip_kernels import activations, int8_dynamic_linear
from rewardzip_kernels.int8_dynamic_linear import MAX_K, int8_dynamic_linear_reference


def triton_int8_dynamic_linear(*args):
    need_triton()
    from rewardzip_kernels.gpu.int8_dynamic_linear import int8_dynamic_linear

    return int8_dynamic_linear(*args)


IMPLEMENTATIONS = {
    "reference": int8_dynamic_linear_reference,
    "op": int8_dynamic_linear,
    "triton": triton_int8_dynamic_linear,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "why"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tail(run, m, n, k, why, dtype, device, poisoned):
    x = torch.randn(m, k, device=device).to(dtype)
    q, scale, bias = quantized(n, k, device)
    static = torch.tensor([0.02], device=device)
    for activation, b, x_scale in (("relu", bias, None), ("none", None, None), ("elu", bias, static)):
        assert_dynamic(run(x, q, scale, b, activation, x_scale), x, q, scale, b, activation, x_scale)


@pytest.mark.parametrize(("m", "n", "k", "why"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_integer_sums_are_exact(run, m, n, k, why, device, poisoned):
    """Integer rows, unit scales: the output is the integer sum itself, rounded once to fp32 where it is beyond 2^24."""
    ones = torch.ones(n, device=device)
    x = torch.randint(-127, 128, (m, k), device=device)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    for rows, weight in ((x, q), (torch.full_like(x, 127), torch.full_like(q, -127))):
        y = run(rows.float(), weight, ones, None, "none", torch.ones(1, device=device))
        assert torch.equal(y, (rows.double() @ weight.double().t()).float())


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    activation=st.sampled_from(list(activations.ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_any_shape(m, n, k, activation, seed):
    torch.manual_seed(seed)
    device = "cuda" if GPU else "cpu"
    x = torch.randn(m, k, device=device)
    q, scale, bias = quantized(n, k, device)
    for run in (int8_dynamic_linear, triton_int8_dynamic_linear):
        assert_dynamic(run(x, q, scale, bias, activation), x, q, scale, bias, activation, None)


@pytest.mark.parametrize("m", [2, 20])
def test_a_row_with_inf_or_nan_is_nan_and_no_other(run, m, device):
    x = torch.randn(m, 30, device=device)
    x[0, 4], x[1, 5] = float("inf"), float("nan")
    q, scale, bias = quantized(9, 30, device)
    for activation in ("none", "relu", "tanh"):
        y = run(x, q, scale, bias, activation)
        assert y[:2].isnan().all()
        assert y[2:].isfinite().all()


@pytest.mark.parametrize("m", [1, 3, 16, 60, 300])
def test_a_row_does_not_depend_on_the_others(run, m, device):
    """Exact sums: bit for bit over all batch sizes, not only within a class."""
    q, scale, bias = quantized(40, 70, device)
    x = torch.randn(m, 70, device=device)
    y = run(x, q, scale, bias, "relu")
    alone = run(x[-1:], q, scale, bias, "relu")
    assert torch.equal(y[-1:], alone)


def test_strided_leading_and_empty(run, device):
    q, scale, bias = quantized(9, 20, device)
    x = torch.randn(6, 4, 50, device=device)[::2, :, 7:47:2]
    y = run(x, q, scale, bias, "relu")
    assert y.shape == (3, 4, 9)
    assert_dynamic(y.reshape(-1, 9), x.reshape(-1, 20), q, scale, bias, "relu", None)
    assert run(x[:0], q, scale, bias, "relu").shape == (0, 4, 9)


def test_zero_rows_give_the_bias(run, device):
    q, scale, bias = quantized(9, 20, device)
    y = run(torch.zeros(3, 20, device=device), q, scale, bias, "none")
    torch.testing.assert_close(y, bias.expand(3, 9))


def test_opcheck():
    q, scale, bias = quantized(9, 20)
    for x_scale in (None, torch.tensor([0.1])):
        x = torch.randn(4, 20, requires_grad=True)
        torch.library.opcheck(torch.ops.rewardzip.int8_dynamic_linear.default, (x, q, scale, bias, "silu", x_scale))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_input_gradient_passes_the_rounding(activation):
    """Straight through: the gradient at the rounded rows, as if rounding were the identity."""
    q, scale, bias = quantized(7, 12)
    scale, bias = scale.clamp(1e-3), bias.clamp(-1, 1)
    x = torch.randn(5, 12, requires_grad=True)
    pre = int8_dynamic_linear(x.detach(), q, scale, bias).double()
    int8_dynamic_linear(x, q, scale, bias, activation).sum().backward()
    pre.requires_grad_()
    activations.apply(pre, activation).sum().backward()
    expected = pre.grad @ (q.double() * scale.double()[:, None])
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_bad_input():
    q, scale, _ = quantized(9, 20)
    x = torch.randn(3, 20)
    with pytest.raises(ValueError, match="x_scale has shape"):
        int8_dynamic_linear(x, q, scale, x_scale=torch.ones(3))
    with pytest.raises(TypeError, match=r"x_scale is torch\.float64"):
        int8_dynamic_linear(x, q, scale, x_scale=torch.ones(1).double())
    wide = torch.zeros(1, MAX_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"int32 sums hold at most {MAX_K}"):
        int8_dynamic_linear(torch.zeros(1, MAX_K + 1), wide, torch.ones(1))
