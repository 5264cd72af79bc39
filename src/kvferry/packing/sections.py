"""Tiles as rows of bytes: header and sections put together and taken apart (docs/format.md, "Coded tile")."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.packing.columns import Bases, Columns, Layout, bit_width

KIND_RAW = 0
KIND_CODED = 1
HEADER_BYTES = 16
SMALL_BITS = (0, 4, 8, 16, 32)
"""Widths of stored bases and classes, by their code in the header."""
MAX_BASE_CODE = 4
MAX_CLASS_CODE = 2


def pad4(num_bytes: Tensor) -> Tensor:
    return (num_bytes + 3) & -4


def little_endian(values: Tensor, num_bytes: int) -> Tensor:
    """int64 `[..., L]` as uint8 `[..., L * num_bytes]`."""
    shifts = torch.arange(0, 8 * num_bytes, 8, device=values.device)
    return ((values[..., None] >> shifts) & 255).to(torch.uint8).flatten(-2)


def from_little_endian(data: Tensor, num_bytes: int) -> Tensor:
    """uint8 `[..., L * num_bytes]` as non-negative int64 `[..., L]`."""
    parts = data.unflatten(-1, (-1, num_bytes)).long()
    shifts = torch.arange(0, 8 * num_bytes, 8, device=data.device)
    return torch.sum(parts << shifts, -1)


class RowWriter:
    """Sections of differing length, put one after another into N rows of bytes; each is padded to 4 bytes."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self._sections: list[tuple[Tensor, Tensor | None]] = []

    def append(self, section: Tensor, num_bytes: Tensor | None = None) -> None:
        """`section` uint8 `[N, L]`, of which row n holds the first `num_bytes[n]` (all L if None)."""
        self._sections.append((section, num_bytes))
        self.length = pad4(self.length + (section.shape[1] if num_bytes is None else num_bytes))

    def finish(self, capacity: int) -> Tensor:
        """The rows, uint8 `[N, L]`; what lies behind a row's length is undefined. Rows longer than `capacity` are cut
        off there."""
        longest = int(self.length.max()) if len(self.length) else 0
        # Bytes that are not wanted, or that lie behind the capacity, go to a spare last byte.
        spare = min(longest, capacity)
        data = torch.zeros(len(self.length), spare + 1, dtype=torch.uint8, device=self.length.device)
        at = torch.zeros_like(self.length)
        same = 0  # where the next section starts in every row, as long as that is the same in all
        for section, num_bytes in self._sections:
            width = section.shape[1]
            if num_bytes is None and same >= 0:
                data[:, same : min(same + width, spare)] = section[:, : max(0, spare - same)]
                same = (same + width + 3) & -4
                at += same - at
                continue
            same = -1
            place = torch.arange(width, device=section.device)
            index = at[:, None] + place
            if num_bytes is not None:
                index = torch.where(place < num_bytes[:, None], index, spare)
            data.scatter_(1, index.clamp(max=spare), section)
            at = pad4(at + (width if num_bytes is None else num_bytes))
        return data


class RowReader:
    """Reads sections of N rows, each somewhere in one buffer; what lies outside a row reads as 0 and marks it bad."""

    def __init__(self, payload: Tensor, starts: Tensor, sizes: Tensor) -> None:
        self.payload, self.starts, self.sizes = payload, starts, sizes
        self.at = torch.zeros_like(starts)
        self.good = torch.ones_like(starts, dtype=torch.bool)

    def take(self, num_bytes: Tensor | int) -> Tensor:
        """The next section of each row, uint8 `[N, L]`, zero behind a row's own `num_bytes` and in bad rows. L is
        `num_bytes` where that is one number (even if all rows are bad), else the most that a good row has."""
        width = num_bytes if isinstance(num_bytes, int) else None
        if isinstance(num_bytes, int):
            num_bytes = torch.full_like(self.starts, num_bytes)
        self.good &= (num_bytes >= 0) & (self.at + num_bytes <= self.sizes)
        num_bytes = torch.where(self.good, num_bytes, 0)
        if width is None:
            width = int(num_bytes.max()) if len(num_bytes) else 0
        place = torch.arange(width, device=self.payload.device)
        wanted = place < num_bytes[:, None]
        index = torch.where(wanted, (self.starts + self.at)[:, None] + place, 0)
        section = torch.where(wanted, self.payload[index], 0) if width else self.payload.new_zeros(len(self.starts), 0)
        self.at = pad4(self.at + num_bytes)
        return section

    def finish(self) -> Tensor:
        """Which rows were read to their exact end without a contradiction."""
        return self.good & (self.at == self.sizes)


def select(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The `wanted` of each row of `values` `[N, L]`, in order, at the row's start: `[N, most]` (0 behind), counts
    `[N]`."""
    count = wanted.sum(1)
    most = int(count.max()) if len(count) else 0
    out = values.new_zeros(len(count), most)
    row, place = wanted.nonzero(as_tuple=True)
    first = count.cumsum(0) - count
    out[row, torch.arange(len(row), device=row.device) - first[row]] = values[row, place]
    return out, count


def pack_small(values: Tensor, wanted: Tensor, max_code: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Store int64 `[N, G]` (those `wanted`) as offsets from their smallest.

    Returns (smallest `[N]`, width code `[N]`, bytes uint8 `[N, L]`, lengths `[N]`).
    """
    n, groups = values.shape
    if groups == 0:
        zero = torch.zeros(n, dtype=torch.int64, device=values.device)
        return zero, zero, torch.zeros(n, 0, dtype=torch.uint8, device=values.device), zero
    smallest = torch.where(wanted, values, torch.iinfo(torch.int64).max).amin(1)
    smallest = torch.where(wanted.any(1), smallest, 0)
    offset = torch.where(wanted, values - smallest[:, None], 0)
    need = bit_width(offset.amax(1))
    limits = torch.tensor(SMALL_BITS[: max_code + 1], device=values.device)
    code = torch.searchsorted(limits, need)
    count = wanted.sum(1)
    offset, _ = select(offset, wanted)
    groups = offset.shape[1]
    data = torch.zeros(n, groups * SMALL_BITS[max_code] // 8, dtype=torch.uint8, device=values.device)
    length = torch.zeros_like(count)
    for which in range(1, max_code + 1):
        rows = (code == which).nonzero().squeeze(1)
        if not len(rows):
            continue
        chosen = offset[rows]
        if SMALL_BITS[which] == 4:
            even = torch.nn.functional.pad(chosen, (0, groups % 2))
            packed = (even[:, 0::2] | even[:, 1::2] << 4).to(torch.uint8)
        else:
            packed = little_endian(chosen, SMALL_BITS[which] // 8)
        data[rows, : packed.shape[1]] = packed
        length[rows] = (count[rows] * SMALL_BITS[which] + 7) // 8
    return smallest, code, data, length


def small_bytes(count: Tensor, code: Tensor) -> Tensor:
    """Bytes of `count` stored values at width `code`."""
    bits = torch.tensor(SMALL_BITS, device=code.device)[code.clamp(0, len(SMALL_BITS) - 1)]
    return (count * bits + 7) // 8


def unpack_small(data: Tensor, code: Tensor, smallest: Tensor, wanted: Tensor) -> Tensor:
    """Inverse of `pack_small`: int64 `[N, G]`, 0 where not wanted."""
    n, groups = wanted.shape
    packed = torch.zeros(n, groups, dtype=torch.int64, device=data.device)
    for which in range(1, len(SMALL_BITS)):
        rows = (code == which).nonzero().squeeze(1)
        if not len(rows):
            continue
        need = (groups * SMALL_BITS[which] + 7) // 8
        chosen = torch.nn.functional.pad(data[rows], (0, max(0, need - data.shape[1])))[:, :need]
        if SMALL_BITS[which] == 4:
            values = torch.stack([chosen & 15, chosen >> 4], -1).flatten(1).long()[:, :groups]
        else:
            values = from_little_endian(chosen, SMALL_BITS[which] // 8)
        packed[rows] = values
    rank = (wanted.cumsum(1) - 1).clamp(min=0)
    return torch.where(wanted, packed.gather(1, rank) + smallest[:, None], 0)


@dataclass(frozen=True)
class TileHeader:
    """The 16 bytes before the sections, each field int64 `[N]` but `step` float32."""

    kind: Tensor
    base_code: Tensor
    class_code: Tensor
    class0: Tensor
    num_words: Tensor
    num_exact: Tensor
    base0: Tensor
    step: Tensor

    def pack(self) -> Tensor:
        small = [self.kind, self.base_code, self.class_code, self.class0]
        step_bits = self.step.contiguous().view(torch.int32).long()
        return torch.cat(
            [
                torch.stack(small, 1).to(torch.uint8),
                little_endian(torch.stack([self.num_words, self.num_exact], 1), 2),
                little_endian(torch.stack([self.base0, step_bits], 1), 4),
            ],
            dim=1,
        )

    @classmethod
    def unpack(cls, data: Tensor) -> "TileHeader":
        small = data[:, :4].long()
        words = from_little_endian(data[:, 4:8].contiguous(), 2)
        wide = from_little_endian(data[:, 8:16].contiguous(), 4).to(torch.int32)
        step = wide[:, 1].contiguous().view(torch.float32)
        kind, base_code, class_code, class0 = small.unbind(1)
        return cls(kind, base_code, class_code, class0, words[:, 0], words[:, 1], wide[:, 0].long(), step)


def append_exact(writer: RowWriter, columns: Columns, exact: Tensor, itemsize: int) -> None:
    """Append the positions and bits of the exactly stored values."""
    n = exact.shape[0]
    positions, count = select(torch.arange(exact[0].numel(), device=exact.device).expand(n, -1), exact.reshape(n, -1))
    writer.append(little_endian(positions, 2), 2 * count)
    bits = columns.bits.reshape(n, -1).gather(1, positions).long()
    writer.append(little_endian(bits, itemsize), itemsize * count)


def take_exact(reader: RowReader, count: Tensor, itemsize: int, num_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `append_exact`: (tile index, position, bits as int64), one entry per exact value of good rows."""
    positions = from_little_endian(reader.take(2 * count), 2)
    bits = from_little_endian(reader.take(itemsize * count), itemsize)
    stored = torch.arange(positions.shape[1], device=positions.device) < count[:, None]
    reader.good &= ~(stored & (positions >= num_values)).any(1)
    # Bad rows may disagree in width; they are dropped here.
    width = min(positions.shape[1], bits.shape[1])
    stored = stored[:, :width] & reader.good[:, None]
    tile = stored.nonzero()[:, 0]
    return tile, positions[:, :width][stored], bits[:, :width][stored]


def append_steps(writer: RowWriter, columns: Columns, layout: Layout) -> None:
    """Append each channel's step, where the layout has them."""
    if layout.channel_steps:
        writer.append(little_endian(columns.step.view(torch.int32).long() >> 16, 2))


def tile_header(
    columns: Columns,
    layout: Layout,
    base_code: Tensor,
    class_code: Tensor,
    class0: Tensor,
    num_words: Tensor,
    num_exact: Tensor,
    base0: Tensor,
) -> Tensor:
    """The header of each row, uint8 `[N, 16]`."""
    kind = torch.full_like(num_exact, KIND_CODED)
    step = torch.zeros_like(columns.step[:, 0]) if layout.channel_steps else columns.step
    return TileHeader(kind, base_code, class_code, class0, num_words, num_exact, base0, step).pack()


def take_planes_and_steps(
    reader: RowReader, layout: Layout, header: TileHeader, tokens: int, channels: int
) -> tuple[Tensor, Tensor]:
    """The two sections every packer shares: planes uint8 `[N, P, T, C]`, step float32 `[N]` or `[N, C]`."""
    n = len(reader.starts)
    planes = reader.take(layout.planes * tokens * channels)
    step = header.step
    if layout.channel_steps:
        upper = from_little_endian(reader.take(2 * channels), 2)
        step = (upper << 16).to(torch.int32).view(torch.float32)
    return planes.reshape(n, layout.planes, tokens, channels), step


def pack_classes(group_class: Tensor, has_base: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pack_small` of the classes `[N, G]`, with the mark of groups kept apart where the layout has it."""
    stored = 2 * group_class + has_base if layout.bases is Bases.APART else group_class
    return pack_small(stored, torch.ones_like(has_base), MAX_CLASS_CODE)


def take_classes_and_bases(reader: RowReader, layout: Layout, header: TileHeader, groups: int) -> tuple[Tensor, Tensor]:
    """Classes and bases (0 where a group has none), int64 `[N, G]`."""
    reader.good &= (header.kind == KIND_CODED) & (header.class_code <= MAX_CLASS_CODE)
    reader.good &= header.base_code <= MAX_BASE_CODE
    every = torch.ones(len(reader.starts), groups, dtype=torch.bool, device=reader.payload.device)
    data = reader.take(small_bytes(every.sum(1), header.class_code))
    stored = unpack_small(data, header.class_code, header.class0, every)
    apart = layout.bases is Bases.APART
    has_base = (stored & 1).bool() if apart else every if layout.bases is Bases.ALL else ~every
    data = reader.take(small_bytes(has_base.sum(1), header.base_code))
    base = unpack_small(data, header.base_code, header.base0, has_base)
    # Offsets are unsigned and bases i32: the sum wraps as the format's arithmetic does.
    return stored >> 1 if apart else stored, base.to(torch.int32).long()


def spread_bases(base: Tensor, tokens: int, layout: Layout, group_tokens: int) -> Tensor:
    """What the bases `[N, G*C]` (G groups along the tokens) take off each value, `[N, T, C]`: all values of a group, or
    only the first where groups are kept apart."""
    per_group: Tensor = base.unflatten(1, (-(-tokens // group_tokens), -1))
    if layout.bases is not Bases.APART:
        return per_group.repeat_interleave(group_tokens, 1)[:, :tokens]
    spread = torch.zeros(len(base), tokens, per_group.shape[2], dtype=torch.int64, device=base.device)
    spread[:, ::group_tokens] = per_group
    return spread
