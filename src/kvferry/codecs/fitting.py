"""Which error bounds a chunk is tried at until it fits its slot. In whole numbers, so that a GPU (fused/fit.cu) tries
the same ones."""

from dataclasses import dataclass

import numpy as np

_SCALES_PER_DOUBLING = 8
SCALES = tuple(float(np.float32(2.0 ** (i / _SCALES_PER_DOUBLING))) for i in range(-48, 65))
"""What a fixed rate chooses from, times the asked bound; of float32, where all machines' powers agree."""
_FIRST_SCALE = 48
MOST_TRIES = 8
"""Of a search, before the smallest scale that is known to fit is taken."""
_SPARE = 64
"""A chunk that leaves free no more than one part in so many of its slot is not tried again."""
_LEVELS_OF_PAYLOAD = 32
"""A level (an eighth of a bit of each value that is not yet zero) takes about one part in so many off a payload: 2.5 to
5 % at 5 to 1.5 bits a value."""


@dataclass(frozen=True)
class Ladder:
    """Levels 0, 1, ... (`levels` of them) that a chunk may be tried at; level i has its bounds times `factor(i)`.

    Without `searches` a chunk starts at level 0 and goes up until it fits: powers of two. With it, it ends at the
    smallest level of `SCALES` that it was found to fit at, from level `first` on by what its payloads took.
    """

    levels: int
    searches: bool = False

    @property
    def first(self) -> int:
        """The level that all chunks are tried at first."""
        return _FIRST_SCALE if self.searches else 0

    @property
    def retries(self) -> int:
        """How often a chunk may be tried after that."""
        return MOST_TRIES + 1 if self.searches else self.levels - 1

    def factor(self, level: int) -> float:
        """What bounds are multiplied by."""
        return SCALES[level] if self.searches else 2.0**level


SEARCH = Ladder(len(SCALES), searches=True)


class Fit:
    """Where a chunk is on its ladder."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self.level: int = ladder.first
        self._final = False
        self._tries = 0
        # Around the level sought: the largest that does not fit, the smallest that does, and what they took.
        self._low, self._high = -1, ladder.levels
        self._low_bytes = self._high_bytes = 0

    def tried(self, payload: int, room: int) -> bool:
        """Whether it is done, after a try at `level` that took `payload` bytes, where there is `room`; else `level` is
        what to try next."""
        fits, last = payload <= room, self._ladder.levels - 1
        if self._final or not self._ladder.searches:
            if fits or self.level == last or self._final:
                return True
            self.level += 1
            return False
        if fits:
            self._high, self._high_bytes = self.level, payload
        else:
            self._low, self._low_bytes = self.level, payload
        self._tries += 1
        if fits and (room - payload) * _SPARE <= room:
            return True
        if self._low == last:
            return True
        if self._high <= last and (self._high - self._low == 1 or self._tries >= MOST_TRIES):
            self._final = True
            done = self.level == self._high
            self.level = self._high
            return done
        self.level = self._guess(room)
        return False

    def _guess(self, room: int) -> int:
        """Between the levels that are known; from one alone, in proportion to what is too much or too little."""
        low, high = self._low, self._high
        if low < 0:
            return max(0, high - max(1, (room - self._high_bytes) * _LEVELS_OF_PAYLOAD // max(self._high_bytes, 1)))
        over = self._low_bytes - room
        if high == self._ladder.levels:
            least = 1 << self._tries  # ends soon, whatever the payloads say
            return min(high - 1, low + max(least, -(-over * _LEVELS_OF_PAYLOAD // self._low_bytes)))
        level = low + over * (high - low) // (self._low_bytes - self._high_bytes)
        if self.level == high:
            # Payloads are convex in the level: what lies on the chord fits again and again. Step beyond it.
            level -= 1 + (high - level) // 2
        return min(max(level, low + 1), high - 1)
