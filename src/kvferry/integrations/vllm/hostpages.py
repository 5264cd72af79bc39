"""Host memory that is there before it is used: pages of a mapping faulted in from several threads.

The kernel clears a page when it is touched first, which one thread does at 1 to 3 GiB a second: for tens of GiB that is
most of an engine's start. Threads clear pages of different files side by side (inserting into one file's page cache is
serial); vLLM's shared region is made of up to 32 files.
"""

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later: madvise(2)."""
_MOST_THREADS = 16
"""Clearing pages from more takes all of the memory's bandwidth and gains nothing."""
_LEAST_BYTES = 64 << 20
"""Less is not worth a thread."""

Range = tuple[int, int]
"""Offset and length in bytes, both multiples of the page size."""


def fault_in(base: int, ranges: Sequence[Range], num_workers: int = 1) -> list[Range]:
    """Fault `ranges` of the mapping at address `base` in, for writing, keeping what they hold. Returns those for which
    the kernel refused to (without MADV_POPULATE_WRITE all of them).

    The process shares its cores with `num_workers` in all that do the same.
    """
    joined = _joined(ranges)
    total = sum(length for _, length in joined)
    cores = len(os.sched_getaffinity(0)) // max(1, num_workers)
    threads = max(1, min(_MOST_THREADS, cores, total // _LEAST_BYTES))
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # unlike mmap's method this lets go of the interpreter's lock
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def populate(part: list[Range]) -> list[Range]:
        return [(at, length) for at, length in part if madvise(base + at, length, _MADV_POPULATE_WRITE)]

    with ThreadPoolExecutor(threads) as pool:
        return [left for part in pool.map(populate, _split(joined, total, threads)) for left in part]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in order, in as few ranges as can be."""
    joined: list[Range] = []
    for at, length in sorted(ranges):
        if joined and at <= sum(joined[-1]):
            joined[-1] = (joined[-1][0], max(sum(joined[-1]), at + length) - joined[-1][0])
        else:
            joined.append((at, length))
    return joined


def _split(ranges: Sequence[Range], total: int, parts: int) -> list[list[Range]]:
    """`ranges` in at most `parts` of about as many bytes, neighbours together, cut every few 2 MiB from their start."""
    step = 2 << 20
    share = -(-total // parts // step) * step
    made: list[list[Range]] = [[]]
    room = share
    for at, length in ranges:
        while length:
            if room <= 0:
                made.append([])
                room = share
            taken = min(length, -(-room // step) * step)
            made[-1].append((at, taken))
            at, length, room = at + taken, length - taken, room - taken
    return made
