import pytest
import torch
from torch import nn

import rewardzip as rz
from rewardzip.data import Data


def rows(n=10, width=3):
    return torch.randn(n, width)


def test_the_signature_tells_inputs_from_rewards():
    model = rz.RewardMLP(3, 1)
    bare, judged = Data.of(model, (rows(), rows(width=1))), Data.of(model, (rows(), rows(width=1), torch.randn(10)))
    assert bare.rewards is None
    assert len(bare.inputs) == 2
    assert judged.rewards is not None
    assert len(judged.inputs) == 2
    assert Data.of(nn.Linear(3, 1), rows()).rewards is None
    assert Data.of(nn.Linear(3, 1), bare) is bare


def test_bad_data_is_named():
    model = rz.RewardMLP(3, 1)
    with pytest.raises(ValueError, match=r"takes 2 inputs.*got 1"):
        Data.of(model, (rows(),))
    with pytest.raises(ValueError, match=r"same number of rows.*9"):
        Data.of(model, (rows(), rows(9, 1)))
    with pytest.raises(TypeError, match="takes tensors"):
        Data.of(model, ([1.0], [2.0]))
    bad = rows()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of the 10 rows of input 0"):
        Data((bad,))
    with pytest.raises(ValueError, match="preferred inputs have the shapes"):
        Data((rows(),), rejected=(rows(width=2),))


def test_split_keeps_rows_together_and_loses_none():
    x = torch.arange(100.0)[:, None]
    rest, held = Data((x, 2 * x), 3 * x[:, 0]).split(0.25, seed=1)
    assert len(rest) == 75
    assert len(held) == 25
    assert torch.equal(torch.cat([rest.inputs[0], held.inputs[0]]).sort(0).values, x)
    assert held.rewards is not None
    assert torch.equal(held.rewards, 3 * held.inputs[0][:, 0])
    with pytest.raises(ValueError, match="too few"):
        Data((x[:2],)).split(0.1)
    assert [len(b) for b in Data((x,)).batches(30)] == [30, 30, 30, 10]
