"""One configuration of the pipeline, checked and timed."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.bench.pipeline_cache import PagedCache, Shape
from kvferry.codecs.base import Codec
from kvferry.device import cuda_copy_
from kvferry.format.slot import HEADER_BYTES, read_headers
from kvferry.pipeline.job import Job
from kvferry.pipeline.settings import Settings
from kvferry.pipeline.transfers import Transfers

Row = dict[str, Any]
Arguments = tuple[np.ndarray, np.ndarray, np.ndarray]
MIB = 1 << 20
WARM_UPS = 2
JOBS_OF_A_STREAM = 8


@dataclass(frozen=True)
class Plan:
    """What is measured. `ratio` is that of the slots (raw bytes over slot bytes); `sigma` gives the bounds. Sizes are
    of raw data; `bites_mib` are (smallest, largest, growth)."""

    shape: Shape = field(default_factory=Shape)
    packing: str = "ans"
    sigma: float = 0.2
    ratio: float = 4.0
    chunk_tokens: int = 64
    sizes_mib: tuple[int, ...] = (8, 64, 512)
    ablation_mib: int = 256
    chunk_sizes: tuple[int, ...] = (16, 64, 256)
    ratios: tuple[float, ...] = (2.0, 3.0, 3.7, 4.0, 4.6)
    sm_caps: tuple[int | None, ...] = (8, 16, 32, 64, None)
    bites_mib: tuple[tuple[int, int, int], ...] = ((8, 128, 4), (8, 64, 4), (8, 64, 2), (32, 128, 2), (64, 64, 1))
    restore_tokens: tuple[int, ...] = (2_000, 30_000)
    host_chunks: int = 64
    matmul: int = 8192
    matmuls: int = 120
    repeats: int = 20
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name in ("sigma", "ratio", "repeats"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: give more than 0")

    def quick(self) -> "Plan":
        """The same in a fraction of the time: for trying something out, not for quoting."""
        return replace(
            self,
            sizes_mib=self.sizes_mib[:2],
            ablation_mib=min(64, self.ablation_mib),
            chunk_sizes=self.chunk_sizes[:2],
            ratios=(self.ratio,),
            sm_caps=(16, None),
            bites_mib=self.bites_mib[:2],
            matmuls=40,
            repeats=6,
        )


def summary(seconds: Iterable[float], raw_bytes: int) -> Row:
    """Median and 99th percentile (nearest rank) in ms, and raw bytes over the median."""
    ordered = sorted(seconds)
    median = max(statistics.median(ordered), 1e-12)
    return {
        "repeats": len(ordered),
        "median_ms": median * 1e3,
        "p99_ms": ordered[math.ceil(0.99 * len(ordered)) - 1] * 1e3,
        "gb_per_s": raw_bytes / median / 1e9,
    }


class Wire:
    """Bare copies between `memory`, page-locked, and `device`: what transfers are compared with."""

    def __init__(self, memory: Tensor, device: torch.device, repeats: int) -> None:
        self.memory, self.device, self.repeats = memory, device, repeats
        self._seconds: dict[tuple[str, int], float] = {}

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, direction: str, num_bytes: int) -> float:
        """Of one copy of `num_bytes`, median; measured once for each size, of at most the memory's, and scaled up."""
        size = min(num_bytes, len(self.memory))
        if (direction, size) not in self._seconds:
            near, far = torch.zeros(size, dtype=torch.uint8, device=self.device), self.memory[:size]
            dst, src = (far, near) if direction == "store" else (near, far)
            found = []
            for _ in range(self.repeats + WARM_UPS):
                self.settle()
                start = time.perf_counter()
                cuda_copy_(dst, src, non_blocking=True)
                self.settle()
                found.append(time.perf_counter() - start)
            self._seconds[direction, size] = statistics.median(found[WARM_UPS:])
        return self._seconds[direction, size] * num_bytes / size


class Rig:
    """`Transfers` between a cache and slots in `memory`. A context manager.

    Jobs are of the cache's first chunks: stores read its sources, loads write its destinations.
    """

    def __init__(self, cache: PagedCache, codec: Codec, memory: Tensor, plan: Plan, **options: Any) -> None:
        self.cache, self.codec, self.plan = cache, codec, plan
        chunk_tokens = options.pop("chunk_tokens", plan.chunk_tokens)
        self.slot_codec = cache.codec(codec, chunk_tokens, options.pop("ratio", plan.ratio))
        self.slot_bytes, self.chunk_pages = self.slot_codec.slot_bytes, self.slot_codec.chunk_pages
        self.chunk_bytes = cache.kv.page_bytes * self.chunk_pages
        self.slots = memory[: len(memory) // self.slot_bytes * self.slot_bytes].view(-1, self.slot_bytes)
        self.wire = Wire(memory, cache.device, max(3, plan.repeats // 2))
        self.transfers = Transfers(self.slot_codec, self.slots, **({"settings": plan.settings} | options))

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.transfers.close()

    def chunks(self, num_bytes: int) -> int:
        """Chunks of about so many raw bytes: at least one."""
        return max(1, round(num_bytes / self.chunk_bytes))

    def arguments(self, direction: str, chunks: int, first_slot: int = 0, shuffled: bool = False) -> Arguments:
        """What `Transfers.store` and `load` take: the first `chunks` chunks, slots from `first_slot` on, in order or
        not."""
        pages = self.cache.sources if direction == "store" else self.cache.destinations
        slots = np.random.default_rng(3).permutation(chunks) if shuffled else np.arange(chunks)
        names = np.stack([np.arange(chunks), np.full(chunks, 7)], axis=1).astype(np.uint64)
        return self.cache.table(pages, chunks, self.chunk_pages), first_slot + slots, names

    def submit(self, direction: str, arguments: Arguments) -> Job:
        return self.transfers.store(*arguments) if direction == "store" else self.transfers.load(*arguments)

    def do(self, direction: str, chunks: int, first_slot: int = 0, shuffled: bool = False) -> Job:
        """A job from beginning to end. Raises `RuntimeError` if it is not all right."""
        job = self.submit(direction, self.arguments(direction, chunks, first_slot, shuffled))
        self.finish([job])
        return job

    def finish(self, jobs: Iterable[Job]) -> None:
        """Wait; raise `RuntimeError` for a job that is not all right."""
        self.transfers.wait(jobs)
        for job in self.transfers.finished():
            if not job.result().ok:
                raise RuntimeError(f"{job!r}: {job.result()}")

    def timed(self, submit: Callable[[], list[Job]]) -> list[float]:
        """Seconds from submitting to the end of each of the plan's rounds, the device idle before each."""
        found = []
        for _ in range(self.plan.repeats + WARM_UPS):
            self.wire.settle()
            start = time.perf_counter()
            jobs = submit()
            for job in jobs:
                job.wait()
            found.append(time.perf_counter() - start)
            self.finish(())
        return found[WARM_UPS:]

    def checked(self, chunks: int, *, shuffled: bool = False) -> Row:
        """Store, load and compare; then say what was moved."""
        self.cache.forget(chunks, self.chunk_pages)
        result = self.do("store", chunks, shuffled=shuffled).result()
        headers = read_headers(self.slots[:chunks, :HEADER_BYTES].numpy())
        self.do("load", chunks, shuffled=shuffled)
        self.cache.check(chunks, self.chunk_pages, self.codec, int(headers["relaxed"].max()))
        raw = chunks * self.chunk_bytes
        return {
            "codec": self.codec.name,
            "raw_mib": raw / MIB,
            "chunks": chunks,
            "chunk_bytes": self.chunk_bytes,
            "slot_bytes": self.slot_bytes,
            "slot_ratio": self.chunk_bytes / self.slot_bytes,
            "encoded_ratio": raw / result.encoded_bytes,
            "relaxed_chunks": result.relaxed,
        }

    def streamed(self, direction: str, chunks: int) -> Row:
        """The same job several times, one behind the other; of one of them."""
        given = self.arguments(direction, chunks)
        seconds = self.timed(lambda: [self.submit(direction, given) for _ in range(JOBS_OF_A_STREAM)])
        found = summary((lap / JOBS_OF_A_STREAM for lap in seconds), chunks * self.chunk_bytes)
        wire = self.wire.seconds(direction, chunks * self.slot_bytes) * 1e3
        return found | {"wire_ms": wire, "overlap": wire / found["median_ms"]}

    def legs(self, chunks: int, directions: tuple[str, ...] = ("store", "load"), *, shuffled: bool = False) -> Row:
        """`checked`, then each direction alone, and its share of the wire's time: `overlap`."""
        row = self.checked(chunks, shuffled=shuffled)
        for way in directions:
            given = self.arguments(way, chunks, shuffled=shuffled)
            wire = self.wire.seconds(way, chunks * self.slot_bytes) * 1e3
            found = self.timed(lambda way=way, given=given: [self.submit(way, given)])  # type: ignore[misc]
            row[way] = summary(found, chunks * self.chunk_bytes) | {"wire_ms": wire}
            row[way]["overlap"] = wire / row[way]["median_ms"]
        return row
