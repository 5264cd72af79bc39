"""Chunks of paged KV cache into slots and back on a GPU: what `SlotCodec` calls. Nothing here waits; device memory is
allocated only when a stream meets its first call, or its first with so many chunks."""

import ctypes
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvferry.blocks import BIT_DTYPES
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.bounded.steps import round_down
from kvferry.codecs.fused import kernels
from kvferry.codecs.fused.kernels import CHUNKS, ENCODE, PAGES, RETRY, Case, Loaded, SlotFacts
from kvferry.codecs.fused.tables import decoder_table, encoder_tables
from kvferry.device.nvrtc import Arguments, current_stream_handle, make_current, zero_words
from kvferry.format.frame import MODES, PACKINGS

if TYPE_CHECKING:
    from kvferry.codecs.slots import SlotCodec

_ROWS_OF_A_TILE = 64


def encode(slot_codec: "SlotCodec", page_table: Tensor, slots: Tensor, slot_index: Tensor, identities: Tensor) -> None:
    """Queue the encoding on the current stream; `SlotCodec.encode` has checked the arguments."""
    prepared = _prepared(slot_codec)
    with make_current(prepared.device.index):
        prepared.encode(page_table, slots, slot_index, identities)


def decode(
    slot_codec: "SlotCodec", slots: Tensor, slot_index: Tensor, page_table: Tensor, identities: Tensor, status: Tensor
) -> None:
    """Queue the decoding on the current stream; `SlotCodec.decode` has checked the arguments."""
    prepared = _prepared(slot_codec)
    with make_current(prepared.device.index):
        zero_words(status.data_ptr(), status.shape[0], prepared.device.index)
        prepared.decode(slots, slot_index, page_table, identities, status)


class _Workspace:
    """What encoders on one stream use one after another: `scratch`, and `work` words that each call zeroes."""

    def __init__(self, device: torch.device) -> None:
        # Held from the zeroing to the last launch that uses it: threads may share a stream.
        self.lock = threading.Lock()
        self._device = device
        self.scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._work = torch.empty(0, dtype=torch.int32, device=device)

    def work(self, words: int, scratch_bytes: int) -> int:
        """The address of `words` zeros, valid until the next call."""
        if self.scratch.numel() < scratch_bytes:
            self.scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=self._device)
        if self._work.numel() < words:
            self._work = torch.empty(2 * words, dtype=torch.int32, device=self._device)
        address = self._work.data_ptr()
        zero_words(address, words, self._device.index)
        return address


_WORKSPACES: dict[tuple[int, int], _Workspace] = {}


def _workspace(device: torch.device) -> _Workspace:
    """The current stream's."""
    key = device.index, current_stream_handle(device.index)
    found = _WORKSPACES.get(key)
    if found is None:
        found = _WORKSPACES[key] = _Workspace(device)
    return found


@dataclass(frozen=True)
class _Prepared:
    """What all calls of a `SlotCodec` share: everything but the tensors of a call, ready to be launched."""

    case: Case
    device: torch.device
    num_sms: int | None
    source: kernels.Source
    sink: kernels.Sink
    bounds: kernels.Bounds

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
            places=CHUNKS if _tile_bounds(slot_codec) is not None else PAGES,
        )
        kind = sum(int(header[name]) << 8 * place for place, name in enumerate(("codec", "dtype", "packing", "mode")))
        facts = SlotFacts(kind, int(header["relative_to"]), int(header["layout_digest"]), int(header["tokens"]))
        source = kernels.Source(
            lines=kv.kernel_lines.data_ptr(),
            num_lines=kv.num_lines,
            chunk_pages=slot_codec.chunk_pages,
            page_tokens=kv.page_tokens,
            page_reciprocal=_page_reciprocal(kv.page_tokens),
            tiles_per_chunk=slot_codec.num_tiles,
        )
        steps = slot_codec.ladder
        ladder = kernels.Ladder(steps.levels, steps.searches, steps.first, steps.retries)
        sink = kernels.Sink(slot_bytes=slot_codec.slot_bytes, facts=facts, ladder=ladder)
        device = kv.device if kv.device.index is not None else torch.device("cuda", torch.cuda.current_device())
        return cls(case, device, slot_codec.num_sms, source, sink, _bounds(slot_codec))

    @cached_property
    def encoder(self) -> Loaded:
        return kernels.load(self.case, ENCODE, self.device.index)

    @cached_property
    def retrier(self) -> Loaded:
        return kernels.load(self.case, RETRY, self.device.index)

    @cached_property
    def decoders(self) -> tuple[Loaded, ...]:
        return kernels.load_decoders(self.case, self.device.index)

    @cached_property
    def tables(self) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]:
        """The encoder's, the classes' reach, the decoder's."""
        encoder, reach = encoder_tables(self.case.one_sided, self.device)
        pointers = (encoder.data_ptr(), reach.data_ptr(), decoder_table(self.case.one_sided, self.device).data_ptr())
        return ctypes.c_void_p(pointers[0]), ctypes.c_void_p(pointers[1]), ctypes.c_void_p(pointers[2])

    def encode(self, page_table: Tensor, slots: Tensor, slot_index: Tensor, identities: Tensor) -> None:
        chunks = page_table.shape[0]
        # A copy of its own for each call: threads share this object.
        source, sink = _copy(self.source), _copy(self.sink)
        source.pages = page_table.data_ptr()
        source.num_tiles = chunks * source.tiles_per_chunk
        sink.slots, sink.slot_index, sink.identities = slots.data_ptr(), slot_index.data_ptr(), identities.data_ptr()
        sink.num_chunks = chunks
        arguments = Arguments(source, sink, self.bounds, *self.tables[:2])
        workspace = _workspace(self.device)
        with workspace.lock:
            retries = sink.ladder.retries
            words = kernels.work_words(chunks, source.num_tiles, retries)
            scratch_bytes = max(each.scratch_bytes for each in (self.encoder, *([self.retrier] if retries else [])))
            sink.work = workspace.work(words, scratch_bytes)
            sink.scratch = workspace.scratch.data_ptr()
            self.encoder.launch(source.num_tiles, self.num_sms, arguments)
            if retries:
                self.retrier.launch(source.num_tiles, self.num_sms, arguments)

    def decode(self, slots: Tensor, slot_index: Tensor, page_table: Tensor, identities: Tensor, status: Tensor) -> None:
        source = _copy(self.source)
        source.pages = page_table.data_ptr()
        source.num_tiles = page_table.shape[0] * source.tiles_per_chunk
        data = kernels.Input(
            slots=slots.data_ptr(),
            slot_bytes=self.sink.slot_bytes,
            slot_index=slot_index.data_ptr(),
            identities=identities.data_ptr(),
            status=status.data_ptr(),
            facts=self.sink.facts,
        )
        decoder = min(self.decoders, key=lambda each: each.time(source.num_tiles, self.num_sms))
        decoder.launch(source.num_tiles, self.num_sms, Arguments(source, data, self.tables[2]))


_PREPARED: "WeakKeyDictionary[SlotCodec, _Prepared]" = WeakKeyDictionary()


def _prepared(slot_codec: "SlotCodec") -> _Prepared:
    prepared = _PREPARED.get(slot_codec)
    if prepared is None:
        prepared = _PREPARED[slot_codec] = _Prepared.of(slot_codec)
    return prepared


_Structure = TypeVar("_Structure", bound=ctypes.Structure)


def _copy(structure: _Structure) -> _Structure:
    return type(structure).from_buffer_copy(structure)


def _tile_bounds(slot_codec: "SlotCodec") -> Tensor | None:
    """Of `CoefficientSlots`, whose chunks lie one behind another."""
    found: Tensor | None = getattr(slot_codec, "tile_bounds", None)
    return found


def _bounds(slot_codec: "SlotCodec") -> kernels.Bounds:
    codec = slot_codec.codec
    if not isinstance(codec, Bounded):
        return kernels.Bounds()
    if codec.relative:
        return kernels.Bounds(None, float(codec.error_bound), 0.0)
    bound = float(round_down(torch.tensor(codec.error_bound, dtype=torch.float64)))
    tile_bounds = _tile_bounds(slot_codec)
    if tile_bounds is not None:
        return kernels.Bounds(tile_bounds.data_ptr(), 0.0, bound, 1)
    return kernels.Bounds(kernels.address(slot_codec.bounds), 0.0, bound)


def _page_reciprocal(page_tokens: int) -> int:
    """What replaces a division by `page_tokens` in the kernel; 0 where no tile crosses a page."""
    return 0 if page_tokens % _ROWS_OF_A_TILE == 0 else -(-(1 << 20) // page_tokens)
