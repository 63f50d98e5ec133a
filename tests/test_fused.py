"""``rz.Fused()``: nothing is compressed, an MLP is one call on a CPU, and its layers go on learning."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from conftest import GPU, need_triton
from mlp_numerics import assert_mlp
from torch import nn
from torch.nn.utils import prune

import rewardzip as rz
from rewardzip_kernels import loading
from rewardzip_kernels.mlp_layout import pack


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
    routes = [
        route for m in fast.modules() for c in getattr(type(m), "rz_chains", []) for route in [c.shortcut.straight]
    ]
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


@pytest.mark.parametrize("torchs", [True, False])
def test_masks_become_zeros(torchs):
    model, x = mlp(8, 32, 32, 1), torch.randn(50, 8)
    if torchs:
        for layer in model[::2]:
            prune.l1_unstructured(layer, "weight", 0.5)
    else:
        model = rz.prune(model, rz.Prune("unstructured", 0.5))
    expected, state = model(x), copy.deepcopy(model.state_dict())
    fast = rz.swap(model, rz.Fused())
    assert torch.allclose(settled(fast, x), expected, atol=1e-6)
    assert type(fast[0]) is nn.Linear
    assert state.keys() == model.state_dict().keys()


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
    chain = fast.rz_chains[0]
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
        rz.swap(mlp(16, 1 << 21, 1), rz.Fused())
    shared = mlp(6, 16, 1)
    assert rz.swap(shared, rz.Fused(), inplace=True) is shared


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [rz.Fused(), rz.Int8(), rz.Int8("dynamic")])
@pytest.mark.parametrize("rows", [(), (1,), (50,), (2, 3)])
def test_16_bit_rows_are_read_as_they_are(dtype, config, rows):
    """As the same model's in fp32 on the same numbers, rounded once at the end; products of bfloat16 round between."""
    model = rz.RewardMLP(17, 6, (32, 32)).to(dtype)
    x = [torch.randn(*rows, width).to(dtype) for width in (17, 6)]
    wide = rz.swap(copy.deepcopy(model).float(), config)
    fast = rz.swap(model, config)
    with torch.no_grad():
        for _ in range(3):
            y = fast(*x)
        assert y.dtype == dtype
        chain = type(fast.net).rz_chains[0]
        if dtype == torch.bfloat16 and config != rz.Int8("dynamic"):
            *hidden, last = chain.numbers()
            hidden = [t._replace(weight=t.weight if t.scale is not None else t.weight.to(dtype)) for t in hidden]
            layers = chain.describe((17, 6))
            flat = [i.reshape(-1, i.shape[-1]) for i in x]
            assert_mlp(y.reshape(-1, 1), flat, *pack([[*hidden, last]], layers), layers, None, "none", dtype)
        else:
            assert torch.equal(y, wide(*[i.float() for i in x]).to(dtype))
        if rows:
            assert chain.shortcut.flat.quick(*x) is not None, "what is tested is the one call"


@pytest.mark.parametrize("config", [rz.Int8(), rz.Int8("dynamic")])
def test_rows_of_two_types_are_promoted(config):
    """Before 16-bit rows of the shape were seen and after."""
    fast = rz.swap(rz.RewardMLP(17, 6, (32, 32)).requires_grad_(False), config)
    state, action = torch.randn(4, 17).half(), torch.randn(4, 6)
    for _ in range(2):
        for x in ((state, action), (state.float(), action.half())):
            y = fast(*x)
            assert y.dtype == torch.float32
            assert not torch.equal(y, y.half().float()), "not rounded on the way"
        fast(state, action.half())


def test_16_bit_models_learn_as_before():
    model = mlp(6, 16, 1).bfloat16()
    fast, x = rz.swap(model, rz.Fused()), torch.randn(8, 6).bfloat16()
    with torch.no_grad():
        fast(x)
    for net in (model, fast):
        net(x).square().mean().backward()
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("instructions", [True, False])
def test_much_bfloat16_is_left_to_torch_without_instructions_for_it(monkeypatch, instructions):
    monkeypatch.setattr("rewardzip.chain.multiplies_bfloat16", lambda: instructions)
    model = mlp(6, 256, 256, 1).bfloat16().requires_grad_(False)
    fast, exact = rz.swap(model, rz.Fused()), rz.swap(copy.deepcopy(model).float(), rz.Fused())
    (chain,) = type(fast).rz_chains
    rows, seen, linear = (1 << 23) // chain.weights, [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: seen.append(self) or linear(self, x))
    for count, alone in ((rows - 1, False), (rows + 1, True)):
        x = torch.randn(count, 6)
        exact(x)
        assert not seen, "fp32 is not"
        x = x.bfloat16()
        seen.clear()
        fast(x)
        assert bool(seen) == (alone and not instructions)


# Triton's interpreter cannot multiply bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float16])
def test_on_a_gpu_a_16_bit_model_is_one_launch(dtype, device, monkeypatch):
    """Without a GPU: its kernel in the interpreter."""
    need_triton()
    from rewardzip_kernels.gpu.fused_mlp import fused_mlp

    calls = []
    monkeypatch.setattr("rewardzip.running.on_gpu", lambda x: True)
    place = "gpu" if GPU else "cpu", "fused_mlp"
    monkeypatch.setitem(loading._found, place, lambda *given: calls.append(given) or fused_mlp(*given))
    model = mlp(6, 40, 16, 3, norm=True).to(device, dtype).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(9, 6, device=device, dtype=dtype)
    y, exact = fast(x), copy.deepcopy(model).double()(x.double())
    assert len(calls) == 1
    assert calls[0][1].dtype == dtype
    assert y.dtype == dtype
    assert float((y - exact).norm()) <= 8 * torch.finfo(dtype).eps * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_another_type_are_refused_as_by_torch(dtype):
    model = mlp(6, 16, 1).to(dtype).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(5, 6)
    settled(fast, x.to(dtype))
    for other in {torch.float32, torch.float16, torch.bfloat16} - {dtype}:
        with pytest.raises(RuntimeError, match="dtype"):
            fast(x.to(other))
    turned = fast.to(torch.bfloat16)
    torch.testing.assert_close(settled(turned, x.bfloat16()), model.bfloat16()(x.bfloat16()), rtol=0.05, atol=0.02)
    with pytest.raises(RuntimeError, match="dtype"):
        fast(x.to(dtype))


def test_lent_numbers_before_any_others():
    model = mlp(6, 16, 1).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(5, 6)
    lent = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = torch.func.functional_call(model, lent, x)
    for _ in range(2):
        torch.testing.assert_close(torch.func.functional_call(fast, lent, x), expected)
    torch.testing.assert_close(fast(x), model(x))


def test_data_that_comes_to_lie_where_other_data_lay():
    model = mlp(6, 16, 16, 1).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(5, 6)
    for _ in range(30):
        settled(fast, x)
        for _ in range(2):
            fast[2].weight.data = torch.randn(16, 16)
        torch.testing.assert_close(fast(x), rz.restore(fast)(x))


@pytest.mark.parametrize("name", ["form", "dense", "whole", "fused", "chains"])
def test_an_author_s_names_are_the_author_s(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, mlp(6, 8, 1))

        def forward(self, x):
            return 2 * getattr(self, name)(x).relu()

    model, x = Net().requires_grad_(False), torch.randn(5, 6)
    for config in (rz.Fused(), rz.Int8()):
        fast = rz.swap(model, config)
        assert getattr(fast, name) is dict(fast.named_children())[name]
        torch.testing.assert_close(fast(x), model(x), rtol=0.05, atol=0.05)


def test_autocast_is_torch_s():
    model = mlp(6, 16, 1).requires_grad_(False)
    fast, x = rz.swap(model, rz.Fused()), torch.randn(5, 6)
    settled(fast, x)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == model(x).dtype == torch.bfloat16
        assert fast(x).dtype == torch.float32


def test_rows_of_another_type_that_want_a_gradient_are_refused_too():
    fast = rz.swap(mlp(6, 16, 1).bfloat16().requires_grad_(False), rz.Fused())
    with pytest.raises(RuntimeError, match="dtype"):
        fast(torch.randn(5, 6, requires_grad=True))


def test_without_a_compiler(monkeypatch):
    from rewardzip_kernels.fused_mlp import fused_mlp_reference

    monkeypatch.setitem(loading._found, ("cpu", "fused_mlp"), fused_mlp_reference)
    for dtype in (torch.float32, torch.float16):
        model = mlp(6, 16, 1).to(dtype).requires_grad_(False)
        fast, x = rz.swap(model, rz.Fused()), torch.randn(5, 6).to(dtype)
        for _ in range(2):
            assert torch.equal(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode asks for it
@pytest.mark.parametrize("config", [rz.Fused(), rz.Int8()])
def test_forward_mode(config):
    """As torch has it where nothing is compressed; refused, and not zero, where the ops stand in between."""
    model = mlp(6, 16, 1).requires_grad_(False)
    fast, x, v = rz.swap(model, config), torch.randn(5, 6), torch.randn(5, 6)
    with torch.no_grad():
        fast(x)

    def dual(net):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, v))).tangent

    for way in (dual, lambda net: torch.func.jvp(net, (x,), (v,))[1]):
        if config == rz.Fused():
            torch.testing.assert_close(way(fast), way(model))
        else:
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                way(fast)
    with torch.autograd.forward_ad.dual_level():  # what has no tangent is no matter of it
        torch.testing.assert_close(fast(x), fast(x.clone()))
    _, tangent = torch.func.jvp(lambda v: v + fast(x).sum(), (v,), (x,))
    assert torch.equal(tangent, x)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_large_networks_of_few_outputs_are_one_call(rows):
    model, x = mlp(1500, 1500, 4).requires_grad_(False), torch.randn(rows, 1500)
    fast = rz.swap(model, rz.Fused())
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    (chain,) = type(fast).rz_chains
    assert chain.route.calls[x.shape] is not None, "what is tested is the one call"


@pytest.mark.parametrize(
    ("threads", "rows", "expected"),
    [(1, 30, True), (2, 30, True), (4, 30, False), (4, 96, True), (16, 96, False), (16, 1, True)],
)
def test_with_many_threads_few_rows_of_large_layers_are_torchs(threads, rows, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, x = mlp(600, 600, 4).requires_grad_(False), torch.randn(rows, 600)
    fast = rz.swap(model, rz.Fused())
    for _ in range(2):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    (chain,) = type(fast).rz_chains
    assert (chain.route.calls.get(x.shape) is not None) == expected
