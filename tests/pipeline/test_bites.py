"""How jobs are cut."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.pipeline.bites import Bite, growing, runs_of, shrinking
from kvferry.pipeline.settings import Settings


def test_bites_of_stores_grow_and_those_of_loads_shrink():
    assert [len(bite) for bite in growing(64, 1, 16, 4)] == [1, 4, 16, 16, 16, 11]
    assert [len(bite) for bite in shrinking(64, 1, 16, 4)] == [11, 16, 16, 16, 4, 1]
    assert growing(3, 8, 16, 4) == shrinking(3, 8, 16, 4) == (Bite(0, 3),)
    assert growing(0, 1, 16, 4) == ()


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_bites_cover_a_job_once_and_in_order(chunks: int, smallest: int, most: int, growth: int) -> None:
    for cut in (growing, shrinking):
        bites = cut(chunks, smallest, most, growth)
        assert [i for bite in bites for i in range(bite.first, bite.stop)] == list(range(chunks))
        assert all(1 <= len(bite) <= most for bite in bites)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 3))
def test_runs_are_the_longest_that_count_up_within_a_bite(host: list[int], smallest: int, growth: int) -> None:
    bites = growing(len(host), smallest, 8, growth)
    ring = np.concatenate([np.arange(len(bite)) + 100 * number for number, bite in enumerate(bites)])
    found = runs_of(bites, np.array(host, dtype=np.int32), ring.astype(np.int32))
    for bite, runs in zip(bites, found, strict=True):
        pieces = [list(range(h, h + n)) for h, n in zip(runs.host.tolist(), runs.lengths.tolist(), strict=True)]
        assert [place for piece in pieces for place in piece] == host[bite.first : bite.stop]
        assert all(a[-1] + 1 != b[0] for a, b in pairwise(pieces))
        rows = [r + i for r, n in zip(runs.ring.tolist(), runs.lengths.tolist(), strict=True) for i in range(n)]
        assert rows == ring[bite.first : bite.stop].tolist()


def test_settings_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"growth=0: give a whole number"):
        Settings(growth=0)
    with pytest.raises(ValueError, match=r"first_bite_bytes=9 is more than bite_bytes=8"):
        Settings(first_bite_bytes=9, bite_bytes=8)
    assert Settings(table_bytes=1).table_rows(1000) == 16
