"""The error-bounded quantiser in plain PyTorch, and its first differences (docs/format.md, `bounded`).

Quantising to multiples of twice the bound and coding first differences is cuSZp's scheme (Y. Huang et al., SC 2023,
section 4.1; the outlier mode is that of cuSZp2, SC 2024, section 4). New here: the delivered value, rounded to its
dtype, is what the bound is tested on, and what fails is stored exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.blocks import BIT_DTYPES, FLOAT_DTYPES
from kvferry.blocks import MANTISSA_BITS as ALL_MANTISSA_BITS
from kvferry.packing.columns import Bases, Columns, Decoded, Layout, empty_planes

LARGEST_CODE = 1 << 22
"""|x/step| from which float32 arithmetic no longer tells neighbouring codes apart."""
BASES = {"fixed": Bases.ALL, "plain": Bases.NONE, "outlier": Bases.APART}
MANTISSA_BITS = {dtype: ALL_MANTISSA_BITS[dtype] for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class Steps:
    """Per tile `[N]`, or per channel `[N, C]`, float32: step, its reciprocal, and the bound the result is tested on."""

    step: Tensor
    inverse: Tensor
    bound: Tensor

    def per_value(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, shaped to broadcast over `[N, T, C]`."""
        if self.step.dim() == 2:
            return self.step[:, None], self.inverse[:, None], self.bound[:, None]
        return self.step[:, None, None], self.inverse[:, None, None], self.bound[:, None, None]

    def rows(self, index: Tensor) -> "Steps":
        return Steps(self.step[index], self.inverse[index], self.bound[index])


def layout(dtype: torch.dtype, mode: str, channel_steps: bool) -> Layout:
    return Layout(dtype.itemsize, BASES[mode], channel_steps=channel_steps)


def deliver(codes: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """What a decoder makes of integer codes: product and rounding, each to nearest even; a tensor of `dtype`."""
    return (codes.float() * step).to(dtype)


def within(value: Tensor, delivered: Tensor, bound: Tensor) -> Tensor:
    """Whether |value - delivered| <= bound in exact arithmetic; float32. The difference's rounding error is computed
    exactly (D. Knuth, TAOCP vol. 2, 4.2.2, theorem B) and decides where the rounded difference equals the bound."""
    difference = value - delivered
    size = difference.abs()
    inside = size < bound
    equal = size == bound
    if bool(equal.any()):
        part = difference - value
        error = (value - (difference - part)) - (delivered + part)
        inside |= equal & torch.where(difference > 0, error <= 0, error >= 0)
    return inside


def quantise(values: Tensor, bits: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, first guesses, which values to store exactly) of `values` `[N, T, C]` with bit patterns `bits`."""
    step, inverse, bound = steps.per_value()
    x = values.float()
    scaled = x * inverse
    usable = scaled.abs() < LARGEST_CODE
    guess = torch.where(usable, scaled.round(), 0.0)
    first = deliver(guess, step, values.dtype).float()
    good = within(x, first, bound)
    code = guess.to(torch.int32)
    # Rounding may have moved the nearest code's value away from x and its neighbour's towards it. Few values ask for
    # it.
    doubtful = (usable & ~good).nonzero(as_tuple=True)
    near = x[doubtful]
    other = guess[doubtful] + torch.where(near > first[doubtful], 1.0, -1.0)
    their_step, their_bound = step.expand_as(x)[doubtful], bound.expand_as(x)[doubtful]
    other_good = within(near, deliver(other, their_step, values.dtype).float(), their_bound)
    code[doubtful] = torch.where(other_good, other, guess[doubtful]).to(torch.int32)
    good[doubtful] = other_good
    mantissa = (1 << MANTISSA_BITS[values.dtype]) - 1
    top = 1 << (8 * values.element_size() - 1)
    word = bits.long() & (2 * top - 1)
    magnitude = word & (top - 1)
    special = (word == top) | ((magnitude <= mantissa) & (magnitude > 0))
    exact = ~usable | ~good | special
    return code, guess.to(torch.int32), exact


def difference(codes: Tensor, group_tokens: int) -> Tensor:
    """First differences along the tokens of each group; a group's first value stays."""
    result = codes.clone()
    result[:, 1:] -= codes[:, :-1]
    result[:, ::group_tokens] = codes[:, ::group_tokens]
    return result


def accumulate(differences: Tensor, group_tokens: int) -> Tensor:
    """Inverse of `difference`."""
    return torch.cat([part.cumsum(1) for part in differences.split(group_tokens, dim=1)], 1)


def to_columns(values: Tensor, bits: Tensor, steps: Steps, mode: str, group_tokens: int) -> Columns:
    code, guess, exact = quantise(values, bits, steps)
    if mode != "fixed":
        code = guess = difference(code, group_tokens)
    return Columns(code, guess, empty_planes(code), exact, bits, steps.step)


def to_bits(decoded: Decoded, dtype: torch.dtype, mode: str, group_tokens: int) -> Tensor:
    """Bit patterns `[N, T, C]` of what a packer decoded."""
    code = decoded.values if mode == "fixed" else accumulate(decoded.values, group_tokens)
    step = decoded.step[:, None] if decoded.step.dim() == 2 else decoded.step[:, None, None]
    return deliver(code, step, dtype).view(BIT_DTYPES[dtype.itemsize])
