"""Timings of alternatives, taken in turn so that a drift of the machine meets all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


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
