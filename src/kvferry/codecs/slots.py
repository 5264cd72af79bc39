"""Chunks of paged KV cache into slots and back: what a host store of fixed-size slots is filled by and read through
(docs/format.md, "Slot")."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from math import ceil, isfinite
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kvferry.codecs import slots_reference
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.bounded.steps import LARGEST_BOUND
from kvferry.codecs.checks import gpu_kernels, one_of
from kvferry.codecs.fitting import SEARCH, Ladder
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.codecs.tiling import TILE_TOKENS, channel_segments, raw_tile_bytes
from kvferry.codecs.transform import Transform, coefficient_coder
from kvferry.errors import ProfileMismatch
from kvferry.format.frame import MODES, PACKINGS, RELATIVE_TO
from kvferry.format.slot import CODECS, DIRECTORY_BYTES, HEADER, HEADER_BYTES, dtype_code
from kvferry.pages import PagedKV

ON_OVERFLOW = ("relax", "reject")
SLOT_STEP = 16
"""Slots lie so many bytes apart, or a multiple of it: kernels read and write 16 bytes at a time."""
MOST_RELAXATIONS = 64
_LARGEST_ODD_PAGE = 896
"""Tokens of a page that kernels divide by exactly (common.cu, page_reciprocal), where tiles cross pages."""
_ROUND_TO = 512
_MOST_PAYLOAD_BYTES = (1 << 32) - 1
MOST_TRANSFORM_RELAXATIONS, MOST_TRANSFORM_BOUND = 12, 16384.0
"""More often doubled, the bounds of blocks without coefficients would no longer be exact; larger bounds (in steps of
the profile) would swallow the marks of those blocks (transform/slots.py)."""
_SMALLEST_TILE_BYTES = 4


@dataclass(frozen=True, eq=False)
class SlotCodec:
    """How chunks of `chunk_pages` pages of `kv` become slots of `slot_bytes` (a multiple of 16) and back; validated
    once, and good for any number of calls.

    `codec`: `Raw`, `Lossless`, `Bounded` in token grouping with an absolute bound or one relative to the "tile" or the
    "channel", or `Transform` for all layers of its profile, whose K and V `kv` holds in order (with `max_positions` of
    tokens that RoPE has angles for; what lies behind is turned as the last one). `on_overflow` says what becomes of a
    chunk that does not fit: "relax" doubles the error bounds of all its tiles, as few times as needed and at most
    `max_relaxations` times (0 to 64); if that is not enough, or with "reject", or where the codec is exact, the slot
    says that the chunk was rejected. A `Transform` to a `ratio` has a fixed rate instead, the slot's size (which
    `slot_bytes_for` makes of a ratio): each chunk takes the smallest bound of `fitting.SCALES` that a few tries find to
    fit. `bounds` float32 `[num_lines]` on kv's device stands in for an absolute `error_bound`, line by line. `num_sms`:
    how much of a GPU may be used (None: all).

    Raises `ValueError` (`TypeError` for another type) for anything else.
    """

    kv: PagedKV
    codec: Codec
    chunk_pages: int
    slot_bytes: int
    on_overflow: str = "relax"
    max_relaxations: int = 8
    bounds: Tensor | None = None
    num_sms: int | None = None
    max_positions: int = 1 << 15

    def __post_init__(self) -> None:
        if self.kv.device.type not in ("cpu", "cuda"):
            raise ValueError(f"the pages are on {self.kv.device}; slots take pages on the CPU or a CUDA device")
        page_tokens = self.kv.page_tokens
        if self.kv.device.type == "cuda" and page_tokens > _LARGEST_ODD_PAGE and page_tokens % TILE_TOKENS:
            raise ValueError(
                f"page_tokens={page_tokens}: on a GPU, pages of more than {_LARGEST_ODD_PAGE} tokens must hold a "
                f"multiple of {TILE_TOKENS}; take smaller pages"
            )
        _check_codec(self.kv, self.codec)
        _check_chunk(self.kv, self.chunk_pages)
        one_of("on_overflow", self.on_overflow, ON_OVERFLOW)
        if not 0 <= self.max_relaxations <= MOST_RELAXATIONS:
            raise ValueError(f"max_relaxations={self.max_relaxations} must be 0 to {MOST_RELAXATIONS}")
        if isinstance(self.codec, Transform) and self.codec.ratio is None:
            check_transform_bounds(self.codec.error_bound, self.ladder.levels - 1)
        if self.max_positions < 1:
            raise ValueError(f"max_positions={self.max_positions} must be at least 1: the model's longest context")
        if self.num_sms is not None and self.num_sms < 1:
            raise ValueError(f"num_sms={self.num_sms} must be at least 1, or None for all of the GPU")
        if self.bounds is not None:
            self._check_bounds(self.bounds)
        self._check_slot_bytes()

    def _check_bounds(self, bounds: Tensor) -> None:
        if not isinstance(self.codec, Bounded) or self.codec.relative:
            raise ValueError(
                f"bounds go with an absolute bound, not with {self.codec}: use Bounded(..., relative=False)"
            )
        expected = (self.kv.num_lines,)
        if bounds.dtype != torch.float32 or tuple(bounds.shape) != expected or bounds.device != self.kv.device:
            raise ValueError(
                f"bounds is {bounds.dtype} {tuple(bounds.shape)} on {bounds.device}; pass float32 {expected} on "
                f"{self.kv.device}"
            )
        wrong = bounds[~((bounds > 0) & (bounds <= LARGEST_BOUND))]
        if len(wrong):
            raise ValueError(f"bounds holds {float(wrong[0])}; error bounds are above 0 and at most {LARGEST_BOUND}")
        object.__setattr__(self, "bounds", bounds.contiguous())

    def _check_slot_bytes(self) -> None:
        if self.slot_bytes % SLOT_STEP:
            raise ValueError(f"slot_bytes={self.slot_bytes} is no multiple of {SLOT_STEP}; slot_bytes_for() makes one")
        need = self.payload_at + _SMALLEST_TILE_BYTES * self.num_tiles
        if isinstance(self.codec, Raw):
            need = self.payload_at + _raw_payload_bytes(self.kv, self.codec, self.chunk_pages)
        if self.slot_bytes < need:
            raise ValueError(
                f"slot_bytes={self.slot_bytes} is too small: no chunk of {self.num_tiles} tiles fits into fewer than "
                f"{need}; take slot_bytes_for() or fewer chunk_pages"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_pages * self.kv.page_tokens

    @property
    def num_tiles(self) -> int:
        """Tiles of a chunk: tile `block*num_lines + line` is tokens `64*block` and on of a line (of `Transform`: of a
        line of coefficients, or of marks behind those)."""
        return _num_tiles(self.kv, self.codec, self.chunk_pages)

    @property
    def payload_at(self) -> int:
        """Where a slot's tiles start: behind header and directory."""
        return HEADER_BYTES + DIRECTORY_BYTES * self.num_tiles

    @cached_property
    def ladder(self) -> Ladder:
        """The bounds that a chunk may be tried at."""
        if isinstance(self.codec, Transform) and self.codec.ratio is not None:
            return SEARCH
        lossy = isinstance(self.codec, (Bounded, Transform))
        return Ladder(1 + (self.max_relaxations if self.on_overflow == "relax" and lossy else 0))

    @cached_property
    def header(self) -> np.ndarray:
        """What the headers of all slots share: `HEADER` records `[1]`, the other fields 0."""
        record = np.zeros(1, dtype=HEADER)
        codec = self.codec
        record["codec"] = CODECS.index(codec.name)
        record["dtype"] = dtype_code(self.kv.dtype)
        record["packing"] = PACKINGS.index(codec.packing) if isinstance(codec, (Lossless, Bounded, Transform)) else 0
        if isinstance(codec, Bounded):
            record["mode"] = MODES.index(codec.mode)
            record["relative_to"] = RELATIVE_TO.index(codec.relative_to) if codec.relative else 0
        record["num_tiles"] = self.num_tiles
        record["layout_digest"] = self.kv.layout_digest
        if isinstance(codec, Transform):
            record["mode"] = MODES.index(coefficient_coder(1.0).mode)
            record["layout_digest"] ^= int(codec.profile.digest[:8], 16)
        record["tokens"] = self.tokens
        record.flags.writeable = False
        return record

    def encode(
        self,
        page_table: Tensor,
        slots: Tensor,
        slot_index: Tensor,
        identities: Tensor,
        positions: Tensor | None = None,
    ) -> None:
        """Write chunk i, the pages `page_table[i]` (zeros where that is -1), into slot `slot_index[i]` of `slots`.

        `page_table` int32 `[chunks, chunk_pages]`, `slot_index` int32 `[chunks]` (each slot once), `identities` int64
        `[chunks, 2]` (the bits of two u64 that name the chunk), all contiguous on kv's device; `slots` uint8
        `[num_slots, slot_bytes]`, contiguous, on kv's device or, for CUDA, in pinned host memory. On a GPU nothing
        waits: the work is queued on the current stream.

        `positions` int32 `[chunks]` on kv's device, for `Transform`: where each chunk's first token is in its sequence
        (None: at 0). Decoding needs the same.

        No data make it fail: what does not fit is relaxed or rejected, and the slot's header says so. Raises
        `ValueError` for tensors that are not so; on the CPU also for pages and slots that do not exist (on a GPU such
        reads and writes are undefined).
        """
        self._check_call(page_table, slots, slot_index, identities, positions)
        if not len(slot_index):
            return
        if isinstance(self.codec, Transform):
            transform_slots().encode(self, page_table, slots, slot_index, identities, positions)
        elif self.kv.device.type == "cuda":
            gpu_kernels("slots").encode(self, page_table, slots, slot_index, identities)
        else:
            slots_reference.encode(self, page_table, slots, slot_index, identities)

    def decode(
        self,
        slots: Tensor,
        slot_index: Tensor,
        page_table: Tensor,
        identities: Tensor,
        status: Tensor,
        positions: Tensor | None = None,
    ) -> None:
        """Write what slot `slot_index[i]` holds into the pages `page_table[i]`, leaving out places that are -1, and
        what came of it into `status[i]` (int32 `[chunks]`): a `kvferry.format.slot.SlotStatus`.

        The other arguments as for `encode`. The pages of a chunk whose status is 1 to 4 are untouched; with 5, the
        values of the tiles that are bad are (with `Transform`, all). Tiles without a page that is wanted are not looked
        at. Raises as `encode` does, never for what slots hold.
        """
        self._check_call(page_table, slots, slot_index, identities, positions)
        _check_tensor("status", status, torch.int32, (len(slot_index),), self.kv.device)
        if not len(slot_index):
            return
        if isinstance(self.codec, Transform):
            transform_slots().decode(self, slots, slot_index, page_table, identities, status, positions)
        elif self.kv.device.type == "cuda":
            gpu_kernels("slots").decode(self, slots, slot_index, page_table, identities, status)
        else:
            slots_reference.decode(self, slots, slot_index, page_table, identities, status)

    def _check_call(
        self, page_table: Tensor, slots: Tensor, slot_index: Tensor, identities: Tensor, positions: Tensor | None
    ) -> None:
        device, chunks = self.kv.device, len(page_table)
        _check_tensor("page_table", page_table, torch.int32, (chunks, self.chunk_pages), device)
        _check_tensor("slot_index", slot_index, torch.int32, (chunks,), device)
        _check_tensor("identities", identities, torch.int64, (chunks, 2), device)
        if positions is not None:
            _check_tensor("positions", positions, torch.int32, (chunks,), device)
        on_host = device.type == "cuda" and slots.device.type == "cpu"
        _check_tensor("slots", slots, torch.uint8, (len(slots), self.slot_bytes), slots.device if on_host else device)
        if on_host and not slots.is_pinned():
            raise ValueError("slots is host memory that a GPU cannot reach: allocate it with pin_memory=True")


@dataclass(frozen=True, eq=False)
class CoefficientSlots(SlotCodec):
    """Slots of a transform's coefficients: coded as `bounded`, each tile at a bound of its own (`tile_bounds` float32
    `[chunks, num_tiles]`, refilled by each call), with headers that say what they are."""

    tile_bounds: Tensor | None = None
    outer: SlotCodec | None = None

    @cached_property
    def ladder(self) -> Ladder:
        assert self.outer is not None
        return self.outer.ladder

    @cached_property
    def header(self) -> np.ndarray:
        assert self.outer is not None
        return self.outer.header


def check_transform_bounds(error_bound: float, relaxations: int) -> None:
    """Raise `ValueError` for bounds of `Transform` at which blocks without coefficients would not survive in slots."""
    if relaxations > MOST_TRANSFORM_RELAXATIONS:
        raise ValueError(f"max_relaxations={relaxations} must be 0 to {MOST_TRANSFORM_RELAXATIONS} with Transform")
    if error_bound * 2.0**relaxations > MOST_TRANSFORM_BOUND:
        raise ValueError(
            f"error_bound={error_bound:g}, doubled up to {relaxations} times, is above {MOST_TRANSFORM_BOUND:g} steps "
            "of the profile: take a smaller error_bound, or fewer max_relaxations"
        )


def encode_into_slots(
    kv: PagedKV,
    codec: Codec,
    page_table: Tensor,
    slots: Tensor,
    slot_index: Tensor,
    identities: Tensor,
    *,
    on_overflow: str = "relax",
    max_relaxations: int = 8,
    bounds: Tensor | None = None,
    num_sms: int | None = None,
    positions: Tensor | None = None,
) -> None:
    """`SlotCodec(...).encode(...)` once: chunk_pages and slot_bytes are those of `page_table` and `slots`."""
    slot_codec = SlotCodec(
        kv, codec, page_table.shape[-1], slots.shape[-1], on_overflow, max_relaxations, bounds, num_sms
    )
    slot_codec.encode(page_table, slots, slot_index, identities, positions)


def decode_from_slots(
    kv: PagedKV,
    codec: Codec,
    slots: Tensor,
    slot_index: Tensor,
    page_table: Tensor,
    identities: Tensor,
    *,
    num_sms: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """`SlotCodec(...).decode(...)` once; returns the status of each chunk, int32 `[chunks]` on kv's device."""
    slot_codec = SlotCodec(kv, codec, page_table.shape[-1], slots.shape[-1], num_sms=num_sms)
    status = torch.zeros(len(page_table), dtype=torch.int32, device=kv.device)
    slot_codec.decode(slots, slot_index, page_table, identities, status, positions)
    return status


def slot_bytes_for(kv: PagedKV, codec: Codec, chunk_pages: int, ratio: float) -> int:
    """Bytes of a slot that holds a chunk which compresses at `ratio` (raw bytes over encoded bytes, header and
    directory counted), rounded up to 512; never more than `raw_slot_bytes`, which is what `Raw` needs."""
    _check_codec(kv, codec)
    if not (isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio={ratio} must be a finite number above 0, such as 2.0")
    most = raw_slot_bytes(kv, chunk_pages, codec)
    if isinstance(codec, Raw):
        return most
    least = HEADER_BYTES + (DIRECTORY_BYTES + _SMALLEST_TILE_BYTES) * _num_tiles(kv, codec, chunk_pages)
    return min(most, _round_up(max(least, ceil(chunk_pages * kv.page_bytes / ratio))))


def raw_slot_bytes(kv: PagedKV, chunk_pages: int, codec: Codec | None = None) -> int:
    """Bytes of a slot into which any chunk fits, whatever the codec (but `Transform`, which needs to be given);
    rounded up to 512."""
    codec = codec or Raw()
    _check_chunk(kv, chunk_pages)
    overhead = HEADER_BYTES + DIRECTORY_BYTES * _num_tiles(kv, codec, chunk_pages)
    return _round_up(overhead + _raw_payload_bytes(kv, codec, chunk_pages))


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ROUND_TO) * _ROUND_TO


def coded_channels(kv: PagedKV, codec: Codec) -> tuple[int, ...]:
    """Channels of each line that is coded: the cache's; of `Transform`, those of each group's vector of coefficients,
    cut as rows are, and behind them those that mark blocks."""
    if not isinstance(codec, Transform):
        return kv.channels
    profile = codec.profile
    vector = [width for _, width in channel_segments(profile.n)]
    groups = 2 * len(profile.layers) * profile.groups
    # As wide as the others, though most of their channels mark nothing: warps that code lines of one width share code.
    return (*vector * groups, *vector[:1] * -(-groups // vector[0]))


def _num_tiles(kv: PagedKV, codec: Codec, chunk_pages: int) -> int:
    return -(-chunk_pages * kv.page_tokens // TILE_TOKENS) * len(coded_channels(kv, codec))


def _raw_payload_bytes(kv: PagedKV, codec: Codec, chunk_pages: int) -> int:
    """Bytes of a chunk's tiles if all are raw."""
    blocks, rest = divmod(chunk_pages * kv.page_tokens, TILE_TOKENS)
    channels = np.array(coded_channels(kv, codec), dtype=np.int64)
    whole, last = (raw_tile_bytes(tokens * channels, kv.dtype.itemsize).sum() for tokens in (TILE_TOKENS, rest))
    return int(blocks * whole + (last if rest else 0))


def _check_chunk(kv: PagedKV, chunk_pages: int) -> None:
    if chunk_pages < 1:
        raise ValueError(f"chunk_pages={chunk_pages} must be at least 1")
    if _raw_payload_bytes(kv, Raw(), chunk_pages) > _MOST_PAYLOAD_BYTES:
        raise ValueError(
            f"a chunk of {chunk_pages} pages has {chunk_pages * kv.page_bytes} bytes, a slot holds less than 4 GiB: "
            "take fewer chunk_pages"
        )


def _check_codec(kv: PagedKV, codec: Codec) -> None:
    """Raise unless slots can hold what `codec` makes of `kv`."""
    if not isinstance(codec, Codec):
        raise TypeError(f"codec is a {type(codec).__name__}; pass a codec object such as kvferry.Lossless()")
    if type(codec) not in (Raw, Lossless, Bounded, Transform):
        raise ValueError(f"slots do not hold the codec {codec.name!r}: use kvferry.Raw, Lossless, Bounded or Transform")
    if kv.is_opaque:
        if not isinstance(codec, Raw):
            raise ValueError(f"the pages are opaque bytes, which {codec.name!r} does not take: use kvferry.Raw()")
    elif kv.dtype not in codec.dtypes:
        raise ValueError(f"{codec.name!r} does not take pages of {kv.dtype}: use kvferry.Lossless() or Raw()")
    if isinstance(codec, Transform):
        _check_transform(kv, codec)
    if isinstance(codec, Bounded):
        if codec.grouping != "token":
            raise ValueError(f"grouping={codec.grouping!r} has no meaning in pages: use grouping='token'")
        if codec.relative and codec.relative_to == "tensor":
            raise ValueError(
                "relative_to='tensor' would read the whole chunk before its first tile is coded: use "
                "relative_to='tile' or 'channel', or an absolute bound (relative=False)"
            )


def _check_transform(kv: PagedKV, codec: Transform) -> None:
    profile = codec.profile
    if codec.layer is not None:
        raise ValueError(f"the Transform is for layer {codec.layer} alone: leave out layer and side for a whole cache")
    head = [width for _, width in channel_segments(profile.head_dim)]
    if list(kv.channels) != 2 * len(profile.layers) * profile.heads * head:
        raise ProfileMismatch(
            f"the cache has {kv.num_lines} lines, of {sorted(set(kv.channels))} channels; the profile is of "
            f"{len(profile.layers)} layers with {profile.heads} heads of {profile.head_dim} each: use the model's own"
        )
    each = len(kv.lines) // (2 * len(profile.layers))
    strides = [line.stride()[:2] for line in kv.lines]
    if any(len(set(strides[start : start + each])) > 1 for start in range(0, len(strides), each)):
        raise ValueError("the heads of a layer are not laid out alike: Transform takes views of one tensor a layer")
    if kv.device.type == "cuda" and (profile.head_dim % 16 or profile.rope.rotary_dim % 16):
        raise ValueError(
            f"head_dim={profile.head_dim} and rotary_dim={profile.rope.rotary_dim}: on a GPU, Transform takes "
            "multiples of 16"
        )


def transform_slots() -> ModuleType:
    """What codes slots of `Transform`; it stands on this module."""
    return import_module("kvferry.codecs.transform.slots")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.device == device and tensor.is_contiguous():
        return
    raise ValueError(
        f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        f"{'' if tensor.is_contiguous() else ', not contiguous'}; pass contiguous {dtype} {shape} on {device}"
    )
