"""How fast bytes cross between host and device: `copy_`, `cuda_copy_`, `copy_batch` and `copy_ranges` side by side.

Every case is checked before it is timed: the bytes that arrived are the bytes that were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvferry.bench.timing import Clock, DeviceClock, host_clock, interleaved, summary
from kvferry.device import PinnedPool, copy_batch, copy_ranges, cuda_copy_, side_stream
from kvferry.errors import KVFerryError

DIRECTIONS = ("h2d", "d2h", "both")
LAYOUTS = ("contiguous", "neighbours", "scattered")
CHECKED_BYTES = 64 << 20
"""Compared at a time."""


@dataclass(frozen=True)
class BaselineSettings:
    """What to measure. `sizes` and `range_bytes` in bytes; `case_seconds` bounds the rounds of one case, 5 at least."""

    sizes: tuple[int, ...] = tuple(4096 << shift for shift in range(0, 19, 2))
    iterations: int = 30
    range_bytes: int = 64 << 10
    case_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) <= 0:
            raise ValueError(f"sizes are {list(self.sizes)}: give one or more, of at least 1 byte")
        if self.iterations < 1 or self.range_bytes < 1:
            raise ValueError(f"iterations is {self.iterations}, range_bytes {self.range_bytes}: both are at least 1")


@dataclass(frozen=True)
class Case:
    """One row of the results. `num_bytes` in each direction; `ranges` of them, one where the layout is contiguous."""

    memory: str  # of the host: pinned or pageable
    direction: str
    layout: str
    num_bytes: int
    ranges: int

    @property
    def total_bytes(self) -> int:
        """Bytes of both directions together."""
        return self.num_bytes * (2 if self.direction == "both" else 1)


def cases(settings: BaselineSettings) -> Iterator[Case]:
    """All that is measured: pinned memory in every direction and layout, pageable memory contiguous and one direction
    at a time (the host waits in such copies, so two cannot be under way)."""
    for num_bytes in settings.sizes:
        for direction in DIRECTIONS:
            yield Case("pinned", direction, "contiguous", num_bytes, 1)
            count = num_bytes // settings.range_bytes
            if count > 1 and num_bytes % settings.range_bytes == 0:
                yield Case("pinned", direction, "neighbours", num_bytes, count)
                yield Case("pinned", direction, "scattered", num_bytes, count)
        for direction in DIRECTIONS[:2]:
            yield Case("pageable", direction, "contiguous", num_bytes, 1)


class Lane(NamedTuple):
    """Copies in one direction: `to` and `of` are the byte offsets of the ranges, `size` the bytes of each."""

    dst: Tensor
    src: Tensor
    stream: torch.cuda.Stream | None  # None: the current one
    to: npt.NDArray[np.int64]
    of: npt.NDArray[np.int64]
    size: int


class Bench:
    """The buffers of one run on `device`, a CUDA device or (to test this code) the CPU, and the cases on them."""

    def __init__(self, device: torch.device, settings: BaselineSettings) -> None:
        self._settings = settings
        on_gpu = device.type == "cuda"
        index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else 0
        self._clock: Clock = DeviceClock(index) if on_gpu else host_clock
        self._stream = side_stream(index) if on_gpu else None
        self._other = side_stream(index, high_priority=True) if on_gpu else None
        largest = max(settings.sizes)
        self._pool = PinnedPool(2 * largest + 1024, device=torch.device("cuda", index) if on_gpu else "cpu")
        self._pinned = [self._pool.allocate(largest).tensor for _ in range(2)]
        self._pageable = torch.empty(largest, dtype=torch.uint8)
        # What goes to the device, what comes from it: sources are filled once and never written again.
        self._device = [torch.randint(0, 256, (largest,), dtype=torch.uint8, device=device) for _ in range(2)]
        for host in (*self._pinned, self._pageable):
            host.copy_(self._device[0])

    def close(self) -> None:
        """Give the page-locked memory back."""
        self._pool.close()

    def run(self, case: Case) -> list[dict[str, Any]]:
        """Check and time the case by every method: one result each. Raises `KVFerryError` if bytes arrive wrong."""
        with self._on_stream():
            lanes = self._lanes(case)
            methods = self._methods(case, lanes)
            for name, method in methods.items():
                self._check(f"{name}, {case}", method, lanes)
            laps = interleaved(methods, self._settings.iterations, self._clock, self._settings.case_seconds)
        return [{**asdict(case), "method": name, **summary(found, case.total_bytes)} for name, found in laps.items()]

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _lanes(self, case: Case) -> list[Lane]:
        size = case.num_bytes // case.ranges
        to = np.arange(case.ranges, dtype=np.int64) * size
        of = to
        if case.layout == "scattered":
            of = np.random.default_rng(0).permutation(to)
        host = self._pinned if case.memory == "pinned" else [self._pageable] * 2
        pairs = {"h2d": (self._device[0], host[0]), "d2h": (host[1], self._device[1])}
        chosen = [pairs[way] for way in DIRECTIONS[:2] if case.direction in (way, "both")]
        streams = (None, self._other)
        return [
            Lane(dst[: case.num_bytes], src[: case.num_bytes], stream, to, of, size)
            for (dst, src), stream in zip(chosen, streams, strict=False)
        ]

    def _methods(self, case: Case, lanes: list[Lane]) -> dict[str, Callable[[], object]]:
        pieces = [
            (
                [lane.dst[start : start + lane.size] for start in lane.to.tolist()],
                [lane.src[start : start + lane.size] for start in lane.of.tolist()],
            )
            for lane in lanes
        ]
        sizes = np.full(case.ranges, lanes[0].size)

        def by_copy(number: int) -> None:
            stream = lanes[number].stream
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                for dst, src in zip(*pieces[number], strict=True):
                    dst.copy_(src, non_blocking=True)

        def by_cuda_copy(number: int) -> None:
            for dst, src in zip(*pieces[number], strict=True):
                cuda_copy_(dst, src, True, lanes[number].stream)

        def by_batch(number: int) -> None:
            copy_batch(*pieces[number], lanes[number].stream)

        def by_ranges(number: int) -> None:
            lane = lanes[number]
            copy_ranges(lane.dst, lane.to, lane.src, lane.of, sizes, lane.stream)

        found = {"copy_": by_copy, "cuda_copy_": by_cuda_copy, "copy_batch": by_batch}
        if case.ranges > 1:
            found["copy_ranges"] = by_ranges
        return {name: self._joined(one, lanes) for name, one in found.items()}

    def _joined(self, one: Callable[[int], None], lanes: list[Lane]) -> Callable[[], object]:
        """All lanes, begun together and ended where the current stream ends."""

        def run() -> None:
            beside = [lane.stream for lane in lanes if lane.stream is not None]
            for stream in beside:
                stream.wait_stream(torch.cuda.current_stream(stream.device))
            for number in range(len(lanes)):
                one(number)
            for stream in beside:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

        return run

    def _check(self, what: str, method: Callable[[], object], lanes: list[Lane]) -> None:
        for lane in lanes:
            lane.dst.zero_()
        method()
        if self._stream is not None:
            self._stream.synchronize()
        for lane in lanes:
            rows = len(lane.to)
            dst, src = lane.dst.view(rows, lane.size), lane.src.view(rows, lane.size)
            order = torch.from_numpy(lane.of // lane.size)
            step = max(1, CHECKED_BYTES // lane.size)
            for start in range(0, rows, step):
                part = slice(start, start + step)
                if not torch.equal(dst[part].to(src.device), src[order[part].to(src.device)]):
                    raise KVFerryError(f"{what}: the bytes that arrived are not those that were sent")


def measure_baseline(
    device: torch.device, settings: BaselineSettings, on_case: Callable[[Case], None] | None = None
) -> list[dict[str, Any]]:
    """Results of all `cases`, in their order; `on_case` is told of each before it begins.

    A result has the fields of its `Case`, the method, and those of `timing.summary`; GB/s count both directions.
    Raises `KVFerryError` if bytes arrive wrong.
    """
    bench = Bench(device, settings)
    try:
        results: list[dict[str, Any]] = []
        for case in cases(settings):
            if on_case is not None:
                on_case(case)
            results += bench.run(case)
        return results
    finally:
        bench.close()
