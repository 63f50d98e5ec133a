"""The robustness run: random models through everything a user does with them, until the time is up.

    python tests/soak.py [--seconds 600] [--seed N] [--only KIND]

Every case has its own seed; a failure prints the command that runs that case alone. It runs on the CPU.
"""

import argparse
import collections
import faulthandler
import mmap
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from soak_models import agree, random_inputs, random_model, stands_for, within_bound

import rewardzip as rz
import rewardzip_kernels
from rewardzip.nn import CompressedLinear


def swapped(model, config, inputs, skip=()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rz.swap(model, config, inputs, skip=skip)


def config_of(dice: random.Random, dtype: torch.dtype) -> rz.Int8:
    products = ["float32", "bfloat16"] if dtype == torch.float32 else []
    return dice.choice(
        [rz.Int8(), rz.Int8(activations="dynamic"), rz.Int8(activations="static"), rz.Int8(scalar_outputs=True)]
        + [rz.Int8(compute_dtype=p) for p in products]
    )


def life(dice: random.Random) -> None:
    """swap, evaluate, save, load, restore, learn on, refresh: each against float64 or to the bit."""
    model = random_model(dice)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = config_of(dice, model.dtype)
    many = random_inputs(dice, model, 64)
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    skip = [dice.choice(names)] if len(names) > 1 and dice.random() < 0.3 else []
    fast = swapped(model, config, many, skip)
    stands_for(fast, model)
    for rows in (dice.choice((1, 2, 3, 5)), dice.choice((17, 64, 130))):
        inputs = random_inputs(dice, model, rows)
        within_bound(fast, fast(*inputs), inputs, "swapped")
        if model.dtype == torch.float32:
            dense = rz.restore(fast)
            within_bound(dense, dense(*inputs), inputs, "restored")
            stands_for(dense, model)
    agree(model.state_dict(), before, "swap changed the original")

    with tempfile.TemporaryDirectory() as folder:
        rz.save(fast, Path(folder) / "saved")
        again = rz.load(Path(folder) / "saved", into=model.twin())
    agree(again(*inputs), fast(*inputs), "loaded")

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rz.refresh(fast, model)
    stands_for(fast, model)
    within_bound(fast, fast(*inputs), inputs, "refreshed")
    if config.activations != "static":
        agree(fast(*inputs), swapped(model, config, many, skip)(*inputs), "refreshed, against swapped anew")
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.5)
    within_bound(fast, fast(*inputs), inputs, "its dense layers changed in place")


def threads(dice: random.Random) -> None:
    """16 threads share one module, with batches of their own."""
    model = random_model(dice)
    fast = swapped(model, config_of(dice, model.dtype), random_inputs(dice, model, 64))
    batches = [random_inputs(dice, model, dice.choice((1, 1, 7, 64))) for _ in range(16)]
    expected = [fast(*batch) for batch in batches]
    wrong: list[str] = []

    def work(batch, result):
        with torch.no_grad():
            for _ in range(10):
                try:
                    agree(fast(*batch), result, "a thread")
                except Exception:
                    wrong.append(traceback.format_exc())
                    return

    running = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if wrong:
        raise AssertionError(f"{len(wrong)} threads failed; the first:\n{wrong[0]}")


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked child that does ``work``; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # torch's own threads do not survive a fork
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(dice: random.Random) -> None:
    model = random_model(dice)
    fast = swapped(model, config_of(dice, model.dtype), random_inputs(dice, model, 64))
    inputs = random_inputs(dice, model, dice.choice((1, 64)))
    expected = fast(*inputs)
    status = in_child(lambda: agree(fast(*inputs), expected, "a forked child"))
    assert status == 0, f"the forked child ended with {status}"


def in_the_library(error: BaseException) -> bool:
    folders = tuple(str(Path(package.__file__).parent) for package in (rz, rewardzip_kernels))
    frames = traceback.extract_tb(error.__traceback__)
    # the second is code that rewardzip/direct.py writes for a module
    return any(frame.filename.startswith(folders) or frame.filename == "<written>" for frame in frames)


def memory(dice: random.Random) -> None:
    """Where memory ends in a call there is an error that says so, and the next call is right."""
    # of models whose first layer is ours: the first to ask for memory
    fast = torch.nn.Sequential(torch.nn.Identity())
    while not isinstance(fast[0], CompressedLinear):
        model = random_model(dice, torch.float32, "sequential")
        fast = swapped(model, rz.Int8(), random_inputs(dice, model, 64))
    inputs = random_inputs(dice, model, 3)
    expected = fast(*inputs)

    def work():
        # the results alone of the most rows are more than there is room for
        for rows in (1 << 22, 1 << 25):
            # one row over and over, in no memory of its own: what the call needs, it asks for itself
            many = [x[:1].expand(rows, -1) for x in inputs]
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            try:
                fast(*many)
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and "memory" not in str(error):
                    raise
                if in_the_library(error):
                    break
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        else:
            raise AssertionError(f"the library had memory for {rows} rows of {tuple(expected.shape[1:])}")
        agree(fast(*inputs), expected, "after memory ended")

    status = in_child(work)
    assert status == 0, f"out of memory: the child ended with {status}"


def flips(dice: random.Random) -> None:
    """Damaged files: an error that says so, or a model of the same shape."""
    model = random_model(dice)
    inputs = random_inputs(dice, model, 3)
    fast = swapped(model, config_of(dice, model.dtype), random_inputs(dice, model, 64))
    shape = fast(*inputs).shape
    with tempfile.TemporaryDirectory() as folder:
        rz.save(fast, Path(folder) / "saved")
        for _ in range(20):
            file = Path(folder) / "saved" / dice.choice(("config.json", "model.safetensors"))
            sound = file.read_bytes()
            damaged = bytearray(sound)
            if dice.random() < 0.2:
                del damaged[dice.randrange(len(damaged)) :]
            else:
                # most flips where they matter: in the header, not in the numbers
                at = dice.randrange(min(len(damaged), 600) if dice.random() < 0.8 else len(damaged))
                damaged[at] ^= 1 << dice.randrange(8)
            file.write_bytes(damaged)
            skeleton = model.twin()
            state = {name: t.clone() for name, t in skeleton.state_dict().items()}
            try:
                again = rz.load(Path(folder) / "saved", into=skeleton)
            except rz.CheckpointError:
                agree(skeleton.state_dict(), state, "a refused file changed the skeleton")
            else:
                assert again(*inputs).shape == shape
            file.write_bytes(sound)


def killed(dice: random.Random) -> None:
    """A process killed while it saves leaves one of the two models, whole."""
    model = random_model(dice)
    example = random_inputs(dice, model, 64)
    first = swapped(model, rz.Int8(), example)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    second = swapped(model, rz.Int8(), example)
    answers = [first(*example), second(*example)]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "saved"
        rz.save(first, target)
        child = os.fork()
        if child == 0:
            while True:
                rz.save(second, target)
                rz.save(first, target)
        time.sleep(dice.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        y = rz.load(target, into=model.twin())(*example)
        assert any(torch.equal(y, answer) for answer in answers), "neither model"
        rz.save(second, target)
        agree(rz.load(target, into=model.twin())(*example), answers[1], "saved after a kill")


def _spawned(folder: str, inputs, expected) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        agree(rz.load(folder)(*inputs), expected, "a spawned child")


def spawn(dice: random.Random) -> None:
    model = random_model(dice, form="sequential")
    inputs = random_inputs(dice, model, 7)
    fast = swapped(model, rz.Int8(), inputs)
    with tempfile.TemporaryDirectory() as folder:
        rz.save(fast, Path(folder) / "saved")
        arguments = str(Path(folder) / "saved"), inputs, fast(*inputs)
        child = multiprocessing.get_context("spawn").Process(target=_spawned, args=arguments)
        child.start()
        child.join()
    assert child.exitcode == 0, f"the spawned child ended with {child.exitcode}"


# kind: how often, relative to the others
KINDS: dict[Callable[[random.Random], None], float] = {
    life: 60, threads: 10, fork: 10, memory: 2, flips: 10, killed: 7, spawn: 0.5
}  # fmt: skip


def run(seconds: float, seed: int, only: str | None, mark: mmap.mmap) -> None:
    done: collections.Counter[str] = collections.Counter()
    kinds = {kind: weight for kind, weight in KINDS.items() if only in (None, kind.__name__)}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not done:
        dice = random.Random(seed)
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        # read by the parent if this process dies
        mark[:64] = f"--seed {seed} --only {kind.__name__} --seconds 0".ljust(64).encode()
        torch.manual_seed(seed)
        with torch.no_grad():
            kind(dice)
        done[kind.__name__] += 1
        seed += 1
    print(f"soak: {sum(done.values())} cases, none wrong: {dict(done)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1000 % 10**9)
    parser.add_argument("--only", choices=[kind.__name__ for kind in KINDS])
    options = parser.parse_args()
    faulthandler.enable()
    mark = mmap.mmap(-1, 64)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            run(options.seconds, options.seed, options.only, mark)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"soak: ended with {status}; again: python tests/soak.py {mark[:64].decode().strip()}", file=sys.stderr)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
