"""The short way past the dispatcher is taken only where nobody listens, and gives the same result."""

import pytest
import torch
from mlp_numerics import random_mlp
from numerics import quantized
from torch.utils._python_dispatch import TorchDispatchMode

from rewardzip_kernels import fused_mlp, int8_linear
from rewardzip_kernels.registration import nobody_listens


@pytest.fixture
def arguments():
    q, scale, bias = quantized(9, 20)
    return torch.randn(4, 20), q, scale, bias, "relu"


def seen_by_dispatcher(call, op="int8_linear"):
    """Whether a call reaches the dispatcher: a mode would see it."""
    seen = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Listen():
        call()
    return f"rewardzip.{op}.default" in seen


def test_both_ways_agree(arguments):
    assert nobody_listens(arguments[0])
    assert torch.equal(int8_linear(*arguments), torch.ops.rewardzip.int8_linear(*arguments))


def test_modes_see_the_op(arguments):
    assert seen_by_dispatcher(lambda: int8_linear(*arguments))


def test_lists_of_tensors():
    layers = "4+3: 8 relu, 2"
    weights, params = random_mlp(layers, torch.int8, 1, "cpu")
    xs = [torch.randn(5, 4), torch.randn(5, 3)]
    assert nobody_listens(xs)
    assert not nobody_listens([xs[0], xs[1].clone().requires_grad_()])
    assert not nobody_listens([xs[0], torch.nn.Parameter(xs[1])])
    arguments = weights, params, layers, None, "none", torch.int8
    assert seen_by_dispatcher(lambda: fused_mlp(xs, *arguments), "fused_mlp")
    assert torch.equal(fused_mlp(xs, *arguments), torch.ops.rewardzip.fused_mlp(xs, *arguments))
    wanting = [xs[0], xs[1].clone().requires_grad_()]
    fused_mlp(wanting, *arguments).sum().backward()
    assert wanting[1].grad.isfinite().all()


def test_gradients_subclasses_and_fakes_take_the_dispatcher(arguments):
    x = arguments[0].clone().requires_grad_()
    assert not nobody_listens(x)
    with torch.no_grad():
        assert nobody_listens(x)
    assert not nobody_listens(torch.nn.Parameter(x))
    with torch._subclasses.FakeTensorMode():
        assert not nobody_listens(torch.empty(3))
    with pytest.raises(ValueError, match="on cpu, x on meta"):
        int8_linear(arguments[0].to("meta"), *arguments[1:])


def test_transforms_and_tracers_see_the_op(arguments):
    x, *rest = arguments
    inside = []
    mapped = torch.func.vmap(lambda row: inside.append(nobody_listens(row)) or int8_linear(row, *rest))(x)
    torch.testing.assert_close(mapped, int8_linear(x, *rest))
    assert inside == [False]
    assert len(inside) == 1
    with pytest.raises(RuntimeError, match="functorch transforms"):
        # torch has no such rule for ops registered from Python: an error, never a gradient of zero
        torch.func.grad(lambda v: int8_linear(v, *rest).sum())(x)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda v: int8_linear(v, *rest))(x)
    assert "rewardzip.int8_linear" in traced.code


def test_vmap_over_rows_inputs_and_weights(arguments):
    x, *rest = arguments
    seen = seen_by_dispatcher(lambda: torch.vmap(lambda row: int8_linear(row, *rest))(x), "int8_linear")
    assert seen
    torch.testing.assert_close(torch.vmap(lambda row: int8_linear(row, *rest), 1)(x.t()), int8_linear(x, *rest))
    weight, scale, *more = rest
    weights = torch.stack([weight, -weight])
    both = torch.vmap(lambda w: int8_linear(x, w, scale, *more))(weights)
    assert torch.equal(both, torch.stack([int8_linear(x, w, scale, *more) for w in weights]))
    pairs = torch.vmap(lambda row, w: int8_linear(row, w, scale, *more))(x[:2], weights)
    torch.testing.assert_close(pairs, torch.stack([int8_linear(x[i], weights[i], scale, *more) for i in (0, 1)]))


@pytest.mark.parametrize(("members", "reduce"), [(None, "none"), (2, "none"), (2, "mean_std")])
def test_vmap_over_some_inputs_of_networks(members, reduce):
    layers = "3+2: 16 relu, 2"
    settings = *random_mlp(layers, torch.int8, members or 1, "cpu"), layers, members, reduce, torch.float32
    state, action = torch.randn(5, 7, 3), torch.randn(7, 2)
    mapped = torch.vmap(lambda s: fused_mlp([s, action], *settings))(state)
    expected = torch.stack([fused_mlp([s, action], *settings) for s in state])
    torch.testing.assert_close(mapped, expected)
    expected = torch.stack([fused_mlp([state[:, i], action[i].expand(5, 2)], *settings) for i in range(7)])
    torch.testing.assert_close(
        torch.vmap(lambda s, a: fused_mlp([s, a.expand(5, 2)], *settings), (1, 0))(state, action), expected
    )
    weights = torch.stack([settings[0], -settings[0]])
    mapped = torch.vmap(lambda s, w: fused_mlp([s, action], w, *settings[1:]))(state[:2], weights)
    expected = torch.stack([fused_mlp([state[i], action], weights[i], *settings[1:]) for i in (0, 1)])
    torch.testing.assert_close(mapped, expected)
