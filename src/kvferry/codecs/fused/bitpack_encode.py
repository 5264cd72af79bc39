"""Tiles to bytes with the `bitpack` packer (docs/format.md): a program reads a tile once and writes its scratch row."""

# Tuples grow in unrolled loops, which is no Python type.
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.codecs.fused.bitpack_sections import (
    NIBBLE_LIST,
    TEMPORARY_BYTES,
    count_bits,
    store_small,
    write_exact,
    write_raw,
    write_streams,
    zero_pad,
)
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.fused.quantiser import quantise
from kvferry.codecs.fused.triton_common import (
    CHUNK_TOKENS,
    ENCODE_REGISTERS,
    GROUP_TOKENS,
    LANE_CHANNELS,
    LANES,
    NUM_CHUNKS,
    NUM_WARPS,
    chunk_tokens,
    column_of,
    group_length,
    lanes,
    load_bits,
    pad4,
    small_bytes,
    tile_source,
    value_layout,
    with_column,
)

MODES = {"fixed": 0, "plain": 1, "outlier": 2}
FIXED = tl.constexpr(0)
PLAIN = tl.constexpr(1)
OUTLIER = tl.constexpr(2)


@triton.jit
def _width_of(values):
    """Bits needed to hold each int32, which is not negative."""
    width = tl.zeros_like(values)
    for step in tl.static_range(5):
        wide = values >= (1 << (16 >> step))
        width += tl.where(wide, 16 >> step, 0)
        values = tl.where(wide, values >> (16 >> step), values)
    return width + values


@triton.jit
def _zigzag(values):
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ...; differences of integers below 2**23 stay positive int32."""
    return (values << 1) ^ (values >> 31)


@triton.jit
def _small_code(spread):
    """The smallest code whose width holds `spread`, which is not negative."""
    code = (spread > 0).to(tl.int32) + (spread > 15).to(tl.int32)
    return code + (spread > 255).to(tl.int32) + (spread > 65535).to(tl.int32)


@triton.jit
def _small_stats(values, stored):
    """Smallest of the `stored` int32 values (0 if there are none) and the code of the width that holds them."""
    smallest = tl.min(tl.where(stored, values, 0x7FFFFFFF), 0)
    largest = tl.max(tl.where(stored, values, -0x80000000), 0)
    some = smallest <= largest
    smallest = tl.where(some, smallest, 0)
    return smallest, _small_code(tl.where(some, largest - smallest, 0))


@triton.jit(do_not_specialize=["token_stride", "row_bytes"])
def _encode_bounded(
    src,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    steps,
    inverses,
    bounds,
    scratch,
    sizes,
    token_stride,
    channel_stride,
    row_bytes,
    MODE: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        src, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    live = length > 0
    row = scratch + tile * row_bytes
    if CHANNEL_STEPS:
        at_channel = tile * LANE_CHANNELS + channel
        step = tl.load(steps + at_channel, mask=channel < channels, other=0.0)[:, None]
        inverse = tl.load(inverses + at_channel, mask=channel < channels, other=0.0)[:, None]
        bound = tl.load(bounds + at_channel, mask=channel < channels, other=0.0)[:, None]
    else:
        step = tl.load(steps + tile)
        inverse = tl.load(inverses + tile)
        bound = tl.load(bounds + tile)

    quantised = ()
    exact = tl.zeros_like(channel)
    for chunk in tl.static_range(NUM_CHUNKS):
        bits = load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE)
        valid = chunk_tokens(chunk) < length[:, None]
        integers, stored = quantise(bits, valid, step, inverse, bound, EXPONENT, MANTISSA)
        quantised += (integers,)
        exact = exact | (stored << (chunk * CHUNK_TOKENS))
    num_exact = tl.sum(count_bits(exact), 0)
    first = column_of(quantised[0], 0)
    unsigned = ()
    if MODE == FIXED:
        base = tl.min(quantised[0], 1)
        largest = tl.max(quantised[0], 1)
        for chunk in tl.static_range(1, NUM_CHUNKS):
            base = tl.minimum(base, tl.min(quantised[chunk], 1))
            largest = tl.maximum(largest, tl.max(quantised[chunk], 1))
        for chunk in tl.static_range(NUM_CHUNKS):
            valid = chunk_tokens(chunk) < length[:, None]
            unsigned += (tl.where(valid, quantised[chunk] - base[:, None], 0),)
        width = _width_of(largest - base)
        group_class = width
        has_base = live
    else:
        rest = tl.zeros_like(first)
        previous = first
        for chunk in tl.static_range(NUM_CHUNKS):
            coded = tl.zeros_like(quantised[chunk])
            for i in tl.static_range(CHUNK_TOKENS):
                current = column_of(quantised[chunk], i)
                coded = with_column(coded, i, _zigzag(current - previous))
                previous = current
            rest = tl.maximum(rest, tl.max(coded, 1))
            unsigned += (coded,)
        width = _width_of(tl.maximum(rest, _zigzag(first)))
        group_class = width
        base = tl.zeros_like(first)
        has_base = live & (length < 0)
        if MODE == OUTLIER:
            width_of_rest = _width_of(rest)
            apart = (width - width_of_rest) * length > 16
            width = tl.where(apart, width_of_rest, width)
            group_class = 2 * width + apart.to(tl.int32)
            base = tl.where(apart, first, 0)
            has_base = live & apart
        # The first difference is the first integer itself.
        unsigned = (with_column(unsigned[0], 0, _zigzag(first - base)), unsigned[1], unsigned[2], unsigned[3])
    width = tl.where(live, width, 0)

    class0, class_code = _small_stats(group_class, live)
    base0, base_code = _small_stats(base, has_base)
    words = (length * width + 31) >> 5
    words_end = tl.cumsum(words, 0)
    num_groups = ((tokens + 31) >> 5) * channels
    rank = group * channels + channel
    base_rank = rank
    num_bases = tl.where(MODE == FIXED, num_groups, 0)
    if MODE == OUTLIER:
        base_rank = tl.cumsum(has_base.to(tl.int32), 0) - 1
        num_bases = tl.sum(has_base.to(tl.int32), 0)

    classes_at = 16
    if CHANNEL_STEPS:
        classes_at = 16 + pad4(2 * channels)
    bases_at = classes_at + small_bytes(num_groups, class_code)
    low_at = bases_at + small_bytes(num_bases, base_code)
    positions_at = low_at + 4 * tl.sum(words, 0)
    size = positions_at + pad4(2 * num_exact) + pad4(ITEMSIZE * num_exact)
    raw_size = 4 + pad4(tokens * channels * ITEMSIZE)
    tl.store(sizes + tile, tl.minimum(size, raw_size))
    if size < raw_size:
        header = row.to(tl.pointer_type(tl.int32))
        tl.store(header, 1 | (base_code << 8) | (class_code << 16) | (class0 << 24))
        tl.store(header + 1, num_exact << 16)
        tl.store(header + 2, base0)
        if CHANNEL_STEPS:
            tl.store(header + 3, 0)
            upper = (tl.reshape(step, [LANES]).to(tl.int32, bitcast=True) >> 16).to(tl.int16)
            tl.store((row + 16).to(tl.pointer_type(tl.int16)) + channel, upper, mask=live & (group == 0))
            zero_pad(row, 16 + 2 * channels)
        else:
            tl.store(header + 3, step.to(tl.int32, bitcast=True))
        temporary = row + row_bytes - 2 * NIBBLE_LIST
        store_small(row, classes_at, temporary, group_class - class0, rank, live, num_groups, class_code)
        if MODE != PLAIN:
            store_small(row, bases_at, temporary + NIBBLE_LIST, base - base0, base_rank, has_base, num_bases, base_code)
        write_streams((row + low_at).to(tl.pointer_type(tl.int32)) + (words_end - words), unsigned, width, words)
        if num_exact > 0:
            write_exact(
                row,
                positions_at,
                exact,
                num_exact,
                src,
                offsets,
                tokens_per_tile,
                channels_per_tile,
                tile,
                token_stride,
                channel_stride,
                ITEMSIZE,
            )
    else:
        write_raw(row, src, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE)


@triton.jit
def _integer_of_bits(bits, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, PLANES: tl.constexpr):
    """`lossless`: (v, sign and mantissa joined) of a value's bits."""
    exponent = (bits >> MANTISSA) & ((1 << EXPONENT) - 1)
    joined = (((bits >> (EXPONENT + MANTISSA)) & 1) << MANTISSA) | (bits & ((1 << MANTISSA) - 1))
    remaining: tl.constexpr = MANTISSA + 1 - 8 * PLANES
    return (joined >> (8 * PLANES)) - (exponent << remaining), joined


@triton.jit(do_not_specialize=["token_stride", "row_bytes"])
def _encode_lossless(
    src,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    scratch,
    sizes,
    token_stride,
    channel_stride,
    row_bytes,
    ITEMSIZE: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    PLANES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        src, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    live = length > 0
    row = scratch + tile * row_bytes

    loaded = ()
    base = tl.full(channel.shape, 0x7FFFFFFF, tl.int32)
    largest = tl.full(channel.shape, -0x80000000, tl.int32)
    for chunk in tl.static_range(NUM_CHUNKS):
        bits = load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE)
        if 8 * PLANES == MANTISSA + 1:
            # Here the integer is minus the exponent. Its smallest and largest are taken from the exponents themselves:
            # the tree of minima over negated 16-bit fields comes out wrong on sm_90 (ptxas 12.8; the PTX is right).
            exponent = (bits >> MANTISSA) & ((1 << EXPONENT) - 1)
            base = tl.minimum(base, -tl.max(exponent, 1))
            largest = tl.maximum(largest, -tl.min(exponent, 1))
        else:
            value, _ = _integer_of_bits(bits, EXPONENT, MANTISSA, PLANES)
            base = tl.minimum(base, tl.min(value, 1))
            largest = tl.maximum(largest, tl.max(value, 1))
        loaded += (bits,)
    width = tl.where(live, _width_of(largest - base), 0)

    class0, class_code = _small_stats(width, live)
    base0, base_code = _small_stats(base, live)
    words = (length * width + 31) >> 5
    words_end = tl.cumsum(words, 0)
    num_values = tokens * channels
    num_groups = ((tokens + 31) >> 5) * channels
    rank = group * channels + channel
    classes_at = 16 + pad4(PLANES * num_values)
    bases_at = classes_at + small_bytes(num_groups, class_code)
    low_at = bases_at + small_bytes(num_groups, base_code)
    size = low_at + 4 * tl.sum(words, 0)
    raw_size = 4 + pad4(num_values * ITEMSIZE)
    tl.store(sizes + tile, tl.minimum(size, raw_size))
    if size < raw_size:
        header = row.to(tl.pointer_type(tl.int32))
        tl.store(header, 1 | (base_code << 8) | (class_code << 16) | (class0 << 24))
        tl.store(header + 1, 0)
        tl.store(header + 2, base0)
        tl.store(header + 3, 0)
        temporary = row + row_bytes - 2 * NIBBLE_LIST
        store_small(row, classes_at, temporary, width - class0, rank, live, num_groups, class_code)
        store_small(row, bases_at, temporary + NIBBLE_LIST, base - base0, rank, live, num_groups, base_code)
        unsigned = ()
        for chunk in tl.static_range(NUM_CHUNKS):
            t = chunk_tokens(chunk)
            valid = t < length[:, None]
            value, joined = _integer_of_bits(loaded[chunk], EXPONENT, MANTISSA, PLANES)
            unsigned += (tl.where(valid, value - base[:, None], 0),)
            place = row + 16 + (group[:, None] * GROUP_TOKENS + t) * channels + channel[:, None]
            for plane in tl.static_range(PLANES):
                tl.store(place + plane * num_values, ((joined >> (8 * plane)) & 255).to(tl.uint8), mask=valid)
        write_streams((row + low_at).to(tl.pointer_type(tl.int32)) + (words_end - words), unsigned, width, words)
        if PLANES > 0:
            zero_pad(row, 16 + PLANES * num_values)
    else:
        write_raw(row, src, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE)


def _scratch(plan: DevicePlan, itemsize: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scratch rows uint8 `[N, row_bytes]` that hold any tile of the plan, and sizes int32 `[N]`."""
    raw_bytes = 4 + -(-plan.tile_values * itemsize // 4) * 4
    row_bytes = -(-raw_bytes // 16) * 16 + TEMPORARY_BYTES
    scratch = torch.empty(plan.num_tiles, row_bytes, dtype=torch.uint8, device=device)
    return scratch, torch.empty(plan.num_tiles, dtype=torch.int32, device=device)


def encode_bounded(
    src: Tensor,
    plan: DevicePlan,
    step: Tensor,
    inverse: Tensor,
    bound: Tensor,
    *,
    mode: str,
    channel_steps: bool,
) -> tuple[Tensor, Tensor]:
    """Tiles of `src` (bfloat16, float16 or float32, any strides) as `bounded` codes them.

    `step`, `inverse` (1/step, or both 0) and `bound` are float32 `[N]`, or `[N, 128]` with `channel_steps`, whose steps
    must be bfloat16 numbers. Returns (scratch uint8 `[N, row_bytes]`, sizes int32 `[N]`); what lies behind a row's size
    is undefined.
    """
    layout, bits = value_layout(src, bounded=True)
    scratch, sizes = _scratch(plan, layout.itemsize, src.device)
    if plan.num_tiles:
        with torch.cuda.device_of(src):
            _encode_bounded[(plan.num_tiles,)](
                bits,
                plan.offsets,
                plan.tokens,
                plan.channels,
                step.contiguous(),
                inverse.contiguous(),
                bound.contiguous(),
                scratch,
                sizes,
                plan.token_stride,
                plan.channel_stride,
                scratch.shape[1],
                MODE=MODES[mode],
                CHANNEL_STEPS=channel_steps,
                ITEMSIZE=layout.itemsize,
                EXPONENT=layout.exponent_bits,
                MANTISSA=layout.mantissa_bits,
                num_warps=NUM_WARPS,
                maxnreg=ENCODE_REGISTERS,
                # A fused multiply-add rounds once where the format rounds twice.
                enable_fp_fusion=False,
            )
    return scratch, sizes


def encode_lossless(src: Tensor, plan: DevicePlan) -> tuple[Tensor, Tensor]:
    """Tiles of `src` (any dtype of the format, any strides) as `lossless` codes them; returns as `encode_bounded`."""
    layout, bits = value_layout(src, bounded=False)
    scratch, sizes = _scratch(plan, layout.itemsize, src.device)
    if plan.num_tiles:
        with torch.cuda.device_of(src):
            _encode_lossless[(plan.num_tiles,)](
                bits,
                plan.offsets,
                plan.tokens,
                plan.channels,
                scratch,
                sizes,
                plan.token_stride,
                plan.channel_stride,
                scratch.shape[1],
                ITEMSIZE=layout.itemsize,
                EXPONENT=layout.exponent_bits,
                MANTISSA=layout.mantissa_bits,
                PLANES=layout.planes,
                num_warps=NUM_WARPS,
                maxnreg=ENCODE_REGISTERS,
            )
    return scratch, sizes
