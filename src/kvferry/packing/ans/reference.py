"""The `ans` packer in plain PyTorch: reads like docs/format.md, vectorised over tiles and lanes."""

import torch
from torch import Tensor

from kvferry.packing import dense, sections
from kvferry.packing.ans import classes
from kvferry.packing.ans.tables import MAX_CLASS, PROB_BITS, PROB_SCALE, STATE_LOW, family, split_class
from kvferry.packing.columns import Bases, Columns, Decoded, Layout
from kvferry.packing.sections import RowReader, RowWriter, TileHeader

LANES = 32
GROUP_TOKENS = 64
"""All tokens of a tile: a channel is one group."""


def lanes_of(channels: int) -> tuple[int, int]:
    """(channels a lane, lanes in use)."""
    per_lane = -(-channels // LANES)
    return per_lane, -(-channels // per_lane)


def pack(columns: Columns, layout: Layout, capacity: int) -> tuple[Tensor, Tensor]:
    """Coded tiles: rows uint8 `[N, L]` and their sizes int64 `[N]` (rows above `capacity` are cut off)."""
    values = columns.values.long()
    n, tokens, _ = values.shape
    tables = family(layout.one_sided)
    base, scale_class, has_base = _choose(columns, layout)
    table, shift = _table_and_shift(scale_class, layout)
    half = _half(shift, layout)
    residual = values - sections.spread_bases(base << _base_shift(layout), tokens, layout, GROUP_TOKENS) + half[:, None]
    symbol = residual >> shift[:, None]
    low = residual & ((1 << shift) - 1)[:, None]
    column = symbol + tables.origin[table][:, None]
    missing = (column < 0) | (column >= tables.size[table][:, None])
    column = torch.where(missing, tables.origin[table][:, None], column)
    exact = columns.exact | missing

    table_of = table[:, None].expand_as(column)
    states, words, num_words = _encode(tables.freq[table_of, column], tables.cum[table_of, column])
    base0, base_code, base_data, base_bytes = sections.pack_small(base, has_base, sections.MAX_BASE_CODE)
    class0, class_code, class_data, class_bytes = sections.pack_classes(scale_class, has_base, layout)
    low_data, low_bytes = dense.pack(low, shift[:, None], GROUP_TOKENS)

    num_exact = exact.sum((1, 2))
    writer = RowWriter(n, values.device)
    writer.append(sections.tile_header(columns, layout, base_code, class_code, class0, num_words, num_exact, base0))
    writer.append(sections.little_endian(states, 4))
    writer.append(columns.planes.flatten(1))
    sections.append_steps(writer, columns, layout)
    writer.append(class_data, class_bytes)
    writer.append(base_data, base_bytes)
    writer.append(low_data, low_bytes)
    writer.append(sections.little_endian(words, 2), 2 * num_words)
    sections.append_exact(writer, columns, exact, layout.itemsize)
    return writer.finish(capacity), writer.length


def _choose(columns: Columns, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(base, class, which channels store a base), each `[N, C]`."""
    values = columns.values.long()
    if layout.one_sided:
        exponent = -(values >> layout.low_bits)
        largest = exponent.amax(1)
        scale_class = classes.exponents(largest[:, None] - exponent, largest)
        return -largest, scale_class, torch.ones_like(largest, dtype=torch.bool)
    if layout.bases is Bases.ALL:
        base, scale_class = classes.sparing(columns.estimate.long())
        return base, scale_class, torch.ones_like(base, dtype=torch.bool)
    if layout.bases is Bases.NONE:
        scale_class = classes.differences(values)
        return torch.zeros_like(scale_class), scale_class, torch.zeros_like(scale_class, dtype=torch.bool)
    scale_class, keep = classes.apart(values)
    return torch.where(keep, values[:, 0], 0), scale_class, keep


def _table_and_shift(scale_class: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    if layout.one_sided:
        return scale_class, torch.full_like(scale_class, layout.low_bits)
    return split_class(scale_class)


def _base_shift(layout: Layout) -> int:
    """One-sided bases are exponents, above the low bits of `values`."""
    return layout.low_bits if layout.one_sided else 0


def _half(shift: Tensor, layout: Layout) -> Tensor:
    """What makes the shift round: two-sided symbols are centred on 0."""
    return torch.zeros_like(shift) if layout.one_sided else (1 << shift) >> 1


def _by_pair(values: Tensor, fill: int) -> Tensor:
    """`[N, T, C]` in coding order: `[pairs, 2, N, A]`, `fill` where a lane has no channel or a pair no second step."""
    n, tokens, channels = values.shape
    per_lane, lanes = lanes_of(channels)
    padded = torch.nn.functional.pad(values, (0, per_lane * lanes - channels), value=fill)
    steps = padded.reshape(n, tokens, lanes, per_lane).permute(1, 3, 0, 2).reshape(tokens * per_lane, n, lanes)
    steps = torch.nn.functional.pad(steps, (0, 0, 0, 0, 0, len(steps) % 2), value=fill)
    return steps.reshape(-1, 2, n, lanes).contiguous()


def _encode(freq: Tensor, cum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rANS over symbols given by frequency and cumulative frequency `[N, T, C]`: states `[N, A]`, words `[N, most]`,
    counts."""
    freq, cum = _by_pair(freq, PROB_SCALE), _by_pair(cum, 0)  # a whole-range symbol leaves the state as it is
    state = torch.full_like(freq[0, 0], STATE_LOW)
    emitted = torch.zeros_like(freq[:, 0])
    needed = torch.zeros_like(emitted, dtype=torch.bool)
    for pair in range(len(freq) - 1, -1, -1):
        full = state >> 16 >= freq[pair, 0] * freq[pair, 1]
        needed[pair], emitted[pair] = full, state & 0xFFFF
        state = torch.where(full, state >> 16, state)
        for f, c in ((freq[pair, 1], cum[pair, 1]), (freq[pair, 0], cum[pair, 0])):
            quotient = torch.div(state, f, rounding_mode="trunc")
            state = (quotient << PROB_BITS) + (state - quotient * f) + c
    words, count = sections.select(emitted.transpose(0, 1).flatten(1), needed.transpose(0, 1).flatten(1))
    return state, words, count


def unpack(payload: Tensor, starts: Tensor, sizes: Tensor, tokens: int, channels: int, layout: Layout) -> Decoded:
    """Inverse of `pack` for coded tiles at `starts` (int64 `[N]`) of `payload`, `sizes` bytes each."""
    tables = family(layout.one_sided)
    _, lanes = lanes_of(channels)
    reader = RowReader(payload, starts, sizes)
    header = TileHeader.unpack(reader.take(sections.HEADER_BYTES))
    state = sections.from_little_endian(reader.take(4 * lanes), 4)
    planes, step = sections.take_planes_and_steps(reader, layout, header, tokens, channels)
    scale_class, base = sections.take_classes_and_bases(reader, layout, header, channels)
    highest = tables.count - 1 if layout.one_sided else MAX_CLASS
    reader.good &= (scale_class <= highest).all(1)
    scale_class = scale_class.clamp(max=highest)
    table, shift = _table_and_shift(scale_class, layout)
    shift = torch.where(reader.good[:, None], shift, 0)
    length = torch.full((1,), tokens, device=payload.device)
    low_data = reader.take(4 * dense.stream_words(shift[:, None], length).flatten(1).sum(1))
    low = dense.unpack(low_data, shift[:, None], tokens, GROUP_TOKENS)
    words = sections.from_little_endian(reader.take(2 * header.num_words), 2)
    exact = sections.take_exact(reader, header.num_exact, layout.itemsize, tokens * channels)
    symbol, complete = _decode(state, words, header.num_words, table, tokens, layout.one_sided)
    reader.good &= complete

    values = (symbol << shift[:, None]) + low - _half(shift, layout)[:, None]
    values = values + sections.spread_bases(base << _base_shift(layout), tokens, layout, GROUP_TOKENS)
    return Decoded(values, planes, step, *exact, reader.finish())


def _decode(
    state: Tensor, words: Tensor, num_words: Tensor, table: Tensor, tokens: int, one_sided: bool
) -> tuple[Tensor, Tensor]:
    """Symbols int64 `[N, T, C]`, and whether each tile ended as it must."""
    tables = family(one_sided)
    n, channels = table.shape
    per_lane, lanes = lanes_of(channels)
    # Behind the family's tables, one of a single symbol with the whole range: what a lane without a channel decodes.
    padded = torch.nn.functional.pad(table, (0, per_lane * lanes - channels), value=tables.count)
    row = padded.reshape(n, lanes, per_lane).permute(2, 0, 1) * PROB_SCALE
    slot = torch.arange(PROB_SCALE)
    symbol_of = torch.cat([tables.symbol.flatten(), torch.zeros_like(slot)])
    freq_of = torch.cat([tables.slot_freq.flatten(), torch.full_like(slot, PROB_SCALE)])
    bias_of = torch.cat([tables.slot_bias.flatten(), slot])
    words = torch.nn.functional.pad(words, (0, 1))
    last = words.shape[1] - 1
    taken = torch.zeros_like(num_words)
    steps = tokens * per_lane
    out = torch.empty(steps, n, lanes, dtype=torch.int64)
    for step in range(steps):
        slot_index = row[step % per_lane] + (state & (PROB_SCALE - 1))
        out[step] = symbol_of[slot_index]
        state = freq_of[slot_index] * (state >> PROB_BITS) + bias_of[slot_index]
        if step % 2 == 0 and step + 1 < steps:
            continue  # the first of a pair
        need = state < STATE_LOW
        rank = need.cumsum(1)
        word = words.gather(1, (taken[:, None] + rank - 1).clamp(0, last))
        state = torch.where(need, state << 16 | word, state)
        taken += rank[:, -1]
    complete = (taken == num_words) & (state == STATE_LOW).all(1)
    symbols = out.reshape(tokens, per_lane, n, lanes).permute(2, 0, 3, 1).reshape(n, tokens, per_lane * lanes)
    return symbols[:, :, :channels], complete
