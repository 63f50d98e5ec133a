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


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, state, action, next_state=None):
        return self.net(torch.cat([state, action], 1)) + (0 if next_state is None else next_state.sum())


@pytest.mark.parametrize(
    "model", [Optional(), type("Any", (nn.Module,), {"forward": lambda self, *inputs: inputs[0]})()]
)
@pytest.mark.parametrize("last", [torch.randn(10), torch.randn(10, 1)])
def test_what_may_be_rewards_or_an_input_is_refused(model, last):
    inputs = rows(), rows(width=1)
    with pytest.raises(ValueError, match=r"may be rewards or an input.*rz.Data\(inputs, rewards\)"):
        Data.of(model, (*inputs, last))
    assert len(Data.of(model, Data(inputs, last)).inputs) == 2
    assert len(Data.of(model, (*inputs, rows())).inputs) == 3, "as wide as a state, it is none of the rewards"


def test_an_mlp_takes_as_many_inputs_as_it_has():
    judged = Data.of(rz.MLP((3, 1)), (rows(), rows(width=1), torch.randn(10)))
    assert judged.rewards is not None
    assert len(judged.inputs) == 2
    with pytest.raises(ValueError, match="takes 2 inputs"):
        Data.of(rz.MLP((3, 1)), (rows(),))


@pytest.mark.parametrize("model", [rz.RewardMLP(3, 1), rz.MLP((3, 1)), rz.swap(rz.RewardMLP(3, 1), rz.Int8())])
def test_inputs_in_another_order_are_refused(model):
    swapped = rows(width=1), rows()
    for data in (swapped, Data(swapped)):
        with pytest.raises(ValueError, match=r"input 0 has the shape \(10, 1\).* takes 3 numbers"):
            Data.of(model, data)
