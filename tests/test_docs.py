"""Every block of the README and of docs/ runs: Python a page at a time in an empty folder, our commands beside files of
the names they use; of other commands, what they name is there."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import rewardzip as rz

ROOT = Path(__file__).parent.parent
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [p for p in ALL if "```python" in p.read_text()]
LINES = [
    (page.name, line.partition(" #")[0].strip())
    for page in ALL
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.S | re.M)
    for line in block.splitlines()
]
OURS = [line for _, line in LINES if line.startswith("rewardzip ")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "error", script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ALL)
def test_every_block_is_closed(page):
    fences = re.findall(r"^```.*$", page.read_text(), re.M)
    assert all(line == "```" for line in fences[1::2]), "a block opens inside another"
    assert len(fences) % 2 == 0


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ALL)
def test_pages_are_linked_not_named(page):
    for name in re.findall(r"`([\w/-]+\.md)`(?!\])", page.read_text()):
        # the repository's own rules are no page of the documentation
        assert name == "CONTRIBUTING.md", name


def test_make_targets_named_in_the_docs_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in ALL:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(), re.M):
            assert f"\n{target[0] or target[1]}:" in makefile, (page.name, target)


def test_the_api_page_says_where_things_are_imported_from():
    ours, modules, ops = re.split(r"^## (?:Modules|Ops)$", (ROOT / "docs" / "api.md").read_text(), flags=re.M)
    for section, package in ((ours, "rewardzip"), (modules, "rewardzip.nn"), (ops, "rewardzip_kernels")):
        for name in re.findall(r"^::: \S+\.(\w+)$", section, re.M):
            assert hasattr(importlib.import_module(package), name), (package, name)


@pytest.fixture
def folder(tmp_path):
    """Models, rows and a recipe under the names that the commands in the docs use."""
    model = rz.RewardMLP(3, 1, (16, 16)).eval()
    state, action = torch.randn(900, 3), torch.randn(900, 1)
    rz.save(model, tmp_path / "model")
    rz.save(rz.swap(model, rz.Int8()), tmp_path / "reward")
    np.savez(tmp_path / "rows.npz", state=state, action=action, rewards=-state[:, 0].square())
    (tmp_path / "recipe.json").write_text(json.dumps({"steps": [{"step": "Quantize", "bits": 8}]}))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {f"s{i}": state[:, i].tolist() for i in range(3)} | {"a0": action[:, 0].tolist(), "id": list(range(900))}
    (tmp_path / "transitions").mkdir()
    for file in ("transitions.parquet", "transitions/one.parquet"):
        parquet.write_table(pyarrow.table(columns), tmp_path / file)
    return tmp_path


@pytest.mark.parametrize("line", OURS)
def test_our_commands_run(folder, line):
    command = shlex.split(line.replace("--budget 600", "--budget 5"))
    if command[1] == "export":
        pytest.importorskip("onnxscript")
    module, name = PROJECT["scripts"]["rewardzip"].split(":")
    start = f"import sys; sys.argv[0] = 'rewardzip'; from {module} import {name}; {name}()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", start, *command[1:]],
        cwd=folder, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    if command[1] == "tune" and not torch.cuda.is_available():
        assert (done.returncode, "GPU" in done.stderr) == (2, True), done.stderr
    else:
        # a search of five seconds may find nothing within the gate, and says so by 1
        assert done.returncode in ((0, 1) if command[1] == "search" else (0,)), done.stdout + done.stderr


@pytest.mark.parametrize(("page", "line"), [line for line in LINES if line[1] not in OURS])
def test_what_other_commands_name_is_there(page, line):
    words = [word for word in shlex.split(line) if "=" not in word]
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0].endswith("pip"):
        for extras in re.findall(r"\[([a-z,]+)\]", line):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
        for file in re.findall(r"-c (\S+)", line):
            assert (ROOT / file).exists()
    elif words[0] == "serve":
        module, name = words[-1].split(":")
        assert f"\n{name} = " in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    else:
        assert words[0] in ("python3", "curl"), f"{page}: nothing is known of {line}"


def test_the_rates_of_scoring_are_those_of_the_file():
    text = (ROOT / "benchmarks/results/amd-epyc-zen5/score.json").read_text()
    rates = [json.loads(line)["rows_per_second"] for line in text.splitlines()]
    told = (ROOT / "docs/integrations.md").read_text()
    for rate in rates:
        assert f"| {rate:,.0f} | {rate / rates[0]:.2f}x |" in told, rate
    for rate in rates[1:]:
        assert f"{rate:,.0f}" in (ROOT / "docs/scale.md").read_text(), rate


@pytest.mark.parametrize("task", ["cheetah", "pendulum"])
def test_the_table_of_techniques_is_that_of_the_files(task):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "benchmarks/techniques.py", "table", task, "--out", "benchmarks/results/amd-epyc-zen5"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True).stdout
    assert table in (ROOT / "docs/compression.md").read_text()
    for technique in ("int8", "4 bits, means corrected", "neurons merged", "distilled", "distilled, three layers, two"):
        assert f"\n| {technique}" in table
    assert "\n| the same student without the teacher |" in table
