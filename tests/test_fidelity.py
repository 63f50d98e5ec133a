"""Figures of two rewards: against what is known of them exactly, against scipy, and against simulation."""

import math

import pytest
import torch

from rewardzip.epic import epic_distance
from rewardzip.fidelity import Figure, compare, flips_by_margin, pair_agreement, pearson_distance


def values(before, after, **options):
    return {name: figure.value for name, figure in compare(before, after, draws=5, **options).items()}


def test_a_rescaled_reward_makes_every_choice_the_same():
    reward = torch.randn(500)
    kept = values(reward, 3 * reward + 7)
    for name in ("agreement", "kendall", "spearman", "same_pick"):
        assert kept[name] == pytest.approx(1, abs=1e-9), name
    assert kept["best_of_n"] == pytest.approx(0, abs=1e-9)
    assert kept["pearson_distance"] < 1e-6
    assert kept["mse"] > 30


def test_the_opposite_reward_makes_none():
    reward = torch.randn(500)
    turned = values(reward, -reward)
    assert turned["agreement"] == 0
    assert turned["kendall"] == pytest.approx(-1)
    assert turned["spearman"] == pytest.approx(-1)
    assert turned["pearson_distance"] == pytest.approx(1)
    assert turned["same_pick"] == 0
    # it picks the worst where it should pick the best: about twice the gain is lost
    assert turned["best_of_n"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("levels", [None, 12], ids=["no ties", "ties"])
def test_rank_figures_are_those_of_scipy(levels):
    stats = pytest.importorskip("scipy.stats")
    before = torch.randn(300)
    after = before + 0.5 * torch.randn(300)
    if levels:
        before, after = ((r * levels / 6).round() for r in (before, after))
    figures = values(before, after)
    # 300 rows have 44,850 pairs, all of them counted
    assert figures["kendall"] == pytest.approx(stats.kendalltau(before, after).statistic, abs=1e-9)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(before, after).statistic, abs=1e-9)
    assert figures["agreement"] == pytest.approx(pair_agreement(before, after), abs=1e-12)
    r = stats.pearsonr(before.double(), after.double()).statistic
    assert figures["pearson_distance"] == pytest.approx(math.sqrt((1 - r) / 2), abs=1e-9)
    assert pearson_distance(before, after) == pytest.approx(math.sqrt((1 - r) / 2), abs=1e-9)


def test_pairs_by_hand():
    before, after = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 1.0, 2.0])
    # of six pairs one is tied before; of the five, 1 and 3 are tied after and count as lost
    assert pair_agreement(before, after) == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="2 or more"):
        pair_agreement(before[:1], after[:1])


@pytest.mark.parametrize("blind", [False, True], ids=["no ties", "ties at the top"])
def test_best_of_n_is_what_drawing_groups_gives(blind):
    before = torch.randn(400).double()
    # blind above the median: what that loses depends on how many there are to pick from
    after = before.clamp_max(float(before.median())) if blind else before + torch.randn(400)
    # a group of three: one more or less would show
    groups = torch.randint(400, (400_000, 3))
    # a tie goes to any of those tied
    picked = before[groups].gather(1, (after[groups] + 1e-6 * torch.rand(groups.shape)).argmax(1, keepdim=True))
    best = before[groups].max(1).values.mean()
    drawn = float((best - picked.mean()) / (best - before.mean()))
    assert values(before, after, n=3)["best_of_n"] == pytest.approx(drawn, abs=0.01)
    same = (picked.squeeze(1) == before[groups].max(1).values).double().mean()
    if not blind:
        assert values(before, after, n=3)["same_pick"] == pytest.approx(float(same), abs=0.02)


def test_fewer_to_choose_from_lose_less():
    before = torch.randn(400)
    after = before + 0.3 * torch.randn(400)
    assert values(before, after, n=2)["same_pick"] > values(before, after, n=64)["same_pick"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of two normal rewards with correlation r, 1/2 + asin(r)/pi of all pairs agree."""
    r, trials, held = 0.9, 40, {"agreement": 0, "pearson_distance": 0}
    truth = {"agreement": 0.5 + math.asin(r) / math.pi, "pearson_distance": math.sqrt((1 - r) / 2)}
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        x, y = torch.randn(2, 150, generator=generator, dtype=torch.float64)
        figures = compare(x, r * x + math.sqrt(1 - r * r) * y, draws=100)
        for name in held:
            held[name] += figures[name].low < truth[name] < figures[name].high
    for name, times in held.items():
        # 95 % is 38; an interval of half the width would hold it about 27 times, one of twice the width always
        assert 33 <= times < trials, (name, times)


def test_errors_are_in_the_units_of_the_reward():
    before, error = torch.randn(200), torch.linspace(-1, 3, 200)
    figures = compare(before, before + error, draws=5)
    assert figures["max_error"] == Figure(pytest.approx(3))
    assert figures["mean_error"].value == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert figures["mse"].value == pytest.approx(float(error.square().mean()), rel=1e-5)


def test_the_same_seed_gives_the_same_figures():
    before = torch.randn(800)
    after = before + torch.randn(800)
    assert compare(before, after) == compare(before, after)
    assert compare(before, after) != compare(before, after, seed=1)


def test_flips_are_among_pairs_that_were_nearly_tied():
    before = torch.randn(2000)
    flips = flips_by_margin(before, before + 0.1 * torch.randn(2000))
    margins, shares = zip(*flips, strict=True)
    assert list(margins) == sorted(margins)
    assert 0.3 < shares[0] < 0.5
    assert shares[-1] == 0
    assert all(share == 1 for _, share in flips_by_margin(before, -before))


def test_what_cannot_be_compared_is_refused():
    reward = torch.randn(200)
    with pytest.raises(ValueError, match=r"\(200,\) and \(100,\)"):
        compare(reward, reward[:100])
    with pytest.raises(ValueError, match=r"20 rows are too few.*100"):
        compare(reward[:20], reward[:20])
    with pytest.raises(ValueError, match="second reward is inf or NaN for 1 of 200"):
        compare(reward, reward.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ValueError, match="second reward is 0 for all rows"):
        compare(reward, torch.zeros(200))


def linear(*weights):
    """A reward of (state [., 3], action [., 2], next state) in which each meets the others."""
    w, v, u = weights
    return lambda s, a, n: (s @ w) * (a @ v) + (n @ u).tanh() * (1 + s @ u) + a.square().sum(1)


@pytest.fixture
def coverage():
    state, action = torch.randn(400, 3).double(), torch.randn(400, 2).double()
    return state, action, state + 0.1 * torch.randn(400, 3)


def some_reward():
    return linear(torch.randn(3).double(), torch.randn(2).double(), torch.randn(3).double())


def shaped(reward, discount):
    return lambda s, a, n: 2.5 * (reward(s, a, n) + discount * 3 * n.square().sum(1) - 3 * s.square().sum(1)) + 4


def test_epic_does_not_see_scale_nor_shaping(coverage):
    reward = some_reward()
    other = shaped(reward, 0.9)
    assert (reward(*coverage) - other(*coverage)).square().mean() > 10
    assert pearson_distance(reward(*coverage), other(*coverage)) > 0.1
    # float64: what is left is roundoff
    assert epic_distance(reward, other, *coverage, discount=0.9).value < 1e-7
    # a shaping with another discount is no shaping
    assert epic_distance(reward, other, *coverage, discount=0.5).value > 0.02


def test_epic_sees_other_rewards(coverage):
    reward = some_reward()
    assert epic_distance(reward, lambda *t: -reward(*t), *coverage).value == pytest.approx(1)
    unlike = epic_distance(reward, some_reward(), *coverage)
    assert 0.3 < unlike.low < unlike.value < unlike.high < 0.9


def test_epic_is_that_of_the_definition(monkeypatch):
    """Gleave's canonical form, from all actions and all states in a table of few, and not from samples."""
    monkeypatch.setattr("rewardzip.epic.SAMPLES", 4096)
    states, actions = torch.randn(4, 3).double(), torch.randn(3, 2).double()
    s, a, n = (i.flatten() for i in torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(4), indexing="ij"))
    rewards, discount = [some_reward(), some_reward()], 0.8

    def canonical(reward):
        table = reward(states[s], actions[a], states[n]).view(4, 3, 4)
        worth = table.mean((1, 2))
        return table + discount * worth[None, None] - worth[:, None, None] - discount * table.mean()

    exact = pearson_distance(*(canonical(r).flatten() for r in rewards))
    many = [t.repeat(3, 1) for t in (states[s], actions[a], states[n])]
    sampled = epic_distance(*rewards, *many, discount=discount)
    assert sampled.value == pytest.approx(exact, abs=0.01)


def test_epic_refuses_what_it_cannot_use(coverage):
    reward = some_reward()
    with pytest.raises(ValueError, match="50 transitions are too few; it takes 100"):
        epic_distance(reward, reward, *(t[:50] for t in coverage))
    with pytest.raises(ValueError, match=r"\(399, 3\)"):
        epic_distance(reward, reward, *coverage[:2], coverage[2][1:])
    with pytest.raises(ValueError, match="second reward is inf or NaN"):
        epic_distance(reward, lambda *t: reward(*t) / 0, *coverage)
