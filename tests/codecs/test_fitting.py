"""Ladders of bounds: what is tried, how often, and where it ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.codecs.fitting import MOST_TRIES, SCALES, SEARCH, Fit, Ladder


def climbed(ladder: Ladder, payloads: list[int], room: int) -> list[int]:
    """The levels that are tried where level i takes `payloads[i]` bytes."""
    fit, levels = Fit(ladder), []
    while True:
        levels.append(fit.level)
        if fit.tried(payloads[fit.level], room):
            assert fit.level == levels[-1], "the last try is what counts"
            return levels
        assert len(levels) <= ladder.retries, "there would be no room on the GPU's list"


class TestDoubling:
    def test_goes_up_until_it_fits(self) -> None:
        assert climbed(Ladder(4), [9, 8, 5, 2], 6) == [0, 1, 2]
        assert climbed(Ladder(4), [9, 8, 7, 7], 6) == [0, 1, 2, 3]
        assert climbed(Ladder(1), [9], 6) == [0]
        assert climbed(Ladder(4), [6, 8, 7, 7], 6) == [0]

    def test_factors(self) -> None:
        assert [Ladder(4).factor(level) for level in range(4)] == [1, 2, 4, 8]


falling = st.lists(st.integers(0, 200), min_size=len(SCALES), max_size=len(SCALES)).map(
    lambda steps: [1 + sum(steps[i:]) for i in range(len(steps))]
)


class TestSearch:
    def test_factors(self) -> None:
        assert SEARCH.factor(SEARCH.first) == 1.0
        assert SEARCH.factor(SEARCH.first + 8) == 2.0
        assert SEARCH.factor(0) == 2.0**-6 and SEARCH.factor(SEARCH.levels - 1) == 2.0**8

    @given(falling, st.integers(0, 20000))
    def test_ends_at_a_level_that_fits_if_there_is_one(self, payloads: list[int], room: int) -> None:
        levels = climbed(SEARCH, payloads, room)
        taken = payloads[levels[-1]]
        assert (taken <= room) == (payloads[-1] <= room)
        fitting = [level for level in levels if payloads[level] <= room]
        if fitting:
            assert levels[-1] == min(fitting)
            finer = levels[-1] - 1
            spare = (room - taken) * 64 <= room
            assert spare or finer < 0 or payloads[finer] > room or len(levels) >= MOST_TRIES

    @given(st.lists(st.integers(0, 1 << 31), min_size=len(SCALES), max_size=len(SCALES)), st.integers(1, 1 << 31))
    def test_ends_whatever_payloads_do(self, payloads: list[int], room: int) -> None:
        levels = climbed(SEARCH, payloads, room)
        fits = [payloads[level] <= room for level in levels]
        assert fits[-1] == any(fits)

    @pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 30.0])
    @pytest.mark.parametrize("room", [0.4, 1.0, 2.0, 4.0])
    def test_uses_its_room_in_few_tries(self, sigma: float, room: float) -> None:
        """Bits of a value as a Gaussian's at high rate, and less than that at low rate."""
        payloads = [int(1e6 * 0.5 * math.log2(1 + 16 * (sigma / scale) ** 2)) for scale in SCALES]
        levels = climbed(SEARCH, payloads, int(1e6 * room))
        assert len(levels) <= MOST_TRIES
        used = payloads[levels[-1]] / (1e6 * room)
        finer = payloads[max(levels[-1] - 1, 0)] / (1e6 * room)
        assert used <= 1 and (used >= 1 - 1 / 64 or finer > 1 or levels[-1] == 0)
