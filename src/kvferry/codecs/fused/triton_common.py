"""What the Triton kernels of the fused codecs share: how a program's lanes lie over a tile, and values as bits.

Every kernel runs one program per tile on 256 lanes: lane `128*g + c` owns the tokens 32*g to 32*g + 31 of channel c,
which is one group of the `bitpack` packer. Values are matrices `[256, tokens]`. With one thread to a lane, Triton lays
them out one row to a thread: neighbouring threads read neighbouring channels, everything along a group stays in one
thread's registers, and choosing a token's column costs nothing. Encoders take 8 tokens at a time: a matrix of 32 spills
registers as soon as a few intermediate results live at once. (Unrolling over vectors makes the same code without that,
but Triton's coalescing pass is more than quadratic in the operations and took a minute per kernel.)
"""

import triton
import triton.language as tl
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, as_bits
from kvferry.codecs.lossless.reference import SPLITS, Split

LANES = tl.constexpr(256)
LANE_CHANNELS = tl.constexpr(128)
GROUP_TOKENS = tl.constexpr(32)
CHUNK_TOKENS = tl.constexpr(8)
NUM_CHUNKS = tl.constexpr(4)
NUM_WARPS = 8
"""One thread per lane."""
ENCODE_REGISTERS = 128
"""Two programs of 256 threads on a multiprocessor. Without a limit ptxas takes up to 192 (sm_90), which leaves room for
one; at 80, for three, it spills some 50 registers."""


def value_layout(tensor: Tensor, bounded: bool) -> tuple[Split, Tensor]:
    """Fields of the tensor's dtype, and the tensor's bits as integers. `bounded` codes no 8-bit floats."""
    if tensor.dtype not in (FLOAT_DTYPES if bounded else SPLITS):
        raise TypeError(f"the fused {'bounded' if bounded else 'lossless'} kernels do not take {tensor.dtype}")
    return SPLITS[tensor.dtype], as_bits(tensor)


@triton.jit
def lanes():
    """(group, channel) of each lane."""
    lane = tl.arange(0, LANES)
    return lane // LANE_CHANNELS, lane % LANE_CHANNELS


@triton.jit
def group_length(group, channel, tokens, channels):
    """Tokens of each lane's group in a tile; 0 for lanes that have none."""
    length = tl.minimum(tl.maximum(tokens - group * GROUP_TOKENS, 0), GROUP_TOKENS)
    return tl.where(channel < channels, length, 0)


@triton.jit
def value_pointer(address, ITEMSIZE: tl.constexpr):
    """A byte pointer as one to values' bits."""
    if ITEMSIZE == 4:
        pointer = address.to(tl.pointer_type(tl.int32))
    elif ITEMSIZE == 2:
        pointer = address.to(tl.pointer_type(tl.int16))
    else:
        pointer = address
    return pointer


@triton.jit
def tile_source(values, offsets, tokens_per_tile, channels_per_tile, tile, channel, channel_stride):
    """(pointers to each lane's channel, tokens, channels) of a tile of the tensor at `values`.

    Paths that few tiles take call this again: addresses shared with the path that all take would be computed up front
    and held in registers until there.
    """
    pointers = values + tl.load(offsets + tile) + channel.to(tl.int64) * channel_stride
    return pointers, tl.load(tokens_per_tile + tile), tl.load(channels_per_tile + tile)


@triton.jit
def chunk_tokens(chunk):
    """Tokens of a chunk, counted from the group's first; int32 `[1, 8]`."""
    return chunk * CHUNK_TOKENS + tl.arange(0, CHUNK_TOKENS)[None, :]


@triton.jit
def load_bits(pointers, chunk, group, tokens, channel, channels, token_stride, ITEMSIZE: tl.constexpr):
    """Bits of 8 tokens of each lane's group, zero-extended to int32 `[256, 8]`; `pointers` are the channels' first
    values.

    Lanes whose group is shorter repeat the tile's last token: that changes no minimum, maximum or difference, and needs
    no selection afterwards. Lanes without a channel get 0.
    """
    token = tl.minimum(group[:, None] * GROUP_TOKENS + chunk_tokens(chunk), tokens - 1)
    addresses = pointers[:, None] + token.to(tl.int64) * token_stride
    bits = tl.load(addresses, mask=(channel < channels)[:, None], other=0).to(tl.int32)
    if ITEMSIZE == 2:
        bits = bits & 0xFFFF
    return bits


@triton.jit
def column_of(matrix, t: tl.constexpr):
    """Column t of an integer matrix. A thread holds whole rows, so this compiles to a choice of registers."""
    return tl.sum(tl.where(tl.arange(0, matrix.shape[1])[None, :] == t, matrix, 0), 1)


@triton.jit
def with_column(matrix, t: tl.constexpr, column):
    """`matrix` with another column t; no more than a choice of registers either."""
    return tl.where(tl.arange(0, matrix.shape[1])[None, :] == t, column[:, None], matrix)


@triton.jit
def float_of_bits(bits, MANTISSA: tl.constexpr):
    """float32 of a value's bits (int32)."""
    if MANTISSA == 7:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif MANTISSA == 10:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def bits_of_float(value, MANTISSA: tl.constexpr):
    """Bits (int32, zero-extended) of float32 rounded to the dtype, ties to even."""
    if MANTISSA == 7:
        # In integers, since the interpreter's cast to bfloat16 rounds ties up. No NaN comes here but from corrupt
        # tiles.
        wide = value.to(tl.uint32, bitcast=True)
        bits = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).to(tl.int32)
    elif MANTISSA == 10:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        bits = value.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def pad4(num_bytes):
    return (num_bytes + 3) & -4


@triton.jit
def small_bits(code):
    """Width of a stored base or class by its code: 0, 4, 8, 16, 32 bits."""
    return tl.where(code > 0, 2 << code, 0)


@triton.jit
def small_bytes(count, code):
    """Bytes of the section that holds `count` bases or classes, padding included."""
    return pad4((count * small_bits(code) + 7) >> 3)
