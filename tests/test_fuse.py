"""Every forward that tracing could misread falls back to the author's code; every other is fused; all stay right."""

import contextlib
import functools
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from models import dense_twin, fused, packed, swapped, unfused
from properties import given, settings, st
from torch import Tensor, nn

import rewardzip as rz


class Base(nn.Module):
    """Two layers and a few settings; each case below adds a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.flag, self.mode, self.norm, self.count, self.gain = True, "relu", None, 0, 2.0
        self.seen: list[Tensor] = []
        self.table = {"relu": torch.relu, "helper": branching_helper}
        self.register_buffer("std", torch.tensor(2.0))
        self.shift = nn.Parameter(torch.ones(6))


def straight_helper(x: Tensor) -> Tensor:
    return torch.relu(x)


def branching_helper(x: Tensor, flag: bool = False) -> Tensor:
    return torch.relu(x) if flag else torch.tanh(x)


def doubling(forward):
    def inner(self, x):
        return 2 * forward(self, x)

    return inner


def doubling_wrapped(forward):
    @functools.wraps(forward)
    def inner(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    return inner


counter = itertools.count()


# forwards by what must become of them; the changing ones never give the same numbers twice
UNFUSED: dict[str, type[Base]] = {}
CHANGING: dict[str, type[Base]] = {}
FUSED: dict[str, type[Base]] = {}


def case(table: dict[str, type[Base]]):
    def add(kind: type[Base]) -> type[Base]:
        table[kind.__name__] = kind
        return kind

    return add


@case(UNFUSED)
class IfTraining(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        if self.training:
            h = h * 3
        return self.fc2(h)


@case(UNFUSED)
class FunctionalDropout(Base):
    def forward(self, x):
        torch.manual_seed(0)
        return self.fc2(F.dropout(torch.relu(self.fc1(x)), 0.5, self.training))


@case(UNFUSED)
class FunctionalDropoutAlone(Base):
    def forward(self, x):
        return F.dropout(torch.relu(self.fc1(x)), 0.999999, training=self.training)


@case(UNFUSED)
class TrainingByGetattr(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * (1 + getattr(self, "training"))  # noqa: B009


@case(UNFUSED)
class TrainingOfAChild(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * (1 + self.drop.training)


@case(UNFUSED)
class TrainingPassedOn(Base):
    def forward(self, x):
        return branching_helper(self.fc1(x), self.training)


@case(UNFUSED)
class BranchOnShape(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return h if x.shape[0] > 3 else -h


@case(UNFUSED)
class BranchOnDim(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        return h.sum(0) if x.dim() == 2 else h


@case(UNFUSED)
class BranchOnNone(Base):
    def forward(self, x, extra=None):
        h = torch.relu(self.fc1(x))
        if extra is not None:
            h = h + extra
        return h


@case(UNFUSED)
class NoneAsANumber(Base):
    def forward(self, x, extra=None):
        return torch.relu(self.fc1(x)) * (extra is None)


@case(UNFUSED)
class IsInstance(Base):
    def forward(self, x):
        if not isinstance(x, Tensor):
            return x
        return torch.relu(self.fc1(x))


@case(UNFUSED)
class IsInstanceAsANumber(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * isinstance(x, Tensor)


@case(UNFUSED)
class EarlyReturn(Base):
    def forward(self, x):
        if x.numel() == 0:
            return x
        return torch.relu(self.fc1(x))


@case(UNFUSED)
class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            return torch.relu(self.fc1(x))


@case(UNFUSED)
class Try(Base):
    def forward(self, x):
        try:
            return torch.relu(self.fc1(x))
        except RuntimeError:
            return x


@case(UNFUSED)
class Finally(Base):
    def forward(self, x):
        try:
            return torch.relu(self.fc1(x))
        finally:
            self.count = 1


@case(UNFUSED)
class AssignsAttribute(Base):
    def forward(self, x):
        self.last = torch.relu(self.fc1(x))
        return self.last


@case(UNFUSED)
class Counts(Base):
    def forward(self, x):
        self.count += 1
        return torch.relu(self.fc1(x)) * self.count


@case(UNFUSED)
class Appends(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        self.seen.append(h)
        return h


@case(UNFUSED)
class Stores(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        self.table["last"] = h
        return h


@case(CHANGING)
class CountsGlobally(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) + next(counter)


@case(UNFUSED)
class TensorConstant(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) + torch.ones(6)


@case(UNFUSED)
class ListConstant(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) + torch.tensor([1.0, 2, 3, 4, 5, 6])


@case(CHANGING)
class Random(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * random.random()


@case(CHANGING)
class RandomItem(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * torch.rand(1).item()


@case(UNFUSED)
class BufferItem(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) / float(self.std)


@case(UNFUSED)
class BranchOnBuffer(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        if self.std > 1:
            h = -h
        return h


@case(UNFUSED)
class VarArgs(Base):
    def forward(self, *xs):
        return torch.relu(self.fc1(xs[0]))


@case(UNFUSED)
class VarKwargs(Base):
    def forward(self, x, **kwargs):
        return torch.relu(self.fc1(x)) * len(kwargs)


@case(UNFUSED)
class KeywordOnly(Base):
    def forward(self, x, *, scale=1.0):
        return torch.relu(self.fc1(x)) * scale


@case(UNFUSED)
class Wrapped(Base):
    @doubling_wrapped
    def forward(self, x):
        return torch.relu(self.fc1(x))


@case(UNFUSED)
class NoGradDecorator(Base):
    @torch.no_grad()
    def forward(self, x):
        return torch.relu(self.fc1(x))


@case(UNFUSED)
class BranchingMethod(Base):
    def helper(self, x, flag):
        return torch.relu(x) if flag else torch.tanh(x)

    def forward(self, x):
        return self.helper(self.fc1(x), x.shape[0] > 3)


@case(UNFUSED)
class BranchingStaticMethod(Base):
    @staticmethod
    def helper(x, flag):
        return torch.relu(x) if flag else torch.tanh(x)

    def forward(self, x):
        return self.helper(self.fc1(x), self.flag)


@case(UNFUSED)
class BranchingInATable(Base):
    def forward(self, x):
        return self.table["helper"](self.fc1(x), self.flag)


@case(UNFUSED)
class BranchingClosure(Base):
    def forward(self, x):
        flag = self.flag

        def helper(h):
            return torch.relu(h) if flag else torch.tanh(h)

        return helper(self.fc1(x))


@case(UNFUSED)
class BranchingLambda(Base):
    def forward(self, x):
        return (lambda h, flag: torch.relu(h) if flag else h)(self.fc1(x), self.flag)


@case(UNFUSED)
class FilteringComprehension(Base):
    def forward(self, x):
        return sum([torch.relu(layer(x)) for layer in (self.fc1, self.fc2) if layer.in_features == 6])


@case(UNFUSED)
class And(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x)) * (self.flag and 2)


@case(UNFUSED)
class Or(Base):
    def forward(self, x, scale=None):
        return torch.relu(self.fc1(x)) * (scale or 2)


@case(UNFUSED)
class InheritedBranch(IfTraining):
    def forward(self, x):
        return torch.relu(super().forward(x))


@case(UNFUSED)
class InheritedForward(IfTraining):
    pass


@case(UNFUSED)
class CountingProperty(Base):
    @property
    def scale(self):
        self.count += 1
        return self.count

    def forward(self, x):
        return torch.relu(self.fc1(x)) * self.scale


@case(UNFUSED)
class BranchingProperty(Base):
    @property
    def scale(self):
        return 2 if self.training else 1

    def forward(self, x):
        return torch.relu(self.fc1(x)) * self.scale


@case(UNFUSED)
class Suppress(Base):
    def forward(self, x):
        with contextlib.suppress(ZeroDivisionError):
            return torch.relu(self.fc1(x))


@case(UNFUSED)
class ListDefault(Base):
    def forward(self, x, scales=(1.0, 2.0)):
        return torch.relu(self.fc1(x)) * scales[1]


@case(UNFUSED)
class While(Base):
    def forward(self, x):
        n = self.count
        while n < 2:
            x, n = torch.relu(self.fc1(x)), n + 1
        return x


@case(UNFUSED)
class Assert(Base):
    def forward(self, x):
        assert x.shape[-1] == 6
        return torch.relu(self.fc1(x))


@case(UNFUSED)
class ResidualBeforeActivation(Base):
    def forward(self, x):
        h = self.fc1(x)
        return h + torch.relu(h)


@case(UNFUSED)
class InPlaceThenBoth(Base):
    def forward(self, x):
        h = self.fc1(x)
        y = F.relu(h, inplace=True)
        return h + y


@case(UNFUSED)
class InPlaceMethod(Base):
    def forward(self, x):
        h = self.fc1(x)
        h.relu_()
        return h


@case(UNFUSED)
class UnknownActivations(Base):
    def forward(self, x):
        return F.softsign(self.fc1(x)) + F.prelu(self.fc2(x), self.shift[:1]) + F.hardtanh(self.fc1(x))


@case(UNFUSED)
class ActivationOfActivation(Base):
    def forward(self, x):
        return torch.relu(self.fc1(x) + 1)


@case(FUSED)
class BranchOnSetting(Base):
    def forward(self, x):
        h = torch.relu(self.fc1(x))
        if self.norm is not None:
            h = self.norm(h)
        if self.mode == "relu":
            return torch.relu(self.fc2(h))
        return torch.tanh(self.fc2(h))


@case(FUSED)
class Helpers(Base):
    def helper(self, x):
        return straight_helper(self.fc1(x))

    def forward(self, x):
        return self.table["relu"](self.fc2(self.helper(x)))


@case(FUSED)
class Closures(Base):
    def forward(self, x):
        h = [torch.relu(layer(x)) for layer in (self.fc1, self.fc2)]
        return (lambda a, b: a + b)(*h)


@case(FUSED)
class Decorated(Base):
    @doubling
    def forward(self, x):
        return torch.relu(self.fc1(x))


@case(FUSED)
class Residual(Base):
    def forward(self, x):
        return x + torch.relu(self.fc1(x))


@case(FUSED)
class Residual2(Base):
    def forward(self, x):
        h = F.relu(self.fc1(x), inplace=True)
        h += F.silu(self.fc2(h))
        return h


@case(FUSED)
class Super(Residual):
    def forward(self, x):
        return torch.tanh(super().forward(x))


@case(FUSED)
class Arithmetic(Base):
    def forward(self, x):
        a, b = self.act(self.fc1(x)).chunk(2, -1)
        return torch.cat([a * math.sqrt(2.0), b / self.std], -1) * self.gain + self.shift


@case(FUSED)
class NamedInput(Base):
    def forward(self, input):
        return torch.relu(self.fc1(input))


@case(FUSED)
class OptionalArguments(Base):
    def forward(self, x, scale=1.0, mask=None):
        return torch.relu(self.fc1(x)) * scale


@case(FUSED)
class EveryFunction(Base):
    def forward(self, x):
        y = [F.leaky_relu(self.fc1(x), 0.3), F.leaky_relu(self.fc1(x), negative_slope=0.3), F.leaky_relu(self.fc1(x))]
        y += [F.elu(self.fc1(x), 0.3), F.gelu(self.fc1(x)), F.gelu(self.fc1(x), approximate="tanh")]
        y += [torch.sigmoid(self.fc1(x)), self.fc1(x).tanh(), self.fc1(x).sigmoid(), F.mish(self.fc1(x))]
        return torch.cat([*y, torch.relu_(self.fc2(x)), F.elu(self.fc2(x), inplace=True), F.leaky_relu(x, 0.3)], -1)


def compare(model: Base) -> nn.Module:
    """The swapped model beside its unfused and its dense twin, training or not, with batches of several sizes."""
    fast = swapped(model)
    with torch.no_grad():
        fast.std.fill_(0.5)
        fast.shift.fill_(3.0)
    for training, rows in ((True, 2), (False, 5), (True, 5), (False, 2)):
        x = torch.randn(rows, 6)
        plain, dense = unfused(fast), dense_twin(fast)
        got, expected, dense_expected = (m.train(training)(x) for m in (fast, plain, dense))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got, dense_expected, atol=1e-5, rtol=1e-5)
        assert (got.grad_fn is None) == (expected.grad_fn is None)
    return fast


@pytest.mark.parametrize("name", UNFUSED)
def test_what_could_be_misread_is_not_fused(name):
    model = UNFUSED[name]()
    before = dict(model.__dict__)
    fast = compare(model)
    assert fused(fast) == {}
    assert set(packed(fast)) == {"fc1", "fc2"}
    assert model.__dict__ == before
    assert not [k for k in fast.__dict__ if k.startswith("_tensor_constant")]


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_by_itself_is_not_fused(name):
    fast = swapped(CHANGING[name]())
    assert fused(fast) == {}
    x = torch.randn(3, 6)
    assert not torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("name", FUSED)
def test_what_is_safe_is_fused(name):
    fast = compare(FUSED[name]())
    assert fused(fast)


def test_tracing_leaves_no_trace():
    """Not one side effect of a forward happens while it is being read."""
    model = Appends()
    fast = swapped(model)
    assert fast.seen == model.seen == []
    x = torch.randn(2, 6)
    fast(x)
    assert len(fast.seen) == 1
    counting = swapped(CountingProperty())
    assert counting.count == 0
    assert swapped(Counts()).count == 0


def test_what_is_not_fused_is_said():
    with pytest.warns(UserWarning, match="IfTraining: forward asks what its arguments are, or whether it is training"):
        rz.swap(IfTraining(), rz.Int8())
    with pytest.warns(UserWarning, match="BranchingProperty: scale asks"):
        rz.swap(BranchingProperty(), rz.Int8())
    with pytest.warns(UserWarning, match="forward has a with or a try"):
        rz.swap(NoGrad(), rz.Int8())


def test_optional_arguments_passed_and_not():
    fast = swapped(OptionalArguments())
    plain = unfused(fast)
    x = torch.randn(3, 6)
    for args, kwargs in (
        ((x,), {}),
        ((x, 3.0), {}),
        ((x,), {"scale": 3.0}),
        ((), {"x": x}),
        ((), {"mask": x, "x": x}),
        ((x, 2.0, x), {}),
    ):
        torch.testing.assert_close(fast(*args, **kwargs), plain(*args, **kwargs))
    model = swapped(BranchOnNone())
    torch.testing.assert_close(model(x, x) - model(x), x)
    assert torch.equal(swapped(NamedInput())(input=x), swapped(NamedInput())(x)) is False
    named = swapped(NamedInput())
    assert torch.equal(named(input=x), named(x))


def test_settings_changed_after_the_swap_are_heeded():
    x = torch.randn(3, 6)
    model = swapped(BranchOnSetting())
    model.mode = "tanh"
    assert fused(model) == {"fc1": "relu", "fc2": "tanh"}
    torch.testing.assert_close(model(x), unfused(model)(x))
    model.norm = nn.LayerNorm(6)
    torch.testing.assert_close(model(x), unfused(model)(x))
    model = swapped(Arithmetic())
    model.gain = 5.0
    torch.testing.assert_close(model(x), unfused(model)(x))
    model.act = nn.Tanh()
    assert fused(model) == {"fc1": "tanh"}
    model.fc1 = nn.Linear(6, 6)
    torch.testing.assert_close(model(x), unfused(model)(x))
    model.forward = lambda x: x
    assert model(x) is x


def test_forward_without_source():
    """Code that was never in a file is fused where it has no branches, and left where it has."""
    spaces = {}
    for name, body in (("plain", "torch.relu(self.fc1(x))"), ("branch", "torch.relu(self.fc1(x)) if self.flag else x")):
        space = {"torch": torch, "Base": Base}
        exec(f"class Made(Base):\n    def forward(self, x):\n        return {body}\n", space)
        spaces[name] = swapped(space["Made"]())
    assert fused(spaces["plain"]) == {"fc1": "relu"}
    assert fused(spaces["branch"]) == {}
    x = torch.randn(3, 6)
    for model in spaces.values():
        torch.testing.assert_close(model(x), unfused(model)(x))


def test_layer_read_by_hand():
    class ByHand(Base):
        def forward(self, x):
            return torch.relu(F.linear(x, self.fc1.weight, self.fc1.bias)) + torch.relu(self.fc2(x))

    compare(ByHand())


def test_methods_beside_forward_are_unchanged():
    class Encoder(Base):
        def encode(self, x):
            return self.fc1(x)

        def forward(self, x):
            return torch.relu(self.fc1(x))

    fast = swapped(Encoder())
    x = torch.randn(3, 6)
    assert fused(fast) == {"fc1": "relu"}
    assert bool((fast.encode(x) < 0).any())
    assert torch.equal(fast(x), fast.encode(x).relu())


def test_hooks_on_the_module_still_run():
    seen = []
    model = Residual()
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    fast = swapped(model)
    assert fused(fast)
    y = fast(torch.randn(2, 6))
    assert seen[0] is y


ACTIVATIONS = {
    "relu": (nn.ReLU, torch.relu),
    "tanh": (nn.Tanh, torch.tanh),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "silu": (nn.SiLU, F.silu),
    "gelu": (nn.GELU, F.gelu),
    "mish": (nn.Mish, F.mish),
    "elu:0.5": (lambda: nn.ELU(0.5), lambda x: F.elu(x, 0.5)),
    "leaky_relu:0.2": (lambda: nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2)),
    "none": (nn.Identity, lambda x: x),
}


class Drawn(nn.Module):
    """An MLP whose activations are functions, called in a loop."""

    def __init__(self, sizes, names):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(k, n) for k, n in itertools.pairwise(sizes)])
        self.functions = [ACTIVATIONS[name][1] for name in names]

    def forward(self, x):
        for layer, function in zip(self.layers, self.functions, strict=True):
            x = function(layer(x))
        return x


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    rows=st.integers(0, 9),
    functional=st.booleans(),
    drawn=st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=4, max_size=4),
    dynamic=st.booleans(),
)
def test_random_mlps(sizes, rows, functional, drawn, dynamic):
    names = drawn[: len(sizes) - 1]
    if functional:
        model = Drawn(sizes, names)
    else:
        pairs = [
            (nn.Linear(k, n), ACTIVATIONS[a][0]()) for (k, n), a in zip(itertools.pairwise(sizes), names, strict=True)
        ]
        model = nn.Sequential(*itertools.chain(*pairs))
    fast = swapped(model, rz.Int8("dynamic" if dynamic else None, scalar_outputs=True))
    assert sorted(fused(fast).values()) == sorted(name for name in names if name != "none")
    x = torch.randn(rows, sizes[0])
    expected = x
    last = {chain.linears[-1] for chain in getattr(type(fast), "rz_chains", [])}
    for layer, name in zip(packed(fast).values(), names, strict=True):
        # the last layer of a chain does not round its rows
        y = F.linear(expected, layer.weight, layer.bias) if layer in last else layer(expected)
        expected = ACTIVATIONS[name][1](y)
    # a row rounded to int8 can go to the next integer where an activation differs in its last bit
    tolerance = 0.02 if dynamic else 1e-5
    torch.testing.assert_close(fast(x), expected, atol=tolerance, rtol=tolerance)
    dense = rz.restore(fast)
    assert fused(dense) == {}
    assert dense.state_dict().keys() == model.state_dict().keys()
    again = swapped(dense, rz.Int8(scalar_outputs=True))
    for a, b in zip(packed(again).values(), packed(fast).values(), strict=True):
        assert torch.equal(a.int8_weight, b.int8_weight)
