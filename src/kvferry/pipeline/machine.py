"""What a lane needs of a device: streams, events, memory and copies.

`CudaMachine` (cuda.py) is the real one. `HostMachine` does everything at once and in place, for tensors in host memory.
Tests put a third in their place, which runs what was queued in any order that streams and events allow.
"""

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Event(Protocol):
    """As `torch.cuda.Event`: the point in a stream where it was last recorded."""

    # Any: each machine's events know that machine's streams only.
    def record(self, stream: Any) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Stream(Protocol):
    """As `torch.cuda.Stream`: a queue of work on the device."""

    def wait_event(self, event: Any) -> None: ...


class Machine(ABC):
    """Streams, events, memory and copies of one device. Nothing but the constructors of memory may wait for it."""

    stages: bool
    """Whether slots are coded in device memory and copied; otherwise coders read and write host slots themselves."""

    @abstractmethod
    def stream(self, *, high_priority: bool = False) -> Stream:
        """A new stream."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream that the caller's work is queued on."""

    @abstractmethod
    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """Queue on `stream` what coders launch meanwhile."""

    @abstractmethod
    def event(self, *, timing: bool = False) -> Event:
        """A new event, which has passed as long as it is not recorded."""

    @abstractmethod
    def device_memory(self, num_bytes: int, purpose: str) -> Tensor:
        """uint8 `[num_bytes]` on the device. Raises `OutOfDeviceMemory`."""

    @abstractmethod
    def host_memory(self, num_bytes: int, purpose: str) -> Tensor:
        """uint8 `[num_bytes]` in host memory, pinned where copies need it. Raises `OutOfHostMemory`."""

    @abstractmethod
    def check_slots(self, slots: Tensor) -> None:
        """Raise `ValueError` unless copies reach `slots` by DMA."""

    @abstractmethod
    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        """Queue one copy between contiguous tensors of equal size."""

    @abstractmethod
    def copy_rows(
        self, dst: Tensor, dst_rows: np.ndarray, src: Tensor, src_rows: np.ndarray, counts: np.ndarray, stream: Stream
    ) -> None:
        """Queue `dst[d : d + n] = src[s : s + n]` for each `d, s, n` of the integer arrays; both are uint8 matrices of
        equal width."""

    def settle(self) -> None:  # noqa: B027
        """Return when all work queued on the device is done. Called when lanes are made, never on the way."""


class _HostEvent:
    """Has always passed."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self, stream: Stream) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: "_HostEvent") -> float:
        return (end_event.at - self.at) * 1e3


class _HostStream:
    """Everything on it has been done."""

    def wait_event(self, event: Event) -> None:
        pass


class HostMachine(Machine):
    """Does everything when it is asked for."""

    stages = False

    def stream(self, *, high_priority: bool = False) -> Stream:
        return _HostStream()

    def current_stream(self) -> Stream:
        return _HostStream()

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self, *, timing: bool = False) -> Event:
        return _HostEvent()

    def device_memory(self, num_bytes: int, purpose: str) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def host_memory(self, num_bytes: int, purpose: str) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def check_slots(self, slots: Tensor) -> None:
        pass

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        dst.copy_(src)

    def copy_rows(
        self, dst: Tensor, dst_rows: np.ndarray, src: Tensor, src_rows: np.ndarray, counts: np.ndarray, stream: Stream
    ) -> None:
        for d, s, n in zip(dst_rows.tolist(), src_rows.tolist(), counts.tolist(), strict=True):
            dst[d : d + n].copy_(src[s : s + n])
