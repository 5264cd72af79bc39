"""Which table codes a channel: from integer sums over its tokens, so that every machine picks the same."""

import torch
from torch import Tensor

from kvferry.packing.ans.tables import MAX_CLASS, covered_radius, family

# Mantissas (23 bits) of 2**(1/3) and 2**(2/3), rounded up: where a third and two thirds of an octave begin.
_THIRD = 2180376
_TWO_THIRDS = 4927478
_APART_BITS = 16
_REACH_OF_4_BITS = 15
_SPARING_TOKENS = 32


def spread_class(spread: Tensor, tokens: int) -> Tensor:
    """Class of channels by `spread` = tokens**2 * variance, int64 (exact): 0 if nothing varies, else
    `max(1, floor(1.5 * (log2(variance) + 7)))`, the standard deviation's position on the scale of a third of an octave.

    The variance is taken in float32 (one rounding of the sum, one of the quotient), its logarithm from its bits.
    """
    return torch.where(spread == 0, 0, _variance_class(_variance(spread, tokens)))


def _variance(spread: Tensor, tokens: int) -> Tensor:
    return spread.float() / float(tokens * tokens)


def _variance_class(variance: Tensor) -> Tensor:
    bits = variance.view(torch.int32).long()
    octave = (bits >> 23) - 127 + 7
    mantissa = bits & 0x7FFFFF
    threshold = torch.where(octave % 2 == 0, _TWO_THIRDS, _THIRD)
    scale_class = ((3 * octave) >> 1) + (mantissa >= threshold).long()
    return scale_class.clamp(1, MAX_CLASS)


def centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """Base (the rounded mean) and class of each channel; `values` int64 `[N, T, C]`, results `[N, C]`."""
    tokens = values.shape[1]
    total, spread = _total_and_spread(values)
    return torch.div(2 * total + tokens, 2 * tokens, rounding_mode="floor"), spread_class(spread, tokens)


def _total_and_spread(values: Tensor) -> tuple[Tensor, Tensor]:
    total = values.sum(1)
    return total, values.shape[1] * (values * values).sum(1) - total * total


def sparing(values: Tensor) -> tuple[Tensor, Tensor]:
    """`centred`, but where naming bases and classes takes more bits than it spares.

    A tile whose bases fit 4 bits, and cost more than they save, has none: all are 0, and classes are those of the mean
    square. Where classes are so far apart that they take 8 bits, the smallest are raised until all fit 4, if that is
    cheaper. Tiles of less than 32 tokens are left as they are: low bits take whole words."""
    tokens, channels = values.shape[1:]
    base, scale_class = centred(values)
    if tokens < _SPARING_TOKENS:
        return base, scale_class
    total, spread = _total_and_spread(values)
    mean = total.float() / float(tokens)
    around_zero = torch.where(base == 0, scale_class, _variance_class(_variance(spread, tokens) + mean * mean))
    reach = base.amax(1) - base.amin(1)
    # A class is a third of a bit for each token,
    saved = (around_zero - scale_class).sum(1) * tokens
    needless = (reach > 0) & (reach <= _REACH_OF_4_BITS) & (saved <= 3 * 4 * channels)
    base = torch.where(needless[:, None], 0, base)
    scale_class = torch.where(needless[:, None], around_zero, scale_class)
    # a small one half of that at most.
    least = scale_class.amax(1, keepdim=True) - _REACH_OF_4_BITS
    cheap = (least - scale_class).clamp(min=0).sum(1) * tokens <= 2 * 3 * 4 * channels
    return base, torch.where(cheap[:, None], torch.maximum(scale_class, least), scale_class)


def differences(values: Tensor) -> Tensor:
    """Class of channels of first differences, around 0 and wide enough for each of them: a difference that cannot be
    coded would shift all that follow, so none is left to be stored exactly."""
    tokens = values.shape[1]
    by_spread = spread_class(tokens * (values * values).sum(1), tokens)
    by_reach = torch.searchsorted(covered_radius().to(values.device), values.abs().amax(1))
    return torch.maximum(by_spread, by_reach)


def apart(values: Tensor) -> tuple[Tensor, Tensor]:
    """(class, whether the first value is kept apart) for each channel of first differences."""
    tokens = values.shape[1]
    rest = values.clone()
    rest[:, 0] = 0
    whole, without = differences(values), differences(rest)
    # A class is a third of a bit for each token.
    keep = (whole - without) * tokens > 3 * _APART_BITS
    return torch.where(keep, without, whole), keep


def exponents(symbols: Tensor, largest_symbol: Tensor | None = None) -> Tensor:
    """One-sided class by the mean symbol, in fifths; `symbols` int64 `[N, T, C]`, those of zero and denormal values
    (exponent field 0, symbol equal to `largest_symbol` `[N, C]`) left out of the mean."""
    counted = (
        torch.ones_like(symbols, dtype=torch.bool) if largest_symbol is None else symbols < largest_symbol[:, None]
    )
    total = torch.where(counted, symbols, 0).sum(1)
    mean = 5 * total // counted.sum(1).clamp(min=1)
    return mean.clamp(max=family(True).count - 1)
