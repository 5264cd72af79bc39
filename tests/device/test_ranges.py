"""Runs of bytes: merging, bounds, overlap; against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.device.ranges import Ranges, coalesce, ranges_of, ranges_within, refuse_overlapping


def ranges(*rows):
    """Of (dst, src, size) or (dst, src, size, dst owner, src owner)."""
    table = np.array([(*row, 0, 0)[:5] for row in rows], np.uint64).reshape(-1, 5)
    return Ranges(*table[:, :3].T.copy(), *table[:, 3:].T.astype(np.int64))


def listed(found):
    return [tuple(map(int, row)) for row in zip(found.dsts, found.srcs, found.sizes, strict=True)]


def test_neighbours_in_both_memories_become_one():
    assert listed(coalesce(ranges((0, 100, 4), (4, 104, 4), (8, 108, 8)))) == [(0, 100, 16)]
    assert listed(coalesce(ranges((4, 104, 4), (0, 100, 4)))) == [(0, 100, 8)]  # in any order
    assert listed(coalesce(ranges((0, 100, 4), (4, 108, 4)))) == [(0, 100, 4), (4, 108, 4)]
    assert listed(coalesce(ranges((0, 100, 4), (8, 104, 4)))) == [(0, 100, 4), (8, 104, 4)]
    assert listed(coalesce(ranges((0, 104, 4), (4, 100, 4)))) == [(0, 104, 4), (4, 100, 4)]
    assert listed(coalesce(ranges())) == []


def test_nothing_is_merged_across_allocations():
    assert len(coalesce(ranges((0, 100, 4, 1, 1), (4, 104, 4, 2, 1))).sizes) == 2
    assert len(coalesce(ranges((0, 100, 4, 1, 1), (4, 104, 4, 1, 2))).sizes) == 2
    assert len(coalesce(ranges((0, 100, 4, 1, 1), (4, 104, 4, 1, 1))).sizes) == 1


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 3)), max_size=12))
def test_merged_ranges_move_the_same_bytes(rows):
    taken, distinct = set(), []
    for dst, src, size in rows:
        if not taken & set(range(dst, dst + size)):
            taken |= set(range(dst, dst + size))
            distinct.append((dst, src, size))
    merged = coalesce(ranges(*distinct))

    def moves(triples):
        return {dst + i: src + i for dst, src, size in triples for i in range(size)}

    assert moves(listed(merged)) == moves(distinct)
    assert len(merged.sizes) <= len(distinct)
    assert merged.sizes.dtype == np.uint64


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=6))
def test_overlap_is_found_wherever_it_is(rows):
    found = ranges(*rows)
    written = [byte for dst, _, size in rows for byte in range(dst, dst + size)]
    read = {byte for _, src, size in rows for byte in range(src, src + size)}
    clash = len(set(written)) < len(written) or bool(set(written) & read)
    arguments = found.dsts, found.dsts + found.sizes, found.srcs, found.srcs + found.sizes
    if clash:
        with pytest.raises(ValueError, match="overlap"):
            refuse_overlapping(*arguments)
    else:
        refuse_overlapping(*arguments)


def test_ranges_of_tensors():
    x, y = torch.zeros(10), torch.ones(10, dtype=torch.float32)
    found = ranges_of([(x[2:5], y[1:4]), (x[5:], y[4:9])])
    assert listed(found) == [
        (x.data_ptr() + 8, y.data_ptr() + 4, 12),
        (x.data_ptr() + 20, y.data_ptr() + 16, 20),
    ]
    assert set(found.dst_owner.view(np.uint64)) == {x.data_ptr()}
    assert len(ranges_of([]).sizes) == 0


def test_ranges_within_tensors():
    x, y = torch.zeros(10), torch.zeros(12)
    found = ranges_within(x, [0, 36, 7], y, np.array([44, 4, 0], np.int32), torch.tensor([4, 4, 0]))
    assert listed(found) == [(x.data_ptr(), y.data_ptr() + 44, 4), (x.data_ptr() + 36, y.data_ptr() + 4, 4)]
    assert len(ranges_within(x, [], y, [], []).sizes) == 0
    for to, of, size, message in (
        ([0, 37], [0, 0], [4, 4], "range 1: 4 bytes from byte 37 of dst are not within its 40"),
        ([0], [45], [4], "range 0: 4 bytes from byte 45 of src"),
        ([-1], [0], [4], "byte -1 of dst"),
        ([0], [0], [-4], "-4 bytes"),
        ([1 << 62], [0], [1 << 62], "not within"),
        ([0, 0], [0], [4], "shapes"),
        ([[0]], [[0]], [[4]], "shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            ranges_within(x, to, y, of, size)
    with pytest.raises(TypeError, match="float64"):
        ranges_within(x, [0.5], y, [0], [4])
