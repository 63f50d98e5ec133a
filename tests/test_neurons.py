"""Neurons taken out of traced models: nothing else changes, and what cannot be followed is refused."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from models import mlp, same_state
from properties import given, settings, st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import rewardzip as rz
from rewardzip import constraints
from rewardzip.channels import Channels
from rewardzip.moments import damped
from rewardzip.neurons import choose, prunable, shrink


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HALF = rz.Prune("neurons", 0.5)


def widths(model):
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]


def kill(linear, neurons):
    """Make neurons constant: no weights, a bias that stays."""
    with torch.no_grad():
        linear.weight[neurons] = 0.0
        linear.bias[neurons] = torch.randn(len(neurons))


class Functional(nn.Module):
    """A forward of its own: inputs joined, functions for activations, a layer of a Sequential inside."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 2)
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.1))

    def forward(self, state, action):
        h = torch.relu(self.fc1(torch.cat([state, action], dim=-1)))
        h = F.leaky_relu(self.fc2(h), 0.2)
        h = 0.5 * self.inner(h).tanh() + 1.0
        return self.head(h)


class Joined(nn.Module):
    """Hidden features beside raw inputs; one encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 10), nn.Tanh())
        self.fc, self.head = nn.Linear(10 + 2 + 10, 8), nn.Linear(8, 1)

    def forward(self, state, action, after):
        h = torch.cat((self.encode(state), action, self.encode(after)), 1)
        return self.head(F.silu(self.fc(h))).squeeze(-1)


class Twins(nn.Module):
    """Two critics on the same trunk, and outputs that nothing reads but the caller."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 12), mlp(12, 8, outputs=1), mlp(12, 10, outputs=1)

    def forward(self, x):
        h = F.elu(self.trunk(x))
        return torch.minimum(self.a(h), self.b(h))


class InPlace(nn.Module):
    """The second reader of h gets what the activation wrote there."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(16, 1)

    def forward(self, x):
        h = self.fc(x)
        return self.head(torch.cat([self.act(h), h], -1))


CASES = {
    "in place": (InPlace, (4,)),
    "RewardMLP": (lambda: rz.RewardMLP(4, 2, (16, 12)), (4, 2)),
    "MLP": (lambda: rz.MLP((4, 2, 3), (16, 12)), (4, 2, 3)),
    "functional": (Functional, (4, 2)),
    "joined": (Joined, (4, 2, 4)),
    "twins": (Twins, (4,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False)), (4,)),
}


def prepared(case):
    make, sizes = CASES[case]
    model = make().eval()
    return model, tuple(torch.randn(300, k) for k in sizes)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_constant_neurons_go_without_a_trace(case, data):
    model, x = prepared(case)
    layers = prunable(Channels.of(model))
    for name in layers:
        linear = model.get_submodule(name)
        kill(linear, torch.randperm(linear.out_features)[: linear.out_features // 2])
    before, state = model(*x), copy.deepcopy(model.state_dict())
    small = rz.prune(model, HALF, x if data else None)
    assert [small.get_submodule(n).out_features for n in layers] == [
        -(-model.get_submodule(n).out_features // 2) for n in layers
    ]
    assert torch.allclose(small(*x), before, rtol=1e-5, atol=1e-5)
    assert same_state(state, model.state_dict())
    assert torch.equal(model(*x), before)


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus, nn.LeakyReLU, nn.Hardswish]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dead_neurons_of_any_mlp(draw):
    """Constant neurons, and neurons that nobody reads: what is left computes the same."""
    torch.manual_seed(draw.draw(st.integers(0, 2**16)))
    sizes = [draw.draw(st.integers(1, 9))] + [
        4 * draw.draw(st.integers(1, 5)) for _ in range(draw.draw(st.integers(1, 4)))
    ]
    layers = []
    for k, n in pairwise(sizes):
        layers += [nn.Linear(k, n), draw.draw(st.sampled_from(ACTIVATIONS))()]
        if draw.draw(st.booleans()):
            layers.append(draw.draw(st.sampled_from([nn.Dropout(0.5), nn.Identity(), nn.LayerNorm(n)])))
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], draw.draw(st.integers(1, 3)))).eval()
    linears = [i for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    for here, reader in pairwise(linears):
        between = model[here + 1 : reader]
        dead = torch.randperm(model[here].out_features)[: model[here].out_features // 4]
        if any(isinstance(m, nn.LayerNorm) for m in between):
            continue
        if draw.draw(st.booleans()):
            kill(model[here], dead)
        else:
            with torch.no_grad():
                model[reader].weight[:, dead] = 0.0
    normed = [str(i) for i in linears[:-1] if isinstance(model[i + 2], nn.LayerNorm)]
    if len(normed) == len(linears) - 1:
        return
    x = torch.randn(50, sizes[0])
    small = rz.prune(model, rz.Prune("neurons", 0.25, skip=tuple(normed)))
    assert [small[i].out_features for i in linears[:-1] if str(i) not in normed] == [
        model[i].out_features * 3 // 4 for i in linears[:-1] if str(i) not in normed
    ]
    wanted = model.double()(x.double())
    scale = 1 + wanted.abs().amax()
    assert (small.double()(x.double()) - wanted).abs().amax() <= 2e-6 * len(linears) * scale


def test_norms_shrink_with_their_layer():
    model = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Mish(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(16))
        model[1].bias.copy_(torch.randn(16))
    x = torch.randn(500, 5)
    for step, data in ((HALF, None), (rz.Prune("neurons", 0.5, importance="second-order"), x)):
        small = rz.prune(model, step, data)
        assert small[1].normalized_shape == (8,)
        assert small[1].weight.shape == small[1].bias.shape == (8,)
        assert torch.isin(small[1].weight, model[1].weight).all()
        assert small(x).shape == (500, 1)
    assert (small(x) - model(x)).mean().abs() < 0.3 * model(x).std()
    # by hand, which neurons: what stays is the same neurons of layer, norm and reader
    channels = Channels.of(twin := copy.deepcopy(model))
    kept = torch.arange(16) % 2 == 0
    shrink(channels, {"0": kept})
    assert torch.equal(twin[0].weight, model[0].weight[kept])
    assert torch.equal(twin[0].bias, model[0].bias[kept])
    assert torch.equal(twin[1].bias, model[1].bias[kept])
    assert torch.equal(twin[3].weight, model[3].weight[:, kept])


def test_norms_without_a_bias_or_weights_shrink():
    for norm in (nn.RMSNorm(16), nn.LayerNorm(16, bias=False), nn.LayerNorm(16, elementwise_affine=False)):
        small = rz.prune(nn.Sequential(nn.Linear(5, 16), norm, nn.Tanh(), nn.Linear(16, 2)), HALF)
        assert small[1].normalized_shape == (8,)
        assert small(torch.randn(3, 5)).shape == (3, 2)


@pytest.mark.parametrize("traced", [False, True])
def test_batch_norms_and_common_slopes_are_followed(traced):
    model, x = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, 2)), torch.randn(50, 6)
    model(x)  # statistics of its own for each neuron
    model.eval()
    keep = torch.arange(16) % 3 > 0
    with torch.no_grad():
        model[3].weight[:, ~keep] = 0
    twin, expected = copy.deepcopy(model), model(x)
    twin = torch.fx.symbolic_trace(twin) if traced else twin
    shrink(Channels.of(twin), {"0": keep})
    norm = twin.get_submodule("1")
    assert norm.num_features == len(norm.running_mean) == len(norm.running_var) == len(norm.weight) == 10
    assert torch.allclose(twin(x), expected, atol=1e-6)


def test_neurons_in_a_concatenation_keep_their_columns():
    model, x = prepared("joined")
    kept = torch.rand(10) > 0.5
    twin = copy.deepcopy(model)
    shrink(Channels.of(twin), {"encode.0": kept})
    columns = torch.cat([kept, torch.ones(2, dtype=torch.bool), kept])
    assert torch.equal(twin.fc.weight, model.fc.weight[:, columns])
    assert torch.equal(twin.fc.weight[:, int(kept.sum()) : int(kept.sum()) + 2], model.fc.weight[:, 10:12])
    assert twin(*x).shape == (300,)


def test_the_mean_moves_into_the_next_bias():
    model, x = mlp(6, 32, activation=nn.Sigmoid, outputs=2), torch.randn(1000, 6)
    with torch.no_grad():
        model[2].weight.abs_()
    plain, balanced = rz.prune(model, HALF), rz.prune(model, HALF, x)
    assert torch.equal(plain[0].weight, balanced[0].weight)
    assert torch.equal(plain[2].weight, balanced[2].weight)
    assert torch.allclose(balanced(x).mean(0), model(x).mean(0), atol=1e-5)
    assert (plain(x).mean(0) - model(x).mean(0)).abs().max() > 0.1


def test_second_order_fits_the_reader_anew():
    model, x = mlp(6, 32, outputs=2), torch.randn(1000, 6)
    small = rz.prune(model, rz.Prune("neurons", 0.5, importance="second-order"), x)
    h = torch.relu(small[0](x)).double()
    wanted = model(x).double().detach()
    design = h - h.mean(0)
    own = design.T @ design / 1000
    share = (damped(own) - own)[0, 0]
    kept = [int((model[0].weight == row).all(1).nonzero()) for row in small[0].weight]
    aim = design.T @ (wanted - wanted.mean(0)) / 1000 + share * model[2].weight[:, kept].T.double().detach()
    exact = torch.linalg.solve(damped(own), aim).T
    assert torch.allclose(small[2].weight.double(), exact, rtol=1e-3, atol=1e-4)
    others = [rz.prune(model, rz.Prune("neurons", 0.5, importance=i), x) for i in ("magnitude", "activation", "random")]
    lost = [float((m(x) - model(x)).detach().square().mean()) for m in (small, *others)]
    assert lost[0] < 0.5 * min(lost[1:])


def test_of_two_equal_neurons_one_goes_for_nothing():
    model, x = mlp(6, 16, activation=nn.Tanh, outputs=2), torch.randn(400, 6)
    with torch.no_grad():
        model[0].weight[8:] = model[0].weight[:8]
        model[0].bias[8:] = model[0].bias[:8]
    small = rz.prune(model, rz.Prune("neurons", 0.5, importance="second-order"), x)
    assert (small(x) - model(x)).std() < 0.05 * model(x).std()
    by_size = rz.prune(model, HALF, x)
    assert (small(x) - model(x)).std() < 0.2 * (by_size(x) - model(x)).std()


def test_neurons_that_only_an_unfelt_layer_reads_go_first():
    model, x = mlp(16, 16, 2, activation=nn.Tanh, outputs=1), torch.randn(600, 16)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16))
        model[2].weight.copy_(torch.tensor([[1.0] * 8 + [0.0] * 8, [0.0] * 8 + [2.0] * 8]) / 4)
        model[4].weight.copy_(torch.tensor([[1.0, 1e-3]]))
    small = rz.prune(model, rz.Prune("neurons", 0.5, importance="second-order", skip="2"), x)
    assert torch.equal(small[0].weight, model[0].weight[:8])


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_over_the_whole_model_layers_of_another_scale_compare(importance):
    model, x = mlp(6, 32, 32), torch.randn(100, 6)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
        model[4].weight.mul_(1e-3)
    small = rz.prune(model, rz.Prune("neurons", 0.5, importance=importance, scope="model"), x)
    assert min(widths(small)[:2]) >= 8


def test_over_the_whole_model_each_layer_keeps_one():
    model = mlp(6, 16, 16)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
        model[2].weight.mul_(1e-6)
    small = rz.prune(model, rz.Prune("neurons", 0.95, scope="model"))
    assert sum(widths(small)[:2]) == 32 - round(0.95 * 32)
    assert min(widths(small)[:2]) >= 1
    kept = choose({"a": torch.zeros(4), "b": torch.ones(4)}, 7)
    assert [int(k.sum()) for k in kept.values()] == [1, 1], "never the last of a layer"
    kept = choose({"a": torch.tensor([0.1, 5.0, 0.2]), "b": torch.tensor([1.0, 2.0, 3.0])}, 3)
    assert [k.tolist() for k in kept.values()] == [[False, True, False], [False, True, True]]


def test_neurons_that_an_mlp_reads_stay():
    """It flattens its inputs: which neuron lands where depends on their shape."""
    encoder, reader = nn.Linear(4, 6), rz.MLP((6,), (8,))
    found = Channels.of(nn.Sequential(encoder, reader))
    assert "MLP" in found.fixed["0"]
    assert "1.net.0" not in found.fixed


def test_amounts_of_rounds_are_of_the_first_width():
    small = rz.prune(mlp(6, 40, 20), rz.Prune("neurons", 0.7, rounds=3))
    assert widths(small)[:2] == [12, 6]
    assert widths(rz.prune(mlp(6, 2, 3), rz.Prune("neurons", 0.9, rounds=3)))[:2] == [1, 1]
    both = rz.prune(mlp(6, 40, 20), rz.Prune("neurons", 0.7, rounds=3, scope="model"))
    assert sum(widths(both)[:2]) == 18


@pytest.mark.parametrize("kind", ["RewardMLP", "MLP"])
def test_a_smaller_reward_model_is_saved_swapped_and_trained(tmp_path, kind):
    model, x = prepared(kind)
    small = rz.prune(model, rz.Prune("neurons", 0.5, rounds=2, finetune_steps=5), x, progress=False)
    assert small.hidden == (8, 6)
    assert model.hidden == (16, 12)
    for version in (small, rz.swap(small, rz.Int8(activations="dynamic"))):
        rz.save(version, tmp_path / "saved")
        loaded = rz.load(tmp_path / "saved")
        assert torch.allclose(loaded(*x), version(*x), atol=1e-6)
    assert loaded.hidden == (8, 6)
    rz.fit(small, (*x, torch.randn(300)), steps=3, progress=False)


def test_masks_shrink_with_the_layer():
    model = rz.prune(mlp(6, 16, 16), rz.Prune("unstructured", 0.5))
    torch_prune.l1_unstructured(model[4], "bias", 1)
    small = rz.prune(model, HALF)
    for name, rows, columns in (("0", 8, 6), ("2", 8, 8)):
        mask = constraints.masks(small.get_submodule(name))["weight"]
        assert mask.shape == (rows, columns)
        assert (small.get_submodule(name).weight[~mask] == 0).all()
    assert constraints.masks(small[4])["bias"].shape == (3,)
    optim = torch.optim.AdamW(small.parameters(), 0.1)
    gone = small[2].weight == 0
    assert gone.any()
    for _ in range(3):
        optim.zero_grad()
        small(torch.randn(20, 6)).square().mean().backward()
        optim.step()
    assert (small[2].weight[gone] == 0).all()


# what is refused


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.fc2(F.layer_norm(self.fc1(x), (8,)))


class Bent(nn.Module):
    """fc1 into fc2 into head, and something in between."""

    def __init__(self, between, width=8):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 8), nn.Linear(width, 8), nn.Linear(8, 1)
        self.between = between

    def forward(self, x):
        return self.head(torch.relu(self.fc2(self.between(self.fc1(x)))))


class Residual(Bent):
    def __init__(self):
        super().__init__(nn.ReLU())

    def forward(self, x):
        h = self.between(self.fc1(x))
        return self.head(h + self.fc2(h))


class Returned(Residual):
    def forward(self, x):
        h = self.between(self.fc1(x))
        return self.head(self.fc2(h)), h


class Twice(Residual):
    def forward(self, x):
        return self.head(self.fc2(self.between(self.fc2(self.between(self.fc1(x))))))


class Raw(Residual):
    def forward(self, x):
        return self.head(self.fc2(self.fc1(x))) + self.fc2.weight.sum()


class Sliced(Residual):
    def forward(self, x):
        return self.head(self.fc2(self.fc1(x)[..., [1, 0, 2, 3, 4, 5, 6, 7]]))


class Branching(Residual):
    def forward(self, x):
        h = self.fc1(x)
        return self.head(self.fc2(h if x.sum() > 0 else -h))


class Unclear(Residual):
    """Two runs of raw inputs of unknown width around the neurons."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(12, 8)

    def forward(self, x, y):
        return self.head(self.fc2(torch.cat([x, self.fc1(x), y], -1)))


class Aside(Residual):
    """A layer that the forward never runs."""

    def forward(self, x):
        return self.head(self.fc1(x))


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked():
    model = Bent(nn.ReLU())
    model.fc2.register_forward_hook(lambda *args: None)
    return model


def tied():
    model = Bent(nn.ReLU())
    model.fc2.weight = nn.Parameter(torch.randn(8, 8))
    model.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    model.head[0].weight = model.fc2.weight
    return model


def constrained():
    model = Bent(nn.ReLU())
    parametrizations.weight_norm(model.fc2)
    return model


REFUSED = {
    "residual": (Residual, "'fc1' must stay: it is combined with another tensor, as in a residual connection"),
    "returned": (Returned, "'fc1' must stay: it is returned among other things"),
    "one layer in two places": (Twice, "'fc2' runs several times, on the outputs of different layers"),
    "parameters read": (Raw, "reads the parameters of 'fc2' itself|reads its parameters itself"),
    "reordered": (Sliced, "'fc1' must stay: it goes into 'getitem'"),
    "softmax": (lambda: Bent(nn.Softmax(-1)), "'fc1' must stay: it goes into 'softmax'"),
    "reshaped": (lambda: Bent(nn.Unflatten(-1, (2, 4)), 4), "'fc1' must stay: it goes into 'unflatten'"),
    "a module not understood": (lambda: Bent(nn.PReLU(8)), "'fc1' must stay: it goes into 'prelu'"),
    "a module of torch's": (lambda: Bent(nn.InstanceNorm1d(8)), "what a InstanceNorm1d does with neurons is not known"),
    "a norm in the code": (FunctionalNorm, "it goes into F.layer_norm, whose size is in the code"),
    "untraceable": (Branching, "cannot be followed: forward branches on its arguments"),
    "unclear widths": (Unclear, "'fc2' takes 12 inputs, which parts of which is not clear"),
    "never run": (Aside, "'fc2' must stay: the forward does not run it"),
    "a subclass": (lambda: Bent(Own(8, 8)), "'between' has a forward of its own"),
    "hooks": (hooked, "'fc2', which reads it, has hooks"),
    "shared weights": (tied, "'fc2' and 'head.0' share a parameter"),
    "other constraints": (constrained, "constraints other than masks"),
    "one layer": (lambda: nn.Linear(4, 4), "no layer whose neurons another layer reads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason_and_untouched(case):
    make, match = REFUSED[case]
    model = make()
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=match):
        rz.prune(model, HALF)
    assert same_state(state, model.state_dict())
    assert kinds == [type(m) for m in model.modules()]


def test_skipped_the_others_go():
    model, x = Residual(), torch.randn(20, 4)
    with pytest.raises(ValueError, match="skip it to prune the others"):
        rz.prune(model, HALF)
    model = nn.Sequential(mlp(4, 8, outputs=4), nn.ReLU(), Residual())
    small = rz.prune(model, rz.Prune("neurons", 0.5, skip="2.*"))
    assert widths(small) == [4, 2, 8, 8, 1]
    assert small(x).shape == (20, 1)
    assert same_state(small[2].fc2.state_dict(), model[2].fc2.state_dict())


def test_a_head_of_many_outputs_is_left_whatever_follows():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(4, 8, outputs=5)

        def forward(self, x):
            q = self.net(x)
            return q.argmax(-1)

    assert widths(rz.prune(Greedy(), HALF)) == [4, 5]


def test_too_few_rows_for_the_readers():
    model = mlp(4, 20, 12)
    with pytest.raises(ValueError, match="'2' needs 20 rows of data or more, there are 19"):
        rz.prune(model, rz.Prune("neurons", 0.5, importance="second-order"), torch.randn(19, 4))
