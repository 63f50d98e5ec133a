"""Pruned models from end to end: the forms that swap chooses, what is on disk, other runtimes, a layer in a chain."""

import copy
import json

import pytest
import torch
from models import packed, swapped
from torch import nn
from typer.testing import CliRunner

import rewardzip as rz
from rewardzip.chain import FEW, Pruned, Wide
from rewardzip.cli import app
from rewardzip.export import unfused
from rewardzip.nn import BlockSparseLinear, Int8Linear, Sparse24Linear, SparseRowsLinear
from rewardzip.parity import error_bound

LAYERS = {"0": ("2:4", None), "2": ("block", 0.9), "4": ("unstructured", 0.99)}


def pruned(model, layers):
    """Each layer by a pattern of its own."""
    for name, (pattern, amount) in layers.items():
        others = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != name)
        model = rz.prune(model, rz.Prune(pattern, amount, skip=others), progress=False)
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 2048), nn.ReLU()
    return pruned(nn.Sequential(*layers, nn.Linear(2048, 1)).eval().requires_grad_(False), LAYERS)


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_pruned_swapped_explained_saved_and_loaded(model, activations, tmp_path):
    config = rz.Int8(activations=activations)
    fast, x = rz.swap(model, config), torch.randn(9, 1024)
    assert [type(m) for m in packed(fast).values()] == [Sparse24Linear, BlockSparseLinear, SparseRowsLinear]
    wanted, y = model(x), fast(x)
    assert (y - wanted).norm() < 0.05 * (wanted - wanted.mean()).norm()

    told = {layer.name: layer for layer in rz.explain(fast)}
    assert [(told[n].op, told[n].pattern, told[n].activation) for n in LAYERS] == [
        ("Sparse24Linear", "2:4", "relu"),
        ("BlockSparseLinear", "blocks 16x4", "relu"),
        ("SparseRowsLinear", "unstructured", "relu"),
    ]
    for name, reason in zip(LAYERS, ("2 of every 4", "16x4 blocks are zero", "99.0 % of its weights"), strict=True):
        assert reason in told[name].why

    rz.save(fast, tmp_path / "fast")
    again = rz.load(tmp_path / "fast")
    assert torch.equal(again(x), y)
    assert str(rz.explain(again)) == str(rz.explain(fast))

    skeleton = copy.deepcopy(model)
    assert torch.equal(rz.load(tmp_path / "fast", into=skeleton)(x), y)

    dense = rz.restore(again)
    assert {type(m) for m in dense.modules()} == {nn.Sequential, nn.Linear, nn.ReLU}
    for name, layer in packed(fast).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.weight)
    other = rz.restore(again)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    rz.refresh(again, other)
    assert torch.equal(again(x), rz.swap(other, config)(x))


# for 1024 x 1024 weights: 5 bits each; 10 % of the 16384 blocks, an index each, and where the 64 block rows begin
THEORY = {"2:4": (None, 1024 * 1024 * 5 // 8), "block": (0.9, 1638 * (16 * 4 + 4) + 4 * 65)}


@pytest.mark.parametrize("pattern", THEORY)
def test_the_file_is_as_small_as_theory_says(pattern, tmp_path):
    amount, theory = THEORY[pattern]
    dense = pruned(nn.Sequential(nn.Linear(1024, 1024)).eval(), {"0": (pattern, amount)})
    rz.save(rz.swap(dense, rz.Int8()), tmp_path / "fast")
    (layer,) = rz.explain(rz.load(tmp_path / "fast"))
    scales_and_biases = 2 * 4 * 1024
    assert (layer.bytes_before, layer.bytes_after) == (4 * 1025 * 1024, theory + scales_and_biases)
    assert layer.bytes_theory == theory
    stored = (tmp_path / "fast" / "model.safetensors").stat().st_size
    # the file's header names the tensors
    assert 0 <= stored - theory - scales_and_biases < 1024

    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "fast")])
    assert told.exit_code == 0, told.output
    for words in (
        "bytes before",
        "after",
        "by theory",
        str(4 * 1025 * 1024),
        str(theory + scales_and_biases),
        str(theory),
    ):
        assert words in told.output
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "fast"), "--json"])
    assert json.loads(told.output)[0]["bytes_theory"] == theory


def linear(pattern, n=48, k=64, amount=0.7):
    amount = None if pattern == "2:4" else amount
    return pruned(nn.Sequential(nn.Linear(k, n)).requires_grad_(False), {"0": (pattern, amount)})[0]


# what is packed, and whether its weights are int8
PACKED = {
    "2:4 int8": (lambda: Sparse24Linear.from_linear(linear("2:4")), True),
    "2:4 int8 x int8": (lambda: Sparse24Linear.from_linear(linear("2:4"), rows="dynamic"), True),
    "2:4 float16": (lambda: Sparse24Linear.from_linear(linear("2:4"), "float16"), False),
    "rows int8": (lambda: SparseRowsLinear.from_linear(linear("unstructured")), True),
    "rows float32": (lambda: SparseRowsLinear.from_linear(linear("unstructured"), "float32"), False),
    "blocks int8": (lambda: BlockSparseLinear.from_linear(linear("block")), True),
    "blocks int8 x int8": (lambda: BlockSparseLinear.from_linear(linear("block"), rows="dynamic"), True),
    "blocks bfloat16": (lambda: BlockSparseLinear.from_linear(linear("block"), values="bfloat16"), False),
}


@pytest.mark.parametrize("name", PACKED)
def test_export(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    make, is_int8 = PACKED[name]
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), make(), nn.ReLU(), nn.Linear(48, 2)).eval()
    x = torch.randn(30, 5)
    # the file is written only if its outputs are within the bound
    made = rz.export(model, tmp_path / "model.onnx", x)
    assert made.bound < 0.02
    weights = {
        t.data_type: list(t.dims) for t in onnx.load(tmp_path / "model.onnx").graph.initializer if len(t.dims) > 1
    }
    assert (sorted(weights.get(onnx.TensorProto.INT8, [])) == [48, 64]) == is_int8
    assert rz.export(model, tmp_path / "model.pt2", x).error == 0
    program = torch.export.load(tmp_path / "model.pt2")
    op = {"2:4": "sparse24_linear", "rows": "sparse_rows_linear", "blocks": "block_sparse_linear"}[name.split()[0]]
    assert f"rewardzip.{op}.default" in [str(node.target) for node in program.graph.nodes]
    for rows in (1, 200):
        x = torch.randn(rows, 5)
        with torch.no_grad():
            assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("make", [make for make, _ in PACKED.values()], ids=list(PACKED))
def test_filled_layers_compute_the_same(make):
    layer = make()
    twin, x = layer.filled(), torch.randn(6, 64)
    assert type(twin) is (nn.Linear if layer.scale is None else Int8Linear)
    assert torch.equal(twin.weight, layer.weight)
    assert torch.allclose(twin(x), layer(x), rtol=1e-5, atol=1e-5)


def chained(gone, hidden=(256, 256)):
    """A reward net that is one call but for the zeros of its middle layer."""
    model = rz.RewardMLP(17, 6, hidden).eval().requires_grad_(False)
    return pruned(model, {"net.2": ("block", gone)}) if gone else model


@pytest.mark.parametrize("hidden", [(256, 256), (300, 300)])
@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_a_pruned_layer_stays_in_the_call_while_rows_are_few(activations, hidden, monkeypatch):
    model, calls = chained(0.8, hidden), []
    fast = rz.swap(model, rz.Int8(activations=activations))
    layer, (chain,) = fast.net[2], type(fast.net).rz_chains
    assert (type(layer), type(chain)) == (BlockSparseLinear, Pruned)
    few = FEW[activations or "float"] // (23 * hidden[0] + hidden[0] * hidden[1] + hidden[1])
    assert few == chain.few > 10
    assert sum(f"one call on a CPU up to {few} rows" in told.why for told in rz.explain(fast)) == 3
    monkeypatch.setattr(chain, "one_by_one", lambda *x: calls.append(len(x[0])) or Pruned.one_by_one(chain, *x))
    inputs = torch.randn(few + 1, 17), torch.randn(few + 1, 6)
    (bound,) = error_bound(unfused(fast), inputs, torch.float32)
    with torch.no_grad():
        y, one_call = fast(*inputs), fast(*(x[:few] for x in inputs))
    assert calls == [few + 1]
    assert ((y[:few] - one_call).abs() <= bound[:few]).all()
    # the call's own copy of the weights follows the layer's
    other = rz.restore(fast)
    with torch.no_grad():
        other.net[2].weight.mul_(-0.5)
    rz.refresh(fast, other)
    again = rz.swap(other, rz.Int8(activations=activations))
    with torch.no_grad():
        for rows in (few, few + 1):
            assert torch.equal(fast(*(x[:rows] for x in inputs)), again(*(x[:rows] for x in inputs)))
        assert torch.equal(fast(inputs[0][:, None], inputs[1][:, None])[:, 0], fast(*inputs))


def test_which_layers_stay_in_one_call():
    assert type(swapped(chained(0.7)).net[2]) is Int8Linear
    # where a last layer rounds its rows, it would round them in one of the two ways only
    last = rz.swap(chained(0.8), rz.Int8(activations="dynamic", scalar_outputs=True))
    assert type(last.net[2]) is BlockSparseLinear
    assert not any(type(chain) is Pruned for chain in getattr(type(last.net), "rz_chains", []))
    # more weights than one call takes: those in front of the blocks still go together
    front = [part for k, n in ((20, 300), (300, 300), (300, 900)) for part in (nn.Linear(k, n), nn.ReLU())]
    fast = swapped(nn.Sequential(*front, linear("block", 900, 900, 0.9), nn.ReLU(), nn.Linear(900, 1)).eval())
    assert [type(m) for m in packed(fast).values()] == [Int8Linear] * 3 + [BlockSparseLinear]
    assert [(type(chain), len(chain.steps)) for chain in type(fast).rz_chains] == [(Wide, 3), (Pruned, 2)]


def test_an_ensemble_of_pruned_models_is_one_launch():
    members = [chained(0.8) for _ in range(2)]
    fast, inputs = rz.fuse_ensemble(members, rz.Int8()), (torch.randn(40, 17), torch.randn(40, 6))
    for y, member in zip(fast(*inputs), members, strict=True):
        assert torch.allclose(y, rz.swap(member, rz.Int8())(*inputs), rtol=1e-4, atol=1e-5)
