"""stable-baselines3: trained policies compressed, judged in their environments, saved, and trained further."""

import pytest
import torch
from integrations import run_section

import rewardzip as rz

pytest.importorskip("stable_baselines3")

import gymnasium
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from rewardzip.demo.candidates import rounded_to_three

pytestmark = pytest.mark.clients


def returned(policy, environment, episodes=20):
    """The mean return of as many environments side by side, each seeded, each for one episode."""
    environments = make_vec_env(environment, episodes, seed=100)
    mean, _ = evaluate_policy(policy, environments, episodes)
    return float(mean)


def learn_until(model, environment, enough, most, chunk):
    """Chunks of training until the policy is good: where it happens differs from machine to machine."""
    for _ in range(most):
        model.learn(chunk, reset_num_timesteps=model.num_timesteps == 0)
        # more episodes than the tests judge by: it is not good by their luck
        if returned(model.policy, environment, 100) >= enough:
            break


@pytest.fixture(scope="module")
def dqn():
    """CartPole at 256x256; about 20 s."""
    torch.set_num_threads(1)
    settings = {
        "learning_rate": 5e-4,
        "batch_size": 64,
        "n_steps": 3,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "target_update_interval": 100,
        "train_freq": 16,
        "gradient_steps": 64,
        "exploration_fraction": 0.3,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    }
    environments = make_vec_env("CartPole-v1", 8, seed=1)
    model = DQN("MlpPolicy", environments, seed=1, device="cpu", **settings)
    learn_until(model, "CartPole-v1", 485, 25, 2048)
    return model


def test_dqn_returns_what_it_returned(dqn):
    before = returned(dqn.policy, "CartPole-v1")
    assert before >= 475
    for config in (rz.Int8(), rz.Int8(activations="dynamic")):
        fast = rz.swap(dqn.policy, config)
        after = returned(fast, "CartPole-v1")
        print(f"DQN CartPole 256x256, 20 episodes: {before:.1f} dense, {after:.1f} {config}")
        assert after >= 0.95 * before
    ruined = returned(rz.swap(rounded_to_three(dqn.policy), rz.Int8()), "CartPole-v1")
    print(f"ternary {ruined:.1f}")
    assert ruined < 0.5 * before, "these episodes cannot tell a good policy from a bad one"


def test_dqn_saved_and_loaded(dqn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_section("stable-baselines3", model=dqn)
    fast, loaded = names["fast"], names["loaded"]
    observation = torch.randn(64, 4)
    assert torch.equal(loaded.q_net(observation), fast.q_net(observation))
    assert returned(loaded, "CartPole-v1") >= 475


@pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored because")  # load: of the buffer it chose itself
def test_dqn_sb3s_own_save_and_load(dqn, tmp_path):
    """save works; load builds dense layers, and torch says which tensors they lack; a swapped model takes them all."""
    dqn.save(tmp_path / "dense")
    acting = DQN.load(tmp_path / "dense", device="cpu")
    rz.swap(acting.policy, rz.Int8(), inplace=True)
    observation = gymnasium.make("CartPole-v1").reset(seed=0)[0]
    action, _ = acting.predict(observation, deterministic=True)
    acting.save(tmp_path / "swapped")
    with pytest.raises(RuntimeError, match="int8_weight"):
        DQN.load(tmp_path / "swapped", device="cpu")
    again = DQN.load(tmp_path / "dense", device="cpu")
    rz.swap(again.policy, rz.Int8(), inplace=True)
    again.set_parameters(tmp_path / "swapped", device="cpu")
    assert again.predict(observation, deterministic=True)[0] == action
    rows = torch.randn(64, 4)
    assert torch.equal(again.q_net(rows), acting.q_net(rows))


def test_dqn_learns_on_from_compressed_weights(dqn):
    """From weights that a too hard compression ruined, so that recovering is visible."""
    damaged = rz.swap(rounded_to_three(dqn.policy), rz.Int8())
    dqn.policy.load_state_dict(rz.restore(damaged).state_dict())
    bad = returned(dqn.policy, "CartPole-v1")
    weight = dqn.policy.q_net.q_net[2].weight
    before = weight.detach().clone()
    learn_until(dqn, "CartPole-v1", 485, 25, 2048)
    recovered = returned(dqn.policy, "CartPole-v1")
    print(f"DQN: {bad:.1f} after ternary, {recovered:.1f} after training on")
    assert not torch.equal(weight, before)
    assert dqn.q_net is dqn.policy.q_net
    assert bad < 250 < 475 <= recovered


@pytest.fixture(scope="module")
def sac():
    torch.set_num_threads(1)
    settings = {"policy_kwargs": {"net_arch": [64, 64]}, "learning_rate": 2e-3, "learning_starts": 200}
    model = SAC("MlpPolicy", gymnasium.make("Pendulum-v1"), seed=0, device="cpu", **settings)
    learn_until(model, "Pendulum-v1", -250, 16, 500)
    return model


def test_sac_actor_and_critic(sac):
    before = returned(sac.policy, "Pendulum-v1")
    assert before > -400
    fast = rz.swap(sac.policy, rz.Int8())
    after = returned(fast, "Pendulum-v1")
    ruined = returned(rz.swap(rounded_to_three(sac.policy), rz.Int8()), "Pendulum-v1")
    print(f"SAC Pendulum 64x64, 20 episodes: {before:.1f} dense, {after:.1f} int8, {ruined:.1f} ternary")
    assert abs(after - before) < 0.05 * abs(before)
    assert ruined < before - 50
    rows, actions = torch.randn(512, 3), torch.rand(512, 1) * 2 - 1
    with torch.no_grad():
        for q_fast, q in zip(fast.critic(rows, actions), sac.critic(rows, actions), strict=True):
            assert (q_fast - q).square().mean().sqrt() < 0.01 * q.std()


def test_sac_goes_on_from_compressed_weights(sac):
    sac.policy.load_state_dict(rz.restore(rz.swap(sac.policy, rz.Int8())).state_dict())
    before = sac.actor.mu.weight.detach().clone()
    first = sac.actor.latent_pi[0].weight.detach().clone()
    sac.learn(300, reset_num_timesteps=False)
    assert not torch.equal(sac.actor.mu.weight, before)
    assert not torch.equal(sac.actor.latent_pi[0].weight, first)
    assert returned(sac.policy, "Pendulum-v1", 5) > -500
