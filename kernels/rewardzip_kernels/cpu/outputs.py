"""Large outputs in large pages.

What is larger than glibc keeps comes from the system anew at each call, and pages of 4 KB, zeroed and mapped one by one
at the first write, take longer than the kernels that fill them. Linux hands out 2 MB at a time where it is asked to.
"""

import ctypes
import mmap
from collections.abc import Callable

from torch import Tensor

# the most that glibc's M_MMAP_THRESHOLD may be
LARGE = 32 << 20


def in_large_pages(y: Tensor) -> Tensor:
    """y, not yet written to. A hint: where the system does not take it, pages are as they were."""
    if y.nbytes > LARGE and _advise is not None:
        start = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        _advise(start, (y.data_ptr() + y.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return y


def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # no such function here
        return None
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


_advise = _madvise()
