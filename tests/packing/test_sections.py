"""Sections of differing length in rows of bytes, and readers that never leave their row."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.packing import sections
from kvferry.packing.columns import Bases, Layout
from kvferry.packing.sections import MAX_BASE_CODE, MAX_CLASS_CODE, RowReader, RowWriter, TileHeader

rows_of_small = st.integers(1, 9).flatmap(
    lambda groups: st.lists(
        st.tuples(
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=groups, max_size=groups),
            st.lists(st.booleans(), min_size=groups, max_size=groups),
            st.integers(0, 32),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(rows=rows_of_small)
def test_small_values_come_back(rows: list[tuple[list[int], list[bool], int]]) -> None:
    """Values from few to 32 bits apart, of which some are stored: offsets from the smallest, at the narrowest width."""
    values = torch.tensor([[v >> 32 - bits for v in row] for row, _, bits in rows])
    wanted = torch.tensor([mask for _, mask, _ in rows])
    smallest, code, data, length = sections.pack_small(values, wanted, MAX_BASE_CODE)
    for n in range(len(rows)):
        stored = values[n][wanted[n]].tolist()
        low = min(stored, default=0)
        spread = max(stored, default=0) - low
        width = next(w for w in (0, 4, 8, 16, 32) if spread < 1 << w)
        stream = sum(v - low << width * i for i, v in enumerate(stored))
        assert int(smallest[n]) == low
        assert sections.SMALL_BITS[int(code[n])] == width
        wanted_bytes = stream.to_bytes((len(stored) * width + 7) // 8, "little")
        assert bytes(data[n, : int(length[n])].tolist()) == wanted_bytes
    assert length.equal(sections.small_bytes(wanted.sum(1), code))
    cut = data[:, : int(length.max())]
    assert sections.unpack_small(cut, code, smallest, wanted).equal(torch.where(wanted, values, 0))


def test_no_small_values() -> None:
    none = torch.zeros(3, 0, dtype=torch.int64)
    smallest, code, data, length = sections.pack_small(none, none.bool(), MAX_CLASS_CODE)
    assert not smallest.any() and not code.any() and not length.any() and data.shape == (3, 0)


@given(
    lengths=st.lists(st.lists(st.integers(0, 13), min_size=3, max_size=3), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_sections_come_back(lengths: list[list[int]], seed: int) -> None:
    """Three sections of each row, of different lengths, padded to four bytes; rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor(lengths)
    written = [torch.randint(0, 256, (len(table), 13), generator=generator).to(torch.uint8) for _ in range(3)]
    writer = RowWriter(len(table), torch.device("cpu"))
    for i, section in enumerate(written):
        writer.append(section, table[:, i])
    padded = (table + 3) // 4 * 4
    assert writer.length.equal(padded.sum(1))
    payload = torch.cat(
        [torch.tensor([9, 9, 9], dtype=torch.uint8)]
        + [row[:size] for row, size in zip(writer.finish(64), writer.length.tolist(), strict=True)]
    )
    starts = writer.length.cumsum(0) - writer.length + 3
    reader = RowReader(payload, starts, writer.length)
    for i, section in enumerate(written):
        read = reader.take(table[:, i])
        for n in range(len(table)):
            count = lengths[n][i]
            assert read[n, :count].equal(section[n, :count])
            assert not read[n, count:].any()
    assert reader.finish().all()


def test_writer_does_not_run_into_other_rows() -> None:
    """What falls behind the capacity is lost, and the length says so: such a tile is stored raw."""
    writer = RowWriter(3, torch.device("cpu"))
    full = torch.full((3, 40), 7, dtype=torch.uint8)
    writer.append(full, torch.tensor([4, 40, 0]))
    writer.append(full[:, :4])
    assert writer.length.tolist() == [8, 44, 4]
    data = writer.finish(12)
    assert data[0, :8].tolist() == [7] * 8
    assert data[1, :12].tolist() == [7] * 12
    assert data[2, :4].tolist() == [7] * 4
    assert not data[0, 8:12].any()
    assert not data[2, 4:12].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_reader_that_ends_early_is_bad_and_reads_zeros(rows: int) -> None:
    payload = torch.full((8 * rows,), 5, dtype=torch.uint8)
    starts, sizes = torch.arange(rows) * 8, torch.full((rows,), 8)
    reader = RowReader(payload, starts, sizes)
    assert reader.take(4).eq(5).all()
    section = reader.take(16)
    assert section.shape == (rows, 16), "a section of fixed size keeps it, even if no row has it"
    assert not section.any()
    assert not reader.finish().any()
    assert reader.take(torch.full((rows,), 4)).shape[1] == 0


def test_reader_notices_what_is_left() -> None:
    payload = torch.zeros(12, dtype=torch.uint8)
    reader = RowReader(payload, torch.tensor([0, 4]), torch.tensor([4, 8]))
    reader.take(4)
    assert reader.finish().tolist() == [True, False]


def test_lengths_below_zero_are_bad() -> None:
    reader = RowReader(torch.zeros(8, dtype=torch.uint8), torch.tensor([0]), torch.tensor([8]))
    reader.take(torch.tensor([-4]))
    assert not reader.finish().any()


def test_select_keeps_order() -> None:
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    wanted = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])
    chosen, count = sections.select(values, wanted)
    assert chosen.tolist() == [[1, 3, 4], [6, 0, 0], [0, 0, 0]]
    assert count.tolist() == [3, 1, 0]


def test_header_is_the_documented_16_bytes() -> None:
    fields = [torch.tensor([v]) for v in (1, 4, 2, 255, 65535, 8192, -(2**31))]
    header = TileHeader(*fields, torch.tensor([0.375]))
    data = header.pack()
    assert bytes(data[0].tolist()) == struct.pack("<BBBBHHif", 1, 4, 2, 255, 65535, 8192, -(2**31), 0.375)
    back = TileHeader.unpack(data)
    for name in ("kind", "base_code", "class_code", "class0", "num_words", "num_exact", "base0", "step"):
        assert getattr(back, name).equal(getattr(header, name)), name


def test_little_endian() -> None:
    values = torch.tensor([[0, 1, 0x12345678, 0xFFFFFFFF]])
    for size, code in ((1, "B"), (2, "H"), (4, "I")):
        expected = struct.pack(f"<4{code}", *[v & (1 << 8 * size) - 1 for v in values[0].tolist()])
        data = sections.little_endian(values, size)
        assert bytes(data[0].tolist()) == expected
        assert sections.from_little_endian(data, size).equal(values & ((1 << 8 * size) - 1))


def test_bases_reach_the_values_that_they_belong_to() -> None:
    base = torch.tensor([[1, 2, 30, 40]])  # two groups along the tokens, two channels
    every = sections.spread_bases(base, 40, Layout(2, Bases.ALL), 32)
    assert every[0, :32].eq(torch.tensor([1, 2])).all() and every[0, 32:].eq(torch.tensor([30, 40])).all()
    first = sections.spread_bases(base, 40, Layout(2, Bases.APART), 32)
    assert first[0, 0].tolist() == [1, 2] and first[0, 32].tolist() == [30, 40]
    assert int(first.sum()) == 73
    channel = sections.spread_bases(base, 40, Layout(2, Bases.APART), 64)
    assert channel[0, 0].tolist() == [1, 2, 30, 40] and int(channel.sum()) == 73
