"""fused_mlp: every implementation against float64 through every layer; its place in torch."""

import pytest
import torch
from conftest import GPU
from mlp_numerics import assert_mlp, exact_mlp, random_mlp
from properties import given, settings, st

from rewardzip_kernels import activations, fused_mlp
from rewardzip_kernels.fused_mlp import fused_mlp_reference
from rewardzip_kernels.mlp_layout import Linear, layout, pack, parse_layers, unpack

DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter cannot multiply bfloat16
COMPUTE = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)


def triton_fused_mlp(*args):
    from rewardzip_kernels.gpu.fused_mlp import fused_mlp

    return fused_mlp(*args)


@pytest.fixture
def small_classes(monkeypatch):
    """The tiles for thousands of rows, from 17 and from 41 rows on, and two programs that share them."""
    from rewardzip_kernels.gpu import fused_mlp as kernels

    monkeypatch.setattr(kernels, "FEW", 16)
    monkeypatch.setattr(kernels, "SOME", 40)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 1)


IMPLEMENTATIONS = {"reference": fused_mlp_reference, "op": fused_mlp, "triton": triton_fused_mlp}


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request):
    return IMPLEMENTATIONS[request.param]


def inputs_of(m, layers, dtype=torch.float32):
    return [torch.randn(m, k, device=DEVICE).to(dtype) for k in parse_layers(layers)[0]]


def check(run, m, layers, stored=torch.int8, dtype=torch.float32, compute=torch.float32, members=None):
    """All members, then their mean and deviation where there are several."""
    weights, params = random_mlp(layers, stored, members or 1, DEVICE)
    xs = inputs_of(m, layers, dtype)
    y = run(xs, weights, params, layers, members, "none", compute)
    assert y.shape == (*(() if members is None else (members,)), m, layout(layers, True).layers[-1].width)
    assert y.dtype == dtype
    assert_mlp(y, xs, weights, params, layers, members, "none", compute)
    if members is not None and members > 1:
        both = run(xs, weights, params, layers, members, "mean_std", compute)
        assert_mlp(both, xs, weights, params, layers, members, "mean_std", compute)


CASES = [
    (1, "1: 1", "the smallest"),
    (17, "24: 5", "no hidden layer"),
    (5, "300+20: 20 tanh", "no hidden layer, many inputs and outputs"),
    (130, "32: 64 relu, 64 relu, 1", "the usual size, a row tail"),
    (33, "17+6: 64 relu, 64 relu, 1", "two inputs"),
    (3, "5+1+70+16: 32 relu, 4", "four inputs, one of them two tiles"),
    (20, "24: 256 relu, 256 relu, 1", "the widest, slices in a loop"),
    (20, "48: 256 elu, 128 elu, 1", "narrowing"),
    (18, "393: 100 relu, 130 silu, 1", "inputs too wide to be kept"),
    (9, "200+130: 65 relu, 17", "two such inputs, a dot for the outputs"),
    (16, "40: 100 relu, 40 relu, 129 relu, 7 relu, 20 relu, 3", "six layers, odd widths"),
    (7, "23: 20 relu, 101", "a value distribution"),
    (7, "23: 20 relu, 256", "two blocks of outputs"),
    (6, "60: 256 layer_norm mish, 200 layer_norm:0.001 mish, 70", "LayerNorm over slices, the last one short"),
    (6, "393: 200 layer_norm relu, 33 layer_norm relu, 1", "LayerNorm over kept sums"),
]
MANY = [
    (300, "17+6: 33 relu, 20 layer_norm relu, 3", "weights kept over three tiles"),
    (130, "40: 33 relu, 128 layer_norm mish, 3", "weights kept, 8 warps"),
    (130, "70: 33 relu, 128 layer_norm mish, 16", "64 rows beside 16 outputs"),
    (70, "24+1: 256 silu, 200 silu, 9", "256 wide, slices of 32 beside 9 outputs"),
    (130, "400: 20 relu, 100 relu, 1", "inputs too wide to keep the weights"),
    (130, "9: 60 relu, 60 relu, 128 relu, 128 relu, 128 relu, 1", "weights too many to be kept"),
    (40, "24: 256 relu, 256 relu, 1", "256 wide, 64 rows"),
    (130, "24: 256 elu, 129 elu, 7", "256 wide, 128 rows"),
    (70, "7: 130 relu, 256 relu, 200 relu, 1", "two wide layers kept"),
    (70, "300+30: 256 relu, 256 relu, 1", "wide inputs and a wide layer kept"),
    (20, "7: 256 relu, 256 relu, 256 relu, 256 relu, 1", "too much kept: 16 rows"),
    (70, "64: 1", "no hidden layer"),
]


@pytest.mark.parametrize(("m", "layers", "why"), CASES, ids=[case[-1] for case in CASES])
@pytest.mark.parametrize("stored", [torch.int8, torch.float16], ids=str)
def test_every_shape(run, m, layers, why, stored, poisoned):
    check(run, m, layers, stored)


@pytest.mark.parametrize(("m", "layers", "why"), MANY, ids=[case[-1] for case in MANY])
@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16] if GPU else [torch.float16], ids=str)
def test_the_tiles_of_many_rows(m, layers, why, compute, small_classes, poisoned):
    # fp32 always takes the tile of few rows
    check(triton_fused_mlp, m, layers, compute=compute)


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(run, dtype, compute, poisoned):
    check(run, 21, "17+6: 40 relu, 70 gelu, 2", torch.int8, dtype, compute)


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.7"])
def test_activations(run, activation, poisoned):
    check(run, 19, f"20: 33 {activation}, 20 layer_norm {activation}, 2 {activation}")


@pytest.mark.parametrize("members", range(1, 17))
def test_members(run, members, poisoned):
    check(run, 5, "7+3: 20 relu, 33 relu, 2", members=members)


@pytest.mark.parametrize("layers", ["7: 20 relu, 2", "7: 130 relu, 130 relu, 1"])
def test_members_of_many_rows(layers, small_classes, poisoned):
    check(triton_fused_mlp, 150, layers, compute=torch.float16, members=3)


def test_the_deviation_of_one_member_is_nan_as_in_torch(run):
    weights, params = random_mlp("4: 8 relu, 1", torch.int8, 1, DEVICE)
    mean, std = run(inputs_of(3, "4: 8 relu, 1"), weights, params, "4: 8 relu, 1", 1, "mean_std")
    assert mean.isfinite().all()
    assert std.isnan().all()


@settings(max_examples=64, deadline=None)
@given(data=st.data(), widest=st.integers(1, 64))
def test_any_network(data, widest):
    """Depth 1 to 6; every example has a layer of its own width of 1 to 64."""
    torch.manual_seed(widest)
    widths = data.draw(st.lists(st.integers(1, 70), min_size=0, max_size=4))
    widths.insert(data.draw(st.integers(0, len(widths))), widest)
    names = st.sampled_from(["relu", "elu:0.5", "mish", "none", "layer_norm tanh", "layer_norm"])
    hidden = [f"{width} {data.draw(names)}" for width in widths]
    pieces = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    layers = "+".join(map(str, pieces)) + ": " + ", ".join([*hidden, str(data.draw(st.integers(1, 20)))])
    stored = data.draw(st.sampled_from([torch.int8, torch.float16]))
    check(triton_fused_mlp, data.draw(st.integers(1, 40)), layers, stored)


@pytest.mark.parametrize("width", range(1, 65))
def test_all_small_widths(width, poisoned):
    check(triton_fused_mlp, 17, f"{width}+{65 - width}: {width} relu, {65 - width} relu, {width}")


def test_integer_inputs(run, poisoned):
    layers = "20+5+3: 33 relu, 2"
    weights, params = random_mlp(layers, torch.int8, 1, DEVICE)
    state = torch.randint(0, 256, (9, 20), dtype=torch.uint8, device=DEVICE)
    action = torch.randint(-128, 128, (9, 5), dtype=torch.int8, device=DEVICE)
    scales = torch.tensor([[0.02, 128.0], [0.01, 0.0], [0.0, 0.0]], device=DEVICE)
    done = torch.randn(9, 3, device=DEVICE)
    y = run([state, action, done], weights, params, layers, None, "none", torch.float32, scales)
    numbers = [(state.float() - 128) * 0.02, action.float() * 0.01, done]
    assert_mlp(y, numbers, weights, params, layers, None, "none", torch.float32)
    layers = "20+5: 33 relu, 2"
    y = run([state, action], *random_mlp(layers, torch.int8, 1, DEVICE), layers, None, "none", None, scales[:2])
    assert y.dtype == torch.float32


def test_non_contiguous_inputs(run, poisoned):
    weights, params = random_mlp("20+6: 33 relu, 2", torch.int8, 1, DEVICE)
    whole = torch.randn(16, 50, device=DEVICE)
    state, action = whole[::2, 3:23], torch.randn(6, 8, device=DEVICE).t()
    y = run([state, action], weights, params, "20+6: 33 relu, 2", None, "none", torch.float32)
    assert_mlp(y, [state, action], weights, params, "20+6: 33 relu, 2", None, "none", torch.float32)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("members", [None, 3])
def test_leading_shapes(run, leading, members):
    weights, params = random_mlp("7+2: 9 relu, 5", torch.int8, members or 1, DEVICE)
    xs = [torch.randn(*leading, k, device=DEVICE) for k in (7, 2)]
    y = run(xs, weights, params, "7+2: 9 relu, 5", members)
    assert y.shape == (*(() if members is None else (3,)), *leading, 5)
    if members is not None:
        assert run(xs, weights, params, "7+2: 9 relu, 5", members, "mean_std").shape == (2, *leading, 5)
    flat = run([x.reshape(-1, x.shape[-1]) for x in xs], weights, params, "7+2: 9 relu, 5", members)
    assert torch.equal(y.flatten(), flat.flatten())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layers", ["40 relu, 33 relu, 2", "40, 33, 20", "40 elu, 2", "2", "30 layer_norm relu, 1"])
def test_inf_and_nan_come_through(run, value, layers):
    layers = f"20: {layers}"
    weights, params = random_mlp(layers, torch.float16, 1, DEVICE)
    x = torch.randn(5, 20, device=DEVICE)
    x[1, 3] = value
    y = run([x], weights, params, layers, None, "none", torch.float32)
    (expected,), _ = exact_mlp([x], weights, params, layers, 1, torch.float32)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[0].isfinite().all()


def test_beyond_the_range_of_float16_is_inf_and_not_silent(run):
    member = [
        Linear(torch.full((4, 2), 1.0).half(), torch.zeros(4)),
        Linear(torch.full((3, 4), 1.0).half(), torch.zeros(3)),
    ]
    member.append(Linear(torch.ones(1, 3), torch.zeros(1)))
    layers = "2: 4, 3, 1"
    weights, params = (t.to(DEVICE) for t in pack([member], layers))
    x = torch.full((1, 2), 60000.0, device=DEVICE)
    assert run([x], weights, params, layers).isinf().all()
    assert run([x], weights, params, layers, None, "none", torch.float32).isfinite().all()


@pytest.mark.parametrize("m", [1, 16, 33, 150])
@pytest.mark.parametrize("members", [None, 2])
def test_a_row_does_not_depend_on_the_others(run, m, members, small_classes):
    """Within one class of batch sizes, bit for bit."""
    layers = "9: 20 layer_norm relu, 33 relu, 2"
    weights, params = random_mlp(layers, torch.int8, members or 1, DEVICE)
    x = torch.randn(m, 9, device=DEVICE)
    others = x.clone()
    others[: m - 1] = torch.randn(m - 1, 9, device=DEVICE) * 100
    rows = [run([rows], weights, params, layers, members)[..., -1, :] for rows in (x, others)]
    assert torch.equal(*rows)


@pytest.mark.skipif(not GPU, reason="needs a GPU's memory")
def test_row_offsets_beyond_int32(run):
    weights, params = random_mlp("16: 9 relu, 2", torch.int8, 1, DEVICE)
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    x = storage.as_strided((2, 16), (2**31 + 8, 1))
    x.copy_(torch.randn(2, 16))
    y = run([x], weights, params, "16: 9 relu, 2")
    assert_mlp(y, [x], weights, params, "16: 9 relu, 2", None, "none", torch.float16)


def test_default_compute_dtype():
    from rewardzip_kernels.fused_mlp import compute_type

    int8, bf16 = torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=torch.bfloat16)
    x32, x16, xb = (torch.empty(1, dtype=d) for d in (torch.float32, torch.float16, torch.bfloat16))
    assert compute_type([x32], int8, None) == torch.float16
    assert compute_type([x32], bf16, None) == torch.bfloat16
    assert compute_type([xb, xb], int8, None) == torch.bfloat16
    assert compute_type([x16, xb], bf16, None) == torch.bfloat16
    assert compute_type([x16], bf16, torch.float32) == torch.float32


def test_pack_and_unpack_are_inverse():
    layers = "17+6: 20 layer_norm relu, 33 relu, 5"
    weights, params = random_mlp(layers, torch.int8, 3, "cpu")
    members = unpack(weights, params, layers, 3)
    assert members[2][0].weight.shape == (20, 23)
    assert members[2][1].gamma is None
    again = pack(members, layers)
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], params)


def test_the_documented_layout():
    """The drawing in mlp_layout.py, number by number."""
    hidden = Linear(
        torch.arange(23 * 20).remainder(127).to(torch.int8).view(20, 23), torch.full((20,), 2.0), torch.full((20,), 3.0)
    )
    last = Linear(torch.full((1, 20), 4.0), torch.tensor([5.0]))
    weights, params = pack([[hidden, last]], "17+6: 20 relu, 1")
    assert weights.shape == (20 * 48,)
    rows = weights.view(20, 48)
    assert torch.equal(rows[:, :17], hidden.weight[:, :17])
    assert torch.equal(rows[:, 32:38], hidden.weight[:, 17:])
    assert rows[:, 17:32].count_nonzero() + rows[:, 38:].count_nonzero() == 0
    zeros = [0.0] * 12
    assert params.tolist() == [3.0] * 20 + zeros + [2.0] * 20 + zeros + [4.0] * 20 + zeros + [5.0] + [0.0] * 15


BAD_LAYERS = {
    "4 relu, 1": "inputs",
    "4+: 4 relu, 1": "inputs",
    "0: 4 relu, 1": "inputs",
    "1+1+1+1+1+1+1+1+1: 1": "at most 8",
    "4: 0 relu, 1": "width",
    "4: x, 1": "width",
    "4:": "width",
    "4: 4 rely, 1": "not one of",
    "4: 4 layer_norm:0 relu, 1": "eps",
    "4: 4 relu relu, 1": "layer_norm",
    "4: 4, 1 layer_norm": "last layer",
    "4: 1, 1, 1, 1, 1, 1, 1": "at most 6",
}


@pytest.mark.parametrize("layers", BAD_LAYERS)
def test_bad_layers(layers):
    with pytest.raises(ValueError, match=BAD_LAYERS[layers]):
        layout(layers, True)


def test_bad_arguments():
    weights, params = random_mlp("4+2: 8 relu, 1", torch.int8, 1, "cpu")
    a, b = torch.randn(3, 4), torch.randn(3, 2)

    def call(error, match, inputs=(a, b), w=weights, p=params, layers="4+2: 8 relu, 1", *rest):
        with pytest.raises(error, match=match):
            fused_mlp(list(inputs), w, p, layers, *rest)

    call(ValueError, "0 inputs", ())
    wide = "4+2: 257 relu, 1"
    call(ValueError, "257 wide; at most 256", (a, b), *random_mlp(wide, torch.int8, 1, "cpu"), wide)
    call(ValueError, "input 1 .* take 2", (a, a))
    call(TypeError, "input 1 is torch.float64", (a, b.double()))
    call(ValueError, r"input 1 has shape \(2, 2\)", (a, b[:2]))
    call(ValueError, "input_scales is None", (a, b.to(torch.int8)))
    call(
        ValueError,
        "input_scales is torch.float32",
        (a, b),
        weights,
        params,
        "4+2: 8 relu, 1",
        None,
        "none",
        None,
        torch.ones(3),
    )
    call(ValueError, "weights has shape", (a, b), weights[:-1])
    call(ValueError, "params has shape", (a, b), weights, params[:-1])
    call(TypeError, "weights is torch.float32", (a, b), weights.float())
    call(TypeError, "params is torch.float64", (a, b), weights, params.double())
    call(ValueError, "2 member", (a, b), weights, params, "4+2: 8 relu, 1", 2)
    call(ValueError, "members is 0", (a, b), weights, params, "4+2: 8 relu, 1", 0)
    call(ValueError, "reduce is 'max'", (a, b), weights, params, "4+2: 8 relu, 1", 1, "max")
    call(ValueError, "members is None", (a, b), weights, params, "4+2: 8 relu, 1", None, "mean_std")
    bad = torch.float64
    call(TypeError, "compute_dtype is torch.float64", (a, b), weights, params, "4+2: 8 relu, 1", None, "none", bad)
    half = weights.half(), params[16:]
    call(TypeError, "weights is torch.float16", (a, b), *half, "4+2: 8 relu, 1", None, "none", torch.int8)
    call(ValueError, "on meta", (a, b.to("meta")))


def test_bad_packing():
    hidden, last = (
        Linear(torch.zeros(8, 4, dtype=torch.int8), torch.zeros(8), torch.ones(8)),
        Linear(torch.zeros(1, 8), torch.zeros(1)),
    )
    for member, error, match in (
        ([], ValueError, "no member"),
        ([[last]], ValueError, "1 layers"),
        ([[hidden._replace(scale=None), last]], ValueError, "scale is missing"),
        ([[hidden._replace(gamma=torch.ones(8)), last]], ValueError, "gamma is given"),
        ([[hidden._replace(bias=torch.zeros(7)), last]], ValueError, r"bias has shape \(7,\)"),
        ([[hidden, last._replace(weight=torch.zeros(1, 7))]], ValueError, r"weight has shape \(1, 7\)"),
        ([[hidden, last._replace(weight=last.weight.half())]], TypeError, "float32"),
        ([[hidden._replace(weight=torch.zeros(8, 4)), last]], TypeError, "hidden weights are torch.float32"),
    ):
        with pytest.raises(error, match=match):
            pack(member, "4: 8 relu, 1")


def test_opcheck():
    layers = "4+3: 8 layer_norm gelu, 2"
    weights, params = random_mlp(layers, torch.int8, 2, "cpu")
    for xs in (
        [torch.randn(5, 4), torch.randn(5, 3)],
        [torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 3)],
    ):
        for reduce in ("none", "mean_std"):
            torch.library.opcheck(torch.ops.rewardzip.fused_mlp.default, (xs, weights, params, layers, 2, reduce))


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.7"])
@pytest.mark.parametrize("reduce", ["none", "mean_std"])
def test_input_gradient(activation, reduce):
    layers = f"4+3: 8 {activation}, 9 layer_norm {activation}, 2 tanh"
    weights, params = random_mlp(layers, torch.float16, 3, "cpu")
    xs = [torch.randn(5, k, requires_grad=True) for k in (4, 3)]
    y = fused_mlp(xs, weights, params, layers, 3, reduce, torch.float32)
    factor = torch.randn(y.shape)
    (y * factor).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in xs]
    ys, _ = exact_mlp(exact, weights, params, layers, 3, torch.float32)
    ys = ys if reduce == "none" else torch.stack([ys.mean(0), ys.std(0)])
    (ys * factor.double()).sum().backward()
    for x, e in zip(xs, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), e.grad, rtol=1e-4, atol=1e-5)


def test_gradient_where_members_agree_and_for_integers():
    layers = "4+3: 8 tanh, 1"
    member = unpack(*random_mlp(layers, torch.int8, 1, "cpu"), layers)[0]
    weights, params = pack([member, member], layers)
    x, q = torch.randn(5, 4, requires_grad=True), torch.ones(5, 3, dtype=torch.int8)
    mean, std = fused_mlp([x, q], weights, params, layers, 2, "mean_std", None, torch.ones(2, 2))
    (mean + std).sum().backward()
    assert x.grad.isfinite().all()
    assert q.grad is None


def test_compile():
    layers = "4+3: 8 gelu, 2"
    weights, params = random_mlp(layers, torch.int8, 2, "cpu")

    def network(a, b):
        mean, std = fused_mlp([a, b], weights, params, layers, 2, "mean_std")
        return mean - std

    xs = [torch.randn(5, k, requires_grad=True) for k in (4, 3)]
    compiled, eager = torch.compile(network, fullgraph=True, backend="aot_eager")(*xs), network(*xs)
    assert torch.equal(compiled, eager)
    for got, expected in zip(
        torch.autograd.grad(compiled.sum(), xs), torch.autograd.grad(eager.sum(), xs), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("members", "reduce"), [(None, "none"), (3, "none"), (3, "mean_std")])
def test_no_rows_have_a_gradient_of_no_rows(members, reduce):
    layers = "17+6: 32 relu, 1"
    packed = random_mlp(layers, torch.int8, members or 1, DEVICE)
    inputs = [torch.randn(0, k, device=DEVICE, requires_grad=True) for k in (17, 6)]
    y = fused_mlp(tuple(inputs), *packed, layers, members, reduce)
    found = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in found] == [(0, 17), (0, 6)]
