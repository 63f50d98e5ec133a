"""transformers and TRL: a language-model reward trained by RewardTrainer, compressed, saved, and learned from."""

import statistics

import pytest
import torch
from integrations import run_section
from torch import nn

import rewardzip as rz
from rewardzip.fidelity import pair_agreement

pytest.importorskip("trl")

import language_reward as words
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

# the packages warn of each other
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    settings = {"max_steps": 300, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_length": 32}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    arguments = RewardConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **quiet, **settings, **plain)
    trained = words.reward_model()
    data = {"train_dataset": Dataset.from_dict(words.pairs(4000, seed=0)), "processing_class": words.tokenizer()}
    RewardTrainer(model=trained, args=arguments, **data).train()
    return trained.eval().requires_grad_(False)


def decisions(model, held_out):
    return words.score(model, held_out["chosen"]) > words.score(model, held_out["rejected"])


def test_pair_decisions(model):
    held_out = words.pairs(1000, seed=1)
    before = decisions(model, held_out)
    assert before.float().mean() > 0.75, "the reward has learned"
    for config in (rz.Int8(), rz.Int8(activations="dynamic")):
        fast = rz.swap(model, config)
        table = rz.explain(fast)
        assert {layer.op for layer in table if "score" in layer.name} == {"fused_mlp"}
        assert all(layer.op != "Linear" for layer in table), "every layer is compressed"
        after = decisions(fast, held_out)
        same = (before == after).float().mean()
        accuracy = f"{before.float().mean():.3f} dense, {after.float().mean():.3f} {config}"
        print(f"TRL reward, accuracy on held-out pairs {accuracy}, same decisions {same:.4f}")
        assert same > 0.98
        everything = held_out["chosen"] + held_out["rejected"]
        assert pair_agreement(words.score(model, everything), words.score(fast, everything)) > 0.97
    lost = decisions(words.reward_model().eval(), held_out)
    assert (before == lost).float().mean() < 0.8, "these pairs cannot tell a reward from one of random weights"


def test_a_policy_learns_the_same(model):
    """REINFORCE against dense and compressed, judged by the dense reward; three seeds each."""
    rewards = {"dense": model, "int8": rz.swap(model, rz.Int8()), "random": words.reward_model().eval()}
    curves = {name: [words.learning_curve(r, model, seed) for seed in range(3)] for name, r in rewards.items()}
    ends = {name: [statistics.mean(curve[-10:]) for curve in each] for name, each in curves.items()}
    print("REINFORCE, dense reward of the last 10 steps, seeds 0 to 2:", ends)
    start = statistics.mean(curve[0] for curve in curves["dense"])
    learned = statistics.mean(ends["dense"]) - start
    assert learned > 3 * abs(max(ends["dense"]) - min(ends["dense"])), "learning is more than the seeds' differences"
    for dense, fast in zip(curves["dense"], curves["int8"], strict=True):
        away = statistics.mean(abs(a - b) for a, b in zip(dense, fast, strict=True))
        assert away < 0.1 * learned
    assert statistics.mean(ends["random"]) - start < 0.5 * learned, "any reward would have taught this"


def test_saved_and_loaded(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_section("transformers and TRL", model=model, config=words.config(), blank=words.reward_model())
    sentences = words.pairs(50, seed=2)["chosen"]
    assert torch.equal(words.score(names["loaded"], sentences), words.score(names["fast"], sentences))


def test_save_pretrained_refuses(model, tmp_path):
    plain = words.reward_model(head=False)
    fast = rz.swap(plain, rz.Int8())
    rz.save(fast, tmp_path / "rz")
    loaded = rz.load(tmp_path / "rz", into=words.reward_model(head=False))
    for swapped in (fast, loaded, rz.swap(rz.restore(fast), rz.Int8()), rz.swap(plain, rz.Int8(), inplace=True)):
        with pytest.raises(ValueError, match="from_pretrained would fill with random weights"):
            swapped.save_pretrained(tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
    dense = rz.restore(fast)
    dense.save_pretrained(tmp_path / "hf")
    again = type(dense).from_pretrained(tmp_path / "hf")
    sentences = words.pairs(20, seed=3)["chosen"]
    torch.testing.assert_close(words.score(again.eval(), sentences), words.score(dense.eval(), sentences))


def test_cached_features_and_a_wide_head(tmp_path, monkeypatch):
    """Features of a large model computed once, scored by its head: 4096-4096-1 is one launch of reward_head."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1)).eval()
    features = torch.randn(512, 4096)
    names = run_section("Cached features", head=head, features=features)
    assert {layer.op for layer in rz.explain(names["fast_head"])} == {"reward_head"}
    with torch.no_grad():
        assert pair_agreement(head(features)[:, 0], names["rewards"][:, 0]) > 0.99
