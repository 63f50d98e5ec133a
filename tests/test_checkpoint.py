"""Models on disk: what is saved comes back, and what was damaged or made up is refused with nothing changed."""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import fused, mlp, packed, same_state, swapped
from torch import nn
from torch.nn.utils import prune

import rewardzip as rz
from rewardzip.checkpoint import CheckpointError


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def everything() -> nn.Module:
    """Every part a config may name."""
    parts = [nn.LayerNorm(5), nn.Dropout(0.1), nn.Flatten(), nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8, False)]
    parts += [nn.ELU(0.5), nn.Linear(8, 8), nn.GELU("tanh"), nn.Softplus(2, 10), nn.ReLU(), nn.Tanh(), nn.Sigmoid()]
    return nn.Sequential(*parts, nn.SiLU(), nn.Mish(), nn.Identity(), nn.Linear(8, 1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def nested() -> nn.Module:
    return nn.Sequential(mlp(5, 6), nn.Sequential(nn.Tanh(), mlp(3, 4)), nn.ReLU())


MODELS = {
    "chain": (lambda: mlp(5, 8, 8), (5,)),
    "nested": (nested, (5,)),
    "everything": (everything, (5,)),
    "tied": (tied, (6,)),
    "shared": (shared, (6,)),
    "reward": (lambda: rz.RewardMLP(3, 2, (7, 9)), (3, 2)),
    "inputs": (lambda: rz.MLP((3, 2, 1), (7,), 4), (3, 2, 1)),
    "scalar": (lambda: rz.MLP((3,), (7,)), (3,)),
    "half": (lambda: mlp(5, 8).half(), (5,)),
    "linear": (lambda: nn.Linear(5, 3), (5,)),
}
CONFIGS = {
    "dense": None,
    "int8": rz.Int8(),
    "dynamic": rz.Int8("dynamic", scalar_outputs=True),
    "static": rz.Int8("static"),
}


def inputs(sizes, dtype=torch.float32, rows=4):
    return tuple(torch.randn(rows, size).to(dtype) for size in sizes)


@pytest.fixture
def saved(tmp_path) -> Path:
    rz.save(rz.swap(rz.RewardMLP(3, 2, (7, 9)), rz.Int8("static"), inputs((3, 2))), tmp_path / "reward")
    return tmp_path / "reward"


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")


def refused(folder: Path, match: str | None = None, **kwargs) -> None:
    with pytest.raises(CheckpointError, match=match):
        rz.load(folder, **kwargs)


# round trips


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, config):
    make, sizes = MODELS[name]
    model = make()
    x = inputs(sizes, next(model.parameters()).dtype)
    if CONFIGS[config] is not None:
        model = swapped(model, CONFIGS[config], x)
    rz.save(model, tmp_path / "a")
    loaded = rz.load(tmp_path / "a")
    assert same_state(loaded.state_dict(), model.state_dict())
    assert fused(loaded) == fused(model)
    assert packed(loaded).keys() == packed(model).keys()
    assert torch.equal(loaded(*x), model.eval()(*x))
    assert not any(m.training for m in loaded.modules())
    rz.save(loaded, tmp_path / "b")
    assert [(tmp_path / "a" / f).read_bytes() for f in sorted(os.listdir(tmp_path / "a"))] == [
        (tmp_path / "b" / f).read_bytes() for f in sorted(os.listdir(tmp_path / "b"))
    ]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_tied_tensors_are_one_parameter_again(tmp_path):
    for make in (tied, shared):
        model = make()
        rz.save(model, tmp_path / "m")
        loaded = rz.load(tmp_path / "m")
        assert loaded[0].weight is loaded[2].weight
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        assert len(safetensors.torch.load_file(tmp_path / "m/model.safetensors")) == len(list(model.parameters()))


def test_changed_type_after_the_swap(tmp_path):
    for move in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        fast = move(rz.swap(mlp(5, 8), rz.Int8()))
        rz.save(fast, tmp_path / "m")
        loaded = rz.load(tmp_path / "m")
        assert loaded[0].weight.dtype == fast[0].weight.dtype
        assert same_state(loaded.state_dict(), fast.state_dict())


def test_into_another_class(tmp_path):
    model = swapped(Custom())
    rz.save(model, tmp_path / "m")
    x = torch.randn(4, 5)
    refused(tmp_path / "m", "into")
    for skeleton in (Custom(), swapped(Custom()), swapped(Custom(), skip="head")):
        loaded = rz.load(tmp_path / "m", into=skeleton)
        assert loaded is skeleton
        assert fused(loaded) == {"body.0": "relu"}
        assert torch.equal(loaded(x), model(x))
    root = rz.swap(nn.Linear(5, 3), rz.Int8())
    rz.save(root, tmp_path / "m")
    assert torch.equal(rz.load(tmp_path / "m", into=nn.Linear(5, 3))(x), root(x))


def test_into_the_wrong_class_changes_nothing(tmp_path):
    rz.save(swapped(Custom()), tmp_path / "m")
    wrong_shape, wrong_kind, wrong_rest, extra = (Custom() for _ in range(4))
    wrong_shape.head = nn.Linear(8, 4)
    wrong_kind.head = nn.Identity()
    wrong_rest.body[1] = nn.PReLU()
    extra.more = nn.Linear(2, 2)
    conv = Custom()
    conv.head = nn.Conv1d(8, 3, 1)
    for skeleton in (wrong_shape, wrong_kind, wrong_rest, extra, conv, mlp(5, 8), nn.ReLU()):
        before, kinds = copy.deepcopy(skeleton.state_dict()), [type(m) for m in skeleton.modules()]
        refused(tmp_path / "m", into=skeleton)
        assert same_state(skeleton.state_dict(), before)
        assert [type(m) for m in skeleton.modules()] == kinds
    with pytest.raises(ValueError, match="meta"):
        rz.load(tmp_path / "m", into=Custom().to("meta"))


def test_device(tmp_path):
    rz.save(rz.swap(mlp(5, 8), rz.Int8()), tmp_path / "m")
    assert all(t.device.type == "cpu" for t in rz.load(tmp_path / "m", device="cpu").state_dict().values())
    assert all(t.is_meta for t in rz.load(tmp_path / "m", device="meta").state_dict().values())


def test_altered_modules_need_a_skeleton(tmp_path):
    def hooked(model):
        model[1].register_forward_hook(lambda *a: None)
        return model

    def pruned(model):
        prune.l1_unstructured(model[0], "weight", 0.5)
        return model

    def replaced(model):
        model[1].forward = lambda x: x
        return model

    x = torch.randn(3, 5)
    for alter in (hooked, pruned, replaced):
        model = alter(mlp(5, 8))
        rz.save(model, tmp_path / "m")
        refused(tmp_path / "m", "into")
        assert torch.equal(rz.load(tmp_path / "m", into=alter(mlp(5, 8)))(x), model(x))


def test_what_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="_extra_state"):
        rz.save(Extra(2, 2), tmp_path / "m")
    with pytest.raises(TypeError, match="meta"):
        rz.save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    with pytest.raises(ValueError, match="not JSON compliant"):
        rz.save(nn.Sequential(nn.ELU(float("inf"))), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_no_pickle():
    code = (
        "import pickle, io, torch, sys, tempfile, rewardzip as rz\n"
        "def fail(*a, **k): raise AssertionError('pickle')\n"
        "for m in (pickle, torch.serialization.pickle): m.load = m.loads = m.dump = m.dumps = m.Unpickler = fail\n"
        "torch.load = torch.save = fail\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "    rz.save(rz.swap(rz.RewardMLP(2, 1), rz.Int8()), d + '/m'); rz.load(d + '/m')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    for source in Path(rz.__file__).parent.rglob("*.py"):
        assert "import pickle" not in source.read_text()


# damage


def test_missing_and_misplaced_files(saved, tmp_path):
    refused(tmp_path / "nowhere", "no config.json")
    refused(saved / "config.json", "no config.json")
    weights = saved / "model.safetensors"
    weights.unlink()
    refused(saved, "no model.safetensors")
    weights.mkdir()
    refused(saved, "model.safetensors")
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    refused(saved, "config.json")


def test_damaged_tensors(saved):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    for cut in {0, 1, 7, 8, 9, header - 1, header, len(whole) - 1, *generator.choices(range(len(whole)), k=40)}:
        weights.write_bytes(whole[:cut])
        refused(saved)
    weights.write_bytes(whole + b"0")
    refused(saved)
    expected = rz.load(_restored(weights, whole)).state_dict()
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        weights.write_bytes(bytes(damaged))
        # a flip in the metadata may go unseen; then nothing else may have changed
        with contextlib.suppress(CheckpointError):
            assert same_state(rz.load(saved).state_dict(), expected)


def _restored(weights: Path, whole: bytes) -> Path:
    weights.write_bytes(whole)
    return weights.parent


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "1", '"x"', "{}", '{"format": "rewardzip"}', "[" * 100_000, "9" * 5000, "\xff", "NaN"],
    ids=range(12),
)
def test_configs_that_are_none(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    refused(saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(version=3), "version 3; this reads 1 to 2"),
        (lambda c: c.update(version=True), "version True"),
        (lambda c: c.update(version="1"), "version '1'"),
        (lambda c: c.update(format="other"), "not a rewardzip config"),
        (lambda c: c.update(author="me"), "author"),
        (lambda c: c.pop("tied"), "must have"),
        (lambda c: c["layers"]["net.0"].update(color="red"), "color"),
        (lambda c: c["layers"]["net.0"].pop("rows"), "has the fields"),
        (lambda c: c["layers"]["net.0"].update(op="Int2Linear"), "Int2Linear"),
        (lambda c: c["layers"]["net.0"].update(op=["Int8Linear"]), "is not one of"),
        (lambda c: c["layers"]["net.0"].update(in_features=6), r"\(7, 6\).*has torch.int8 \(7, 5\)"),
        (lambda c: c["layers"]["net.0"].update(in_features=10**12), "in_features"),
        (lambda c: c["layers"]["net.0"].update(in_features=2**31 - 1, out_features=2**31 - 1), "net.0"),
        (lambda c: c["layers"]["net.0"].update(bias=False), "net.0"),
        (lambda c: c["layers"]["net.0"].update(dtype="int8"), "dtype"),
        (lambda c: c["layers"]["net.0"].update(compute_dtype="load"), "compute_dtype"),
        (lambda c: c["layers"]["net.0"].update(zeros={"share": 0.5}), "zeros is"),
        (lambda c: c["layers"].pop("net.0"), "packed"),
        (lambda c: c["layers"].update({"net.9": c["layers"]["net.0"]}), "nothing"),
        (lambda c: c["layers"].update({"": c["layers"]["net.0"]}), "nothing"),
        (lambda c: c["model"].update(type="os.system"), "os.system"),
        (lambda c: c["model"].update(type="Module"), "Module"),
        (lambda c: c["model"].update(type="packed"), "packed"),
        (lambda c: c["model"].update(hidden=[10**12]), "hidden"),
        (lambda c: c["model"].update(hidden=[2**31 - 1] * 2), "RewardMLP"),
        (lambda c: c["model"].update(state_dim=10**30), "state_dim"),
        (lambda c: c["model"].update(state_dim=True), "state_dim"),
        (lambda c: c["model"].pop("children"), "children"),
        (lambda c: c["model"]["children"].update(more={"type": "ReLU"}), "children"),
        (lambda c: c["model"]["children"]["net"]["children"].pop("4"), "same tensors"),
        (lambda c: c["model"]["children"]["net"]["children"]["4"].update(in_features=2**31 - 1), "net.4"),
        (lambda c: c["tied"].update({"net.4.bias": "net.4.weight"}), "ties"),
        (lambda c: c["tied"].update({"a": "b"}), "ties"),
        (lambda c: c["tied"].update({"a": "net.4.weight"}), "same tensors"),
    ],
)
def test_tampered_configs(saved, change, match):
    edit(saved, change)
    refused(saved, match)


@pytest.mark.parametrize(
    "name", ["__class__", "__init__", "net.__init__", "..", "a.b", "", "forward", "_modules", "training"]
)
def test_malicious_names(saved, name):
    def rename_child(config):
        children = config["model"]["children"]["net"]["children"]
        children[name] = children.pop("1")

    def rename_layer(config):
        config["layers"][name] = config["layers"].pop("net.0")

    original = (saved / "config.json").read_text()
    edit(saved, rename_child)
    refused(saved)
    (saved / "config.json").write_text(original)
    edit(saved, rename_layer)
    refused(saved)
    refused(saved, into=rz.RewardMLP(3, 2, (7, 9)))


def test_deep_nesting(saved):
    text = (saved / "config.json").read_text()
    model = json.dumps(json.loads(text)["model"])
    for depth in (100, 300, 900):
        deep = '{"type": "Sequential", "children": {"0": ' * depth + model + "}}" * depth
        (saved / "config.json").write_text(
            json.dumps({**json.loads(text), "model": 0}).replace('"model": 0', f'"model": {deep}')
        )
        refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("net.0.scale"),
        lambda t: t.pop("net.4.weight"),
        lambda t: t.update(extra=torch.zeros(1)),
        lambda t: t.update({"net.0.scale": t["net.0.scale"].half()}),
        lambda t: t.update({"net.0.scale": t["net.0.scale"][:-1]}),
        lambda t: t.update({"net.0.scale": t["net.0.scale"][None]}),
        lambda t: t.update({"net.0.int8_weight": t["net.0.int8_weight"].float()}),
        lambda t: t.update({"net.0.int8_weight": t["net.0.int8_weight"].t().contiguous()}),
        lambda t: t.update({"net.4.weight": t["net.4.weight"].to(torch.int32)}),
        lambda t: t.update({"net.4.weight": t["net.4.weight"].to(torch.float8_e4m3fn)}),
        lambda t: t.update({"net.4.weight": t["net.4.weight"].to(torch.complex64)}),
        lambda t: t.update({"net.4.weight": t["net.4.weight"][:, :-1]}),
        lambda t: t.clear(),
    ],
    ids=range(13),
)
def test_tampered_tensors(saved, change):
    edit_tensors(saved, change)
    refused(saved)
    skeleton = rz.RewardMLP(3, 2, (7, 9))
    before = copy.deepcopy(skeleton.state_dict())
    refused(saved, into=skeleton)
    assert same_state(skeleton.state_dict(), before)


def places(value, at=()):
    """The path of every value inside a JSON value."""
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


PACKED = {
    "reward": lambda: swapped(rz.RewardMLP(3, 2, (7, 9)), rz.Int8("static"), inputs((3, 2))),
    "everything": lambda: swapped(everything(), rz.Int8("static"), inputs((5,))),
    "3 bits": lambda: rz.compress(rz.MLP((5,), (6,)), [rz.Quantize(3)], progress=False).model,
    "groups": lambda: rz.compress(rz.MLP((5,), (6,)), [rz.Quantize(4, per="group", group=4)], progress=False).model,
    "codebook": lambda: rz.compress(rz.MLP((12,), (20,)), [rz.Share(17)], progress=False).model,
}


@pytest.mark.parametrize("name", PACKED)
def test_wrong_types_everywhere(tmp_path, name):
    """Each value in turn by another: refused, or a model that is what the config now says."""
    folder = tmp_path / "m"
    rz.save(PACKED[name](), folder)
    original = json.loads((folder / "config.json").read_text())
    accepted = 0
    for at in places(original):
        for wrong in (None, -1, 0.5, True, "x", [], {}, 10**12):
            config = copy.deepcopy(original)
            if at:
                holder = config
                for key in at[:-1]:
                    holder = holder[key]
                holder[at[-1]] = wrong
            else:
                config = wrong
            (folder / "config.json").write_text(json.dumps(config))
            try:
                loaded = rz.load(folder)
            except CheckpointError:
                continue
            accepted += 1
            rz.save(loaded, tmp_path / "again")
            assert json.loads((tmp_path / "again/config.json").read_text()) == config, at
    assert accepted < 60


# saving


def test_other_files_are_not_replaced(tmp_path):
    model = mlp(2, 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        rz.save(model, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        rz.save(model, tmp_path / "file")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    rz.save(model, tmp_path / "empty")
    rz.save(model, tmp_path / "deep" / "er" / "still")
    rz.load(tmp_path / "deep" / "er" / "still")


def test_links_are_followed(tmp_path):
    rz.save(mlp(2, 2), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    model = mlp(3, 3)
    rz.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same_state(rz.load(tmp_path / "real").state_dict(), model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_failed_save_leaves_the_old_one(saved, monkeypatch):
    before = rz.load(saved).state_dict()
    for name in ("rename", "chmod"):
        monkeypatch.setattr(Path, name, _no_space)
        with pytest.raises(OSError, match="no space"):
            rz.save(mlp(4, 4), saved if name == "chmod" else saved.with_name("new"))
        monkeypatch.undo()
    monkeypatch.setattr(safetensors.torch, "save_file", _no_space)
    with pytest.raises(OSError, match="no space"):
        rz.save(mlp(4, 4), saved)
    assert same_state(rz.load(saved).state_dict(), before)
    assert [p.name for p in saved.parent.iterdir()] == ["reward"]


def _no_space(*args, **kwargs):
    raise OSError("no space left on device")


def test_without_an_atomic_exchange(saved, monkeypatch):
    """Systems that cannot swap two folders in one step use two renames."""
    monkeypatch.setattr("ctypes.CDLL", _no_space)
    model = mlp(4, 4)
    rz.save(model, saved)
    assert same_state(rz.load(saved).state_dict(), model.state_dict())
    assert [p.name for p in saved.parent.iterdir()] == ["reward"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            rz.save(mlp(2, 2), folder / "m")
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o700)


SAVER = """
import sys, torch, rewardzip as rz
models = [torch.nn.Sequential(torch.nn.Linear(50, 300), torch.nn.Linear(300, 2)) for _ in range(2)]
for value, model in enumerate(models):
    for p in model.parameters():
        torch.nn.init.constant_(p, value)
print("ready", flush=True)
step = 0
while step < float(sys.argv[2]):
    rz.save(models[step % 2], sys.argv[1])
    step += 1
"""


def saver(folder: Path, steps: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(steps)],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def is_whole(folder: Path) -> bool:
    """One of the two models, never a mixture."""
    values = torch.cat([p.flatten() for p in rz.load(folder).parameters()])
    return bool((values == values[0]).all())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_killed_in_the_middle(tmp_path):
    generator = random.Random(0)
    folder = tmp_path / "m"
    for _ in range(5):
        process = saver(folder, float("inf"))
        while not folder.exists():
            time.sleep(0.001)
        until = time.monotonic() + generator.uniform(0, 0.1)
        while time.monotonic() < until:
            # a reader between the two files of one save may be told that they disagree, and reads again
            assert folder.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        assert is_whole(folder)
    rz.save(mlp(2, 2), folder)
    for left_over in tmp_path.glob(".m-*"):
        shutil.rmtree(left_over)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
def test_two_processes_save_at_once(tmp_path):
    processes = [saver(tmp_path / "m", 60) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert is_whole(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
