"""The transform in plain PyTorch, on any device (docs/format.md, `transform`).

Matrix products are of integers and exact, and everything else is single IEEE operations in a fixed order: a CPU and a
GPU make the same coefficients, bit for bit, and hence the same bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.codecs.transform.profile import BASIS_BITS, Profile, SideProfile
from kvferry.codecs.transform.rope import Rope

DROPPED_BITS = 8
"""Of a product's sum, which has 30 behind the point: what is left fits 32-bit integers."""
ROW_BITS = 15
"""A row is scaled by a power of two such that its largest value takes so many bits."""
SMALLEST = 2.0**-14
"""Coefficients below are zero: denormals of float16, which the coder would have to store in full."""
LARGEST = 65504.0
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -60, 128


@dataclass(frozen=True)
class Matrices:
    """A `SideProfile` where it is used: `mean` float32 `[G, n]`, `basis` float64 `[G, n, n]` (integers), `step` and its
    reciprocal float32 `[]`."""

    mean: Tensor
    basis: Tensor
    step: Tensor
    inverse_step: Tensor

    @classmethod
    def of(cls, side: SideProfile, device: torch.device) -> "Matrices":
        step = torch.tensor(side.step, dtype=torch.float32, device=device)
        # Zeros without a sign: sums of integers have none to add it to.
        return cls(side.mean.to(device) + 0.0, side.basis.to(device).double(), step, 1 / step)


@dataclass(frozen=True)
class Angles:
    """RoPE at each token: float32 `[T, rotary_dim/2]` each; None where nothing is turned (values)."""

    rope: Rope
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, profile: Profile, side: str, positions: Tensor) -> "Angles | None":
        if side != "k" or not profile.rope.rotary_dim:
            return None
        cos, sin = profile.rope.table(positions)
        return cls(profile.rope, cos.to(positions.device), sin.to(positions.device))


def row_exponent(rows: Tensor) -> Tensor:
    """int32 `[..., 1]`: the power of two under which a row's values, times 2**15 and rounded, take 16 bits with their
    sign; at least -60."""
    largest = rows.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    return exponent + (largest * power_of_two(ROW_BITS - exponent) >= (1 << ROW_BITS) - 0.5)


def scaled_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix / 2**15`, float32 `[G, R, n]`, of float32 `rows` `[G, R, n]` (finite) and integers `matrix`
    float64 `[G, n, n]`: each row is rounded to 16-bit integers under a power of two of its own and multiplied exactly
    (sums stay below 2**53); their lowest 8 bits are dropped, and what is left is rounded once to float32."""
    exponent = row_exponent(rows)
    whole = (rows * power_of_two(ROW_BITS - exponent)).round()
    product = ((whole.double() @ matrix) / (1 << DROPPED_BITS)).floor().float()
    return product * power_of_two(exponent - ROW_BITS - BASIS_BITS + DROPPED_BITS)


def forward(values: Tensor, matrices: Matrices, angles: Angles | None) -> tuple[Tensor, Tensor]:
    """(coefficients float16 `[H, T, D]`, which tokens of which group have none, bool `[G, T]`) of a layer's K or V
    `[H, T, D]`. Where there are none (a value that is not finite, a coefficient beyond float16) they are 0."""
    x = values.float()
    finite = x.isfinite()
    x = torch.where(finite, x, 0.0)
    if angles is not None:
        x = angles.rope.unrotate(x, angles.cos, angles.sin)
    rows = group_rows(x, matrices) - matrices.mean[:, None]
    # Finite values near the end of float32 may leave it here.
    bad = ~group_rows(finite, matrices).all(-1) | ~rows.isfinite().all(-1)
    units = scaled_product(torch.where(bad[..., None], 0.0, rows), matrices.basis) * matrices.inverse_step
    bad |= (units.abs() > LARGEST).any(-1)
    coefficients = torch.where(bad[..., None], 0.0, units).to(torch.float16)
    coefficients = torch.where(coefficients.abs() < SMALLEST, 0.0, coefficients)
    return ungroup_rows(coefficients, values.shape[-1]), bad


def inverse(coefficients: Tensor, matrices: Matrices, angles: Angles | None, dtype: torch.dtype) -> Tensor:
    """The values `[H, T, D]` of `dtype` that coefficients float16 `[H, T, D]` stand for."""
    rows = scaled_product(group_rows(coefficients.float(), matrices), matrices.basis.transpose(1, 2))
    x = ungroup_rows(rows * matrices.step + matrices.mean[:, None], coefficients.shape[-1])
    if angles is not None:
        x = angles.rope.rotate(x, angles.cos, angles.sin)
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def group_rows(x: Tensor, matrices: Matrices) -> Tensor:
    """`[H, T, D]` as `[G, T, n]`: the heads of a group side by side."""
    groups, n = matrices.mean.shape
    heads, tokens, dim = x.shape
    return x.reshape(groups, heads // groups, tokens, dim).transpose(1, 2).reshape(groups, tokens, n)


def ungroup_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Undo `group_rows`: coefficient j of a group lies in its head `j // head_dim`, channel `j % head_dim`."""
    groups, tokens, n = rows.shape
    heads = n // head_dim
    return rows.reshape(groups, tokens, heads, head_dim).transpose(1, 2).reshape(groups * heads, tokens, head_dim)


def power_of_two(exponent: Tensor) -> Tensor:
    """Float32 2**exponent, exact (the exponents used are those of normal numbers)."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
