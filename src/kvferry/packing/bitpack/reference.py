"""The `bitpack` packer in plain PyTorch: each group of 32 tokens at the smallest width that holds it (cuSZp's
fixed-length coding: Y. Huang et al., "cuSZp: An Ultra-Fast GPU Error-Bounded Lossy Compression Framework", SC 2023,
section 4.2)."""

import torch
from torch import Tensor

from kvferry.packing import dense, sections
from kvferry.packing.columns import Bases, Columns, Decoded, Layout, bit_width
from kvferry.packing.sections import RowReader, RowWriter, TileHeader

GROUP_TOKENS = 32
MAX_WIDTH = 32
_APART_BITS = 16
"""What a base is taken to cost when deciding whether a first value is kept apart."""

_BEYOND = 1 << 40
"""Above any value; `pad` takes its fill as a float64, which must hold it."""


def zigzag(values: Tensor) -> Tensor:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...; int64."""
    return (values << 1) ^ (values >> 63)


def unzigzag(values: Tensor) -> Tensor:
    return (values >> 1) ^ -(values & 1)


def _grouped(values: Tensor, fill: int) -> Tensor:
    """`[N, T, C]` as `[N, G, 32, C]`, the last group filled up."""
    tokens = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, 0, 0, -tokens % GROUP_TOKENS), value=fill)
    return padded.reshape(len(values), -1, GROUP_TOKENS, values.shape[2])


def pack(columns: Columns, layout: Layout, capacity: int) -> tuple[Tensor, Tensor]:
    """Coded tiles: rows uint8 `[N, L]` and their sizes int64 `[N]` (rows above `capacity` are cut off)."""
    values = columns.values.long()
    n, tokens, _ = values.shape
    base, width, has_base = _choose(values, layout)
    rest = values - sections.spread_bases(base, tokens, layout, GROUP_TOKENS)
    unsigned = rest if layout.bases is Bases.ALL else zigzag(rest)
    base0, base_code, base_data, base_bytes = sections.pack_small(base, has_base, sections.MAX_BASE_CODE)
    class0, class_code, class_data, class_bytes = sections.pack_classes(width, has_base, layout)
    groups = -(-tokens // GROUP_TOKENS)
    low_data, low_bytes = dense.pack(unsigned, width.unflatten(1, (groups, -1)), GROUP_TOKENS)

    num_exact = columns.exact.sum((1, 2))
    num_words = torch.zeros_like(num_exact)
    writer = RowWriter(n, values.device)
    writer.append(sections.tile_header(columns, layout, base_code, class_code, class0, num_words, num_exact, base0))
    writer.append(columns.planes.flatten(1))
    sections.append_steps(writer, columns, layout)
    writer.append(class_data, class_bytes)
    writer.append(base_data, base_bytes)
    writer.append(low_data, low_bytes)
    sections.append_exact(writer, columns, columns.exact, layout.itemsize)
    return writer.finish(capacity), writer.length


def _choose(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(base, width, which groups store a base), each `[N, G*C]`."""
    if layout.bases is Bases.ALL:
        low = _grouped(values, _BEYOND).amin(2)
        high = _grouped(values, -_BEYOND).amax(2)
        return low.flatten(1), bit_width(high - low).flatten(1), torch.ones_like(low, dtype=torch.bool).flatten(1)
    unsigned = _grouped(zigzag(values), 0)
    whole = bit_width(unsigned.amax(2))
    if layout.bases is Bases.NONE:
        return (
            torch.zeros_like(whole).flatten(1),
            whole.flatten(1),
            torch.zeros_like(whole, dtype=torch.bool).flatten(1),
        )
    without = bit_width(unsigned[:, :, 1:].amax(2))
    length = dense.group_lengths(values.shape[1], GROUP_TOKENS, values.device)
    keep = (whole - without) * length[None, :, None] > _APART_BITS
    base = torch.where(keep, values[:, ::GROUP_TOKENS], 0)
    return base.flatten(1), torch.where(keep, without, whole).flatten(1), keep.flatten(1)


def unpack(payload: Tensor, starts: Tensor, sizes: Tensor, tokens: int, channels: int, layout: Layout) -> Decoded:
    """Inverse of `pack` for coded tiles at `starts` (int64 `[N]`) of `payload`, `sizes` bytes each."""
    groups = -(-tokens // GROUP_TOKENS)
    reader = RowReader(payload, starts, sizes)
    header = TileHeader.unpack(reader.take(sections.HEADER_BYTES))
    planes, step = sections.take_planes_and_steps(reader, layout, header, tokens, channels)
    width, base = sections.take_classes_and_bases(reader, layout, header, groups * channels)
    reader.good &= (width <= MAX_WIDTH).all(1) & (header.num_words == 0)
    width = torch.where(reader.good[:, None], width, 0).unflatten(1, (groups, channels))
    length = dense.group_lengths(tokens, GROUP_TOKENS, payload.device)
    low_data = reader.take(4 * dense.stream_words(width, length).flatten(1).sum(1))
    unsigned = dense.unpack(low_data, width, tokens, GROUP_TOKENS)
    exact = sections.take_exact(reader, header.num_exact, layout.itemsize, tokens * channels)
    rest = unsigned if layout.bases is Bases.ALL else unzigzag(unsigned)
    values = rest + sections.spread_bases(base, tokens, layout, GROUP_TOKENS)
    return Decoded(values, planes, step, *exact, reader.finish())
