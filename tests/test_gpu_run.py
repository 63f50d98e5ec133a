"""``make gpu`` is ready before there is a GPU: what its machine may lack, its time, its commands."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rewardzip_kernels import loading

ROOT = Path(__file__).parent.parent


def test_without_hypothesis_the_other_tests_run(tmp_path):
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    command += ["tests/test_neurons.py", "-k", "any_mlp or masks_shrink"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout


STAND_IN = """#!/bin/sh
echo "$0 $*" >> {log}
exit {code}
"""


def rehearse(folder, *parts, **environment):
    """gpu.sh with commands that do nothing: (what it prints, its status, the lines of what would have run)."""
    log = folder / "log"
    for name in ("timeout", "nvidia-smi", "compute-sanitizer"):
        (folder / name).write_text(STAND_IN.format(log=log, code=environment.get("CODE", "0")))
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable} | environment
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", folder / "out", *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    return done.stdout, done.returncode, log.read_text().splitlines()


def test_it_takes_less_than_8_minutes(tmp_path):
    """By the limits of its steps; the last may take 15 seconds more to end."""
    _, status, ran = rehearse(tmp_path)
    assert status == 0
    limits = [float(re.search(r"--kill-after 15(?: --foreground --signal INT)? (\d+) ", line)[1]) for line in ran]
    assert len(limits) > 10
    assert sum(limits) < 480 - 15


def test_the_commands_know_their_options(tmp_path):
    for part in ((), ("compiled", "evidence")):
        for line in rehearse(tmp_path, *part)[2]:
            if script := re.search(r"(benchmarks/\w+\.py)(.*)", line):
                text = (ROOT / script[1]).read_text()
                for option in re.findall(r" (--[a-z-]+)", script[2]):
                    assert f'"{option}"' in text, line


def test_the_kernels_tests_run_first_and_none_twice(tmp_path):
    kernels, others = rehearse(tmp_path, "tests")[2]
    first = set(re.findall(r" (tests/\S+\.py)", kernels))
    for op in loading.OPS:
        assert f"tests/test_{op}.py" in first
    assert set(re.findall(r"--ignore (\S+)", others)) == first
    assert "--foreground --signal INT" in kernels
    assert ("-n 8 --dist worksteal" in kernels) == (find_spec("xdist") is not None)


def test_without_a_gpu_every_part_has_small_steps(tmp_path):
    _, status, ran = rehearse(tmp_path, DRY="1")
    assert status == 0
    ours = [line for line in ran if "benchmarks/" in line and "launch_cost" not in line]
    assert sum("models.py" in line for line in ours) == 2, "with torch.compile and without"
    for line in ours:
        assert "--quick" in line or "--dry" in line or "--case" in line or "small_shapes" in line, line


def test_what_ran_out_of_time_is_told_from_what_failed(tmp_path):
    for code, words in (("124", "time was up after 30 s"), ("3", "FAILED")):
        printed, status, _ = rehearse(tmp_path, "launch", CODE=code)
        assert status == 1
        assert f"== launch {words}" in printed.replace(": ", " ")
