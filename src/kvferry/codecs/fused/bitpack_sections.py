"""How Triton programs write the sections of a tile (docs/format.md, "Coded tile" and "bitpack") to its scratch row.

`row` is a byte pointer to a multiple of 4, `at` a section's offset in bytes. Padding is written here too: every byte of
a tile is stored exactly once, whatever lay there before.
"""

import triton
import triton.language as tl

from kvferry.codecs.fused.triton_common import (
    CHUNK_TOKENS,
    GROUP_TOKENS,
    LANE_CHANNELS,
    LANES,
    NUM_CHUNKS,
    chunk_tokens,
    column_of,
    group_length,
    lanes,
    load_bits,
    pad4,
    tile_source,
    value_pointer,
    with_column,
)

TEMPORARY_BYTES = 512
"""Room behind each scratch row where two lists of up to 256 nibbles lie as bytes before they are packed."""
NIBBLE_LIST = tl.constexpr(256)


@triton.jit
def zero_pad(row, end):
    """Zero bytes from `end` to the next multiple of 4."""
    at = tl.arange(0, 4)
    tl.store(row + end + at, tl.zeros_like(at).to(tl.uint8), mask=at < (-end & 3))


@triton.jit
def store_small(row, at, temporary, values, rank, stored, count, code):
    """Write the `stored` lanes' `values` (int32, not negative), ordered by `rank`, as the section at `at`."""
    if code == 1:
        # A word takes nibbles of eight lanes, any eight where only some lanes store: they meet in memory.
        tl.store(temporary + rank, values.to(tl.uint8), mask=stored)
        tl.debug_barrier()
        word = tl.arange(0, LANES // 8)
        nibble = tl.arange(0, 8)
        index = word[:, None] * 8 + nibble[None, :]
        nibbles = tl.load(temporary + index, mask=index < count, other=0).to(tl.int32)
        packed = tl.sum(nibbles << (nibble * 4)[None, :], 1)
        tl.store((row + at).to(tl.pointer_type(tl.int32)) + word, packed, mask=word * 8 < count)
    elif code == 2:
        tl.store(row + at + rank, values.to(tl.uint8), mask=stored)
        zero_pad(row, at + count)
    elif code == 3:
        tl.store((row + at).to(tl.pointer_type(tl.int16)) + rank, values.to(tl.int16), mask=stored)
        zero_pad(row, at + count * 2)
    elif code == 4:
        tl.store((row + at).to(tl.pointer_type(tl.int32)) + rank, values, mask=stored)


@triton.jit
def write_streams(stream, chunks, width, words):
    """Each lane's group of values as a dense stream; `chunks` are int32 `[256, 8]`, not negative, below 2**width.

    `stream` points to each lane's first word, of `words`. Widths are below 32, values behind a shorter group's end 0.
    """
    carry = tl.zeros_like(width).to(tl.uint32)
    fill = tl.zeros_like(width)
    written = tl.zeros_like(width)
    for chunk in tl.static_range(NUM_CHUNKS):
        for i in tl.static_range(CHUNK_TOKENS):
            value = column_of(chunks[chunk], i).to(tl.uint32)
            carry = carry | (value << fill)
            filled = fill + width
            full = filled >= 32
            tl.store(stream + written, carry.to(tl.int32, bitcast=True), mask=full & (written < words))
            # In two shifts, since 32 - fill may be 32.
            carry = tl.where(full, (value >> 1) >> (31 - fill), carry)
            fill = filled & 31
            written += full.to(tl.int32)


@triton.jit
def write_raw(
    row, src, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE: tl.constexpr
):
    """The raw tile: four bytes of header and the values' bits, `[tokens][channels]`."""
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        src, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    tl.store(row.to(tl.pointer_type(tl.int32)), 0)
    out = value_pointer(row + 4, ITEMSIZE)
    for chunk in tl.static_range(NUM_CHUNKS):
        t = chunk_tokens(chunk)
        bits = load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE)
        place = (group[:, None] * GROUP_TOKENS + t) * channels + channel[:, None]
        tl.store(out + place, bits, mask=t < length[:, None])
    zero_pad(row, 4 + tokens * channels * ITEMSIZE)


@triton.jit
def count_bits(mask):
    """Bits set in each int32."""
    count = mask - ((mask >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    return ((((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 255


@triton.jit
def write_exact(
    row,
    at,
    exact,
    count,
    src,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    tile,
    token_stride,
    channel_stride,
    ITEMSIZE: tl.constexpr,
):
    """Sections `positions` and `exact` of the `count` values that `exact` (int32 `[256]`, bit t) marks.

    They go by token, then channel. Eight tokens are counted in the bytes of one int64: 128 channels add at most 128.
    """
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        src, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    bits_at = at + pad4(2 * count)
    positions = (row + at).to(tl.pointer_type(tl.int16))
    out = value_pointer(row + bits_at, ITEMSIZE)
    in_first_group = tl.sum(tl.where(group == 0, count_bits(exact), 0), 0)
    before = tl.where(group == 0, 0, in_first_group)
    for chunk in tl.static_range(NUM_CHUNKS):
        mine = (exact >> (chunk * CHUNK_TOKENS)) & 255
        packed = tl.zeros_like(group).to(tl.int64)
        for i in tl.static_range(CHUNK_TOKENS):
            packed += ((mine >> i) & 1).to(tl.int64) << (8 * i)
        per_group = tl.reshape(packed, [2, LANE_CHANNELS])
        running = tl.reshape(tl.cumsum(per_group, 1), [LANES])
        total = tl.reshape(tl.broadcast_to(tl.sum(per_group, 1)[:, None], [2, LANE_CHANNELS]), [LANES])
        bits = load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE)
        rank = tl.zeros_like(bits)
        for i in tl.static_range(CHUNK_TOKENS):
            rank = with_column(rank, i, before + ((running >> (8 * i)) & 255).to(tl.int32) - 1)
            before += ((total >> (8 * i)) & 255).to(tl.int32)
        wanted = ((mine[:, None] >> tl.arange(0, CHUNK_TOKENS)[None, :]) & 1) != 0
        position = (group[:, None] * GROUP_TOKENS + chunk_tokens(chunk)) * channels + channel[:, None]
        tl.store(positions + rank, position, mask=wanted)
        tl.store(out + rank, bits, mask=wanted)
    zero_pad(row, at + 2 * count)
    zero_pad(row, bits_at + ITEMSIZE * count)
