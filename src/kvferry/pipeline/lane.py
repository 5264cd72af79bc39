"""One direction of the pipeline: jobs in order, cut into parts, launched as far as there is room, and collected.

What a part is made of is in paths.py. Nothing here waits for the device, but `wait` and `close`.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kvferry.codecs.slots import SlotCodec
from kvferry.format.slot import DIRECTORY_BYTES, HEADER_BYTES, SlotStatus, read_headers
from kvferry.observe.nvtx import nvtx_range
from kvferry.pipeline.job import Direction, Job
from kvferry.pipeline.machine import Event, Machine, Stream
from kvferry.pipeline.settings import Settings
from kvferry.pipeline.staging import Hold, StagingRing
from kvferry.pipeline.table import ChunkArguments, ChunkTable, Rows

_BITES_A_PART = 64
_BITES_IN_FLIGHT = 128
"""A stream takes about a thousand launches before queueing one more blocks the host; a bite is three or four."""


@dataclass(eq=False)
class Part:
    """Chunks `first` to `stop` of a job, given to the device together. `done` None: nothing of it is in flight."""

    job: Job
    first: int
    stop: int
    rows: Rows
    done: Event | None = None
    events: list[Event] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    laps: list[tuple[str, Event, Event]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.stop - self.first


class Lane(ABC):
    """All transfers of one direction. Safe to share between threads."""

    direction: ClassVar[Direction]
    coder_has_priority: ClassVar[bool]

    def __init__(self, machine: Machine, codec: SlotCodec, slots: Tensor, settings: Settings, staged: bool) -> None:
        self._machine, self._codec, self._slots, self._settings = machine, codec, slots, settings
        self._host_slots = slots.numpy()
        self._lock = threading.RLock()
        self._closed = False
        rows = settings.table_rows(codec.chunk_pages)
        self._table = ChunkTable(machine, rows, codec.chunk_pages, statuses=self.direction == "load")
        chunk_bytes = codec.kv.page_bytes * codec.chunk_pages
        self._first_bite = max(1, settings.first_bite_bytes // chunk_bytes)
        self._bite = min(max(1, settings.bite_bytes // chunk_bytes), self._table.num_rows // 4)
        self._staging: StagingRing | None = None
        if staged:
            self._staging = StagingRing(machine, settings.ring_bytes, codec.slot_bytes)
            # Half of the ring at most: the other half is on the wire meanwhile.
            self._bite = max(1, min(self._bite, self._staging.num_slots // 2))
        self._part_chunks = min(self._table.num_rows // 4, self._bite * _BITES_A_PART)
        self._coder = machine.stream(high_priority=self.coder_has_priority)
        self._copier = machine.stream()
        self._spare: list[Event] = []
        self._waiting: deque[Job] = deque()  # not launched to the end
        self._unreported: deque[Job] = deque()
        self._parts: deque[Part] = deque()  # in flight

    # -- what jobs and Transfers call ---------------------------------------------------------------------------------

    def submit(self, job: Job, after: Any) -> None:
        """Queue `job` behind what is on the stream `after` by now, and launch what there is room for. Raises
        `ValueError` once the lane is closed."""
        with self._lock:
            if self._closed:
                raise ValueError("these Transfers are closed: make new ones")
            self._waiting.append(job)
            self._unreported.append(job)
            try:
                job.after = self._machine.event()
                job.after.record(after)
            except Exception as error:
                self._fail(job, error)
            self._launch()

    def poll(self, job: Job) -> bool:
        """Whether `job` is over by now."""
        with self._lock:
            if not job.complete:
                self._advance()
            return job.complete

    def finished(self) -> list[Job]:
        """Jobs that are over and were not reported before, in order; none before all that came before it."""
        with self._lock:
            self._advance()
            jobs = []
            while self._unreported and self._unreported[0].complete:
                jobs.append(self._unreported.popleft())
            return jobs

    def wait(self, job: Job) -> None:
        """Return when `job` is over."""
        while True:
            with self._lock:
                self._advance()
                if job.complete:
                    return
                # Its own last part, or, while some of it has no room, the part that makes room.
                parts = [part for part in self._parts if part.job is job and job.launched == job.num_chunks]
                part = parts[-1] if parts and parts[-1].done is not None else self._parts[0]
                event = part.done
            if event is not None:
                try:
                    event.synchronize()  # without the lock: others go on submitting
                except Exception as error:
                    with self._lock:
                        self._fail(part.job, error)
                        part.done = None

    def cancel(self, job: Job) -> bool:
        """See `Job.cancel`."""
        with self._lock:
            if not job.complete:
                self._advance()
            if job.complete:
                return False
            job.cancelled = True
            job.drop_rest()
            return job.complete

    def close(self) -> None:
        """Return when every job is over, and take no more."""
        with self._lock:
            self._closed = True
            jobs = list(self._unreported)
        for job in jobs:
            self.wait(job)

    def warm_up(self) -> None:
        """Run the coder once on as many chunks as a bite has, so that no job meets a kernel's compilation or a first
        allocation. No page is read or written, and no slot of the host."""
        count = self._bite if self._staging is not None else 1
        pages = np.full((count, self._codec.chunk_pages), -1, dtype=np.int32)
        index = np.arange(count, dtype=np.int32)
        memory = self._staging.slots if self._staging is not None else self._scratch_slot()
        rows = self._table.take(count)
        with self._lock, self._machine.use(self._coder):
            self._table.send(rows, pages, index, np.zeros((count, 2), dtype=np.uint64), None, self._coder)
            self._code(self._table.arguments(rows, 0, count, positions=False), memory)
        self._machine.settle()
        self._table.free_oldest()

    def _scratch_slot(self) -> Tensor:
        return self._machine.device_memory(self._codec.slot_bytes, "a slot").view(1, -1)

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        self._retire()
        self._launch()

    def _launch(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            count = min(job.num_chunks - job.launched, self._part_chunks)
            if not count:
                self._waiting.popleft()
                continue
            if not self._has_room(count):
                self._retire()
                if not self._has_room(count):
                    return
            self._start(job, count)

    def _has_room(self, count: int) -> bool:
        bites = sum(max(1, len(part.holds)) for part in self._parts)
        return (
            len(self._parts) < self._settings.jobs_in_flight
            and (not self._parts or bites + count // self._bite <= _BITES_IN_FLIGHT)
            and self._table.fits(count)
        )

    def _start(self, job: Job, count: int) -> None:
        part = Part(job, job.launched, job.launched + count, self._table.take(count))
        job.launched += count
        job.parts_in_flight += 1
        self._parts.append(part)
        try:
            with nvtx_range(f"kvferry.{self.direction}"), self._machine.use(self._coder):
                self._queue(part)
        except Exception as error:
            self._fail(job, error)
            self._seal(part)
        except BaseException:  # an interrupt: what is queued must be accounted for all the same
            job.cancelled = True
            job.drop_rest()
            self._seal(part)
            raise

    def _fail(self, job: Job, error: Exception) -> None:
        job.error = job.error or error
        job.drop_rest()

    def _seal(self, part: Part) -> None:
        """Bring a launch that broke off to an end: the part is over when what was queued of it is."""
        *others, last = self._streams()
        try:
            for stream in others:
                event = self._event(part)
                event.record(stream)
                last.wait_event(event)
            for hold in part.holds:
                if hold.freed is not None:
                    hold.freed.record(last)
            self._end(part, last)
        except Exception:  # the device is lost; the job carries the first error, which says more than this one
            part.done = None

    def _retire(self) -> None:
        """Collect the parts that are over, in order."""
        while self._parts and self._is_over(self._parts[0]):
            part = self._parts.popleft()
            for hold in part.holds:
                hold.freed = hold.behind = None
            self._spare += part.events
            if part.job.error is None:
                try:
                    self._collect(part)
                except Exception as error:
                    self._fail(part.job, error)
            self._table.free_oldest()
            part.job.parts_in_flight -= 1

    def _is_over(self, part: Part) -> bool:
        try:
            return part.done is None or part.done.query()
        except Exception as error:  # what a kernel or copy did wrong shows here
            self._fail(part.job, error)
            return True

    def _collect(self, part: Part) -> None:
        """Add what a part came to to its job's tally."""
        job, tally = part.job, part.job.tally
        pages = job.pages[part.first : part.stop]
        records = read_headers(self._host_slots[job.slots[part.first : part.stop], :HEADER_BYTES])
        statuses = self._statuses(part, records)
        good = records[statuses == SlotStatus.GOOD]
        failed = np.flatnonzero(statuses)
        tally.failed += [(part.first + int(i), SlotStatus(int(statuses[i]))) for i in failed]
        arrived = pages[statuses == SlotStatus.GOOD] >= 0
        tally.raw_bytes += int(np.count_nonzero(arrived)) * self._codec.kv.page_bytes
        tally.encoded_bytes += HEADER_BYTES * len(good) + int(
            np.sum(good["num_tiles"], dtype=np.int64) * DIRECTORY_BYTES + np.sum(good["payload_bytes"], dtype=np.int64)
        )
        tally.relaxed += int(np.count_nonzero(good["relaxed"]))
        tally.rejected += int(np.count_nonzero(statuses == SlotStatus.REJECTED))
        for stage, begin, end in part.laps:
            tally.seconds[stage] = tally.seconds.get(stage, 0.0) + begin.elapsed_time(end) / 1e3

    # -- for the paths ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _queue(self, part: Part) -> None:
        """Give a part to the device, the coder's stream being the current one, and `_end` it."""

    @abstractmethod
    def _code(self, told: ChunkArguments, slots: Tensor) -> None:
        """Run the coder on `slots`, on the current stream."""

    @abstractmethod
    def _streams(self) -> list[Stream]:
        """The streams that parts are queued on; the last one ends them."""

    @abstractmethod
    def _statuses(self, part: Part, records: np.ndarray) -> np.ndarray:
        """`SlotStatus` of each chunk of a part that is over, int32 `[n]`; `records` are its slots' headers."""

    def _event(self, part: Part) -> Event:
        """An event that is the part's until it is over."""
        event = self._spare.pop() if self._spare else self._machine.event()
        part.events.append(event)
        return event

    def _end(self, part: Part, stream: Stream) -> None:
        """The part is over when `stream` has come this far."""
        # Not from the spare ones: a thread may still wait for it when the part has been collected.
        done = self._machine.event()
        done.record(stream)
        part.done = done

    def _begin(self, stream: Stream) -> Event | None:
        """The start of a lap, where laps are timed."""
        if not self._settings.timing:
            return None
        event = self._machine.event(timing=True)
        event.record(stream)
        return event

    def _lap(self, part: Part, stage: str, begin: Event | None, stream: Stream) -> None:
        """The end of the lap."""
        if begin is not None:
            end = self._machine.event(timing=True)
            end.record(stream)
            part.laps.append((stage, begin, end))
