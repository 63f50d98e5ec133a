"""sparse24_linear: its stored form, every implementation against float64, and the layer made of it."""

import copy

import pytest
import torch
from conftest import GPU, need_triton
from numerics import SHAPES, assert_dynamic, assert_linear
from sparse_numerics import keep_two, linear, sparse24
from torch import nn

import rewardzip as rz
from rewardzip.checkpoint import CheckpointError
from rewardzip.nn import Sparse24Linear
from rewardzip.swap import fuse_forwards
from rewardzip_kernels import activations, sparse24_linear
from rewardzip_kernels.sparse24_layout import broken_groups, pack, places, unpack, width
from rewardzip_kernels.sparse24_linear import sparse24_linear_reference

# what the dense way takes over at, with tails, and halves of K that end inside a tile
MORE = [(520, 70, 600, "expanded by two programs, tails in all"), (7, 33, 520, "a half that ends inside a tile")]
# Triton's interpreter cannot multiply bfloat16
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)


def triton_sparse24_linear(*args):
    need_triton()
    from rewardzip_kernels.gpu.sparse24_linear import sparse24_linear

    return sparse24_linear(*args)


def on(isa):
    def run(x, *args):
        pytest.importorskip("numba")
        from rewardzip_kernels.cpu.instruction_sets import available
        from rewardzip_kernels.cpu.sparse24_linear import sparse24_linear

        if x.is_cuda or isa not in available():
            pytest.skip(f"{isa} is not this processor's")
        return sparse24_linear(x, *args, *[None, "none", None][len(args) - 4 :], isa)

    return run


RUNS = {"reference": sparse24_linear_reference, "op": sparse24_linear, "triton": triton_sparse24_linear} | {
    isa: on(isa) for isa in ("avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
}


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


def rounding(x, compute):
    if compute == torch.float32:
        return "tf32" if x.is_cuda else None
    return None if compute == x.dtype else compute


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 4), (5, 7), (9, 64), (4, 100), (2, 1041)])
@pytest.mark.parametrize("last", [False, True])
def test_the_stored_form_loses_nothing(n, k, last):
    weight = keep_two(torch.randint(-127, 128, (n, k), dtype=torch.int8), last)
    values, indices = pack(weight)
    assert values.shape == (n, 4, width(k))
    assert indices.shape == (n, width(k))
    assert (places(indices).diff(dim=2) > 0).all(), "the second after the first, in groups of zeros too"
    assert torch.equal(unpack(values, indices, k), weight)
    bits = 8 * (values.numel() + indices.numel()) / (n * 8 * width(k))
    assert bits == 5


def test_one_group_by_hand():
    weight = torch.tensor([[0, 0, 7, 9, 0, 5, 0, 0, 3, 0, 4, 0, 0, 0, 0, 0]], dtype=torch.int8)
    values, indices = pack(weight)
    # groups 0 and 1 are the first half, 2 and 3 the second; a group's spare places are its lowest
    assert values.tolist() == [[[7, 0], [9, 5], [3, 0], [4, 0]]]
    assert indices.tolist() == [[2 | 3 << 2 | 0 << 4 | 2 << 6, 0 | 1 << 2 | 0 << 4 | 1 << 6]]


def test_broken_groups_are_counted():
    weight = torch.zeros(2, 10)
    weight[0, :3], weight[1, 4:8], weight[1, 8:] = 1, 1, 1
    assert broken_groups(weight) == (2, 6)


@pytest.mark.parametrize(("m", "n", "k", "why"), SHAPES + MORE, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tail(run, m, n, k, why, device, poisoned):
    if run is triton_sparse24_linear:
        n = min(n, 66)  # the interpreter takes one program after the other
    x = torch.randn(m, k, device=device)
    q, values, indices, scale, bias, dense_scale = sparse24(n, k, device)
    for activation, b in (("relu", bias), ("none", None)):
        y = run(x, values, indices, scale, k, b, activation)
        assert_linear(y, x, q, dense_scale, b, activation, rounding(x, torch.float32))
        y = run(x, values, indices, scale, k, b, activation, torch.int8)
        assert_dynamic(y, x, q, dense_scale, b, activation, None)


@pytest.mark.parametrize("values", HALVES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 130), (20, 66, 64), (513, 9, 40)])
def test_values_in_16_bits(run, values, m, n, k, device, poisoned):
    q, packed, indices, _, bias, ones = sparse24(n, k, device, values)
    for dtype in (torch.float32, *HALVES):
        x = torch.randn(m, k, device=device).to(dtype)
        compute = torch.promote_types(dtype, values)
        y = run(x, packed, indices, None, k, bias, "relu")
        assert_linear(y, x, q, ones, bias, "relu", rounding(x, compute) if compute != torch.float32 or GPU else None)


def test_bfloat16_values_on_a_cpu(poisoned):
    q, packed, indices, _, bias, ones = sparse24(66, 70, "cpu", torch.bfloat16)
    x = torch.randn(9, 70)
    assert_linear(sparse24_linear(x, packed, indices, None, 70, bias), x, q, ones, bias)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (6, 64, 64), (7, 65, 33), (49, 66, 1040), (400, 8, 6)])
def test_integer_sums_are_exact(run, m, n, k, device, poisoned):
    ones = torch.ones(n, device=device)
    for fill in (None, 127):
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) if fill is None else None
        q = keep_two(torch.full((n, k), -127, dtype=torch.int8, device=device) if q is None else q)
        x = torch.randint(-127, 128, (m, k), device=device) if fill is None else torch.full((m, k), fill, device=device)
        x[:, 0] = 127  # the scale is then 1
        y = run(x.float(), *pack(q), ones, k, None, "none", torch.int8)
        assert torch.equal(y, (x.double() @ q.double().t()).float())


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.7"])
@pytest.mark.parametrize("m", [2, 20])
def test_activations(activation, m, device, poisoned):
    x = torch.randn(m, 48, device=device)
    q, values, indices, scale, bias, _ = sparse24(33, 48, device)
    for call in (sparse24_linear, triton_sparse24_linear):
        y = call(x, values, indices, scale, 48, bias, activation)
        assert_linear(y, x, q, scale, bias, activation, rounding(x, torch.float32))


@pytest.mark.parametrize("m", [2, 20])
def test_corners(run, m, device, poisoned):
    """Nothing left, and all nonzeros in the last two places of each group."""
    x = torch.randn(m, 300, device=device)
    scale, bias = torch.ones(70, device=device), torch.randn(70, device=device)
    zero = torch.zeros(70, 300, dtype=torch.int8, device=device)
    assert torch.equal(run(x, *pack(zero), scale, 300, bias, "none"), bias.expand(m, 70))
    last = keep_two(torch.randint(1, 128, (70, 300), dtype=torch.int8, device=device), last=True)
    y = run(x, *pack(last), scale, 300, bias, "none")
    assert_linear(y, x, last, scale, bias, "none", rounding(x, torch.float32))


@pytest.mark.parametrize("m", [1, 3, 16, 60, 300])
def test_a_row_does_not_depend_on_the_others(run, m, device):
    """Bit for bit: within one class of batch sizes, and over all of them where sums are exact."""
    _, values, indices, scale, bias, _ = sparse24(40, 70, device)
    x = torch.randn(m, 70, device=device)
    others = x.clone()
    others[: m - 1] = torch.randn(m - 1, 70, device=device) * 100
    args = values, indices, scale, 70, bias, "relu"
    assert torch.equal(run(x, *args)[-1], run(others, *args)[-1])
    assert torch.equal(run(x, *args, torch.int8)[-1:], run(x[-1:], *args, torch.int8))


def test_cpu_rows_stand_alone_on_any_number_of_threads(monkeypatch):
    pytest.importorskip("numba")
    from rewardzip_kernels.cpu.tile24 import Sparse24Float, Sparse24Int8

    monkeypatch.setattr(Sparse24Float, "parallel_work", 1)
    monkeypatch.setattr(Sparse24Int8, "parallel_work", 1)
    before = torch.get_num_threads()
    try:
        for compute in (None, torch.int8):
            _, values, indices, scale, bias, _ = sparse24(200, 64)
            x, args = torch.randn(500, 64), (values, indices, scale, 64, bias, "tanh", compute)
            torch.set_num_threads(1)
            together = sparse24_linear(x, *args)
            for rows in (slice(0, 1), slice(1, 4), slice(160, 500)):
                assert torch.equal(sparse24_linear(x[rows], *args), together[rows])
            torch.set_num_threads(2)
            assert torch.equal(sparse24_linear(x, *args), together)
            assert torch.equal(sparse24_linear(x[:9], *args), together[:9])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("m", [2, 20])
def test_inf_and_nan_reach_the_outputs_that_kept_them(run, m, device):
    q, _, _, scale, bias, _ = sparse24(9, 20, device)
    q[:, :4] = torch.tensor([0, 5, 0, 5], device=device)
    x = torch.randn(m, 20, device=device)
    x[0, 1], x[1, 3] = float("nan"), float("inf")
    y = run(x, *pack(q), scale, 20, bias, "none")
    assert y[0].isnan().all()
    assert (y[1].isinf() | y[1].isnan()).all()
    assert y[2:].isfinite().all()
    assert run(x, *pack(q), scale, 20, bias, "relu", torch.int8)[:2].isnan().all()


def test_strided_leading_and_empty(run, device):
    q, values, indices, scale, bias, _ = sparse24(9, 20, device)
    x = torch.randn(6, 4, 50, device=device)[::2, :, 7:47:2]
    y = run(x, values, indices, scale, 20, bias, "relu")
    assert y.shape == (3, 4, 9)
    assert_linear(y.reshape(-1, 9), x.reshape(-1, 20), q, scale, bias, "relu", rounding(x, torch.float32))
    assert run(x[:0], values, indices, scale, 20, bias, "relu").shape == (0, 4, 9)
    assert run(x[0, 0], values, indices, scale, 20, bias, "relu").shape == (9,)


def test_opcheck():
    for values in (torch.int8, torch.float16):
        _, packed, indices, scale, bias, _ = sparse24(9, 20, values=values)
        x = torch.randn(2, 3, 20, requires_grad=True)
        op = torch.ops.rewardzip.sparse24_linear.default
        torch.library.opcheck(op, (x, packed, indices, scale, 20, bias, "gelu"))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("values", [torch.int8, torch.float16])
def test_input_gradient(activation, values):
    q, packed, indices, scale, bias, dense_scale = sparse24(7, 12, values=values)
    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(5, 7)
    (sparse24_linear(x, packed, indices, scale, 12, bias, activation) * weight).sum().backward()
    exact = x.detach().double().requires_grad_()
    dense = q.double() * dense_scale.double()[:, None]
    (activations.apply(exact @ dense.t() + bias.double(), activation) * weight.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_weights_changed_in_place():
    _, values, indices, scale, bias, _ = sparse24(70, 20)
    x = torch.randn(5, 20)
    sparse24_linear(x, values, indices, scale, 20, bias)
    for changed in (values, indices):
        changed.copy_(changed.flip(0))
        expected = sparse24_linear(x, values.clone(), indices.clone(), scale, 20, bias)
        assert torch.equal(sparse24_linear(x, values, indices, scale, 20, bias), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(3, 19)}, ValueError, "takes 20 inputs"),
        ({"x": torch.randn(3, 20).double()}, TypeError, "float64"),
        ({"x": torch.randn(3, 20, device="meta")}, ValueError, "on cpu, x on meta"),
        ({"values": torch.zeros(9, 3)}, ValueError, "must be .out, 4, inputs / 8."),
        ({"values": torch.zeros(9, 4, 3)}, TypeError, "values are torch.float32"),
        ({"values": torch.zeros(9, 4, 3).half()}, ValueError, "take no scale"),
        ({"scale": None}, ValueError, "need a scale"),
        ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\)"),
        ({"indices": torch.zeros(9, 2, dtype=torch.uint8)}, ValueError, "indices are"),
        ({"indices": torch.zeros(9, 3, dtype=torch.int8)}, ValueError, "must be torch.uint8"),
        ({"in_features": 25}, ValueError, "25 inputs need 4 columns"),
        ({"in_features": 0}, ValueError, "0 inputs"),
        ({"bias": torch.ones(1)}, ValueError, "bias has shape"),
        ({"activation": "swish"}, ValueError, "is not one of"),
        ({"compute_dtype": torch.int16}, TypeError, "compute_dtype is torch.int16"),
    ],
)
def test_bad_input(change, error, words):
    _, values, indices, scale, bias, _ = sparse24(9, 20)
    arguments = {"x": torch.randn(3, 20), "values": values, "indices": indices, "scale": scale, "in_features": 20}
    with pytest.raises(error, match=words):
        sparse24_linear(**(arguments | {"bias": bias} | change))


def test_16_bit_values_are_not_multiplied_in_less():
    _, values, indices, _, _, _ = sparse24(9, 20, values=torch.float16)
    for compute in (torch.int8, torch.bfloat16):
        with pytest.raises(TypeError, match=r"does not hold values of torch\.float16"):
            sparse24_linear(torch.randn(3, 20), values, indices, None, 20, None, "none", compute)


@pytest.mark.parametrize("options", [{}, {"rows": "dynamic"}, {"values": "float16"}, {"values": "bfloat16"}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer(options, bias, tmp_path):
    dense = linear(keep_two(torch.randn(40, 23)), bias)
    layer = Sparse24Linear.from_linear(dense, **options)
    x = torch.randn(7, 23)
    assert (layer(x) - dense(x)).norm() < 0.02 * dense(x).norm()
    assert not layer.weight[dense.weight == 0].any()
    assert torch.equal(layer.to_linear().weight, layer.weight)
    model = nn.Sequential(layer, nn.ReLU())
    expected = model(x)
    fuse_forwards(model)
    assert type(model).rz_fused == {"0": "relu"}
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    rz.save(model, tmp_path / "saved")
    again = rz.load(tmp_path / "saved")
    assert torch.equal(again(x), expected)
    assert again[0].extra_repr() == layer.extra_repr()
    (row,) = rz.explain(again)
    assert (row.op, row.activation) == ("Sparse24Linear", "relu")
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert all(a.dtype == b.dtype for a, b in zip(half.buffers(), layer.buffers(), strict=True))
    assert torch.equal(half.float()(x), layer(x))


def test_a_saved_layer_is_as_small_as_promised(tmp_path):
    layer = Sparse24Linear.from_linear(linear(keep_two(torch.randn(256, 512)), False))
    rz.save(nn.Sequential(layer), tmp_path / "saved")
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 256 * 512 * 5 / 8 + 256 * 4 + 1000


def test_refresh_in_place_with_another_pattern():
    layer = Sparse24Linear.from_linear(linear(keep_two(torch.randn(40, 23))))
    x = torch.randn(7, 23)
    layer(x)
    at = [b.data_ptr() for b in layer.buffers()]
    other = linear(keep_two(torch.randn(40, 23)))
    layer.refresh(other)
    assert [b.data_ptr() for b in layer.buffers()] == at
    assert torch.equal(layer(x), Sparse24Linear.from_linear(other)(x))


def test_what_does_not_fit_is_refused_and_nothing_changed():
    dense = linear(torch.ones(4, 10))
    assert not Sparse24Linear.fits(dense.weight)
    assert Sparse24Linear.fits(keep_two(dense.weight))
    with pytest.raises(ValueError, match="8 of the 12 groups of 4 inputs"):
        Sparse24Linear.from_linear(dense)
    layer = Sparse24Linear.from_linear(linear(keep_two(torch.randn(4, 10))), values="float16")
    before = layer.weight
    for bad, words in (
        (dense, "8 of the 12 groups"),
        (linear(keep_two(torch.full((4, 10), 1e6))), "beyond 65504"),
        (linear(keep_two(torch.randn(4, 12))), r"is \(4, 12\)"),
    ):
        with pytest.raises(ValueError, match=words):
            layer.refresh(bad)
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="inf, NaN"):
        Sparse24Linear.from_linear(linear(keep_two(torch.full((4, 10), float("inf"))).nan_to_num(0, 3e38, 0) * 10))
    with pytest.raises(ValueError, match="values is 'int4'"):
        Sparse24Linear(4, 4, values="int4")
    with pytest.raises(ValueError, match="rows='dynamic' multiplies int8"):
        Sparse24Linear(4, 4, values="float16", rows="dynamic")


def test_where_it_wins():
    assert "half the products" in Sparse24Linear.wins((1024, 1024), 0.5, "cpu", "float")
    assert Sparse24Linear.wins((512, 1024), 0.5, "cpu", "float") is None
    assert Sparse24Linear.wins((1024, 1024), 0.5, "cuda", "float") is None


def test_corrupt_files(tmp_path):
    layer = Sparse24Linear.from_linear(linear(keep_two(torch.randn(5, 11))))
    for damage, words in (
        (lambda m: m[0].indices.zero_(), "second place must be after"),
        (lambda m: m[0].packed_values.fill_(1), "beyond the 11 inputs"),
    ):
        model = nn.Sequential(copy.deepcopy(layer))
        damage(model)
        rz.save(model, tmp_path / "saved")
        with pytest.raises(CheckpointError, match=words):
            rz.load(tmp_path / "saved")
    rz.save(nn.Sequential(layer), tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    good = config.read_text()
    for old, new in (
        ('"int8"', '"int4"'),
        ('"in_features": 11', '"in_features": 33'),
        ('"rows": "float"', '"rows": "static"'),
    ):
        assert old in good
        config.write_text(good.replace(old, new))
        with pytest.raises(CheckpointError):
            rz.load(tmp_path / "saved")
