"""`PinnedPool`: host memory page-locked once, handed out in blocks that come back when the last copy is done."""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from kvferry.device import driver
from kvferry.device.arena import Arena
from kvferry.device.memory import MemoryKind, memory_kind
from kvferry.device.streams import Event
from kvferry.errors import KVFerryError, OutOfHostMemory

ALIGNMENT = 512
"""Least alignment of blocks, in bytes."""


@dataclass(frozen=True)
class PoolUsage:
    """A snapshot, in bytes as allocated (rounded up to the alignment) unless it says blocks."""

    capacity: int
    in_use: int
    pending: int  # freed, but a copy that uses them may be under way
    free: int
    largest_free: int  # the largest block that could be had now
    peak: int  # most of in_use + pending since the pool was made
    blocks_in_use: int
    blocks_pending: int
    registered: int  # the callers' own memory that the pool has page-locked, beside its capacity
    page_locked: bool  # False where there is no CUDA


class PinnedBlock:
    """Memory of a `PinnedPool`. Free it when it is not needed: one that is forgotten stays in use until the pool
    closes, since nobody knows which copies still use it."""

    __slots__ = ("_pool", "_tensor", "num_bytes", "offset")

    def __init__(self, pool: PinnedPool, tensor: Tensor, offset: int) -> None:
        self._pool = pool
        self._tensor: Tensor | None = tensor
        self.num_bytes = tensor.numel()
        self.offset = offset
        """Bytes from the start of the pool's memory."""

    @property
    def tensor(self) -> Tensor:
        """The memory, uint8 `[num_bytes]`, not initialised. Raises `ValueError` once the block is freed."""
        if self._tensor is None:
            raise ValueError(f"the block of {self.num_bytes} bytes at {self.offset} is freed: allocate another")
        return self._tensor

    def free(self, after: Event | torch.cuda.Stream | None = None) -> None:
        """Give the memory back. It is handed out again only after `after`: an event recorded behind the last copy that
        uses the block, or the stream that this copy was queued on; None says that no copy is under way.

        Does not wait. Raises `ValueError` if the block was freed before or the event never recorded.
        """
        self._pool._free(self, after)

    def _forget(self) -> None:
        self._tensor = None


class PinnedPool:
    """`num_bytes` of host memory, page-locked at the start, in blocks: first fit, with size classes in front.

    Thread-safe. Nothing waits for the device but `close` and `unregister`: events are asked whether they are done.
    `device` is the CUDA device that the memory is pinned for (default: the current one; "cpu": plain memory). Without
    CUDA the memory is plain and everything else is the same. All CUDA devices may copy from and to it.

    The memory is a private anonymous mapping that is registered with CUDA: its size is exact (`pin_memory` rounds up to
    a power of two), it asks for huge pages, and tensors keep the mapping alive, so that a view that outlives the pool
    is plain memory and no dangling pointer. It is not inherited by `fork`, which could otherwise give
    the parent a copy and leave the device writing to the original.

    Raises `ValueError` for sizes that cannot be, `ImportError` if a CUDA device is asked for and cuda-bindings are
    missing, `OutOfHostMemory` if the system refuses so much memory, `CudaError` if CUDA does not page-lock it.
    """

    def __init__(
        self, num_bytes: int, *, device: torch.device | int | str | None = None, alignment: int = ALIGNMENT
    ) -> None:
        if alignment < ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"alignment is {alignment}: give a power of two from {ALIGNMENT} on")
        if num_bytes <= 0:
            raise ValueError(f"num_bytes is {num_bytes}: give the bytes of host memory to use, at least 1")
        self._alignment = alignment
        self._device = _device_index(device)
        self._memory = _host_memory(self._round(num_bytes), alignment)
        self._arena = Arena(self._memory.numel())
        self._in_use: dict[int, int] = {}  # size by offset
        self._pending: deque[tuple[Event, int, int]] = deque()  # event, offset, size
        self._in_use_bytes = self._pending_bytes = self._peak = 0
        self._lock = threading.Lock()
        self._closed = False
        # What is registered with CUDA, by address. The tensors are kept: their memory must outlive the registration.
        self._registered: dict[int, Tensor] = {}
        self._unlock = weakref.finalize(self, _unregister_all, self._registered, self._device)
        self._unlock.atexit = False  # the end of the process undoes it, maybe with the driver gone
        self._page_lock(self._memory)

    @property
    def capacity(self) -> int:
        """Bytes of the pool: `num_bytes`, rounded up to the alignment."""
        return self._arena.capacity

    def allocate(self, num_bytes: int) -> PinnedBlock:
        """A block of `num_bytes`, aligned to the pool's alignment; rounded up to it, no more.

        Raises `OutOfHostMemory` if no free range has as many, `ValueError` if the pool is closed or nothing is asked.
        """
        if num_bytes <= 0:
            raise ValueError(f"num_bytes is {num_bytes}: a block has at least 1")
        size = self._round(num_bytes)
        with self._lock:
            self._check_open()
            self._collect(thorough=False)
            offset = self._arena.take(size)
            if offset is None:
                self._collect(thorough=True)
                offset = self._arena.take(size)
            if offset is None:
                raise self._out_of_memory(num_bytes, size)
            self._in_use[offset] = size
            self._in_use_bytes += size
            self._peak = max(self._peak, self._in_use_bytes + self._pending_bytes)
        return PinnedBlock(self, self._memory[offset : offset + num_bytes], offset)

    def register(self, tensor: Tensor) -> Tensor:
        """Page-lock memory that the caller owns (a mapped file, shared memory) and return `tensor`, a dense CPU tensor.

        The pool keeps the tensor, and its memory page-locked, until `unregister` or `close`; it hands out none of it.
        Raises `ValueError` for memory that is not dense, empty, or page-locked already, `CudaError` if CUDA refuses.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            what = f"{list(tensor.shape)}, strides {list(tensor.stride())}, on {tensor.device}"
            raise ValueError(f"only dense CPU tensors with elements can be registered, this one is {what}")
        with self._lock:
            self._check_open()
            if tensor.data_ptr() in self._registered or memory_kind(tensor) is MemoryKind.PINNED:
                raise ValueError(f"the memory at {tensor.data_ptr():#x} is page-locked already: register it once")
            self._page_lock(tensor)
        return tensor

    def unregister(self, tensor: Tensor) -> None:
        """Undo `register`, after waiting for the device. Raises `ValueError` if the tensor is not registered here."""
        with self._lock:
            address = tensor.data_ptr()
            if address not in self._registered or address == self._memory.data_ptr():
                raise ValueError(f"the memory at {address:#x} is not registered with this pool")
            _unregister_all({address: self._registered.pop(address)}, self._device)

    def usage(self) -> PoolUsage:
        """What is taken and free now."""
        with self._lock:
            self._collect(thorough=True)
            ranges = self._arena.free_ranges()
            registered = sum(tensor.nbytes for tensor in self._registered.values())
            return PoolUsage(
                capacity=self.capacity,
                in_use=self._in_use_bytes,
                pending=self._pending_bytes,
                free=sum(size for _, size in ranges),
                largest_free=max((size for _, size in ranges), default=0),
                peak=self._peak,
                blocks_in_use=len(self._in_use),
                blocks_pending=len(self._pending),
                registered=registered - self._memory.nbytes if registered else 0,
                page_locked=self._device is not None and not self._closed,
            )

    def check_integrity(self) -> None:
        """Raise `KVFerryError` unless blocks and free ranges cover the pool without gaps and overlaps."""
        with self._lock:
            pending = [(offset, size) for _, offset, size in self._pending]
            counted, held = (self._in_use_bytes, self._pending_bytes), (self._in_use.values(), dict(pending).values())
            if counted != tuple(map(sum, held)):
                raise KVFerryError(
                    f"pool: {counted} bytes are counted as in use and pending, {tuple(map(sum, held))} are"
                )
            end = 0
            for offset, size in sorted([*self._in_use.items(), *pending, *self._arena.free_ranges()]):
                if offset != end or size <= 0 or size % self._alignment:
                    raise KVFerryError(f"pool: {size} bytes at {offset} follow a range that ends at {end}")
                end = offset + size
            if end != self.capacity:
                raise KVFerryError(f"pool: its ranges end at {end}, its memory at {self.capacity}")

    def close(self) -> None:
        """Wait for the copies under way, then unlock all memory. Tensors of blocks stay valid, as plain memory.

        Blocks in use need not be freed; freeing them later does nothing. Closing twice does nothing.
        """
        with self._lock:
            self._closed = True
            for event, _, _ in self._pending:
                event.synchronize()
            self._collect(thorough=True)
            self._unlock()

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PinnedPool({self.usage()})"

    # -- not for callers ----------------------------------------------------------------------------------------------

    def _free(self, block: PinnedBlock, after: Event | torch.cuda.Stream | None) -> None:
        event = _event_of(after)
        with self._lock:
            if self._closed:
                block._forget()
                return
            block.tensor  # noqa: B018 - raises if the block was freed before
            done = event is None or event.query()
            size = self._in_use.pop(block.offset)
            self._in_use_bytes -= size
            if event is None or done:
                self._arena.give(block.offset, size)
            else:
                self._pending.append((event, block.offset, size))
                self._pending_bytes += size
            block._forget()

    def _collect(self, *, thorough: bool) -> None:
        """Free pending blocks whose event is done: those at the head of the queue, or wherever they are."""
        if thorough:
            done = {id(event): event.query() for event in {id(event): event for event, _, _ in self._pending}.values()}
            finished = [entry for entry in self._pending if done[id(entry[0])]]
            self._pending = deque(entry for entry in self._pending if not done[id(entry[0])])
        else:
            finished = list(self._finished_head())
        for _, offset, size in finished:
            self._pending_bytes -= size
            self._arena.give(offset, size)

    def _finished_head(self) -> Iterator[tuple[Event, int, int]]:
        while self._pending and self._pending[0][0].query():
            yield self._pending.popleft()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the pool is closed: make another")

    def _page_lock(self, memory: Tensor) -> None:
        if self._device is not None:
            with driver.on_device(self._device):
                driver.register_host(memory.data_ptr(), memory.nbytes)
        self._registered[memory.data_ptr()] = memory

    def _out_of_memory(self, wanted: int, size: int) -> OutOfHostMemory:
        ranges = [size for _, size in self._arena.free_ranges()]
        return OutOfHostMemory(
            f"wanted {wanted} bytes ({size} with alignment), but of {self.capacity} bytes {sum(ranges)} are free, the "
            f"largest free range has {max(ranges, default=0)}, and {self._pending_bytes} wait for copies to end: free "
            "blocks, let copies end, or make the pool larger"
        )

    def _round(self, num_bytes: int) -> int:
        return -(-num_bytes // self._alignment) * self._alignment


def _device_index(device: torch.device | int | str | None) -> int | None:
    """The CUDA device's index, None for plain memory."""
    if device is None:
        return torch.cuda.current_device() if driver.is_cuda_memcpy_available() else None
    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if chosen.type == "cpu":
        return None
    if chosen.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(
            f"device {str(chosen)!r} page-locks no memory here: give a CUDA device that is there, or 'cpu'"
        )
    if not driver.is_cuda_memcpy_available():
        raise ImportError("page-locking memory needs cuda-bindings: pip install 'kvferry[gpu]'")
    return chosen.index if chosen.index is not None else torch.cuda.current_device()


def _host_memory(num_bytes: int, alignment: int) -> Tensor:
    """uint8 `[num_bytes]`, aligned. Raises `OutOfHostMemory`."""
    on_linux = sys.platform == "linux"
    # A mapping starts with a page; for more than that, or without one, some bytes are left unused in front.
    spare = 0 if on_linux and alignment <= mmap.PAGESIZE else alignment
    try:
        memory = _mapped(num_bytes + spare) if on_linux else torch.empty(num_bytes + spare, dtype=torch.uint8)
    except (OSError, OverflowError, RuntimeError) as error:
        raise OutOfHostMemory(f"the system has no {num_bytes} bytes of host memory ({error}): ask for less") from error
    start = -memory.data_ptr() % alignment
    return memory[start : start + num_bytes]


def _mapped(num_bytes: int) -> Tensor:
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # a kernel without it: small pages, or fork has to be avoided
            mapping.madvise(advice)
    return torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping


def _event_of(after: Event | torch.cuda.Stream | None) -> Event | None:
    if isinstance(after, torch.cuda.Stream):
        event: Event = after.record_event()
        return event
    # An event that was never recorded says that it is done.
    if isinstance(after, torch.cuda.Event) and not after.cuda_event:
        raise ValueError("the event was never recorded: record it behind the last copy that uses the block")
    return after


def _unregister_all(registered: dict[int, Tensor], device: int | None) -> None:
    """Wait for the device, then unlock; leaves `registered` empty."""
    if device is not None and registered:
        driver.synchronize(device)
        with driver.on_device(device):
            for address in registered:
                driver.unregister_host(address)
    registered.clear()
