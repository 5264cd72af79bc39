"""The lossy casts every user already has, for comparison: fp8, and int4 per token and head. They promise no bound.

Both really encode to bytes, and their size is that of all arrays needed to decode (codes, scales, zeros). Shapes and
dtypes are not counted, which favours them by about 100 bytes a tensor over kvferry's self-describing frames.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from kvferry.errors import CorruptFrame
from kvferry.evaluation.schemes import Guarantee
from kvferry.store import Entry, HostStore

if TYPE_CHECKING:
    from transformers import DynamicCache

FP8_MAX = 448.0  # largest finite e4m3fn value
SMALLEST_SCALE = 1e-8  # of a row whose values are all equal


class Baseline(Protocol):
    """Tensor `[..., tokens, channels]` to bytes and back to the same shape and dtype."""

    name: ClassVar[str]

    def encode(self, tensor: Tensor) -> bytes:
        """All arrays that decoding needs, one after another."""
        ...

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Undo `encode`. Raises `CorruptFrame` when the length does not belong to `shape`."""
        ...


@dataclass(frozen=True)
class Fp8Cast:
    """A saturating cast to float8 e4m3fn, without scales: one byte a value."""

    name: ClassVar[str] = "fp8 e4m3 cast"

    def encode(self, tensor: Tensor) -> bytes:
        """`num_values` bytes."""
        return _to_bytes(tensor.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Values as `dtype`."""
        _check_length(data, _num_values(shape), self.name)
        return _from_bytes(data, torch.float8_e4m3fn, device).to(dtype).reshape(shape)


@dataclass(frozen=True)
class Int4PerTokenHead:
    """Sixteen levels between the smallest and largest value of each token and head; scale and zero in bfloat16.

    Half a byte a value (a row of odd width takes a whole last byte) and 4 bytes a row.
    """

    name: ClassVar[str] = "int4 per token and head"

    def encode(self, tensor: Tensor) -> bytes:
        """Codes `[rows, ceil(channels/2)]` u8 (even channel in the low nibble), scales and zeros `[rows]` bf16."""
        if tensor.numel() == 0:
            return b""
        rows = tensor.float().reshape(-1, tensor.shape[-1])
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scales = ((high - low) / 15).to(torch.bfloat16).clamp(min=SMALLEST_SCALE)
        zeros = low.to(torch.bfloat16)
        codes = torch.round((rows - zeros.float()) / scales.float()).clamp(0, 15).to(torch.uint8)
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        return _to_bytes(packed) + _to_bytes(scales) + _to_bytes(zeros)

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero plus code times scale, computed in float32, as `dtype`."""
        if _num_values(shape) == 0:
            _check_length(data, 0, self.name)
            return torch.empty(shape, dtype=dtype, device=device)
        channels = shape[-1]
        num_rows, row_bytes = _num_values(shape) // channels, (channels + 1) // 2
        _check_length(data, num_rows * (row_bytes + 4), self.name)
        packed = _from_bytes(data[: num_rows * row_bytes], torch.uint8, device).reshape(num_rows, row_bytes)
        scales, zeros = _from_bytes(data[num_rows * row_bytes :], torch.bfloat16, device).float().reshape(2, -1, 1)
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(num_rows, -1)[:, :channels]
        values: Tensor = zeros + codes * scales
        return values.to(dtype).reshape(shape)


@dataclass(frozen=True)
class BaselineScheme:
    """A baseline through the same `HostStore` as the codecs."""

    baseline: Baseline

    @property
    def name(self) -> str:
        """The baseline's."""
        return self.baseline.name

    @property
    def family(self) -> str:
        """The baseline's name: each is a family of its own."""
        return self.baseline.name

    @property
    def setting(self) -> str:
        """Baselines have nothing to set."""
        return ""

    @property
    def guarantee(self) -> Guarantee:
        """None."""
        return Guarantee.NONE

    def store(self, store: HostStore, key: Hashable, cache: DynamicCache) -> Entry:
        """Put the cache under `key`."""
        from kvferry.integrations.transformers.cache import encode_cache_with

        encoded = encode_cache_with(cache, lambda layer_index, which, tensor: self.baseline.encode(tensor))
        return store.put(key, encoded.frames, raw_bytes=encoded.raw_bytes, metadata=encoded.layout)

    def restore(self, store: HostStore, key: Hashable, device: torch.device | None) -> DynamicCache:
        """A new cache from what is under `key`. Raises `KeyError` if it is absent."""
        from kvferry.integrations.transformers.cache import CacheLayout, EncodedCache, decode_cache_with

        with store.pinned(key) as entry:
            if not isinstance(entry.metadata, CacheLayout):
                raise TypeError(f"key {key!r} does not hold a cache")
            return decode_cache_with(
                EncodedCache(entry.frames, entry.raw_bytes, entry.metadata),
                lambda frame, layout, target: self.baseline.decode(frame, layout.shape, layout.dtype, target),
                device,
            )

    def bounds(self, entry: Entry) -> list[float | None]:
        """None is promised."""
        return [None] * len(entry.frames)


def _num_values(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _check_length(data: bytes, expected: int, name: str) -> None:
    if len(data) != expected:
        raise CorruptFrame(f"{name}: {len(data)} bytes where the shape needs {expected}")


def _to_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def _from_bytes(data: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype, device=device)
    values: Tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    return values.to(device)
