"""Two thin layers: nearest for their rank, as wide as was asked, and only where that is smaller."""

import pytest
import torch
from models import mlp, packed, same_state
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.constraints import masked
from rewardzip.low_rank import decompose


@pytest.fixture(scope="module")
def model():
    return trained()


def test_the_plain_cut_is_the_nearest_matrix():
    weight = torch.randn(9, 14)
    left, values, right = decompose(weight, None)
    assert torch.allclose(left * values @ right, weight, atol=1e-5)
    rest = torch.linalg.svdvals(weight)[4:]
    cut = (left * values)[:, :4] @ right[:4]
    assert float((cut - weight).norm()) == pytest.approx(float(rest.norm()), rel=1e-4)


def test_the_weighted_cut_has_the_nearest_outputs():
    torch.manual_seed(3)
    weight, x = torch.randn(9, 14), torch.randn(300, 5) @ torch.randn(5, 14) + 0.1 * torch.randn(300, 14)
    off = {}
    for name, seen in (("plain", None), ("weighted", x)):
        left, values, right = decompose(weight, seen)
        assert torch.allclose(left * values @ right, weight, atol=1e-3)
        cut = (left * values)[:, :4] @ right[:4]
        off[name] = float((x @ (cut - weight).T).norm())
    assert off["weighted"] < 0.6 * off["plain"]
    # no matrix of rank 4 comes nearer to the outputs
    assert off["weighted"] == pytest.approx(float(torch.linalg.svdvals(x @ weight.T)[4:].norm()), rel=1e-3)


def test_rank_energy_and_error():
    layer = nn.Linear(40, 40)
    u, _, v = torch.linalg.svd(torch.randn(40, 40))
    values = 2.0 ** -torch.arange(40)
    layer.weight.data = u * values @ v
    energy = values.square().cumsum(0) / values.square().sum()
    for step, rank in (
        (rz.LowRank(rank=3), 3),
        (rz.LowRank(energy=float(energy[4]) - 1e-6), 5),
        (rz.LowRank(energy=float(energy[4]) + 1e-6), 6),
        (rz.LowRank(error=0.1), int((1 - energy > 0.01).sum()) + 1),
    ):
        thin, _ = squeeze(nn.Sequential(layer), step)
        assert thin[0][0].weight.shape == (rank, 40)
        assert thin[0][1].weight.shape == (40, rank)
        if step.error:
            assert (thin[0][1].weight @ thin[0][0].weight - layer.weight).norm() <= 0.1 * layer.weight.norm()


def test_saved_swapped_fused_restored(tmp_path, model):
    thin, notes = squeeze(model, rz.LowRank(rank=5, weighted=True), data=rows())
    assert isinstance(thin.net[0], nn.Sequential)
    assert thin.net[0][0].bias is None
    assert torch.equal(thin.net[0][1].bias, model.net[0].bias)
    assert len(notes) == 1
    assert "net.4 [1, 24] stays dense" in notes[0]
    fast, _ = squeeze(model, rz.LowRank(rank=5), rz.Quantize(8))
    assert set(packed(fast)) == {"net.0.0", "net.0.1", "net.2.0", "net.2.1"}
    for each in (thin, fast, rz.swap(thin, rz.Int8()), rz.restore(fast)):
        rz.save(each, tmp_path / "m")
        loaded = rz.load(tmp_path / "m")
        assert same_state(loaded.state_dict(), each.state_dict())
        assert torch.equal(loaded(*rows().inputs), each(*rows().inputs))
    assert error(fast, thin, rows()) < 1


def test_only_where_it_is_smaller():
    model = mlp(20, 10)
    for rank, kept in ((6, nn.Sequential), (7, nn.Linear)):  # 6 * 30 < 200 <= 7 * 30
        thin, notes = squeeze(model, rz.LowRank(rank=rank))
        assert type(thin[0]) is kept
        assert any("0 [10, 20] stays dense: rank 7 takes 210 numbers, not 200" in note for note in notes) == (rank == 7)
    assert squeeze(model, rz.LowRank(rank=1, skip="*"))[1] == []
    shared = nn.Linear(20, 20)
    thin, _ = squeeze(nn.Sequential(shared, nn.ReLU(), shared), rz.LowRank(rank=2))
    assert thin[0] is thin[2]


def test_a_masked_layer_is_left(model):
    from rewardzip.constraints import copied

    small = copied(model)
    masked(small.net[0], small.net[0].weight > 0)
    thin, notes = squeeze(small, rz.LowRank(rank=2))
    assert type(thin.net[0]) is nn.Linear
    assert "net.0 is constrained" in notes[0]
    # settled in the copy, not in the model it came from
    assert not (small.net[0].weight < 0).any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 2, "energy": 0.9}, {"rank": 0}, {"rank": 2.5}, {"energy": 1.0}, {"error": 0.0}, {"error": -1.0}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="LowRank"):
        rz.LowRank(**settings)


def test_needs_data(model):
    with pytest.raises(ValueError, match="needs data"):
        rz.LowRank(rank=2, weighted=True).check(model, None)


@pytest.mark.parametrize("step", [rz.LowRank(rank=2, weighted=True), rz.Quantize(4, rounding="compensated")])
def test_too_few_rows_to_weigh_by_are_refused(model, step):
    step.check(model, rows(24))
    with pytest.raises(ValueError, match=r"layer 'net.2' needs 24 rows of data or more, there are 23"):
        step.check(model, rows(23))
