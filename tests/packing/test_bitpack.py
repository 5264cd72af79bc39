"""The `bitpack` packer: widths, zigzag and groups, against definitions and a decoder of the tests' own."""

import pytest
import torch
from packing_scalar import Header, decode_tile, split_tiles

import kvferry
from contract.cases import MODES, RELATIVE_TO, bits_of, bounded, case_id, gaussian, tiles_of, with_specials
from kvferry import Bounded, Codec, Lossless
from kvferry.packing.bitpack import reference
from kvferry.packing.columns import Bases, Columns, Layout, bit_width, empty_planes

LAYOUTS = {bases: Layout(4, bases) for bases in Bases}


def columns_of(values: torch.Tensor) -> Columns:
    values = values.int()
    return Columns(
        values,
        values,
        empty_planes(values),
        torch.zeros_like(values, dtype=torch.bool),
        values,
        torch.ones(len(values)),
    )


def round_trip(values: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(decoded values, encoded bytes of each tile)"""
    rows, length = reference.pack(columns_of(values), layout, 1 << 17)
    payload = torch.cat([row[:n] for row, n in zip(rows, length.tolist(), strict=True)])
    starts = length.cumsum(0) - length
    decoded = reference.unpack(payload, starts, length, *values.shape[1:], layout)
    assert decoded.good.all()
    assert len(decoded.exact_tile) == 0
    return decoded.values, length


def test_zigzag() -> None:
    assert reference.zigzag(torch.tensor([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]
    extremes = torch.tensor([-(2**31), 2**31 - 1, -(2**23), 2**23])
    assert reference.zigzag(extremes).max() < 2**32
    assert reference.unzigzag(reference.zigzag(extremes)).equal(extremes)


def test_bit_width_at_every_power_of_two() -> None:
    for w in range(53):
        for value in {0, 2**w - 1, 2**w} if w else {0, 1}:
            assert int(bit_width(torch.tensor([value]))) == value.bit_length()


@pytest.mark.parametrize("bases", list(Bases))
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 63, 64])
def test_integers_of_every_width_come_back(bases: Bases, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    widths = torch.arange(24)[None, None].expand(3, tokens, 24)
    values = (torch.rand(3, tokens, 24, generator=generator, dtype=torch.float64) * 2.0**widths).long()
    values = values - (1 << 22) * (torch.arange(3) - 1)[:, None, None]
    decoded, _ = round_trip(values, LAYOUTS[bases])
    assert decoded.equal(values)


def test_group_takes_the_smallest_width() -> None:
    """16 bytes of header, one class and base each, and 32 values of exactly the width that their spread needs."""
    for width in range(22):
        values = torch.zeros(1, 32, 1, dtype=torch.int64)
        values[0, 5] = (1 << width) - 1
        _, length = round_trip(values - 7, LAYOUTS[Bases.ALL])
        assert int(length) == 16 + 4 * width


def test_groups_are_32_tokens_of_a_channel() -> None:
    values = torch.zeros(1, 64, 8, dtype=torch.int64)
    values[0, 40, 3] = 255
    _, length = round_trip(values, LAYOUTS[Bases.ALL])
    assert int(length) == 16 + 8 + 4 * 8  # header, a nibble for each of 16 classes, one stream of 8 bits a value


def test_a_large_first_value_is_kept_apart_only_where_that_is_cheaper() -> None:
    values = torch.randint(-2, 2, (1, 64, 16), generator=torch.Generator().manual_seed(0))
    values[:, ::32] = 1 << 20
    kept, plain = round_trip(values, LAYOUTS[Bases.APART])[1], round_trip(values, LAYOUTS[Bases.NONE])[1]
    assert int(kept) < int(plain) / 3
    _, _, keep = reference._choose(values, LAYOUTS[Bases.APART])
    assert keep.all()
    # Nothing gained by it: 2 tokens at 21 bits, against a base of about 16 bits.
    assert not reference._choose(values[:, :1] >> 18, LAYOUTS[Bases.APART])[2].any()


CASES: list[Codec] = [
    Lossless("bitpack"),
    *[bounded(mode, "token", "bitpack", relative_to) for mode in MODES for relative_to in RELATIVE_TO],
    bounded("outlier", "flat", "bitpack", "tile"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=case_id)
@pytest.mark.parametrize("codec", CASES, ids=case_id)
def test_scalar_decoder_agrees(codec: Codec, dtype: torch.dtype) -> None:
    coded = 0
    for shape in [(64, 128), (31, 7), (1, 1), (1, 129), (33, 70), (65, 16)]:
        tensor, _ = with_specials(gaussian(shape, dtype, shape[1]))
        frame = kvferry.compress(tensor, codec)
        header = Header(frame)
        wanted = bits_of(kvferry.decompress(frame)).reshape(-1).long() & ((1 << 8 * dtype.itemsize) - 1)
        tiles = list(split_tiles(frame))
        for data, index in zip(tiles, tiles_of(shape, header.flat), strict=True):
            coded += data[0]
            assert torch.tensor(decode_tile(data, *index.shape, header)).equal(wanted[index])
    assert coded >= 3, "hardly a tile was coded: nothing was tested"


@pytest.mark.parametrize("field", ["width", "words", "longer", "shorter"])
def test_what_contradicts_itself_is_refused(field: str) -> None:
    values = gaussian((1, 64, 16), torch.float32).mul(50).long()
    rows, length = reference.pack(columns_of(values), LAYOUTS[Bases.ALL], 1 << 15)
    tile = rows[0, : int(length)].clone()

    def good(tile: torch.Tensor) -> bool:
        start, size = torch.zeros(1, dtype=torch.int64), torch.tensor([len(tile)])
        return bool(reference.unpack(tile, start, size, 64, 16, LAYOUTS[Bases.ALL]).good)

    assert good(tile)
    if field == "width":
        tile[3] = 33
    elif field == "words":
        tile[4] = 1
    elif field == "longer":
        tile = torch.cat([tile, tile.new_zeros(4)])
    else:
        tile = tile[:-4]
    assert not good(tile)


def test_a_wider_range_costs_its_bits_in_whole_frames() -> None:
    """256 times the range: a byte more for each value, and bases of 32 rather than 16 bits for each of 256 groups."""
    tensor = torch.arange(64 * 128).view(64, 128).float()
    small = len(kvferry.compress(tensor, Bounded(0.5, relative=False, packing="bitpack")))
    large = len(kvferry.compress(tensor * 256, Bounded(0.5, relative=False, packing="bitpack")))
    assert large - small == 64 * 128 + 2 * 256
