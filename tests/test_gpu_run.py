"""``make gpu`` is ready before there is a GPU: what its machine may lack, its time, its commands."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_without_hypothesis_the_other_tests_run(tmp_path):
    (tmp_path / "hypothesis.py").write_text("raise ImportError('not here')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    command += ["tests/test_neurons.py", "-k", "any_mlp or masks_shrink"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
