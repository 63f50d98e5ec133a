"""reward_head: every implementation against float64 through both layers; its place in torch."""

import pytest
import torch
from conftest import GPU
from mlp_numerics import assert_head, exact_head, random_head
from properties import given, settings, st

from rewardzip_kernels import activations, reward_head
from rewardzip_kernels.reward_head import reward_head_reference

DEVICE = "cuda" if GPU else "cpu"


def triton_reward_head(*args):
    from rewardzip_kernels.gpu.reward_head import reward_head

    return reward_head(*args)


IMPLEMENTATIONS = {"reference": reward_head_reference, "op": reward_head, "triton": triton_reward_head}


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    return IMPLEMENTATIONS[request.param]


CASES = [
    (1, 1, 1, 1, "the smallest"),
    (4, 65, 600, 3, "the last size of the one-row kernel, tails in N and K"),
    (5, 17, 23, 16, "the first size of the tiled kernel, everything odd"),
    (16, 64, 128, 1, "full tiles of 16 outputs"),
    (17, 2100, 70, 2, "tiles of 16 outputs, 132 of them to be summed"),
    (65, 130, 257, 1, "rows, outputs and inputs one over a tile"),
    (1100, 200, 64, 5, "the tile for many rows"),
]


@pytest.mark.parametrize(("m", "n", "k", "n_out", "why"), CASES, ids=[case[-1] for case in CASES])
@pytest.mark.parametrize("stored", [torch.int8, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tail(run, m, n, k, n_out, why, stored, dtype, poisoned):
    assert_head(run, torch.randn(m, k, device=DEVICE).to(dtype), random_head(n, k, n_out, stored))


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3"])
@pytest.mark.parametrize("m", [2, 20])
def test_activations(run, activation, m, poisoned):
    assert_head(run, torch.randn(m, 48, device=DEVICE), random_head(70, 48, 2), activation)


@pytest.mark.parametrize("m", [2, 20])
def test_without_biases_and_with_another_compute_dtype(run, m, poisoned):
    weight, scale, _, v, _ = random_head(70, 48, 2)
    assert_head(run, torch.randn(m, 48, device=DEVICE), (weight, scale, None, v, None), "none", torch.float16)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    n_out=st.integers(1, 16),
    seed=st.integers(0, 99),
)
def test_any_shape(m, n, k, n_out, seed):
    torch.manual_seed(seed)
    assert_head(triton_reward_head, torch.randn(m, k, device=DEVICE), random_head(n, k, n_out), "gelu")


def test_views_and_leading_shapes(run, poisoned):
    args = random_head(9, 20, 2)
    whole = torch.randn(12, 50, device=DEVICE)
    for x in (whole[::2, 3:23], whole[:, :40:2], whole[:3, :20].expand(2, 3, 20), whole[0, :20]):
        assert_head(run, x, args)
    assert run(whole[:0, :20], *args).shape == (0, 2)
    transposed = torch.randn(20, 9, device=DEVICE).half().t()
    assert_head(run, whole[:, :20], (transposed, None, *args[2:]))


@pytest.mark.parametrize("m", [1, 8, 70])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_come_through(run, m, value):
    args = random_head(9, 20, 2)
    args[0][:, 3] = 5
    x = torch.randn(m, 20, device=DEVICE)
    x[0, 3] = value
    for activation in ("relu", "none"):
        y = run(x, *args, activation)
        expected, _ = exact_head(x, *args, activation, torch.float32)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("m", [1, 4, 40, 1100])
def test_the_same_row_gives_the_same_reward(run, m):
    args = random_head(70, 40, 1)
    x = torch.randn(m, 40, device=DEVICE)
    y = run(x, *args, "relu")
    assert torch.equal(y, run(x, *args, "relu"))
    others = x.clone()
    others[: m - 1] = torch.randn(m - 1, 40, device=DEVICE) * 100
    assert torch.equal(y[-1], run(others, *args, "relu")[-1])


def test_bad_arguments():
    weight, scale, bias, v, c = (t.cpu() for t in random_head(9, 20, 2))
    x = torch.randn(4, 20)
    for args, error, match in (
        ((x.double(), weight, scale, bias, v, c), TypeError, "x is torch.float64"),
        ((x, weight.float(), None, bias, v, c), TypeError, "weight is torch.float32"),
        ((x[:, :19], weight, scale, bias, v, c), ValueError, "takes 20 inputs"),
        ((x, weight, None, bias, v, c), ValueError, "scale is None"),
        ((x, weight.half(), scale, bias, v, c), ValueError, "scale is given"),
        ((x, weight, scale, bias, v[:, :8], c), ValueError, r"head_weight has shape \(2, 8\)"),
        ((x, weight, scale, bias, v.repeat(9, 1), c), ValueError, "1 to 16"),
        ((x, weight, scale, bias, v.half(), c), TypeError, "head_weight is torch.float16"),
        ((x, weight, scale, bias, v, c[:1]), ValueError, "head_bias has shape"),
        ((x, weight, scale, bias[:3], v, c), ValueError, "bias has shape"),
        ((x, weight, scale, bias, v, c, "rely"), ValueError, "not one of"),
        ((x, weight, scale, bias, v, c, "relu", torch.int8), TypeError, "compute_dtype"),
    ):
        with pytest.raises(error, match=match):
            reward_head(*args)


def test_opcheck():
    args = [t.cpu() for t in random_head(9, 20, 2)]
    for x in (torch.randn(4, 20), torch.randn(2, 3, 20, requires_grad=True)):
        torch.library.opcheck(torch.ops.rewardzip.reward_head.default, (x, *args, "gelu"))


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("stored", [torch.int8, torch.float16], ids=str)
def test_input_gradient(activation, stored):
    args = [None if t is None else t.cpu() for t in random_head(20, 12, 3, stored)]
    x = torch.randn(5, 12, requires_grad=True)
    factor = torch.randn(5, 3)
    (reward_head(x, *args, activation) * factor).sum().backward()
    reference = x.detach().double().requires_grad_()
    y, _ = exact_head(reference, *args, activation, torch.float32)
    (y * factor.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_compile():
    args = [t.cpu() for t in random_head(9, 20, 2)]
    x = torch.randn(5, 20, requires_grad=True)
    compiled = torch.compile(lambda x: reward_head(x, *args, "relu") + 1, fullgraph=True, backend="aot_eager")(x)
    eager = reward_head(x, *args, "relu") + 1
    assert torch.equal(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(eager.sum(), x))
