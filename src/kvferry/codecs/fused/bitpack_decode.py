"""Bytes of the `bitpack` packer (docs/format.md) back to tiles: one program checks a tile and scatters its values."""

# Tuples grow in unrolled loops, which is no Python type.
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.codecs.fused.bitpack_encode import FIXED, MODES, OUTLIER, PLAIN
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.fused.quantiser import delivered
from kvferry.codecs.fused.triton_common import (
    CHUNK_TOKENS,
    GROUP_TOKENS,
    LANES,
    NUM_CHUNKS,
    NUM_WARPS,
    chunk_tokens,
    column_of,
    group_length,
    lanes,
    pad4,
    small_bits,
    small_bytes,
    tile_source,
    value_layout,
    value_pointer,
    with_column,
)


@triton.jit
def _load_small(row, at, rank, code, wanted):
    """Bases or classes stored at `at` with width `code`, those of lanes not `wanted` 0; int32 `[256]`."""
    bits = small_bits(code)
    bit = rank * bits
    word = tl.load((row + at).to(tl.pointer_type(tl.int32)) + (bit >> 5), mask=wanted & (bits > 0), other=0)
    mask = ((tl.full([], 1, tl.int64) << bits.to(tl.int64)) - 1).to(tl.uint32)
    return ((word.to(tl.uint32, bitcast=True) >> (bit & 31)) & mask).to(tl.int32, bitcast=True)


@triton.jit
def _open_tile(payload, payload_bytes, start, size, raw_size):
    """(first word of the tile, whether it is a raw tile of the right size, whether it may be a coded one)."""
    inside = (start >= 0) & (size >= 4) & (start + size <= payload_bytes) & ((start & 3) == 0) & ((size & 3) == 0)
    first = tl.load((payload + start).to(tl.pointer_type(tl.int32)), mask=inside, other=0xFF)
    kind = first & 255
    return first, inside & (kind == 0) & (size == raw_size), inside & (kind == 1) & (size >= 16) & (size < raw_size)


@triton.jit
def _read_header(row, first, coded):
    """(base_code, class_code, class0, num_exact, base0, step bits, whether the tile is still good)."""
    header = row.to(tl.pointer_type(tl.int32))
    counts = tl.load(header + 1, mask=coded, other=0)
    base0 = tl.load(header + 2, mask=coded, other=0)
    step = tl.load(header + 3, mask=coded, other=0)
    base_code = (first >> 8) & 255
    class_code = (first >> 16) & 255
    good = coded & (base_code <= 4) & (class_code <= 2) & ((counts & 0xFFFF) == 0)
    base_code = tl.where(good, base_code, 0)
    class_code = tl.where(good, class_code, 0)
    return base_code, class_code, (first >> 24) & 255, (counts >> 16) & 0xFFFF, base0, step, good


@triton.jit
def _positions_inside(row, at, count, num_values):
    """Whether each of `count` positions is one of the tile's values."""
    positions = (row + at).to(tl.pointer_type(tl.int16))
    lane = tl.arange(0, LANES)
    outside = tl.zeros_like(lane)
    first = 0
    while first < count:
        stored = first + lane < count
        position = tl.load(positions + first + lane, mask=stored, other=0).to(tl.int32) & 0xFFFF
        outside += (position >= num_values).to(tl.int32)
        first += LANES
    return tl.max(outside, 0) == 0


@triton.jit
def _read_streams(stream, length, width):
    """Each lane's dense stream of `length` values, `width` bits each: a tuple of four int32 `[256, 8]`.

    `stream` points to each lane's first word. Nothing behind a stream's last word is read; values behind `length` are
    0.
    """
    mask = ((tl.full(width.shape, 1, tl.int64) << width.to(tl.int64)) - 1).to(tl.uint32)
    chunks = ()
    carry = tl.zeros_like(width).to(tl.uint32)
    held = tl.zeros_like(width)
    taken = tl.zeros_like(width)
    for chunk in tl.static_range(NUM_CHUNKS):
        values = tl.zeros([LANES, CHUNK_TOKENS], tl.int32)
        for i in tl.static_range(CHUNK_TOKENS):
            inside = chunk * CHUNK_TOKENS + i < length
            more = inside & (held < width)
            word = tl.load(stream + taken, mask=more, other=0).to(tl.uint32, bitcast=True)
            value = (carry | (word << held)) & mask
            values = with_column(values, i, tl.where(inside, value.to(tl.int32, bitcast=True), 0))
            # In two shifts, since width - held may be 32. A word that was taken was needed: width > held.
            carry = tl.where(more, (word >> 1) >> ((width - held - 1) & 31), carry >> (width & 31))
            held = (held - width + tl.where(more, 32, 0)) & 31
            taken += more.to(tl.int32)
        chunks += (values,)
    return chunks


@triton.jit
def _unzigzag(values):
    """0, 1, 2, 3, ... (unsigned) as 0, -1, 1, -2, ..."""
    return ((values >> 1) & 0x7FFFFFFF) ^ -(values & 1)


@triton.jit
def _copy_raw(
    row, dst, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE: tl.constexpr
):
    """The values of a raw tile to their places."""
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        dst, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    source = value_pointer(row + 4, ITEMSIZE)
    for chunk in tl.static_range(NUM_CHUNKS):
        t = chunk_tokens(chunk)
        token = group[:, None] * GROUP_TOKENS + t
        inside = t < length[:, None]
        bits = tl.load(source + token * channels + channel[:, None], mask=inside, other=0)
        tl.store(pointers[:, None] + token.to(tl.int64) * token_stride, bits, mask=inside)


@triton.jit
def _put_exact(row, at, count, out, channels, token_stride, channel_stride, ITEMSIZE: tl.constexpr):
    """Write the exactly stored values over what was decoded in their places; `out` points to the tile's first value."""
    positions = (row + at).to(tl.pointer_type(tl.int16))
    source = value_pointer(row + at + pad4(2 * count), ITEMSIZE)
    lane = tl.arange(0, LANES)
    # Other threads wrote there.
    tl.debug_barrier()
    first = 0
    while first < count:
        stored = first + lane < count
        position = tl.load(positions + first + lane, mask=stored, other=0).to(tl.int32) & 0xFFFF
        bits = tl.load(source + first + lane, mask=stored, other=0)
        token = (position // channels).to(tl.int64)
        channel = (position % channels).to(tl.int64)
        tl.store(out + token * token_stride + channel * channel_stride, bits, mask=stored)
        first += LANES


@triton.jit(do_not_specialize=["payload_bytes", "token_stride"])
def _decode_bounded(
    payload,
    starts,
    sizes,
    dst,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    status,
    payload_bytes,
    token_stride,
    channel_stride,
    MODE: tl.constexpr,
    CHANNEL_STEPS: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        dst, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    live = length > 0
    start = tl.load(starts + tile)
    size = tl.load(sizes + tile)
    num_values = tokens * channels
    first, raw, coded = _open_tile(payload, payload_bytes, start, size, 4 + pad4(num_values * ITEMSIZE))
    row = payload + start
    base_code, class_code, class0, num_exact, base0, step_bits, coded = _read_header(row, first, coded)

    num_groups = ((tokens + 31) >> 5) * channels
    rank = group * channels + channel
    classes_at = 16
    if CHANNEL_STEPS:
        classes_at = 16 + pad4(2 * channels)
    bases_at = classes_at + small_bytes(num_groups, class_code)
    coded = coded & (bases_at <= size)
    group_class = class0 + _load_small(row, classes_at, rank, class_code, live & coded)
    width = group_class
    has_base = live
    base_rank = rank
    num_bases = num_groups
    if MODE == PLAIN:
        num_bases = 0
    elif MODE == OUTLIER:
        width = group_class >> 1
        has_base = live & ((group_class & 1) != 0)
        base_rank = tl.cumsum(has_base.to(tl.int32), 0) - 1
        num_bases = tl.sum(has_base.to(tl.int32), 0)
    width = tl.where(live, width, 0)
    coded = coded & (tl.max(width, 0) <= 32)
    words = (length * width + 31) >> 5
    low_at = bases_at + small_bytes(num_bases, base_code)
    positions_at = low_at + 4 * tl.sum(words, 0)
    coded = coded & (positions_at + pad4(2 * num_exact) + pad4(ITEMSIZE * num_exact) == size)
    coded = coded & _positions_inside(row, positions_at, tl.where(coded, num_exact, 0), num_values)
    tl.store(status + tile, tl.where(coded | raw, 0, 1))

    if coded:
        if CHANNEL_STEPS:
            upper = tl.load((row + 16).to(tl.pointer_type(tl.int16)) + channel, mask=live, other=0)
            step = (upper.to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]
        else:
            step = step_bits.to(tl.float32, bitcast=True)
        base = tl.zeros_like(width)
        if MODE != PLAIN:
            base = tl.where(has_base, base0 + _load_small(row, bases_at, base_rank, base_code, has_base), 0)
        stream = (row + low_at).to(tl.pointer_type(tl.int32)) + (tl.cumsum(words, 0) - words)
        chunks = _read_streams(stream, length, width)
        running = base
        for chunk in tl.static_range(NUM_CHUNKS):
            if MODE == FIXED:
                quantised = chunks[chunk] + base[:, None]
            else:
                quantised = tl.cumsum(_unzigzag(chunks[chunk]), 1) + running[:, None]
                running = column_of(quantised, 7)
            bits, _ = delivered(quantised, step, MANTISSA)
            t = chunk_tokens(chunk)
            token = (group[:, None] * GROUP_TOKENS + t).to(tl.int64)
            tl.store(pointers[:, None] + token * token_stride, bits, mask=t < length[:, None])
        if num_exact > 0:
            out = dst + tl.load(offsets + tile)
            _put_exact(row, positions_at, num_exact, out, channels, token_stride, channel_stride, ITEMSIZE)
    elif raw:
        _copy_raw(row, dst, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE)


@triton.jit(do_not_specialize=["payload_bytes", "token_stride"])
def _decode_lossless(
    payload,
    starts,
    sizes,
    dst,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    status,
    payload_bytes,
    token_stride,
    channel_stride,
    ITEMSIZE: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    PLANES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        dst, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    live = length > 0
    start = tl.load(starts + tile)
    size = tl.load(sizes + tile)
    num_values = tokens * channels
    first, raw, coded = _open_tile(payload, payload_bytes, start, size, 4 + pad4(num_values * ITEMSIZE))
    row = payload + start
    base_code, class_code, class0, num_exact, base0, _, coded = _read_header(row, first, coded)

    num_groups = ((tokens + 31) >> 5) * channels
    rank = group * channels + channel
    classes_at = 16 + pad4(PLANES * num_values)
    bases_at = classes_at + small_bytes(num_groups, class_code)
    coded = coded & (bases_at <= size)
    width = tl.where(live, class0 + _load_small(row, classes_at, rank, class_code, live & coded), 0)
    coded = coded & (tl.max(width, 0) <= 32)
    words = (length * width + 31) >> 5
    low_at = bases_at + small_bytes(num_groups, base_code)
    positions_at = low_at + 4 * tl.sum(words, 0)
    coded = coded & (positions_at + pad4(2 * num_exact) + pad4(ITEMSIZE * num_exact) == size)
    coded = coded & _positions_inside(row, positions_at, tl.where(coded, num_exact, 0), num_values)
    tl.store(status + tile, tl.where(coded | raw, 0, 1))

    if coded:
        base = base0 + _load_small(row, bases_at, rank, base_code, live)
        stream = (row + low_at).to(tl.pointer_type(tl.int32)) + (tl.cumsum(words, 0) - words)
        chunks = _read_streams(stream, length, width)
        remaining: tl.constexpr = MANTISSA + 1 - 8 * PLANES
        for chunk in tl.static_range(NUM_CHUNKS):
            value = chunks[chunk] + base[:, None]
            t = chunk_tokens(chunk)
            token = group[:, None] * GROUP_TOKENS + t
            inside = t < length[:, None]
            exponent = -(value >> remaining) & ((1 << EXPONENT) - 1)
            joined = (value & ((1 << remaining) - 1)) << (8 * PLANES)
            for plane in tl.static_range(PLANES):
                place = row + 16 + plane * num_values + token * channels + channel[:, None]
                joined = joined | (tl.load(place, mask=inside, other=0).to(tl.int32) << (8 * plane))
            sign = (joined >> MANTISSA) << (EXPONENT + MANTISSA)
            bits = sign | (exponent << MANTISSA) | (joined & ((1 << MANTISSA) - 1))
            tl.store(pointers[:, None] + token.to(tl.int64) * token_stride, bits, mask=inside)
        # No encoder of this codec stores values exactly, but the format lets one.
        if num_exact > 0:
            out = dst + tl.load(offsets + tile)
            _put_exact(row, positions_at, num_exact, out, channels, token_stride, channel_stride, ITEMSIZE)
    elif raw:
        _copy_raw(row, dst, offsets, tokens_per_tile, channels_per_tile, tile, token_stride, channel_stride, ITEMSIZE)


def _check_arguments(payload: Tensor, starts: Tensor, sizes: Tensor, status: Tensor) -> Tensor:
    """The payload, moved if it does not start at a multiple of 4 bytes (tiles are read in words)."""
    for name, tensor, dtype in (("payload", payload, torch.uint8), ("starts", starts, torch.int64)):
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            raise TypeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; give contiguous {dtype} of one dimension")
    for name, tensor in (("sizes", sizes), ("status", status)):
        if tensor.dtype != torch.int32 or tensor.shape != starts.shape or not tensor.is_contiguous():
            raise TypeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; give contiguous int32, one number a tile")
    return payload if payload.data_ptr() % 4 == 0 else payload.clone()


def decode_bounded(
    payload: Tensor,
    starts: Tensor,
    sizes: Tensor,
    dst: Tensor,
    plan: DevicePlan,
    *,
    mode: str,
    channel_steps: bool,
    status: Tensor,
) -> None:
    """Decode tile i, the `sizes[i]` bytes of `payload` from `starts[i]`, into `dst` (any strides) where `plan` says.

    `payload` uint8, `starts` int64 `[N]`, `sizes` int32 `[N]`. `status` int32 `[N]` becomes 0, or 1 for a tile whose
    bytes contradict themselves: nothing of such a tile is written, and nothing is ever read outside a tile's own bytes.
    """
    layout, bits = value_layout(dst, bounded=True)
    payload = _check_arguments(payload, starts, sizes, status)
    if plan.num_tiles:
        with torch.cuda.device_of(dst):
            _decode_bounded[(plan.num_tiles,)](
                payload,
                starts,
                sizes,
                bits,
                plan.offsets,
                plan.tokens,
                plan.channels,
                status,
                payload.numel(),
                plan.token_stride,
                plan.channel_stride,
                MODE=MODES[mode],
                CHANNEL_STEPS=channel_steps,
                ITEMSIZE=layout.itemsize,
                MANTISSA=layout.mantissa_bits,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


def decode_lossless(
    payload: Tensor, starts: Tensor, sizes: Tensor, dst: Tensor, plan: DevicePlan, *, status: Tensor
) -> None:
    """As `decode_bounded`, for tiles of `lossless`."""
    layout, bits = value_layout(dst, bounded=False)
    payload = _check_arguments(payload, starts, sizes, status)
    if plan.num_tiles:
        with torch.cuda.device_of(dst):
            _decode_lossless[(plan.num_tiles,)](
                payload,
                starts,
                sizes,
                bits,
                plan.offsets,
                plan.tokens,
                plan.channels,
                status,
                payload.numel(),
                plan.token_stride,
                plan.channel_stride,
                ITEMSIZE=layout.itemsize,
                EXPONENT=layout.exponent_bits,
                MANTISSA=layout.mantissa_bits,
                PLANES=layout.planes,
                num_warps=NUM_WARPS,
            )
