"""Chunks of paged KV cache into slots and back on a GPU: what `SlotCodec` calls. Nothing here waits or allocates more
than the encoder's scratch words."""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvferry.blocks import BIT_DTYPES
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.bounded.steps import round_down
from kvferry.codecs.fused import kernels
from kvferry.codecs.fused.kernels import DECODE, ENCODE, Case, SlotFacts, address
from kvferry.codecs.fused.tables import decoder_table, encoder_tables
from kvferry.device.nvrtc import POINTER
from kvferry.format.frame import MODES, PACKINGS

if TYPE_CHECKING:
    from kvferry.codecs.slots import SlotCodec

_ROWS_OF_A_TILE = 64
_LARGEST_PAGE = 896


@dataclass(frozen=True)
class _Prepared:
    """What all calls of a `SlotCodec` share."""

    case: Case
    facts: SlotFacts
    bounds: kernels.Bounds
    page_reciprocal: int

    @classmethod
    def of(cls, slot_codec: "SlotCodec") -> "_Prepared":
        header, kv, codec = slot_codec.header[0], slot_codec.kv, slot_codec.codec
        lanes = 0
        for channels in set(kv.channels):
            lanes |= 1 << ((channels + 31) // 32 - 1)
        case = Case(
            codec=codec.name,
            packing=PACKINGS[int(header["packing"])],
            mode=MODES[int(header["mode"])],
            # Values that are only moved need no dtype, only a size.
            dtype=BIT_DTYPES[kv.dtype.itemsize] if codec.name == "raw" else kv.dtype,
            channel_steps=isinstance(codec, Bounded) and codec.relative and codec.relative_to == "channel",
            lanes=lanes,
            paged=True,
        )
        kind = sum(int(header[name]) << 8 * place for place, name in enumerate(("codec", "dtype", "packing", "mode")))
        facts = SlotFacts(kind, int(header["relative_to"]), int(header["layout_digest"]), int(header["tokens"]))
        return cls(case, facts, _bounds(slot_codec), _page_reciprocal(kv.page_tokens))


_PREPARED: "WeakKeyDictionary[SlotCodec, _Prepared]" = WeakKeyDictionary()


def _prepared(slot_codec: "SlotCodec") -> _Prepared:
    prepared = _PREPARED.get(slot_codec)
    if prepared is None:
        prepared = _PREPARED[slot_codec] = _Prepared.of(slot_codec)
    return prepared


def _bounds(slot_codec: "SlotCodec") -> kernels.Bounds:
    codec = slot_codec.codec
    if not isinstance(codec, Bounded):
        return kernels.Bounds()
    if codec.relative:
        return kernels.Bounds(None, float(codec.error_bound), 0.0)
    bound = float(round_down(torch.tensor(codec.error_bound, dtype=torch.float64)))
    return kernels.Bounds(address(slot_codec.bounds), 0.0, bound)


def _page_reciprocal(page_tokens: int) -> int:
    """What replaces a division by `page_tokens` in the kernel; 0 where no tile crosses a page."""
    if page_tokens % _ROWS_OF_A_TILE == 0:
        return 0
    if page_tokens > _LARGEST_PAGE:
        raise ValueError(f"page_tokens={page_tokens}: above {_LARGEST_PAGE}, pages must hold a multiple of 64 tokens")
    return -(-(1 << 20) // page_tokens)


def _source(slot_codec: "SlotCodec", page_table: Tensor) -> kernels.Source:
    kv, tiles = slot_codec.kv, slot_codec.num_tiles
    return kernels.Source(
        lines=kv.kernel_lines.data_ptr(),
        pages=page_table.data_ptr(),
        num_lines=kv.num_lines,
        chunk_pages=slot_codec.chunk_pages,
        page_tokens=kv.page_tokens,
        page_reciprocal=_prepared(slot_codec).page_reciprocal,
        num_tiles=tiles * len(page_table),
        tiles_per_chunk=tiles,
    )


def encode(slot_codec: "SlotCodec", page_table: Tensor, slots: Tensor, slot_index: Tensor, identities: Tensor) -> None:
    """Queue the encoding on the current stream; `SlotCodec.encode` has checked the arguments."""
    prepared, device = _prepared(slot_codec), slot_codec.kv.device
    case = prepared.case
    with torch.cuda.device(device):
        source = _source(slot_codec, page_table)
        work = torch.zeros(kernels.work_words(len(page_table), source.num_tiles), dtype=torch.int32, device=device)
        loaded = kernels.load(case, ENCODE, device.index)
        scratch = loaded.scratch(device)
        sink = kernels.Sink(
            slots.data_ptr(),
            slot_codec.slot_bytes,
            slot_index.data_ptr(),
            identities.data_ptr(),
            None,
            work.data_ptr(),
            scratch.data_ptr(),
            prepared.facts,
            len(page_table),
            slot_codec.relaxations,
        )
        tables, radius = encoder_tables(case.one_sided, device)
        for retry in range(2 if slot_codec.relaxations else 1):
            loaded.launch(
                len(page_table) if retry else source.num_tiles,
                slot_codec.num_sms,
                (source, sink, prepared.bounds, tables.data_ptr(), radius.data_ptr(), retry),
                (None, None, None, POINTER, POINTER, ctypes.c_int32),
            )


def decode(
    slot_codec: "SlotCodec", slots: Tensor, slot_index: Tensor, page_table: Tensor, identities: Tensor, status: Tensor
) -> None:
    """Queue the decoding on the current stream; `SlotCodec.decode` has checked the arguments."""
    prepared, device = _prepared(slot_codec), slot_codec.kv.device
    case = prepared.case
    with torch.cuda.device(device):
        source = _source(slot_codec, page_table)
        status.zero_()
        data = kernels.Input(
            slots.data_ptr(),
            slot_codec.slot_bytes,
            slot_index.data_ptr(),
            identities.data_ptr(),
            None,
            None,
            status.data_ptr(),
            prepared.facts,
        )
        table = decoder_table(case.one_sided, device)
        kernels.load(case, DECODE, device.index).launch(
            source.num_tiles, slot_codec.num_sms, (source, data, table.data_ptr()), (None, None, POINTER)
        )
