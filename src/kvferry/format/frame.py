"""Frames written and read (docs/format.md, "Frame"). Knows lengths and the checksum; what a tile holds is the codecs'
affair."""

import struct
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import torch
import xxhash

from kvferry.errors import CorruptFrame, UnsupportedVersion

_T = TypeVar("_T")

MAGIC = b"KVFY"
VERSION = 1
CHECKSUM_BYTES = 8
MAX_PARAMS_BYTES = 4096
MAX_DIMS = 16
MAX_DIM = 1 << 48
MAX_EXTENT = 1 << 60
"""Of the product of the sizes that are not 0: beyond it PyTorch's strides overflow, even if the tensor has no
values."""
_FIXED = struct.Struct("<4sHHQ16sBBBBBBHddQII")

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
PACKINGS = ("none", "ans", "bitpack")
MODES = ("none", "fixed", "plain", "outlier")
GROUPINGS = ("token", "flat")
RELATIVE_TO = ("none", "tensor", "tile", "channel")


@dataclass(frozen=True)
class FrameHeader:
    """A frame's description. `bound_used` is the largest absolute bound of any tile."""

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    packing: str = "none"
    mode: str = "none"
    grouping: str = "token"
    relative_to: str = "none"
    bound_asked: float = 0.0
    bound_used: float = 0.0
    params: bytes = b""

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def raw_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


@dataclass(frozen=True)
class Frame:
    """A frame taken apart: `sizes` int64 `[num_tiles]` (empty for codecs without tiles), `payload` a view of its
    bytes."""

    header: FrameHeader
    sizes: np.ndarray
    payload: memoryview


def _pad8(num_bytes: int) -> int:
    return (num_bytes + 7) & -8


def frame_overhead(num_dims: int, num_tiles: int, params_bytes: int = 0) -> int:
    """Bytes of a frame beside its payload."""
    return _FIXED.size + 8 * num_dims + _pad8(params_bytes) + _pad8(4 * num_tiles) + CHECKSUM_BYTES


def write_frame(header: FrameHeader, sizes: np.ndarray, payload: bytes | memoryview) -> bytes:
    """The frame's bytes. Raises `ValueError` for a header that the format cannot hold."""
    name = header.codec.encode("ascii")
    if not 0 < len(name) <= 16:
        raise ValueError(f"codec name {header.codec!r} must have 1 to 16 ASCII characters")
    if len(header.params) > MAX_PARAMS_BYTES:
        raise ValueError(f"codec parameters take {len(header.params)} bytes; a frame holds at most {MAX_PARAMS_BYTES}")
    if len(header.shape) > MAX_DIMS:
        raise ValueError(
            f"a tensor of {len(header.shape)} dimensions; a frame holds at most {MAX_DIMS}: reshape it first"
        )
    if not _addressable(header.shape):
        raise ValueError(f"the shape {header.shape} is beyond what a frame holds: reshape the tensor first")
    frame_bytes = frame_overhead(len(header.shape), len(sizes), len(header.params)) + len(payload)
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        _FIXED.size + 8 * len(header.shape) + _pad8(len(header.params)),
        frame_bytes,
        name,
        1 + DTYPES.index(header.dtype),
        PACKINGS.index(header.packing),
        MODES.index(header.mode),
        GROUPINGS.index(header.grouping),
        RELATIVE_TO.index(header.relative_to),
        len(header.shape),
        0,
        header.bound_asked,
        header.bound_used,
        header.num_values,
        len(sizes),
        len(header.params),
    )
    shape = struct.pack(f"<{len(header.shape)}Q", *header.shape)
    directory = sizes.astype("<u4").tobytes()
    body = b"".join(
        (
            fixed,
            shape,
            header.params.ljust(_pad8(len(header.params)), b"\0"),
            directory.ljust(_pad8(len(directory)), b"\0"),
            payload,
        )
    )
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(CHECKSUM_BYTES, "little")


def read_frame(data: bytes | bytearray | memoryview) -> Frame:
    """Take a frame apart, checksum first; nothing is allocated but what the bytes at hand account for.

    Raises `UnsupportedVersion` for another format version, `CorruptFrame` for everything that does not add up.
    """
    view = memoryview(data).cast("B")
    if len(view) < _FIXED.size + CHECKSUM_BYTES:
        raise CorruptFrame(f"{len(view)} bytes are too few for a frame: it was truncated, or is none")
    (
        magic,
        version,
        header_bytes,
        frame_bytes,
        name,
        dtype,
        packing,
        mode,
        grouping,
        relative_to,
        num_dims,
        reserved,
    ) = _FIXED.unpack_from(view)[:12]
    bound_asked, bound_used, num_values, num_tiles, params_bytes = _FIXED.unpack_from(view)[12:]
    if magic != MAGIC:
        raise CorruptFrame(f"the data start with {bytes(magic)!r}, not with {MAGIC!r}: not a kvferry frame")
    if frame_bytes == len(view):
        digest = xxhash.xxh3_64_intdigest(view[:-CHECKSUM_BYTES])
        if digest != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
            raise CorruptFrame("the checksum does not match: the frame was altered")
    elif version == VERSION:
        raise CorruptFrame(f"the frame claims {frame_bytes} bytes, {len(view)} are there")
    if version != VERSION:
        raise UnsupportedVersion(f"frame format version {version}; this kvferry reads version {VERSION}")
    if num_dims > MAX_DIMS or params_bytes > MAX_PARAMS_BYTES or reserved != 0:
        raise CorruptFrame(f"{num_dims} dimensions, {params_bytes} parameter bytes, reserved {reserved}: out of range")
    if header_bytes != _FIXED.size + 8 * num_dims + _pad8(params_bytes):
        raise CorruptFrame(f"the header claims {header_bytes} bytes, which does not match its fields")
    payload_at = header_bytes + _pad8(4 * num_tiles)
    if payload_at + CHECKSUM_BYTES > len(view):
        raise CorruptFrame(f"a directory of {num_tiles} tiles does not fit into {len(view)} bytes")
    shape = struct.unpack_from(f"<{num_dims}Q", view, _FIXED.size)
    if not _addressable(shape) or prod(shape) != num_values:
        raise CorruptFrame(f"the shape {shape} does not hold {num_values} values")
    params_at = _FIXED.size + 8 * num_dims
    header = FrameHeader(
        codec=_codec_name(bytes(name)),
        dtype=_choice(DTYPES, dtype - 1, "dtype"),
        shape=shape,
        packing=_choice(PACKINGS, packing, "packing"),
        mode=_choice(MODES, mode, "mode"),
        grouping=_choice(GROUPINGS, grouping, "grouping"),
        relative_to=_choice(RELATIVE_TO, relative_to, "relative_to"),
        bound_asked=bound_asked,
        bound_used=bound_used,
        params=bytes(view[params_at : params_at + params_bytes]),
    )
    sizes = np.frombuffer(view, dtype="<u4", count=num_tiles, offset=header_bytes).astype(np.int64)
    payload = view[payload_at:-CHECKSUM_BYTES]
    if num_tiles and int(sizes.sum()) != len(payload):
        raise CorruptFrame(f"the directory counts {int(sizes.sum())} bytes, the payload has {len(payload)}")
    return Frame(header, sizes, payload)


def _addressable(shape: tuple[int, ...]) -> bool:
    return all(size <= MAX_DIM for size in shape) and prod(max(size, 1) for size in shape) <= MAX_EXTENT


def _codec_name(raw: bytes) -> str:
    name = raw.rstrip(b"\0")
    if not name or not name.isascii() or b"\0" in name:
        raise CorruptFrame(f"{raw!r} is not a codec name")
    return name.decode("ascii")


def _choice(options: tuple[_T, ...], index: int, field: str) -> _T:
    if not 0 <= index < len(options):
        raise CorruptFrame(f"unknown {field} {index}")
    return options[index]
