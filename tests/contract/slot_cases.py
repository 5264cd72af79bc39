"""What slots are tested on: engines' memory in every layout, written down apart from `PagedKV`; slots taken apart as
docs/format.md says, without the package's help."""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvferry
from contract.cases import BITS, HAS_CUDA, MANTISSA, allowed_errors, bits_of, gaussian, with_specials
from kvferry import Bounded, Codec, Lossless, PagedKV, Raw, SlotCodec
from kvferry.format.frame import read_frame

_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
PLACES = ["cpu", pytest.param("cuda", marks=_GPU), pytest.param("cuda-pinned", marks=_GPU)]
"""Where the pages are; "cuda-pinned": the slots in host memory, which kernels read and write."""
LAYOUTS = ("heads_first", "mla", "strided", "kv_first", "kv_second", "heads_only", "plain")

TABLE = torch.tensor([[3, 1, 4, 0, 7], [8, 2, 6, 5, 9], [5, 5, 0, 8, 1]])
"""Pages of three chunks, of one block of tokens and a part of one. The third shares pages with the others, and has one
twice: that is for encoding; what decoding them at once leaves is undefined."""

# (offset, struct code) of a slot header's fields, from docs/format.md.
FIELDS = {
    "magic": (0, "4s"),
    "version": (4, "H"),
    "header_bytes": (6, "H"),
    "codec": (8, "B"),
    "dtype": (9, "B"),
    "packing": (10, "B"),
    "mode": (11, "B"),
    "state": (12, "B"),
    "relaxed": (13, "B"),
    "relative_to": (14, "B"),
    "reserved": (15, "B"),
    "num_tiles": (16, "I"),
    "payload_bytes": (20, "I"),
    "bound_used": (24, "f"),
    "layout_digest": (28, "I"),
    "identity0": (32, "Q"),
    "identity1": (40, "Q"),
    "tokens": (48, "I"),
    "reserved2": (52, "Q"),
    "checksum": (60, "I"),
}


def slot_codecs(error_bound: float = 0.0625, relative_bound: float = 0.01) -> list[Codec]:
    """Every codec that slots hold, with all its parameters."""
    found: list[Codec] = [Raw(), Lossless("ans"), Lossless("bitpack")]
    for mode in ("fixed", "plain", "outlier"):
        for packing in ("ans", "bitpack"):
            found.append(Bounded(error_bound, relative=False, mode=mode, packing=packing))
            found += [Bounded(relative_bound, True, to, mode, "token", packing) for to in ("tile", "channel")]
    return found


class Engine:
    """A serving engine's KV cache in one `layout`, all of its bytes 0xEE until something is written."""

    def __init__(
        self,
        layout: str,
        dtype: torch.dtype,
        *,
        layers: int = 2,
        heads: int = 2,
        pages: int = 10,
        page_tokens: int = 16,
        head_dim: int = 24,
        device: str = "cpu",
    ) -> None:
        self.memory: list[Tensor] = []
        self.views: list[Tensor] = []
        """`[K and V, heads, pages, page_tokens, head_dim]` of each layer, or of each tensor."""
        self.device = device
        tensors: list[Tensor] = []
        shape = {
            "heads_first": (pages, heads, page_tokens, 2 * head_dim),
            "mla": (pages, 1, page_tokens, head_dim),
            "strided": (pages, page_tokens, heads, 2 * head_dim + 3),
            "kv_first": (2, pages, page_tokens, heads, head_dim),
            "kv_second": (pages, 2, page_tokens, heads, head_dim),
            "heads_only": (pages, heads, page_tokens, head_dim),
            "plain": (heads, pages * page_tokens, head_dim),
        }[layout]
        for _ in range(2 * layers if layout in ("heads_only", "plain") else layers):
            count = torch.Size(shape).numel()
            self.memory.append(torch.full((count * dtype.itemsize,), 0xEE, dtype=torch.uint8, device=device))
            tensor = self.memory[-1].view(dtype).view(shape)
            if layout == "strided":
                tensor = tensor[..., : 2 * head_dim].permute(0, 2, 1, 3)
            tensors.append(tensor)
            if layout in ("heads_first", "mla", "strided"):
                view = tensor.unflatten(3, (-1, head_dim)).permute(3, 1, 0, 2, 4)
            elif layout == "kv_first":
                view = tensor.permute(0, 3, 1, 2, 4)
            elif layout == "kv_second":
                view = tensor.permute(1, 3, 0, 2, 4)
            elif layout == "heads_only":
                view = tensor.permute(1, 0, 2, 3)[None]
            else:
                view = tensor.unflatten(1, (pages, page_tokens))[None]
            self.views.append(view)
        if layout in ("heads_first", "mla", "strided"):
            self.kv = PagedKV.heads_first(tensors, head_dim)
        elif layout == "plain":
            self.kv = PagedKV.plain(tensors, page_tokens)
        else:
            self.kv = getattr(PagedKV, layout)(tensors)
        self.tensors = tensors

    def write(self, values: Tensor) -> "Engine":
        """Fill with `values` `[rows, pages, page_tokens, head_dim]`, a row being the K or V of a head of a layer."""
        for view, part in zip(self.views, values.split([v.shape[0] * v.shape[1] for v in self.views]), strict=True):
            view.copy_(part.view(view.shape))
        return self

    def read(self) -> Tensor:
        """What is there: bit patterns `[rows, pages, page_tokens, head_dim]` on the CPU."""
        return torch.cat([view.flatten(0, 1) for view in self.views]).contiguous().cpu().view(BITS[self.itemsize])

    @property
    def itemsize(self) -> int:
        return self.views[0].element_size()

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(view.shape[0] * view.shape[1] for view in self.views)
        return (rows, *self.views[0].shape[2:])


def chunk_rows(values: Tensor, pages: Tensor) -> Tensor:
    """A chunk's values `[rows, tokens, head_dim]` out of `[rows, pages, page_tokens, head_dim]`."""
    return values[:, pages.long()].flatten(1, 2)


def identities_of(count: int) -> Tensor:
    """Names of chunks, int64 `[count, 2]`, in one order; negative numbers (large u64) among them."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-(2**63), 2**63 - 1, (max(count, 64), 2), generator=generator)[:count]


def encode(slot_codec: SlotCodec, place: str, page_table: Tensor, slot_index: list[int] | None = None) -> Tensor:
    """Slots of the chunks of `page_table`, one after another unless `slot_index` says otherwise, on the CPU; bytes that
    nothing wrote are 0xEE."""
    device = slot_codec.kv.device
    index = list(range(len(page_table))) if slot_index is None else slot_index
    slots = torch.full((max(index) + 1, slot_codec.slot_bytes), 0xEE, dtype=torch.uint8)
    slots = slots.pin_memory() if place == "cuda-pinned" else slots.to(device)
    numbers = torch.tensor(index, dtype=torch.int32, device=device)
    identities = identities_of(len(page_table)).to(device)
    slot_codec.encode(page_table.int().to(device), slots, numbers, identities)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return slots.cpu()


def decode(
    slot_codec: SlotCodec, place: str, slots: Tensor, page_table: Tensor, slot_index: list[int] | None = None
) -> list[int]:
    """Decode into the pages of `slot_codec.kv`; the statuses."""
    device = slot_codec.kv.device
    index = list(range(len(page_table))) if slot_index is None else slot_index
    slots = slots.pin_memory() if place == "cuda-pinned" else slots.to(device)
    numbers = torch.tensor(index, dtype=torch.int32, device=device)
    identities = identities_of(len(page_table)).to(device)
    status = torch.full((len(page_table),), 77, dtype=torch.int32, device=device)
    slot_codec.decode(slots, numbers, page_table.int().to(device), identities, status)
    return list(status.tolist())


FAR = (300.0, 15000.0, 1e6)


def far_from_zero(shape: tuple[int, ...], far: float) -> Tensor:
    """float32 integers: noise around -`far`, 0 or `far`, by channel. In differences the first one counts, so that its
    channel has classes with many low bits, and little that varies."""
    generator = torch.Generator().manual_seed(5)
    centres = far * (torch.randint(3, (shape[0], 1, 1, shape[-1]), generator=generator) - 1)
    return centres + (30 * torch.randn(shape, generator=generator)).round()


NEAR_A_POWER = (0.25, 0.25 * (1 + 2**-12), 0.25 * (1 + 2**-9), 0.25 * (1 + 2**-7), 0.25 * (1 - 2**-10), 0.3)
"""Bounds on, next to and away from a power of two, which 16-bit floats hold or not."""


def between_codes(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> Tensor:
    """16-bit floats near codes, which are `2 * bound` apart. One in a hundred is within three units in the last place
    of the middle between two: whether the nearest code is within the bound hangs on how distances are rounded. Few, so
    that coders have no reason to look at all values more closely."""
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-20, 20, shape, generator=generator)
    middles = ((2 * codes + 1) * bound).to(dtype).view(torch.int16) + torch.randint(-3, 4, shape, generator=generator)
    chosen = torch.rand(shape, generator=generator) < 0.01
    return torch.where(chosen, middles.to(torch.int16).view(dtype), (2 * codes * bound).to(dtype))


def device_of(place: str) -> str:
    return place.partition("-")[0]


@dataclass(frozen=True)
class Parts:
    """A slot taken apart. `tiles` are empty where the chunk was rejected."""

    fields: dict[str, Any]
    checksums: tuple[int, ...]
    tiles: tuple[bytes, ...]
    used: bytes
    """The bytes that mean something."""


def take_apart(slot: Tensor) -> Parts:
    data = bytes(slot.numpy())
    fields = {name: struct.unpack_from("<" + code, data, at)[0] for name, (at, code) in FIELDS.items()}
    if fields["state"] == 2:
        return Parts(fields, (), (), data[:64])
    count = fields["num_tiles"]
    directory = struct.unpack_from(f"<{2 * count}I", data, 64)
    payload_at = 64 + 8 * count
    ends = directory[0::2]
    tiles = tuple(data[payload_at + a : payload_at + b] for a, b in zip((0, *ends[:-1]), ends, strict=True))
    return Parts(fields, directory[1::2], tiles, data[: payload_at + fields["payload_bytes"]])


def checksum(data: bytes, seed: int) -> int:
    """docs/format.md, "Checksum", word by word."""
    mask = (1 << 64) - 1
    total = seed & mask
    for i, (word,) in enumerate(struct.iter_unpack("<I", data)):
        total = (total + word * (((i * 0x9E3779B1 + 0x85EBCA77) % (1 << 32)) | 1)) & mask
    total ^= total >> 32
    total = total * 0xD6E8FEB86659FD93 & mask
    return (total ^ total >> 32) & 0xFFFFFFFF


def tile_seed(identity: tuple[int, int], tile: int, num_bytes: int) -> int:
    return (identity[0] + identity[1] * 0x9E3779B97F4A7C15 + (tile << 32) + num_bytes) % (1 << 64)


def seal(slot: Tensor) -> Tensor:
    """The slot with its header's checksum made right."""
    sealed = bytearray(bytes(slot.numpy()))
    sealed[60:64] = struct.pack("<I", checksum(bytes(sealed[:60]), 0))
    return torch.frombuffer(sealed, dtype=torch.uint8)


def with_fields(slot: Tensor, **fields: object) -> Tensor:
    """The slot with fields of the header overwritten, and the header's checksum made right."""
    changed = bytearray(bytes(slot.numpy()))
    for name, value in fields.items():
        at, code = FIELDS[name]
        struct.pack_into("<" + code, changed, at, value)
    return seal(torch.frombuffer(changed, dtype=torch.uint8))


def frame_tiles(rows: Tensor, codec: Codec, bounds: list[float] | None = None) -> list[bytes]:
    """The tiles of a chunk's `rows` `[rows, tokens, head_dim]` as frames have them, in the order of slots.

    `bounds`: the absolute bound of each line.
    """
    lines: list[list[bytes]] = []
    for row in rows:
        segments = -(-row.shape[1] // 128)
        share = -(-row.shape[1] // segments)
        width = min(128, -(-share // 16) * 16)
        for start in range(0, row.shape[1], width):
            part = row[:, start : start + width]
            mine = codec
            if bounds is not None:
                assert isinstance(codec, Bounded)
                mine = Bounded(bounds[len(lines)], False, mode=codec.mode, packing=codec.packing)
            lines.append(_tiles_of_frame(part, mine))
    return [tile for block in zip(*lines, strict=True) for tile in block]


def _tiles_of_frame(part: Tensor, codec: Codec) -> list[bytes]:
    if isinstance(codec, Raw):
        blocks = (block.contiguous().view(torch.uint8).numpy().tobytes() for block in part.split(64))
        return [bytes(4) + data + bytes(-len(data) % 4) for data in blocks]
    frame = read_frame(kvferry.compress(part, codec))
    ends = np.cumsum(frame.sizes)
    return [bytes(frame.payload[end - size : end]) for end, size in zip(ends, frame.sizes, strict=True)]


@cache
def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Unit noise around means of each channel's own, special values strewn over it."""
    return with_specials(gaussian(shape, dtype, seed))[0]


def specials_of(values: Tensor) -> Tensor:
    """NaN, infinities, zeros, denormals: what must come back bit for bit. bool, on the CPU."""
    bits = bits_of(values).long() & ((1 << (8 * values.element_size() - 1)) - 1)
    field = ((1 << (8 * values.element_size() - 1)) - 1) >> MANTISSA[values.dtype]
    exponent = bits >> MANTISSA[values.dtype]
    return (exponent == 0) | (exponent == field)


def assert_kept(rows: Tensor, back: Tensor, codec: Codec, relaxed: int, bounds: list[float] | None = None) -> None:
    """What `codec` promises about a chunk's `rows` `[rows, tokens, head_dim]`, of which `back` is bits."""
    if not isinstance(codec, Bounded):
        assert torch.equal(back, bits_of(rows))
        return
    special = specials_of(rows)
    assert torch.equal(back[special], bits_of(rows)[special]), "NaN, infinity, zero or denormal altered"
    delivered = back.view(rows.dtype).double()
    for number, (row, result) in enumerate(zip(rows, delivered, strict=True)):
        allowed = allowed_errors(row, codec) if bounds is None else torch.full(row.shape, bounds[number]).double()
        finite = row.isfinite()
        error = (result - row.double()).abs()[finite]
        assert not error.isnan().any()
        assert not (error > allowed[finite] * 2.0**relaxed).any(), f"off by {error.max()}, relaxed {relaxed}"


def poison_of(read: Tensor) -> Tensor:
    """What an `Engine`'s memory is before anything is written, as one value like those of `read()`."""
    return torch.full((1,), 0xEE, dtype=torch.uint8).repeat(read.element_size()).view(read.dtype)


def absolute_codec(codec: Codec, slots: Tensor) -> tuple[Codec, int]:
    """For pages out of a chunk: the range that a bound is relative to was the chunk's, an absolute bound stays."""
    if isinstance(codec, Bounded) and codec.relative:
        bound = max(take_apart(slot).fields["bound_used"] for slot in slots)
        return Bounded(bound, False, mode=codec.mode, packing=codec.packing), 0
    return codec, 0
