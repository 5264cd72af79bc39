"""Side streams, events, and what must stay alive until a copy is done."""

import functools
import threading
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from kvferry.device.driver import is_capturing

LEGACY_STREAMS = (0, 1)
"""Handles of the legacy default stream, PyTorch's default: `cuMemcpyBatchAsync` does not take it."""


class Event(Protocol):
    """What the copy layer asks of an event: `torch.cuda.Event` has it, and so has `CompletedEvent`."""

    def query(self) -> bool:
        """Whether the work before the event is done. Does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class CompletedEvent:
    """The event of work that was done when the call returned: copies on the CPU. Takes what a CUDA event takes."""

    def query(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Returns at once."""

    def wait(self, stream: object = None) -> None:
        """Returns at once: no stream has anything to wait for."""


@functools.cache
def side_stream(device: int, *, high_priority: bool = False) -> torch.cuda.Stream:
    """The side stream of CUDA device `device` with that priority: one of each a device, the same at every call.

    The hardware runs waiting blocks of the high-priority stream first; copies on either go to the copy engines. Raises
    `RuntimeError` without CUDA.
    """
    return torch.cuda.Stream(device, priority=-1 if high_priority else 0)


@functools.cache
def batch_stream(device: int) -> torch.cuda.Stream:
    """Takes the batches that are meant for the legacy default stream of `device`, and nothing else: in order with it,
    and never behind work of another."""
    return torch.cuda.Stream(device)


def recorded(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """A new event, recorded on `stream` (default: the current one): done when what is queued there now is done.

    Raises `RuntimeError` without CUDA.
    """
    event = torch.cuda.Event()
    event.record(stream if stream is not None else torch.cuda.current_stream())
    return event


class _Held:
    """Tensors that copies in flight read or write, by the event of their copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[tuple[Event, tuple[Tensor, ...]]] = deque()

    def hold(self, event: Event, tensors: tuple[Tensor, ...]) -> None:
        """Keep `tensors` until `event` is done; let go of those whose event is."""
        finished = []
        with self._lock:
            self._queue.append((event, tensors))
            # In order of submission: a slow stream holds up only memory, and each event is asked once it can matter.
            while self._queue[0][0].query():
                finished.append(self._queue.popleft())
                if not self._queue:
                    break
        del finished  # outside of the lock: freeing a tensor may run anything

    def __len__(self) -> int:
        return len(self._queue)


_held = _Held()


def hold_until_done(stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> torch.cuda.Event | None:
    """Keep host tensors from being freed before what is queued on `stream` now is done. Returns the event of that.

    PyTorch's caching host allocator knows of copies that `copy_` makes, and of no others: without this, a pinned
    temporary would be handed out again while the DMA still reads it. None, and nothing is kept, while the stream
    records a graph: as for `copy_`, the caller keeps the memory for as long as the graph. Needs a current context.
    """
    if is_capturing(stream.cuda_stream):
        return None
    event = recorded(stream)
    _held.hold(event, tuple(tensors))
    return event
