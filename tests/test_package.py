"""The package as others meet it: what importing costs and starts, life without Triton and Numba, wheel and sdist."""

import os
import pickle
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code, *, executable=sys.executable, path=True, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_cheap():
    """At most 1.15 x ``import torch``: both in one process, one after the other, the median of several."""
    code = (
        "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
        "import rewardzip; print((time.perf_counter() - start) / (middle - start))"
    )
    ratios = [float(python(code)) for _ in range(7)]
    assert statistics.median(ratios) <= 1.15, ratios


def test_the_package_is_sent_by_name():
    """A function of a script that says ``import rewardzip as rz`` takes the module with it to Ray's workers."""
    import rewardzip as rz

    assert pickle.loads(pickle.dumps(rz)) is rz


def test_importing_starts_nothing():
    out = python(
        "import sys, threading, torch; before = threading.active_count(); import rewardzip; "
        "heavy = [m for m in ('triton', 'numba', 'llvmlite', 'gymnasium', 'scipy', 'matplotlib') if m in sys.modules]; "
        "print(heavy, threading.active_count() - before, torch.cuda.is_initialized())"
    )
    assert out.split("\n")[0] == "[] 0 False"


def test_without_triton_numba_and_a_compiler(tmp_path):
    """Everything runs on plain torch; the user is told once per op."""
    code = """
import sys, warnings
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "numba", "llvmlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, rewardzip as rz
model = rz.RewardMLP(3, 2)
s, a = torch.randn(5, 3), torch.randn(5, 2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for config in (rz.Int8(), rz.Int8(activations="dynamic")):
        fast = rz.swap(model, config)
        for _ in range(3):
            assert (fast(s, a) - model(s, a)).abs().max() < 0.1
from rewardzip_kernels.loading import _found
torch_ops = [op for (_, op), f in _found.items() if f.__name__.endswith("reference")]
print(len(said) <= 3, len(torch_ops))
"""
    out = python(code, cwd=tmp_path)
    assert out.split() == ["True", "3"]


def test_names_in_the_repository():
    """Nothing that could be imported by a name somebody else owns."""
    for folder in ("kernels", "tests", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if shutil.which("git") is None:
        pytest.skip("needs git to copy the tracked files")
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"], cwd=source, check=True)
    return source / "dist"


def test_wheel_and_sdist_hold_both_packages(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.partition("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"rewardzip", "rewardzip_kernels"}, "a top-level package called kernels would be somebody else's"
    for needed in ("rewardzip/py.typed", "rewardzip_kernels/py.typed", "rewardzip_kernels/gpu/int8_linear.py"):
        assert needed in names
    with tarfile.open(sdist) as file:
        files = file.getnames()
    assert any(n.endswith("kernels/rewardzip_kernels/int8_linear.py") for n in files)
    assert any(n.endswith("LICENSE") for n in files)


def test_wheel_runs_in_an_environment_of_its_own(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    into = ["--python", str(tmp_path / "env" / "bin" / "python")]
    install = [sys.executable, "-m", "pip", *into, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # the dependencies come from here, behind the new environment's own packages; this project's path hooks do not
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import torch, rewardzip as rz, rewardzip_kernels; "
        "m = rz.RewardMLP(3, 1); f = rz.swap(m, rz.Int8()); rz.save(f, 'saved'); g = rz.load('saved'); "
        "x = torch.randn(4, 3), torch.randn(4, 1); assert torch.equal(g(*x), f(*x)); "
        "print(rz.__file__, rewardzip_kernels.__file__, rz.__version__)"
    )
    out = python(code, executable=tmp_path / "env" / "bin" / "python", path=False, cwd=tmp_path)
    package, kernels, version = out.split()
    assert package.startswith(str(site))
    assert kernels.startswith(str(site))
    assert version in wheel.name


@pytest.mark.parametrize("first", ["", "import rewardzip.score, rewardzip.search, rewardzip.prune\n"])
def test_what_is_loaded_later_is_there(first):
    code = first + (
        "import rewardzip as rz, types\n"
        "names = ['Distil', 'FineTune', 'Gate', 'LowRank', 'Prune', 'Quantize', 'Share', 'compress', 'evaluate',\n"
        "         'export', 'prune', 'score', 'search']\n"
        "for name in names:\n"
        "    assert name in dir(rz), name\n"
        "    assert callable(getattr(rz, name)) and not isinstance(getattr(rz, name), types.ModuleType), name\n"
        "from rewardzip import score, Prune\n"
        "assert score is rz.score\n"
        "try:\n"
        "    rz.scores\n"
        "except AttributeError as error:\n"
        "    assert 'scores' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
