"""Grids: the formulas, what is stored, what is computed from it, and what the choices are worth."""

import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from models import mlp, packed, same_state, swapped
from recipes import error, rows, squeeze, trained
from torch import nn

import rewardzip as rz
from rewardzip.calibrate import layer_outputs
from rewardzip.constraints import linears, masked
from rewardzip.nn import GridLinear, Int8Linear, ShiftedLinear
from rewardzip.packing import pack, packed_bytes, unpack
from rewardzip.quantize import compensated


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_packing_keeps_every_code(bits, count):
    codes = torch.randint(2**bits, (count,))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) == (count + 7) // 8 * bits
    for whole in (codes, torch.full((count,), 2**bits - 1)):
        found = unpack(pack(whole, bits), bits, (count,))
        assert found.dtype == torch.uint8
        assert torch.equal(found.long(), whole)


def test_the_affine_rule():
    weight = torch.tensor([[-1.1, 0.0, 0.5, 2.0]])
    grid = rz.Quantize(4, scheme="affine").grid(weight)
    assert grid.scale.item() == pytest.approx((2 - -1.1) / (2**4 - 1))
    assert (float(grid.low), float(grid.high)) == (-5, 10)  # zero point 5 of 0 to 15
    assert grid.codes(weight).tolist() == [[-5, 0, 2, 10]]


def test_the_symmetric_rule():
    weight = torch.tensor([[-0.9, 0.0, 0.5, 2.0], [0.1, 0.2, -0.3, 0.0]])
    grid = rz.Quantize(4).grid(weight)
    assert torch.allclose(grid.scale[:, 0], torch.tensor([2.0, 0.3]) / 7)
    assert grid.codes(weight).tolist() == [[-3, 0, 2, 7], [2, 5, -7, 0]]
    assert rz.Quantize(4, per="tensor").grid(weight).scale.item() == pytest.approx(2 / 7)
    grouped = rz.Quantize(4, per="group", group=3).grid(weight)
    assert torch.allclose(grouped.scale, torch.tensor([[0.9, 2.0], [0.3, 1e-30]]) / 7)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
def test_rounding_is_off_by_half_a_step_at_most(bits, scheme, per):
    # odd sizes, groups with a tail, a row of one sign, a row of zeros
    weight = torch.randn(9, 13)
    weight[0], weight[1] = weight[0].abs(), 0
    grid = rz.Quantize(bits, scheme=scheme, per=per, group=4).grid(weight)
    rounded, half = grid(weight).detach(), grid.spread(grid.scale, 13).detach() / 2
    assert ((rounded - weight).abs() <= half * (1 + 1e-5) + 1e-7).all()
    codes = grid.codes(weight)
    assert torch.allclose(codes * 2 * half, rounded, atol=1e-7)
    assert int((grid.high - grid.low).max()) == (2**bits - 1 if scheme == "affine" else 2**bits - 2)
    assert torch.equal(grid(torch.zeros(9, 13)), torch.zeros(9, 13))
    assert len(codes.unique()) > 1


def test_the_range_with_the_least_error():
    weight = torch.randn(8, 256)
    weight[:, 0] = 8
    errors = {
        ranges: (rz.Quantize(4, ranges=ranges).grid(weight)(weight) - weight).square().sum(1)
        for ranges in ("min-max", "percentile", "mse")
    }
    assert (errors["mse"] < 0.8 * errors["min-max"]).all()
    assert (errors["mse"] <= errors["percentile"]).all()
    cut = rz.Quantize(4, ranges="percentile", percentile=98).grid(weight)
    assert (cut.scale < 4 / 7).all()


def test_eight_bits_are_what_swap_makes(model):
    for activations in (None, "dynamic"):
        fast, notes = squeeze(model, rz.Quantize(8, activations=activations))
        plain = swapped(model, rz.Int8(activations=activations))
        assert same_state(fast.state_dict(), plain.state_dict())
        assert torch.equal(fast(*rows().inputs), plain(*rows().inputs))
        assert not notes
    fast, _ = squeeze(model, rz.Quantize(8, activations="static"), data=rows())
    plain = swapped(model, rz.Int8(activations="static"), rows().inputs)
    assert torch.allclose(fast.net[0].x_scale, plain.net[0].x_scale)
    # the second layer's rows come through the rounded first layer
    assert torch.allclose(fast.net[2].x_scale, plain.net[2].x_scale, rtol=0.02)
    assert error(fast, plain, rows()) < 1e-3


FORMS = {
    "symmetric": (rz.Quantize(4), Int8Linear),
    "tensor": (rz.Quantize(3, per="tensor"), Int8Linear),
    "affine": (rz.Quantize(5, scheme="affine"), Int8Linear),
    "affine 7": (rz.Quantize(7, scheme="affine", activations="dynamic"), Int8Linear),
    "two": (rz.Quantize(2, scalar_outputs=True), Int8Linear),
    "affine 8": (rz.Quantize(8, scheme="affine"), ShiftedLinear),
    "affine 8, tensor": (rz.Quantize(8, scheme="affine", per="tensor"), ShiftedLinear),
    "groups": (rz.Quantize(4, per="group", group=5), GridLinear),
    "affine groups": (rz.Quantize(8, scheme="affine", per="group", group=7), GridLinear),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_packed_is_what_was_on_the_grid(tmp_path, model, form):
    step, kind = FORMS[form]
    fast, _ = squeeze(model, step)
    assert {type(layer) for layer in packed(fast).values()} == {kind}
    assert len(packed(fast)) == (3 if step.scalar_outputs else 2)
    for name, layer in packed(fast).items():
        grid = step.grid(model.get_submodule(name).weight)
        assert torch.allclose(layer.weight, grid(model.get_submodule(name).weight).detach(), rtol=1e-6, atol=1e-7)
    x = rows().inputs
    if not step.activations:
        assert torch.allclose(fast(*x), rz.restore(fast)(*x), rtol=1e-4, atol=1e-4)
    rz.save(fast, tmp_path / "m")
    loaded = rz.load(tmp_path / "m")
    assert same_state(loaded.state_dict(), fast.state_dict())
    assert torch.equal(loaded(*x), fast(*x))
    assert str(rz.explain(loaded)) == str(rz.explain(fast))


@pytest.mark.parametrize("bits", range(2, 8))
def test_few_bits_are_few_bytes(tmp_path, bits):
    model = mlp(64, 64)
    fast, _ = squeeze(model, rz.Quantize(bits, skip=("2",)))
    rz.save(fast, tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert stored["0.int8_weight"].numel() == 64 + 64 * 64 * bits // 8
    assert fast[0].int8_weight.shape == (64, 64)
    assert f"{bits} bits on disk" in str(rz.explain(fast))


def test_a_shared_layer_is_packed_once(tmp_path):
    layer = nn.Linear(6, 6)
    fast, _ = squeeze(nn.Sequential(layer, nn.Tanh(), layer), rz.Quantize(3))
    rz.save(fast, tmp_path / "m")
    assert fast[0] is fast[2]
    loaded = rz.load(tmp_path / "m")
    assert loaded[0].int8_weight is loaded[2].int8_weight
    assert torch.equal(loaded(torch.ones(2, 6)), fast(torch.ones(2, 6)))


@pytest.mark.parametrize(
    "step",
    [rz.Quantize(4), rz.Quantize(4, per="group", group=8), rz.Quantize(8, scheme="affine")],
    ids=["int8", "grid", "shifted"],
)
def test_refresh_and_types(model, step):
    fast, _ = squeeze(model, step)
    other = trained(steps=5)
    rz.refresh(fast, other)
    for name, layer in packed(fast).items():
        wanted = other.get_submodule(name).weight
        assert float((layer.weight - wanted).detach().abs().max()) < 0.1 * float(wanted.detach().abs().max())
        assert torch.equal(layer.bias, other.get_submodule(name).bias)
    half = squeeze(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).bfloat16(), step)[0]
    out = half(torch.randn(5, 8).bfloat16())
    assert out.dtype == torch.bfloat16
    assert half[0].weight.dtype == torch.bfloat16
    assert half[0].bias is None
    x = torch.randn(4, 8, requires_grad=True)
    half.float()(x).sum().backward()
    assert x.grad is not None


def test_rounding_made_up_for_by_later_columns():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    x += 0.1 * torch.randn(500, 16, generator=generator)
    weight = torch.randn(8, 16, generator=generator)
    grid = rz.Quantize(3).grid(weight)
    mask = torch.rand(8, 16, generator=generator) > 0.5
    for held in (None, mask):
        start = weight if held is None else weight * held
        made, nearest = compensated(start, grid, x, held), grid(start).detach()
        change = [(x @ (w - start).T).square().mean() for w in (made, nearest)]
        assert change[0] < 0.5 * change[1]
        assert torch.allclose(grid(made), made, atol=1e-6)
        assert held is None or not made[~held].any()


def test_compensated_rounding_in_a_model(model):
    data = rows(1024)
    nearest, _ = squeeze(model, rz.Quantize(3), data=data)
    made, _ = squeeze(model, rz.Quantize(3, rounding="compensated"), data=data)
    assert error(model, made, data) < 0.7 * error(model, nearest, data)


def test_bias_correction_keeps_the_means(model):
    data = rows(1024)
    plain, _ = squeeze(model, rz.Quantize(2), data=data)
    right, _ = squeeze(model, rz.Quantize(2, correct_bias=True), data=data)
    names = ["net.0", "net.2"]
    wanted = layer_outputs(model, names, data)
    for name in names:
        off = [float((layer_outputs(rz.restore(m), [name], data)[name].mean(0) - wanted[name].mean(0)).abs().max())
               for m in (plain, right)]  # fmt: skip
        assert off[1] < 1e-4 < 1e-2 < off[0]


def test_static_ranges():
    model = mlp(8, 8)
    x = torch.randn(2000, 8)
    x[0, 0] = 100
    data = rz.Data((x,))
    scales = {
        ranges: float(squeeze(model, rz.Quantize(8, activations="static", ranges=ranges), data=data)[0][0].x_scale)
        for ranges in ("min-max", "percentile", "mse")
    }
    assert scales["min-max"] == pytest.approx(100 / 127)
    assert scales["percentile"] < 5 / 127
    # one value of 100 in 16,000 costs more cut off than a coarser step costs the others, until it does not
    assert 5 / 127 < scales["mse"] <= 100 / 127


def test_masks_stay(model):
    def pruned(step):
        from rewardzip.constraints import copied

        small = copied(model)
        for layer in linears(small).values():
            masked(layer, layer.weight.abs() > layer.weight.abs().median())
        return small, squeeze(small, step, rz.FineTune(20), data=rows())[0]

    for step in (rz.Quantize(4), rz.Quantize(4, scheme="affine"), rz.Quantize(4, rounding="compensated")):
        small, fast = pruned(step)
        for name in packed(fast):
            assert not packed(fast)[name].weight[small.get_submodule(name).weight == 0].any()
            assert packed(fast)[name].weight.any()


def test_what_stays_dense(model):
    fast, notes = squeeze(model, rz.Quantize(4, skip=("net.0",)))
    assert set(packed(fast)) == {"net.2"}
    assert not notes
    assert rz.Quantize(skip="net.0") == rz.Quantize(skip=["net.0"]) == rz.Quantize(skip=("net.0",))
    same, notes = squeeze(model, rz.Quantize(4, skip="*"))
    assert not packed(same)
    assert "no layer to quantise" in notes[0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"bits": 9}, "2 to 8"),
        ({"bits": 4.0}, "2 to 8"),
        ({"scheme": "log"}, "scheme is 'log'"),
        ({"per": "row"}, "per is 'row'"),
        ({"ranges": "all"}, "ranges is 'all'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"percentile": 0}, "percentile=0"),
        ({"group": 0}, "group=0"),
        ({"scheme": "affine", "activations": "dynamic"}, "one scale an output"),
        ({"per": "group", "activations": "static"}, "one scale an output"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        rz.Quantize(**settings)


def test_needs_data(model):
    for step in (
        rz.Quantize(activations="static"),
        rz.Quantize(rounding="compensated"),
        rz.Quantize(correct_bias=True),
    ):
        with pytest.raises(ValueError, match="needs data"):
            step.check(model, None)


def test_tampered_codes(tmp_path, model):
    folder = tmp_path / "m"
    rz.save(squeeze(model, rz.Quantize(4))[0], folder)
    config, tensors = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()

    def refused(match, change=lambda t: None, **fields):
        changed = {**config, "layers": {**config["layers"], "net.0": {**config["layers"]["net.0"], **fields}}}
        (folder / "config.json").write_text(json.dumps(changed))
        (folder / "model.safetensors").write_bytes(tensors)
        stored = {k: v.clone() for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}
        change(stored)
        safetensors.torch.save_file(stored, folder / "model.safetensors")
        with pytest.raises(rz.CheckpointError, match=match):
            rz.load(folder)

    name = "net.0.int8_weight"
    refused("should be torch.uint8", bits=3)
    refused("int8", bits=8)
    refused("cannot be made", bits=1)
    refused("cannot be made", bits=True)
    refused("should be torch.uint8", lambda t: t.update({name: t[name][:-1]}))
    refused("nothing", lambda t: t.pop(name))
    refused("beyond -127 to 127", lambda t: t[name][:1].fill_(120))
    refused("beyond -127 to 127", lambda t: t[name][:1].fill_(128))


def test_codes_wider_than_they_may_be_are_not_saved(tmp_path, model):
    fast, _ = squeeze(model, rz.Quantize(4))
    fast.net[0].int8_weight[0, 0] = 100
    with pytest.raises(ValueError, match="has 4 bits"):
        rz.save(fast, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_grid_linear_is_its_formula():
    linear = nn.Linear(7, 5)
    layer = GridLinear.from_codes(
        linear, torch.full((5, 7), -3), torch.full((5, 2), 0.5), torch.full((5, 2), -3.0), bits=2, group=4
    )
    x = torch.randn(3, 7)
    assert torch.equal(layer.weight, torch.full((5, 7), -1.5))
    assert layer.weight_bytes() == layer.codes.numel() == 10, "35 codes of 2 bits, in eights"
    assert torch.allclose(layer(x, "relu"), F.relu(F.linear(x, layer.weight, linear.bias)))
    with pytest.raises(ValueError, match="bits=9"):
        GridLinear(4, 4, bits=9)
    with pytest.raises(ValueError, match="bits is 1"):
        Int8Linear(4, 4, bits=1)


@pytest.mark.parametrize("rows", [(), (1,), (3, 2)], ids=str)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 0.0), (-0.3, 1.0), (-1.0, 1.0)], ids=str)
def test_shifted_linear_is_its_formula_wherever_zero_lies(ends, rows):
    """Weights all of one sign are moved the most, 128 either way, from one end of a byte to the other."""
    torch.manual_seed(0)
    linear = nn.Linear(37, 5)
    with torch.no_grad():
        linear.weight.uniform_(*ends)
        linear.weight[:, 0], linear.weight[:, 1] = ends
    layer = ShiftedLinear(37, 5)
    layer.refresh(linear)
    step = float(layer.scale[0])
    assert step == pytest.approx((max(ends[1], 0) - min(ends[0], 0)) / 255)
    assert float((layer.weight - linear.weight).detach().abs().max()) <= 0.51 * step
    assert layer.weight_bytes() == layer.int8_weight.numel()
    x = torch.randn(*rows, 37)
    weight, bias = layer.weight.double(), linear.bias.double()
    wanted = F.relu(F.linear(x.double(), weight, bias))
    # what the sum of the row is multiplied by may cancel against the codes
    sizes = F.linear(x.double().abs(), weight.abs() + 128 * step, bias.abs())
    limit = 4 * 2**-24 * (wanted + 37**0.5 * sizes)
    assert bool(((layer(x, "relu") - wanted).abs() <= limit).all())


def test_eight_bits_with_a_zero_point_make_no_dense_weight(model, monkeypatch):
    fast, _ = squeeze(model, rz.Quantize(8, scheme="affine"))
    expected = rz.restore(fast)(*rows().inputs)
    monkeypatch.setattr(ShiftedLinear, "weight", property(lambda layer: pytest.fail("made its weight anew")))
    assert torch.allclose(fast(*rows().inputs), expected, rtol=1e-4, atol=1e-4)
