"""Unsound frames are refused: no other exception, no read or allocation beyond what the bytes account for."""

import contextlib
import itertools
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from math import prod

import numpy as np
import pytest
import torch
import xxhash

import kvferry
from contract.cases import MODES, PACKINGS, RELATIVE_TO, bits_of, bounded, case_id, gaussian, with_specials
from kvferry import Bounded, Codec, CorruptFrame, Lossless, Raw, UnsupportedVersion
from kvferry.codecs import tiles
from kvferry.format.frame import MAX_DIM, FrameHeader, frame_overhead, read_frame, write_frame

# (offset, struct code) of the fields, from docs/format.md.
FIELDS = {
    "magic": (0, "4s"),
    "version": (4, "H"),
    "header_bytes": (6, "H"),
    "frame_bytes": (8, "Q"),
    "codec": (16, "16s"),
    "dtype": (32, "B"),
    "packing": (33, "B"),
    "mode": (34, "B"),
    "grouping": (35, "B"),
    "relative_to": (36, "B"),
    "ndim": (37, "B"),
    "reserved": (38, "H"),
    "bound_asked": (40, "d"),
    "bound_used": (48, "d"),
    "num_values": (56, "Q"),
    "num_tiles": (64, "I"),
    "params_bytes": (68, "I"),
}
SHAPE_AT = 72
REFUSED = (CorruptFrame, UnsupportedVersion)
SMALL = [Raw(), Lossless("ans"), Lossless("bitpack"), bounded("fixed", "token", "ans", "tile")]


def small_tensor() -> torch.Tensor:
    return with_specials(gaussian((9, 5), torch.bfloat16))[0]


def sealed(body: bytes | bytearray) -> bytes:
    """`body` with a checksum that is right."""
    return bytes(body) + xxhash.xxh3_64_intdigest(bytes(body)).to_bytes(8, "little")


def changed(frame: bytes, **fields: object) -> bytes:
    """`frame` with fields of the header overwritten, and the checksum made right."""
    body = bytearray(frame[:-8])
    for name, value in fields.items():
        at, code = FIELDS[name]
        struct.pack_into("<" + code, body, at, value)
    return sealed(body)


def reshaped(frame: bytes, shape: tuple[int, ...], **fields: object) -> bytes:
    """`frame` with another shape (of as many dimensions) and what the header says about it."""
    body = bytearray(frame[:-8])
    struct.pack_into(f"<{len(shape)}Q", body, SHAPE_AT, *shape)
    return changed(sealed(body), **{"num_values": prod(shape) % 2**64, **fields})


def assert_refused(frame: bytes, *, kind: tuple[type[Exception], ...] | type[Exception] = CorruptFrame) -> None:
    """Refused, with at most a megabyte of Python and NumPy memory allocated on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(kind):
            kvferry.decompress(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes allocated to refuse {len(frame)}"


@pytest.fixture
def no_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a tensor for the result is made that could not come from a small frame."""
    make = torch.empty

    def checked(*args: object, **kwargs: object) -> torch.Tensor:
        shape = args[0] if args and isinstance(args[0], (tuple, torch.Size)) else args
        assert prod(shape) < 1 << 20, f"a tensor of {shape} was about to be made"
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", checked)


@pytest.mark.parametrize("codec", SMALL, ids=case_id)
class TestDamaged:
    def test_truncated_at_any_byte(self, codec: Codec) -> None:
        frame = kvferry.compress(small_tensor(), codec)
        for length in range(len(frame)):
            with pytest.raises(CorruptFrame):
                kvferry.decompress(frame[:length])
            with pytest.raises(CorruptFrame):
                kvferry.inspect(frame[:length])

    def test_truncated_with_lengths_made_right(self, codec: Codec) -> None:
        """What is missing is noticed by the header alone, not only by the checksum."""
        frame = kvferry.compress(small_tensor(), codec)
        for length in range(SHAPE_AT, len(frame) - 8):
            body = bytearray(frame[:length])
            struct.pack_into("<Q", body, 8, length + 8)
            with pytest.raises(CorruptFrame):
                kvferry.decompress(sealed(body))

    def test_any_bit_flipped(self, codec: Codec) -> None:
        frame = bytearray(kvferry.compress(small_tensor(), codec))
        for bit in range(8 * len(frame)):
            frame[bit // 8] ^= 1 << bit % 8
            with pytest.raises(REFUSED):
                kvferry.decompress(frame)
            with pytest.raises(REFUSED):
                kvferry.inspect(frame)
            frame[bit // 8] ^= 1 << bit % 8
        assert torch.equal(bits_of(kvferry.decompress(frame)), bits_of(kvferry.decompress(bytes(frame))))

    def test_any_byte_of_the_header_changed_and_sealed(self, codec: Codec) -> None:
        """With a checksum that is right, a header is refused or describes a tensor that the tiles do hold."""
        frame = kvferry.compress(small_tensor(), codec)
        for at, value in itertools.product(range(SHAPE_AT + 16), (0, 1, 2, 3, 4, 127, 128, 255)):
            body = bytearray(frame[:-8])
            body[at] = value
            try:
                result = kvferry.decompress(sealed(body))
            except REFUSED:
                continue
            assert result.shape == (9, 5)

    def test_bytes_behind_the_frame(self, codec: Codec) -> None:
        frame = kvferry.compress(small_tensor(), codec)
        for more in (b"\0", b"\0" * 8, frame):
            assert_refused(frame + more)
        longer = bytearray(frame[:-8] + b"\0\0\0\0")
        struct.pack_into("<Q", longer, 8, len(longer) + 8)
        assert_refused(sealed(longer))

    def test_absurd_lengths(self, codec: Codec, no_large_tensors: None) -> None:
        frame = kvferry.compress(small_tensor(), codec)
        for fields in (
            {"frame_bytes": 0},
            {"frame_bytes": 1 << 40},
            {"frame_bytes": 2**64 - 1},
            {"header_bytes": 0},
            {"header_bytes": 71},
            {"header_bytes": 65535},
            {"num_values": 0},
            {"num_values": 2**64 - 1},
            {"num_tiles": 2**32 - 1},
            {"num_tiles": 1 << 28},
            {"params_bytes": 2**32 - 1},
            {"params_bytes": 4096},
            {"params_bytes": 4096, "header_bytes": 72 + 16 + 4096},
            {"params_bytes": 1 << 20},
            {"ndim": 255},
            {"ndim": 17},
            {"ndim": 16, "header_bytes": 72 + 8 * 16},
            {"ndim": 0, "header_bytes": 72},
            {"ndim": 1, "header_bytes": 80},
            {"reserved": 1},
        ):
            assert_refused(changed(frame, **fields))

    def test_shapes_that_do_not_match_the_payload(self, codec: Codec, no_large_tensors: None) -> None:
        frame = kvferry.compress(small_tensor(), codec)
        for shape in (
            (1 << 40, 1),
            (1, 1 << 40),
            (1 << 24, 1 << 24),
            (MAX_DIM, MAX_DIM),
            (2**64 - 1, 1),
            (2**63, 2),
            (2**32, 2**32),
            (0, 5),
            (9, 0),
            (MAX_DIM, 0),
            (9, 6),
            (9, 4),
            (8, 5),
            (65, 5),
            (9, 129),
            (1 << 20, 1 << 10),
        ):
            assert_refused(reshaped(frame, shape))

    def test_product_that_wraps_around(self, codec: Codec, no_large_tensors: None) -> None:
        """2**64 + 45 values would read as 45 in 64-bit arithmetic."""
        frame = kvferry.compress(small_tensor(), codec)
        assert_refused(reshaped(frame, (1 << 48, 1 << 16), num_values=0))
        assert_refused(reshaped(frame, (45, (2**64 + 45) // 45), num_values=45))

    def test_out_stays_as_it_was(self, codec: Codec) -> None:
        frame = bytearray(kvferry.compress(small_tensor(), codec))
        out = torch.full((9, 5), 7.0, dtype=torch.bfloat16)
        frame[-20] ^= 1
        with pytest.raises(CorruptFrame):
            kvferry.decompress(frame, out=out)
        assert (out == 7).all()


def test_unknown_version() -> None:
    frame = kvferry.compress(small_tensor(), Lossless())
    for version in (0, 2, 65535):
        with pytest.raises(UnsupportedVersion, match=f"version {version}.*version 1"):
            kvferry.decompress(changed(frame, version=version))
    # Another version may keep its length and its checksum elsewhere.
    with pytest.raises(UnsupportedVersion):
        kvferry.inspect(changed(frame, version=2, frame_bytes=1))


def test_unknown_codec() -> None:
    frame = changed(kvferry.compress(small_tensor(), Raw()), codec=b"zippy")
    with pytest.raises(UnsupportedVersion, match=r"'zippy'.*lossless"):
        kvferry.decompress(frame)
    assert kvferry.inspect(frame).codec == "zippy"


@pytest.mark.parametrize("name", [b"", b"\xff\xfe", b"a\0b", b"\0raw"])
def test_impossible_codec_names(name: bytes) -> None:
    assert_refused(changed(kvferry.compress(small_tensor(), Raw()), codec=name))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("magic", (b"KVFX", b"\0\0\0\0")),
        ("dtype", (0, 6, 255)),
        ("packing", (3, 255)),
        ("mode", (4, 255)),
        ("grouping", (2, 255)),
        ("relative_to", (4, 255)),
    ],
)
@pytest.mark.parametrize("codec", SMALL, ids=case_id)
def test_values_that_no_field_has(codec: Codec, field: str, values: tuple[object, ...]) -> None:
    for value in values:
        assert_refused(changed(kvferry.compress(small_tensor(), codec), **{field: value}))


def test_values_that_do_not_go_with_the_codec() -> None:
    frame = kvferry.compress(small_tensor(), bounded("fixed", "token", "ans", "tile"))
    assert_refused(changed(frame, packing=0))
    assert_refused(changed(frame, mode=0))
    assert_refused(changed(frame, dtype=4))
    assert_refused(changed(frame, dtype=5))
    assert_refused(changed(kvferry.compress(small_tensor(), Lossless()), packing=0))
    assert_refused(changed(frame, codec=b"raw"))
    assert_refused(changed(kvferry.compress(small_tensor(), Raw()), codec=b"lossless", packing=1))


@pytest.mark.parametrize("data", [b"", b"K", b"KVFY", b"\0" * 79, b"\0" * 80, b"KVFY" * 40, bytes(range(256)) * 4])
def test_what_is_no_frame(data: bytes) -> None:
    assert_refused(data, kind=REFUSED)
    with pytest.raises(REFUSED):
        kvferry.inspect(data)


@pytest.mark.parametrize("data", ["a string", None, 5, [1, 2], torch.zeros(90, dtype=torch.uint8)])
def test_what_is_no_bytes(data: object) -> None:
    for read in (kvferry.decompress, kvferry.inspect):
        with pytest.raises(TypeError):
            read(data)


def test_any_bytes_like_object_is_read() -> None:
    tensor = small_tensor()
    frame = kvferry.compress(tensor, Lossless())
    for data in (frame, bytearray(frame), memoryview(frame), np.frombuffer(frame, dtype=np.uint8)):
        assert torch.equal(bits_of(kvferry.decompress(data)), bits_of(tensor))
        assert kvferry.inspect(data).encoded_bytes == len(frame)
    # Not at an aligned address.
    assert torch.equal(bits_of(kvferry.decompress(memoryview(b"?" + frame)[1:])), bits_of(tensor))


@pytest.mark.parametrize("codec", ["raw", "lossless", "bounded"])
@pytest.mark.parametrize("shape", [(0, MAX_DIM, MAX_DIM, MAX_DIM), (MAX_DIM,) * 8 + (0,), (1 << 31, 1 << 31, 0)])
def test_empty_shapes_beyond_pytorch(codec: str, shape: tuple[int, ...]) -> None:
    """No values, but sizes whose strides overflow: neither written nor read."""
    header = FrameHeader(codec, torch.bfloat16, shape, packing="ans", mode="fixed")
    nothing = np.zeros(0, dtype=np.int64)
    with pytest.raises(ValueError, match="reshape"):
        write_frame(header, nothing, b"")
    plain = write_frame(FrameHeader(codec, torch.bfloat16, (0,) * len(shape), "ans", "fixed"), nothing, b"")
    assert kvferry.decompress(plain).shape == (0,) * len(shape)
    assert_refused(reshaped(plain, shape))


def test_large_claims_of_a_large_frame(no_large_tensors: None) -> None:
    """A frame with bytes enough for the general limit, but not for its own codec, is refused before memory is taken."""
    sizes, payload = np.array([8] * 1000), bytes(8000)
    for codec in ("lossless", "bounded"):
        header = FrameHeader(codec, torch.float32, (2000, 64, 128), packing="ans", mode="fixed")
        assert_refused(write_frame(header, sizes, payload))
    assert_refused(write_frame(FrameHeader("raw", torch.float32, (2000 * 8192,)), sizes[:0], payload))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("codec", ["lossless", "bounded"])
@pytest.mark.parametrize("size", range(56))
def test_tiles_too_small_for_their_sections(codec: str, packing: str, size: int) -> None:
    """A single tile that claims to be coded and ends anywhere in its header or sections."""
    for fill in (b"\0", b"\1", b"\xff"):
        tile = (b"\1" + fill * 63)[:size]
        header = FrameHeader(codec, torch.bfloat16, (8, 8), packing=packing, mode="fixed")
        frame = write_frame(header, np.array([size]), tile)
        try:
            assert kvferry.decompress(frame).shape == (8, 8)
        except CorruptFrame:
            continue
        assert size % 4 == 0 and size >= 16


def test_directory_that_does_not_match_the_payload() -> None:
    tensor = gaussian((130, 20), torch.bfloat16)
    for codec in (Lossless("ans"), Lossless("bitpack"), Bounded(0.01), Bounded(0.01, packing="bitpack")):
        frame = kvferry.compress(tensor, codec)
        at = SHAPE_AT + 16
        sizes = struct.unpack_from("<3I", frame, at)
        for wrong in (
            (sizes[0] + 4, sizes[1] - 4, sizes[2]),
            (sizes[1], sizes[0], sizes[2] + 1),
            (sizes[0] + sizes[1], 0, sizes[2]),
            (2**32 - 4, sizes[1], sizes[2]),
            (sum(sizes), 0, 0),
            (sizes[0] - 1, sizes[1] + 1, sizes[2]),
            (0, 0, 0),
        ):
            if wrong == sizes:
                continue
            body = bytearray(frame[:-8])
            struct.pack_into("<3I", body, at, *wrong)
            assert_refused(sealed(body))


def mutations(random_: random.Random, tile: bytes) -> Iterator[bytes]:
    """Tiles of the same size with something changed: bits, bytes, fields of the header, stretches."""
    for _ in range(12):
        data = bytearray(tile)
        kind = random_.randrange(5)
        if kind == 0:
            for _ in range(random_.randint(1, 4)):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        elif kind == 1:
            values = [0, 1, 2, 3, 4, 5, 8, 15, 120, 127, 128, 255, random_.randrange(256)]
            data[random_.randrange(16)] = random_.choice(values)
        elif kind == 2:
            at = random_.randrange(len(data))
            for i in range(at, min(len(data), at + random_.randint(1, 24))):
                data[i] = random_.randrange(256)
        elif kind == 3:
            at = random_.choice([4, 6, 8, 12])
            width = 2 if at < 8 else 4
            extreme = random_.choice([0, 1, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1])
            data[at : at + width] = (extreme % 256**width).to_bytes(width, "little")
        else:
            cut = random_.randrange(len(data))
            data = data[cut:] + data[:cut]
            data[0] = 1
        yield bytes(data)


FUZZED = [
    *[Lossless(packing) for packing in PACKINGS],
    *[
        bounded(mode, grouping, packing, RELATIVE_TO[(i + j) % 4])
        for (i, mode), (j, grouping), packing in itertools.product(
            enumerate(MODES), enumerate(("token", "flat")), PACKINGS
        )
    ],
    bounded("fixed", "token", "ans", "channel"),
    bounded("fixed", "token", "bitpack", "channel"),
]


@pytest.mark.parametrize("codec", FUZZED, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=case_id)
def test_altered_tiles_with_a_right_checksum(codec: Codec, dtype: torch.dtype) -> None:
    """Whatever the tiles hold: a tensor of the right shape, or `CorruptFrame` with `out` as it was."""
    random_ = random.Random(f"{codec}{dtype}")
    tensor, _ = with_specials(gaussian((70, 18), dtype))
    original = read_frame(kvferry.compress(tensor, codec))
    sizes, payload = original.sizes, bytes(original.payload)
    starts = np.cumsum(sizes) - sizes
    refused = decoded = 0
    out = torch.full(tensor.shape, 3.0, dtype=dtype)
    for which in range(len(sizes)):
        start, end = int(starts[which]), int(starts[which] + sizes[which])
        for tile in mutations(random_, payload[start:end]):
            frame = write_frame(original.header, sizes, payload[:start] + tile + payload[end:])
            try:
                kvferry.decompress(frame, out=out)
                decoded += 1
                out.fill_(3.0)
            except CorruptFrame:
                refused += 1
                assert (out == 3).all(), "out was touched by a frame that was refused"
    assert refused > 0 and decoded + refused == 12 * len(sizes)


@pytest.mark.parametrize("codec", FUZZED[:6], ids=case_id)
def test_altered_tiles_side_by_side(codec: Codec) -> None:
    """Tiles of one batch that are wrong in different ways, among sound ones."""
    random_ = random.Random(str(codec))
    tensor = gaussian((24, 40, 12), torch.bfloat16)
    original = read_frame(kvferry.compress(tensor, codec))
    starts = np.cumsum(original.sizes) - original.sizes
    for share in (0.1, 0.5, 1.0):
        for _ in range(6):
            parts = []
            for start, size in zip(starts.tolist(), original.sizes.tolist(), strict=True):
                tile = bytes(original.payload[start : start + size])
                parts.append(next(mutations(random_, tile)) if random_.random() < share else tile)
            frame = write_frame(original.header, original.sizes, b"".join(parts))
            with contextlib.suppress(CorruptFrame):
                assert kvferry.decompress(frame).shape == tensor.shape


@pytest.mark.parametrize("codec", [Lossless("ans"), Bounded(0.01, packing="bitpack")], ids=case_id)
def test_out_stays_as_it_was_when_a_late_tile_is_bad(codec: Codec) -> None:
    """The first batch of tiles is sound and decoded before the bad one is met."""
    tensor = gaussian((tiles.BATCH_TILES + 9, 8, 16), torch.bfloat16)
    original = read_frame(kvferry.compress(tensor, codec))
    last = int(original.sizes[-1])
    payload = bytearray(original.payload)
    payload[-last + 6 : -last + 8] = b"\xff\xff"
    payload[-last] = 1
    frame = write_frame(original.header, original.sizes, bytes(payload))
    out = torch.zeros_like(tensor)
    with pytest.raises(CorruptFrame, match=f"tile {len(original.sizes) - 1}"):
        kvferry.decompress(frame, out=out)
    assert not out.any()


def test_layout_is_the_documented_one() -> None:
    """Every field where docs/format.md puts it."""
    tensor = gaussian((3, 65, 130), torch.float16)
    codec = Bounded(0.25, relative_to="channel", mode="outlier", grouping="token", packing="bitpack")
    frame = kvferry.compress(tensor, codec)
    read = {name: struct.unpack_from("<" + code, frame, at)[0] for name, (at, code) in FIELDS.items()}
    used = read.pop("bound_used")
    assert used == kvferry.inspect(frame).bound_used > 0
    assert read == {
        "magic": b"KVFY",
        "version": 1,
        "header_bytes": 72 + 24,
        "frame_bytes": len(frame),
        "codec": b"bounded".ljust(16, b"\0"),
        "dtype": 2,
        "packing": 2,
        "mode": 3,
        "grouping": 0,
        "relative_to": 3,
        "ndim": 3,
        "reserved": 0,
        "bound_asked": 0.25,
        "num_values": 3 * 65 * 130,
        "num_tiles": 12,
        "params_bytes": 0,
    }
    assert struct.unpack_from("<3Q", frame, 72) == (3, 65, 130)
    sizes = struct.unpack_from("<12I", frame, 96)
    assert 96 + 48 + sum(sizes) + 8 == len(frame)
    assert frame[-8:] == xxhash.xxh3_64_intdigest(frame[:-8]).to_bytes(8, "little")


@pytest.mark.parametrize("params", [b"", b"\1", b"12345678", bytes(4096)])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_header_comes_back(params: bytes, count: int) -> None:
    header = FrameHeader("third", torch.float8_e5m2, (4, 0, 7), "none", "plain", "flat", "tile", 0.5, 0.25, params)
    sizes, payload = np.full(count, 4), bytes(range(4 * count))
    frame = write_frame(header, sizes, payload)
    back = read_frame(frame)
    assert back.header == header
    assert back.sizes.tolist() == sizes.tolist()
    assert bytes(back.payload) == payload
    assert len(frame) == frame_overhead(3, count, len(params)) + len(payload)
    info = kvferry.inspect(frame)
    assert (info.codec, info.shape, info.num_tiles, info.encoded_bytes) == ("third", (4, 0, 7), count, len(frame))


def refusals() -> list[tuple[Callable[[], FrameHeader], str]]:
    return [
        (lambda: FrameHeader("", torch.float32, ()), "1 to 16"),
        (lambda: FrameHeader("x" * 17, torch.float32, ()), "1 to 16"),
        (lambda: FrameHeader("x", torch.float32, (1,) * 17), "reshape"),
        (lambda: FrameHeader("x", torch.float32, (), params=bytes(4097)), "4096"),
    ]


@pytest.mark.parametrize(("make", "message"), refusals())
def test_headers_that_the_format_cannot_hold(make: Callable[[], FrameHeader], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_frame(make(), np.zeros(0, dtype=np.int64), b"")
