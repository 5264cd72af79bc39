"""Ring arithmetic against a model that keeps every place's owner."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.pipeline.ring import Ring


@given(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=60))
def test_ranges_never_overlap_and_are_freed_in_order(size: int, steps: list[int]) -> None:
    ring, used = Ring(size), []
    for count in steps:
        if count == 0:
            if used:
                used.pop(0)
                ring.free_oldest()
        elif count <= size and ring.fits(count):
            start = ring.take(count)
            assert 0 <= start <= size - count
            assert all(start + count <= s or s + n <= start for s, n in used)
            used.append((start, count))
        assert len(ring) == len(used)


@given(st.integers(1, 12), st.data())
def test_an_empty_ring_takes_anything_up_to_its_size(size: int, data: st.DataObject) -> None:
    ring = Ring(size)
    for _ in range(10):
        ring.take(data.draw(st.integers(1, size)))
        ring.free_oldest()


def test_what_does_not_fit_is_refused():
    ring = Ring(4)
    assert ring.take(3) == 0
    assert not ring.fits(2)
    with pytest.raises(ValueError, match="2 places do not fit: 1 ranges are in use in a ring of 4"):
        ring.take(2)
    with pytest.raises(ValueError, match="give it at least 1"):
        Ring(0)
    with pytest.raises(ValueError, match="0 places"):
        ring.take(0)
