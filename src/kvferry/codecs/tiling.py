"""Where the tiles of a tensor lie (docs/format.md, "Tiles"). Pure arithmetic on shapes and strides: no tensor is
read."""

from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Size = TypeVar("_Size", int, np.ndarray)

TILE_TOKENS = 64
TILE_CHANNELS = 128
TILE_VALUES = TILE_TOKENS * TILE_CHANNELS


@dataclass(frozen=True)
class TilePlan:
    """Tiles in format order; value (t, c) of tile i is element `offsets[i] + t*token_stride + c*channel_stride`.

    `offsets` int64, `tokens` and `channels` int32, each `[num_tiles]`; strides in elements.
    """

    offsets: np.ndarray
    tokens: np.ndarray
    channels: np.ndarray
    token_stride: int
    channel_stride: int

    @property
    def num_tiles(self) -> int:
        return len(self.offsets)

    def groups(self) -> list[tuple[int, int, np.ndarray]]:
        """Tiles of equal shape together: `(tokens, channels, tile indices)`, at most four groups."""
        return group_by_shape(self.tokens, self.channels)

    def raw_bytes(self, itemsize: int) -> np.ndarray:
        """Size of each tile when stored raw (the most a tile may take), int64 `[num_tiles]`."""
        return raw_tile_bytes(self.tokens.astype(np.int64) * self.channels, itemsize)


def group_by_shape(tokens: np.ndarray, channels: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Tiles of equal shape together: `(tokens, channels, tile indices)`."""
    keys = tokens.astype(np.int64) * 65536 + channels
    return [(int(k) >> 16, int(k) & 65535, np.flatnonzero(keys == k)) for k in np.unique(keys)]


def raw_tile_bytes(num_values: _Size, itemsize: int) -> _Size:
    """Size of a tile of `num_values` (a number, or an array of numbers) when stored raw."""
    return 4 + (num_values * itemsize + 3) // 4 * 4


def _segment_width(channels: int) -> int:
    """Channels of each segment of a row but perhaps the last; `channels` > 0."""
    count = -(-channels // TILE_CHANNELS)
    return min(TILE_CHANNELS, -(-(-(-channels // count)) // 16) * 16)


def channel_segments(channels: int) -> list[tuple[int, int]]:
    """`(first channel, width)` of each segment of a row of `channels`."""
    if channels == 0:
        return []
    width = _segment_width(channels)
    return [(start, min(width, channels - start)) for start in range(0, channels, width)]


def _flat_parts(num_values: int) -> tuple[int, int, int]:
    """(whole tiles, whole columns behind them, values behind those)."""
    whole, rest = divmod(num_values, TILE_VALUES)
    return whole, *divmod(rest, TILE_TOKENS)


def _row_offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in zip(shape, strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(size, dtype=np.int64) * stride).ravel()
    return offsets


def _plan(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], token_stride: int, channel_stride: int) -> TilePlan:
    offsets, tokens, channels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TilePlan(offsets, tokens.astype(np.int32), channels.astype(np.int32), token_stride, channel_stride)


def token_plan(shape: tuple[int, ...], strides: tuple[int, ...]) -> TilePlan:
    """Tiles of a tensor `[..., tokens, channels]` with any strides (in elements)."""
    if prod(shape) == 0:  # found before anything is built: the other sizes may be any
        none = np.zeros(0, dtype=np.int32)
        return TilePlan(none.astype(np.int64), none, none, strides[-2], strides[-1])
    *lead, tokens, channels = shape
    rows = _row_offsets(tuple(lead), strides[:-2])
    blocks = [(start, min(TILE_TOKENS, tokens - start)) for start in range(0, tokens, TILE_TOKENS)]
    inner = [(t, nt, c, nc) for t, nt in blocks for c, nc in channel_segments(channels)]
    t, nt, c, nc = (np.array(column, dtype=np.int64) for column in zip(*inner, strict=True))
    offsets = (rows[:, None] + t * strides[-2] + c * strides[-1]).ravel()
    return _plan([(offsets, np.tile(nt, len(rows)), np.tile(nc, len(rows)))], strides[-2], strides[-1])


def flat_plan(num_values: int) -> TilePlan:
    """Tiles of `num_values` values that lie one after another: columns of 64 consecutive values."""
    whole, columns, tail = _flat_parts(num_values)
    full = np.arange(whole, dtype=np.int64) * TILE_VALUES
    parts = [(full, np.full(whole, TILE_TOKENS), np.full(whole, TILE_CHANNELS))]
    start = whole * TILE_VALUES
    if columns:
        parts.append((np.array([start]), np.array([TILE_TOKENS]), np.array([columns])))
    if tail:
        parts.append((np.array([start + columns * TILE_TOKENS]), np.array([tail]), np.array([1])))
    return _plan(parts, 1, TILE_TOKENS)


def count_tiles(shape: tuple[int, ...], flat: bool) -> int:
    """Number of tiles of a tensor of `shape`, without building them (a header may claim anything)."""
    if prod(shape) == 0:
        return 0
    if flat or len(shape) < 2:
        whole, columns, tail = _flat_parts(prod(shape))
        return whole + bool(columns) + bool(tail)
    return prod(shape[:-2]) * -(-shape[-2] // TILE_TOKENS) * -(-shape[-1] // _segment_width(shape[-1]))


def plan_tensor(tensor: Tensor, flat: bool) -> tuple[Tensor, TilePlan]:
    """The tensor to address (a contiguous copy where flat order needs one) and its tiles."""
    if flat or tensor.dim() < 2:
        tensor = tensor.contiguous()
        return tensor, flat_plan(tensor.numel())
    return tensor, token_plan(tuple(tensor.shape), tuple(tensor.stride()))


def gather_tiles(bits: Tensor, plan: TilePlan, tiles: np.ndarray, tokens: int, channels: int) -> Tensor:
    """Bit patterns `[N, tokens, channels]` of equal-shaped `tiles`; `bits` is the tensor in its integer view."""
    return _storage_view(bits)[_element_index(plan, tiles, tokens, channels, bits)]


def scatter_tiles(bits: Tensor, plan: TilePlan, tiles: np.ndarray, values: Tensor) -> None:
    """Write `values` `[N, tokens, channels]` to where the tiles lie in `bits`."""
    _storage_view(bits)[_element_index(plan, tiles, values.shape[1], values.shape[2], bits)] = values


def _storage_view(bits: Tensor) -> Tensor:
    """Flat view from the tensor's first element to its last, whatever its strides."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(bits.shape, bits.stride(), strict=True))
    return bits.as_strided((extent,), (1,))


def _element_index(plan: TilePlan, tiles: np.ndarray, tokens: int, channels: int, bits: Tensor) -> Tensor:
    offsets = torch.from_numpy(plan.offsets[tiles]).to(bits.device)
    t = torch.arange(tokens, device=bits.device) * plan.token_stride
    c = torch.arange(channels, device=bits.device) * plan.channel_stride
    return offsets[:, None, None] + t[None, :, None] + c[None, None, :]
