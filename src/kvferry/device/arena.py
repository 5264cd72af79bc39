"""Where blocks lie in one range of bytes: first fit with size classes in front. No memory, no locks, no CUDA."""

from bisect import bisect_left


class Arena:
    """Offsets within `capacity` bytes. Sizes are multiples of the caller's alignment; the caller keeps to it.

    A freed block waits in the class of its size, where the next request of that size takes it at once: a pool serves a
    few sizes over and over. Only when neither a class nor the arena has room, the classes go back to the arena, where
    neighbours become one range again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (offset, size), by offset, no two touch
        self._classes: dict[int, list[int]] = {}

    def take(self, size: int) -> int | None:
        """Offset of `size` free bytes, now taken; None if no free range has as many."""
        if found := self._classes.get(size):
            return found.pop()
        offset = self._first_fit(size)
        if offset is None and self._classes:
            self._empty_classes()
            offset = self._first_fit(size)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free what `take` returned for `size`."""
        self._classes.setdefault(size, []).append(offset)

    def free_ranges(self) -> list[tuple[int, int]]:
        """All that is free, as (offset, size) by offset; ranges that touch are one."""
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*self._free, *self._cached()]):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        return merged

    def _cached(self) -> list[tuple[int, int]]:
        return [(offset, size) for size, offsets in self._classes.items() for offset in offsets]

    def _first_fit(self, size: int) -> int | None:
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, room - size)
                return offset
        return None

    def _empty_classes(self) -> None:
        cached = self._cached()
        self._classes.clear()
        for offset, size in cached:
            self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and offset + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, size = self._free[index - 1][0], self._free[index - 1][1] + size
            self._free[index - 1] = (offset, size)
        else:
            self._free.insert(index, (offset, size))
