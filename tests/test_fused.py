"""``rz.Fused()``: nothing is compressed, an MLP is one call on a CPU, and its layers go on learning."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

import rewardzip as rz


def mlp(*sizes, norm=False, activation=nn.ELU):
    layers = []
    for k, n in pairwise(sizes):
        layers += [nn.Linear(k, n), *([nn.LayerNorm(n)] if norm else []), activation()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def settled(fast, *inputs):
    """The outputs of a call that is answered at once."""
    with torch.no_grad():
        for _ in range(3):
            y = fast(*inputs)
    routes = [route for m in fast.modules() for c in getattr(type(m), "chains", []) for route in [c.shortcut.straight]]
    assert any(route.calls.get(inputs[0].shape) for route in routes), "what is tested is the one call"
    return y


# odd widths, wider than one GPU launch, one output and several, six layers
@pytest.mark.parametrize("sizes", [(3, 5, 1), (24, 64, 64, 1), (40, 300, 270, 7), (9, 8, 7, 6, 5, 4, 2), (16, 1000, 3)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (50,), (2, 3)])
def test_the_same_numbers(sizes, norm, rows):
    model = mlp(*sizes, norm=norm)
    fast = rz.swap(model, rz.Fused())
    x = torch.randn(*rows, sizes[0])
    y, exact = settled(fast, x), copy.deepcopy(model).double()(x.double()).detach()
    # of sums of about this many numbers near 1, added in another order
    bound = 4 * sum(sizes) * torch.finfo(torch.float32).eps
    assert y.shape == exact.shape
    assert float((y - exact).abs().max()) <= bound * max(1.0, float(exact.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fast.parameters(), strict=True))
    assert type(rz.restore(fast)) is nn.Sequential


def test_it_learns_as_before():
    torch.manual_seed(0)
    model = rz.RewardMLP(17, 6, (32, 32))
    fast = rz.swap(model, rz.Fused())
    inputs = torch.randn(64, 17), torch.randn(64, 6)
    settled(fast, *inputs)
    for net in (model, fast):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            net(*inputs).square().mean().backward()
            optimizer.step()
            with torch.no_grad():  # an agent acts between steps
                acted = net(inputs[0][:1], inputs[1][:1])
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a, b), "the same steps, to the bit"
    torch.testing.assert_close(settled(fast, inputs[0][:1], inputs[1][:1]), acted)
    with torch.no_grad():
        torch.testing.assert_close(settled(fast, *inputs), model(*inputs))
        fast.net[2].weight.mul_(2)
        model.net[2].weight.mul_(2)
        torch.testing.assert_close(fast(*inputs), model(*inputs))
        torch.testing.assert_close(settled(fast, *inputs), model(*inputs))


def test_numbers_that_keep_changing_are_not_packed(monkeypatch):
    model = mlp(6, 16, 16, 1).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(4, 6)
    settled(fast, x)
    packed = []
    chain = fast.chains[0]
    numbers = chain.shortcut.numbers
    monkeypatch.setattr(chain.shortcut, "numbers", lambda: packed.append(1) or numbers())
    for _ in range(4):
        fast[0].weight.mul_(1.1)
        model[0].weight.mul_(1.1)
        torch.testing.assert_close(fast(x), model(x))
    assert not packed
    fast(x)
    assert packed, "one call later they stand still"


def test_gradients_and_other_types():
    model = mlp(6, 16, 16, 1)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(4, 6)
    settled(fast, x)
    asked = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(asked).sum(), asked)
    (expected,) = torch.autograd.grad(model(asked).sum(), asked)
    torch.testing.assert_close(gradient, expected)
    double = copy.deepcopy(fast).double()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(double(x.double()), copy.deepcopy(model).double()(x.double()))
            with pytest.raises(RuntimeError, match="dtype"):
                double(x)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_whoever_traces_it_sees_the_layers(tmp_path):
    fast, x = rz.swap(mlp(6, 16, 16, 1), rz.Fused()), torch.randn(4, 6)
    y = settled(fast, x)
    made = rz.export(fast, tmp_path / "net.pt2", (x,))
    assert made.error < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fast)(x), y)
        swapped = torch.func.functional_call(fast, {"0.weight": torch.zeros(16, 6)}, (x,))
        torch.testing.assert_close(swapped, fast(torch.zeros_like(x)))
        torch.testing.assert_close(fast(x), y)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(x)).shape == (4, 1)


def test_copies_are_fused_too():
    fast, x = rz.swap(mlp(6, 16, 16, 1), rz.Fused()), torch.randn(4, 6)
    y = settled(fast, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(settled(other, x), y)
        other[0] = nn.Linear(6, 16)
        torch.testing.assert_close(settled(other, x), rz.restore(other)(x))
    assert "one call on a CPU" in str(rz.explain(fast))


def test_what_cannot_be_fused_is_said():
    with pytest.raises(ValueError, match="takes no skip"):
        rz.swap(mlp(6, 16, 1), rz.Fused(), skip="0")
    with pytest.warns(UserWarning, match="swap changed nothing: it has no MLP"):
        rz.swap(nn.Sequential(nn.Linear(6, 1)), rz.Fused())
    with pytest.warns(UserWarning, match="swap changed nothing"):
        rz.swap(mlp(2048, 2048, 1), rz.Fused())
    shared = mlp(6, 16, 1)
    assert rz.swap(shared, rz.Fused(), inplace=True) is shared
