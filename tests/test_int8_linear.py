"""int8_linear: every implementation against float64, on every tail, with poisoned memory; its place in torch."""

import pytest
import torch
from conftest import GPU, need_triton
from numerics import SHAPES, assert_linear, quantized
from properties import given, settings, st

from rewardzip_kernels import activations, int8_linear
from rewardzip_kernels.int8_linear import int8_linear_reference

# Triton's interpreter cannot multiply bfloat16
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)


def triton_int8_linear(*args):
    need_triton()
    from rewardzip_kernels.gpu.int8_linear import int8_linear

    return int8_linear(*args)


IMPLEMENTATIONS = {"reference": int8_linear_reference, "op": int8_linear, "triton": triton_int8_linear}


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    return IMPLEMENTATIONS[request.param]


def rounding(x, compute):
    """What the products' type costs: tf32 where a GPU multiplies fp32."""
    compute = compute or x.dtype
    if compute == torch.float32:
        return "tf32" if x.is_cuda and x.dtype == torch.float32 else None
    return None if compute == x.dtype else compute


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "why"), SHAPES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tail(run, m, n, k, why, dtype, device, poisoned):
    x = torch.randn(m, k, device=device).to(dtype)
    q, scale, bias = quantized(n, k, device)
    for activation, b in (("relu", bias), ("none", None)):
        assert_linear(run(x, q, scale, b, activation), x, q, scale, b, activation, rounding(x, None))


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.7", "elu:20"])
@pytest.mark.parametrize("m", [2, 40])
def test_activations(run, activation, m, device, poisoned):
    x = torch.randn(m, 48, device=device)
    q, scale, bias = quantized(33, 48, device)
    assert_linear(run(x, q, scale, bias, activation), x, q, scale, bias, activation, rounding(x, None))


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 33])
def test_compute_dtype(run, compute, m, device, poisoned):
    x = torch.randn(m, 100, device=device)
    q, scale, bias = quantized(50, 100, device)
    assert_linear(run(x, q, scale, bias, "none", compute), x, q, scale, bias, "none", rounding(x, compute))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(activations.ACTIVATIONS)),
    seed=st.integers(0, 2**20),
)
def test_any_shape(m, n, k, dtype, activation, seed):
    torch.manual_seed(seed)
    device = "cuda" if GPU else "cpu"
    x = torch.randn(m, k, device=device).to(dtype)
    q, scale, bias = quantized(n, k, device)
    for run in (int8_linear, triton_int8_linear):
        assert_linear(run(x, q, scale, bias, activation), x, q, scale, bias, activation, rounding(x, None))


@pytest.mark.parametrize("m", [2, 20])
def test_strided_and_sliced_rows(run, m, device):
    q, scale, bias = quantized(9, 20, device)
    whole = torch.randn(m * 2, 50, device=device)
    for x in (
        whole[::2, 3:23],
        whole[:m, :40:2],
        torch.randn(20, m, device=device).t(),
        whole[:m, :20].expand(3, m, 20),
    ):
        flat = x.reshape(-1, 20)
        y = run(x, q, scale, bias, "relu")
        assert y.shape == (*x.shape[:-1], 9)
        assert_linear(y.reshape(-1, 9), flat, q, scale, bias, "relu", rounding(x, None))


@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (2, 3, 4, 20)])
def test_leading_shapes(run, shape, device):
    q, scale, bias = quantized(9, 20, device)
    x = torch.randn(shape, device=device)
    y = run(x, q, scale, bias, "none")
    assert y.shape == (*shape[:-1], 9)
    if x.numel():
        assert_linear(y.reshape(-1, 9), x.reshape(-1, 20), q, scale, bias, "none", rounding(x, None))


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_come_through(run, m, value, device):
    x = torch.randn(m, 20, device=device)
    x[0, 3] = value
    q, scale, bias = quantized(9, 20, device)
    q[:, 3] = 5
    y = run(x, q, scale, bias, "none")
    expected = x.double() @ (q.double() * scale.double()[:, None]).t() + bias.double()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    relu = run(x, q, scale, bias, "relu")
    assert torch.equal(relu.isnan(), expected.isnan()), "a NaN must not be lost in the ReLU"


@pytest.mark.parametrize("m", [2, 20])
def test_saturated_weights_and_empty_channels(run, m, device, poisoned):
    q, scale, bias = quantized(20, 300, device)
    q[:10], q[10:15], q[15:] = 127, -127, 0
    x = torch.rand(m, 300, device=device)
    assert_linear(run(x, q, scale, bias, "none"), x, q, scale, bias, "none", rounding(x, None))


@pytest.mark.parametrize("m", [1, 3, 16, 60, 300])
def test_a_row_does_not_depend_on_the_others(run, m, device):
    """Within one class of batch sizes, bit for bit."""
    q, scale, bias = quantized(40, 70, device)
    x = torch.randn(m, 70, device=device)
    y = run(x, q, scale, bias, "relu")
    others = x.clone()
    others[: m - 1] = torch.randn(m - 1, 70, device=device) * 100
    assert torch.equal(y[-1], run(others, q, scale, bias, "relu")[-1])


def test_row_offsets_beyond_int32(run, device):
    k = 16
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((2, k), (2**31 + 8, 1))
    x.copy_(torch.randn(2, k))
    q, scale, bias = quantized(5, k, device)
    assert_linear(run(x, q, scale, bias, "none"), x, q, scale, bias)


def test_quantisation_error_has_its_own_bound():
    """fp32 model against int8 model: at most half a step a weight, sum over |x| * scale / 2."""
    from rewardzip_kernels import quantize_rows

    w, x = torch.randn(30, 200), torch.randn(50, 200)
    q, scale = quantize_rows(w)
    error = (int8_linear(x, q, scale).double() - x.double() @ w.double().t()).abs()
    limit = x.double().abs().sum(1, keepdim=True) * scale.double() / 2 * (1 + 2**-15) + 1e-4
    assert (error <= limit).all()
    assert (error.mean(0) / limit.mean(0)).max() < 0.2, "roundings cancel: the typical error is far below the limit"


def test_opcheck():
    q, scale, bias = quantized(9, 20)
    for x in (torch.randn(4, 20), torch.randn(2, 3, 20, requires_grad=True)):
        for activation in ("relu", "gelu"):
            torch.library.opcheck(torch.ops.rewardzip.int8_linear.default, (x, q, scale, bias, activation))


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_input_gradient(activation):
    q, scale, bias = quantized(7, 12)
    scale, bias = scale.clamp(1e-3), bias.clamp(-1, 1)
    x = torch.randn(5, 12, requires_grad=True)
    weight = torch.randn(5, 7)
    (int8_linear(x, q, scale, bias, activation) * weight).sum().backward()
    exact = x.detach().double().requires_grad_()
    y = activations.apply(exact @ (q.double() * scale.double()[:, None]).t() + bias.double(), activation)
    (y * weight.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_compile_and_export():
    q, scale, bias = quantized(7, 12)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return int8_linear(x, q, scale, bias, "relu") + 1

    x = torch.randn(5, 12, requires_grad=True)
    expected = Layer()(x)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, expected)
    (grad,) = torch.autograd.grad(compiled.sum(), x)
    (grad_expected,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(grad, grad_expected)
    exported = torch.export.export(Layer(), (x.detach(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "rewardzip.int8_linear" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(torch.ones(9, 12)), Layer()(torch.ones(9, 12)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(3, 19)}, ValueError, "takes 20 inputs"),
        ({"x": torch.randn(3, 20).double()}, TypeError, "float64"),
        ({"x": torch.ones(3, 20, dtype=torch.int64)}, TypeError, "int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\)"),
        ({"x": torch.randn(3, 20, device="meta")}, ValueError, "weight is on cpu, x on meta"),
        ({"weight": torch.randn(9, 20)}, TypeError, "weight is torch.float32"),
        ({"weight": torch.zeros(9, 20, 1, dtype=torch.int8)}, ValueError, "must be .out, in."),
        ({"weight": torch.zeros(0, 20, dtype=torch.int8)}, ValueError, "each 1 or more"),
        ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\); it must be \(9,\)"),
        ({"scale": torch.ones(9).half()}, TypeError, "scale is torch.float16"),
        ({"bias": torch.ones(1)}, ValueError, "bias has shape"),
        ({"activation": "swish"}, ValueError, "is not one of"),
        ({"activation": "relu:2"}, ValueError, "takes no parameter"),
        ({"activation": "elu:x"}, ValueError, "not a finite number"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype is torch.int8"),
    ],
)
def test_bad_input(change, error, words):
    q, scale, bias = quantized(9, 20)
    arguments = {
        "x": torch.randn(3, 20),
        "weight": q,
        "scale": scale,
        "bias": bias,
        "activation": "none",
    } | change
    with pytest.raises(error, match=words):
        int8_linear(**arguments)


@pytest.mark.skipif(not GPU, reason="needs a GPU: the cached launch")
def test_cached_launch_notices_alignment_and_dtype():
    q, scale, bias = quantized(64, 64, "cuda")
    store = torch.randn(40 * 64 + 8, device="cuda")
    for _ in range(3):
        for offset in (0, 1, 4):
            x = store[offset : offset + 40 * 64].view(40, 64)
            for dtype in DTYPES:
                y = int8_linear(x.to(dtype) if dtype != x.dtype else x, q, scale, bias, "relu")
                assert_linear(y, x.to(dtype), q, scale, bias, "relu", "tf32" if dtype == torch.float32 else None)


@pytest.mark.skipif(not GPU, reason="needs a GPU's memory")
def test_output_offsets_beyond_int32():
    q, scale, bias = quantized(128, 8, "cuda")
    x = torch.randn(2**24 + 3, 8, device="cuda", dtype=torch.float16)
    y = int8_linear(x, q, scale, bias, "relu")
    assert_linear(y[-5:], x[-5:], q, scale, bias, "relu")
