"""Ways to write one tensor of a cache as bytes, ways to wrap them, and the scheme that keeps a cache by them.

A `Coder` is what kvferry's codecs and the baselines have in common, so that an ablation is a wrapper: one side only,
the first tokens left alone, the tokens in chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

import kvferry
from kvferry.codecs.transform import Transform
from kvferry.errors import CorruptFrame
from kvferry.evaluation.schemes import Guarantee
from kvferry.policy import CodecChoice, choose
from kvferry.store import Entry, HostStore

if TYPE_CHECKING:
    from transformers import DynamicCache

    from kvferry.integrations.transformers.cache import CacheLayout

Side = Literal["k", "v"]
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Place:
    """Where in a cache a tensor is from: layer, K or V, and the position of its first token."""

    layer: int = 0
    side: Side = "k"
    first_token: int = 0


class Coder(Protocol):
    """Tensor `[..., tokens, channels]` to bytes and back to the same shape and dtype."""

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """All that decoding needs beside place, shape and dtype."""
        ...

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Undo `encode`. Raises `CorruptFrame` for bytes that do not belong to `shape`."""
        ...

    def bound(self, data: bytes, place: Place) -> float | None:
        """The absolute bound that holds for every value in `data` (0: exact), None where nothing is promised."""
        ...


@dataclass(frozen=True)
class CodecCoder:
    """A kvferry codec, or a choice of one per tensor. What it writes are whole self-describing frames."""

    codec: CodecChoice

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """A frame."""
        codec = choose(self.codec, place.layer, place.side, tensor)
        if isinstance(codec, Transform):
            codec = replace(codec, first_position=codec.first_position + place.first_token)
        return kvferry.compress(tensor, codec)

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The frame's tensor."""
        return kvferry.decompress(data, device=device)

    def bound(self, data: bytes, place: Place) -> float | None:
        """The frame's own record of the largest absolute bound in it."""
        return kvferry.inspect(data).bound_used


@dataclass(frozen=True)
class OneSide:
    """`inner` for K alone or V alone; the other side is kept as it is."""

    inner: Coder
    side: Side

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """As `inner`, or the values."""
        return self.inner.encode(tensor, place) if place.side == self.side else to_bytes(tensor)

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """As `inner`, or the values."""
        if place.side == self.side:
            return self.inner.decode(data, place, shape, dtype, device)
        return from_bytes(data, shape, dtype, device)

    def bound(self, data: bytes, place: Place) -> float | None:
        """As `inner`, or 0."""
        return self.inner.bound(data, place) if place.side == self.side else 0.0


@dataclass(frozen=True)
class RawSinks:
    """The first `tokens` kept as they are and `inner` for those after them: early tokens draw much of the attention (G.
    Xiao et al., arXiv:2309.17453, "attention sinks"). Raises `ValueError` unless `tokens` is at least 1."""

    inner: Coder
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"sinks of {self.tokens} tokens: give at least 1")

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """Two parts, each behind its length in 4 bytes."""
        first, rest = tensor[..., : self.tokens, :], tensor[..., self.tokens :, :]
        coded = self.inner.encode(rest, self._rest(place)) if rest.shape[-2] else b""
        return _join([to_bytes(first), coded])

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Both parts, joined."""
        kept = min(self.tokens, shape[-2])
        raw, coded = _split(data, 2)
        first = from_bytes(raw, _of_tokens(shape, kept), dtype, device)
        if kept == shape[-2]:
            return first
        rest = self.inner.decode(coded, self._rest(place), _of_tokens(shape, shape[-2] - kept), dtype, device)
        return torch.cat((first, rest), dim=-2)

    def bound(self, data: bytes, place: Place) -> float | None:
        """That of `inner`."""
        _, coded = _split(data, 2)
        return self.inner.bound(coded, self._rest(place)) if coded else 0.0

    def _rest(self, place: Place) -> Place:
        return replace(place, first_token=place.first_token + self.tokens)


@dataclass(frozen=True)
class Chunked:
    """`inner` for every chunk of `tokens` by itself, as a store does that keeps chunks. Raises `ValueError` unless
    `tokens` is at least 1."""

    inner: Coder
    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"chunks of {self.tokens} tokens: give at least 1")

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """The chunks, each behind its length in 4 bytes."""
        starts = range(0, tensor.shape[-2], self.tokens)
        parts = [tensor[..., start : start + self.tokens, :] for start in starts]
        coded = [self.inner.encode(part, at) for part, at in zip(parts, self._places(place, len(parts)), strict=True)]
        return _join(coded)

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """All chunks, joined."""
        counts = [min(self.tokens, shape[-2] - start) for start in range(0, shape[-2], self.tokens)]
        parts = [
            self.inner.decode(part, at, _of_tokens(shape, count), dtype, device)
            for part, at, count in zip(_split(data, len(counts)), self._places(place, len(counts)), counts, strict=True)
        ]
        return torch.cat(parts, dim=-2) if parts else torch.empty(shape, dtype=dtype, device=device)

    def bound(self, data: bytes, place: Place) -> float | None:
        """The largest of any chunk."""
        parts = _split(data)
        bounds = [self.inner.bound(part, at) for part, at in zip(parts, self._places(place, len(parts)), strict=True)]
        known = [bound for bound in bounds if bound is not None]
        return max(known, default=0.0) if len(known) == len(bounds) else None

    def _places(self, place: Place, count: int) -> list[Place]:
        return [replace(place, first_token=place.first_token + i * self.tokens) for i in range(count)]


@dataclass(frozen=True)
class CoderScheme:
    """A coder through the same `HostStore` as everything else."""

    name: str
    family: str
    setting: str
    coder: Coder
    guarantee: Guarantee

    def store(self, store: HostStore, key: Hashable, cache: DynamicCache) -> Entry:
        """Put the cache under `key`."""
        from kvferry.integrations.transformers.cache import encode_cache_with

        encoded = encode_cache_with(
            cache, lambda layer_index, side, tensor: self.coder.encode(tensor, Place(layer_index, side))
        )
        return store.put(key, encoded.frames, raw_bytes=encoded.raw_bytes, metadata=encoded.layout)

    def restore(self, store: HostStore, key: Hashable, device: torch.device | None) -> DynamicCache:
        """A new cache from what is under `key`. Raises `KeyError` if it is absent."""
        from kvferry.integrations.transformers.cache import EncodedCache, decode_cache_with

        with store.pinned(key) as entry:
            layout = _layout(entry, key)
            places = iter(_places(layout))  # frames are decoded in their order
            return decode_cache_with(
                EncodedCache(entry.frames, entry.raw_bytes, layout),
                lambda frame, part, target: self.coder.decode(frame, next(places), part.shape, part.dtype, target),
                device,
            )

    def bounds(self, entry: Entry) -> list[float | None]:
        """What the coder says of each frame; None for all where nothing is promised."""
        if self.guarantee is Guarantee.NONE:
            return [None] * len(entry.frames)
        places = _places(_layout(entry, "entry"))
        return [self.coder.bound(frame, place) for frame, place in zip(entry.frames, places, strict=True)]


def to_bytes(tensor: Tensor) -> bytes:
    """The tensor's values, row-major."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def from_bytes(data: bytes, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Undo `to_bytes`. Raises `CorruptFrame` when the length does not belong to `shape`."""
    expected = torch.Size(shape).numel() * dtype.itemsize
    if len(data) != expected:
        raise CorruptFrame(f"{len(data)} bytes where {shape} {dtype} needs {expected}")
    if not data:
        return torch.empty(shape, dtype=dtype, device=device)
    values: Tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    return values.reshape(shape).to(device)


def _layout(entry: Entry, key: Hashable) -> CacheLayout:
    from kvferry.integrations.transformers.cache import CacheLayout

    if not isinstance(entry.metadata, CacheLayout):
        raise TypeError(f"key {key!r} does not hold a cache")
    return entry.metadata


def _places(layout: CacheLayout) -> list[Place]:
    """The place of each frame, in their order."""
    sides: tuple[Side, Side] = ("k", "v")
    return [Place(i, side) for i, layer in enumerate(layout.layers) if layer.tensors is not None for side in sides]


def _of_tokens(shape: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    return (*shape[:-2], tokens, shape[-1])


def _join(parts: Sequence[bytes]) -> bytes:
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _split(data: bytes, count: int | None = None) -> list[bytes]:
    """The parts. Raises `CorruptFrame` if they are not `count`, or the data ends within one."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise CorruptFrame(f"the data ends within a length, after {len(parts)} parts")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise CorruptFrame(f"part {len(parts)} has {length} bytes, but {len(data) - at} are left")
        parts.append(data[at : at + length])
        at += length
    if count is not None and len(parts) != count:
        raise CorruptFrame(f"{len(parts)} parts where the shape needs {count}")
    return parts
