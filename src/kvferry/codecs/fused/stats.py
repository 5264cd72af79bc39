"""Statistics of tiles that steps and bounds are made from, in one pass over the tensor."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.fused.triton_common import (
    GROUP_TOKENS,
    LANE_CHANNELS,
    NUM_CHUNKS,
    NUM_WARPS,
    float_of_bits,
    group_length,
    lanes,
    load_bits,
    tile_source,
    value_layout,
)
from kvferry.codecs.tiling import TILE_CHANNELS


@dataclass(frozen=True)
class TileStats:
    """`minimum`, `maximum` float32 `[N, 128]`: over the finite values of each channel of each tile (+inf, -inf where
    there are none; everywhere, without memory behind it, where ranges were not asked for). `exponent_sum` int32 `[N]`:
    sum of the biased exponents, as float32, of every eighth token's values."""

    minimum: Tensor
    maximum: Tensor
    exponent_sum: Tensor


@triton.jit(do_not_specialize=["token_stride"])
def _tile_stats(
    src,
    offsets,
    tokens_per_tile,
    channels_per_tile,
    minimum,
    maximum,
    exponent_sum,
    token_stride,
    channel_stride,
    RANGES: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    group, channel = lanes()
    pointers, tokens, channels = tile_source(
        src, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride
    )
    length = group_length(group, channel, tokens, channels)
    if RANGES:
        low = tl.full(channel.shape, float("inf"), tl.float32)
        high = tl.full(channel.shape, float("-inf"), tl.float32)
        for chunk in tl.static_range(NUM_CHUNKS):
            bits = load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE)
            value = float_of_bits(bits, MANTISSA)
            finite = (tl.abs(value) < float("inf")) & (length > 0)[:, None]
            low = tl.minimum(low, tl.min(tl.where(finite, value, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(finite, value, float("-inf")), 1))
        # Lanes are in the order group, channel. Adding 0 makes zeros positive: which of two a minimum returns differs.
        at = tile * LANE_CHANNELS + tl.arange(0, LANE_CHANNELS)
        tl.store(minimum + at, tl.min(tl.reshape(low, [2, LANE_CHANNELS]), 0) + 0.0)
        tl.store(maximum + at, tl.max(tl.reshape(high, [2, LANE_CHANNELS]), 0) + 0.0)
    t = tl.arange(0, GROUP_TOKENS // 8)[None, :] * 8
    wanted = t < length[:, None]
    addresses = pointers[:, None] + (group[:, None] * GROUP_TOKENS + t).to(tl.int64) * token_stride
    bits = tl.load(addresses, mask=wanted, other=0).to(tl.int32)
    if ITEMSIZE == 2:
        bits = bits & 0xFFFF
    exponents = (float_of_bits(bits, MANTISSA).to(tl.int32, bitcast=True) >> 23) & 255
    tl.store(exponent_sum + tile, tl.sum(tl.sum(exponents, 1), 0))


def tile_stats(src: Tensor, plan: DevicePlan, *, ranges: bool = True) -> TileStats:
    """Statistics of each tile of `src` (bfloat16, float16 or float32, any strides); nothing comes back to the host."""
    layout, bits = value_layout(src, bounded=True)
    shape = (plan.num_tiles, TILE_CHANNELS)
    if ranges:
        minimum, maximum = (torch.empty(shape, dtype=torch.float32, device=src.device) for _ in range(2))
    else:
        minimum, maximum = (torch.full((1, 1), x, device=src.device).expand(shape) for x in (torch.inf, -torch.inf))
    stats = TileStats(minimum, maximum, torch.empty(plan.num_tiles, dtype=torch.int32, device=src.device))
    if plan.num_tiles:
        with torch.cuda.device_of(src):
            _tile_stats[(plan.num_tiles,)](
                bits,
                plan.offsets,
                plan.tokens,
                plan.channels,
                stats.minimum,
                stats.maximum,
                stats.exponent_sum,
                plan.token_stride,
                plan.channel_stride,
                RANGES=ranges,
                ITEMSIZE=layout.itemsize,
                MANTISSA=layout.mantissa_bits,
                num_warps=NUM_WARPS,
            )
    return stats
