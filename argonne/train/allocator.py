"""How the C library treats memory that tensors give back. It matters on the CPU only: a GPU has torch's caching
allocator.

glibc serves blocks under a threshold, which it raises by itself to 32 MiB, from one heap. The blocks of a training step
come and go in another order than they were made in, holes stay behind, and the process holds up to half as much again
as its tensors need (measured: docs/plan.md). With a fixed threshold every larger block is mapped by itself and returned
at once: what the process holds is what the plan counts. The price is a page fault for every 4 KiB of a new tensor, so
small runs, which spend much of their time there, keep the heap.
"""

from __future__ import annotations

import ctypes

LARGE_RUN = 1e9  # bytes planned from which "auto" returns memory
BLOCK = 1 << 20  # bytes from which a block is mapped by itself
LARGEST_BLOCK = 1 << 30  # the same where freed memory is kept
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def return_freed_memory() -> bool:
    """From now on, map blocks of 1 MiB and more by themselves. False where the C library has no such switch (it is
    glibc's).
    """
    return _serve_from_the_heap_up_to(BLOCK)


def keep_freed_memory() -> bool:
    """From now on, in this process and those that it forks, keep what large blocks leave free for the next ones. False
    as above.
    """
    return _serve_from_the_heap_up_to(LARGEST_BLOCK)


def _serve_from_the_heap_up_to(size: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, size)) and bool(mallopt(_M_TRIM_THRESHOLD, size))
