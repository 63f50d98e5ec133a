"""Threads of our own around kernels that release the GIL, and the memory each thread works in.

Numba's parallel layers are not used: one aborts on concurrent calls, another changes torch's thread count.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


class _Local(threading.local):
    size, address = -1, 0


_local = _Local()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def scratch(size: int) -> int:
    """The address of ``size`` bytes that are this thread's own until its next call."""
    if _local.size < size:
        _local.memory, _local.size = torch.empty(size, dtype=torch.uint8), size
        _local.address = _local.memory.data_ptr()
    return _local.address


def ranges(count: int, parts: int, quantum: int) -> list[tuple[int, int]]:
    """``range(count)`` in at most ``parts`` pieces whose lengths are multiples of ``quantum``, but for the last."""
    step = -(-count // (parts * quantum)) * quantum
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def run(call: Callable[[int, int], None], pieces: list[tuple[int, int]]) -> None:
    """``call(start, stop)`` for every piece, the first on the calling thread."""
    waiting = [_workers(len(pieces) - 1).submit(call, *piece) for piece in pieces[1:]]
    try:
        call(*pieces[0])
    finally:
        for future in waiting:
            future.result()


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            # an outgrown pool finishes what it was given
            _pool, _pool_size = ThreadPoolExecutor(count, "rewardzip"), count
        return _pool


def _forget_pool() -> None:
    """In the child of a fork: its parent's threads do not exist there, and its lock may be held by one of them."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
