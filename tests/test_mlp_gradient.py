"""The kernels that give one output and its gradient, against float64 from the same weights."""

import importlib
from itertools import pairwise

import pytest
import torch
from conftest import GPU, need_triton
from torch import nn

import rewardzip as rz
from rewardzip_kernels import activations, loading
from rewardzip_kernels.cpu.mlp_gradient import SLOPES
from rewardzip_kernels.fused_mlp import network
from rewardzip_kernels.mlp_layout import Linear, layout, pack

EPS = torch.finfo(torch.float32).eps


def random_networks(sizes, stored):
    members, k = [], sizes[0]
    for n in sizes[1:-1]:
        if stored == torch.int8:
            weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
            scale = 10.0 ** (torch.rand(n) - 0.5) / (73 * k**0.5)
        else:
            weight, scale = torch.randn(n, k) / k**0.5, None
        members.append(Linear(weight, torch.randn(n), scale))
        k = n
    return [*members, Linear(torch.randn(1, k) / k**0.5, torch.randn(1), None)]


def reference(x, layers, names):
    """(y, gradient, a bound for each) in float64; what is near a kink, where a rounding decides, is told too.

    A sum of n products is right to n eps of the sum of their magnitudes, so is a chain of them; a slope, at most 2
    here, moves by no more than what it is computed from, whose magnitude ``size`` holds.
    """
    h, near, slopes, size = x.double(), torch.zeros(len(x), dtype=torch.bool), [], x.double().abs()
    for tensors, name in zip(layers, names, strict=True):
        entry, parameter = activations.parse(name)
        weight = tensors.weight.double() * (1 if tensors.scale is None else tensors.scale.double()[:, None])
        size = size @ weight.abs().t() + tensors.bias.double().abs()
        z = (h @ weight.t() + tensors.bias.double()).requires_grad_()
        near |= (z.detach().abs() < 1e-3).any(1)
        h = entry.forward(z, parameter)
        slopes.append(torch.autograd.grad(h.sum(), z)[0])
        h = h.detach()
    gradient, large = slopes[-1], 2.0 * torch.ones_like(slopes[-1])
    for i in reversed(range(len(layers))):
        weight = layers[i].weight.double() * (1 if layers[i].scale is None else layers[i].scale.double()[:, None])
        gradient, large = gradient @ weight, large @ weight.abs()
        if i:
            gradient, large = gradient * slopes[i - 1], large * 2.0
    terms = sum(t.weight.shape[1] for t in layers) + 64
    reach = terms * EPS * (1 + size.max(1, keepdim=True).values)
    return h, gradient, reach, reach * large, near


# hidden, hidden, last
NAMES = [
    ("relu", "leaky_relu:0.2", "none"),
    ("elu:0.7", "none", "tanh"),
    ("tanh", "sigmoid", "softplus"),
    ("softplus", "relu", "sigmoid"),
]


def test_every_slope_is_tested():
    assert {name.partition(":")[0] for names in NAMES for name in names} == set(SLOPES)
    need_triton()
    from rewardzip_kernels.gpu.activations import SLOPES as OF_TRITON

    assert set(OF_TRITON) == set(SLOPES)


# odd and even widths, beyond one panel of 64, beyond one launch's 256, one row wide; a block is 48 rows
SHAPES = [((24,), (64, 64)), ((17, 6), (33, 70)), ((1,), (1, 1)), ((130,), (300, 9))]


@pytest.mark.parametrize(
    ("pieces", "hidden", "names"),
    [(*shape, names) for names in NAMES for shape in SHAPES] + [((3, 2, 5), (300,), ("relu", "none"))],
)
@pytest.mark.parametrize("rows", [1, 7, 48, 100])
@pytest.mark.parametrize("stored", [torch.int8, torch.float32])
def test_against_float64(stored, rows, pieces, hidden, names):
    torch.manual_seed(0)
    sizes = (sum(pieces), *hidden, 1)
    layers = random_networks(sizes, stored)
    described = ", ".join(f"{n} {a}" for n, a in zip(sizes[1:], names, strict=True))
    kernel = network([layers], f"{'+'.join(map(str, pieces))}: {described}", None, "none", torch.float32).gradient()
    x = torch.randn(rows, sizes[0])
    y, gradient, bound, slack, near = reference(x, layers, names)
    torch.empty(1 << 16).fill_(float("nan"))  # what the next allocations are likely to find
    got, slope = kernel([part.contiguous() for part in x.split(pieces, 1)])
    assert (got.double() - y).abs().le(bound)[~near].all()
    assert (slope.double() - gradient).abs().le(slack)[~near].all()
    assert rows == 1 or not near.all()
    alone, one = kernel([part[:1].contiguous() for part in x.split(pieces, 1)])
    assert torch.equal(alone, got[:1]), "a row is itself whatever stands beside it"
    assert torch.equal(one, slope[:1])


@pytest.mark.parametrize(
    ("pieces", "hidden", "names"),
    [(*shape, names) for names in NAMES for shape in (((24,), (64, 64)), ((17, 6), (33, 70)), ((1,), (1, 1)))]
    + [((3, 2, 5), (200,), ("relu", "none")), ((120, 100), (256,), ("tanh", "none")), ((5,), (), ("none",))],
)
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("stored", [torch.int8, torch.float16])
def test_the_gpu_kernel_against_float64(stored, rows, pieces, hidden, names, device, poisoned):
    """Products of fp32 here; on a GPU tf32 forward and back."""
    need_triton()
    torch.manual_seed(0)
    sizes = (sum(pieces), *hidden, 1)
    layers = random_networks(sizes, stored)
    if stored == torch.float16:
        layers = [*(t._replace(weight=t.weight.half()) for t in layers[:-1]), layers[-1]]
    described = f"{'+'.join(map(str, pieces))}: " + ", ".join(f"{n} {a}" for n, a in zip(sizes[1:], names, strict=True))
    kernel = gpu_gradient(layers, described, device)
    if not hidden:
        assert kernel is None, "one layer is its own gradient"
        return
    x = torch.randn(rows, sizes[0])
    y, gradient, bound, slack, near = reference(x, layers, names)
    got, slope = kernel([part.to(device).contiguous() for part in x.split(pieces, 1)])
    got, slope = got.cpu().double(), slope.cpu().double()
    coarse = 2.0**13 if GPU else 1.0  # tf32 has 2^-11 where fp32 has 2^-24
    assert (got - y).abs().le(coarse * bound)[~near].all()
    assert (slope - gradient).abs().le(coarse * slack)[~near].all()
    # the bound is a worst case; errors that do not conspire stay far below
    assert float((slope - gradient)[~near].norm()) <= (3e-3 if GPU else 1e-6) * float(gradient[~near].norm())
    assert rows == 1 or not near.all()


def gpu_gradient(layers, described, device, compute=torch.float32):
    weights, params = pack([layers], described)
    made = importlib.import_module("rewardzip_kernels.gpu.fused_mlp").Network
    return made(weights.to(device), params.to(device), described, None, "none", compute).gradient()


@pytest.mark.parametrize(
    "layers",
    [
        "300: 8 relu, 1",
        "7: 256 relu, 256 relu, 256 relu, 8 relu, 1",
        "7: 8 silu, 1",
        "7: 8 layer_norm relu, 1",
        "7: 8 relu, 2",
        "7: 8 elu:-1, 1",
        "7: 1",
    ],
)
def test_networks_the_gpu_kernel_does_not_take(layers):
    need_triton()
    from rewardzip_kernels.gpu.mlp_gradient import takes

    assert not takes(layout(layers, True), torch.float16)
    assert takes(layout("7: 8 relu, 1", True), torch.float16)
    network = importlib.import_module("rewardzip_kernels.gpu.fused_mlp").Network
    two = pack([random_networks((7, 8, 1), torch.int8)] * 2, "7: 8 relu, 1")
    assert network(*two, "7: 8 relu, 1", 2, "none", None).gradient() is None
    three = layout("7: 256 relu, 256 relu, 256 relu, 1", True)
    assert takes(three, torch.float16)
    assert not takes(three, torch.float32)


@pytest.mark.parametrize("compute", [torch.float16, torch.float32])
def test_the_gpu_kernel_s_output_is_the_launch_s(compute, device):
    """fp16 products: those of the launch, so their sums may differ by their order alone."""
    need_triton()
    from rewardzip_kernels.gpu.fused_mlp import fused_mlp

    layers, described = random_networks((23, 70, 33, 1), torch.int8), "23: 70 elu, 33 relu, 1"
    x = torch.randn(40, 23, device=device)
    weights, params = (t.to(device) for t in pack([layers], described))
    y, gradient = gpu_gradient(layers, described, device, compute)([x])
    launched = fused_mlp([x], weights, params, described, None, "none", compute)
    torch.testing.assert_close(y, launched, rtol=1e-5, atol=1e-5)
    exact = gpu_gradient(layers, described, device, torch.float32)([x])[1]
    assert float((gradient - exact).norm()) <= 1e-2 * float(exact.norm())


def net(activation=nn.ELU, hidden=(64, 48)):
    sizes, layers = (23, *hidden), []
    for k, n in pairwise(sizes):
        layers += [nn.Linear(k, n), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1)).requires_grad_(False)


class Reward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, state, action):
        return self.net(torch.cat([state, action], -1)).squeeze(-1)


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(activations="dynamic"), rz.Fused()])
def test_through_a_model(config, monkeypatch):
    fast = rz.swap(Reward().requires_grad_(False), config)
    same = rz.restore(fast).requires_grad_(False)
    monkeypatch.setattr(fast.net.rz_whole.guided, "dense", None)  # the kernel, or an error
    # rounding rows moves the point at which the slope is taken
    close = {"rtol": 0.05, "atol": 0.01} if config == rz.Int8(activations="dynamic") else {"rtol": 1e-4, "atol": 1e-5}
    state, action = torch.randn(2, 5, 17), torch.randn(2, 5, 6)
    for asked in ((True, True), (True, False), (False, True)):
        inputs = [x.clone().requires_grad_(needed) for x, needed in zip((state, action), asked, strict=True)]
        weight = torch.randn(2, 5)
        (fast(*inputs) * weight).sum().backward()
        found = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        (same(*inputs) * weight).sum().backward()
        for x, gradient in zip(inputs, found, strict=True):
            assert (x.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, x.grad, **close)
        with torch.no_grad():
            expected = fast(*inputs)
        torch.testing.assert_close(fast(*inputs).detach(), expected, rtol=1e-6, atol=1e-6)
    # not dense in memory: rows, and what lies in a row
    for spread, other in ((torch.randn(5, 2, 17).transpose(0, 1), action), (torch.randn(17, 5).t(), action[0])):
        spread = spread.requires_grad_()
        (gradient,) = torch.autograd.grad(fast(spread, other).sum(), spread)
        (expected,) = torch.autograd.grad(same(spread, other).sum(), spread)
        torch.testing.assert_close(gradient, expected, **close)


def test_a_dense_last_layer_that_learns_gets_its_gradient():
    model = Reward()
    for p in model.parameters():
        p.requires_grad_(False)
    model.net[-1].requires_grad_(True)
    fast, x = rz.swap(model, rz.Int8()), [torch.randn(5, k, requires_grad=True) for k in (17, 6)]
    fast.net[-1].requires_grad_(True)
    fast(*x).sum().backward()
    assert fast.net[-1].weight.grad is not None
    assert all(i.grad is not None for i in x)


@pytest.fixture
def gpus_way(monkeypatch, device):
    """Chains go the way of a GPU, without one on its kernels in the interpreter."""
    need_triton()
    monkeypatch.setattr("rewardzip.running.on_gpu", lambda x: True)
    if not GPU:
        module = importlib.import_module("rewardzip_kernels.gpu.fused_mlp")
        monkeypatch.setitem(loading._found, ("cpu", "fused_mlp"), module.fused_mlp)
    return device


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8(compute_dtype="float32"), rz.Int8(activations="dynamic")])
@pytest.mark.parametrize("activation", [nn.ELU, nn.SiLU])
def test_through_a_model_on_a_gpu(config, activation, gpus_way, monkeypatch):
    model = Reward().requires_grad_(False).to(gpus_way)
    model.net = net(activation).to(gpus_way)
    fast = rz.swap(model, config)
    same = rz.restore(fast).requires_grad_(False)
    by_kernel = activation is nn.ELU and config.activations is None
    if by_kernel:
        monkeypatch.setattr(fast.net.rz_whole.guided, "dense", None)
    inputs = [torch.randn(2, 5, k, device=gpus_way, requires_grad=True) for k in (17, 6)]
    for _ in range(2):
        y = fast(*inputs)
        found = torch.autograd.grad(y.sum(), inputs)
        expected = torch.autograd.grad(same(*inputs).sum(), inputs)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm()) <= 0.03 * float(b.norm())
        with torch.no_grad():
            torch.testing.assert_close(y.detach(), fast(*inputs), rtol=1e-5, atol=1e-5)
            if by_kernel:  # and again after a change
                fast.net[0].scale.mul_(2)
                same.net[0].weight.mul_(2)


def test_changes_are_noticed_and_shapes_are_told_apart():
    fast = rz.swap(net(), rz.Int8())
    for rows in (4, 1, 9):
        x = torch.randn(rows, 23, requires_grad=True)
        before = torch.autograd.grad(fast(x).sum(), x)[0]
        with torch.no_grad():
            fast[0].scale.mul_(2)
        after = torch.autograd.grad(fast(x).sum(), x)[0]
        same = rz.restore(fast).requires_grad_(False)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, torch.autograd.grad(same(x).sum(), x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(64, 22\), its weight is \(64, 23\)"):
        fast(torch.randn(4, 22, requires_grad=True))
    assert fast(torch.randn(0, 23, requires_grad=True)).shape == (0, 1)


def test_threads_share_the_rows():
    fast = rz.swap(net(hidden=(256, 256)), rz.Int8())
    x = torch.randn(1000, 23, requires_grad=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(fast(x).sum(), x)[0])
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "model",
    [net(nn.SiLU), net(lambda: nn.LeakyReLU(-0.5)), net(lambda: nn.ELU(-1.0)), nn.Sequential(*net(), nn.Mish())],
)
def test_slopes_that_do_not_follow_from_the_output(model):
    fast = rz.swap(model, rz.Int8())
    x = torch.randn(6, 23, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(x).sum(), x)
    (expected,) = torch.autograd.grad(rz.restore(fast).requires_grad_(False)(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", NAMES)
def test_rounded_rows_give_the_launchs_output(names):
    """Widths off 16: what stands beyond a row must not count as its largest."""
    torch.manual_seed(0)
    described = ", ".join(f"{n} {a}" for n, a in zip((5, 9, 1), names, strict=True))
    made = network([random_networks((7, 5, 9, 1), torch.int8)], f"7: {described}", None, "none", torch.int8)
    x = 0.01 * torch.randn(20, 7)
    assert torch.equal(made.gradient()([x])[0], made.bound([x])(x))


@pytest.mark.parametrize("config", [rz.Fused(), rz.Int8()])
def test_an_input_that_was_computed_from_another(config):
    """As an actor's action is from the state, with the graph kept."""
    torch.manual_seed(0)
    fast = rz.swap(Reward().requires_grad_(False), config)
    same, actor = rz.restore(fast).requires_grad_(False), nn.Linear(17, 6)
    for net in (same, fast):
        state = torch.ones(3, 17, requires_grad=True)
        (first,) = torch.autograd.grad(net(state, actor(state)).sum(), state, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), actor.weight)[0]
        if net is same:
            expected = first, second
    torch.testing.assert_close(first, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, expected[1], rtol=1e-4, atol=1e-5)
