"""First fit with size classes, against a model that knows every byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.device.arena import Arena


@given(st.lists(st.one_of(st.integers(1, 12), st.just(0)), max_size=60), st.randoms(use_true_random=False))
def test_blocks_never_overlap_and_nothing_is_lost(requests, random):
    arena, taken = Arena(32), {}
    for request in requests:
        if request == 0 and taken:
            offset = random.choice(sorted(taken))
            arena.give(offset, taken.pop(offset))
        elif request:
            largest = max((size for _, size in arena.free_ranges()), default=0)
            offset = arena.take(request)
            assert (offset is None) == (request > largest)
            if offset is not None:
                taken[offset] = request
        covered = [
            byte for offset, size in [*taken.items(), *arena.free_ranges()] for byte in range(offset, offset + size)
        ]
        assert sorted(covered) == list(range(32))


def test_first_fit():
    arena = Arena(10)
    assert [arena.take(2) for _ in range(3)] == [0, 2, 4]
    arena.give(0, 2)
    assert arena.take(3) == 6
    assert arena.take(1) == 9
    assert arena.take(1) == 0  # from the freed block, when nothing else has room
    assert arena.free_ranges() == [(1, 1)]


def test_a_freed_block_serves_the_next_request_of_its_size():
    arena = Arena(10)
    first, second = arena.take(3), arena.take(3)
    arena.give(first, 3)
    arena.give(second, 3)
    assert arena.take(3) == second
    assert arena.take(3) == first


def test_freed_neighbours_serve_a_larger_request():
    arena = Arena(8)
    blocks = [arena.take(2) for _ in range(4)]
    for offset in (blocks[2], blocks[0], blocks[1]):
        arena.give(offset, 2)
    assert arena.take(7) is None
    assert arena.take(6) == 0
    assert arena.free_ranges() == []
    assert arena.take(1) is None


def test_nothing_fits_in_nothing():
    assert Arena(0).take(1) is None
    assert Arena(0).free_ranges() == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_ranges_are_joined_in_any_order(order):
    arena = Arena(6)
    blocks = [arena.take(2) for _ in range(3)]
    for number in order:
        arena.give(blocks[number], 2)
        arena.take(7)  # too large: what waits in classes goes back to the arena
    assert arena.free_ranges() == [(0, 6)]
    assert arena.take(6) == 0
