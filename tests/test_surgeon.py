"""The order in which weights go, against least squares done from scratch at every step."""

import pytest
import torch
from models import mlp
from torch import nn

import rewardzip as rz
from rewardzip import surgeon
from rewardzip.importance import scored
from rewardzip.moments import Moments, damped, moments


def statistics(n, k):
    x = (torch.randn(200, k) @ torch.randn(k, k)).double() + 1
    return Moments(200, x.mean(0), x.T @ x / 200, torch.rand(n).double() + 0.5)


def least_loss(row, covariance, free):
    """The loss of a row of weights once those outside ``free`` are zero and the others are the best there are."""
    best = torch.zeros_like(row)
    best[free] = torch.linalg.solve(covariance[free][:, free], (covariance @ row)[free])
    return (row - best) @ covariance @ (row - best)


@pytest.mark.parametrize(("n", "k", "block"), [(3, 6, (1, 1)), (4, 6, (2, 2)), (5, 7, (2, 3)), (2, 4, (4, 8))])
def test_blocks_go_in_the_order_of_what_they_really_cost(n, k, block):
    inputs, weight = statistics(n, k), torch.randn(n, k, dtype=torch.float64)
    found = surgeon.losses(weight, inputs, block)
    covariance = damped(inputs.covariance)
    for g, rows in enumerate(torch.arange(n).split(block[0])):
        columns = torch.arange(k).split(block[1])
        left, so_far, lost = set(range(len(columns))), 0.0, 0.0
        while left:

            def total(blocks, rows=rows, columns=columns):
                free = torch.zeros(k, dtype=torch.bool)
                for b in blocks:
                    free[columns[b]] = True
                return sum(float(inputs.steepness[r] * least_loss(weight[r], covariance, free)) for r in rows)

            costs = {b: total(left - {b}) - lost for b in left}
            cheapest = min(costs, key=costs.__getitem__)
            so_far = max(so_far, costs[cheapest])
            assert float(found[g, cheapest]) == pytest.approx(so_far, rel=1e-6)
            lost, left = total(left - {cheapest}), left - {cheapest}


def test_too_large_to_go_in_turn_is_judged_at_once(monkeypatch):
    inputs, weight = statistics(4, 6), torch.randn(4, 6, dtype=torch.float64)
    monkeypatch.setattr(surgeon, "AFFORDABLE", 0)
    found = surgeon.losses(weight, inputs, (2, 2))
    inverse = torch.linalg.inv(damped(inputs.covariance))
    part = weight[2:, 4:]
    wanted = inputs.steepness[2:] @ ((part @ torch.linalg.inv(inverse[4:, 4:])) * part).sum(1)
    assert float(found[1, 2]) == pytest.approx(float(wanted))


def test_chunks_of_rows_do_not_matter(monkeypatch):
    inputs, weight = statistics(9, 6), torch.randn(9, 6, dtype=torch.float64)
    whole = surgeon.losses(weight, inputs, (2, 1))
    monkeypatch.setattr(surgeon, "CACHED", 36)
    assert torch.allclose(surgeon.losses(weight, inputs, (2, 1)), whole)


def test_scores_by_their_formulas():
    inputs, weight = statistics(4, 6), torch.randn(4, 6, dtype=torch.float64)
    generator = torch.Generator()
    wanda = scored(weight, "activation", inputs, generator)
    assert torch.allclose(wanda, weight.abs() * inputs.second.diagonal().sqrt())
    blocks = scored(weight, "activation", inputs, generator, (3, 4))
    assert torch.allclose(blocks[1, 1], wanda[3:, 4:].mean())
    assert torch.allclose(scored(weight, "magnitude", None, generator, (4, 6)), weight.abs().mean())


def test_steepness_is_the_mean_square_of_the_derivative():
    model, x = mlp(5, 8, 6, activation=nn.Tanh, outputs=1), torch.randn(2100, 5)
    found = moments(model, ["0", "2", "4"], rz.Data((x,)), steepness=True)
    h = model[1](model[0](x)).detach()
    z = model[2](h).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model[4](torch.tanh(z)).sum(), z)
    assert torch.allclose(found["2"].steepness, slope.double().square().mean(0), rtol=1e-4)
    assert torch.allclose(found["4"].steepness, torch.ones(1).double())
    many = moments(mlp(5, 8, outputs=3), ["2"], rz.Data((x,)), steepness=True)
    assert torch.allclose(many["2"].steepness, torch.ones(3).double()), "each output counts"
    frozen = moments(model.requires_grad_(False), ["2"], rz.Data((x,)), steepness=True)
    assert torch.allclose(frozen["2"].steepness, found["2"].steepness)


def test_rows_that_nobody_feels_go_first():
    model, x = mlp(8, 16, outputs=1), torch.randn(500, 8)
    with torch.no_grad():
        model[2].weight[:, :8] *= 1e-3
    pruned = rz.prune(model, rz.Prune("unstructured", 0.5, importance="second-order"), x)
    assert (pruned[0].weight[:8] == 0).double().mean() > 0.95
