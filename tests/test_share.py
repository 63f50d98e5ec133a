"""Shared values, shared neurons, shared layers: exact where nothing is lost, small on disk, trained together."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import mlp, packed, same_state
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.clustering import clusters
from rewardzip.constraints import copied, masked
from rewardzip.nn import SharedLinear


@pytest.fixture(scope="module")
def model():
    return trained()


def test_clusters_found_again():
    centres = torch.linspace(-1, 1, 16)
    weight = centres[torch.randint(16, (50, 40))]
    indices, codebook = clusters(weight, 16)
    assert torch.allclose(codebook[indices], weight, atol=1e-6)
    noisy = torch.randn(64, 64)
    indices, codebook = clusters(noisy, 32)
    assert torch.equal(codebook, codebook.sort().values)
    # each weight has the nearest entry, each entry is the mean of its weights: nothing left to gain
    assert torch.equal(indices, (noisy[..., None] - codebook).abs().argmin(-1))
    uniform = torch.linspace(float(noisy.min()), float(noisy.max()), 32)
    even = (noisy[..., None] - uniform).abs().amin(-1).square().mean()
    assert (codebook[indices] - noisy).square().mean() < 0.6 * even
    assert torch.equal(clusters(noisy, 32)[0], indices)


@pytest.mark.parametrize(("entries", "bits"), [(16, 4), (17, 5), (100, 7), (256, 8)])
def test_codebooks_are_stored_small_and_computed_right(tmp_path, entries, bits):
    model = mlp(64, 64)
    fast, _ = squeeze(model, rz.Share(entries, skip=("2",)))
    layer = fast[0]
    assert type(layer) is SharedLinear
    assert len(layer.weight.unique()) <= entries
    x = torch.randn(5, 64)
    assert torch.allclose(fast(x), fast[2](F.relu(F.linear(x, layer.weight, layer.bias))), atol=1e-6)
    rz.save(fast, tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert stored["0.indices"].numel() == 64 * 64 * bits // 8
    assert layer.indices.numel() == 64 * 64 * bits // 8
    assert layer.weight_bytes() == 64 * 64 * bits // 8 + 4 * entries
    loaded = rz.load(tmp_path / "m")
    assert same_state(loaded.state_dict(), fast.state_dict())
    assert torch.equal(loaded(x), fast(x))
    assert "codebook" in str(rz.explain(loaded))
    assert torch.equal(rz.restore(fast)[0].weight, layer.weight)


def test_refresh(model):
    fast, other = squeeze(model, rz.Share(64))[0], trained(steps=5)
    rz.refresh(fast, other)
    for name, layer in packed(fast).items():
        assert (layer.weight - other.get_submodule(name).weight).abs().max() < 0.1
    x = torch.randn(4, 6, requires_grad=True)
    fast(x, torch.zeros(4, 2)).sum().backward()
    assert x.grad.any()


def test_training_moves_the_codebook_and_keeps_the_sharing(model):
    data = rows(1024)
    plain, _ = squeeze(model, rz.Share(16), data=data)
    tuned, _ = squeeze(model, rz.Share(16), rz.FineTune(200), data=data)
    assert error(model, tuned, data) < 0.5 * error(model, plain, data)
    for name, layer in packed(tuned).items():
        assert torch.equal(layer.indices, plain.get_submodule(name).indices)
        assert not torch.equal(layer.codebook, plain.get_submodule(name).codebook)
        assert len(layer.weight.unique()) <= 16


def test_zeros_of_a_mask_stay_zeros_in_a_codebook(model):
    small = copied(model)
    mask = small.net[2].weight.abs() > small.net[2].weight.abs().median()
    masked(small.net[2], mask)
    fast, _ = squeeze(small, rz.Share(16), rz.FineTune(30), data=rows())
    weight = fast.net[2].weight
    assert torch.equal(weight != 0, mask)
    assert type(fast.net[2]) is SharedLinear


def test_a_codebook_that_is_not_smaller_is_not_made():
    # 2 x 4 weights: 32 bytes, the codebook alone is 64
    same, notes = squeeze(nn.Sequential(nn.Linear(4, 2)), rz.Share(16))
    assert not packed(same)
    assert "would not be smaller" in notes[0]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_twin_neurons_become_one_and_nothing_changes(activation):
    torch.manual_seed(0)
    model = mlp(6, 12, 10, activation=activation)
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = model[0].weight[2], model[0].bias[2]
        if activation is nn.ReLU:
            # twice another's: ReLU passes the factor on
            model[0].weight[7], model[0].bias[7] = 2 * model[0].weight[3], 2 * model[0].bias[3]
        model[0].weight[9], model[0].bias[9] = 0, 0.7  # never changes
    data = rz.Data((torch.randn(500, 6),))
    small, notes = squeeze(model, rz.Share(of="neurons", similarity=0.9999), data=data)
    gone = 3 if activation is nn.ReLU else 2
    assert small[0].out_features == small[2].in_features == 12 - gone
    assert f"{gone} of 12 neurons of 0 merged" in notes[0]
    assert torch.allclose(small(*data.inputs), model(*data.inputs), atol=1e-4)


def test_neurons_alike_are_merged_with_little_lost(model):
    data = rows(1024)
    small, _ = squeeze(model, rz.Share(of="neurons", similarity=0.95), data=data)
    merged = 48 - small.net[0].out_features - small.net[2].out_features
    assert merged >= 2
    variance = model(*data.inputs).var().item()
    assert error(model, small, data) < 0.1 * variance


def test_neurons_between_which_something_stands_are_left():
    data = rz.Data((torch.randn(50, 6),))
    norm = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    shared = nn.Linear(6, 6)
    for model in (norm, nn.Sequential(shared, nn.ReLU(), shared)):
        same, notes = squeeze(model, rz.Share(of="neurons", similarity=0.0), data=data)
        assert torch.equal(same(*data.inputs), model(*data.inputs))
        assert "found no two layers" in notes[0]


def test_layers_become_one(tmp_path):
    torch.manual_seed(0)
    model = mlp(8, 8, 8, 8)
    with torch.no_grad():
        model[4].weight.copy_(model[2].weight + 0.001 * torch.randn(8, 8))
    small, notes = squeeze(model, rz.Share(of="layers", similarity=0.99))
    assert small[2] is small[4]
    assert small[0] is not small[2]
    assert torch.allclose(small[2].weight, (model[2].weight + model[4].weight) / 2)
    assert any("one layer from here on" in note for note in notes)
    assert any("left apart" in note for note in notes)
    rz.save(small, tmp_path / "m")
    assert len(safetensors.torch.load_file(tmp_path / "m/model.safetensors")) == 6
    loaded = rz.load(tmp_path / "m")
    assert loaded[2].weight is loaded[4].weight
    fast, _ = squeeze(model, rz.Share(of="layers", similarity=0.99), rz.Quantize(8))
    assert fast[2] is fast[4]


def test_bad_settings(model):
    for settings in ({"clusters": 15}, {"clusters": 257}, {"clusters": 16.0}, {"of": "heads"}, {"similarity": 1.5}):
        with pytest.raises(ValueError, match="Share"):
            rz.Share(**settings)
    with pytest.raises(ValueError, match="needs data"):
        rz.Share(of="neurons").check(model, None)
    with pytest.raises(ValueError, match="257 entries"):
        SharedLinear(4, 4, entries=257)


def test_an_index_past_the_codebook_reads_its_end(tmp_path):
    fast, _ = squeeze(mlp(16, 16), rz.Share(17))
    fast[0].indices.fill_(255)
    assert (fast[0].weight == fast[0].codebook[-1]).all()
