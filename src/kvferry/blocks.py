"""What a block of KV cache is, without its data: the shape and dtype that sizes are computed from."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
MANTISSA_BITS = {
    torch.bfloat16: 7,
    torch.float16: 10,
    torch.float32: 23,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}
"""Stored mantissa bits; one more is the sign, the others are the exponent."""
BIT_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""The integer dtype that shows the bits of a value of so many bytes."""


@dataclass(frozen=True)
class BlockSpec:
    """A tensor `[..., tokens, channels]` of `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "BlockSpec":
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def raw_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    return tensor.view(BIT_DTYPES[tensor.dtype.itemsize])


def each_element_once(tensor: Tensor) -> bool:
    """Whether every dimension's stride spans all smaller ones: sufficient for elements that do not share memory."""
    reach = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return False
            reach = stride * (extent - 1) + reach
    return True
