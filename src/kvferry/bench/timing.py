"""Timings of alternatives, taken in turn so that a drift of the machine meets all of them."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

BURST = 32
"""Runs that `rotated` submits at a time: well below what a CUDA stream takes without making the host wait."""


@dataclass(frozen=True)
class Lap:
    """One run: seconds until the work was done, and seconds until the host could go on."""

    work: float
    host: float


class Clock(Protocol):
    """Times one run, which it waits for."""

    def __call__(self, run: Callable[[], object]) -> Lap:
        """Run, wait, and say how long both took."""
        ...


class DeviceClock:
    """By events on the current stream of a CUDA device: what `run` queues there, or makes that stream wait for.

    The stream is idle when `run` starts, so the time includes what the host takes to submit before the device has
    something to do, as it does for whoever waits for one copy.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def __call__(self, run: Callable[[], object]) -> Lap:
        stream = torch.cuda.current_stream(self._device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream.synchronize()
        start.record(stream)
        begun = time.perf_counter()
        run()
        host = time.perf_counter() - begun
        end.record(stream)
        end.synchronize()
        return Lap(start.elapsed_time(end) / 1e3, host)


def host_clock(run: Callable[[], object]) -> Lap:
    """By the host's clock, for work that is done when `run` returns: the measuring code's own tests."""
    begun = time.perf_counter()
    run()
    seconds = time.perf_counter() - begun
    return Lap(seconds, seconds)


def interleaved(
    methods: Mapping[str, Callable[[], object]], repeats: int, clock: Clock, max_seconds: float = math.inf
) -> dict[str, list[Lap]]:
    """Laps of every method, one of each in turn, each round starting with another; after one round to warm up.

    `repeats` rounds, or fewer (not below 5) as would fit into `max_seconds` going by the warm-up.
    """
    warm = {name: clock(run) for name, run in methods.items()}
    round_seconds = sum(max(lap.work, lap.host) for lap in warm.values())
    rounds = min(repeats, max(5, int(min(max_seconds / max(round_seconds, 1e-9), repeats))))
    laps: dict[str, list[Lap]] = {name: [] for name in methods}
    names = list(methods)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            laps[name].append(clock(methods[name]))
    return laps


class SeriesClock(Protocol):
    """Times runs that follow one another."""

    def __call__(self, runs: Sequence[Callable[[], object]]) -> tuple[list[Lap], bool]:
        """A lap of each, and whether none of them waited for the host."""
        ...


class QueuedClock:
    """By events on the current stream of a CUDA device that is held up until all runs are submitted: what a run takes
    where work is always queued, without the host's share in it.

    Runs that make the host wait for the device cannot be timed so: they come back as having waited for the host.
    """

    _TRIES = 4
    _MOST_SECONDS = 1.0

    def __init__(self, device: int) -> None:
        self._device = device
        self._host_seconds = 200e-6  # of one run, on the safe side
        self._cycles_per_second = 1e9
        for _ in range(2):
            seconds = self._submit([lambda: self._hold(0.01)], 0)[0][0].work
            self._cycles_per_second *= 0.01 / seconds

    def __call__(self, runs: Sequence[Callable[[], object]]) -> tuple[list[Lap], bool]:
        """The device is held up longer, and the runs repeated, while it gets to the first before the last is queued."""
        seconds = min(1e-3 + 2 * len(runs) * self._host_seconds, self._MOST_SECONDS)
        for attempt in range(self._TRIES):
            laps, ahead = self._submit(runs, seconds)
            if ahead or attempt == self._TRIES - 1:
                break
            seconds = min(4 * seconds, self._MOST_SECONDS)
        if ahead:
            self._host_seconds = max(20e-6, 2 * statistics.mean(lap.host for lap in laps))
        return laps, ahead

    def _hold(self, seconds: float) -> None:
        if seconds > 0:
            torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def _submit(self, runs: Sequence[Callable[[], object]], hold: float) -> tuple[list[Lap], bool]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in runs]
            host = []
            stream.synchronize()
            self._hold(hold)
            for run, (start, end) in zip(runs, pairs, strict=True):
                start.record(stream)
                begun = time.perf_counter()
                run()
                host.append(time.perf_counter() - begun)
                end.record(stream)
            ahead = not pairs[0][0].query()
            stream.synchronize()
        work = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [Lap(*lap) for lap in zip(work, host, strict=True)], ahead


def host_series(runs: Sequence[Callable[[], object]]) -> tuple[list[Lap], bool]:
    """`host_clock` of each run: the measuring code's own tests."""
    return [host_clock(run) for run in runs], True


class Rotation:
    """Calls that rotate over `sets` sets of data: each gets the number of the set that was used longest ago, so that
    what it touches has left the caches."""

    def __init__(self, sets: int) -> None:
        self._numbers = itertools.cycle(range(sets))

    def next(self, call: Callable[[int], object]) -> Callable[[], object]:
        """The next call."""
        return partial(call, next(self._numbers))

    def laps(
        self,
        legs: Mapping[str, Callable[[int], object]],
        repeats: int,
        clock: SeriesClock,
        max_seconds: float = math.inf,
    ) -> tuple[dict[str, list[Lap]], dict[str, bool]]:
        """(laps of every leg, whether none of them waited for the host), in bursts of each leg in turn, after a few to
        warm up.

        `repeats` laps, or fewer (not below 5) as would fit into `max_seconds` for all legs going by the warm-up.
        """
        warm = [clock([self.next(leg) for _ in range(3)])[0][-1] for leg in legs.values()]
        round_seconds = sum(max(lap.work, lap.host) for lap in warm)
        rounds = min(repeats, max(5, int(min(max_seconds / max(round_seconds, 1e-9), repeats))))
        laps: dict[str, list[Lap]] = {name: [] for name in legs}
        kept_ahead = dict.fromkeys(legs, True)
        for first in range(0, rounds, BURST):
            for name, leg in legs.items():
                found, ahead = clock([self.next(leg) for _ in range(min(BURST, rounds - first))])
                laps[name] += found
                kept_ahead[name] &= ahead
        return laps, kept_ahead


def summary(laps: list[Lap], num_bytes: int) -> dict[str, float]:
    """Median and 99th percentile (nearest rank) in microseconds, GB/s (10**9) at the median, the host's median."""
    work = sorted(lap.work for lap in laps)
    median = statistics.median(work)
    return {
        "repeats": len(laps),
        "median_us": median * 1e6,
        "p99_us": work[math.ceil(0.99 * len(work)) - 1] * 1e6,
        "gb_per_s": num_bytes / max(median, 1e-12) / 1e9,
        "host_median_us": statistics.median(lap.host for lap in laps) * 1e6,
    }
