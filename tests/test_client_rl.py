"""torchrl, rsl_rl and skrl: their MLPs swapped, and the AMP discriminator kept up to date inside a training loop."""

import pytest
import torch
import torch.nn.functional as F
from integrations import run_section
from torch import nn

import rewardzip as rz
from rewardzip.fidelity import pair_agreement

# the packages warn of each other; importing torchrl sets multiprocessing to spawn
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


def agrees(model, x, config):
    fast = rz.swap(model, config)
    with torch.no_grad():
        before, after = model(x), fast(x)
        assert after.shape == before.shape
        # the error of rounding each weight to 255 levels, added up over the layers
        assert (after - before).square().mean().sqrt() < 0.03 * before.std()
    return fast


CONFIGS = (rz.Int8(), rz.Int8(activations="dynamic"))


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 x int8"])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("activation", [nn.ELU, nn.Mish, nn.Tanh])
def test_torchrl_mlp(activation, norm, config):
    pytest.importorskip("torchrl")
    from torchrl.modules import MLP

    norms = {"norm_class": norm, "norm_kwargs": [{"normalized_shape": 256}] * 2} if norm else {}
    model = MLP(in_features=23, out_features=4, num_cells=[256, 256], activation_class=activation, **norms)
    x = torch.randn(512, 23)
    with pytest.warns(UserWarning, match=r"MLP: its forward takes \*args"):
        agrees(model, x, config)
    fast = agrees(nn.Sequential(*model), x, config)
    assert {layer.op for layer in rz.explain(fast)} == {"fused_mlp"}


@pytest.mark.parametrize("config", CONFIGS, ids=["int8", "int8 x int8"])
@pytest.mark.parametrize("activation", ["elu", "mish", "relu"])
def test_rsl_rl_mlp(activation, config):
    pytest.importorskip("rsl_rl")
    from rsl_rl.modules import MLP

    fast = agrees(MLP(48, 12, [512, 256, 128], activation), torch.randn(4096, 48), config)
    assert all(layer.activation.startswith(activation) for layer in list(rz.explain(fast))[:-1])


def discriminator():
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("skrl")
    from skrl.utils.model_instantiators.torch import deterministic_model

    layers = [{"name": "net", "input": "OBSERVATIONS", "layers": [1024, 512], "activations": "relu"}]
    space = gymnasium.spaces.Box(-1, 1, (210,))
    model = deterministic_model(observation_space=space, device="cpu", network=layers, output="ONE")
    with pytest.raises(ValueError, match="LazyLinear: run one batch through the model first"):
        rz.swap(model, rz.Int8())
    model.act({"observations": torch.zeros(1, 210)}, role="discriminator")
    return model


def test_skrl_amp_discriminator_refreshed_while_it_trains(monkeypatch):
    torch.manual_seed(0)
    model = discriminator()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    policy, motion = torch.randn(512, 210), torch.randn(512, 210) * 0.5 + 0.3
    rewards = []

    def train_step():
        logits = [model.act({"observations": rows}, role="discriminator")[0] for rows in (policy, motion)]
        loss = sum(F.binary_cross_entropy_with_logits(x, torch.full_like(x, i)) for i, x in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def collect(logits):
        # AMP's style reward
        rewards.append(-torch.log(1 - torch.sigmoid(logits) + 1e-4))

    names = {"discriminator": model, "train_step": train_step, "collect": collect, "observations": motion}
    fast = run_section("torchrl, rsl_rl and skrl", **names, steps=8)["fast"]
    with torch.no_grad():
        logits = [m.act({"observations": motion}, role="")[0] for m in (fast, model, rz.swap(model, rz.Int8()))]
    assert torch.equal(logits[0], logits[2]), "refreshed is the same as swapped anew"
    assert pair_agreement(logits[1][:, 0], logits[0][:, 0]) > 0.98
    means = [float(r.mean()) for r in rewards]
    assert len(means) == 8
    assert means[-1] > means[0] + 0.2, "the compressed discriminator follows the dense one"
