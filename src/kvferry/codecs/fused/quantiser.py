"""The quantiser of `bounded` in float32 and bit for bit as the reference has it."""

import triton
import triton.language as tl

from kvferry.codecs.fused.triton_common import CHUNK_TOKENS, bits_of_float, float_of_bits


@triton.jit
def delivered(quantised, step, MANTISSA: tl.constexpr):
    """What a decoder delivers for an integer: (its bits as int32, the same as float32)."""
    bits = bits_of_float(quantised.to(tl.float32) * step, MANTISSA)
    return bits, float_of_bits(bits, MANTISSA)


@triton.jit
def _nearest(value, inverse):
    """(the integer nearest to value * inverse, or 0; whether that is usable: below 2**22)."""
    scaled = value * inverse
    usable = tl.abs(scaled) < 4194304.0
    # 1.5 * 2**23 pushes the fraction out of the sum's mantissa, rounding to nearest even; the integer is left in its
    # low bits.
    rounded = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(usable, rounded, 0), usable


@triton.jit
def _is_special(bits, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """-0.0 and denormals: exponent field 0, and not +0.0."""
    field: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
    return ((bits & field) == 0) & (bits != 0)


@triton.jit
def _within(value, out, bound, TIES: tl.constexpr):
    """(whether |value - out| <= bound without rounding, whether the rounded difference is the bound). Then the
    difference's rounding error decides, which is looked at with TIES only; else the answer is False."""
    difference = value - out
    magnitude = tl.abs(difference)
    hit = magnitude < bound
    tie = magnitude == bound
    if TIES:
        part = difference - value
        error = (value - (difference - part)) - (out + part)
        hit = hit | (tie & (tl.where(difference > 0, error, -error) <= 0))
    return hit, tie


@triton.jit
def _checked(bits, step, inverse, bound, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, TIES: tl.constexpr):
    """(integer, whether the value must be stored exactly, whether a tie makes both doubtful), with the neighbour tried
    where the nearest integer misses the bound."""
    value = float_of_bits(bits, MANTISSA)
    nearest, usable = _nearest(value, inverse)
    _, out = delivered(nearest, step, MANTISSA)
    first, first_tie = _within(value, out, bound, TIES)
    neighbour = nearest + tl.where(value > out, 1, -1)
    _, out = delivered(neighbour, step, MANTISSA)
    second, second_tie = _within(value, out, bound, TIES)
    quantised = tl.where(usable & second & (first == 0), neighbour, nearest)
    kept = usable & (first | second) & (_is_special(bits, EXPONENT, MANTISSA) == 0)
    return quantised, kept == 0, first_tie | second_tie


@triton.jit
def _mask_of(flags):
    """Rows of flags `[256, 8]` as int32 `[256]`, bit t for column t: one register instead of 8."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, CHUNK_TOKENS)[None, :], 1)


@triton.jit
def quantise(bits, valid, step, inverse, bound, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """(integers `[256, 8]` of a chunk, which of its `valid` values are stored exactly: int32 `[256]`, bit t)."""
    value = float_of_bits(bits, MANTISSA)
    quantised, usable = _nearest(value, inverse)
    _, out = delivered(quantised, step, MANTISSA)
    kept = (tl.abs(value - out) < bound) & usable & (_is_special(bits, EXPONENT, MANTISSA) == 0)
    exact = _mask_of(valid & (kept == 0))
    # Chunks of easy data need no more than this; the neighbours cost twice as much, ties (which only bounds with few
    # mantissa bits meet) twice again.
    if tl.max((exact != 0).to(tl.int32), 0) != 0:
        quantised, stored, tie = _checked(bits, step, inverse, bound, EXPONENT, MANTISSA, TIES=False)
        exact = _mask_of(valid & stored)
        tied = _mask_of(valid & tie)
        if tl.max((tied != 0).to(tl.int32), 0) != 0:
            quantised, stored, tie = _checked(bits, step, inverse, bound, EXPONENT, MANTISSA, TIES=True)
            exact = _mask_of(valid & stored)
    return quantised, exact
