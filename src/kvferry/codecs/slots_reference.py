"""Chunks into slots and back in plain PyTorch and NumPy, tiles by the same code as frames: what CPU tensors take, and
what the GPU's slots are compared with, byte for byte."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import BIT_DTYPES, as_bits
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.bounded import reference as bounded
from kvferry.codecs.bounded.steps import SAMPLED_TOKENS, tile_statistics
from kvferry.codecs.fitting import Fit
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.lossless import reference as lossless
from kvferry.codecs.tiles import BATCH_TILES, coded_values, impossible_tiles, raw_rows, raw_values, tile_rows
from kvferry.codecs.tiling import TILE_TOKENS, group_by_shape, raw_tile_bytes
from kvferry.format import slot
from kvferry.format.slot import SlotState, SlotStatus
from kvferry.packing import PACKERS, Packer
from kvferry.packing.columns import Columns, Decoded, Layout
from kvferry.packing.sections import KIND_CODED, KIND_RAW

if TYPE_CHECKING:
    from kvferry.codecs.slots import SlotCodec

TILES_AT_ONCE = 2048
"""Tiles of the chunks that are held as bytes at a time."""
_KIND_FIELDS = ("codec", "dtype", "packing", "mode", "relative_to", "num_tiles", "layout_digest", "tokens")
"""What a slot's header must share with that of the slots that are asked for."""


@dataclass(frozen=True)
class _Batch:
    """Tiles of one shape: number `tile` of chunk `chunk`, int64 `[N]` each."""

    tokens: int
    channels: int
    chunk: np.ndarray
    tile: np.ndarray

    def rows(self, which: np.ndarray) -> "_Batch":
        return _Batch(self.tokens, self.channels, self.chunk[which], self.tile[which])


class _Chunks:
    """The tiles of chunks, in the pages where they lie; `page_table` int64 `[chunks, chunk_pages]`."""

    def __init__(self, slot_codec: "SlotCodec", page_table: np.ndarray) -> None:
        self.kv, self.page_table = slot_codec.kv, page_table
        self.bits = [as_bits(line) for line in self.kv.lines]
        starts = np.arange(0, slot_codec.tokens, TILE_TOKENS)
        self.tokens = np.repeat(np.minimum(slot_codec.tokens - starts, TILE_TOKENS), self.kv.num_lines)
        self.channels = np.tile(np.array(self.kv.channels, dtype=np.int64), len(starts))

    def batches(self, wanted: np.ndarray) -> Iterator[_Batch]:
        """The tiles `wanted`, bool `[chunks, num_tiles]`, by shape; those of a line come together."""
        for tokens, channels, tiles in group_by_shape(self.tokens, self.channels):
            order = tiles[np.argsort(tiles % self.kv.num_lines, kind="stable")]
            place, chunk = wanted.T[order].nonzero()
            for part in np.split(np.arange(len(chunk)), range(BATCH_TILES, len(chunk), BATCH_TILES)):
                if len(part):
                    yield _Batch(tokens, channels, chunk[part], order[place[part]])

    def wanted(self) -> np.ndarray:
        """Which tiles have a token in a page that is not -1, bool `[chunks, num_tiles]`."""
        tokens = np.repeat(self.page_table >= 0, self.kv.page_tokens, axis=1)
        blocks = np.logical_or.reduceat(tokens, range(0, tokens.shape[1], TILE_TOKENS), axis=1)
        return np.repeat(blocks, self.kv.num_lines, axis=1)

    def _places(self, batch: _Batch) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Line by line, what of the `batch` is in pages that are not -1: (the line's bits `[pages, page_tokens,
        channels]`, where its tokens are in it: page and row; and in the batch: tile and token)."""
        lines = batch.tile % self.kv.num_lines
        token = batch.tile[:, None] // self.kv.num_lines * TILE_TOKENS + np.arange(batch.tokens)
        page = self.page_table[batch.chunk[:, None], token // self.kv.page_tokens]
        for line in np.unique(lines):
            tile, place = ((lines == line)[:, None] & (page >= 0)).nonzero()
            there = page[tile, place], token[tile, place] % self.kv.page_tokens
            yield self.bits[line], _pair(*there), _pair(tile, place)

    def gather(self, batch: _Batch) -> Tensor:
        """Bit patterns `[N, T, C]`, zeros for pages that are -1."""
        values = self.bits[0].new_zeros(len(batch.tile), batch.tokens, batch.channels)
        for bits, there, here in self._places(batch):
            values[here] = bits[there]
        return values

    def scatter(self, batch: _Batch, values: Tensor) -> None:
        """Write `values` `[N, T, C]`, but for pages that are -1."""
        for bits, there, here in self._places(batch):
            bits[there] = values[here]


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(first), torch.from_numpy(second)


def encode(slot_codec: "SlotCodec", page_table: Tensor, slots: Tensor, slot_index: Tensor, identities: Tensor) -> None:
    """`SlotCodec.encode` on the CPU."""
    tile_bounds: Tensor | None = getattr(slot_codec, "tile_bounds", None)
    pages, index = _checked(slot_codec, page_table, slots, slot_index)
    identity = identities.numpy().view(np.uint64)
    at_once = max(1, TILES_AT_ONCE // slot_codec.num_tiles)
    fits = [Fit(slot_codec.ladder) for _ in index]
    for start in range(0, len(index), at_once):
        todo = list(range(start, min(start + at_once, len(index))))
        while todo:
            level = fits[todo[0]].level
            some = np.array([chunk for chunk in todo if fits[chunk].level == level])
            header = slot_codec.header.repeat(len(some))
            header["identity"] = identity[some]
            bounds = None if tile_bounds is None else tile_bounds[torch.from_numpy(some)]
            own = [fits[chunk] for chunk in some]
            done = _encode_once(slot_codec, pages[some], slots.numpy(), index[some], header, bounds, own)
            todo = sorted(set(todo) - set(some[done].tolist()))


def _encode_once(
    slot_codec: "SlotCodec",
    page_table: np.ndarray,
    slots: np.ndarray,
    index: np.ndarray,
    header: np.ndarray,
    tile_bounds: Tensor | None,
    tries: Sequence[Fit],
) -> np.ndarray:
    """Try the chunks at the level that all of `tries` are at. Write those that this was the last try of, whether they
    fit or are rejected, and say which: bool `[chunks]`."""
    chunks = _Chunks(slot_codec, page_table)
    num_tiles, ladder, level = slot_codec.num_tiles, slot_codec.ladder, tries[0].level
    header["relaxed"] = 0 if ladder.searches else level
    sizes = np.zeros((len(index), num_tiles), dtype=np.int64)
    coded: list[tuple[_Batch, np.ndarray]] = []
    for batch in chunks.batches(np.ones_like(sizes, dtype=bool)):
        rows, length, bound = _tiles(slot_codec, batch, chunks.gather(batch), tile_bounds, ladder.factor(level))
        sizes[batch.chunk, batch.tile] = length
        np.maximum.at(header["bound_used"], batch.chunk, bound)
        coded.append((batch, rows))
    ends = np.cumsum(sizes, 1)
    room = slot_codec.slot_bytes - slot_codec.payload_at
    done = np.array([fit.tried(int(payload), room) for fit, payload in zip(tries, ends[:, -1], strict=True)])
    fits = done & (ends[:, -1] <= room)
    directory = np.zeros(sizes.shape, dtype=slot.DIRECTORY)
    directory["end"] = ends
    for batch, rows in coded:
        kept = np.flatnonzero(fits[batch.chunk])
        chunk, tile = batch.chunk[kept], batch.tile[kept]
        length, start = sizes[chunk, tile], (ends - sizes)[chunk, tile] + slot_codec.payload_at
        directory["checksum"][chunk, tile] = _checksums(rows[kept], header["identity"][chunk], tile, length)
        for row, number, at, size in zip(rows[kept], index[chunk], start, length, strict=True):
            slots[number, at : at + size] = row[:size]
    header["state"] = np.where(fits, SlotState.USABLE, SlotState.REJECTED)
    header["payload_bytes"] = ends[:, -1]
    slots[index[done], : slot.HEADER_BYTES] = slot.seal_headers(header[done])
    slots[index[fits], slot.HEADER_BYTES : slot_codec.payload_at] = directory[fits].view(np.uint8)
    return done


def _checksums(rows: np.ndarray, identity: np.ndarray, tile: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Checksums uint32 `[N]` of tiles whose bytes start `rows` uint8 `[N, L]`, L a multiple of 4."""
    rows = np.where(np.arange(rows.shape[1]) < size[:, None], rows, np.uint8(0))
    return slot.checksum(rows.view("<u4"), slot.tile_seeds(identity, tile, size))


def _tiles(
    slot_codec: "SlotCodec", batch: _Batch, bits: Tensor, tile_bounds: Tensor | None, looser: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of tile bytes uint8 `[N, L]`, sizes int64 `[N]`, largest bound of each tile float32 `[N]`) of bit patterns
    `[N, T, C]`."""
    coder = _coder(slot_codec)
    if coder is None:
        rows = raw_rows(bits)
        return rows.numpy(), np.full(len(bits), rows.shape[1]), np.zeros(len(bits), dtype=np.float32)
    columns, bound = _columns(slot_codec, batch, bits, tile_bounds, looser)
    rows, length = tile_rows(bits, columns, coder.layout, coder.packer)
    return rows.numpy(), length.numpy(), bound.numpy()


def _columns(
    slot_codec: "SlotCodec", batch: _Batch, bits: Tensor, tile_bounds: Tensor | None, looser: float
) -> tuple[Columns, Tensor]:
    """What the packer codes, and the largest bound of each tile, float32 `[N]`."""
    codec, dtype = slot_codec.codec, slot_codec.kv.dtype
    if not isinstance(codec, Bounded):
        return lossless.to_columns(bits, lossless.SPLITS[dtype]), torch.zeros(len(bits))
    values = bits.view(dtype)
    low, high, exponent_sum = tile_statistics(values.float(), ranges=codec.relative)
    sampled = torch.full_like(exponent_sum, -(-batch.tokens // SAMPLED_TOKENS) * batch.channels)
    absolute = slot_codec.bounds
    if absolute is not None:
        absolute = absolute[torch.from_numpy(batch.tile % slot_codec.kv.num_lines)]
    if tile_bounds is not None:
        absolute = tile_bounds[torch.from_numpy(batch.chunk), torch.from_numpy(batch.tile)]
    steps = codec.steps_from_statistics(low, high, exponent_sum, sampled, dtype, absolute=absolute, looser=looser)
    columns = bounded.to_columns(values, bits, steps, codec.mode, PACKERS[codec.packing].group_tokens)
    return columns, steps.bound.flatten(1).amax(1) if steps.bound.dim() == 2 else steps.bound


@dataclass(frozen=True)
class _Coder:
    """What stands between columns and tile bytes."""

    layout: Layout
    packer: Packer
    to_bits: Callable[[Decoded], Tensor]


def _coder(slot_codec: "SlotCodec") -> _Coder | None:
    """None where every tile is raw."""
    codec, dtype = slot_codec.codec, slot_codec.kv.dtype
    if isinstance(codec, Lossless):
        split = lossless.SPLITS[dtype]
        return _Coder(split.layout(), PACKERS[codec.packing], partial(lossless.to_bits, split=split))
    if isinstance(codec, Bounded):
        packer = PACKERS[codec.packing]
        layout = bounded.layout(dtype, codec.mode, codec.relative and codec.relative_to == "channel")
        to_bits = partial(bounded.to_bits, dtype=dtype, mode=codec.mode, group_tokens=packer.group_tokens)
        return _Coder(layout, packer, to_bits)
    return None


def decode(
    slot_codec: "SlotCodec",
    slots: Tensor,
    slot_index: Tensor,
    page_table: Tensor,
    identities: Tensor,
    status: Tensor,
) -> None:
    """`SlotCodec.decode` on the CPU."""
    pages, index = _checked(slot_codec, page_table, slots, slot_index)
    identity = identities.numpy().view(np.uint64)
    data = slots.numpy()
    header = slot.read_headers(data[index, : slot.HEADER_BYTES])
    other = np.any([header[name] != slot_codec.header[name] for name in _KIND_FIELDS], axis=0)
    result = np.select(
        [
            ~slot.are_headers(header),
            other,
            (header["identity"] != identity).any(1),
            header["state"] == SlotState.REJECTED,
        ],
        [SlotStatus.NO_SLOT, SlotStatus.OTHER_KIND, SlotStatus.OTHER_IDENTITY, SlotStatus.REJECTED],
        SlotStatus.GOOD,
    )
    readable = np.flatnonzero(result == SlotStatus.GOOD)
    at_once = max(1, TILES_AT_ONCE // slot_codec.num_tiles)
    for start in range(0, len(readable), at_once):
        some = readable[start : start + at_once]
        bad = _decode_some(slot_codec, data, index[some], header[some], pages[some])
        result[some[bad]] = SlotStatus.CORRUPT
    status.copy_(torch.from_numpy(result))


def _decode_some(
    slot_codec: "SlotCodec", slots: np.ndarray, index: np.ndarray, header: np.ndarray, page_table: np.ndarray
) -> np.ndarray:
    """Decode the tiles of slots `index`, whose headers are good; which chunks have bad tiles, bool `[chunks]`."""
    chunks = _Chunks(slot_codec, page_table)
    directory = np.ascontiguousarray(slots[index, slot.HEADER_BYTES : slot_codec.payload_at]).view(slot.DIRECTORY)
    end = directory["end"].astype(np.int64)
    start = np.pad(end[:, :-1], ((0, 0), (1, 0)))
    size = end - start
    payload = header["payload_bytes"].astype(np.int64)[:, None]
    raw_bytes = raw_tile_bytes(chunks.tokens * chunks.channels, slot_codec.kv.dtype.itemsize)
    sound = (payload <= slot_codec.slot_bytes - slot_codec.payload_at) & (end <= payload) & (start % 4 == 0)
    sound &= (size >= 4) & (size <= raw_bytes) & (size % 4 == 0)
    sound[:, -1] &= end[:, -1] == payload[:, 0]
    wanted = chunks.wanted()
    bad = wanted & ~sound
    flat = slots.reshape(-1)
    for batch in chunks.batches(wanted & sound):
        at = index[batch.chunk] * slot_codec.slot_bytes + slot_codec.payload_at + start[batch.chunk, batch.tile]
        length = size[batch.chunk, batch.tile]
        rows = flat[at[:, None] + np.minimum(np.arange(length.max()), length[:, None] - 1)]
        right = _checksums(rows, header["identity"][batch.chunk], batch.tile, length)
        good = right == directory["checksum"][batch.chunk, batch.tile]
        good &= ~impossible_tiles(rows[:, 0], length, raw_bytes[batch.tile])
        for kind in (KIND_RAW, KIND_CODED):
            some = np.flatnonzero(good & (rows[:, 0] == kind))
            if len(some):
                values, sane = _values(slot_codec, batch, rows[some], length[some], kind)
                good[some] = sane
                chunks.scatter(batch.rows(some[sane]), values[torch.from_numpy(sane)])
        bad[batch.chunk, batch.tile] = ~good
    return np.asarray(bad.any(1))


def _values(
    slot_codec: "SlotCodec", batch: _Batch, rows: np.ndarray, size: np.ndarray, kind: int
) -> tuple[Tensor, np.ndarray]:
    """(bit patterns `[N, T, C]`, which mean something, bool `[N]`) of tiles of the `batch`'s shape and of one `kind`,
    each the first `size` bytes of its row."""
    coder = _coder(slot_codec)
    payload, sizes = torch.from_numpy(rows.reshape(-1)), torch.from_numpy(size)
    starts = torch.arange(len(rows)) * rows.shape[1]
    dtype = BIT_DTYPES[slot_codec.kv.dtype.itemsize]
    if kind == KIND_RAW:
        return raw_values(payload, starts, batch.tokens, batch.channels, dtype), np.ones(len(rows), dtype=bool)
    if coder is None:
        return torch.empty(len(rows), batch.tokens, batch.channels, dtype=dtype), np.zeros(len(rows), dtype=bool)
    shape = batch.tokens, batch.channels
    values, good = coded_values(payload, starts, sizes, *shape, coder.layout, coder.packer, coder.to_bits)
    return values.to(dtype), good.numpy()


def _checked(
    slot_codec: "SlotCodec", page_table: Tensor, slots: Tensor, slot_index: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Page table and slot index as int64. Raises `ValueError` for those that do not exist."""
    pages, index = page_table.numpy().astype(np.int64), slot_index.numpy().astype(np.int64)
    wrong = pages[(pages < -1) | (pages >= slot_codec.kv.num_pages)]
    if len(wrong):
        raise ValueError(f"page_table holds {wrong[0]}; pages are 0 to {slot_codec.kv.num_pages - 1}, or -1 for none")
    wrong = index[(index < 0) | (index >= len(slots))]
    if len(wrong):
        raise ValueError(f"slot_index holds {wrong[0]}; slots are 0 to {len(slots) - 1}")
    return pages, index
