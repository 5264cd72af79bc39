"""Tensors to tiles to payload and back, by the reference packers: what `lossless` and `bounded` share on the CPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.codecs.tiling import (
    TilePlan,
    count_tiles,
    gather_tiles,
    plan_tensor,
    raw_tile_bytes,
    scatter_tiles,
)
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame
from kvferry.packing import Packer
from kvferry.packing.columns import Columns, Decoded, Layout
from kvferry.packing.sections import KIND_CODED, KIND_RAW

BATCH_TILES = 256
"""Tiles coded at once: enough to outweigh the cost of a call, few enough to stay in the cache (measured on one
core)."""


def encode_tiles(
    tensor: Tensor,
    plan: TilePlan,
    layout: Layout,
    packer: Packer,
    to_columns: Callable[[Tensor, np.ndarray], Columns],
) -> tuple[np.ndarray, Tensor]:
    """Sizes int64 `[num_tiles]` and payload uint8 of all tiles.

    `to_columns(bits, tiles)` turns the bit patterns `[N, T, C]` of the tiles with these indices into columns.
    """
    bits = as_bits(tensor)
    sizes = np.zeros(plan.num_tiles, dtype=np.int64)
    coded: list[tuple[np.ndarray, Tensor]] = []
    for tokens, channels, tiles in plan.groups():
        for batch in np.split(tiles, range(BATCH_TILES, len(tiles), BATCH_TILES)):
            values = gather_tiles(bits, plan, batch, tokens, channels)
            rows, length = tile_rows(values, to_columns(values, batch), layout, packer)
            sizes[batch] = length.numpy()
            coded.append((batch, rows))
    starts = np.cumsum(sizes) - sizes
    payload = np.empty(int(sizes.sum()), dtype=np.uint8)
    for batch, rows in coded:
        for tile, row in zip(batch, rows.numpy(), strict=True):
            payload[starts[tile] : starts[tile] + sizes[tile]] = row[: sizes[tile]]
    return sizes, torch.from_numpy(payload)


def tile_rows(bits: Tensor, columns: Columns, layout: Layout, packer: Packer) -> tuple[Tensor, Tensor]:
    """The bytes of tiles with bit patterns `bits` `[N, T, C]` and their `columns`: rows uint8 `[N, L]`, undefined
    behind a tile's size, and sizes int64 `[N]`. A tile that coding does not shrink is raw."""
    capacity = raw_tile_bytes(bits.shape[1] * bits.shape[2], bits.element_size())
    rows, sizes = packer.pack(columns, layout, capacity)
    large = sizes >= capacity
    sizes = torch.where(large, capacity, sizes)
    if bool(large.any()):
        rows = torch.nn.functional.pad(rows, (0, max(0, capacity - rows.shape[1])))
        rows[large, :capacity] = raw_rows(bits[large])
    return rows[:, : int(sizes.max())], sizes


def raw_rows(bits: Tensor) -> Tensor:
    """Raw tiles of the bit patterns `[N, T, C]`, uint8 `[N, L]`."""
    num_bytes = raw_tile_bytes(bits.shape[1] * bits.shape[2], bits.element_size())
    rows = torch.zeros(len(bits), num_bytes, dtype=torch.uint8)
    rows[:, 0] = KIND_RAW
    data = bits.flatten(1).contiguous().view(torch.uint8)
    rows[:, 4 : 4 + data.shape[1]] = data
    return rows


def tile_directory(frame: Frame, flat: bool) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of a frame's tiles, int64, checked against shape and payload. Raises `CorruptFrame`."""
    expected = count_tiles(frame.header.shape, flat)
    if len(frame.sizes) != expected:
        raise CorruptFrame(f"{len(frame.sizes)} tiles where the shape {frame.header.shape} has {expected}")
    if len(frame.payload) != int(frame.sizes.sum()):
        raise CorruptFrame(f"{len(frame.payload)} bytes of tiles where none belong")
    if np.any((frame.sizes < 4) | (frame.sizes % 4 != 0)):
        raise CorruptFrame("a tile's size is no multiple of 4 bytes, or too small for a tile")
    return np.cumsum(frame.sizes) - frame.sizes, frame.sizes


def decode_tiles(
    frame: Frame,
    flat: bool,
    layout: Layout,
    packer: Packer,
    to_bits: Callable[[Decoded], Tensor],
    out: Tensor,
) -> None:
    """Decode all tiles into `out` (contiguous, CPU); `to_bits` makes bit patterns `[N, T, C]` of what the packer
    yields.

    Raises `CorruptFrame` naming the first tile whose bytes contradict themselves.
    """
    starts, sizes = tile_directory(frame, flat)
    if not len(sizes):
        return
    target, plan = plan_tensor(out, flat)
    bits = as_bits(target)
    payload = torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8)
    kind = payload[torch.from_numpy(starts)].numpy()
    wrong = impossible_tiles(kind, sizes, plan.raw_bytes(bits.element_size()))
    if wrong.any():
        raise CorruptFrame(f"tile {int(np.flatnonzero(wrong)[0])} has an impossible kind or size")
    for tokens, channels, tiles in plan.groups():
        for batch in np.split(tiles, range(BATCH_TILES, len(tiles), BATCH_TILES)):
            raw, coded = batch[kind[batch] == KIND_RAW], batch[kind[batch] == KIND_CODED]
            if len(raw):
                values = raw_values(payload, torch.from_numpy(starts[raw]), tokens, channels, bits.dtype)
                scatter_tiles(bits, plan, raw, values)
            if len(coded):
                at, length = torch.from_numpy(starts[coded]), torch.from_numpy(sizes[coded])
                values, good = coded_values(payload, at, length, tokens, channels, layout, packer, to_bits)
                if not bool(good.all()):
                    bad = int(coded[int((~good).nonzero()[0])])
                    raise CorruptFrame(f"the sections of tile {bad} contradict its header")
                scatter_tiles(bits, plan, coded, values)


def impossible_tiles(kind: np.ndarray, sizes: np.ndarray, raw_bytes: np.ndarray) -> np.ndarray:
    """Which tiles, bool `[N]`, have a first byte `kind` that does not go with their sizes, `raw_bytes` being those of
    raw tiles."""
    return np.asarray(
        ((kind == KIND_RAW) & (sizes != raw_bytes))
        | ((kind == KIND_CODED) & (sizes >= raw_bytes))
        | (kind > KIND_CODED)
    )


def raw_values(payload: Tensor, starts: Tensor, tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Bit patterns `[N, T, C]` of integer `dtype` of the raw tiles at `starts` int64 `[N]` of `payload` uint8."""
    place = torch.arange(tokens * channels * dtype.itemsize)
    data = payload[starts[:, None] + 4 + place].contiguous()
    return data.view(dtype).reshape(-1, tokens, channels)


def coded_values(
    payload: Tensor,
    starts: Tensor,
    sizes: Tensor,
    tokens: int,
    channels: int,
    layout: Layout,
    packer: Packer,
    to_bits: Callable[[Decoded], Tensor],
) -> tuple[Tensor, Tensor]:
    """(bit patterns `[N, T, C]`, good bool `[N]`) of the coded tiles at `starts` of `payload`, `sizes` bytes each; the
    patterns of tiles that are not good mean nothing."""
    decoded = packer.unpack(payload, starts, sizes, tokens, channels, layout)
    values = to_bits(decoded).reshape(len(starts), -1).contiguous()
    values[decoded.exact_tile, decoded.exact_position] = decoded.exact_bits.to(values.dtype)
    return values.reshape(-1, tokens, channels), decoded.good
