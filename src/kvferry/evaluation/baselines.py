"""What every user already has or has read of, for comparison: casts and integer quantisation. They promise no bound.

All really encode to bytes, and their size is that of all arrays needed to decode (codes, scales, zeros). Shapes and
dtypes are not counted, which favours them by about 100 bytes a tensor over kvferry's self-describing frames. Scales and
zeros take the tensor's own dtype where it has 16 bits, so that zeros are exact, and bfloat16 for float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvferry.errors import CorruptFrame
from kvferry.evaluation.coders import Coder, CoderScheme, Place, from_bytes, to_bytes
from kvferry.evaluation.schemes import Guarantee

FP8_MAX = 448.0  # largest finite e4m3fn value
SMALLEST_SCALE = 1e-7  # of a row whose values are all equal; not zero in any 16-bit dtype
BITS = (2, 3, 4, 8)
GROUP = 32  # KIVI's


class Baseline(Coder, Protocol):
    """A coder with a name. Those of one `family` differ in `setting`."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def setting(self) -> str: ...


class _NoPromise:
    """For all of them."""

    def bound(self, data: bytes, place: Place) -> float | None:
        """None is promised."""
        return None


@dataclass(frozen=True)
class Fp8Cast(_NoPromise):
    """A saturating cast to float8 e4m3fn, without scales: one byte a value."""

    name = family = "fp8 e4m3 cast"
    setting = ""

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """`num_values` bytes."""
        return to_bytes(tensor.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Values as `dtype`."""
        _check_length(data, torch.Size(shape).numel(), self.name)
        return from_bytes(data, shape, torch.float8_e4m3fn, device).to(dtype)


@dataclass(frozen=True)
class IntPerTokenHead(_NoPromise):
    """2**`bits` levels between the smallest and largest value of each token and head. Raises `ValueError` for other
    `bits` than 2, 3, 4, 8."""

    bits: int = 4

    family = "int per token and head"

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    @property
    def name(self) -> str:
        """Bits and rows."""
        return f"int{self.bits} per token and head"

    @property
    def setting(self) -> str:
        """The bits."""
        return f"{self.bits} bit"

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """Codes, one dense stream of bits; scales and zeros `[rows]`, 16 bits each."""
        if tensor.numel() == 0:
            return b""
        return _quantise(tensor.reshape(-1, tensor.shape[-1]), self.bits)

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zero plus code times scale, computed in float32, as `dtype`."""
        return self.decode_float(data, shape, dtype, device).to(dtype)

    def decode_float(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The float32 values, before they are rounded to `dtype`."""
        values = torch.Size(shape).numel()
        rows = (values // shape[-1], shape[-1]) if values else (0, 1)
        _check_length(data, _quantised_bytes(rows, self.bits), self.name)
        return _dequantise(data, rows, self.bits, dtype, device).reshape(shape)


@dataclass(frozen=True)
class HadamardInt(_NoPromise):
    """Each head turned by a Hadamard matrix (Sylvester's, on the largest power of two that divides the channels), which
    spreads large channels over all, and then `IntPerTokenHead` (S. Ashkboos et al., "QuaRot", arXiv:2404.00456,
    section 4.2). Keys are turned as they are cached, after RoPE. The rotation is computed in float32."""

    bits: int = 4

    family = "Hadamard int"

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    @property
    def name(self) -> str:
        """Bits."""
        return f"Hadamard int{self.bits}"

    @property
    def setting(self) -> str:
        """The bits."""
        return f"{self.bits} bit"

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """As `IntPerTokenHead`, with scales and zeros in the tensor's dtype."""
        if tensor.numel() == 0:
            return b""
        turned = tensor.float() @ hadamard(tensor.shape[-1]).to(tensor.device)
        return _quantise(turned.reshape(-1, tensor.shape[-1]), self.bits, _parameter_dtype(tensor.dtype))

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Turned back."""
        values = IntPerTokenHead(self.bits).decode_float(data, shape, dtype, device)
        if not values.numel():
            return values.to(dtype)
        return (values @ hadamard(shape[-1]).to(device).T).to(dtype)


@dataclass(frozen=True)
class Kivi(_NoPromise):
    """KIVI's grouping (Z. Liu et al., arXiv:2402.02750, section 3): keys per channel over `group` tokens, values per
    token over `group` channels, each group with 2**`bits` levels between its smallest and largest value.

    Groups at the end are shorter where `group` does not divide. KIVI's window of recent tokens in full precision is
    left out: the prefix is one that was stored. Raises `ValueError` for other `bits` than 2, 3, 4, 8 or a group
    below 1."""

    bits: int = 4
    group: int = GROUP

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.group < 1:
            raise ValueError(f"groups of {self.group}: give at least 1, such as {GROUP}")

    @property
    def name(self) -> str:
        """Bits, and the group where it is not KIVI's own."""
        return f"KIVI-style int{self.bits}" + ("" if self.group == GROUP else f" groups of {self.group}")

    @property
    def family(self) -> str:
        """Which group."""
        return "KIVI-style int" + ("" if self.group == GROUP else f" groups of {self.group}")

    @property
    def setting(self) -> str:
        """The bits."""
        return f"{self.bits} bit"

    def encode(self, tensor: Tensor, place: Place) -> bytes:
        """What `_quantise` makes of all whole groups, then of the shorter ones."""
        turned = tensor.transpose(-1, -2) if place.side == "k" else tensor
        return b"".join(_quantise(part, self.bits) for part in self._rows(turned) if part.numel())

    def decode(
        self, data: bytes, place: Place, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zero plus code times scale, computed in float32, as `dtype`."""
        turned = (*shape[:-2], shape[-1], shape[-2]) if place.side == "k" else shape
        width = turned[-1] // self.group * self.group
        lines = math.prod(turned[:-1])
        whole = (lines * (width // self.group), self.group) if lines and width else (0, 1)
        short = (lines, turned[-1] - width) if lines and turned[-1] > width else (0, 1)
        first = _quantised_bytes(whole, self.bits)
        _check_length(data, first + _quantised_bytes(short, self.bits), self.name)
        parts = (
            _dequantise(data[:first], whole, self.bits, dtype, device).reshape(*turned[:-1], width),
            _dequantise(data[first:], short, self.bits, dtype, device).reshape(*turned[:-1], turned[-1] - width),
        )
        values = torch.cat(parts, dim=-1).to(dtype)
        return values.transpose(-1, -2).contiguous() if place.side == "k" else values

    def _rows(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The whole groups `[groups, group]` along the last dimension, and the shorter ones `[lines, rest]`."""
        width = tensor.shape[-1] // self.group * self.group
        rest = tensor.shape[-1] - width
        return tensor[..., :width].reshape(-1, self.group), tensor[..., width:].reshape(-1, max(rest, 1))


def baseline_scheme(baseline: Baseline, name: str | None = None) -> CoderScheme:
    """A baseline through the same store as the codecs, under its own or another `name`."""
    return CoderScheme(name or baseline.name, baseline.family, baseline.setting, baseline, Guarantee.NONE)


def hadamard(size: int) -> Tensor:
    """Orthonormal, float32 `[size, size]`: Hadamard blocks of the largest power of two that divides `size`."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    scaled = block / math.sqrt(len(block))
    whole: Tensor = torch.block_diag(*[scaled] * (size // len(block)))
    return whole


# -- rows of values to codes, scales and zeros ------------------------------------------------------------------------


def _quantise(rows: Tensor, bits: int, parameters: torch.dtype | None = None) -> bytes:
    """`[rows, width]`, not empty: codes as one dense stream of bits, then scales and zeros `[rows]`."""
    parameters = parameters or _parameter_dtype(rows.dtype)
    values = rows.float()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    levels = (1 << bits) - 1
    scales = ((high - low) / levels).clamp(min=SMALLEST_SCALE).to(parameters)
    zeros = low.to(parameters)
    codes = torch.round((values - zeros.float()) / scales.float()).clamp(0, levels).to(torch.uint8)
    return to_bytes(_pack(codes.reshape(-1), bits)) + to_bytes(scales) + to_bytes(zeros)


def _dequantise(data: bytes, rows: tuple[int, int], bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Undo `_quantise`: float32 of shape `rows`. `dtype` is that of the tensor that was quantised."""
    if not rows[0]:
        return torch.empty(0, device=device)
    num_codes = rows[0] * rows[1]
    at = -(-num_codes * bits // 8)
    codes = _unpack(from_bytes(data[:at], (at,), torch.uint8, device), num_codes, bits)
    scales, zeros = from_bytes(data[at:], (2, rows[0], 1), _parameter_dtype(dtype), device).float()
    values: Tensor = zeros + codes.reshape(rows) * scales
    return values


def _quantised_bytes(rows: tuple[int, int], bits: int) -> int:
    return -(-rows[0] * rows[1] * bits // 8) + 4 * rows[0]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """The low `bits` of each code u8 `[N]`, the first in the lowest bits, as u8 `[ceil(N * bits / 8)]`."""
    if bits == 8:
        return codes
    # Eight codes fill `bits` bytes, whatever the bits.
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % 8)).reshape(-1, 8).long()
    words = (padded << (bits * torch.arange(8, device=codes.device))).sum(1)
    packed = words[:, None] >> (8 * torch.arange(bits, device=codes.device)) & 255
    return packed.to(torch.uint8).reshape(-1)[: -(-len(codes) * bits // 8)]


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Undo `_pack`: u8 `[count]`."""
    if bits == 8:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).reshape(-1, bits).long()
    words = (padded << (8 * torch.arange(bits, device=packed.device))).sum(1)
    codes = words[:, None] >> (bits * torch.arange(8, device=packed.device)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(-1)[:count]


def _parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits} must be one of {', '.join(map(str, BITS))}")


def _check_length(data: bytes, expected: int, name: str) -> None:
    if len(data) != expected:
        raise CorruptFrame(f"{name}: {len(data)} bytes where the shape needs {expected}")
