"""A transfer that was asked for: `Job`, and what came of it: `JobResult`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvferry.format.slot import SlotStatus

if TYPE_CHECKING:
    from kvferry.pipeline.lane import Lane

Direction = Literal["store", "load"]


@dataclass(frozen=True)
class JobResult:
    """What came of a job.

    `failed_chunks` are the chunks (by index in the job) that did not arrive although the transfer went through, and
    `statuses` why: their pages or slots must not be used. With `error` (nothing of the job is to be used) or
    `cancelled`, they list only what was found out. `ok`: every chunk arrived.

    Bytes, of chunks that arrived: `raw_bytes` of their pages; `encoded_bytes` of header, directory and payload of their
    slots (a whole slot crosses the wire, used or not). `relaxed` chunks were coded at a doubled bound, `rejected` ones
    fit no slot. Seconds are summed over the job's bites, with `timing=True` only; stages overlap, so they add up to
    more than the job took.
    """

    error: Exception | None = None
    failed_chunks: tuple[int, ...] = ()
    statuses: tuple[SlotStatus, ...] = ()
    cancelled: bool = False
    raw_bytes: int = 0
    encoded_bytes: int = 0
    relaxed: int = 0
    rejected: int = 0
    encode_s: float | None = None
    copy_s: float | None = None
    decode_s: float | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and not self.cancelled and not self.failed_chunks


@dataclass
class Tally:
    """What is known of a job so far."""

    failed: list[tuple[int, SlotStatus]] = field(default_factory=list)
    raw_bytes: int = 0
    encoded_bytes: int = 0
    relaxed: int = 0
    rejected: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Job:
    """Handle of one transfer. Its methods may be called from any thread; made by `Transfers.store` and `load`."""

    def __init__(
        self,
        lane: Lane,
        job_id: int,
        direction: Direction,
        pages: np.ndarray,
        slots: np.ndarray,
        identities: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> None:
        self.id = job_id
        self.direction: Direction = direction
        self.num_chunks = len(slots)
        # What follows is the lane's, under its lock.
        self.lane = lane
        self.pages, self.slots, self.identities, self.positions = pages, slots, identities, positions
        self.after: Any = None  # event
        self.launched = 0  # chunks given to the device, or dropped
        self.parts_in_flight = 0
        self.error: Exception | None = None
        self.cancelled = False
        self.tally = Tally()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to launch or in flight, as far as the lane has looked."""
        return self.launched == self.num_chunks and not self.parts_in_flight

    def drop_rest(self) -> None:
        """Launch no more of it."""
        self.launched = self.num_chunks

    def done(self) -> bool:
        """Whether it is over, well or not; asks the device, without waiting."""
        return self.lane.poll(self)

    def wait(self) -> None:
        """Return when it is over: nothing of it reads or writes pages or slots any more."""
        self.lane.wait(self)

    def cancel(self) -> bool:
        """Ask for its end. True: nothing of it writes to pages or slots from now on. False: it was over before, or what
        was already given to the device still runs; `wait` for that, and the result will say `cancelled`."""
        return self.lane.cancel(self)

    def result(self) -> JobResult:
        """What came of it. Raises `RuntimeError` while it is not over."""
        if not self.done():
            raise RuntimeError(f"{self!r} is not over: wait() for it, or ask done() first")
        found, seconds = self.tally, self.tally.seconds
        return JobResult(
            error=self.error,
            failed_chunks=tuple(chunk for chunk, _ in found.failed),
            statuses=tuple(status for _, status in found.failed),
            cancelled=self.cancelled,
            raw_bytes=found.raw_bytes,
            encoded_bytes=found.encoded_bytes,
            relaxed=found.relaxed,
            rejected=found.rejected,
            encode_s=seconds.get("encode"),
            copy_s=seconds.get("copy"),
            decode_s=seconds.get("decode"),
        )

    def __repr__(self) -> str:
        return f"<{self.direction} job {self.id}, {self.num_chunks} chunks>"
