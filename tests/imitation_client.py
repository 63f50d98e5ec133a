"""imitation 1.0.1, in an environment of its own (``make test-imitation``): its reward nets, swapped and fused."""

import gymnasium
import numpy as np
import pytest
import torch
from imitation.rewards.reward_nets import BasicRewardNet, RewardEnsemble
from imitation.rewards.reward_wrapper import RewardVecEnvWrapper
from integrations import run_section
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

import rewardzip as rz
from rewardzip.demo.pendulum import transitions
from rewardzip.fidelity import pair_agreement

pytestmark = pytest.mark.filterwarnings("default")
ENVIRONMENT = gymnasium.make("Pendulum-v1")
SPACES = ENVIRONMENT.observation_space, ENVIRONMENT.action_space


@pytest.fixture(scope="module")
def rows():
    """state, action, state after, done, and the reward last: what imitation's nets take, and what they should say."""
    torch.set_num_threads(1)
    state, action, reward, after = transitions(8000)
    return state, action, after, torch.zeros(len(state)), reward


def trained(rows, seed, hidden=(64, 64)):
    torch.manual_seed(seed)
    net = BasicRewardNet(*SPACES, hid_sizes=hidden)
    rz.fit(net, rows, steps=2500, progress=False)
    return net.eval()


@pytest.fixture(scope="module")
def net(rows):
    return trained(rows, 0)


@pytest.fixture(scope="module")
def ensemble(rows, net):
    return RewardEnsemble(*SPACES, [net, trained(rows, 1), trained(rows, 2)]).eval()


def arrays(rows, count=1000):
    state, action, after, done = (t[:count].numpy() for t in rows[:4])
    return state, action, after, done.astype(bool)


def test_basic_reward_net(net, rows, tmp_path):
    fast = rz.swap(net, rz.Int8())
    assert {layer.op for layer in rz.explain(fast)} == {"fused_mlp"}
    before, after = net.predict(*arrays(rows)), fast.predict(*arrays(rows))
    truth = rows[4][:1000].numpy()
    fit = [1 - np.square(x - truth).mean() / truth.var() for x in (before, after)]
    print(f"BasicRewardNet, R2 to Pendulum's reward: {fit[0]:.5f} dense, {fit[1]:.5f} int8")
    assert min(fit) > 0.99
    assert pair_agreement(torch.from_numpy(before), torch.from_numpy(after)) > 0.99
    rz.save(fast, tmp_path / "reward")
    loaded = rz.load(tmp_path / "reward", into=BasicRewardNet(*SPACES, hid_sizes=(64, 64)))
    assert np.array_equal(loaded.predict(*arrays(rows)), after)


def test_reward_ensemble(ensemble, rows):
    names = run_section("imitation", reward_net=ensemble.members[0], ensemble=ensemble, batch=arrays(rows))
    mean, variance = ensemble.predict_reward_moments(*arrays(rows))
    swapped_mean, swapped_variance = rz.swap(ensemble, rz.Int8()).predict_reward_moments(*arrays(rows))
    fused_mean, fused_deviation = (t.numpy() for t in (names["mean"], names["deviation"]))
    spread = mean.std()
    for other in (swapped_mean, fused_mean):
        assert np.abs(other - mean).max() < 0.02 * spread
    np.testing.assert_allclose(fused_mean, swapped_mean, atol=1e-3)
    np.testing.assert_allclose(fused_deviation**2, swapped_variance, atol=1e-3)
    assert np.corrcoef(swapped_variance, variance)[0, 1] > 0.9, "where the members disagree is kept"


def ppo_against(reward, seed=0, steps=32_000):
    """The return in the real Pendulum of PPO that has only seen ``reward``."""
    environments = DummyVecEnv([lambda: gymnasium.make("Pendulum-v1") for _ in range(4)])
    environments = RewardVecEnvWrapper(environments, reward.predict_processed)
    settings = {"learning_rate": 1e-3, "n_steps": 1024, "gamma": 0.9, "use_sde": True, "sde_sample_freq": 4}
    agent = PPO("MlpPolicy", environments, seed=seed, device="cpu", **settings)
    test = gymnasium.make("Pendulum-v1")
    test.reset(seed=1)
    before = evaluate_policy(agent, test, 10, warn=False)[0]
    agent.learn(steps)
    test.reset(seed=1)
    return before, evaluate_policy(agent, test, 10, warn=False)[0]


def test_ppo_learns_from_the_compressed_reward(net):
    fast = rz.swap(net, rz.Int8())
    start, dense = ppo_against(net)
    again, compressed = ppo_against(fast)
    print(f"PPO on Pendulum, real return: {start:.0f} before, {dense:.0f} from dense, {compressed:.0f} from int8")
    assert start == again
    assert min(dense, compressed) > start + 400
    assert abs(dense - compressed) < 0.35 * (dense - start)
