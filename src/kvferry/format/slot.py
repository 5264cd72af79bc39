"""Slots: what one chunk of KV cache is in host memory (docs/format.md, "Slot"). Headers, directories, checksums; what
a tile holds is the codecs' affair."""

from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import xxhash

from kvferry.errors import CorruptFrame
from kvferry.format.frame import DTYPES, MODES, PACKINGS, RELATIVE_TO

MAGIC = b"KVFS"
VERSION = 1
HEADER_BYTES = 64
DIRECTORY_BYTES = 8
"""Of one tile: where it ends in the payload, and its checksum."""
CODECS = ("raw", "lossless", "bounded", "transform")

HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("header_bytes", "<u2"),
        ("codec", "u1"),
        ("dtype", "u1"),
        ("packing", "u1"),
        ("mode", "u1"),
        ("state", "u1"),
        ("relaxed", "u1"),
        ("relative_to", "u1"),
        ("reserved", "u1"),
        ("num_tiles", "<u4"),
        ("payload_bytes", "<u4"),
        ("bound_used", "<f4"),
        ("layout_digest", "<u4"),
        ("identity", "<u8", (2,)),
        ("tokens", "<u4"),
        ("reserved2", "<u8"),
        ("checksum", "<u4"),
    ]
)
"""The header's fields; an array of this dtype is a batch of headers."""
_NAMED: dict[str, tuple[Any, ...]] = {
    "codec": CODECS,
    "dtype": (torch.uint8, *DTYPES),
    "packing": PACKINGS,
    "mode": MODES,
    "relative_to": RELATIVE_TO,
}
"""What the numbers of these fields mean."""
DIRECTORY = np.dtype([("end", "<u4"), ("checksum", "<u4")])

_INDEX_FACTOR, _INDEX_START = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_IDENTITY_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LOW_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class SlotState(IntEnum):
    """What a header says of its slot."""

    USABLE = 1
    REJECTED = 2
    """The chunk did not fit; nothing follows the header."""


class SlotStatus(IntEnum):
    """What decoding a slot came to. The first that applies, in this order."""

    GOOD = 0
    NO_SLOT = 1
    """No slot that this version writes: magic, version, reserved bytes, state or the header's checksum."""
    OTHER_KIND = 2
    """Another codec, dtype, packing, mode, relative_to or layout than asked for."""
    OTHER_IDENTITY = 3
    """Another chunk's."""
    REJECTED = 4
    """The chunk did not fit when it was stored."""
    CORRUPT = 5
    """A tile's place, checksum or contents are wrong; the values of such tiles were left alone (on a
    GPU, of tiles whose checksum is wrong: where a forger made one right, anything may lie in the tile's place)."""


@dataclass(frozen=True)
class SlotHeader:
    """One slot's header. `dtype` is uint8 for opaque bytes; `payload_bytes` of a rejected slot is what its last try
    needed; `bound_used` the largest absolute bound of any tile, after `relaxed` doublings."""

    codec: str
    dtype: torch.dtype
    packing: str
    mode: str
    state: SlotState
    relaxed: int
    relative_to: str
    num_tiles: int
    payload_bytes: int
    bound_used: float
    layout_digest: int
    identity: tuple[int, int]
    tokens: int

    def pack(self) -> bytes:
        """The 64 bytes. Raises `ValueError` for a name that the format does not have."""
        fields = dict(zip(self.__dataclass_fields__, astuple(self), strict=True))
        for name, options in _NAMED.items():
            if fields[name] not in options:
                raise ValueError(f"{name} {fields[name]!r} has no number in a slot's header; it has {options}")
            fields[name] = options.index(fields[name])
        record = np.zeros(1, dtype=HEADER)
        for name, value in fields.items():
            record[name] = value
        return seal_headers(record).tobytes()

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "SlotHeader":
        """The header at the start of `data`. Raises `CorruptFrame` where there is none, or one of unknown codes."""
        if len(data) < HEADER_BYTES:
            raise CorruptFrame(f"{len(data)} bytes are too few for a slot's header of {HEADER_BYTES}")
        records = np.frombuffer(data, dtype=HEADER, count=1)
        if not are_headers(records)[0]:
            raise CorruptFrame(f"the data start with {bytes(data[:8])!r}: no slot's header, or an altered one")
        record = records[0]

        names = {}
        for field, options in _NAMED.items():
            if record[field] >= len(options):
                raise CorruptFrame(f"unknown {field} {record[field]} in a slot's header")
            names[field] = options[record[field]]
        return cls(
            **names,
            state=SlotState(int(record["state"])),
            relaxed=int(record["relaxed"]),
            num_tiles=int(record["num_tiles"]),
            payload_bytes=int(record["payload_bytes"]),
            bound_used=float(record["bound_used"]),
            layout_digest=int(record["layout_digest"]),
            identity=(int(record["identity"][0]), int(record["identity"][1])),
            tokens=int(record["tokens"]),
        )


def dtype_code(dtype: torch.dtype) -> int:
    """A dtype's number in headers: 0 for opaque bytes, else as in frames."""
    return _NAMED["dtype"].index(dtype)


def layout_digest(dtype: torch.dtype, page_tokens: int, channels: tuple[int, ...]) -> int:
    """32 bits of what must agree for a slot's tiles to lie where the reader thinks."""
    fields = np.array([dtype_code(dtype), page_tokens, *channels], dtype="<u4")
    return int(xxhash.xxh3_64_intdigest(fields.tobytes())) & 0xFFFFFFFF


def checksum(words: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """Checksums uint32 `[...]` of `words` uint32 `[..., n]`, seeds uint64 `[...]`. Zeros behind the words change
    nothing: rows of differing length may be padded."""
    place = np.arange(words.shape[-1], dtype=np.uint64)
    factor = (place * _INDEX_FACTOR + _INDEX_START) & _LOW_WORD | np.uint64(1)
    total = np.asarray(seed, dtype=np.uint64)[..., None] + np.sum(
        words.astype(np.uint64) * factor, axis=-1, dtype=np.uint64, keepdims=True
    )
    total ^= total >> _HALF
    total *= _MIX
    total ^= total >> _HALF
    return np.asarray(total[..., 0] & _LOW_WORD, dtype=np.uint32)


def tile_seeds(identity: np.ndarray, tile: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Seeds uint64 `[N]` of the checksums of tiles number `tile` `[N]` of `num_bytes` `[N]` in chunks of `identity`
    uint64 `[N, 2]`."""
    place = (tile.astype(np.uint64) << _HALF) + num_bytes.astype(np.uint64)
    return np.asarray(identity[:, 0] + identity[:, 1] * _IDENTITY_FACTOR + place)


def seal_headers(records: np.ndarray) -> np.ndarray:
    """`records` (`HEADER`, `[N]`), with magic, version, header_bytes and checksum filled in, as uint8 `[N, 64]`."""
    records = records.copy()
    records["magic"], records["version"], records["header_bytes"] = MAGIC, VERSION, HEADER_BYTES
    words = records.view("<u4").reshape(-1, HEADER_BYTES // 4)
    records["checksum"] = checksum(words[:, :-1], np.zeros(len(words), dtype=np.uint64))
    return records.view(np.uint8).reshape(-1, HEADER_BYTES)


def read_headers(data: np.ndarray) -> np.ndarray:
    """The records (`HEADER`, `[N]`) of headers as uint8 `[N, 64]`, unchecked (`are_headers`)."""
    return np.ascontiguousarray(data).view(HEADER).reshape(-1)


def are_headers(records: np.ndarray) -> np.ndarray:
    """Which of `records` (`HEADER`, `[N]`) are headers of this version with a checksum that is right, bool `[N]`."""
    words = np.ascontiguousarray(records).view("<u4").reshape(-1, HEADER_BYTES // 4)
    return np.asarray(
        (records["magic"] == MAGIC)
        & (records["version"] == VERSION)
        & (records["header_bytes"] == HEADER_BYTES)
        & (records["reserved"] == 0)
        & (records["reserved2"] == 0)
        & np.isin(records["state"], tuple(SlotState))
        & (checksum(words[:, :-1], np.zeros(len(words), dtype=np.uint64)) == records["checksum"])
    )
