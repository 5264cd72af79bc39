"""Which part of a ring is free: arithmetic on positions, without the memory itself."""

from collections import deque


class Ring:
    """Ranges of `size` places, taken and freed in the same order.

    A range does not wrap: what is left at the end is skipped until the ring comes around.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a ring of {size} places holds nothing: give it at least 1")
        self.size = size
        self._ends: deque[int] = deque()  # of the ranges in use; counted on from lap to lap
        self._head = 0  # where the next range may begin
        self._tail = 0  # everything before it is free

    def __len__(self) -> int:
        """Ranges in use."""
        return len(self._ends)

    def fits(self, count: int) -> bool:
        """Whether `count` places can be taken now."""
        return self._begin(count) + count - self.size <= self._tail

    def take(self, count: int) -> int:
        """Take `count` places and return the first. Raises `ValueError` if they do not fit."""
        if count < 1 or not self.fits(count):
            raise ValueError(f"{count} places do not fit: {len(self)} ranges are in use in a ring of {self.size}")
        begin = self._begin(count)
        self._head = begin + count
        self._ends.append(self._head)
        return begin % self.size

    def free_oldest(self) -> None:
        """Give back the range that was taken first. Raises `IndexError` if none is in use."""
        self._tail = self._ends.popleft()
        if not self._ends:
            self._head = self._tail = 0  # a fresh start leaves nothing to skip

    def _begin(self, count: int) -> int:
        behind = self._head % self.size
        return self._head if behind + count <= self.size else self._head + self.size - behind
