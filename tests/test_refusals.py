"""What cannot work on a swapped model in the package it comes from says so. Training is in the tests of clients."""

import pytest
import torch
from torch import nn

import rewardzip as rz


class PreTrainedModel(nn.Module):
    """As transformers has it, as far as saving goes."""

    def __init__(self):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.score(x)

    def save_pretrained(self, folder):
        return f"saved in {folder}"


PreTrainedModel.__module__ = "transformers.modeling_utils"


class Reward(PreTrainedModel):
    pass


def test_save_pretrained_refuses_until_restored(tmp_path):
    dense = Reward()
    fast = rz.swap(dense, rz.Int8())
    rz.save(fast, tmp_path / "reward")
    for swapped in (fast, rz.load(tmp_path / "reward", into=Reward()), rz.swap(Reward(), rz.Int8(), fuse=False)):
        with pytest.raises(ValueError, match="from_pretrained would fill with random weights"):
            swapped.save_pretrained("folder")
        assert rz.restore(swapped).save_pretrained("folder") == "saved in folder"
    x = torch.randn(3, 4)
    assert torch.equal(rz.load(tmp_path / "reward", into=Reward())(x), fast(x))
    assert dense.save_pretrained("folder") == "saved in folder"

    def own(folder):
        return "by another"

    fast.__dict__["save_pretrained"] = own
    assert rz.restore(fast).save_pretrained("folder") == "by another"


def algorithm(name="DQN"):
    pytest.importorskip("gymnasium")
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    environment = {"DQN": "CartPole-v1", "SAC": "Pendulum-v1"}[name]
    settings = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 10, "device": "cpu", "buffer_size": 100}
    return getattr(stable_baselines3, name)("MlpPolicy", environment, **settings)


@pytest.mark.parametrize("name", ["DQN", "SAC"])
def test_training_compressed_layers_is_an_error(name):
    model = algorithm(name)
    before = {k: v.clone() for k, v in model.policy.state_dict().items()}
    model.policy = rz.swap(model.policy, rz.Int8())
    with pytest.raises(ValueError, match=rf"{name}Policy is about to be trained, but its layers are compressed"):
        model.learn(20)
    model.policy.set_training_mode(False)
    rz.restore(model.policy).set_training_mode(True)
    assert before.keys() == rz.restore(model.policy).state_dict().keys()


def test_one_part_of_a_policy_is_watched_too(tmp_path):
    model = algorithm("SAC")
    rz.swap(model.actor, rz.Int8(), inplace=True)
    with pytest.raises(ValueError, match="Actor is about to be trained"):
        model.learn(20)
    rz.save(model.actor, tmp_path / "actor")
    loaded = rz.load(tmp_path / "actor", into=algorithm("SAC").actor)
    with pytest.raises(ValueError, match="Actor is about to be trained"):
        loaded.set_training_mode(True)


def test_other_models_may_be_in_training_mode():
    model = rz.swap(rz.RewardMLP(3, 1), rz.Int8())
    assert model.train().net[0].training


def test_a_dense_save_does_not_fit_a_swapped_policy(tmp_path):
    dense, swapped = algorithm(), algorithm()
    dense.save(tmp_path / "dense")
    rz.swap(swapped.policy, rz.Int8(), inplace=True)
    before = {k: v.clone() for k, v in swapped.policy.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"'q_net.q_net.0' is compressed, the state dict has a dense weight for it"):
        swapped.set_parameters(tmp_path / "dense")
    assert all(torch.equal(before[k], v) for k, v in swapped.policy.state_dict().items() if "int8" in k)


def test_restoring_in_place_tells_of_the_optimizer():
    model = algorithm()
    rz.swap(model.policy, rz.Int8(), inplace=True)
    with pytest.warns(UserWarning, match="the optimizer of DQNPolicy does not know the restored layers"):
        rz.restore(model.policy, inplace=True)
