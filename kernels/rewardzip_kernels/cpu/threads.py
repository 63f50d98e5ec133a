"""Threads of our own around kernels that release the GIL, and the memory each thread works in.

Numba's parallel layers are not used: one aborts on concurrent calls, another changes torch's thread count.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch


class _Local(threading.local):
    size, address = -1, 0


_local = _Local()
# a thread's share is cut into so many where they may be short
PIECES = 4

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_workers_ids: list[int] = []
_away_from = -1


def scratch(size: int) -> int:
    """The address of ``size`` bytes that are this thread's own until its next call."""
    if _local.size < size:
        _local.memory, _local.size = torch.empty(size, dtype=torch.uint8, device="cpu"), size
        _local.address = _local.memory.data_ptr()
    return _local.address


def ranges(count: int, parts: int, quantum: int, least: int | None = None) -> list[tuple[int, int]]:
    """``range(count)`` in at most ``parts`` pieces whose lengths are multiples of ``quantum``, but for the last.

    least: where no piece need be longer than this, several for each part, so that who is done sooner does more.
    """
    step = -(-count // (parts * quantum)) * quantum
    if least is not None:
        step = min(step, max(least, -(-count // (parts * PIECES * quantum)) * quantum))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def run(call: Callable[[int, int], None], pieces: list[tuple[int, int]]) -> None:
    """``call(start, stop)`` for every piece, on the calling thread and on as many others as torch has threads.

    Nobody is waited for who has not begun: waking a thread takes longer than some of the pieces, and on a busy machine
    it may not come at all. Each takes the next piece when it is done with one.
    """
    left = iter(pieces)

    def work() -> None:
        for piece in left:
            call(*piece)

    others = min(torch.get_num_threads(), len(pieces)) - 1
    if others > 0:
        _steer()
    waiting = [_workers(others).submit(work) for _ in range(others)]
    try:
        work()
    finally:
        for future in waiting:
            if not future.cancel():
                future.result()


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            # an outgrown pool finishes what it was given
            _pool, _pool_size = ThreadPoolExecutor(count, "rewardzip", _enter), count
            _workers_ids.clear()
        return _pool


def _enter() -> None:
    global _away_from
    _workers_ids.append(threading.get_native_id())
    _away_from = -1


def _steer() -> None:
    """Keep the workers off the processor that this thread runs on.

    Linux likes to wake a thread where the one that wakes it runs, and to move it only milliseconds later: two threads
    then take as long as one.
    """
    global _away_from
    if _processor is None:
        return
    here = _processor()
    if here == _away_from:
        return
    _away_from = here
    others = os.sched_getaffinity(0) - {here}
    for worker in list(_workers_ids) if others else ():
        with suppress(OSError):  # it has ended, or may not be moved
            os.sched_setaffinity(worker, others)


try:
    _processor: Callable[[], int] | None = ctypes.CDLL(None).sched_getcpu if hasattr(os, "sched_setaffinity") else None
except (OSError, AttributeError, TypeError):  # no such function here
    _processor = None


def _forget_pool() -> None:
    """In the child of a fork: its parent's threads do not exist there, and its lock may be held by one of them."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()
    _workers_ids.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
