"""Values as exponent and the rest (docs/format.md, `lossless`), in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.blocks import BIT_DTYPES, MANTISSA_BITS
from kvferry.packing.columns import Bases, Columns, Decoded, Layout


@dataclass(frozen=True)
class Split:
    """How a dtype's bits divide: exponent and mantissa widths; `planes` bytes of sign and mantissa go to byte
    planes."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def rest_bits(self) -> int:
        """Sign and mantissa."""
        return self.mantissa_bits + 1

    @property
    def planes(self) -> int:
        return self.rest_bits // 8

    @property
    def low_bits(self) -> int:
        """Sign and mantissa bits that fill no byte and stay with the exponent."""
        return self.rest_bits % 8

    @property
    def itemsize(self) -> int:
        return (self.exponent_bits + self.rest_bits) // 8

    def layout(self) -> Layout:
        return Layout(self.itemsize, Bases.ALL, one_sided=True, planes=self.planes, low_bits=self.low_bits)


SPLITS = {dtype: Split(8 * dtype.itemsize - 1 - mantissa, mantissa) for dtype, mantissa in MANTISSA_BITS.items()}


def to_columns(bits: Tensor, split: Split) -> Columns:
    """Columns of bit patterns `[N, T, C]`."""
    word = bits.long() & ((1 << 8 * split.itemsize) - 1)
    exponent = (word >> split.mantissa_bits) & ((1 << split.exponent_bits) - 1)
    sign = word >> (8 * split.itemsize - 1)
    rest = sign << split.mantissa_bits | word & ((1 << split.mantissa_bits) - 1)
    planes = torch.stack([rest >> 8 * p & 255 for p in range(split.planes)], 1) if split.planes else rest[:, :0, None]
    values = (-exponent << split.low_bits) + (rest >> 8 * split.planes)
    columns = values.to(torch.int32)
    exact = torch.zeros_like(columns, dtype=torch.bool)
    planes = planes.reshape(len(bits), split.planes, *bits.shape[1:]).to(torch.uint8)
    step = torch.zeros(len(bits), dtype=torch.float32, device=bits.device)
    return Columns(columns, columns, planes, exact, bits, step)


def to_bits(decoded: Decoded, split: Split) -> Tensor:
    """Bit patterns `[N, T, C]` of what a packer decoded."""
    rest = decoded.values & ((1 << split.low_bits) - 1)
    exponent = -(decoded.values >> split.low_bits) & ((1 << split.exponent_bits) - 1)
    rest = rest << 8 * split.planes
    for p in range(split.planes):
        rest = rest | decoded.planes[:, p].long() << 8 * p
    sign = rest >> split.mantissa_bits
    word = sign << (8 * split.itemsize - 1) | exponent << split.mantissa_bits | rest & ((1 << split.mantissa_bits) - 1)
    return word.to(BIT_DTYPES[split.itemsize])
