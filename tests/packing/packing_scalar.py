"""A decoder of one value at a time, written from docs/format.md alone: slow, plain, and none of the package's code."""

import json
import struct
from collections.abc import Iterator
from importlib.resources import files

TABLES: dict[str, list[list[int]]] = json.loads(files("kvferry.packing.ans").joinpath("tables.json").read_text())
SMALL_BITS = (0, 4, 8, 16, 32)
# Itemsize, exponent bits, mantissa bits, byte planes and bits that stay, by the dtype's number in a frame.
DTYPES = {1: (2, 8, 7, 1, 0), 2: (2, 5, 10, 1, 3), 3: (4, 8, 23, 3, 0), 4: (1, 4, 3, 0, 4), 5: (1, 5, 2, 0, 3)}


class Tile:
    """The sections of one tile, read in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, num_bytes: int) -> bytes:
        section = self.data[self.at : self.at + num_bytes]
        assert len(section) == num_bytes
        padding = self.data[self.at + num_bytes : (self.at + num_bytes + 3) // 4 * 4]
        assert not any(padding)
        self.at += num_bytes + len(padding)
        return section

    def numbers(self, count: int, code: str) -> list[int]:
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    def small(self, count: int, width_code: int) -> list[int]:
        bits = SMALL_BITS[width_code]
        stream = int.from_bytes(self.take((count * bits + 7) // 8), "little")
        return [stream >> bits * i & ((1 << bits) - 1) for i in range(count)]

    def streams(self, widths: list[int], counts: list[int]) -> list[list[int]]:
        words = [(w * n + 31) // 32 for w, n in zip(widths, counts, strict=True)]
        result = []
        data = self.take(4 * sum(words))
        for width, count, length in zip(widths, counts, words, strict=True):
            stream, data = int.from_bytes(data[: 4 * length], "little"), data[4 * length :]
            result.append([stream >> width * i & ((1 << width) - 1) for i in range(count)])
        return result


def two_sided_table(scale_class: int) -> tuple[int, int]:
    """(table, shift)"""
    shift = 0 if scale_class <= 16 else (scale_class - 14) // 3
    return scale_class - 3 * shift, shift


def decode_symbols(
    states: list[int], words: list[int], tables: list[tuple[list[int], int]], tokens: int
) -> list[list[int]]:
    """Symbols `[T][C]`; `tables` names each channel's frequencies and the symbol that they start with."""
    channels = len(tables)
    per_lane = -(-channels // 32)
    pending = iter(words)
    symbols = [[0] * channels for _ in range(tokens)]
    steps = [(t, k) for t in range(tokens) for k in range(per_lane)]
    for i in range(0, len(steps), 2):
        for lane in range(len(states)):
            x = states[lane]
            for t, k in steps[i : i + 2]:
                c = lane * per_lane + k
                if c >= channels:
                    continue
                freqs, first = tables[c]
                slot, cum, column = x & 255, 0, 0
                while cum + freqs[column] <= slot:
                    cum += freqs[column]
                    column += 1
                x = freqs[column] * (x >> 8) + slot - cum
                symbols[t][c] = first + column
            if x < 1 << 16:
                x = x << 16 | next(pending)
            states[lane] = x
    assert all(x == 1 << 16 for x in states)
    assert next(pending, None) is None
    return symbols


def round_even(numerator: float, mantissa: int) -> int:
    """float32 bits of a float32 value, rounded to nearest even at `mantissa` bits (no change of exponent range)."""
    word = struct.unpack("<I", struct.pack("<f", numerator))[0]
    drop = 23 - mantissa
    half = (1 << drop >> 1) - 1 + (word >> drop & 1) if drop else 0
    return (word + half) >> drop


def to_float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def delivered(q: int, step: float, dtype: int) -> int:
    """Bits of round_to_dtype(float32(q) * step): a product of 24 and 24 bits is exact in a double."""
    product = to_float32(float(q) * step)
    if dtype == 2:
        return struct.unpack("<H", struct.pack("<e", product))[0]
    return round_even(product, 7 if dtype == 1 else 23)


def decode_tile(data: bytes, tokens: int, channels: int, frame: "Header") -> list[list[int]]:
    """Bit patterns `[T][C]`."""
    itemsize, exponent_bits, mantissa_bits, planes, stay = DTYPES[frame.dtype]
    lossless = frame.codec == "lossless"
    tile = Tile(data)
    if data[0] == 0:
        assert tile.take(4) == bytes(4)
        flat = tile.numbers(tokens * channels, {1: "B", 2: "H", 4: "I"}[itemsize])
        assert tile.at == len(data)
        return [flat[t * channels : (t + 1) * channels] for t in range(tokens)]
    kind, base_code, class_code, class0, num_words, num_exact, base0, step = struct.unpack("<BBBBHHif", tile.take(16))
    assert kind == 1
    ans = frame.packing == "ans"
    per_lane = -(-channels // 32)
    states = tile.numbers(-(-channels // per_lane), "I") if ans else []
    plane_data = tile.take(planes * tokens * channels) if lossless else b""
    channel_steps = not lossless and frame.relative_to == "channel"
    steps = [step] * channels
    if channel_steps:
        assert step == 0
        steps = [struct.unpack("<f", struct.pack("<I", upper << 16))[0] for upper in tile.numbers(channels, "H")]
    size = 64 if ans else 32
    groups = [(start, c) for start in range(0, tokens, size) for c in range(channels)]
    lengths = [min(size, tokens - start) for start, _ in groups]
    classes = [class0 + c for c in tile.small(len(groups), class_code)]
    every = lossless or frame.mode == "fixed"
    marks = [every or (frame.mode == "outlier" and c & 1 == 1) for c in classes]
    if not lossless and frame.mode == "outlier":
        classes = [c >> 1 for c in classes]
    stored = iter(tile.small(sum(marks), base_code))
    bases = [base0 + next(stored) if mark else 0 for mark in marks]
    if not ans:
        shifts = classes
    elif lossless:
        shifts = [stay] * len(groups)
    else:
        shifts = [two_sided_table(c)[1] for c in classes]
    low = tile.streams(shifts, lengths)
    words = tile.numbers(num_words, "H")
    assert ans or num_words == 0
    positions = tile.numbers(num_exact, "H")
    exact = tile.numbers(num_exact, {1: "B", 2: "H", 4: "I"}[itemsize])
    assert tile.at == len(data)
    assert positions == sorted(set(positions))

    values = [[0] * channels for _ in range(tokens)]
    if ans:
        tables = []
        for c in classes:
            if lossless:
                tables.append((TABLES["one_sided"][c], 0))
            else:
                freqs = TABLES["two_sided"][two_sided_table(c)[0]]
                tables.append((freqs, -(len(freqs) // 2)))
        symbols = decode_symbols(states, words, tables, tokens)
    for g, (start, c) in enumerate(groups):
        for i in range(lengths[g]):
            if ans and lossless:
                v = (symbols[i][c] + bases[g] << stay) + low[g][i]
            elif ans:
                half = 1 << shifts[g] >> 1
                v = (
                    (symbols[i][c] << shifts[g])
                    + low[g][i]
                    - half
                    + (bases[g] if frame.mode == "fixed" or i == 0 else 0)
                )
            elif every:
                v = low[g][i] + bases[g]
            else:
                v = (low[g][i] >> 1) ^ -(low[g][i] & 1)
                v += bases[g] if i == 0 else 0
            if frame.mode in ("plain", "outlier") and i > 0:
                v += values[start + i - 1][c]
            values[start + i][c] = v

    result = [[0] * channels for _ in range(tokens)]
    for t in range(tokens):
        for c in range(channels):
            v = values[t][c]
            if lossless:
                rest = v & ((1 << stay) - 1)
                for p in reversed(range(planes)):
                    rest = rest << 8 | plane_data[(p * tokens + t) * channels + c]
                sign = rest >> mantissa_bits
                exponent = -(v >> stay)
                assert 0 <= exponent < 1 << exponent_bits
                word = (sign << exponent_bits | exponent) << mantissa_bits | rest & ((1 << mantissa_bits) - 1)
            else:
                assert abs(v) <= 1 << 22
                word = delivered(v, steps[c], frame.dtype)
            result[t][c] = word
    for position, word in zip(positions, exact, strict=True):
        result[position // channels][position % channels] = word
    return result


class Header:
    """What of a frame's header decoding needs."""

    def __init__(self, frame: bytes) -> None:
        self.codec = frame[16:32].rstrip(b"\0").decode()
        self.dtype = frame[32]
        self.packing = ("none", "ans", "bitpack")[frame[33]]
        self.mode = ("none", "fixed", "plain", "outlier")[frame[34]]
        self.flat = frame[35] == 1
        self.relative_to = ("none", "tensor", "tile", "channel")[frame[36]]
        self.shape = struct.unpack_from(f"<{frame[37]}Q", frame, 72)
        (self.header_bytes,) = struct.unpack_from("<H", frame, 6)
        (self.num_tiles,) = struct.unpack_from("<I", frame, 64)


def split_tiles(frame: bytes) -> Iterator[bytes]:
    header = Header(frame)
    sizes = struct.unpack_from(f"<{header.num_tiles}I", frame, header.header_bytes)
    at = header.header_bytes + (4 * header.num_tiles + 7) // 8 * 8
    for size in sizes:
        yield frame[at : at + size]
        at += size
    assert at + 8 == len(frame)
