"""Tensors to tiles to payload and back, by the reference packers: what `lossless` and `bounded` share on the CPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.codecs.tiling import TilePlan, count_tiles, gather_tiles, plan_tensor, scatter_tiles
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
    raw_bytes = plan.raw_bytes(bits.element_size())
    coded: list[tuple[np.ndarray, Tensor]] = []
    for tokens, channels, tiles in plan.groups():
        for batch in np.split(tiles, range(BATCH_TILES, len(tiles), BATCH_TILES)):
            values = gather_tiles(bits, plan, batch, tokens, channels)
            capacity = int(raw_bytes[batch[0]])
            rows, length = packer.pack(to_columns(values, batch), layout, capacity)
            raw = length >= capacity
            length = torch.where(raw, capacity, length)
            if bool(raw.any()):
                rows = torch.nn.functional.pad(rows, (0, max(0, capacity - rows.shape[1])))
                rows[raw, :capacity] = _raw_rows(values[raw], capacity)
            sizes[batch] = length.numpy()
            coded.append((batch, rows[:, : int(length.max())]))
    starts = np.cumsum(sizes) - sizes
    payload = np.empty(int(sizes.sum()), dtype=np.uint8)
    for batch, rows in coded:
        for tile, row in zip(batch, rows.numpy(), strict=True):
            payload[starts[tile] : starts[tile] + sizes[tile]] = row[: sizes[tile]]
    return sizes, torch.from_numpy(payload)


def _raw_rows(values: Tensor, capacity: int) -> Tensor:
    rows = torch.zeros(len(values), capacity, dtype=torch.uint8)
    rows[:, 0] = KIND_RAW
    data = values.flatten(1).contiguous().view(torch.uint8)
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
    raw_bytes = plan.raw_bytes(bits.element_size())
    wrong = (
        ((kind == KIND_RAW) & (sizes != raw_bytes))
        | ((kind == KIND_CODED) & (sizes >= raw_bytes))
        | (kind > KIND_CODED)
    )
    if wrong.any():
        raise CorruptFrame(f"tile {int(np.flatnonzero(wrong)[0])} has an impossible kind or size")
    for tokens, channels, tiles in plan.groups():
        for batch in np.split(tiles, range(BATCH_TILES, len(tiles), BATCH_TILES)):
            raw, coded = batch[kind[batch] == KIND_RAW], batch[kind[batch] == KIND_CODED]
            if len(raw):
                place = torch.arange(tokens * channels * bits.element_size())
                data = payload[torch.from_numpy(starts[raw])[:, None] + 4 + place].contiguous()
                scatter_tiles(bits, plan, raw, data.view(bits.dtype).reshape(-1, tokens, channels))
            if len(coded):
                at, length = torch.from_numpy(starts[coded]), torch.from_numpy(sizes[coded])
                decoded = packer.unpack(payload, at, length, tokens, channels, layout)
                if not bool(decoded.good.all()):
                    bad = int(coded[int((~decoded.good).nonzero()[0])])
                    raise CorruptFrame(f"the sections of tile {bad} contradict its header")
                values = to_bits(decoded).reshape(len(coded), -1).contiguous()
                values[decoded.exact_tile, decoded.exact_position] = decoded.exact_bits.to(values.dtype)
                scatter_tiles(bits, plan, coded, values.reshape(-1, tokens, channels))
