"""The ring of slots in device memory that encoded chunks pass through."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from kvferry.pipeline.machine import Event, Machine
from kvferry.pipeline.ring import Ring


@dataclass(eq=False)
class Hold:
    """Slots `start` to `start + count` of the ring, in use until `freed` (None: they are free, nothing to wait for).

    `behind` is what held some of them before; who fills them waits for that first.
    """

    start: int
    count: int
    freed: Event | None
    behind: "Hold | None"


class StagingRing:
    """`slots` uint8 `[num_slots, slot_bytes]` on the device, and who holds which.

    Back-pressure is the streams' affair: a hold is granted at once, and names the one whose event the filling stream
    waits for. Holds are freed in the order in which they were taken.
    """

    def __init__(self, machine: Machine, num_bytes: int, slot_bytes: int) -> None:
        if num_bytes < slot_bytes:
            raise ValueError(
                f"ring_bytes={num_bytes} holds no slot of {slot_bytes} bytes: give it {4 * slot_bytes} or more, so "
                "that coding and copying overlap"
            )
        num_slots = num_bytes // slot_bytes
        memory = machine.device_memory(num_slots * slot_bytes, "the staging ring (ring_bytes)")
        self.slots: Tensor = memory.view(num_slots, slot_bytes)
        self._ring = Ring(num_slots)
        self._holds: deque[Hold] = deque()

    @property
    def num_slots(self) -> int:
        return self._ring.size

    def hold(self, count: int, freed: Event) -> Hold:
        """Take `count` slots (at most `num_slots`) that will be free again when `freed`, recorded later, has passed."""
        behind: Hold | None = None
        while not self._ring.fits(count):
            # The last one is enough: the streams that free them keep their order.
            behind = self._holds.popleft()
            self._ring.free_oldest()
        hold = Hold(self._ring.take(count), count, freed, behind)
        self._holds.append(hold)
        return hold
