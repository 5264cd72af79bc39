"""The `ans` packer: tables, classes and the coder, against definitions and a decoder of the tests' own."""

import hashlib
import json
import math
from fractions import Fraction
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_scalar import TABLES, Header, decode_symbols, decode_tile, split_tiles, two_sided_table

import kvferry
from contract.cases import MODES, RELATIVE_TO, bits_of, bounded, case_id, gaussian, tiles_of, with_specials
from kvferry import Bounded, Codec, Lossless
from kvferry.packing.ans import classes, reference
from kvferry.packing.ans.tables import MAX_CLASS, covered_radius, family, load, low_shift, split_class
from kvferry.packing.columns import Bases, Columns, Layout, empty_planes

# The tables are the format: frames written with others cannot be read. They change with the format's version only.
TABLES_DIGEST = "bfe1c1049cb2f79561f6d35664a3fe3d5605d8e74e5fe57dc34eb09962c398e8"
FAMILIES = ("two_sided", "one_sided")


def test_tables_are_the_formats_own() -> None:
    data = json.loads(files("kvferry.packing.ans").joinpath("tables.json").read_text())
    assert list(data) == list(FAMILIES)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest() == TABLES_DIGEST


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_are_distributions(name: str) -> None:
    tables = load(name)
    assert len(tables) == {"two_sided": 17, "one_sided": 16}[name]
    for table in tables:
        assert sum(table) == 256
        assert min(table) >= 1
        assert len(table) <= 64
        if name == "two_sided":
            assert table == table[::-1]
            assert len(table) % 2 == 1
    assert load("two_sided")[0] == [256]


@pytest.mark.parametrize("name", FAMILIES)
def test_arrays_are_the_tables(name: str) -> None:
    tables = family(name == "one_sided")
    assert tables.count == len(load(name))
    for c, row in enumerate(load(name)):
        origin = 0 if name == "one_sided" else len(row) // 2
        assert int(tables.origin[c]) == origin
        assert int(tables.size[c]) == len(row)
        assert tables.freq[c, : len(row)].tolist() == row
        assert not tables.freq[c, len(row) :].any()
        slot = 0
        for i, freq in enumerate(row):
            assert int(tables.cum[c, i]) == slot
            for bias in range(freq):
                assert int(tables.symbol[c, slot]) == i - origin
                assert int(tables.slot_freq[c, slot]) == freq
                assert int(tables.slot_bias[c, slot]) == bias
                slot += 1


def test_shift_of_each_class_is_the_documented_one() -> None:
    scale_class = torch.arange(MAX_CLASS + 1)
    table, shift = split_class(scale_class)
    for c in range(MAX_CLASS + 1):
        assert (int(table[c]), int(shift[c])) == two_sided_table(c)
        assert low_shift(c) == int(shift[c])
        assert 0 <= int(table[c]) <= 16


def test_covered_radius_by_trying() -> None:
    """The largest radius whose every residual has a symbol in the class's table."""
    radius = covered_radius().tolist()
    assert len(radius) == MAX_CLASS + 1
    for c in range(34):
        table, shift = two_sided_table(c)
        reach, half = len(TABLES["two_sided"][table]) // 2, 1 << shift >> 1

        def held(r: int, reach: int = reach, half: int = half, shift: int = shift) -> bool:
            return abs(r + half >> shift) <= reach

        tried = next(r for r in range(1 << 20) if not (held(r) and held(-r))) - 1
        assert radius[c] == tried, f"class {c}"
    assert radius == sorted(radius)
    # The differences of two codes of the largest size have a class.
    assert radius[-1] >= 2 * (1 << 22) * 2


def exact_class(spread: int, tokens: int) -> int:
    """max(1, floor(1.5*(log2(spread/tokens**2) + 7))) in integers: 2**n <= variance**3 * 2**21, n = 2*class."""
    if spread == 0:
        return 0
    power = Fraction(spread, tokens * tokens) ** 3 * 2**21  # 2**(3*(log2 v + 7))
    doubled = math.floor(math.log2(power))
    while Fraction(2) ** doubled > power:
        doubled -= 1
    while Fraction(2) ** (doubled + 1) <= power:
        doubled += 1
    return min(max(1, doubled // 2), MAX_CLASS)


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 32, 33, 63, 64])
def test_spread_class_is_its_definition(tokens: int) -> None:
    """Against exact arithmetic, but where float32's two roundings may fall on the other side of a boundary."""
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.exp2(torch.rand(3000, generator=generator, dtype=torch.float64) * 55)
    spreads = torch.cat([torch.arange(2000), wide.long()])
    got = classes.spread_class(spreads, tokens).tolist()
    assert got[0] == 0
    for spread, result in zip(spreads.tolist(), got, strict=True):
        if result == exact_class(spread, tokens):
            continue
        around = (math.floor(spread * (1 - 2**-22)), math.ceil(spread * (1 + 2**-22)))
        near = {exact_class(neighbour, tokens) for neighbour in around}
        assert result in near and len(near) == 2, f"spread {spread}, {tokens} tokens"


def test_spread_class_at_every_boundary() -> None:
    """Thirds of an octave of the standard deviation: one more class each, from variances below 1 to the largest."""
    tokens = 64
    for c in range(2, 70):
        boundary = 4096 * 2 ** (c / 1.5 - 7)
        below, above = math.floor(boundary * (1 - 1e-6)), math.ceil(boundary * (1 + 1e-6))
        if below < 1 or above - below > boundary / 4:
            continue
        assert classes.spread_class(torch.tensor([below, above]), tokens).tolist() == [c - 1, c]


@pytest.mark.parametrize("tokens", [1, 2, 31, 64])
def test_base_is_the_rounded_mean(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    values = torch.randint(-(1 << 22), 1 << 22, (50, tokens, 4), generator=generator)
    values[:20] >>= 18
    base, scale_class = classes.centred(values)
    for n in range(50):
        for c in range(4):
            column = values[n, :, c].tolist()
            mean = Fraction(sum(column), tokens)
            assert int(base[n, c]) == math.floor(mean + Fraction(1, 2))
            spread = tokens * sum(v * v for v in column) - sum(column) ** 2
            assert abs(int(scale_class[n, c]) - exact_class(spread, tokens)) <= (spread > 1 << 22)


@pytest.mark.parametrize("mode", ["plain", "outlier"])
def test_differences_are_never_stored_exactly(mode: str) -> None:
    """One that the table lacks would shift all that follow: every class holds all of its channel."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-2, 3, (40, 64, 16), generator=generator)
    values[torch.arange(40), torch.randint(0, 64, (40,), generator=generator)] <<= torch.arange(16) + 5
    scale_class = classes.differences(values) if mode == "plain" else classes.apart(values)[0]
    rest = values.clone()
    if mode == "outlier":
        rest[:, 0][classes.apart(values)[1]] = 0
    assert (covered_radius()[scale_class] >= rest.abs().amax(1)).all()


TILES = [(64, 128), (64, 33), (64, 32), (31, 7), (1, 1), (1, 129), (63, 80), (33, 70)]
SCALAR_CASES: list[Codec] = [
    Lossless("ans"),
    *[bounded(mode, "token", "ans", relative_to) for mode in MODES for relative_to in RELATIVE_TO],
]


def assert_scalar_agrees(tensor: torch.Tensor, codec: Codec) -> int:
    """Every tile of the frame, decoded one value at a time, gives the bits that `decompress` gives."""
    frame = kvferry.compress(tensor, codec)
    header = Header(frame)
    wanted = bits_of(kvferry.decompress(frame)).reshape(-1).long() & ((1 << 8 * tensor.element_size()) - 1)
    indices = list(tiles_of(tuple(tensor.shape), header.flat))
    tiles = list(split_tiles(frame))
    assert len(tiles) == len(indices)
    for data, index in zip(tiles, indices, strict=True):
        decoded = decode_tile(data, *index.shape, header)
        assert torch.tensor(decoded).equal(wanted[index])
    return sum(tile[0] for tile in tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=case_id)
@pytest.mark.parametrize("codec", SCALAR_CASES, ids=case_id)
def test_scalar_decoder_agrees(codec: Codec, dtype: torch.dtype) -> None:
    coded = 0
    for shape in TILES:
        tensor = gaussian(shape, dtype, shape[1])
        coded += assert_scalar_agrees(tensor, codec)
        coded += assert_scalar_agrees(with_specials(tensor)[0], codec)
    assert coded >= 6, "hardly a tile was coded: nothing was tested"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=case_id)
def test_scalar_decoder_agrees_on_fp8(dtype: torch.dtype) -> None:
    assert assert_scalar_agrees(gaussian((130, 64), dtype), Lossless("ans")) > 0


@pytest.mark.parametrize("mode", MODES)
def test_scalar_decoder_agrees_on_low_bits(mode: str) -> None:
    """Small bounds: classes above 16, whose values have low bits beside their symbols."""
    for error_bound in (1e-2, 1e-3, 1e-5):
        codec = Bounded(error_bound, relative=False, mode=mode)
        assert assert_scalar_agrees(gaussian((64, 24), torch.float32, 9), codec) == 1


@pytest.mark.parametrize("grouping", ["flat"])
def test_scalar_decoder_agrees_on_flat_grouping(grouping: str) -> None:
    assert assert_scalar_agrees(gaussian((9, 1100), torch.bfloat16), bounded("plain", grouping, "ans", "tile")) > 0


def test_lanes_cover_the_channels() -> None:
    for channels in range(1, 129):
        per_lane, lanes = reference.lanes_of(channels)
        assert lanes <= 32
        assert (lanes - 1) * per_lane < channels <= lanes * per_lane


def put(x: int, freq: int, cum: int) -> int:
    """The state before a symbol is decoded, from that behind it."""
    return (x // freq << 8) + x % freq + cum


def test_a_pair_takes_or_gives_at_most_one_word() -> None:
    """The states behind a pair of symbols that lead to [2**16, 2**32) before it are exactly [f1*f2, f1*f2 << 16): one
    word brings any state of [2**16, 2**32) there, and one is all the decoder ever needs."""
    frequencies = sorted({f for name in FAMILIES for row in load(name) for f in row})
    for first in frequencies:
        for second in frequencies:
            for cum1, cum2 in ((0, 0), (256 - first, 0), (0, 256 - second), (256 - first, 256 - second)):
                low = first * second
                before = [put(put(x, second, cum2), first, cum1) for x in (low - 1, low, (low << 16) - 1, low << 16)]
                assert before[0] < 1 << 16 <= before[1] < before[2] < 1 << 32 <= before[3]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 64),
    channels=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 80, 96, 97, 127, 128]),
    one_sided=st.booleans(),
    rarity=st.sampled_from(["likely", "uniform", "rarest"]),
    seed=st.integers(0, 1 << 30),
)
def test_symbols_come_back(tokens: int, channels: int, one_sided: bool, rarity: str, seed: int) -> None:
    """Every lane ends at 2**16 with every word used, however likely the symbols; the tests' own decoder agrees."""
    generator = torch.Generator().manual_seed(seed)
    tables = family(one_sided)
    table = torch.randint(0, tables.count, (2, channels), generator=generator)
    weight = tables.freq[table].flatten(0, 1).double()
    if rarity != "likely":
        weight = (weight == 1).double() if rarity == "rarest" else weight.sign()
        weight[:, 0] += 1e-6
    column = torch.multinomial(weight, tokens, replacement=True, generator=generator)
    column = column.reshape(2, channels, tokens).transpose(1, 2)
    table_of = table[:, None].expand_as(column)
    state, words, count = reference._encode(tables.freq[table_of, column], tables.cum[table_of, column])
    assert (state >= 1 << 16).all() and (state < 1 << 32).all()
    symbols, complete = reference._decode(state, words, count, table, tokens, one_sided)
    assert complete.all()
    assert symbols.equal(column - tables.origin[table_of])
    named = [(TABLES[FAMILIES[one_sided]][c], 0) for c in table[0].tolist()]
    assert decode_symbols(state[0].tolist(), words[0, : count[0]].tolist(), named, tokens) == column[0].tolist()


def test_states_of_a_single_pair() -> None:
    """One channel, three tokens: the words and states that docs/format.md gives, worked out by hand."""
    frequencies, cums = (1, 3, 250), (255, 0, 3)
    x = 1 << 16
    # The last pair has one step: its missing second symbol has probability 1.
    assert x >> 16 < frequencies[2] * 256
    x = put(x, frequencies[2], cums[2])
    words = []
    if x >> 16 >= frequencies[0] * frequencies[1]:
        words.append(x & 0xFFFF)
        x >>= 16
    x = put(put(x, frequencies[1], cums[1]), frequencies[0], cums[0])
    state, emitted, count = reference._encode(torch.tensor(frequencies).view(1, 3, 1), torch.tensor(cums).view(1, 3, 1))
    assert state.tolist() == [[x]]
    assert emitted[0, : count[0]].tolist() == words


def packed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of two-sided integers `[N, T, C]` with bases: rows and sizes."""
    values = values.int()
    nothing = torch.zeros_like(values, dtype=torch.bool)
    columns = Columns(values, values, empty_planes(values), nothing, values.short(), torch.ones(len(values)))
    return reference.pack(columns, Layout(2, Bases.ALL), 1 << 16)


def spread_tiles(tokens: int, scales: torch.Tensor, centres: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Gaussian integers int64 `[8, tokens, C]`, channels of those standard deviations around those centres."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(8, tokens, len(scales), generator=generator) * scales + centres).round().long()


@pytest.mark.parametrize(("centre", "named"), [(0.0, False), (0.6, False), (7.0, True), (100.0, True)])
def test_bases_that_do_not_pay_are_left_out(centre: float, named: bool) -> None:
    """The means of noise around zero differ too, by much less than its spread."""
    values = spread_tiles(64, torch.full((128,), 6.0), centre * (torch.arange(128) % 2 * 2.0 - 1))
    base, scale_class = classes.sparing(values)
    centred, narrower = classes.centred(values)
    assert bool((centred != 0).any(1).all())
    if named:
        assert torch.equal(base, centred) and torch.equal(scale_class, narrower)
    else:
        assert bool((base == 0).all())
        assert bool((scale_class >= narrower).all())
    rows, _ = packed(values)
    assert bool(((rows[:, 1] > 0) == named).all())


def test_no_base_is_the_class_of_the_mean_square() -> None:
    values = spread_tiles(48, torch.full((96,), 3.0), torch.full((96,), 0.2))
    base, scale_class = classes.sparing(values)
    shifted = classes.centred(values)[0] != 0
    assert bool((base == 0).all()) and bool(shifted.any()) and not bool(shifted.all())
    for n, c in shifted.nonzero().tolist():
        column = values[n, :, c].tolist()
        assert int(scale_class[n, c]) == exact_class(48 * sum(v * v for v in column), 48)


@pytest.mark.parametrize(("channels", "raised"), [(4, True), (40, False)])
def test_few_small_classes_are_raised_to_what_4_bits_reach(channels: int, raised: bool) -> None:
    scales = torch.full((128,), 30.0)
    scales[:channels] = 0.3
    values = spread_tiles(64, scales, torch.zeros(128))
    own, scale_class = classes.centred(values)[1], classes.sparing(values)[1]
    assert bool((own.amax(1) - own.amin(1) > 15).all())
    rows, _ = packed(values)
    assert bool((rows[:, 2] == (1 if raised else 2)).all())
    assert bool(((scale_class.amax(1) - scale_class.amin(1) == 15) == raised).all())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 31, 32, 45, 64]),
    channels=st.sampled_from([3, 32, 80, 128]),
    octaves=st.tuples(st.floats(-4, 5), st.floats(-4, 5)),
    shift=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_sparing_spares(tokens: int, channels: int, octaves: tuple[float, float], shift: float, seed: int) -> None:
    """Over some tiles it takes hardly more bytes than naming all, whatever the channels' scales and centres."""
    scales = torch.logspace(octaves[0], octaves[1], channels, base=2.0)
    centres = torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * shift * scales
    values = spread_tiles(tokens, scales, centres, seed)
    if tokens < 32:
        assert all(map(torch.equal, classes.sparing(values), classes.centred(values)))
    sparing = int(packed(values)[1].sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classes, "sparing", classes.centred)
        naming = int(packed(values)[1].sum())
    assert sparing <= 1.01 * naming + 8 * len(values)


def coded_bits(values: torch.Tensor) -> float:
    """Bits a value that coding makes of integer tiles `[N, 64, 128]`: words, exact values and what the lanes' states
    say, without what naming each channel's class and base costs. A final state is spread evenly over the octaves from
    2**16 to 2**32, so it says 8 of its 32 bits on average."""
    rows, length = packed(values)
    widths = torch.tensor([0, 4, 8, 16, 32])
    naming = 128 * (widths[rows[:, 1].long()] + widths[rows[:, 2].long()])
    return float((8 * length - 128 - naming - 32 * 24).sum()) / values.numel()


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 2.5, 5.0, 7.0, 30.0, 500.0])
def test_coded_size_is_the_entropy(sigma: float) -> None:
    """Gaussian integers: the coder within 0.01 bits of the tables' cross entropy, that within 0.1 of the noise's."""
    generator = torch.Generator().manual_seed(int(10 * sigma))
    values = (torch.randn(6, 64, 128, generator=generator, dtype=torch.float64) * sigma).round().long()
    base, scale_class = classes.sparing(values)
    ideal = 0.0
    for n in range(len(values)):
        for c in range(128):
            table, shift = two_sided_table(int(scale_class[n, c]))
            freqs = TABLES["two_sided"][table]
            half = 1 << shift >> 1
            for v in values[n, :, c].tolist():
                symbol = (v - int(base[n, c]) + half >> shift) + len(freqs) // 2
                inside = 0 <= symbol < len(freqs)
                # Outside: a position, the bits, and the symbol 0 in its place.
                ideal += shift - math.log2(freqs[symbol if inside else len(freqs) // 2] / 256) + (0 if inside else 32)
    ideal /= values.numel()
    assert abs(coded_bits(values) - ideal) < 0.01
    entropy = 0.0
    for k in range(-int(12 * sigma) - 2, int(12 * sigma) + 3):
        p = 0.5 * (math.erf((k + 0.5) / sigma / 2**0.5) - math.erf((k - 0.5) / sigma / 2**0.5))
        entropy -= p * math.log2(p) if p > 0 else 0
    assert ideal < entropy + 0.1


@pytest.mark.parametrize("what", ["state", "words", "more-words", "fewer-words", "class"])
def test_coder_that_does_not_end_where_it_must(what: str) -> None:
    """Each lane ends at 2**16 with every word used: what does not is refused (a wrong lane would decode to noise)."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(1, 64, 128, generator=generator).round().clamp(-3, 3).int()
    nothing = torch.zeros_like(values, dtype=torch.bool)
    layout = Layout(2, Bases.ALL)
    columns = Columns(values, values, empty_planes(values), nothing, values.short(), torch.ones(1))
    rows, length = reference.pack(columns, layout, 1 << 15)
    tile = rows[0, : int(length)].clone()

    def good(tile: torch.Tensor) -> bool:
        start, size = torch.zeros(1, dtype=torch.int64), torch.tensor([len(tile)])
        return bool(reference.unpack(tile, start, size, 64, 128, layout).good)

    assert good(tile)
    assert not tile[6:8].any(), "exact values would lie behind the words"
    num_words = int(tile[4]) + 256 * int(tile[5])
    if what == "state":
        tile[20] ^= 1
    elif what == "words":
        # Any bit of the last words: the number of words or a final state shows it, unless the bytes have become another
        # tile's. (A symbol's frequency equals that of its mirror image, so some flips turn one into the other.)
        end = len(tile) - 2 * (num_words % 2)
        bits = torch.arange(8 * (end - 100), 8 * end)
        altered = tile.repeat(len(bits), 1)
        altered[torch.arange(len(bits)), bits // 8] ^= (1 << bits % 8).to(torch.uint8)
        sizes = torch.full((len(bits),), len(tile))
        decoded = reference.unpack(altered.flatten(), sizes.cumsum(0) - sizes, sizes, 64, 128, layout)
        assert decoded.good.double().mean() < 0.01
        return
    elif what == "more-words":
        tile = torch.cat([tile, tile.new_zeros(4)])
        count = num_words + 2
        tile[4], tile[5] = count & 255, count >> 8
    elif what == "fewer-words":
        count = num_words - 2
        tile[4], tile[5], tile = count & 255, count >> 8, tile[:-4]
    else:
        tile[3] = MAX_CLASS + 1
    assert not good(tile)


def test_encoder_can_divide_by_multiplying() -> None:
    """Kernels replace x / freq by one 32-bit multiplication: for every frequency in the tables it is exact for every
    state that occurs (x < freq * 2**24). The product's error grows with x, and matters most at the largest remainder:
    the last x before a quotient's edge decides."""
    for freq in sorted({f for name in FAMILIES for row in load(name) for f in row} - {1}):
        bits = (freq - 1).bit_length()
        reciprocal = ((1 << (bits + 31)) + freq - 1) // freq
        assert reciprocal < 1 << 32
        largest = min(freq << 24, 1 << 32) - 1
        last = largest - (largest + 1) % freq
        error = reciprocal * freq - (1 << (bits + 31))
        assert last * error < 1 << (bits + 31)
        for x in (0, freq - 1, freq, last - freq, last, largest):
            assert x * reciprocal >> (bits + 31) == x // freq, f"{x} / {freq}"
