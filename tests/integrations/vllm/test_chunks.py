"""Which pages a chunk is: blocks that vLLM names in one list, chunk by chunk."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.integrations.vllm.chunks import MISSING, for_rank, group_chunks, identities_of, identity_of, pages_of


def cut(blocks: Sequence[int], sizes: Sequence[int], indices: Sequence[int], a_chunk: int, chunks: int) -> list[list]:
    parts = group_chunks(np.array(blocks), sizes, indices, a_chunk, chunks)
    return [[part.group, part.first, part.blocks.tolist()] for part in parts]


def test_a_block_a_chunk() -> None:
    assert cut([7, 3, 9], [3], [5], 1, 3) == [[0, 0, [[7], [3], [9]]]]


def test_whole_chunks() -> None:
    assert cut([7, 3, 9, 1], [4], [2], 2, 2) == [[0, 0, [[7, 3], [9, 1]]]]


def test_a_transfer_starts_and_ends_in_the_middle() -> None:
    assert cut([7, 3, 9], [3], [3], 4, 2) == [[0, 0, [[MISSING, MISSING, MISSING, 7], [3, 9, MISSING, MISSING]]]]
    assert cut([7], [1], [6], 4, 1) == [[0, 0, [[MISSING, MISSING, 7, MISSING]]]]


def test_groups_are_cut_on_their_own() -> None:
    found = cut([1, 2, 3, 9, 8], [3, 0, 2], [0, 0, 1], 2, 4)
    assert found == [[0, 0, [[1, 2], [3, MISSING]]], [2, 2, [[MISSING, 9], [8, MISSING]]]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1, 2], [1], [0], 1, 1), "2 blocks, but the groups have 1"),
        (([1, 2], [2], [0, 0], 1, 2), "1 group sizes, but 2 block indices"),
        (([1, 2], [2], [1], 2, 1), "make 2 chunks of 2, but 1 slots are named"),
        (([1, 2], [2], [0], 2, 2), "make 1 chunks of 2, but 2 slots"),
    ],
)
def test_what_does_not_go_together(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cut(*arguments)


@given(
    groups=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=1, max_size=4),
    a_chunk=st.integers(1, 5),
)
def test_every_block_is_in_its_place(groups: list[tuple[int, int]], a_chunk: int) -> None:
    """Each group's block number i, counted from the group's start in its sequence, is place i % a_chunk of a chunk."""
    sizes, indices = zip(*groups, strict=True)
    blocks = np.arange(sum(sizes)) + 100
    chunks = sum((index + size - 1) // a_chunk - index // a_chunk + 1 for size, index in groups if size)
    parts = group_chunks(blocks, sizes, indices, a_chunk, chunks)
    assert sum(len(part.blocks) for part in parts) == chunks
    found = []
    for part in parts:
        first = indices[part.group] // a_chunk
        places = np.argwhere(part.blocks != MISSING)
        found += [
            (part.group, int((first + row) * a_chunk + column), int(part.blocks[row, column])) for row, column in places
        ]
    expected, at = [], 100
    for group, (size, index) in enumerate(groups):
        expected += [(group, index + i, at + i) for i in range(size)]
        at += size
    assert sorted(found) == sorted(expected)


def test_pages_where_kernels_cut_blocks() -> None:
    blocks = np.array([[4, MISSING], [0, 2]])
    assert pages_of(blocks, 1).tolist() == [[4, -1], [0, 2]]
    assert pages_of(blocks, 2).tolist() == [[8, 9, -1, -1], [0, 1, 4, 5]]
    assert pages_of(blocks, 1).dtype == np.int32


def test_identities_tell_keys_and_ranks_apart() -> None:
    keys = [b"a" * 32 + bytes([0, 0, 0, group]) for group in range(3)] + [b"b" * 36]
    found = identities_of(keys)
    assert found.dtype == np.uint64 and found.shape == (4, 2)
    assert [tuple(row) for row in found.tolist()] == [identity_of(key) for key in keys]
    assert np.array_equal(for_rank(found, 0), found)
    everything = np.concatenate([for_rank(found, rank) for rank in range(8)])
    assert len(np.unique(everything, axis=0)) == 32
    assert identities_of([]).shape == (0, 2)
