"""fuse_ensemble: members in one launch, each as if it ran alone."""

import copy
import importlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_chain import Critic, mlp, ops
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rewardzip as rz


def nets(count, make=lambda: rz.RewardMLP(17, 6, (32, 32))):
    return [make().requires_grad_(False).eval() for _ in range(count)]


def inputs(rows=9):
    return torch.randn(rows, 17), torch.randn(rows, 6)


def dispatched(model, *inputs):
    with Everything() as mode, torch.no_grad():
        model(*inputs)
    return mode.seen


class Everything(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_members_and_their_spread(count):
    members, x = nets(count), inputs()
    apart = torch.stack([rz.swap(m, rz.Int8())(*x) for m in members])
    fused = rz.fuse_ensemble(members)
    torch.testing.assert_close(fused(*x), apart)
    assert ops(fused, *x) == ["fused_mlp"]
    spread = rz.fuse_ensemble(members, reduce="mean_std")
    assert ops(spread, *x) == ["fused_mlp"]
    assert not dispatched(spread, *x) & {"mean", "std", "stack"}, "the launch reduces"
    mean, std = spread(*x)
    torch.testing.assert_close(mean, apart.mean(0))
    assert std.isnan().all() if count == 1 else torch.allclose(std, apart.std(0), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: rz.RewardMLP(17, 6, (32, 32)), lambda: mlp(23, 20, 20, 1)])
def test_a_member_s_change_is_noticed(make):
    fused = rz.fuse_ensemble(nets(3, make))
    x = inputs() if isinstance(fused.members[0], rz.RewardMLP) else (torch.randn(9, 23),)
    before = fused(*x)
    assert torch.equal(fused(*x), before)
    assert fused.launch.shortcut.straight.calls, "what is tested is the short way"
    layers = getattr(fused.members[1], "net", fused.members[1])
    layers[0].scale.mul_(2)
    layers[4].bias.add_(1)
    after = fused(*x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(after[1], fused.members[1](*x))
    assert not torch.equal(after[1], before[1])
    seen = []
    fused.members[2].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(fused(*x), after)
    assert seen, "a member's hooks run"


class Untraceable(nn.Module):
    """Like imitation's BasicRewardNet: chooses its inputs, checks its output, an MLP inside that squeezes."""

    def __init__(self):
        super().__init__()
        self.use_action = True
        self.mlp = nn.Sequential(*mlp(23, 32, 32, 1), nn.Flatten(0))

    def forward(self, state, action, done=None):
        parts = [torch.flatten(state, 1)]
        if self.use_action:
            parts.append(torch.flatten(action, 1))
        outputs = self.mlp(torch.cat(parts, dim=1))
        assert outputs.shape == state.shape[:1]
        return outputs


def test_members_with_code_of_their_own():
    members, x = nets(3, Untraceable), inputs()
    fused = rz.fuse_ensemble(members)
    torch.testing.assert_close(fused(*x), torch.stack([rz.swap(m, rz.Int8())(*x) for m in members]))
    assert ops(fused, *x).count("fused_mlp") == 1


def test_q_networks():
    members, x = nets(4, lambda: mlp(8, 64, 64, 3)), torch.randn(5, 8)
    q = rz.fuse_ensemble(members)(x)
    torch.testing.assert_close(q, torch.stack([rz.swap(m, rz.Int8())(x) for m in members]))
    assert q.shape == (4, 5, 3)


def test_members_can_be_called_alone_and_changed():
    fused, x = rz.fuse_ensemble(nets(3)), inputs()
    before = fused(*x)
    torch.testing.assert_close(fused.members[1](*x), before[1])
    fused.members[1].net[0].scale.mul_(2)
    after = fused(*x)
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], fused.members[1](*x))


def test_copies_gradients_and_state():
    fused, x = rz.fuse_ensemble(nets(3)), inputs()
    other = copy.deepcopy(fused)
    assert torch.equal(other(*x), fused(*x))
    assert ops(other, *x) == ["fused_mlp"]
    other.members[0].net[0].scale.mul_(3)
    assert not torch.equal(other(*x)[0], fused(*x)[0])
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(*x), fused(*x))
    state = x[0].clone().requires_grad_()
    fused(state, x[1]).sum().backward()
    expected = x[0].clone().requires_grad_()
    sum(m(expected, x[1]).sum() for m in fused.members).backward()
    torch.testing.assert_close(state.grad, expected.grad)


def test_members_do_not_answer_one_by_one_in_the_ensembles_call(monkeypatch):
    fused, x = rz.fuse_ensemble(nets(3)), inputs()
    expected = fused(*x)
    for member in fused.members:  # settled, each for itself
        member(*x)
        member(*x)

    def asked(*rows):
        raise AssertionError("a member's own launch")

    for chain in fused.launch.chains:
        for route in (chain.shortcut.straight, chain.shortcut.flat):
            monkeypatch.setattr(route, "quick", asked)
    assert torch.equal(fused(*x), expected)


def test_many_threads_share_one_ensemble():
    fused = rz.fuse_ensemble(nets(3))
    batches = [inputs(rows) for rows in range(1, 33)]
    expected = [fused(*x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(lambda x: fused(*x), batches * 4), expected * 4, strict=True):
            assert torch.equal(got, want)


class Scaled(rz.RewardMLP):
    """A member with a number of its own in front of the MLP."""

    def __init__(self, scale):
        super().__init__(17, 6)
        self.register_buffer("input_scale", torch.tensor(scale))

    def forward(self, state, action):
        return super().forward(state * self.input_scale, action)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "no member"),
        ([rz.RewardMLP(17, 6), rz.RewardMLP(17, 6, (64, 32))], "member 1 is"),
        ([rz.RewardMLP(17, 6), rz.RewardMLP(17, 7)], "member 1 is"),
        ([Critic()], "member 0 has 2 MLPs"),
        ([mlp(8, 300, 300, 1)], "member 0 has 0 MLPs|member 0 has 1 MLPs"),
        ([Scaled(1.0), Scaled(2.0)], "differ outside their MLP"),
    ],
)
def test_what_cannot_be_an_ensemble(members, words):
    with pytest.raises(ValueError, match=words):
        rz.fuse_ensemble(members)


def test_bad_reduce():
    with pytest.raises(ValueError, match="'none' or 'mean_std'"):
        rz.fuse_ensemble(nets(2), reduce="max")


@pytest.mark.parametrize("make", [lambda: rz.RewardMLP(17, 6, (32, 32)), lambda: mlp(23, 20, 20, 1)])
def test_a_member_s_replaced_layer_is_noticed(make):
    fused = rz.fuse_ensemble(nets(3, make))
    x = inputs() if isinstance(fused.members[0], rz.RewardMLP) else (torch.randn(9, 23),)
    before = fused(*x)
    layers = getattr(fused.members[1], "net", fused.members[1])
    layers[0] = rz.nn.Int8Linear.from_linear(nn.Linear(23, layers[0].out_features))
    after = fused(*x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(after[1], fused.members[1](*x))
    assert not torch.allclose(after[1], before[1])


class OnePlus(nn.Sequential):
    def __call__(self, x):
        return 1 + super().__call__(x)


def test_a_member_s_own_call_is_called():
    fused, x = rz.fuse_ensemble(nets(2, lambda: OnePlus(*mlp(23, 20, 1)))), torch.randn(9, 23)
    torch.testing.assert_close(fused(x), torch.stack([m(x) for m in fused.members]))


class Along(nn.Module):
    """Concatenates and squeezes along the places given."""

    def __init__(self, cat, squeeze):
        super().__init__()
        self.net, self.cat, self.squeeze = mlp(23, 20, 1), cat, squeeze

    def forward(self, state, action):
        return self.net(torch.cat([state, action], self.cat)).squeeze(self.squeeze)


@pytest.mark.parametrize("rows", [(9,), (), (4, 9), (1, 1)])
def test_members_that_squeeze_take_the_short_way_and_give_the_same(rows):
    members, x = nets(3), (torch.randn(*rows, 17), torch.randn(*rows, 6))
    apart = torch.stack([rz.swap(m, rz.Int8())(*x) for m in members])
    fused = rz.fuse_ensemble(members)
    for _ in range(3):
        torch.testing.assert_close(fused(*x), apart)
    assert fused.launch.shortcut.flat.calls[x[0].shape] is not None
    seen = []
    fused.members[1].net.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(fused(*x), apart)
    assert seen


@pytest.mark.parametrize("cat", [-1, 1, 2])
@pytest.mark.parametrize("squeeze", [-1, 1, 2])
@pytest.mark.parametrize("rows", [(9,), (4, 9), (1, 9), (9, 1)])
def test_members_that_work_along_other_places(cat, squeeze, rows):
    members, x = nets(3, lambda: Along(cat, squeeze)), (torch.randn(*rows, 17), torch.randn(*rows, 6))
    fused = rz.fuse_ensemble(members)
    try:
        apart = torch.stack([rz.swap(m, rz.Int8())(*x) for m in members])
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error)):
            fused(*x)
        return
    for _ in range(3):
        torch.testing.assert_close(fused(*x), apart)


def unfused(members, *x):
    return torch.stack([m(*x) for m in members])


@pytest.mark.parametrize("make", [lambda: rz.RewardMLP(17, 6, (32, 300)), lambda: mlp(23, 20, 20, 1)])
@pytest.mark.parametrize("reduce", ["none", "mean_std"])
def test_nothing_rounded(make, reduce):
    members = nets(3, make)
    fused = rz.fuse_ensemble(members, rz.Fused(), reduce)
    for rows in (1, 9, 200):
        x = inputs(rows) if isinstance(members[0], rz.RewardMLP) else (torch.randn(rows, 23),)
        expected = unfused(members, *x)
        for _ in range(2):
            found = fused(*x)
            if reduce == "mean_std":
                torch.testing.assert_close(found[0], expected.mean(0), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(found[1], expected.std(0), rtol=1e-4, atol=1e-6)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert fused.launch.shortcuts[reduce].straight.calls[x[0].shape] is not None, "what is tested is the one call"
        half = [t.half() for t in x]
        with pytest.raises(RuntimeError, match="dtype"):
            fused(*half)
        asked = [t.clone().requires_grad_() for t in x]
        if reduce == "none":
            a, b = (torch.autograd.grad(f(*asked).sum(), asked) for f in (fused, lambda *t: unfused(members, *t)))
            for one, other in zip(a, b, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dense_members_learn_as_before(monkeypatch):
    members, x = [rz.RewardMLP(17, 6, (32, 32)) for _ in range(2)], inputs()
    fused = rz.fuse_ensemble(members, rz.Fused())
    packed = []
    network = importlib.import_module("rewardzip.shortcut").network
    monkeypatch.setattr("rewardzip.shortcut.network", lambda *a: packed.append(a) or network(*a))
    with torch.no_grad():
        fused(*x)
    assert len(packed) == 1
    for models, call in ((members, lambda: unfused(members, *x)), (fused.members, lambda: fused(*x))):
        optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            call().square().mean().backward()
            optimizer.step()
            with torch.no_grad():  # an agent acts between steps
                acted = call()
    assert len(packed) == 1, "numbers that change from call to call are not packed"
    for a, b in zip(members, fused.members, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), "the same steps, to the bit"
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(*x), acted)
            torch.testing.assert_close(fused(*x), unfused(members, *x))
    assert len(packed) == 2


def test_dense_members_in_16_bits_are_their_own():
    members = [mlp(23, 20, 1).bfloat16().requires_grad_(False) for _ in range(2)]
    fused, x = rz.fuse_ensemble(members, rz.Fused()), torch.randn(5, 23).bfloat16()
    for _ in range(2):
        torch.testing.assert_close(fused(x), unfused(members, x), rtol=0.05, atol=0.02)
        torch.testing.assert_close(fused.members[1](x), members[1](x), rtol=0.05, atol=0.02)


def test_members_that_are_called_in_different_ways_run_their_own_code():
    fused, x = rz.fuse_ensemble([Along(-1, -1), Along(1, 1)]), (torch.randn(4, 17), torch.randn(4, 6))
    torch.testing.assert_close(fused(*x), torch.stack([m(*x) for m in fused.members]))
    deep = torch.randn(4, 9, 17), torch.randn(4, 9, 6)
    with pytest.raises(RuntimeError):  # the second cannot join them
        fused(*deep)


@pytest.mark.parametrize("make", [lambda: rz.RewardMLP(17, 6, (32, 32)), lambda: mlp(23, 20, 20, 1)])
@pytest.mark.parametrize("config", [rz.Int8(), rz.Fused()])
def test_members_that_come_and_go(make, config):
    fused = rz.fuse_ensemble(nets(3, make), config)
    x = inputs() if isinstance(fused.members[0], rz.RewardMLP) else (torch.randn(9, 23),)
    other = rz.swap(make().requires_grad_(False), config)

    def right():
        for _ in range(2):
            torch.testing.assert_close(fused(*x), torch.stack([m(*x) for m in fused.members]), rtol=1e-4, atol=1e-5)

    right()
    fused.members[0] = other
    right()
    fused.members.append(rz.swap(make().requires_grad_(False), config))
    right()
    del fused.members[1]
    right()
    fused.members[0], fused.members[1] = fused.members[1], fused.members[0]
    right()
    if isinstance(other, rz.RewardMLP):
        fused.members[1].net = rz.swap(make().requires_grad_(False), config).net
        right()


def test_members_after_inference_mode():
    fused, x = rz.fuse_ensemble(nets(2)), inputs()
    with torch.inference_mode():
        fused(*x)
    other = rz.fuse_ensemble(nets(2))
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(*x), other(*x))


@pytest.mark.parametrize("config", [rz.Int8(), rz.Fused()])
def test_compiled_whole(config):
    fused, x = rz.fuse_ensemble(nets(2), config), inputs()
    for _ in range(2):
        expected = fused(*x)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(*x), expected)


def test_a_member_of_another_type_is_refused_as_by_torch():
    fused, x = rz.fuse_ensemble(nets(2, lambda: mlp(23, 20, 1)), rz.Fused()), torch.randn(9, 23)
    fused(x)
    fused.members[1].half()
    with pytest.raises(RuntimeError, match="dtype"):
        fused(x)


@pytest.mark.parametrize("config", [rz.Int8(), rz.Fused()])
@pytest.mark.parametrize("reduce", ["none", "mean_std"])
def test_inputs_by_name_and_whole_numbers(config, reduce):
    members = nets(3)
    fused = rz.fuse_ensemble(members, config, reduce)
    state, action = torch.randn(9, 17), torch.nn.functional.one_hot(torch.arange(9) % 6, 6)
    expected = fused(state, action.float())
    for found in (fused(state, action), fused(state, action), fused(state=state, action=action)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_restored_members_do_not_say_that_they_are_one_launch():
    fused = rz.fuse_ensemble(nets(2))
    assert "one launch for 2 members" in repr(fused)
    assert "one launch" not in repr(rz.restore(fused))
