"""Chains: whole MLPs in one launch, over layers that stay where they are and may change."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from mlp_numerics import assert_mlp
from numerics import UNIT, C, assert_within
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rewardzip as rz
from rewardzip_kernels.fused_mlp import fused_mlp_reference
from rewardzip_kernels.mlp_layout import padded


class Ops(TorchDispatchMode):
    """The rewardzip ops that run, by name."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "rewardzip" in str(function):
            self.seen.append(str(function).split(".")[1])
        if function is torch.ops.aten.cat.default:
            self.seen.append("cat")
        return function(*args, **(kwargs or {}))


def ops(model, *inputs):
    with Ops() as mode, torch.no_grad():
        model(*inputs)
    return mode.seen


def mlp(*sizes, activation=nn.ReLU, last=None):
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1], *([last] if last else [])).requires_grad_(False)


def alike(fast, x, *more, tolerance=1e-5):
    """The chain against the same layers one by one."""
    slow = rz.restore(fast)
    torch.testing.assert_close(fast(x, *more), slow(x, *more), rtol=tolerance, atol=tolerance)


class Critic(nn.Module):
    """Two heads on one concatenation, functional activations, a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.a1, self.a2, self.a3 = nn.Linear(23, 64), nn.Linear(64, 33), nn.Linear(33, 1)
        self.b1, self.norm, self.b2, self.b3 = nn.Linear(23, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 1)

        # as trained: a norm that is the identity would hide that it was forgotten
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, state, action):
        both = torch.cat([state, action], 1)
        a = self.a3(F.relu(self.a2(F.elu(self.a1(both)))))
        b = self.b3(torch.tanh(self.b2(F.mish(self.norm(self.b1(both))))))
        return a, b


def test_a_reward_model_is_one_op_and_no_copy():
    model = rz.RewardMLP(17, 6).requires_grad_(False)
    fast = rz.swap(model, rz.Int8())
    state, action = torch.randn(5, 17), torch.randn(5, 6)
    assert ops(fast, state, action) == ["fused_mlp"]
    assert ops(rz.swap(model, rz.Int8(), fuse=False), state, action) == ["cat", "int8_linear", "int8_linear"]
    alike(fast, state, action)
    assert "one launch: 0 relu, 2 relu, 4 none" in repr(fast)


def test_functional_chains_share_a_concatenation():
    fast = rz.swap(Critic().requires_grad_(False), rz.Int8())
    state, action = torch.randn(5, 17), torch.randn(5, 6)
    assert ops(fast, state, action) == ["fused_mlp", "fused_mlp"]
    alike(fast, state, action)


def test_a_concatenation_along_another_dimension_is_made():
    fast = rz.swap(Critic().requires_grad_(False), rz.Int8())
    state, action = torch.randn(2, 11, 23), torch.randn(2, 4, 23)
    assert ops(fast, state, action)[:2] == ["cat", "fused_mlp"]
    alike(fast, state, action)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 256, 256, 4), ["fused_mlp"]),
        ((8, 257, 4), ["int8_linear", "int8_linear"]),
        ((300, 16, 4), ["fused_mlp"]),
        ((1025, 16, 4), ["int8_linear", "int8_linear"]),
        ((8, 9, 10, 11, 12, 13, 4), ["fused_mlp"]),
        ((8, 9, 10, 11, 12, 13, 14, 15, 4), ["fused_mlp", "fused_mlp"]),
        ((8, 4), ["int8_linear"]),
    ],
)
def test_limits(sizes, expected):
    fast = rz.swap(mlp(*sizes), rz.Int8())
    x = torch.randn(7, sizes[0])
    assert ops(fast, x) == expected
    alike(fast, x)


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic")], ids=["float rows", "int8 rows"])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_wide_layers_are_one_call_on_a_cpu(rows, config):
    fast = rz.swap(mlp(23, 300, 270, 3), config)
    x = torch.randn(rows, 23)
    if config.activations:
        fast[4] = mlp(270, 3)[0]
    expected = x
    for layer in fast:
        expected = layer(expected)
    first, again = fast(x), fast(x)
    assert fast.rz_whole.shortcut.straight.calls[x.shape]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(first, again)
    assert torch.equal(fast(x[:1]), first[:1]), "a row is itself whatever the batch"


def test_trailing_layers_and_activations():
    for last in (nn.Flatten(0), nn.Tanh(), nn.Softmax(-1)):
        model = mlp(8, 16, 16, 3, activation=nn.SiLU, last=last)
        fast = rz.swap(model, rz.Int8())
        assert ops(fast, torch.randn(5, 8)) == ["fused_mlp"]
        alike(fast, torch.randn(5, 8))


def test_gradients_reach_inputs_and_dense_layers_in_training():
    model = mlp(6, 16, 16, 1)
    fast = rz.swap(model, rz.Int8())
    x = torch.randn(4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(x).sum(), x)
    (expected,) = torch.autograd.grad(rz.restore(fast)(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    fast[4].requires_grad_(True)
    fast(x).sum().backward()
    assert fast[4].weight.grad.abs().sum() > 0, "a dense layer of a chain can be trained"


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3)])
@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("widths", [(6, 16, 16, 1), (6, 300, 270, 2)])
def test_gradients_are_the_dense_models(widths, activations, rows):
    layers = [part for k, n in pairwise(widths) for part in (nn.Linear(k, n), nn.LayerNorm(n), nn.Mish())]
    fast = rz.swap(nn.Sequential(*layers[:-2]).requires_grad_(False), rz.Int8(activations=activations))
    same = rz.restore(fast).requires_grad_(False)
    x = torch.randn(*rows, 6, requires_grad=True)
    for _ in range(2):
        y = fast(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(same(x).sum(), x, create_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        twice, expected = (torch.autograd.grad(g.square().sum(), x)[0] for g in (gradient, expected))
        torch.testing.assert_close(twice, expected, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            # the rounding of rows is in the value
            torch.testing.assert_close(y, fast(x), rtol=1e-5, atol=1e-5)
            fast[0].scale.mul_(1.5)
            same[0].weight.mul_(1.5)
    through = torch.func.grad(lambda row: fast(row).sum())(x.detach())
    torch.testing.assert_close(through, torch.func.grad(lambda row: same(row).sum())(x.detach()), rtol=1e-4, atol=1e-5)


def test_gradients_pass_a_rounded_launch_that_ends_in_an_activation():
    fast = rz.swap(mlp(6, 16, 16, 3, last=nn.Sigmoid()).requires_grad_(False), rz.Int8(activations="dynamic"))
    x = torch.randn(5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(x).sum(), x)
    (expected,) = torch.autograd.grad(rz.restore(fast)(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x.detach()))
    assert torch.allclose(fast(x), fast(x.detach()), atol=1e-6)


def change_buffer(fast):
    fast[0].scale.mul_(2)


def change_bias(fast):
    fast[0].fp32_bias.add_(1)


def change_weight(fast):
    fast[0].int8_weight.neg_()


def change_norm(fast):
    fast[3].bias.add_(1)


def drop_last_bias(fast):
    fast[5].bias = None


def replace_buffer(fast):
    fast[0].scale = fast[0].scale * 2


def load(fast):
    state = {name: t + 1 if t.is_floating_point() else t for name, t in fast.state_dict().items()}
    fast.load_state_dict(state)


def train_last(fast):
    with torch.no_grad():
        fast[5].weight.add_(1)


def replace_parameter(fast):
    fast[5].weight = nn.Parameter(fast[5].weight * 2, requires_grad=False)


def data_of_last(fast):
    fast[5].weight.data = fast[5].weight.data + 1


def replace_layer(fast):
    fast[2] = nn.Linear(*reversed(fast[2].weight.shape))


def half_and_back(fast):
    fast.half().float()


CHANGES = (
    *(change_buffer, change_bias, change_weight, change_norm, drop_last_bias, replace_buffer, load, train_last),
    *(replace_parameter, data_of_last, replace_layer, half_and_back),
)


# 16: read where it lies; 12: copied and watched; 300: too wide for one launch
@pytest.mark.parametrize("width", [16, 12, 300])
@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic")], ids=["float rows", "int8 rows"])
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_layer_is_noticed(change, config, width):
    layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.ELU(), nn.Linear(width, 1)
    fast = rz.swap(nn.Sequential(*layers).requires_grad_(False), config)
    x = torch.randn(4, 6)
    before = fast(x)
    assert torch.equal(fast(x), before)
    assert fast.rz_whole.shortcut.straight.calls, "what is tested is the short way"
    change(fast)
    after = fast(x)
    if change is not half_and_back:
        assert not torch.equal(after, before)
    expected = x
    for layer in fast:
        expected = layer(expected)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    if change is not replace_layer:  # that leaves a dense layer in the middle
        assert fast.rz_whole.shortcut.straight.quick(x) is not None, "and settled anew"


def test_what_is_compiled_reads_the_numbers_of_the_last_eager_call():
    fast, x = rz.swap(mlp(6, 16, 16, 1).requires_grad_(False), rz.Int8()), torch.randn(4, 6)
    before = fast(x)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), before)
    fast[0].scale.mul_(2)
    after = fast(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(compiled(x), after)


def test_a_settled_call_takes_no_other_inputs():
    fast = rz.swap(rz.RewardMLP(17, 6).requires_grad_(False), rz.Int8())
    state, action = torch.randn(5, 17), torch.randn(5, 6)
    y = fast(state, action)
    assert fast.net.rz_whole.shortcut.straight.calls
    for s, a in (
        (state.half(), action.half()),
        (state.t().contiguous().t(), action.t().contiguous().t()),
        (torch.cat([state, state])[5:], action.clone().requires_grad_()),
    ):
        torch.testing.assert_close(fast(s, a).float(), y, rtol=1e-2, atol=1e-2)
    assert fast(state, action.clone().requires_grad_()).requires_grad
    with pytest.raises(ValueError, match="shape"):
        fast(state, action[:4])
    with torch.device("meta"):
        assert fast(state, action).device.type == "cpu"
    with Ops() as mode:
        fast(state, action)
    assert mode.seen == ["fused_mlp"], "someone listens"


def test_training_a_settled_chain_trains_it():
    fast = rz.swap(mlp(6, 16, 16, 1), rz.Int8())
    x = torch.randn(4, 6)
    fast(x), fast(x)
    fast[4].requires_grad_(True)
    assert fast(x).requires_grad
    with torch.no_grad():
        assert not fast(x).requires_grad


def test_refresh_packs_in_place():
    model = rz.RewardMLP(17, 6).requires_grad_(False)
    fast = rz.swap(model, rz.Int8())
    x = torch.randn(5, 17), torch.randn(5, 6)
    fast(*x)
    (packed,) = fast.net.rz_chains[0].packed.values()
    addresses = packed.weights.data_ptr(), packed.params.data_ptr()
    for p in model.parameters():
        p.mul_(1.5)
    rz.refresh(fast, model)
    (again,) = fast.net.rz_chains[0].packed.values()
    assert (again.weights.data_ptr(), again.params.data_ptr()) == addresses, "a captured graph reads these"
    anew = rz.swap(model, rz.Int8())
    anew(*x)
    (expected,) = anew.net.rz_chains[0].packed.values()
    # before any call of the model: a graph's replay makes none
    assert torch.equal(again.weights, expected.weights)
    assert torch.equal(again.params, expected.params)
    torch.testing.assert_close(fast(*x), rz.swap(model, rz.Int8())(*x))
    alike(fast, *x)


def test_copies_are_their_own():
    fast = rz.swap(mlp(6, 16, 16, 1), rz.Int8())
    x = torch.randn(4, 6)
    y = fast(x)
    other = copy.deepcopy(fast)
    other[0].scale.mul_(2)
    assert torch.equal(fast(x), y)
    assert not torch.equal(other(x), y)
    assert ops(other, x) == ["fused_mlp"]


def test_hooks_on_the_chain_s_module_run():
    fast = rz.swap(rz.RewardMLP(17, 6).requires_grad_(False), rz.Int8())
    seen = []
    fast.net.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    fast(torch.randn(5, 17), torch.randn(5, 6))
    assert seen == [(5, 23)]


def test_made_in_inference_mode():
    with torch.inference_mode():
        fast = rz.swap(rz.RewardMLP(17, 6), rz.Int8())
        x = torch.randn(5, 17), torch.randn(5, 6)
        alike(fast, *x)


def test_compile_and_export():
    fast = rz.swap(rz.RewardMLP(17, 6).requires_grad_(False).eval(), rz.Int8())
    x = torch.randn(5, 17), torch.randn(5, 6)
    expected = fast(*x)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), expected)
    exported = torch.export.export(fast, x)
    assert "rewardzip.fused_mlp" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*x), expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_a_wide_head_in_one_launch_is_its_two_layers(activation):
    fast = rz.swap(mlp(300, 512, 1, activation=activation), rz.Int8())
    (chain,) = fast.rz_chains
    assert chain.op == "reward_head"
    x = torch.randn(5, 300)
    alike(fast, x)
    torch.testing.assert_close(chain.fused(x), chain.one_by_one(x), rtol=1e-4, atol=1e-5)


def test_explain_names_the_launch():
    told = rz.explain(rz.swap(rz.RewardMLP(17, 6), rz.Int8()))
    assert [layer.op for layer in told] == ["fused_mlp", "fused_mlp", "fused_mlp"]


@pytest.mark.parametrize("widths", [(31, 17), (31, 20, 17), (300, 270, 17), (300, 270, 20, 17)])
@pytest.mark.parametrize("rows", ["float", "dynamic"])
def test_a_layer_norm_at_the_end_stays_outside(widths, rows):
    layers = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise((10, *widths[:-1]))]
    layers = [part for layer in layers for part in layer]
    last = nn.Linear(widths[-2], widths[-1]), nn.LayerNorm(widths[-1]), nn.GELU()
    model = nn.Sequential(*layers, *last).requires_grad_(False)
    fast = rz.swap(model, rz.Int8(activations=None if rows == "float" else rows))
    x = torch.randn(5, 10)
    for _ in range(2):
        assert (fast(x) - model(x)).norm() < 0.1 * model(x).norm()


def test_written_numbers_reach_what_is_exported_and_compiled(tmp_path):
    fast, x = rz.swap(mlp(6, 16, 16, 1).requires_grad_(False), rz.Int8()), torch.randn(5, 6)
    for _ in range(2):
        fast(x)
    fast[0].scale.mul_(2)
    rz.export(fast, tmp_path / "scaled.pt2", (x,))  # which compares
    with torch.no_grad():
        fast[4].weight.mul_(2)
    expected = fast(x)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(x), expected, rtol=1e-3, atol=1e-3)


def test_refresh_after_inference_mode():
    model, x = mlp(6, 16, 16, 1).requires_grad_(False), torch.randn(5, 6)
    fast = rz.swap(model, rz.Int8())
    with torch.inference_mode():
        fast(x)
    other = mlp(6, 16, 16, 1).requires_grad_(False)
    rz.refresh(fast, other)
    torch.testing.assert_close(fast(x), rz.swap(other, rz.Int8())(x))
    half = x.half().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(half).sum(), half)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic"), rz.Fused()])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool])
@pytest.mark.parametrize("width", [64, 300])
def test_whole_numbers_beside_floats(config, kind, width):
    fast = rz.swap(rz.RewardMLP(17, 6, (width, width)).requires_grad_(False), config)
    state, action = torch.randn(5, 17), F.one_hot(torch.arange(5), 6).to(kind)
    expected = fast(state, action.float())
    for _ in range(3):
        torch.testing.assert_close(fast(state, action), expected)
    state.requires_grad_()
    assert torch.autograd.grad(fast(state, action).sum(), state)[0].shape == (5, 17)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        fast(state.long(), action)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(23, 64), nn.Linear(64, 1)

    def forward(self, state, action):
        return self.last(F.softplus(self.first(torch.concatenate([state, action], -1))))


def test_softplus_and_concatenate_as_functions():
    fast, inputs = rz.swap(Functional().requires_grad_(False), rz.Int8()), (torch.randn(5, 17), torch.randn(5, 6))
    assert ops(fast, *inputs) == ["fused_mlp"]
    alike(fast, *inputs)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 4, 16])
@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(scalar_outputs=True)])
def test_heads_of_every_type_are_one_launch_on_a_gpu(kind, outputs, config, monkeypatch):
    model = mlp(512, 1024, outputs).to(kind)
    fast, x = rz.swap(model, config), torch.randn(7, 512, dtype=kind)
    monkeypatch.setattr("rewardzip.running.on_gpu", lambda x: True)
    assert ops(fast, x) == ["reward_head"]
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[kind]
    torch.testing.assert_close(fast(x), rz.restore(fast)(x), rtol=bound, atol=bound)
    assert "one launch on a GPU" in str(rz.explain(fast))
    # numbers that change are seen, where a captured graph reads them
    (chain,) = type(fast).rz_chains
    last, before = chain.in_full().weight, fast(x)
    for tensor in (t for t in (*fast[2].buffers(), *fast[2].parameters()) if t.is_floating_point()):
        tensor.mul_(2)
    torch.testing.assert_close(fast(x), 2 * before, rtol=bound, atol=bound)
    assert chain.in_full().weight.data_ptr() == last.data_ptr()


def test_where_a_chain_runs_is_said_for_both_devices():
    small = mlp(24, 64, 64, 1)
    assert "one call on a CPU, layer by layer on a GPU" in repr(rz.swap(small, rz.Int8(activations="dynamic")))
    assert "on a GPU layer by layer but for the last two" in repr(rz.swap(mlp(1200, 64, 64, 1), rz.Int8()))
    assert "layer by layer on a CPU" in str(rz.explain(rz.swap(mlp(64, 2048, 2048, 1), rz.Int8())))


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic")])
@pytest.mark.parametrize("outputs", [2, 20])
def test_large_networks_are_one_call(config, outputs):
    model, x = mlp(300, 1400, 1400, outputs), torch.randn(200, 300)
    fast = rz.swap(model, config)
    assert "one call on a CPU" in str(rz.explain(fast))
    (chain,) = type(fast).rz_chains
    (weights, params), layers = chain.flat((300,)), chain.describe((300,))
    if config.activations:
        # hidden values are the reference's to the bit, and not negative: what the last layer adds is of this size
        sizes = params.clone()
        sizes[-(outputs * padded(1400) + padded(outputs)) :].abs_()
        y, size = (fused_mlp_reference([x], weights, p, layers, compute_dtype=torch.int8) for p in (params, sizes))
        assert_within(fast(x), y, 2 * C * 1400**0.5 * UNIT[torch.float32] * size)
    else:
        assert_mlp(fast(x), [x], weights, params, layers, None, "none", torch.float32)
    larger = rz.swap(mlp(64, 2048, 2048, outputs), config)
    assert "layer by layer on a CPU" in str(rz.explain(larger))
