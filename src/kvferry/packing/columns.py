"""What a codec hands to a packer, and gets back: a batch of equal tiles as columns of integers."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Bases(Enum):
    """Which groups store a base beside their class (docs/format.md, "From values to integers")."""

    ALL = "all"
    """Every group: a base near its values is subtracted (`fixed`, `lossless`)."""
    NONE = "none"
    """No group (`plain`)."""
    APART = "apart"
    """The groups whose large first value is cheaper kept apart (`outlier`)."""


@dataclass(frozen=True)
class Layout:
    """What the sections of a coded tile are; the same for all tiles of a batch.

    `itemsize` bytes of a value stored exactly; `planes` byte planes; `low_bits` bits of `values` that are always raw;
    `one_sided` symbols count down from the group's largest exponent; `channel_steps` each channel has its own step.
    """

    itemsize: int
    bases: Bases
    one_sided: bool = False
    planes: int = 0
    low_bits: int = 0
    channel_steps: bool = False


@dataclass(frozen=True)
class Columns:
    """N tiles of T tokens x C channels.

    `values` int32 `[N, T, C]`; `estimate` int32, what statistics are taken from (the quantiser's first guess; `values`
    where there is no better); `planes` uint8 `[N, P, T, C]`; `exact` bool `[N, T, C]`, the values to store in their own
    bits; `bits` the original bit patterns, any integer dtype `[N, T, C]`; `step` float32 `[N]`, or `[N, C]` with
    channel steps.
    """

    values: Tensor
    estimate: Tensor
    planes: Tensor
    exact: Tensor
    bits: Tensor
    step: Tensor


@dataclass(frozen=True)
class Decoded:
    """What a packer makes of coded tiles: `values`, `planes` and `step` as in `Columns`, and the exact values as
    indices (tile, flat position) with their bits. `good` bool `[N]`: False for tiles whose bytes contradict
    themselves."""

    values: Tensor
    planes: Tensor
    step: Tensor
    exact_tile: Tensor
    exact_position: Tensor
    exact_bits: Tensor
    good: Tensor


def empty_planes(values: Tensor) -> Tensor:
    return torch.empty(values.shape[0], 0, *values.shape[1:], dtype=torch.uint8, device=values.device)


def bit_width(values: Tensor) -> Tensor:
    """Bits needed to hold each non-negative int64: 0 for 0. Exact below 2**53."""
    return torch.frexp(values.double()).exponent.long()
