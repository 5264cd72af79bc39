"""Slots of transform coefficients: `SlotCodec` with `Transform`.

Pages become coefficients in memory of this module's (float16, a row for each group's vector, pages as the cache has
them), and those go into slots, and come out of them, as `bounded` values would. A block of 64 tokens of a group in
which a value has no coefficients keeps the bits of its values in their place, coded at a bound so small that they are
stored as they are; a line of marks, one channel a group, says which blocks those are.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.bounded.steps import round_down
from kvferry.codecs.checks import gpu_kernels
from kvferry.codecs.slots import CoefficientSlots, SlotCodec, coded_channels
from kvferry.codecs.tiling import TILE_TOKENS, channel_segments
from kvferry.codecs.transform import COEFFICIENTS, Transform, coefficient_coder, reference
from kvferry.codecs.transform.profile import SIDES
from kvferry.codecs.transform.reference import Angles, Matrices
from kvferry.device.nvrtc import current_stream_handle
from kvferry.format.slot import SlotStatus
from kvferry.pages import PagedKV

if TYPE_CHECKING:
    from types import ModuleType

MARK = 30000.0
"""What marks a block whose values are stored as they are; delivered within 0.5 times the error bound of that."""
MARKED_ABOVE = 15000.0
EXACT_BOUND = 2.0**-120
"""A bound at which everything is stored as it is, even when doubled as often as may be."""
MOST_SCRATCH_BYTES = 512 << 20
"""Of coefficients at a time: more chunks are coded one part after another."""


@dataclass(frozen=True, eq=False)
class Scratch:
    """Coefficients of up to `chunks` chunks, and the codec that puts them into slots."""

    chunks: int
    vectors: list[Tensor]
    """Of each group of each layer's K, V: `[pages, page_tokens, n]`."""
    marks: Tensor
    """`[pages, page_tokens, at least as many channels as there are vectors]`."""
    slots: CoefficientSlots
    pages: Tensor
    """int32 `[chunks, chunk_pages]`: page j of chunk i of the coefficients."""
    no_positions: Tensor
    """Zeros, int32 `[chunks]`."""

    @classmethod
    def of(cls, outer: SlotCodec, chunks: int) -> "Scratch":
        kv, codec = outer.kv, cast(Transform, outer.codec)
        pages, profile = chunks * outer.chunk_pages, codec.profile
        groups, pieces = 2 * len(profile.layers) * profile.groups, channel_segments(profile.n)
        width = pieces[0][1]

        def rows(channels: int) -> Tensor:
            return torch.zeros(pages, kv.page_tokens, channels, dtype=COEFFICIENTS, device=kv.device)

        vectors, marks = (
            [rows(profile.n) for _ in range(groups)],
            rows(sum(coded_channels(kv, codec)) - groups * profile.n),
        )
        lines = [vector[:, :, start : start + piece] for vector in vectors for start, piece in pieces]
        lines += marks.split(width, 2)
        tile_bounds = torch.zeros(chunks, outer.num_tiles, dtype=torch.float32, device=kv.device)
        slots = CoefficientSlots(
            PagedKV(tuple(lines)),
            coefficient_coder(codec.error_bound if codec.ratio is None else 1.0, codec.packing),
            outer.chunk_pages,
            outer.slot_bytes,
            outer.on_overflow,
            outer.max_relaxations,
            num_sms=outer.num_sms,
            tile_bounds=tile_bounds,
            outer=outer,
        )
        numbers = torch.arange(pages, dtype=torch.int32, device=kv.device).view(chunks, -1)
        return cls(chunks, vectors, marks, slots, numbers, torch.zeros(chunks, dtype=torch.int32, device=kv.device))

    @property
    def part_lines(self) -> int:
        """Lines that a vector is cut into."""
        return len(channel_segments(self.vectors[0].shape[2]))

    @property
    def bound(self) -> float:
        """What a coefficient may be off, in steps; a float32."""
        codec = cast(Bounded, self.slots.codec)
        return float(round_down(torch.tensor(codec.error_bound, dtype=torch.float64)))

    @property
    def tile_bounds(self) -> Tensor:
        assert self.slots.tile_bounds is not None
        return self.slots.tile_bounds


class Workspace:
    """What a `SlotCodec` with `Transform` uses on each stream."""

    def __init__(self, outer: SlotCodec) -> None:
        self.outer = outer
        self._scratch: dict[int, Scratch] = {}

    @property
    def most_chunks(self) -> int:
        """Chunks that are coded at a time."""
        return max(1, MOST_SCRATCH_BYTES // (self.outer.chunk_pages * self.outer.kv.page_bytes))

    def scratch(self, chunks: int) -> Scratch:
        """The current stream's, for at least `chunks` chunks."""
        device = self.outer.kv.device
        stream = 0
        if device.type == "cuda":
            stream = current_stream_handle(torch.cuda.current_device() if device.index is None else device.index)
        found = self._scratch.get(stream)
        if found is None or found.chunks < chunks:
            found = self._scratch[stream] = Scratch.of(self.outer, chunks)
        return found

    @cached_property
    def parts(self) -> list[tuple[int, str, Matrices]]:
        """(layer, side, matrices) in the order of the lines, on the CPU."""
        profile = cast(Transform, self.outer.codec).profile
        return [
            (layer, side, Matrices.of(profile.side(layer, side), self.outer.kv.device))
            for layer in range(len(profile.layers))
            for side in SIDES
        ]

    @cached_property
    def kernels(self) -> "ModuleType":
        return gpu_kernels("transform")


_WORKSPACES: "WeakKeyDictionary[SlotCodec, Workspace]" = WeakKeyDictionary()


def _workspace(outer: SlotCodec) -> Workspace:
    found = _WORKSPACES.get(outer)
    if found is None:
        found = _WORKSPACES[outer] = Workspace(outer)
    return found


def encode(
    outer: SlotCodec,
    page_table: Tensor,
    slots: Tensor,
    slot_index: Tensor,
    identities: Tensor,
    positions: Tensor | None,
) -> None:
    """`SlotCodec.encode` with `Transform`."""
    space = _workspace(outer)
    for part in _parts(len(slot_index), space.most_chunks):
        table = page_table[part]
        scratch = space.scratch(len(table))
        at = scratch.no_positions[: len(table)] if positions is None else positions[part]
        if outer.kv.device.type == "cuda":
            space.kernels.forward(outer, scratch, table, at)
        else:
            _forward(space, scratch, table, at)
        scratch.slots.encode(_coded_pages(outer, scratch, table), slots, slot_index[part], identities[part])


def decode(
    outer: SlotCodec,
    slots: Tensor,
    slot_index: Tensor,
    page_table: Tensor,
    identities: Tensor,
    status: Tensor,
    positions: Tensor | None,
) -> None:
    """`SlotCodec.decode` with `Transform`."""
    space = _workspace(outer)
    for part in _parts(len(slot_index), space.most_chunks):
        table = page_table[part]
        scratch = space.scratch(len(table))
        at = scratch.no_positions[: len(table)] if positions is None else positions[part]
        pages = _coded_pages(outer, scratch, table)
        scratch.slots.decode(slots, slot_index[part], pages, identities[part], status[part])
        if outer.kv.device.type == "cuda":
            space.kernels.inverse(outer, scratch, table, at, status[part])
        else:
            _inverse(space, scratch, table, at, status[part])


def _parts(chunks: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, chunks)) for start in range(0, chunks, at_once)]


def _coded_pages(outer: SlotCodec, scratch: Scratch, page_table: Tensor) -> Tensor:
    """The coefficients' pages, -1 where the cache's are. On a GPU, the cache's: kernels know that coefficients lie
    chunk after chunk (zeros where a page is missing), and ask only whether there is a page."""
    if outer.kv.device.type == "cuda":
        return page_table
    return torch.where(page_table < 0, -1, scratch.pages[: len(page_table)])


# -- on the CPU -------------------------------------------------------------------------------------------------------


def _token_positions(outer: SlotCodec, positions: Tensor) -> Tensor:
    """Position of each token of each chunk, `[chunks * tokens]`."""
    each = positions[:, None].long() + torch.arange(outer.tokens)
    return each.clamp(0, outer.max_positions - 1).flatten()


def _forward(space: Workspace, scratch: Scratch, page_table: Tensor, positions: Tensor) -> None:
    """Fill the scratch's coefficients, marks and bounds from the pages."""
    outer, chunks = space.outer, len(page_table)
    profile = cast(Transform, outer.codec).profile
    lines_each = outer.kv.num_lines // len(space.parts)
    blocks = -(-outer.tokens // TILE_TOKENS)
    token_positions = _token_positions(outer, positions)
    there = (page_table >= 0).repeat_interleave(outer.kv.page_tokens, 1)  # [chunks, tokens]
    bound = torch.tensor(scratch.bound)
    bounds = scratch.tile_bounds[:chunks].view(chunks, blocks, -1)
    bounds.fill_(scratch.bound)
    exact = torch.tensor(EXACT_BOUND)
    marks = scratch.marks.view(scratch.chunks, outer.tokens, -1)[:chunks]
    for number, (_, side, matrices) in enumerate(space.parts):
        lines = outer.kv.lines[number * lines_each : (number + 1) * lines_each]
        gathered = torch.cat([_gather(line, page_table) for line in lines], 2).view(chunks, outer.tokens, -1)
        values = gathered.view(chunks * outer.tokens, profile.heads, -1).transpose(0, 1)
        coefficients, bad = reference.forward(values, matrices, Angles.of(profile, side, token_positions))
        coded = as_bits(coefficients.transpose(0, 1).reshape(chunks, outer.tokens, -1))
        for group in range(profile.groups):
            at, own = number * profile.groups + group, slice(group * profile.n, (group + 1) * profile.n)
            special = _blocks(bad[group].view(chunks, outer.tokens) & there)  # [chunks, blocks]
            per_token = special.repeat_interleave(TILE_TOKENS, 1)[:, : outer.tokens, None]
            target = as_bits(scratch.vectors[at]).view(scratch.chunks, outer.tokens, -1)
            target[:chunks] = torch.where(per_token, as_bits(gathered)[..., own], coded[..., own])
            bounds[:, :, at * scratch.part_lines : (at + 1) * scratch.part_lines] = torch.where(special, exact, bound)[
                ..., None
            ]
            marks[..., at] = torch.where(per_token[..., 0], MARK, 0.0)


def _inverse(space: Workspace, scratch: Scratch, page_table: Tensor, positions: Tensor, status: Tensor) -> None:
    """Fill the pages of chunks whose status is good from the scratch's coefficients."""
    outer = space.outer
    profile = cast(Transform, outer.codec).profile
    lines_each = outer.kv.num_lines // len(space.parts)
    good = (status == SlotStatus.GOOD).nonzero().flatten()
    if not len(good):
        return
    table = page_table[good]
    own = scratch.pages[good]
    token_positions = _token_positions(outer, positions[good])
    marked = _gather(scratch.marks, own).view(len(good), outer.tokens, -1) > MARKED_ABOVE
    for number, (_, side, matrices) in enumerate(space.parts):
        groups = range(number * profile.groups, (number + 1) * profile.groups)
        coded = torch.cat([_gather(scratch.vectors[at], own).view(len(good), outer.tokens, -1) for at in groups], 2)
        rows = coded.view(len(good) * outer.tokens, profile.heads, -1).transpose(0, 1)
        rows = torch.where(rows.isfinite(), rows, 0.0)
        values = reference.inverse(rows, matrices, Angles.of(profile, side, token_positions), outer.kv.dtype)
        flat = as_bits(values.transpose(0, 1).reshape(len(good), outer.tokens, -1))
        special = marked[..., list(groups)].repeat_interleave(profile.n, 2)
        bits = torch.where(special, as_bits(coded), flat)
        at = 0
        for line in outer.kv.lines[number * lines_each : (number + 1) * lines_each]:
            _scatter(line, table, bits[:, :, at : at + line.shape[2]])
            at += line.shape[2]


def _blocks(bad: Tensor) -> Tensor:
    """Which blocks of 64 tokens have a bad one: bool `[chunks, blocks]` of `[chunks, tokens]`."""
    padded = torch.nn.functional.pad(bad, (0, -bad.shape[1] % TILE_TOKENS))
    found: Tensor = padded.unflatten(1, (-1, TILE_TOKENS)).any(2)
    return found


def _gather(line: Tensor, page_table: Tensor) -> Tensor:
    """The pages of `line` that `page_table` `[chunks, pages]` names, zeros for -1: `[chunks*pages, page_tokens, C]`."""
    pages = page_table.flatten().long()
    # By their bits: NaN keep their payloads.
    bits = torch.where(pages[:, None, None] < 0, 0, as_bits(line)[pages.clamp(min=0)])
    return bits.contiguous().view(line.dtype)


def _scatter(line: Tensor, page_table: Tensor, bits: Tensor) -> None:
    """Write `bits` `[chunks, tokens, C]` into the pages that are not -1."""
    pages = page_table.flatten().long()
    there = pages >= 0
    as_bits(line)[pages[there]] = bits.reshape(len(pages), line.shape[1], -1)[there].to(as_bits(line).dtype)
