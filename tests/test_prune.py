"""Masks: the right weights go, stay gone under any optimiser, and what cannot be pruned is refused untouched."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from models import mlp, same_state, swapped
from properties import given, settings, st
from torch import nn
from torch.nn.utils import prune as torch_prune

import rewardzip as rz
from rewardzip import constraints
from rewardzip.fidelity import pair_agreement
from rewardzip.importance import keep_highest, keep_of_each, scored, spread
from rewardzip.moments import damped, least_squares, moments
from rewardzip.nn import BlockSparseLinear
from rewardzip.steps import Work, from_dict
from rewardzip_kernels.blocks import occupied


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def zeros(model):
    """The share of zeros of each linear layer, by name."""
    return {n: float((m.weight == 0).float().mean()) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def rows(n=400, k=12):
    return torch.randn(n, k) @ torch.randn(k, k)


# which weights go


def test_unstructured_takes_the_smallest_of_each_layer():
    model = mlp(12, 16, 8)
    pruned = rz.prune(model, rz.Prune("unstructured", 0.75))
    for before, after in zip(model[:-1:2], pruned[:-1:2], strict=True):
        gone = after.weight == 0
        assert gone.sum() == round(0.75 * gone.numel())
        assert before.weight[gone].abs().max() <= before.weight[~gone].abs().min()
        assert torch.equal(after.weight[~gone], before.weight[~gone])


def test_over_the_whole_model_the_smaller_layer_gives_more():
    model = mlp(12, 16, 16)
    with torch.no_grad():
        model[0].weight.mul_(0.3)
    shares = zeros(rz.prune(model, rz.Prune("unstructured", 0.5, scope="model")))
    assert shares["0"] > 0.7
    assert shares["2"] < 0.3
    total = (shares["0"] * 12 * 16 + shares["2"] * 16 * 16 + shares["4"] * 16 * 3) / (12 * 16 + 16 * 16 + 16 * 3)
    assert total == pytest.approx(0.5, abs=0.002)


def test_over_the_whole_model_inputs_of_another_scale_compare():
    step = rz.Prune("unstructured", 0.5, importance="activation", scope="model")
    shares = zeros(rz.prune(mlp(12, 16, 16, activation=nn.Tanh), step, 1e-3 * rows()))
    assert all(0.2 < share < 0.8 for share in shares.values())


def test_a_threshold_takes_what_is_below_it():
    model = mlp(12, 16)
    pruned = rz.prune(model, rz.Prune("unstructured", threshold=0.1))
    for before, after in zip(model[::2], pruned[::2], strict=True):
        assert torch.equal(after.weight == 0, before.weight.abs() < 0.1)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 4)])
@pytest.mark.parametrize("importance", ["magnitude", "activation", "second-order", "random"])
def test_n_of_m_stay(n, m, importance):
    # 18 inputs: the last group of 4 and of 8 is short
    model, x = mlp(18, 16), rows(k=18)
    weight = rz.prune(model, rz.Prune(f"{n}:{m}", importance=importance), x)[0].weight
    padded = torch.nn.functional.pad(weight, (0, -18 % m)).view(16, -1, m)
    kept = (padded != 0).sum(-1)
    assert (kept[:, : 18 // m] == n).all()
    assert (kept <= n).all()


def test_blocks_are_those_of_the_device():
    kept = constraints.settle(rz.prune(nn.Linear(64, 64), rz.Prune("block", 0.5))).weight != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(kept, spread(occupied(kept, (16, 4)), (16, 4), kept.shape))
    there = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    assert rz.Prune("block", 0.5)._block_of(there) == (64, 64)
    assert rz.Prune("block", 0.5, block=(8, 8))._block_of(there) == (8, 8)
    assert BlockSparseLinear(128, 128).block == BlockSparseLinear.from_linear(nn.Linear(128, 128)).block == (16, 4)


@pytest.mark.parametrize("block", [(16, 4), (4, 1), (16, 16), (5, 7), (64, 64)])
@pytest.mark.parametrize("importance", ["magnitude", "activation", "second-order", "random"])
def test_blocks_go_whole(block, importance):
    model, x = mlp(70, 130), rows(k=70)
    weight = rz.prune(model, rz.Prune("block", 0.5, block=block, importance=importance), x)[0].weight
    alive = [bool(b.any()) for a in weight.split(block[0]) for b in a.split(block[1], 1)]
    dead = [bool((b == 0).any()) for a in weight.split(block[0]) for b in a.split(block[1], 1)]
    assert sum(alive) == len(alive) - round(0.5 * len(alive))
    assert [not d for d in dead] == alive


def test_part_blocks_are_judged_by_their_mean():
    weight = torch.ones(17, 5, dtype=torch.float64)
    weight[16:] = 2.0
    generator = torch.Generator()
    scores = scored(weight, "magnitude", None, generator, (16, 4))
    assert scores.tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_activation_sees_the_inputs():
    """A large weight on an input that is always small goes before a small weight on a large one."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.1]]).expand(4, 2))
    x = torch.randn(100, 2) * torch.tensor([0.01, 10.0])
    assert (rz.prune(model, rz.Prune("unstructured", 0.5), x)[0].weight[:, 1] == 0).all()
    wanda = rz.prune(model, rz.Prune("unstructured", 0.5, importance="activation"), x)
    assert (wanda[0].weight[:, 0] == 0).all()


def test_second_order_makes_up_for_what_it_takes():
    """Two inputs are nearly equal: one weight goes, the other becomes the sum."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    x = torch.randn(2000, 3)
    x[:, 1] = x[:, 0] + 0.01 * torch.randn(2000)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.9, 2.0], [0.9, 1.0, -2.0]]))
    pruned = rz.prune(model, rz.Prune("unstructured", 1 / 3, importance="second-order"), x)
    weight = pruned[0].weight.detach()
    assert ((weight[:, :2] == 0).sum(1) == 1).all()
    assert torch.allclose(weight[:, :2].sum(1), torch.tensor([1.9, 1.9]), atol=0.02)
    assert torch.allclose(weight[:, 2], torch.tensor([2.0, -2.0]), atol=0.02)
    plain = rz.prune(model, rz.Prune("unstructured", 1 / 3), x)
    assert (pruned(x) - model(x)).norm() < 0.05 * (plain(x) - model(x)).norm()


def test_masked_least_squares_against_a_solver_row_by_row():
    x = rows(300, 20).double()
    own = x.T @ x / len(x)
    weight = torch.randn(6, 20, dtype=torch.float64)
    free = torch.rand(6, 20) > 0.5
    found = least_squares(weight, own, weight @ own, free)
    assert (found[~free] == 0).all()
    for i in range(6):
        s = free[i]
        exact = torch.linalg.solve(damped(own)[s][:, s], (weight @ damped(own))[i, s])
        assert torch.allclose(found[i, s], exact, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_the_inputs():
    model, x = mlp(12, 16), rows(2500)
    found = moments(model, ["2", "0"], rz.Data((x,)))
    assert list(found) == ["0", "2"], "in the order in which they run"
    hidden = torch.relu(model[0](x)).detach().double()
    assert found["2"].rows == 2500
    assert torch.allclose(found["2"].mean, hidden.mean(0), atol=1e-6)
    assert torch.allclose(found["2"].second, hidden.T @ hidden / 2500, atol=1e-5)
    assert torch.allclose(found["2"].covariance, hidden.T.cov(correction=0), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**16), st.data())
def test_masks_have_the_promised_counts(n, k, seed, draw):
    scores = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    removed = draw.draw(st.integers(0, n * k))
    mask = keep_highest(scores, removed)
    assert int((~mask).sum()) == removed
    if 0 < removed < n * k:
        assert scores[~mask].max() <= scores[mask].min()
    m = draw.draw(st.integers(2, 8))
    kept = draw.draw(st.integers(1, m - 1))
    groups = keep_of_each(scores, kept, m)
    for g, s in zip(groups.split(m, 1), scores.split(m, 1), strict=True):
        assert (g.sum(1) == min(kept, g.shape[1])).all()
        if g.shape[1] > kept:
            lowest = s.masked_fill(~g, torch.inf).amin(1)
            assert (s.masked_fill(g, -torch.inf).amax(1) <= lowest).all()


def test_random_is_a_matter_of_the_seed():
    model = mlp(12, 16)
    runs = [rz.prune(model, rz.Prune("unstructured", 0.5, importance="random"), seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0][0].weight, runs[1][0].weight)
    assert not torch.equal(runs[0][0].weight, runs[2][0].weight)


def test_heads_and_skipped_layers_are_left():
    model = rz.RewardMLP(3, 1, (16, 16))
    shares = zeros(rz.prune(model, rz.Prune("unstructured", 0.5, skip="net.2")))
    assert shares == {"net.0": 0.5, "net.2": 0.0, "net.4": 0.0}


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utils.Conv1D(16, 8), nn.ReLU(), nn.Linear(16, 1))
    x = rows(200, 8)
    for importance in ("magnitude", "second-order"):
        weight = rz.prune(model, rz.Prune("2:4", importance=importance), x)[0].weight
        assert weight.shape == (8, 16)
        assert ((weight.t().reshape(16, 2, 4) != 0).sum(-1) == 2).all()


def test_every_linear_layer_of_a_language_model_reward():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 32}
    config = transformers.GPT2Config(**sizes, num_labels=1, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    tokens = torch.randint(1, 32, (64, 8))
    before = model(tokens).logits
    for importance in ("magnitude", "second-order"):
        pruned = rz.prune(model, rz.Prune("2:4", importance=importance), rz.Data((tokens,)))
        shares = [
            float((m.weight == 0).float().mean()) for n, m in pruned.named_modules() if n.endswith(("c_attn", "c_fc"))
        ]
        assert shares == [0.5, 0.5]
        assert pruned(tokens).logits.isfinite().all()
    assert torch.equal(model(tokens).logits, before)


# masks hold

OPTIMISERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "Adam with weight decay": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_masked_model_trains_and_stays_masked(optimiser):
    model = rz.prune(mlp(12, 16, 16), rz.Prune("unstructured", 0.6))
    masks = [m.weight == 0 for m in model[::2]]
    assert all(mask.sum() == round(0.6 * mask.numel()) for mask in masks)
    before, optim, x = model[0].weight.clone(), OPTIMISERS[optimiser](model.parameters()), rows()
    for _ in range(20):
        optim.zero_grad()
        model(x).square().mean().backward()
        optim.step()
    for layer, mask in zip(model[::2], masks, strict=True):
        assert (layer.weight[mask] == 0).all()
        assert (layer.weight[~mask] != 0).all()
    assert not torch.equal(before, model[0].weight)
    settled = constraints.settle(constraints.copied(model))
    assert type(settled[0]) is nn.Linear
    assert torch.equal(settled[0].weight, model[0].weight)


def test_fit_trains_under_masks():
    model = rz.prune(rz.RewardMLP(3, 2, (32,)), rz.Prune("block", 0.5, block=(8, 1)))
    gone = model.net[0].weight == 0
    assert gone.sum() == 80
    s, a = torch.randn(256, 3), torch.randn(256, 2)
    losses = rz.fit(model, (s, a, s[:, 0] * a[:, 0]), steps=100, learning_rate=1e-2, progress=False)
    assert losses[-1] < losses[0]
    assert (model.net[0].weight[gone] == 0).all()


def test_a_changed_copy_leaves_the_original_alone():
    """Copies of a parametrised module share a class: torch takes the weight from all of them when one is settled."""
    masked = rz.prune(mlp(12, 16), rz.Prune("unstructured", 0.5))
    x = rows()
    before = masked(x)
    first, second = copy.deepcopy(masked), copy.deepcopy(masked)
    constraints.settle(first)
    constraints.masked(second[0], torch.arange(16) > 3, "bias")
    assert torch.equal(masked(x), before)
    assert torch.equal(first(x), before)
    assert (second[0].bias[:4] == 0).all()
    assert constraints.masks(masked[0]).keys() == {"weight"}


def test_swap_save_and_refresh_take_masked_models(tmp_path):
    model = rz.prune(rz.RewardMLP(3, 1, (32, 32)).eval(), rz.Prune("unstructured", 0.5))
    inputs = torch.randn(9, 3), torch.randn(9, 1)
    plain = constraints.settle(constraints.copied(model))
    fast, wanted = rz.swap(model, rz.Int8()), rz.swap(plain, rz.Int8())
    assert torch.equal(fast(*inputs), wanted(*inputs))
    assert next(e.why for e in rz.explain(model)) == "not chosen"
    rz.save(model, tmp_path / "saved")
    loaded = rz.load(tmp_path / "saved")
    assert same_state(dict(loaded.state_dict()), dict(plain.state_dict()))
    assert constraints.masks(model.net[0]).keys() == {"weight"}, "masks still held after all of it"
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    rz.refresh(fast, model)
    assert torch.equal(fast(*inputs), swapped(constraints.settle(constraints.copied(model)))(*inputs))
    again = rz.swap(model, rz.Int8(), inplace=True)
    assert torch.equal(again(*inputs), fast(*inputs))


# models that came pruned


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("importance", ["magnitude", "second-order", "random"])
def test_zeros_of_torch_prune_stay(permanent, importance):
    model, x = mlp(12, 16, 16), rows()
    for layer in (model[0], model[2]):
        torch_prune.random_unstructured(layer, "weight", 0.3)
        torch_prune.l1_unstructured(layer, "bias", 0.25)
        if permanent:
            torch_prune.remove(layer, "weight")
    model(x)
    before = copy.deepcopy(model.state_dict())
    gone = model[0].weight == 0
    pruned = rz.prune(model, rz.Prune("unstructured", 0.5, importance=importance, rounds=2, finetune_steps=20), x)
    assert (pruned[0].weight[gone] == 0).all()
    assert zeros(pruned)["0"] == pytest.approx(0.5, abs=0.01), "the zeros that were there count"
    assert (pruned[0].bias == 0).sum() == 4, "masks on the bias hold as well"
    assert same_state(before, model.state_dict())
    less = rz.prune(model, rz.Prune("unstructured", 0.1), x)
    assert torch.equal(less[0].weight == 0, gone), "less than there was changes nothing"


def test_masks_of_the_users_own():
    model = mlp(12, 16)
    mask = torch.rand(16, 12) > 0.5
    pruned = rz.prune(model, masks={"0": mask})
    assert torch.equal(pruned[0].weight, model[0].weight * mask)
    twice = rz.prune(pruned, masks={"0": torch.arange(12).expand(16, 12) > 5})
    assert (twice[0].weight[:, :6] == 0).all()
    assert torch.equal(twice[0].weight[:, 6:], pruned[0].weight[:, 6:])


# rounds and fine-tuning


def test_rounds_end_at_the_amount_and_give_most_first(monkeypatch):
    shares = []
    monkeypatch.setattr("rewardzip.finetune.fit", lambda model, *_, **__: shares.append(zeros(model)["0"]))
    rz.prune(mlp(10, 100), rz.Prune("unstructured", 0.8, rounds=4, finetune_steps=1), rows(k=10), progress=False)
    assert shares == pytest.approx([0.8 * (1 - (1 - r / 4) ** 3) for r in (1, 2, 3, 4)], abs=1e-3)


def synthetic():
    """A reward that needs its net, the net, and rows it has not seen."""
    x = torch.randn(5000, 8)
    reward = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + x[:, 3].abs() - 0.5 * x[:, 4].square()
    model = rz.RewardMLP(6, 2, (64, 64))
    rz.fit(model, (x[1000:, :6], x[1000:, 6:], reward[1000:]), steps=1200, learning_rate=3e-3, progress=False)
    model.eval().requires_grad_(False)
    return model, (x[1000:, :6], x[1000:, 6:]), (x[:1000, :6], x[:1000, 6:])


def test_tuned_pruning_keeps_the_order_and_random_does_not():
    model, data, held = synthetic()
    flags = [p.requires_grad for p in model.parameters()]
    limits = {("neurons", 0.5): 0.955, ("block", 0.75): 0.93, ("2:4", None): 0.965}
    for (pattern, amount), limit in limits.items():
        found = {}
        for importance in ("second-order", "random"):
            tuned = rz.Prune(pattern, amount, importance=importance, block=(8, 2), rounds=2, finetune_steps=300)
            found[importance] = pair_agreement(
                model(*held), rz.prune(model, tuned, data, progress=False)(*held).detach()
            )
        assert found["second-order"] >= limit > found["random"], (pattern, found)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_as_a_step_of_a_recipe():
    model, x = mlp(12, 16, 16), rows()
    step = rz.Prune("block", 0.5, block=(4, 4), importance="activation", skip=("2",), rounds=2)
    assert from_dict(json.loads(json.dumps(step.to_dict()))) == step
    work = Work(copy.deepcopy(model), rz.Data((x,)), progress=False)
    step.check(model, work.data)
    out = step.apply(copy.deepcopy(model), work)
    assert zeros(out) == {"0": 0.5, "2": 0.0, "4": 0.5}


# what is refused

BAD = [
    (lambda: rz.Prune("diagonal", 0.5), "pattern is 'diagonal'"),
    (lambda: rz.Prune("4:2"), "pattern is '4:2'"),
    (lambda: rz.Prune("0:4"), "pattern is '0:4'"),
    (lambda: rz.Prune("2:4", 0.5), "says how much goes"),
    (lambda: rz.Prune("unstructured"), "one of amount=None and threshold=None"),
    (lambda: rz.Prune("unstructured", 0.5, threshold=0.1), "one of amount=0.5 and threshold=0.1"),
    (lambda: rz.Prune("unstructured", 1.01), "amount is 1.01"),
    (lambda: rz.Prune("unstructured", -0.1), "amount is -0.1"),
    (lambda: rz.Prune("unstructured", float("nan")), "amount is nan"),
    (lambda: rz.Prune("neurons", 1.0), "remove everything"),
    (lambda: rz.Prune("block", threshold=0.1), "threshold is for 'unstructured'"),
    (lambda: rz.Prune("unstructured", threshold=-1.0), "threshold is -1.0"),
    (lambda: rz.Prune("unstructured", 0.5, importance="taylor"), "importance is 'taylor'"),
    (lambda: rz.Prune("2:4", scope="model"), "scope is 'model'"),
    (lambda: rz.Prune("unstructured", 0.5, scope="all"), "scope is 'all'"),
    (lambda: rz.Prune("block", 0.5, block=(0, 4)), r"block is \(0, 4\)"),
    (lambda: rz.Prune("block", 0.5, block=(4,)), r"block is \(4,\)"),
    (lambda: rz.Prune("unstructured", 0.5, rounds=0), "rounds=0"),
    (lambda: rz.Prune("unstructured", 0.5, rounds=1.5), "rounds=1.5"),
    (lambda: rz.Prune("unstructured", 0.5, finetune_steps=0.5), "finetune_steps=0.5"),
    (lambda: rz.Prune("unstructured", 0.5, finetune_steps=5, amp="int8"), "amp is .int8."),
    (lambda: rz.Prune("unstructured", "0.5"), "amount is '0.5'"),
    (lambda: rz.Prune("unstructured", threshold="0.5"), "threshold is '0.5'"),
    (lambda: rz.Prune("block", 0.5, block=16), "block is 16"),
]


@pytest.mark.parametrize(("make", "match"), BAD, ids=[match for _, match in BAD])
def test_settings_that_make_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_does_not_fit_the_model_is_refused_and_the_model_untouched():
    model, x = mlp(12, 16, 16), rows()
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    tied = mlp(12, 16, 16, outputs=16)
    tied[4].weight = tied[2].weight
    big = rz.Prune("block", 0.9, block=(64, 64))
    for make, match in (
        (lambda: rz.prune(model, rz.Prune("8:16")), "'0' has 12 inputs, too few for 8:16"),
        (lambda: rz.prune(model, rz.Prune("unstructured", threshold=9.0)), "remove all 192 weights of layer '0'"),
        (lambda: rz.prune(model, big), r"0.9 of the 1 blocks of \(64, 64\) of layer '0' would be all"),
        (
            lambda: rz.prune(model, rz.Prune("block", 0.5, block=(64, 64))),
            r"0.5 of the 1 blocks of \(64, 64\) of layer '0' are none",
        ),
        (
            lambda: rz.prune(model, rz.Prune("block", 0.1, block=(64, 64), scope="model")),
            r"0.1 of the 3 blocks of \(64, 64\) of the model are none",
        ),
        (
            lambda: rz.prune(model, rz.Prune("block", 0.6, block=(64, 64), scope="model")),
            "remove all 256 weights of layer '2'",
        ),
        (lambda: rz.prune(tied, rz.Prune("unstructured", 0.5)), "'2' and '4' share a parameter"),
        (lambda: rz.prune(tied, masks={"2": torch.ones(16, 16)}), "'2' and '4' share a parameter"),
        (lambda: rz.prune(model, rz.Prune("unstructured", 0.5, skip="fc*")), "skip 'fc\\*' matches no linear layer"),
        (lambda: rz.prune(model, rz.Prune("unstructured", 0.5, skip="*")), "no linear layer to prune"),
        (lambda: rz.prune(nn.Linear(4, 1), rz.Prune("unstructured", 0.5)), "more than one output"),
        (lambda: rz.prune(swapped(model), rz.Prune("unstructured", 0.5)), "'0' is packed"),
        (lambda: rz.prune(nn.LazyLinear(4), rz.Prune("unstructured", 0.5)), "no weights yet"),
        (lambda: rz.prune(model, rz.Prune("unstructured", 0.5, importance="activation")), "needs data"),
        (lambda: rz.prune(model, rz.Prune("unstructured", 0.5, finetune_steps=5)), "finetune_steps needs data"),
        (lambda: rz.prune(model), "one of step=None"),
        (lambda: rz.prune(model, rz.Prune("2:4"), masks={}), "one of step="),
        (lambda: rz.prune(model, masks={"1": torch.ones(16, 12)}), "no linear layer '1'"),
        (lambda: rz.prune(model, masks={"0": torch.ones(12, 16)}), r"is \(12, 16\), its weight \(16, 12\)"),
        (lambda: rz.prune(model, masks={"0": torch.full((16, 12), 0.5)}), "other values than 0 and 1"),
        (lambda: rz.prune(model, masks={"0": torch.zeros(16, 12)}), "removes everything"),
        (
            lambda: rz.prune(model, rz.Prune("unstructured", 0.5, importance="activation"), rows(400, 11)),
            r"Sequential does not run on inputs of the shapes \(400, 11\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    assert same_state(state, model.state_dict())
    assert kinds == [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="the mask of layer '0' is list, not a tensor"):
        rz.prune(model, masks={"0": [[1] * 12] * 16})
    with pytest.raises(TypeError, match="takes a Prune"):
        rz.prune(model, rz.Int8(), x)
    two = nn.LSTM(12, 4)
    two.head = nn.Linear(4, 3)
    with pytest.raises(TypeError, match="LSTM gives tuple, not a tensor"):
        rz.prune(two, rz.Prune("unstructured", 0.5, finetune_steps=1), (x,))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x)


def test_too_little_data_says_how_much_is_needed():
    model = mlp(12, 16, 16)
    with pytest.raises(ValueError, match="'0' needs 32 rows of data or more, there are 31"):
        rz.prune(model, rz.Prune("unstructured", 0.5, importance="activation"), rows(31))
    with pytest.raises(ValueError, match="'2' needs 16 rows of data or more, there are 15"):
        rz.prune(model, rz.Prune("unstructured", 0.5, importance="second-order"), rows(15))
    # three rows of the layers to a row of the data
    rz.prune(model, rz.Prune("unstructured", 0.5, importance="second-order"), torch.randn(6, 3, 12))
    unused = Unused()
    with pytest.raises(ValueError, match="never reaches layer 'b'"):
        rz.prune(unused, rz.Prune("unstructured", 0.5, importance="activation"), rows())


def test_modes_flags_and_hooks_are_left_as_they_were():
    model = mlp(12, 16).train()
    model[2].eval()
    rz.prune(model, rz.Prune("unstructured", 0.5, importance="second-order"), rows())
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert not any(m._forward_pre_hooks for m in model.modules())
