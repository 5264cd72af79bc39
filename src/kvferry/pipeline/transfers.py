"""`Transfers`: what a serving engine calls to store chunks of its KV cache in host slots and to load them back."""

import itertools
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvferry.codecs.slots import SlotCodec
from kvferry.pipeline.job import Direction, Job
from kvferry.pipeline.lane import Lane
from kvferry.pipeline.machine import HostMachine, Machine
from kvferry.pipeline.paths import LoadLane, StoreLane
from kvferry.pipeline.settings import Settings

Integers = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[Any]


class Transfers:
    """Stores and loads, each in order, both at once. Safe to share between threads; a context manager that `close`s.

    `slots` uint8 `[num_slots, slot_codec.slot_bytes]` in host memory, for pages on a GPU pinned or registered (rows may
    have gaps between them, unless a direction is fused). The caller decides which chunk goes to which slot and leaves a
    slot alone while a job uses it.

    On a GPU a call queues its work on side streams and returns: it neither waits for the device nor allocates device
    memory. Stores start when what is queued on `after` (default: the caller's current stream) at the time of the call
    is done, and so do the writes of loads. What reads loaded pages, or overwrites stored ones, waits for the job first
    (`wait`, `Job.wait`, `finished`). Each direction has a staging ring of `ring_bytes` on the device, which encoded
    slots pass through; with `fused_store` or `fused_load` the kernels use the slots in host memory themselves.
    `num_sms` stands in for the codec's. Other sizes: `Settings`.

    What goes wrong with a job (a kernel, a copy, memory) is in its result; the next one is not affected, short of
    errors that cost CUDA its context. Pages on the CPU go through the reference coders, and jobs are done when the call
    returns.

    Raises `ValueError` for what does not go together, `OutOfDeviceMemory`, `OutOfHostMemory`; and, for a GPU, whatever
    trying the kernels out raises: they are compiled here, not in the first job.
    """

    def __init__(
        self,
        slot_codec: SlotCodec,
        slots: Tensor,
        *,
        ring_bytes: int | None = None,
        num_sms: int | None = None,
        fused_store: bool = False,
        fused_load: bool = False,
        timing: bool = False,
        settings: Settings | None = None,
        machine: Machine | None = None,
    ) -> None:
        self._closed = True  # until there is something to close
        if num_sms is not None:
            slot_codec = replace(slot_codec, num_sms=num_sms)
        settings = settings or Settings()
        if ring_bytes is not None:
            settings = replace(settings, ring_bytes=ring_bytes)
        if timing:
            settings = replace(settings, timing=True)
        self.slot_codec, self.slots, self.settings = slot_codec, slots, settings
        _check_slots(slots, slot_codec.slot_bytes, fused_store or fused_load)
        self._machine = machine or _machine_of(slot_codec.kv.device)
        self._machine.check_slots(slots)
        stages = self._machine.stages or not slots.is_contiguous()
        self._store_lane: Lane = StoreLane(self._machine, slot_codec, slots, settings, stages and not fused_store)
        self._load_lane: Lane = LoadLane(self._machine, slot_codec, slots, settings, stages and not fused_load)
        self._ids = itertools.count()
        if self._machine.stages:
            self._store_lane.warm_up()
            self._load_lane.warm_up()
        self._closed = False

    def store(
        self,
        pages: Integers,
        slots: Integers,
        identities: Integers,
        positions: Integers | None = None,
        *,
        after: torch.cuda.Stream | None = None,
    ) -> Job:
        """Encode chunk i, the pages `pages[i]` (zeros where that is -1), into slot `slots[i]`.

        `pages` int `[chunks, chunk_pages]`, `slots` int `[chunks]`, each slot once, `identities` uint64 `[chunks, 2]`:
        what names the chunk, and must be given again to load it; so must `positions` int `[chunks]`, if given: where
        each chunk's first token is in its sequence, for codecs that look at it (`Transform`; None: at 0). The arrays
        are copied. Raises `ValueError` for pages, slots or positions that do not exist, for shapes that do not agree,
        and after `close`.
        """
        return self._submit(self._store_lane, "store", pages, slots, identities, positions, after)

    def load(
        self,
        pages: Integers,
        slots: Integers,
        identities: Integers,
        positions: Integers | None = None,
        *,
        after: torch.cuda.Stream | None = None,
    ) -> Job:
        """Decode slot `slots[i]` into the pages `pages[i]`, leaving out pages that are -1. The stores that filled the
        slots must be over. Otherwise as `store`."""
        return self._submit(self._load_lane, "load", pages, slots, identities, positions, after)

    def finished(self) -> list[Job]:
        """The jobs that are over and were not reported before: stores in order, then loads in order. Does not wait."""
        return self._store_lane.finished() + self._load_lane.finished()

    def wait(self, jobs: Iterable[Job]) -> None:
        """Return when all of `jobs` are over. They are still reported by `finished`."""
        for job in jobs:
            job.wait()

    def close(self) -> None:
        """Return when every job is over, and take no more. Jobs can still be asked for their results."""
        self._store_lane.close()
        self._load_lane.close()
        self._closed = True

    def __enter__(self) -> "Transfers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Memory must not go back to its pools while a copy uses it.
        if not getattr(self, "_closed", True) and not sys.is_finalizing():
            with suppress(Exception):
                self.close()

    def _submit(
        self,
        lane: Lane,
        direction: Direction,
        pages: Integers,
        slots: Integers,
        identities: Integers,
        positions: Integers | None,
        after: Any,
    ) -> Job:
        table, index, names = self._checked(direction, pages, slots, identities)
        at = None if positions is None else _checked_positions(positions, len(index))
        job = Job(lane, next(self._ids), direction, table, index, names, at)
        lane.submit(job, after if after is not None else self._machine.current_stream())
        return job

    def _checked(
        self, direction: Direction, pages: Integers, slots: Integers, identities: Integers
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copies: pages int32 `[chunks, chunk_pages]`, slots int32 `[chunks]`, identities uint64 `[chunks, 2]`."""
        codec, index = self.slot_codec, np.asarray(slots)
        chunks = len(index)
        table, names = np.asarray(pages), np.asarray(identities, dtype=_identity_dtype(identities))
        for name, given, shape in (
            ("slots", index, (chunks,)),
            ("pages", table, (chunks, codec.chunk_pages)),
            ("identities", names, (chunks, 2)),
        ):
            if given.shape != shape and (chunks or given.size):
                raise ValueError(f"{name} has the shape {given.shape}; for {chunks} slots pass {shape}")
            if given.size and given.dtype.kind not in "iu":
                raise ValueError(f"{name} holds {given.dtype}; pass integers")
        if chunks:
            _check_range("pages", table, -1, codec.kv.num_pages)
            _check_range("slots", index, 0, len(self.slots))
            ordered = np.sort(index)
            if direction == "store" and bool((ordered[1:] == ordered[:-1]).any()):
                raise ValueError("slots names a slot twice: each chunk of a store needs its own")
        return (
            table.astype(np.int32).reshape(chunks, codec.chunk_pages),
            index.astype(np.int32),
            names.astype(np.uint64).reshape(chunks, 2),
        )


def _checked_positions(positions: Integers, chunks: int) -> np.ndarray:
    """A copy: int32 `[chunks]`."""
    given = np.asarray(positions)
    if given.shape != (chunks,):
        raise ValueError(f"positions has the shape {given.shape}; for {chunks} slots pass ({chunks},)")
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"positions holds {given.dtype}; pass integers")
    if given.size:
        _check_range("positions", given, 0, 1 << 31)
    return given.astype(np.int32)


def _identity_dtype(identities: Integers) -> type[np.uint64] | None:
    """Lists of numbers beyond 2**63 would become floats if NumPy chose."""
    return None if isinstance(identities, np.ndarray) else np.uint64


def _check_range(name: str, given: np.ndarray, lowest: int, count: int) -> None:
    low, high = int(given.min()), int(given.max())
    if low < lowest or high >= count:
        wrong = low if low < lowest else high
        raise ValueError(f"{name} holds {wrong}; there are {name} {lowest} to {count - 1}")


def _check_slots(slots: Tensor, slot_bytes: int, fused: bool) -> None:
    expected = f"uint8 [num_slots, {slot_bytes}] in host memory"
    if slots.dtype != torch.uint8 or slots.dim() != 2 or slots.shape[1] != slot_bytes or slots.device.type != "cpu":
        raise ValueError(f"slots is {slots.dtype} {tuple(slots.shape)} on {slots.device}; pass {expected}")
    if len(slots) == 0 or slots.stride(1) != 1 or (len(slots) > 1 and slots.stride(0) < slot_bytes):
        raise ValueError(f"slots has {len(slots)} rows, strides {slots.stride()}; pass {expected}, rows apart")
    if fused and not slots.is_contiguous():
        raise ValueError("the rows of slots have gaps between them: pass fused_store=False and fused_load=False")


def _machine_of(device: torch.device) -> Machine:
    if device.type != "cuda":
        return HostMachine()
    from kvferry.pipeline.cuda import CudaMachine

    return CudaMachine(device)
