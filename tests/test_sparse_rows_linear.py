"""sparse_rows_linear: its stored form, every implementation against float64, and the layer made of it."""

import copy

import pytest
import torch
from conftest import GPU, need_triton
from numerics import SHAPES, assert_linear
from sparse_numerics import linear, sparse_rows
from torch import nn

import rewardzip as rz
from rewardzip.checkpoint import CheckpointError
from rewardzip.nn import SparseRowsLinear
from rewardzip.swap import fuse_forwards
from rewardzip_kernels import activations, sparse_rows_linear
from rewardzip_kernels.sparse_rows_linear import check_stored, dense, nonzeros, sparse_rows_linear_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MORE = [(33, 5, 40, "one row over two vectors"), (3, 2, 40000, "columns of 32 bits")]


def triton_sparse_rows_linear(*args):
    need_triton()
    from rewardzip_kernels.gpu.sparse_rows_linear import sparse_rows_linear

    return sparse_rows_linear(*args)


def on(isa):
    def run(x, *args):
        pytest.importorskip("numba")
        from rewardzip_kernels.cpu.instruction_sets import available
        from rewardzip_kernels.cpu.sparse_rows_linear import sparse_rows_linear

        if x.is_cuda or isa not in available():
            pytest.skip(f"{isa} is not this processor's")
        return sparse_rows_linear(x, *args, *[None, "none"][len(args) - 5 :], isa)

    return run


RUNS = {"reference": sparse_rows_linear_reference, "op": sparse_rows_linear, "triton": triton_sparse_rows_linear} | {
    isa: on(isa) for isa in ("avx2", "portable")
}


@pytest.fixture(params=RUNS)
def run(request):
    return RUNS[request.param]


@pytest.mark.parametrize(("m", "n", "k", "why"), SHAPES + MORE, ids=lambda v: v if isinstance(v, str) else "")
def test_every_tail(run, m, n, k, why, device, poisoned):
    if run is triton_sparse_rows_linear:
        m, n = min(m, 20), min(n, 9)  # the interpreter takes a program an output and 8 rows
    x = torch.randn(m, k, device=device)
    q, *stored, scale, bias, dense_scale = sparse_rows(n, k, device)
    for activation, b in (("relu", bias), ("none", None)):
        assert_linear(run(x, *stored, scale, k, b, activation), x, q, dense_scale, b, activation)


@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_float_values(run, values, m, device, poisoned):
    q, *stored, scale, bias, ones = sparse_rows(9, 50, device, values)
    for dtype in DTYPES:
        x = torch.randn(m, 50, device=device).to(dtype)
        assert_linear(run(x, *stored, scale, 50, bias, "relu"), x, q, ones, bias, "relu")


@pytest.mark.parametrize("m", [1, 2, 20, 40])
@pytest.mark.parametrize("kept", [0.0, 0.005, 1.0])
def test_corners(run, m, kept, device, poisoned):
    """Nothing left at all, one nonzero here and there, nothing pruned."""
    q, *stored, scale, bias, _ = sparse_rows(10, 33, device, kept=kept)
    x = torch.randn(m, 33, device=device)
    y = run(x, *stored, scale, 33, bias, "none")
    assert_linear(y, x, q, scale, bias)
    if kept == 0:
        assert torch.equal(y, bias.expand(m, 10))


def test_all_nonzeros_in_the_last_input(run, device, poisoned):
    q = torch.zeros(9, 40, dtype=torch.int8, device=device)
    q[::2, 39] = 7
    columns, starts = nonzeros(q != 0)
    x, scale = torch.randn(5, 40, device=device), torch.ones(9, device=device)
    y = run(x, q[q != 0], columns, starts, scale, 40, None, "none")
    assert torch.equal(y, x @ q.float().t())


@pytest.mark.parametrize("activation", [*activations.ACTIVATIONS, "leaky_relu:0.3", "elu:0.7"])
def test_activations(activation, device, poisoned):
    x = torch.randn(7, 48, device=device)
    q, *stored, scale, bias, _ = sparse_rows(5, 48, device)
    for call in (sparse_rows_linear, triton_sparse_rows_linear):
        assert_linear(call(x, *stored, scale, 48, bias, activation), x, q, scale, bias, activation)


@pytest.mark.parametrize("m", [2, 16, 17, 40])
def test_a_row_does_not_depend_on_the_others(run, m, device):
    """Bit for bit, over all batch sizes; the reference leaves the order of its sums to torch."""
    _, *stored, scale, bias, _ = sparse_rows(9, 70, device)
    x = torch.randn(m, 70, device=device)
    y = run(x, *stored, scale, 70, bias, "relu")
    alone = run(x[-1:], *stored, scale, 70, bias, "relu")
    assert torch.equal(y[-1:], alone) or (run is sparse_rows_linear_reference and torch.allclose(y[-1:], alone))


def test_cpu_threads(monkeypatch):
    module = pytest.importorskip("rewardzip_kernels.cpu.sparse_rows_linear")
    monkeypatch.setattr(module, "PARALLEL_WORK", 1)
    _, *stored, scale, bias, _ = sparse_rows(200, 70)
    x, before = torch.randn(300, 70), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = sparse_rows_linear(x, *stored, scale, 70, bias)
        torch.set_num_threads(2)
        assert torch.equal(sparse_rows_linear(x, *stored, scale, 70, bias), together)
        assert torch.equal(sparse_rows_linear(x[:9], *stored, scale, 70, bias), together[:9])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("m", [1, 20])
def test_inf_and_nan_reach_the_outputs_that_kept_them(run, m, device):
    q = torch.randint(1, 9, (9, 20), dtype=torch.int8, device=device)
    q[::2, 3] = 0
    columns, starts = nonzeros(q != 0)
    x, scale = torch.randn(m, 20, device=device), torch.ones(9, device=device)
    for value in (float("nan"), float("inf"), float("-inf")):
        x[0, 3] = value
        y = run(x, q[q != 0], columns, starts, scale, 20, None, "none")
        assert not y[0, 1::2].isfinite().any()
        assert y[0, 1::2].isnan().all() == (value != value)
        assert y[0, ::2].isfinite().all()
        assert y[1:].isfinite().all()


def test_strided_leading_and_empty(run, device):
    q, *stored, scale, bias, _ = sparse_rows(9, 20, device)
    x = torch.randn(6, 4, 50, device=device)[::2, :, 7:47:2]
    y = run(x, *stored, scale, 20, bias, "relu")
    assert y.shape == (3, 4, 9)
    assert_linear(y.reshape(-1, 9), x.reshape(-1, 20), q, scale, bias, "relu")
    assert run(x[:0], *stored, scale, 20, bias, "relu").shape == (0, 4, 9)
    assert run(x[0, 0], *stored, scale, 20, bias, "relu").shape == (9,)


def test_opcheck_and_gradient():
    q, *stored, scale, bias, _ = sparse_rows(9, 20)
    x = torch.randn(2, 3, 20, requires_grad=True)
    op = torch.ops.rewardzip.sparse_rows_linear.default
    torch.library.opcheck(op, (x, *stored, scale, 20, bias, "gelu"))
    for activation in ("none", "relu", "gelu"):
        (grad,) = torch.autograd.grad(sparse_rows_linear(x, *stored, scale, 20, bias, activation).sum(), x)
        exact = x.detach().double().requires_grad_()
        pre = exact @ (q.double() * scale.double()[:, None]).t() + bias.double()
        (expected,) = torch.autograd.grad(activations.apply(pre, activation).sum(), exact)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_changed_in_place():
    _, values, columns, starts, scale, bias, _ = sparse_rows(70, 20)
    x = torch.randn(5, 20)
    sparse_rows_linear(x, values, columns, starts, scale, 20, bias)
    for change in (values.neg_, lambda: starts.clamp_(max=int(starts[35]))):
        change()
        expected = sparse_rows_linear(x, values.clone(), columns.clone(), starts.clone(), scale, 20, bias)
        assert torch.equal(sparse_rows_linear(x, values, columns, starts, scale, 20, bias), expected)


STORED = [
    (lambda c, s: c[3].fill_(20), "columns lie between 0 and 20; there are 20 inputs"),
    (lambda c, s: c[3].fill_(-1), "columns lie between -1"),
    (lambda c, s: c[:2].copy_(c[:2].flip(0)), "columns of an output must rise"),
    (lambda c, s: s[0].fill_(1), "starts must rise from 0"),
    (lambda c, s: s[3].fill_(1000), "starts must rise from 0"),
    (lambda c, s: s[-1].fill_(1 << 30), "starts must rise from 0 to at most 180"),
]


@pytest.mark.parametrize(("damage", "words"), STORED, ids=[words for _, words in STORED])
def test_nonzeros_outside_the_weight_are_refused(damage, words):
    """By whatever touches memory on a CPU; on a GPU the kernel reads nothing outside."""
    _, values, columns, starts, scale, _, _ = sparse_rows(9, 20, kept=1.0)
    if len(values) < 180:  # a few of the random weights are 0
        values, (columns, starts) = torch.ones(180, dtype=torch.int8), nonzeros(torch.ones(9, 20) > 0)
    damage(columns, starts)
    for call in (check_stored, sparse_rows_linear):
        args = (
            (columns, starts, 20) if call is check_stored else (torch.randn(3, 20), values, columns, starts, scale, 20)
        )
        with pytest.raises(ValueError, match=words):
            call(*args)
    if not GPU:
        y = triton_sparse_rows_linear(torch.randn(3, 20), values, columns, starts, scale, 20)
        assert y.shape == (3, 9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(3, 19)}, ValueError, "takes 20 inputs"),
        ({"x": torch.randn(3, 20).double()}, TypeError, "float64"),
        ({"x": torch.randn(3, 20, device="meta")}, ValueError, "on cpu, x on meta"),
        ({"values": torch.zeros(9, 3)}, ValueError, "must be .nonzeros."),
        ({"values": torch.zeros(3)}, ValueError, r"they must be torch\.int16 \(3,\)"),
        ({"scale": None}, ValueError, "need a scale"),
        ({"scale": torch.ones(8)}, ValueError, r"scale has shape \(8,\)"),
        ({"starts": torch.zeros(10)}, ValueError, "must be torch.int32"),
        ({"starts": torch.zeros(1, dtype=torch.int32)}, ValueError, "1 output or more"),
        ({"in_features": 40000}, ValueError, "torch.int32 .* for 40000 inputs"),
        ({"in_features": 0}, ValueError, "in_features is 0"),
        ({"bias": torch.ones(1)}, ValueError, "bias has shape"),
        ({"activation": "swish"}, ValueError, "is not one of"),
    ],
)
def test_bad_input(change, error, words):
    _, values, columns, starts, scale, bias, _ = sparse_rows(9, 20)
    arguments = {"x": torch.randn(3, 20), "values": values, "columns": columns, "starts": starts, "scale": scale}
    with pytest.raises(error, match=words):
        sparse_rows_linear(**(arguments | {"in_features": 20, "bias": bias} | change))


def random_layer(n=40, k=23, kept=0.1, bias=True):
    return linear(torch.randn(n, k) * (torch.rand(n, k) < kept), bias)


@pytest.mark.parametrize("values", ["int8", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(values, bias, tmp_path):
    source = random_layer(bias=bias)
    layer = SparseRowsLinear.from_linear(source, values)
    assert SparseRowsLinear.fits(source.weight)
    x = torch.randn(7, 23)
    assert (layer(x) - source(x)).norm() < 0.02 * source(x).norm()
    assert not layer.weight[source.weight == 0].any()
    assert torch.equal(layer.to_linear().weight, layer.weight)
    model = nn.Sequential(layer, nn.Tanh())
    expected = model(x)
    fuse_forwards(model)
    assert type(model).rz_fused == {"0": "tanh"}
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    rz.save(model, tmp_path / "saved")
    again = rz.load(tmp_path / "saved")
    assert torch.equal(again(x), model(x))
    assert again[0].extra_repr() == layer.extra_repr()
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == torch.float16
    assert torch.equal(half.float()(x), layer(x))


def test_a_saved_layer_is_as_small_as_promised(tmp_path):
    layer = SparseRowsLinear.from_linear(random_layer(256, 512, 0.05, False))
    rz.save(nn.Sequential(layer), tmp_path / "saved")
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 3 * layer.nonzeros + 2 * 256 * 4 + 1000


def test_refresh_in_place_with_fewer_nonzeros():
    layer = SparseRowsLinear.from_linear(random_layer(kept=0.3))
    x = torch.randn(7, 23)
    layer(x)
    at = [b.data_ptr() for b in layer.buffers()]
    other = random_layer(kept=0.1)
    layer.refresh(other)
    assert [b.data_ptr() for b in layer.buffers()] == at
    assert torch.equal(layer(x), SparseRowsLinear.from_linear(other)(x))
    before = layer.weight
    with pytest.raises(ValueError, match=r"has 920 nonzeros, the packed one room for"):
        layer.refresh(linear(torch.ones(40, 23)))
    assert torch.equal(layer.weight, before)


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="values is 'int4'"):
        SparseRowsLinear(4, 4, 3, values="int4")
    with pytest.raises(ValueError, match="17 nonzeros in a weight of 4 x 4"):
        SparseRowsLinear(4, 4, 17)
    with pytest.raises(ValueError, match="beyond 65504"):
        SparseRowsLinear.from_linear(linear(torch.full((4, 4), 1e6)), "float16")
    with pytest.raises(ValueError, match="inf, NaN"):
        SparseRowsLinear.from_linear(linear(torch.full((4, 4), float("nan"))))


def test_where_it_wins():
    assert "from 95 % on" in SparseRowsLinear.wins((1024, 1024), 0.95, "cpu", "float")
    assert SparseRowsLinear.wins((1024, 1024), 0.95, "cpu", "dynamic") is None
    assert "from 98 % on" in SparseRowsLinear.wins((1024, 1024), 0.98, "cpu", "dynamic")
    assert SparseRowsLinear.wins((1024, 1024), 0.94, "cpu", "float") is None
    assert SparseRowsLinear.wins((256, 256), 0.99, "cpu", "float") is None
    assert SparseRowsLinear.wins((1024, 1024), 0.99, "cuda", "float") is None


def test_corrupt_files(tmp_path):
    layer = SparseRowsLinear.from_linear(linear(torch.ones(9, 20)))
    for damage, words in STORED:
        model = nn.Sequential(copy.deepcopy(layer))
        damage(model[0].columns, model[0].starts)
        rz.save(model, tmp_path / "saved")
        with pytest.raises(CheckpointError, match=words):
            rz.load(tmp_path / "saved")
    rz.save(nn.Sequential(layer), tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    good = config.read_text()
    for old, new in (
        ('"nonzeros": 180', '"nonzeros": 181'),
        ('"in_features": 20', '"in_features": 19'),
        ('"int8"', '"int4"'),
    ):
        assert old in good
        config.write_text(good.replace(old, new))
        with pytest.raises(CheckpointError):
            rz.load(tmp_path / "saved")


def test_dense_again():
    q, values, columns, starts, _, _, _ = sparse_rows(9, 20)
    room = torch.nn.functional.pad(values, (0, 5)), torch.nn.functional.pad(columns, (0, 5))
    assert torch.equal(dense(*room, starts, 20), q)
