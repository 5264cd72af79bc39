"""A device that runs what streams hold in any order that events allow, one operation at a time.

Every operation reads and writes memory when it is run, not when it is queued: transfers that forget an event, or use
memory again too early, come out wrong under some order.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.codecs.slots import SlotCodec
from kvferry.pipeline.machine import Machine


@dataclass
class Mark:
    """One record of an event."""

    passed: bool = False
    at: int = 0


class SimulatedStream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Callable[[], None] | Mark] = deque()

    def wait_event(self, event: "SimulatedEvent") -> None:
        if event.mark is not None:
            self.queue.append(event.mark)

    @property
    def blocked(self) -> bool:
        return isinstance(self.queue[0], Mark) and not self.queue[0].passed


class SimulatedEvent:
    def __init__(self, machine: "SimulatedMachine") -> None:
        self.machine = machine
        self.mark: Mark | None = None

    def record(self, stream: SimulatedStream) -> None:
        if self.machine.lost:
            raise RuntimeError("CUDA error: device is lost")
        mark = self.mark = Mark()

        def pass_mark() -> None:
            mark.passed, mark.at = True, self.machine.clock

        stream.queue.append(pass_mark)

    def query(self) -> bool:
        if self.machine.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.mark is None or self.mark.passed

    def synchronize(self) -> None:
        self.machine.host_waits += 1
        while not self.query():
            self.machine.step()

    def elapsed_time(self, end_event: "SimulatedEvent") -> float:
        assert self.mark is not None and end_event.mark is not None
        return float(end_event.mark.at - self.mark.at)


class SimulatedMachine(Machine):
    """See the module. `seed` chooses the order; `favourites` are the names of streams that run whenever they can."""

    stages = True

    def __init__(self, seed: int = 0, favourites: tuple[str, ...] = ()) -> None:
        self.random, self.favourites = random.Random(seed), favourites
        self.streams: list[SimulatedStream] = []
        self.caller = self.stream_named("caller")
        self.current = self.caller
        self.clock = 0
        self.host_waits = 0
        self.copies = 0
        self.lost = False
        self.gated = False
        self.fail_copy_in: int | None = None  # copies until one fails to be queued
        self.device_bytes_left = 1 << 40

    # -- running ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one operation; False if no stream can go on."""
        ready = [stream for stream in self.streams if stream.queue and not stream.blocked]
        if not ready:
            assert self.gated or not any(stream.queue for stream in self.streams), "the streams wait for each other"
            return False
        chosen = [stream for stream in ready if stream.name in self.favourites] or ready
        operation = self.random.choice(chosen).queue.popleft()
        self.clock += 1
        if callable(operation):
            operation()
        return True

    def settle(self) -> None:
        while self.step():
            pass

    def pending(self) -> set[Callable[[], None]]:
        """The operations that are queued and have not run."""
        return {operation for stream in self.streams for operation in stream.queue if callable(operation)}

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @contextmanager
    def caller_blocked(self) -> Iterator[Mark]:
        """What the caller's stream holds from now on waits for the end of the block."""
        gate = Mark()
        self.caller.queue.append(gate)
        self.gated = True
        yield gate
        self.gated, gate.passed = False, True

    # -- Machine ------------------------------------------------------------------------------------------------------

    def stream_named(self, name: str) -> SimulatedStream:
        stream = SimulatedStream(name)
        self.streams.append(stream)
        return stream

    def stream(self, *, high_priority: bool = False) -> SimulatedStream:
        return self.stream_named(f"stream {len(self.streams)}")

    def current_stream(self) -> SimulatedStream:
        return self.current

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def event(self, *, timing: bool = False) -> SimulatedEvent:
        return SimulatedEvent(self)

    def device_memory(self, num_bytes: int, purpose: str) -> Tensor:
        self.device_bytes_left -= num_bytes
        return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)

    def host_memory(self, num_bytes: int, purpose: str) -> Tensor:
        return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)

    def check_slots(self, slots: Tensor) -> None:
        pass

    def copy(self, dst: Tensor, src: Tensor, stream: Any) -> None:
        self._queue_copy(stream, lambda: dst.copy_(src))

    def copy_rows(
        self, dst: Tensor, dst_rows: np.ndarray, src: Tensor, src_rows: np.ndarray, counts: np.ndarray, stream: Any
    ) -> None:
        for d, s, n in zip(dst_rows.tolist(), src_rows.tolist(), counts.tolist(), strict=True):
            self._queue_copy(stream, lambda d=d, s=s, n=n: dst[d : d + n].copy_(src[s : s + n]))

    def _queue_copy(self, stream: SimulatedStream, run: Callable[[], object]) -> None:
        if self.fail_copy_in is not None:
            self.fail_copy_in -= 1
            if self.fail_copy_in < 0:
                self.fail_copy_in = None
                raise RuntimeError("CUDA error: copy refused")
        self.copies += 1
        stream.queue.append(lambda: (run(), None)[1])


class SimulatedCodec:
    """A `SlotCodec` whose calls are queued on the machine's current stream."""

    def __init__(self, machine: SimulatedMachine, codec: SlotCodec) -> None:
        self.machine, self.codec = machine, codec
        self.fail_in: int | None = None  # calls until one fails to be queued

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def encode(self, *arguments: Tensor) -> None:
        self._queue(self.codec.encode, arguments)

    def decode(self, *arguments: Tensor) -> None:
        self._queue(self.codec.decode, arguments)

    def _queue(self, run: Callable[..., None], arguments: tuple[Tensor, ...]) -> None:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                raise RuntimeError("CUDA error: launch refused")
        self.machine.current.queue.append(lambda: run(*arguments))
