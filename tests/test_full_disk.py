"""A disk that is full: an error in words, what was there stays, and no drafts are left."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource")

SCRIPT = """
import resource, signal, sys
from pathlib import Path
import torch
import rewardzip as rz
from rewardzip import resume
model = rz.RewardMLP(17, 6, (256, 256)).eval()
given = torch.randn(200, 17), torch.randn(200, 6)
write = {
    "save": lambda name: rz.save(model, name),
    "page": lambda name: rz.evaluate(model, model, given, batches=(1,), seconds=0.01, progress=False).save(name),
    "fit": lambda name: resume.write(Path(name), {"weights": model.state_dict()}),
    "export": lambda name: rz.export(model, name, given),
}[sys.argv[1]]
write(sys.argv[2])
# writing past the limit fails as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
try:
    write(sys.argv[2])
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("kind", "name"),
    [("save", "model"), ("page", "page.html"), ("export", "model.pt2"), ("export", "model.onnx"), ("fit", "run")],
)
def test_a_full_disk(kind, name, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, name], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "File too large" in ran.stdout
    assert [p.name for p in tmp_path.iterdir()] == [name]
    size = sum(p.stat().st_size for p in [tmp_path / name, *(tmp_path / name).glob("*")])
    assert size > 8192, "the older one is there, whole"
