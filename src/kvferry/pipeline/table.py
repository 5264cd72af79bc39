"""What coders are told of a job's chunks, on its way to the device: page table, slot indices, identities, positions;
and the statuses on their way back."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvferry.pipeline.machine import Machine, Stream
from kvferry.pipeline.ring import Ring

_WORD = 4
_ALIGN_WORDS = 4  # 16 bytes: what a kernel loads at a time


@dataclass(frozen=True)
class Rows:
    """`count` rows from `first` on: one for each chunk of a part of a job."""

    first: int
    count: int


@dataclass(frozen=True)
class ChunkArguments:
    """Of some chunks, on the device: what `SlotCodec.encode` and `decode` take. `page_table` int32 `[chunks,
    chunk_pages]`, `slot_index` int32 `[chunks]`, `identities` int64 `[chunks, 2]`, `positions` int32 `[chunks]` or
    None; `status` int32 `[chunks]`, empty without statuses."""

    page_table: Tensor
    slot_index: Tensor
    identities: Tensor
    positions: Tensor | None
    status: Tensor


class ChunkTable:
    """A ring of rows, once pinned in host memory and once on the device, allocated once; with or without `statuses`.

    Rows that are taken together lie one behind another: their identities, then their page table, then their slot
    indices, then their positions where there are any, so that one copy moves them all.
    """

    def __init__(self, machine: Machine, num_rows: int, chunk_pages: int, *, statuses: bool) -> None:
        self.chunk_pages = chunk_pages
        # In words: identity, pages, slot, position.
        self._row_words = -(-(4 + chunk_pages + 2) // _ALIGN_WORDS) * _ALIGN_WORDS
        self._machine = machine
        self._ring = Ring(num_rows)
        num_bytes = num_rows * self._row_words * _WORD
        self._host = machine.host_memory(num_bytes, "the ring of page tables")
        self._host_words = self._host.numpy().view(np.int32)
        self._device = machine.device_memory(num_bytes, "the ring of page tables")
        self._device_words, self._device_pairs = self._device.view(torch.int32), self._device.view(torch.int64)
        self._host_status = self._device_status = torch.empty(0, dtype=torch.int32)
        if statuses:
            self._host_status = machine.host_memory(num_rows * _WORD, "statuses").view(torch.int32)
            self._device_status = machine.device_memory(num_rows * _WORD, "statuses").view(torch.int32)
        self._has_statuses = statuses

    @property
    def num_rows(self) -> int:
        return self._ring.size

    def fits(self, count: int) -> bool:
        """Whether `count` rows can be taken now."""
        return self._ring.fits(count)

    def take(self, count: int) -> Rows:
        """Take rows. Raises `ValueError` if they do not fit."""
        return Rows(self._ring.take(count), count)

    def free_oldest(self) -> None:
        """Give back the rows taken first; no copy or coder uses them any more."""
        self._ring.free_oldest()

    def send(
        self,
        rows: Rows,
        pages: np.ndarray,
        slots: np.ndarray,
        identities: np.ndarray,
        positions: np.ndarray | None,
        stream: Stream,
    ) -> None:
        """Write `pages` int32 `[count, chunk_pages]`, `slots` int32 `[count]`, `identities` uint64 `[count, 2]` and, if
        there are any, `positions` int32 `[count]`, and queue their copy."""
        begin, pages_at, slots_at, end = self._places(rows)
        words = self._host_words
        words[begin:pages_at] = identities.reshape(-1).view(np.int32)
        words[pages_at:slots_at] = pages.reshape(-1)
        words[slots_at:end] = slots
        if positions is not None:
            words[end : end + rows.count] = positions
            end += rows.count
        part = slice(begin * _WORD, end * _WORD)
        self._machine.copy(self._device[part], self._host[part], stream)

    def arguments(self, rows: Rows, first: int, stop: int, *, positions: bool) -> ChunkArguments:
        """What coders are told of the rows `first` to `stop` of `rows`; `positions`: whether they were sent any."""
        begin, pages_at, slots_at, end = self._places(rows)
        count, width = stop - first, self.chunk_pages
        status = self._device_status
        if self._has_statuses:
            status = self._device_status.as_strided((count,), (1,), rows.first + first)
        # One operation for each: every microsecond here is the caller's.
        return ChunkArguments(
            self._device_words.as_strided((count, width), (width, 1), pages_at + first * width),
            self._device_words.as_strided((count,), (1,), slots_at + first),
            self._device_pairs.as_strided((count, 2), (2, 1), begin // 2 + 2 * first),
            self._device_words.as_strided((count,), (1,), end + first) if positions else None,
            status,
        )

    def fetch_statuses(self, rows: Rows, stream: Stream) -> None:
        """Queue the copy of the rows' statuses to the host."""
        part = slice(rows.first, rows.first + rows.count)
        self._machine.copy(self._host_status[part], self._device_status[part], stream)

    def statuses(self, rows: Rows) -> np.ndarray:
        """int32 `[count]`, once `fetch_statuses` is done."""
        return self._host_status.numpy()[rows.first : rows.first + rows.count]

    def _places(self, rows: Rows) -> tuple[int, int, int, int]:
        """In words: where the identities, the page table and the slots begin, and where they end, and positions
        begin."""
        begin = rows.first * self._row_words
        pages_at = begin + 4 * rows.count
        slots_at = pages_at + self.chunk_pages * rows.count
        return begin, pages_at, slots_at, slots_at + rows.count
