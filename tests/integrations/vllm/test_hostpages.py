"""Host memory faulted in from several threads. Needs no vLLM."""

import ctypes
import mmap
from pathlib import Path

import pytest

from kvferry.integrations.vllm import hostpages
from kvferry.integrations.vllm.hostpages import fault_in

PAGE = mmap.PAGESIZE
MIB = 1 << 20


def resident(base: int, num_bytes: int) -> list[bool]:
    """Of each page, whether it is in this process's tables."""
    with Path("/proc/self/pagemap").open("rb") as table:
        table.seek(base // PAGE * 8)
        found = table.read(num_bytes // PAGE * 8)
    return [bool(found[at + 7] & 0x80) for at in range(0, len(found), 8)]


@pytest.fixture
def mapping() -> tuple[mmap.mmap, int]:
    made = mmap.mmap(-1, 16 * MIB)
    return made, ctypes.addressof(ctypes.c_char.from_buffer(made))


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_all_of_it(mapping: tuple[mmap.mmap, int], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostpages, "_LEAST_BYTES", MIB)
    made, base = mapping
    made[5 * MIB : 5 * MIB + 4] = b"kept"
    assert fault_in(base, [(at, MIB) for at in range(0, 16 * MIB, MIB)], workers) == []
    assert all(resident(base, 16 * MIB))
    assert made[5 * MIB : 5 * MIB + 4] == b"kept"


def test_a_share_of_every_row(mapping: tuple[mmap.mmap, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges of one of two workers, which overlap in a page where a slot ends inside of one."""
    monkeypatch.setattr(hostpages, "_LEAST_BYTES", MIB)
    _, base = mapping
    ranges = [(row * MIB, MIB // 2 + PAGE) for row in range(16)]
    assert fault_in(base, ranges) == []
    assert resident(base, 16 * MIB) == ([True] * (128 + 1) + [False] * 127) * 16


def test_what_cannot_be_faulted_in_is_returned(mapping: tuple[mmap.mmap, int]) -> None:
    made, base = mapping
    assert fault_in(base, [(1, PAGE)]) == [(1, PAGE)]  # not at the start of a page
    assert fault_in(base, []) == []
    assert not any(resident(base, len(made)))


def test_every_byte_is_in_one_part() -> None:
    ranges = [(0, 7 * MIB), (9 * MIB, 3 * MIB), (20 * MIB, 30 * MIB)]
    for parts in range(1, 20):
        split = hostpages._split(ranges, 40 * MIB, parts)
        assert hostpages._joined([each for part in split for each in part]) == ranges
        assert sum(length for part in split for _, length in part) == 40 * MIB
        assert len(split) <= parts
