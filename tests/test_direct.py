"""A module that is one chain: what torch would have looked at before its forward is still looked at."""

import copy

import pytest
import torch
from torch import fx, nn

import rewardzip as rz


class Net(nn.Module):
    """A reward net as people write it, by the dimensions it names."""

    def __init__(self, dim: int, squeeze: int | None, name: str = "net") -> None:
        super().__init__()
        self.dim, self.squeeze = dim, squeeze
        layers = nn.Linear(23, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, state, action):
        y = self.net(torch.cat([state, action], self.dim))
        return y if self.squeeze is None else y.squeeze(self.squeeze)


class OwnCall(Net):
    def __call__(self, *inputs):
        return super().__call__(*inputs) + 1


class Leaves(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


INT8X8 = rz.Int8(activations="dynamic")


def settled(model, *inputs):
    """The compressed model after a call, its outputs, and whether the next call is answered before its forward."""
    fast = rz.swap(model.requires_grad_(False), INT8X8)
    y = fast(*inputs)
    return fast, y


def is_direct(fast, *inputs):
    entered = []
    kind = type(fast)
    forward = kind.forward
    kind.forward = lambda self, *args, **kwargs: entered.append(1) or forward(self, *args, **kwargs)
    try:
        fast(*inputs)
    finally:
        kind.forward = forward
    return not entered


def rows(*leading):
    return torch.randn(*leading, 17), torch.randn(*leading, 6)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize(
    ("dim", "squeeze", "ranks"),
    [
        (-1, -1, {2, 3}),
        (-1, None, {2, 3}),
        (1, 1, {2}),
        (1, -1, {2}),
        (-1, 1, {2}),
        (2, -1, {3}),
        (1, 2, set()),
    ],
)
def test_the_answer_is_the_forwards(dim, squeeze, ranks, shape):
    inputs = rows(*shape)
    model = Net(dim, squeeze)
    rank = len(shape) + 1
    try:
        expected = model(*inputs)
    except (RuntimeError, IndexError):
        return  # what cannot be put together, or has no such dimension
    fast, y = settled(model, *inputs)
    assert y.shape == expected.shape
    assert is_direct(fast, *inputs) == (rank in ranks)
    assert torch.equal(fast(*inputs), y)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, a, b):
        return self.net(torch.cat([b, a], -1))


def test_inputs_in_another_order():
    model, inputs = Turned(), (torch.randn(5, 12), torch.randn(5, 12))
    fast, _ = settled(model, *inputs)
    assert not is_direct(fast, *inputs)
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=0.05, atol=0.05)


def test_one_rank_settled_by_another_call_does_not_answer_for_this_one():
    inputs = rows(2, 3)
    for squeeze in (None, 2):
        fast = rz.swap(Net(1, squeeze).requires_grad_(False), INT8X8)
        type(fast.net).rz_whole(*inputs)  # settles the last dimension of three
        with pytest.raises(RuntimeError):
            fast(*inputs)
    fast = rz.swap(Net(1, None).requires_grad_(False), INT8X8)
    parts = torch.randn(2, 17, 23), torch.randn(2, 6, 23)  # what dim 1 puts together
    assert fast(*rows(4)).shape == (4, 1)
    assert fast(*parts).shape == (2, 23, 1)


def test_hooks_run():
    inputs = rows(5)
    fast, y = settled(Net(-1, -1), *inputs)
    assert is_direct(fast, *inputs)
    seen = []
    for module in (fast, fast.net):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            seen.clear()
            handle = register(lambda *arguments: seen.append(1))
            assert torch.equal(fast(*inputs), y)
            assert seen
            handle.remove()
            fast(*inputs)
            assert is_direct(fast, *inputs)
    everywhere = torch.nn.modules.module
    for register in (everywhere.register_module_forward_hook, everywhere.register_module_forward_pre_hook):
        seen.clear()
        handle = register(lambda *arguments: seen.append(1))
        fast(*inputs)
        handle.remove()
        assert seen
    hook = fast.register_full_backward_hook(lambda *arguments: seen.append("backward"))
    fast(inputs[0].clone().requires_grad_(), inputs[1]).sum().backward()
    assert seen[-1] == "backward"
    hook.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_whoever_listens_hears_it():
    inputs = rows(5)
    fast, y = settled(Net(-1, -1), *inputs)
    state, action = inputs
    assert torch.equal(fast(state=state, action=action), y)
    assert torch.equal(fast(state, action=action), y)
    with pytest.raises(TypeError):
        fast(state, action, gamma=1)
    for module, wrong in ((fast, ()), (fast, (state,)), (fast, (*inputs, state)), (fast.net, inputs)):
        with pytest.raises(TypeError):
            module(*wrong)
    with pytest.raises(TypeError):
        fast(state, action, state)
    traced = torch.jit.trace(fast, inputs, check_trace=False)
    assert torch.equal(traced(*inputs), y)
    assert "rewardzip" in str(traced.inlined_graph)
    graph = Leaves().trace(nn.Sequential(fast.net))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
    mapped = torch.func.vmap(fast)(state, action)
    torch.testing.assert_close(mapped, y)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), y)
    fast.compile(backend="eager")
    assert torch.equal(fast(*inputs), y)
    assert not is_direct(fast, *inputs)


def test_code_that_is_replaced_is_run():
    inputs = rows(5)
    fast, y = settled(Net(-1, -1), *inputs)
    twin = copy.deepcopy(fast)
    fast.net[4] = nn.Linear(16, 1)
    assert not torch.equal(fast(*inputs), y), "a layer of the child"
    assert torch.equal(twin(*inputs), y)
    twin.net = nn.Sequential(nn.Linear(23, 1))
    torch.testing.assert_close(twin(*inputs), twin.net(torch.cat(inputs, -1)).squeeze(-1))
    fast, y = settled(Net(-1, -1), *inputs)
    fast.forward = lambda state, action: "mine"
    assert fast(*inputs) == "mine"
    fast, y = settled(OwnCall(-1, -1), *inputs)
    torch.testing.assert_close(fast(*inputs), Net.forward(fast, *inputs) + 1)


def test_buffers_swapped_for_one_call():
    inputs = rows(5)
    fast, y = settled(Net(-1, -1), *inputs)
    for name in ("net.0.int8_weight", "net.0.scale", "net.0.fp32_bias", "net.4.weight"):
        other = fast.get_parameter(name) if name.startswith("net.4") else fast.get_buffer(name)
        changed = torch.func.functional_call(fast, {name: other.clone().neg_()}, inputs)
        assert not torch.equal(changed, y), name
        assert torch.equal(fast(*inputs), y)


@pytest.mark.parametrize("config", [rz.Int8(), INT8X8])
def test_buffers_of_a_layer_alone_swapped_for_one_call(config):
    fast = rz.swap(nn.Sequential(nn.Linear(24, 16)).requires_grad_(False), config)
    x = torch.randn(3, 24)
    y, again = fast(x), fast(x)
    assert torch.equal(y, again)
    assert fast[0].settled
    for name in ("0.int8_weight", "0.scale", "0.fp32_bias"):
        changed = torch.func.functional_call(fast, {name: fast.get_buffer(name).clone().neg_()}, (x,))
        assert not torch.equal(changed, y), name
        assert torch.equal(fast(x), y)


def test_settled_shapes_are_forgotten_together():
    fast = rz.swap(Net(-1, -1).requires_grad_(False), INT8X8)
    for n in range(1, 200):
        assert fast(*rows(n)).shape == (n,)
        assert len(fast.net.rz_whole.shortcut.flat.calls) <= 64
