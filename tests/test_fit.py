"""The training loop on rewards that can be learned, and on data that cannot."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from models import same_state
from torch import nn

import rewardzip as rz

PATH = os.pathsep.join(sys.path)


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small spend their time on waking threads, the more so beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transitions(rows: int = 512):
    """States, actions and a reward that a small net can learn."""
    state, action = torch.randn(rows, 3), torch.randn(rows, 2)
    return state, action, state[:, 0] * action[:, 0] - state[:, 1].abs()


def test_mse_drives_the_error_down():
    model, data = rz.RewardMLP(3, 2), transitions()
    losses = rz.fit(model, data, steps=300, learning_rate=5e-3, progress=False)
    assert len(losses) == 300
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])
    assert model.training


def test_bradley_terry_ranks_the_preferred_first():
    state, action, reward = transitions(1024)
    first = (reward[:512] > reward[512:])[:, None]
    pairs = [torch.where(first, t[:512], t[512:]) for t in (state, action)]
    pairs += [torch.where(first, t[512:], t[:512]) for t in (state, action)]
    model = rz.RewardMLP(3, 2)
    rz.fit(model, pairs, "bradley-terry", steps=300, learning_rate=5e-3, progress=False)
    assert float((model(*pairs[:2]) > model(*pairs[2:])).float().mean()) > 0.9


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision(amp):
    model = rz.RewardMLP(3, 2)
    losses = rz.fit(model, transitions(), steps=100, learning_rate=5e-3, amp=amp, progress=False)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_same_seed_same_model():
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        runs.append(rz.fit(rz.RewardMLP(3, 2), transitions(), steps=5, seed=seed, progress=False))
    assert runs[0] == runs[1] != runs[2]


def test_flags_and_progress(capsys):
    model = rz.RewardMLP(3, 2).eval()
    rz.fit(model, transitions(), steps=2)
    assert not model.training
    assert "fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s, a, r: (s, a, r[:-1]), r"same number of rows.*'input 1': 512, 'rewards': 511"),
        (lambda s, a, r: (s[:0], a[:0], r[:0]), r"1 or more.*'rewards': 0"),
        (lambda s, a, r: (), "got 0 tensor"),
        (lambda s, a, r: (r,), "the inputs and the rewards, got 1"),
        (lambda s, a, r: (s, a, r * torch.nan), "512 of the 512 rows of rewards hold inf or NaN"),
        (lambda s, a, r: (s / 0, a, r), "rows of input 0 hold inf or NaN"),
        (lambda s, a, r: rz.Data((s, a)), "'mse' needs rewards"),
        (lambda s, a, r: (s, a, torch.stack([r, r], 1)), r"the model gives \(256,\), the rewards are \(256, 2\)"),
    ],
)
def test_bad_data(change, match):
    model = rz.RewardMLP(3, 2).eval()
    with pytest.raises(ValueError, match=match):
        rz.fit(model, change(*transitions()), progress=False)
    assert not model.training


def test_bad_settings():
    data = transitions()
    with pytest.raises(ValueError, match="'mse' or 'bradley-terry'"):
        rz.fit(rz.RewardMLP(3, 2), data, "hinge", progress=False)
    with pytest.raises(ValueError, match="got 3 tensors"):
        rz.fit(rz.RewardMLP(3, 2), data, "bradley-terry", progress=False)
    with pytest.raises(ValueError, match="needs rejected inputs"):
        rz.fit(rz.RewardMLP(3, 2), rz.Data(data[:2], data[2]), "bradley-terry", progress=False)
    with pytest.raises(ValueError, match="early_stop is 0"):
        rz.fit(rz.RewardMLP(3, 2), data, early_stop=0, progress=False)
    with pytest.raises(ValueError, match="no parameters to train"):
        rz.fit(nn.ReLU(), data, progress=False)
    with pytest.raises(ValueError, match="no parameters to train"):
        rz.fit(rz.RewardMLP(3, 2).requires_grad_(False), data, progress=False)


def test_data_and_a_loss_of_ones_own():
    state, action, reward = transitions()
    runs = []
    for data, loss in (
        ((state, action, reward), "mse"),
        (rz.Data((state, action), reward), "mse"),
        (rz.Data((state, action), reward), lambda m, batch: F.mse_loss(m(*batch.inputs), batch.rewards)),
    ):
        torch.manual_seed(0)
        runs.append(rz.fit(rz.RewardMLP(3, 2), data, loss, steps=5, progress=False))
    assert runs[0] == runs[1] == runs[2]


def test_early_stop_keeps_the_best_weights():
    """Rewards that are noise: what is learned of them is wrong on rows held out."""
    torch.manual_seed(0)
    state, action, _ = transitions(200)
    data = rz.Data((state, action), torch.randn(200))
    rest, held = data.split(0.1, 0)

    def outside(model):
        with torch.no_grad():
            return float((model(*held.inputs) - held.rewards).square().mean())

    torch.manual_seed(0)
    long, short = rz.RewardMLP(3, 2), rz.RewardMLP(3, 2)
    short.load_state_dict(long.state_dict())
    rz.fit(long, rest, steps=600, learning_rate=5e-3, progress=False)
    losses = rz.fit(short, data, steps=600, learning_rate=5e-3, early_stop=50, progress=False)
    assert 50 <= len(losses) < 300
    assert outside(short) < 0.8 * outside(long)
    assert short.training


RUN = """
import sys, torch
from torch import nn
import rewardzip as rz
from rewardzip import resume
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
x = torch.randn(300, 3)
folder, out = sys.argv[1:3]
torch.manual_seed(1)
if sys.argv[3:]:
    write, left = resume.write, [int(sys.argv[3])]
    def slower(*args):
        write(*args)
        left[0] -= 1
        if left[0] == 0:
            print("now", flush=True)
    resume.write = slower
losses = rz.fit(model, (x, x[:, :1].abs()), steps=400, batch_size=32, amp=torch.float16, early_stop=390, progress=False,
                checkpoint=folder or None, checkpoint_every=7)
torch.save({"losses": losses, "weights": model.state_dict()}, out)
"""


def test_killed_and_gone_on_is_never_killed(tmp_path):
    """Dropout, batch norm, early stopping, scaled gradients; killed twice at steps nobody chose."""
    environment = {**os.environ, "PYTHONPATH": PATH}

    def start(folder, out, *more):
        command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / out), *map(str, more)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start("", "whole.pt")
    chance = random.Random(0)
    for kill in (5, 9):
        run = start(tmp_path / "run", "never.pt", kill)
        assert run.stdout.readline() == "now\n"
        time.sleep(chance.uniform(0, 0.02))
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        assert not (tmp_path / "never.pt").exists()
        assert len(torch.load(tmp_path / "run/fit.pt", weights_only=True)["losses"]) % 7 == 0
    last = start(tmp_path / "run", "resumed.pt")
    for run in (whole, last):
        run.communicate(timeout=100)
        assert run.returncode == 0
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "resumed.pt"))
    assert a["losses"] == b["losses"]
    assert same_state(a["weights"], b["weights"])


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    data = transitions()
    torch.manual_seed(0)
    first, second = rz.RewardMLP(3, 2), rz.RewardMLP(3, 2)
    losses = rz.fit(first, data, steps=12, progress=False, checkpoint=tmp_path / "run")
    with second.net.register_forward_hook(lambda *_: pytest.fail("it was run again")):
        assert rz.fit(second, data, steps=12, progress=False, checkpoint=tmp_path / "run") == losses
    assert same_state(first.state_dict(), second.state_dict())
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["fit.pt"]


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    data, folder = transitions(), tmp_path / "run"
    rz.fit(rz.RewardMLP(3, 2), data, steps=3, progress=False, checkpoint=folder)
    other = (*data[:2], data[2] + 1)
    tanh = rz.RewardMLP(3, 2)
    tanh.net[1] = nn.Tanh()
    for change, match in (
        ({"steps": 4}, "steps=3, this one 4"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"loss": lambda m, b: m(*b.inputs).mean()}, "loss='mse'"),
        ({"seed": 1}, "seed=0, this one 1"),
        ({"data": other}, "data="),
        ({"data": (*data[:2], data[2].flip(0))}, "data="),
        ({"model": tanh}, "modules="),
        ({"model": rz.RewardMLP(3, 2, (5,))}, "parameters="),
    ):
        settings = {"model": rz.RewardMLP(3, 2), "data": data, "steps": 3, **change}
        before = {k: v.clone() for k, v in settings["model"].state_dict().items()}
        with pytest.raises(ValueError, match=match):
            rz.fit(**settings, progress=False, checkpoint=folder)
        assert same_state(settings["model"].state_dict(), before)
    (folder / "fit.pt").write_bytes((folder / "fit.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as a training run"):
        rz.fit(rz.RewardMLP(3, 2), data, steps=3, progress=False, checkpoint=folder)


TEAM = """
import os, sys, torch
import rewardzip as rz
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
torch.manual_seed(rank)  # the first process's weights count
state, action = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
model = rz.RewardMLP(3, 3, (8,))
model.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
losses = rz.fit(model, (state, action, state[:, 0] * action[:, 0]), steps=30, batch_size=32, learning_rate=1e-2,
                progress=True, early_stop=25, checkpoint=sys.argv[1] + "/run", checkpoint_every=20)
weights = {name: weight.clone() for name, weight in model.state_dict().items()}
torch.save({"losses": losses, "weights": weights}, f"{sys.argv[1]}/{rank}.pt")
for _ in range(3):
    rz.fit(model, (state, action, state[:, 0] * action[:, 0]), steps=2, progress=False)
"""


@pytest.mark.filterwarnings("ignore:.*")
def test_two_processes_are_one(tmp_path):
    (tmp_path / "script.py").write_text(TEAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fit") >= 1
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["losses"] == second["losses"]
    assert same_state(first["weights"], second["weights"])
    assert (tmp_path / "run/fit.pt").exists()

    torch.manual_seed(0)
    alone = rz.RewardMLP(3, 3, (8,))
    alone.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    state, action = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    data = (state, action, state[:, 0] * action[:, 0])
    settings = {"steps": 30, "batch_size": 32, "learning_rate": 1e-2, "early_stop": 25, "progress": False}
    with pytest.raises(ValueError, match="was shared by 2 processes, this one by 1"):
        rz.fit(alone, data, **settings, checkpoint=tmp_path / "run")
    losses = rz.fit(alone, data, **settings)
    assert losses == pytest.approx(first["losses"], rel=1e-3)
    for name, weight in alone.state_dict().items():
        assert torch.allclose(weight, first["weights"][name], atol=1e-4)


class Spread(nn.Module):
    """Two layers, the second of which refuses to be moved, and takes its rows to where it says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)
        self.seen = set()

    def forward(self, x):
        self.seen.add(x.device)
        return self.second(torch.relu(self.first(x)))

    def _apply(self, *args, **kwargs):
        raise AssertionError("moved")


def test_a_model_is_never_moved():
    model, x = Spread(), torch.randn(64, 3)
    rz.fit(model, (x, x[:, :1]), steps=3, progress=False)
    assert model.seen == {torch.device("cpu")}


def test_the_answer_may_come_from_another_device():
    """A model spread over devices: the rows go to the first, the rewards to where the answer is."""

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1, device="meta")

        def forward(self, x):
            assert x.device.type == "cpu"
            return self.second(self.first(x).to("meta"))

    from rewardzip.fit import value

    loss = value(Elsewhere(), rz.Data((torch.randn(4, 3),), torch.randn(4, 1)), "mse")
    assert loss.device.type == "meta"


def test_one_reward_a_row_may_have_a_dimension_of_its_own():
    state, action, reward = transitions()
    kept = []
    for column in (reward, reward[:, None]):
        torch.manual_seed(0)
        model = rz.RewardMLP(3, 2)
        kept.append(rz.fit(model, (state, action, column), steps=5, progress=False))
    assert kept[0] == kept[1]
    net = nn.Sequential(nn.Linear(3, 1))
    assert len(rz.fit(net, (state, reward), steps=2, progress=False)) == 2


def test_pairs_are_said_to_be_in_one_row():
    state, action, _ = transitions()
    with pytest.raises(TypeError, match=r"got \['tuple', 'tuple'\].*\(state, action, lost_state, lost_action\)"):
        rz.fit(rz.RewardMLP(3, 2), ((state, action), (state, action)), loss="bradley-terry")


@pytest.mark.parametrize("wrong", [{"steps": -3}, {"batch_size": 0}])
def test_numbers_of_steps_and_rows_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=r"fit: steps=.* batch_size="):
        rz.fit(rz.RewardMLP(3, 2), transitions(), progress=False, **wrong)
