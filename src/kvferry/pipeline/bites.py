"""How a job is cut: bites, which are coded and copied in turn, and runs, which one copy moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Bite:
    """Chunks `first` to `stop` of a part of a job."""

    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


@lru_cache(maxsize=256)
def growing(num_chunks: int, smallest: int, most: int, growth: int) -> tuple[Bite, ...]:
    """Bites of `smallest` chunks, then `growth` times as many each time up to `most`; the last takes what is left.

    For stores: the wire starts as soon as the first bite is coded, and coding a bite is done before the one `growth`
    times smaller has left.
    """
    bites, begin, size = [], 0, min(smallest, most)
    while begin < num_chunks:
        stop = min(num_chunks, begin + size)
        bites.append(Bite(begin, stop))
        begin, size = stop, min(size * growth, most)
    return tuple(bites)


@lru_cache(maxsize=256)
def shrinking(num_chunks: int, smallest: int, most: int, growth: int) -> tuple[Bite, ...]:
    """`growing`, the other way round. For loads: what remains when the wire falls silent is decoding the last bite."""
    bites = reversed(growing(num_chunks, smallest, most, growth))
    return tuple(Bite(num_chunks - bite.stop, num_chunks - bite.first) for bite in bites)


@dataclass(frozen=True)
class Runs:
    """Rows that neighbour each other in host memory and in the ring: `lengths` rows from `host` and `ring` on, int32
    and int64 `[n]`."""

    host: np.ndarray
    ring: np.ndarray
    lengths: np.ndarray


def runs_of(bites: Sequence[Bite], host: np.ndarray, ring: np.ndarray) -> list[Runs]:
    """The longest runs of each bite. Chunk i is row `host[i]` in host memory and `ring[i]` in the ring; there, a bite's
    rows follow one another. All bites at once: a handful of NumPy calls, however many there are."""
    firsts = [bite.first for bite in bites]
    begins = np.empty(len(host), dtype=np.bool_)
    np.not_equal(host[1:], host[:-1] + 1, out=begins[1:])
    begins[firsts] = True
    starts = begins.nonzero()[0]
    lengths = np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = len(host) - starts[-1]
    hosts, rings = host[starts], ring[starts]
    edges = [*starts.searchsorted(firsts).tolist(), len(starts)]
    return [Runs(hosts[a:b], rings[a:b], lengths[a:b]) for a, b in pairwise(edges)]
