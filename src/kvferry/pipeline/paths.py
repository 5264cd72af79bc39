"""What a part of a job does on the device: `StoreLane` and `LoadLane`.

Staged: the coder works in the staging ring, bite by bite, on one stream; whole slots are copied on another; events keep
them in step. Fused: the coder reads or writes the slots in host memory itself.
"""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from kvferry.format.slot import MAGIC, SlotState, SlotStatus, are_headers
from kvferry.observe.nvtx import nvtx_range
from kvferry.pipeline.bites import Bite, Runs, growing, runs_of, shrinking
from kvferry.pipeline.job import Direction
from kvferry.pipeline.lane import Lane, Part
from kvferry.pipeline.machine import Stream
from kvferry.pipeline.staging import StagingRing
from kvferry.pipeline.table import ChunkArguments


class _Path(Lane):
    """What both directions share."""

    @staticmethod
    @abstractmethod
    def _cut(num_chunks: int, smallest: int, most: int, growth: int) -> tuple[Bite, ...]:
        """A part's bites, in order."""

    def _places(self, part: Part, staging: StagingRing) -> tuple[tuple[Bite, ...], np.ndarray]:
        """The part's bites, each with a hold on the ring, and where their chunks are in it, int32 `[chunks]`."""
        bites = self._cut(len(part), self._first_bite, self._bite, self._settings.growth)
        places = np.empty(len(part), dtype=np.int32)
        for bite in bites:
            hold = staging.hold(len(bite), self._event(part))
            part.holds.append(hold)
            places[bite.first : bite.stop] = np.arange(hold.start, hold.start + len(bite), dtype=np.int32)
        return bites, places

    def _send_table(self, part: Part, places: np.ndarray, stream: Stream) -> None:
        job, chunks = part.job, slice(part.first, part.stop)
        positions = None if job.positions is None else job.positions[chunks]
        self._table.send(part.rows, job.pages[chunks], places, job.identities[chunks], positions, stream)

    def _told(self, part: Part, bite: Bite) -> ChunkArguments:
        """What the coder is told of a bite."""
        return self._table.arguments(part.rows, bite.first, bite.stop, positions=part.job.positions is not None)

    def _slots_of(self, part: Part) -> np.ndarray:
        return part.job.slots[part.first : part.stop]


class StoreLane(_Path):
    """Pages to host slots."""

    direction: ClassVar[Direction] = "store"
    coder_has_priority = False
    _cut = staticmethod(growing)

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        # Page tables travel on their own stream: on the coder's they would wait for the job before.
        self._sender = self._machine.stream()

    def _streams(self) -> list[Stream]:
        return [self._sender, self._coder, self._copier]

    def _queue(self, part: Part) -> None:
        if self._staging is None:
            self._queue_fused(part)
        else:
            self._queue_staged(part, self._staging)

    def _queue_fused(self, part: Part) -> None:
        self._start_coder(part, self._slots_of(part))
        self._encode(part, Bite(0, len(part)), self._slots)
        self._end(part, self._coder)

    def _queue_staged(self, part: Part, staging: StagingRing) -> None:
        coder, copier = self._coder, self._copier
        bites, places = self._places(part, staging)
        self._start_coder(part, places)
        moves: list[Runs] = []
        for number, (bite, hold) in enumerate(zip(bites, part.holds, strict=True)):
            if hold.behind is not None and hold.behind.freed is not None:
                coder.wait_event(hold.behind.freed)
            self._encode(part, bite, staging.slots)
            encoded = self._event(part)
            encoded.record(coder)
            copier.wait_event(encoded)
            # Not before the first bite is on its way.
            moves = moves or runs_of(bites, self._slots_of(part), places)
            runs = moves[number]
            with nvtx_range("kvferry.store.copy"):
                begin = self._begin(copier)
                self._machine.copy_rows(self._slots, runs.host, staging.slots, runs.ring, runs.lengths, copier)
                self._lap(part, "copy", begin, copier)
            if hold.freed is not None:
                hold.freed.record(copier)
        self._end(part, copier)

    def _start_coder(self, part: Part, places: np.ndarray) -> None:
        """Let the coder wait for its table, and for the caller's work."""
        self._send_table(part, places, self._sender)
        sent = self._event(part)
        sent.record(self._sender)
        self._coder.wait_event(sent)
        self._coder.wait_event(part.job.after)

    def _encode(self, part: Part, bite: Bite, slots: Tensor) -> None:
        told = self._told(part, bite)
        with nvtx_range("kvferry.store.encode"):
            begin = self._begin(self._coder)
            self._code(told, slots)
            self._lap(part, "encode", begin, self._coder)

    def _code(self, told: ChunkArguments, slots: Tensor) -> None:
        self._codec.encode(told.page_table, slots, told.slot_index, told.identities, told.positions)

    def _statuses(self, part: Part, records: np.ndarray) -> np.ndarray:
        identities = part.job.identities[part.first : part.stop]
        usable = records["state"] == SlotState.USABLE
        usable &= records["magic"] == MAGIC
        usable &= (records["identity"] == identities).all(axis=1)
        statuses = np.zeros(len(part), dtype=np.int32)
        if not usable.all():
            # The usual case ends before this: checksums cost as much as the rest. Loads look at all of them.
            statuses[records["state"] == SlotState.REJECTED] = SlotStatus.REJECTED
            statuses[(records["identity"] != identities).any(axis=1)] = SlotStatus.OTHER_IDENTITY
            statuses[~are_headers(records)] = SlotStatus.NO_SLOT
        return statuses


class LoadLane(_Path):
    """Host slots to pages."""

    direction: ClassVar[Direction] = "load"
    coder_has_priority = True
    _cut = staticmethod(shrinking)

    def _streams(self) -> list[Stream]:
        return [self._copier, self._coder]

    def _queue(self, part: Part) -> None:
        self._coder.wait_event(part.job.after)
        if self._staging is None:
            self._queue_fused(part)
        else:
            self._queue_staged(part, self._staging)
        self._table.fetch_statuses(part.rows, self._coder)
        self._end(part, self._coder)

    def _queue_fused(self, part: Part) -> None:
        self._send_table(part, self._slots_of(part), self._copier)
        self._step(part)
        self._decode(part, Bite(0, len(part)), self._slots)

    def _queue_staged(self, part: Part, staging: StagingRing) -> None:
        coder, copier = self._coder, self._copier
        bites, places = self._places(part, staging)
        moves = runs_of(bites, self._slots_of(part), places)
        # Slots are in host memory already: copying them need not wait for what `after` waits for.
        for number, (bite, hold, runs) in enumerate(zip(bites, part.holds, moves, strict=True)):
            if hold.behind is not None and hold.behind.freed is not None:
                copier.wait_event(hold.behind.freed)
            with nvtx_range("kvferry.load.copy"):
                begin = self._begin(copier)
                self._machine.copy_rows(staging.slots, runs.ring, self._slots, runs.host, runs.lengths, copier)
                self._lap(part, "copy", begin, copier)
            if number == 0:  # behind the first bite, which is what the wire can start with
                self._send_table(part, places, copier)
            self._step(part)
            self._decode(part, bite, staging.slots)
            if hold.freed is not None:
                hold.freed.record(coder)

    def _step(self, part: Part) -> None:
        """Let the coder wait for what was copied so far."""
        copied = self._event(part)
        copied.record(self._copier)
        self._coder.wait_event(copied)

    def _decode(self, part: Part, bite: Bite, slots: Tensor) -> None:
        told = self._told(part, bite)
        with nvtx_range("kvferry.load.decode"):
            begin = self._begin(self._coder)
            self._code(told, slots)
            self._lap(part, "decode", begin, self._coder)

    def _code(self, told: ChunkArguments, slots: Tensor) -> None:
        self._codec.decode(slots, told.slot_index, told.page_table, told.identities, told.status, told.positions)

    def _statuses(self, part: Part, records: np.ndarray) -> np.ndarray:
        return self._table.statuses(part.rows)
