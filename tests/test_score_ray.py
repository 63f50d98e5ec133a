"""Bulk scoring and serving on Ray: two node processes on this machine."""

import filecmp
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from json import dumps, loads
from pathlib import Path

import numpy as np
import pytest
import torch

import rewardzip as rz

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = [
    pytest.mark.clients,
    # Ray's own: deprecated settings it reads itself, sockets and processes it leaves to the collector
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).parent.parent
COLUMNS = ["state", "action"]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, each a process of its own with one CPU for scoring beside one for Ray's own tasks."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("ignore")
        for name, value in paths.items():
            patched.setenv(name, value)
        node = {"num_cpus": 2, "object_store_memory": 80 << 20}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.add_node(**node)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def given(tmp_path):
    """A swapped model, in memory and saved, and two files of rows with one bad row."""
    (tmp_path / "in").mkdir()
    make = np.random.default_rng(0)
    for i, rows in enumerate((6000, 4000)):
        held = {}
        for name, width in (("state", 3), ("action", 2)):
            x = make.standard_normal((rows, width)).astype("f4")
            x[17] = np.nan if i else x[17]
            held[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), width)
        pq.write_table(pa.table(held), tmp_path / "in" / f"{i}.parquet", row_group_size=500)
    model = rz.swap(rz.RewardMLP(3, 2, (16, 16)).eval(), rz.Int8())
    rz.save(model, tmp_path / "model")
    return model


def same_folders(a, b):
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def test_ray_writes_what_the_local_engine_writes(cluster, given, tmp_path):
    settings = {"columns": COLUMNS, "part_rows": 500, "progress": False}
    local = rz.score(given, tmp_path / "in", tmp_path / "local", **settings)
    there = rz.score(given, tmp_path / "in", tmp_path / "ray", engine="ray", **settings)
    assert same_folders(tmp_path / "local", tmp_path / "ray")
    assert (there.rows, there.bad_rows, there.bad) == (local.rows, 1, local.bad)
    # each engine goes on where the other was
    for part in ("part-000003.parquet", "part-000011.parquet"):
        (tmp_path / "local" / part).unlink()
    assert rz.score(given, tmp_path / "in", tmp_path / "local", engine="ray", **settings).scored == 1000
    assert same_folders(tmp_path / "local", tmp_path / "ray")
    with pytest.raises(ValueError, match="row 17: state: NaN"):
        rz.score(given, tmp_path / "in", tmp_path / "strict", engine="ray", strict=True, **settings)


def test_rays_checkpoint_spares_the_parts_it_knows(cluster, given, tmp_path):
    """A checkpoint with all parts but two: the actors are asked for those two alone."""
    from rewardzip import score_ray

    settings = {"columns": COLUMNS, "part_rows": 500, "progress": False}
    rz.score(given, tmp_path / "in", tmp_path / "out", **settings)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    checkpoint = tmp_path / "out" / score_ray.WORK / "checkpoint"
    checkpoint.mkdir(parents=True)
    gone = [4, 9]
    pq.write_table(pa.table({"id": [i for i in range(20) if i not in gone]}), checkpoint / "known.parquet")
    asked = tmp_path / "asked"
    asked.mkdir()
    original = score_ray.Actor.__call__

    def noting(self, numbers):
        for number in numbers["id"]:
            (asked / str(number)).touch()
        return original(self, numbers)

    for i in gone:
        (tmp_path / "out" / f"part-{i:06}.parquet").unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(score_ray, "Actor", type("Actor", (score_ray.Actor,), {"__call__": noting}))
        rz.score(given, tmp_path / "in", tmp_path / "out", engine="ray", **settings)
    assert sorted(int(name) for name in os.listdir(asked)) == gone
    assert same_folders(tmp_path / "whole", tmp_path / "out")


SCRIPT = """
import sys, ray, rewardzip as rz
ray.init(address=sys.argv[4], log_to_driver=False, logging_level="ERROR")
rz.score(*sys.argv[1:4], columns=["state", "action"], part_rows=500, engine="ray", progress=False)
"""


def test_a_killed_driver_goes_on_to_the_same_bytes(cluster, given, tmp_path):
    rz.score(given, tmp_path / "in", tmp_path / "whole", columns=COLUMNS, part_rows=500, progress=False)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    output = tmp_path / "out"
    arguments = [tmp_path / "model", tmp_path / "in", output, cluster.address]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment)
    while process.poll() is None and len(list(output.glob("part-*"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    settings = {"columns": COLUMNS, "part_rows": 500, "progress": False}
    # actors that outlive their driver for a moment may still finish a part: the same bytes
    rz.score(tmp_path / "model", tmp_path / "in", output, engine="ray", **settings)
    assert same_folders(tmp_path / "whole", output)


def test_the_serving_example_serves(cluster, given, tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    from ray import serve

    assert len((ROOT / "docs" / "serve.py").read_text().splitlines()) < 40
    monkeypatch.setenv("REWARD", str(tmp_path / "model"))
    spec = importlib.util.spec_from_file_location("serve_example", ROOT / "docs" / "serve.py")
    example = importlib.util.module_from_spec(spec)
    import cloudpickle

    sys.modules["serve_example"] = example
    spec.loader.exec_module(example)
    cloudpickle.register_pickle_by_value(example)
    try:
        serve.start(http_options={"port": 8123})
        serve.run(example.app)
        state, action = torch.randn(50, 3), torch.randn(50, 2)

        def ask(i):
            body = dumps({"state": state[i].tolist(), "action": action[i].tolist()}).encode()
            with urllib.request.urlopen("http://127.0.0.1:8123", body, timeout=60) as answer:
                return loads(answer.read())["reward"]

        with ThreadPoolExecutor(10) as pool:
            rewards = torch.tensor(list(pool.map(ask, range(50))))
        with torch.no_grad():
            assert torch.equal(rewards, given(state, action))
        for body in (b"{}", b'{"state": [0, 0], "action": [0, 0, 0]}'):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen("http://127.0.0.1:8123", body, timeout=60)
    finally:
        serve.shutdown()
