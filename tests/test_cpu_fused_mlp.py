"""fused_mlp on a CPU: int8 mode to the bit, float modes within the bound, every instruction set at hand."""

import gc
import itertools

import pytest
import torch
from mlp_numerics import LIPSCHITZ, _layer_norm, assert_mlp, random_mlp
from numerics import UNIT, C, activation_error, assert_within
from properties import given, settings, st

from rewardzip_kernels import activations, fused_mlp
from rewardzip_kernels.cpu import fused_mlp as module
from rewardzip_kernels.cpu.instruction_sets import available, choose
from rewardzip_kernels.cpu.tile import Float, Int8, PairsBFloat16
from rewardzip_kernels.fused_mlp import fused_mlp_reference
from rewardzip_kernels.int8_dynamic_linear import int8_matmul_reference
from rewardzip_kernels.mlp_layout import Linear, pack, parse_layers, unpack
from rewardzip_kernels.quantize import quantize_rows_reference

INT8 = torch.int8
SHAPES = [
    (5, "24: 64 relu, 64 relu, 1", "the usual size"),
    (3, "1: 1 relu, 1", "the smallest"),
    (49, "17+6: 65 relu, 33 relu, 3", "a row over a block, two inputs, tails in all"),
    (7, "5+1+70+16: 32 relu, 256 relu, 4", "four inputs, a widening layer"),
    (50, "393: 256 relu, 256 relu, 1", "the widest, many inputs"),
    (9, "40: 100 relu, 40 relu, 129 relu, 7 relu, 20 relu, 130", "six layers, many outputs"),
]
# four kernels hold all activations, so that a kernel is not compiled for each
GROUPS = [
    ("none", "relu", "leaky_relu:0.3", "elu:0.5"),
    ("tanh", "sigmoid", "silu"),
    ("gelu", "gelu_tanh"),
    ("mish", "softplus"),
]


@pytest.fixture(params=available())
def isa(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cpu(xs, weights, params, layers, members=None, reduce="none", compute=INT8, isa=None):
    return module.fused_mlp(xs, weights, params, layers, members, reduce, compute, None, isa)


def inputs_of(m, layers):
    return [torch.randn(m, k) for k in parse_layers(layers)[0]]


def bare(layers, isa=None):
    """(weights, params, layers) of a random network whose last layer gives out the last hidden one as it is."""
    member = unpack(*random_mlp(layers, INT8, 1, "cpu"), layers)[0]
    width = member[-1].weight.shape[1]
    member[-1] = Linear(torch.eye(width), torch.zeros(width))
    layers = f"{layers.rpartition(',')[0]}, {width}"
    return *pack([member], layers), layers


def test_every_activation_has_a_group():
    assert {name.partition(":")[0] for group in GROUPS for name in group} == set(activations.ACTIVATIONS)


@pytest.mark.parametrize(("m", "layers", "why"), SHAPES, ids=[s[-1] for s in SHAPES])
def test_int8_is_its_reference_to_the_bit(m, layers, why, isa, poisoned):
    net, xs = bare(layers), inputs_of(m, layers)
    assert torch.equal(cpu(xs, *net, isa=isa), fused_mlp_reference(xs, *net, None, "none", INT8))


@pytest.mark.parametrize(("m", "layers", "why"), SHAPES, ids=[s[-1] for s in SHAPES])
def test_float_rows(m, layers, why, isa, poisoned):
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = inputs_of(m, layers)
    y = cpu(xs, weights, params, layers, compute=torch.float32, isa=isa)
    assert_mlp(y, xs, weights, params, layers, None, "none", torch.float32)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, compute, poisoned):
    layers = "17+6: 40 relu, 70 relu, 2"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = [x.to(dtype) for x in inputs_of(21, layers)]
    y = cpu(xs, weights, params, layers, compute=compute)
    assert y.dtype == dtype
    used = compute or (torch.float16 if dtype == torch.float32 else dtype)
    assert_mlp(y, xs, weights, params, layers, None, "none", used)


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_the_bit(compute, isa):
    bits = torch.arange(-(2**31), 2**31, 104729, dtype=torch.int64).to(torch.int32).view(torch.float32)
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(compute).float().view(torch.int32)
    half = 0x1000 if compute == torch.float16 else 0x8000
    ties = (every[:, None] + torch.tensor([half - 1, half, half + 1], dtype=torch.int32)).view(torch.float32)
    tiny = torch.arange(-200, 200) * 2.0**-26
    x = torch.cat([bits, ties.flatten(), tiny, torch.tensor([65504.0, 65519.9, 65520.0, float("inf"), float("nan")])])
    layers = "1: 1 relu, 1"
    net = pack(
        [
            [
                Linear(torch.ones(1, 1, dtype=INT8), torch.zeros(1), torch.ones(1)),
                Linear(torch.ones(1, 1), torch.zeros(1)),
            ]
        ],
        layers,
    )
    y = cpu([x[:, None]], *net, layers, compute=compute, isa=isa)[:, 0]
    expected = x.to(compute).float().relu()
    if compute == torch.bfloat16 and PairsBFloat16.multiplies(choose(isa)):
        expected[expected.abs() < torch.finfo(compute).tiny] = 0  # the instruction takes these for 0
    # the last layer multiplies an inf by the zeros beside its weight
    keep = ~(expected.isinf() | expected.isnan())
    assert torch.equal(y[keep], expected[keep])
    assert not y[~keep].isfinite().any()


@settings(max_examples=70, deadline=None)
@given(data=st.data(), widest=st.integers(1, 70))
def test_any_network(data, widest):
    """Depth 1 to 6; every example has a layer of its own width of 1 to 70."""
    torch.manual_seed(widest)
    widths = data.draw(st.lists(st.integers(1, 70), max_size=4))
    widths.insert(data.draw(st.integers(0, len(widths))), widest)
    pieces = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=8))
    layers = f"{'+'.join(map(str, pieces))}: {''.join(f'{width} relu, ' for width in widths)}2"
    m = data.draw(st.sampled_from([0, 1, 2, 5, 13, 48, 49]))
    xs, net = inputs_of(m, layers), bare(layers)
    assert torch.equal(cpu(xs, *net), fused_mlp_reference(xs, *net, None, "none", INT8))
    shallow = f"{'+'.join(map(str, pieces))}: {widest}"
    for net in (layers, shallow):
        weights, params = random_mlp(net, INT8, 1, "cpu")
        y = cpu(xs, weights, params, net, compute=torch.float32)
        assert_mlp(y, xs, weights, params, net, None, "none", torch.float32)


@pytest.mark.parametrize("group", GROUPS, ids="-".join)
def test_activations(group, monkeypatch, poisoned):
    """Each against its formula in float64; mixed, bit for bit what its layers give one by one."""
    names = tuple(sorted({n.partition(":")[0] for n in group}, key=lambda n: (n != "none", n)))
    monkeypatch.setattr(module, "hidden_activations", lambda net: names)
    x = h = torch.randn(50, 20)
    member, k = [], 20
    for activation, n in zip(group, (33, 70, 64, 20), strict=False):
        layers = f"{k}: {n} {activation}, {n}"
        net = bare(f"{k}: {n} {activation}, 1")
        hidden = unpack(*net)[0][0]
        q, row_scale = torch.empty(h.shape, dtype=INT8), torch.empty(50)
        quantize_rows_reference(h, None, q, row_scale)
        z = (
            int8_matmul_reference(q, hidden.weight).double() * (row_scale.double()[:, None] * hidden.scale)
            + hidden.bias
        )
        size = (z - hidden.bias).abs() + hidden.bias.abs()
        name = activation.partition(":")[0]
        bound = LIPSCHITZ.get(name, 1.0) * 3 * UNIT[torch.float32] * size + activation_error(z, activation)
        h = cpu([h], *net)
        assert_within(h, activations.apply(z, activation), C * bound + 1e-40)
        member.append(hidden)
        k = n
    member.append(Linear(torch.eye(k), torch.zeros(k)))
    layers = f"20: {''.join(f'{t.weight.shape[0]} {a}, ' for t, a in zip(member, group, strict=False))}{k}"
    weights, params = pack([member], layers)
    assert torch.equal(cpu([x], weights, params, layers), h)


def test_last_activation_and_float_rows(poisoned):
    layers = "20: 33 gelu, 40 gelu_tanh, 5 tanh"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = inputs_of(50, layers)
    y = cpu(xs, weights, params, layers, compute=torch.float32)
    assert_mlp(y, xs, weights, params, layers, None, "none", torch.float32)


@pytest.mark.parametrize("compute", [INT8, torch.float32], ids=str)
@pytest.mark.parametrize("layers", ["23+5: 70 relu, 33 relu, 3", "23+5: 4"])
def test_rows_stand_alone(compute, layers, monkeypatch, poisoned):
    """A row's result is the same to the bit beside any rows, however many, on any number of threads."""
    monkeypatch.setattr(Int8, "parallel_work", 1)
    monkeypatch.setattr(Float, "parallel_work", 1)
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = inputs_of(1000, layers)
    together = cpu(xs, weights, params, layers, compute=compute)
    assert together.isfinite().all()
    for threads, m in itertools.product((1, 2, 3), (0, 1, 5, 47, 48, 49, 1000)):
        torch.set_num_threads(threads)
        assert torch.equal(cpu([x[:m] for x in xs], weights, params, layers, compute=compute), together[:m])
        last = cpu([x[1000 - m :] for x in xs], weights, params, layers, compute=compute)
        assert torch.equal(last, together[1000 - m :])


@pytest.mark.parametrize("compute", [INT8, torch.float32], ids=str)
def test_inputs_side_by_side_and_strided(compute):
    layers, joined = "17+6+1: 40 relu, 3", "24: 40 relu, 3"
    member = unpack(*random_mlp(layers, INT8, 1, "cpu"), layers)
    (w, p), (wj, pj) = pack(member, layers), pack(member, joined)
    base = torch.randn(4, 9, 60)
    for a, b, c in (
        (base[..., :17], base[..., 20:26], base[..., 59:]),
        (base[..., :34:2], base[..., ::10], base[..., 3:4]),
        (base.transpose(0, 1)[..., 5:22], base.transpose(0, 1)[..., :6], base.transpose(0, 1)[..., :1]),
        (base[2, 3, :17], base[0, 0, :6], base[1, 1, :1]),
        (base[:1, :1, :17].expand(4, 9, 17), base[..., :6], base[..., :1].contiguous()),
        (base[:0, ..., :17], base[:0, ..., :6], base[:0, ..., :1]),
    ):
        y = cpu([a, b, c], w, p, layers, compute=compute)
        one = torch.cat([a, b, c], -1)
        assert y.shape == (*a.shape[:-1], 3)
        assert torch.equal(y, cpu([one], wj, pj, joined, compute=compute))
        wide = torch.cat([one, one], -1)[..., :24]
        assert torch.equal(y, cpu([wide], wj, pj, joined, compute=compute))


@pytest.mark.parametrize("compute", [INT8, torch.float32], ids=str)
def test_inf_and_nan_stay_in_their_rows(compute):
    layers = "17+6: 66 relu, 33 relu, 2"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = inputs_of(60, layers)
    good = cpu(xs, weights, params, layers, compute=compute)
    xs[0][2, 5], xs[1][50, 5], xs[0][59, 0] = float("inf"), float("nan"), float("-inf")
    y = cpu(xs, weights, params, layers, compute=compute)
    clean = torch.ones(60, dtype=torch.bool)
    clean[[2, 50, 59]] = False
    assert torch.equal(y[clean], good[clean])
    expected = fused_mlp_reference(xs, weights, params, layers, None, "none", compute)
    assert torch.equal(y.isnan(), expected.isnan())
    if compute == INT8:
        assert y[~clean].isnan().all()


def test_an_overflow_on_the_way_is_nan():
    layers = "4: 8 relu, 8 relu, 1"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    x = torch.randn(3, 4)
    x[1] = 3e38
    y = cpu([x], weights, params.mul_(1e10), layers)
    expected = fused_mlp_reference([x], weights, params, layers, None, "none", INT8)
    assert expected[1].isnan().all()
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("inference", [False, True])
def test_changes_in_place_are_noticed(inference):
    with torch.inference_mode(inference):
        net = bare("17+6: 20 relu, 30 relu, 1")
        xs = inputs_of(5, net[-1])
        cpu(xs, *net)
        weights, params, layers = net
        changes = [
            lambda: weights.neg_(),
            lambda: weights[3:9].zero_(),
            lambda: params.mul_(0.5),
            lambda: params[-20:].add_(1),
        ]
        if not inference:
            changes += [
                lambda: setattr(weights, "data", weights.flip(0)),
                lambda: setattr(params, "data", params * 2),
            ]
        for change in changes:
            change()
            assert torch.equal(cpu(xs, *net), cpu(xs, weights.clone(), params.clone(), layers))


def test_plans_go_with_their_weights():
    gc.collect()
    before = len(module._plans)
    for _ in range(5):
        net = bare("4: 8 relu, 1")
        cpu(inputs_of(2, net[-1]), *net)
    assert len(module._plans) == before + 1
    del net
    assert len(module._plans) == before


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("reduce", ["none", "mean_std"])
@pytest.mark.parametrize("layers", ["7+3: 20 relu, 33 relu, 2", "7+3: 5"])
def test_ensembles(members, reduce, layers, monkeypatch, poisoned):
    monkeypatch.setattr(Float, "parallel_work", 1)
    weights, params = random_mlp(layers, INT8, members, "cpu")
    xs = inputs_of(100, layers)
    y = cpu(xs, weights, params, layers, members, reduce, torch.float32)
    torch.set_num_threads(2)
    again = cpu(xs, weights, params, layers, members, reduce, torch.float32)
    assert torch.equal(again.nan_to_num(), y.nan_to_num())
    if members == 1 and reduce == "mean_std":
        assert y[1].isnan().all()
        assert torch.equal(y[0], cpu(xs, weights, params, layers, 1, "none", torch.float32)[0])
    else:
        assert_mlp(y, xs, weights, params, layers, members, reduce, torch.float32)


def test_ensembles_in_int8():
    layers = "7+3: 20 relu, 33 relu, 2"
    weights, params = random_mlp(layers, INT8, 3, "cpu")
    xs, size = inputs_of(60, layers), (weights.numel() // 3, params.numel() // 3)
    ys = cpu(xs, weights, params, layers, 3)
    for y, w, p in zip(ys, weights.split(size[0]), params.split(size[1]), strict=True):
        assert torch.equal(y, cpu(xs, w.clone(), p.clone(), layers))
    both = cpu(xs, weights, params, layers, 3, "mean_std")
    torch.testing.assert_close(both, torch.stack([ys.mean(0), ys.std(0)]))


@pytest.mark.parametrize("width", [1, 20, 64, 200])
def test_layer_norm(width, poisoned):
    layers = f"23: {width} layer_norm mish, {width} layer_norm:0.01, 3"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = inputs_of(50, layers)
    y = cpu(xs, weights, params, layers, compute=torch.float32)
    assert_mlp(y, xs, weights, params, layers, None, "none", torch.float32)


@pytest.mark.parametrize("width", [1, 20, 64, 200])
def test_layer_norm_in_int8(width, poisoned):
    net = bare(f"23: {width} layer_norm, 1")
    hidden, x = unpack(*net)[0][0], torch.randn(50, 23)
    q, row_scale = torch.empty(x.shape, dtype=INT8), torch.empty(50)
    quantize_rows_reference(x, None, q, row_scale)
    z = int8_matmul_reference(q, hidden.weight).double() * (row_scale.double()[:, None] * hidden.scale) + hidden.bias
    error = C * 3 * UNIT[torch.float32] * ((z - hidden.bias).abs() + hidden.bias.abs())
    assert_within(cpu([x], *net), *_layer_norm(z, error, hidden, 1e-5))


def test_integer_inputs():
    layers = "4+3: 20 relu, 2"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    xs = [torch.randint(0, 255, (5, 4), dtype=torch.uint8), torch.randn(5, 3)]
    args = weights, params, layers, None, "none", INT8, torch.tensor([[0.1, 128.0], [1.0, 0.0]])
    torch.testing.assert_close(module.fused_mlp(xs, *args), fused_mlp_reference(xs, *args))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "layers"),
    [
        (1, "24: 64 relu, 64 relu, 1"),
        (53, "17+6: 3 layer_norm silu, 130 silu, 9"),
        (100, "5: 4"),
    ],
    ids=["one row", "several inputs, LayerNorm, odd widths", "a single layer"],
)
def test_sixteen_bit_weights(m, layers, compute, stored, poisoned):
    weights, params = random_mlp(layers, stored, 1, "cpu")
    xs = inputs_of(m, layers)
    y = cpu(xs, weights, params, layers, compute=compute)
    assert_mlp(y, xs, weights, params, layers, None, "none", compute or stored)
    assert torch.equal(cpu([x[:1] for x in xs], weights, params, layers, compute=compute), y[:1]), "batch invariance"
    weights.mul_(2)
    y = cpu(xs, weights, params, layers, compute=compute)
    assert_mlp(y, xs, weights, params, layers, None, "none", compute or stored)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("outputs", [12, 13])
def test_a_last_layer_written_to_is_seen(outputs, inference):
    """Twelve are read where they lie, thirteen are packed."""
    layers = f"23: 70 relu, {outputs}"
    with torch.inference_mode(inference):
        weights, params = random_mlp(layers, INT8, 1, "cpu")
        xs = inputs_of(9, layers)
        before = cpu(xs, weights, params, layers)
        params[-(outputs * 80 + 16) :].mul_(2)
        assert torch.equal(cpu(xs, weights, params, layers), 2 * before)
        params.data = params.neg()
        after = cpu(xs, weights, params, layers)
    assert torch.equal(after, cpu(xs, weights, params.clone(), layers))


@pytest.mark.parametrize("stored", [INT8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits_on_every_instruction_set(stored, compute, isa, poisoned):
    layers = "23: 70 relu, 64 relu, 3"
    weights, params = random_mlp(layers, stored, 1, "cpu")
    xs = inputs_of(29, layers)
    y = cpu(xs, weights, params, layers, compute=compute, isa=isa)
    assert_mlp(y, xs, weights, params, layers, None, "none", compute)


def test_a_right_call_does_not_hide_a_wrong_one():
    layers = "4+2: 8 relu, 1"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    a, b = inputs_of(3, layers)
    fused_mlp([a, b], weights, params, layers, compute_dtype=INT8)
    for xs, w, p, error, match in (
        ([a, b[:, :1]], weights, params, ValueError, "input 1"),
        ([a, b[:2]], weights, params, ValueError, "input 1"),
        ([a, b.double()], weights, params, TypeError, "input 1 is torch.float64"),
        ([a, b.to("meta")], weights, params, ValueError, "on meta"),
        ([a], weights, params, ValueError, "1 inputs"),
        ([], weights, params, ValueError, "0 inputs"),
        ([a, b], weights[:-1], params, ValueError, "weights has shape"),
        ([a, b], weights, params[:-1], ValueError, "params has shape"),
        ([a, b], weights.half(), params[8:], TypeError, "compute_dtype is torch.int8"),
    ):
        with pytest.raises(error, match=match):
            fused_mlp(xs, w, p, layers, compute_dtype=INT8)
    with pytest.raises(ValueError, match="input_scales"):
        fused_mlp([a, b], weights, params, layers, None, "none", INT8, torch.ones(3))


def test_opcheck():
    layers = "4+3: 8 relu, 2"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    for xs in ([torch.randn(5, 4), torch.randn(5, 3)], [torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)]):
        args = xs, weights, params, layers, None, "none", INT8
        torch.library.opcheck(torch.ops.rewardzip.fused_mlp.default, args)
        assert torch.equal(fused_mlp(*args), torch.ops.rewardzip.fused_mlp(*args))


def test_rounding_passes_the_gradient_on():
    layers = "4: 8 tanh, 1"
    weights, params = random_mlp(layers, INT8, 1, "cpu")
    hidden, last = unpack(weights, params, layers)[0]
    x = torch.randn(5, 4, requires_grad=True)
    fused_mlp([x], weights, params, layers, compute_dtype=INT8).sum().backward()
    net = pack([[hidden, Linear(torch.eye(8), torch.zeros(8))]], "4: 8 tanh, 8")
    h = fused_mlp_reference([x.detach()], *net, "4: 8 tanh, 8", None, "none", INT8)
    torch.testing.assert_close(x.grad, (last.weight * (1 - h * h) * hidden.scale) @ hidden.weight.float())
