"""What compression did to a reward, in the language of rewards.

All figures but ``mse`` and the two errors are blind to a rescaling ``a * r + b`` with ``a > 0``, which changes no
choice that anybody makes by the reward. ``docs/fidelity.md`` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_ROWS = 100
"""The figures are judged in hundredths: fewer rows than this cannot tell them apart."""
DRAWS = 200
"""Times the rows are drawn anew for the intervals."""
PAIRS, GROUPS = 100_000, 16_384

LABELS = {
    "agreement": "pair agreement",
    "greedy": "same greedy action",
    "kendall": "Kendall's tau",
    "spearman": "Spearman's rho",
    "epic": "EPIC distance",
    "pearson_distance": "Pearson distance",
    "best_of_n": "lost by best of 16",
    "same_pick": "same pick of 16",
    "preferred": "preferences kept",
    "mean_error": "mean error",
    "max_error": "largest error",
    "mse": "MSE",
}
HIGHER_IS_BETTER = {
    name: name in ("agreement", "greedy", "kendall", "spearman", "same_pick", "preferred") for name in LABELS
}


@dataclass(frozen=True)
class Figure:
    """A figure, and the 95 % interval it has over rows drawn anew from those it was measured on (None: it has none)."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return short(self.value)
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"

    @classmethod
    def of(cls, value: float, drawn: list[float]) -> Figure:
        values = torch.tensor([v for v in drawn if math.isfinite(v)], dtype=torch.float64, device="cpu")
        if not len(values):
            return cls(value)
        low, high = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
        return cls(value, min(low, value), max(high, value))

    @classmethod
    def mean(cls, values: Tensor, seed: int = 0) -> Figure:
        """The mean of one value a row."""
        values = values.double()
        picks = torch.randint(
            len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        return cls.of(float(values.mean()), values[picks].mean(1).tolist())


def short(value: float) -> str:
    """Four digits behind the point, or as many as a small number needs."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def pair_agreement(before: Tensor, after: Tensor, pairs: int = PAIRS, seed: int = 0) -> float:
    """The share of pairs of rows that both rewards put in the same order; ties in ``before`` do not count.

    All pairs where there are at most ``pairs`` of them, otherwise that many drawn at random.
    """
    if before.shape != after.shape or before.dim() != 1 or len(before) < 2:
        raise ValueError(f"pair_agreement takes two vectors of 2 or more, got {before.shape} and {after.shape}")
    i, j = _pairs(len(before), pairs, seed)
    first, second = (before[i] - before[j]).sign(), (after[i] - after[j]).sign()
    counted = first != 0
    return float((first == second)[counted].double().mean())


def flips_by_margin(before: Tensor, after: Tensor, bins: int = 40, seed: int = 0) -> list[tuple[float, float]]:
    """(margin in standard deviations of ``before``, share of pairs flipped), for ``bins`` equal numbers of pairs.

    A reward that is a little wrong flips pairs that were nearly tied; one that flips pairs with a margin is broken.
    """
    before, after = before.double(), after.double()
    i, j = _pairs(len(before), PAIRS, seed)
    margin, kept = before[i] - before[j], after[i] - after[j]
    counted = margin != 0
    margin, flipped = margin[counted], (margin.sign() != kept.sign())[counted].double()
    order = margin.abs().argsort()
    parts = zip(margin.abs()[order].chunk(bins), flipped[order].chunk(bins), strict=True)
    return [(float(m.mean() / before.std()), float(f.mean())) for m, f in parts]


def compare(before: Tensor, after: Tensor, *, n: int = 16, draws: int = DRAWS, seed: int = 0) -> dict[str, Figure]:
    """Every figure of two rewards of the same rows, ``before`` being what ``after`` is judged by."""
    before, after = (r.detach().double().cpu() for r in (before, after))
    _check(before, after)
    measure = _Measure(before, after, n, seed)
    generator = torch.Generator().manual_seed(seed)
    values = measure(measure.all)
    drawn = [
        measure(torch.randint(len(before), (len(before),), generator=generator, device="cpu")) for _ in range(draws)
    ]
    figures = {name: Figure.of(value, [d[name] for d in drawn]) for name, value in values.items()}
    # rows drawn anew say nothing of what lies beyond the largest error among them
    return {**figures, "max_error": Figure(float((before - after).abs().max()))}


def _check(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.dim() != 1:
        raise ValueError(f"fidelity: takes two vectors, got the shapes {tuple(before.shape)} and {tuple(after.shape)}")
    if len(before) < LEAST_ROWS:
        raise ValueError(f"fidelity: {len(before)} rows are too few for figures in hundredths; it takes {LEAST_ROWS}")
    for name, reward in (("first", before), ("second", after)):
        if not reward.isfinite().all():
            bad = int((~reward.isfinite()).sum())
            raise ValueError(f"fidelity: the {name} reward is inf or NaN for {bad} of {len(reward)} rows")
        if reward.min() == reward.max():
            raise ValueError(f"fidelity: the {name} reward is {float(reward[0]):g} for all rows: there is no order")


class _Measure:
    """The figures on some rows, repeats among them; what does not depend on the choice is worked out once."""

    def __init__(self, before: Tensor, after: Tensor, n: int, seed: int) -> None:
        self.before, self.after, self.n = before, after, n
        self.all = torch.arange(len(before), device="cpu")
        self.pairs = i, j = _pairs(len(before), PAIRS, seed)
        first, second = (before[i] - before[j]).sign(), (after[i] - after[j]).sign()
        # [pairs, 4]: kept, reversed, not tied before, not tied after
        kinds = (first * second == 1, first * second == -1, first != 0, second != 0)
        self.kinds = torch.stack(kinds, 1).double()
        # rows with equal rewards are one level
        self.levels = [r.unique(return_inverse=True)[1] for r in (before, after)]
        generator = torch.Generator().manual_seed(seed + 1)
        self.groups = torch.randint(len(before), (GROUPS, n), generator=generator, device="cpu")

    def __call__(self, rows: Tensor) -> dict[str, float]:
        weights = torch.bincount(rows, minlength=len(self.before)).double()
        kept, turned, first, second = ((weights[self.pairs[0]] * weights[self.pairs[1]]) @ self.kinds).tolist()
        ranks = [_middle_ranks(level, weights) for level in self.levels]
        error = self.before - self.after
        return {
            "agreement": kept / first if first else math.nan,
            "kendall": (kept - turned) / math.sqrt(first * second) if first and second else math.nan,
            "spearman": 1 - 2 * pearson_distance(ranks[0], ranks[1], weights) ** 2,
            "pearson_distance": pearson_distance(self.before, self.after, weights),
            "best_of_n": self._regret(weights),
            "same_pick": self._same_pick(rows),
            "mean_error": float(weights @ error.abs()) / len(rows),
            "mse": float(weights @ error.square()) / len(rows),
        }

    def _regret(self, weights: Tensor) -> float:
        """Of what the best of n gains over a random row, the share lost by picking with ``after``; no drawing needed:
        the level of the pick is the largest of n draws, whose distribution is that of one draw to the power n."""
        best, picked = (self._expected_pick(level, weights) for level in self.levels)
        gain = best - float(weights @ self.before / weights.sum())
        return (best - picked) / gain if gain > 0 else math.nan

    def _expected_pick(self, level: Tensor, weights: Tensor) -> float:
        share = torch.bincount(level, weights)
        mean = torch.bincount(level, weights * self.before) / share.clamp_min(1e-300)
        below = (share.cumsum(0) / share.sum()) ** self.n
        return float(mean @ below.diff(prepend=below.new_zeros(1)))

    def _same_pick(self, rows: Tensor) -> float:
        # enough for the interval, whose width is the rows' doing
        groups = rows[self.groups if rows is self.all else self.groups[: GROUPS // 4]]
        picks = [groups.gather(1, r[groups].argmax(1, keepdim=True)) for r in (self.before, self.after)]
        return float((picks[0] == picks[1]).double().mean())


def pearson_distance(before: Tensor, after: Tensor, weights: Tensor | None = None) -> float:
    """sqrt((1 - r) / 2), r being Pearson's correlation: 0 for the same reward up to a positive scale and a shift, 1 for
    its opposite."""
    weights = torch.ones(len(before), dtype=torch.float64, device="cpu") if weights is None else weights
    # half the root mean square between the standardised rewards: the same number, and exact near 0
    x, y = (_standardised(r.double(), weights) for r in (before, after))
    return float((weights @ (x - y).square() / weights.sum()).sqrt() / 2)


def _standardised(x: Tensor, weights: Tensor) -> Tensor:
    x = x - weights @ x / weights.sum()
    return x / (weights @ x.square() / weights.sum()).sqrt()


def _middle_ranks(level: Tensor, weights: Tensor) -> Tensor:
    share = torch.bincount(level, weights)
    return (share.cumsum(0) - share / 2)[level]


def _pairs(rows: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    if rows * (rows - 1) // 2 <= most:
        i, j = torch.triu_indices(rows, rows, 1, device="cpu")
    else:
        i, j = torch.randint(rows, (2, most), generator=torch.Generator().manual_seed(seed), device="cpu")
    return i, j
