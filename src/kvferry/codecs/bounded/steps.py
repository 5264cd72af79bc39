"""From the bound that a user asks to the step of each tile's quantiser. The same arithmetic on every device.

Every operation is one IEEE operation on float32 or float64, or on integers, so the CPU and the GPU get the same bits.
"""

import torch
from torch import Tensor

SMALLEST_STEP = 2.0**-100
"""Below this the reciprocal or the products would leave float32's normal range; such tiles are stored exactly."""
LARGEST_BOUND = 2.0**126
"""Twice that is still finite in float32."""
SAMPLED_TOKENS = 8
"""Of so many tokens, one counts for a tile's typical exponent."""
_LEVELS = 6
_FINE = 2.0**21


def bound_from_range(minimum: Tensor, maximum: Tensor, error_bound: float) -> Tensor:
    """float32 bound, never above `error_bound * (maximum - minimum)` in exact arithmetic; same shape as the arguments.

    `minimum > maximum` says that there is no finite value: the bound is 0 then.
    """
    width = (maximum.double() - minimum.double()).clamp(min=0)
    # Two roundings (difference, product) of at most 2**-53 each; the factor is more than both.
    return round_down(width * error_bound * (1 - 2.0**-50))


def round_down(bound: Tensor) -> Tensor:
    """The largest float32 not above each float64 `bound`, and not above 2**126."""
    nearest = bound.float()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.double() > bound, below, nearest).clamp(max=LARGEST_BOUND)


def loosen_bound(bound: Tensor, factor: float) -> Tensor:
    """`bound` float32 times `factor` (a float32 below 2**128), and not above 2**126."""
    return (bound * factor).clamp(max=LARGEST_BOUND)


def tile_statistics(values: Tensor, ranges: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest finite value of each channel `[N, C]` (+inf and -inf where there is none, and where `ranges`
    are not wanted) and exponent sums int64 `[N]` of `values` float32 `[N, T, C]`."""
    low = torch.full((values.shape[0], values.shape[2]), torch.inf)
    high = torch.full_like(low, -torch.inf)
    if ranges:
        finite = values.isfinite()
        low = torch.where(finite, values, torch.inf).amin(1)
        high = torch.where(finite, values, -torch.inf).amax(1)
    return low, high, (values[:, ::SAMPLED_TOKENS].contiguous().view(torch.int32) >> 23 & 255).sum((1, 2))


def step_from_bound(
    bound: Tensor, exponent_sum: Tensor, num_sampled: Tensor, mantissa_bits: int, channel_steps: bool
) -> tuple[Tensor, Tensor]:
    """(step, 1/step) float32 for `bound` float32 `[N]` or `[N, C]`; (0, 0) where only exact storage keeps the bound.

    Twice the bound would be the step if delivered values were not rounded to their dtype. With a unit in the last place
    u, the delivered values sit on multiples of u, neighbours `floor(step/u)` or one more units apart; everything
    between them is within the bound unless that count is even and exceeds `2*bound/u`. So the step is the largest one
    not above twice the bound for which `ceil(step/u) <= 2*floor(bound/u) + 1`, for u as coarse as a tile's typical
    values have and the next finer ones. Rarer, larger values that miss the bound are stored exactly; the quantiser
    tests each one.

    `exponent_sum` and `num_sampled` int64 `[N]`: biased float32 exponents summed over every eighth token, and their
    number.
    """
    doubled = 2 * bound
    step = doubled.clone()
    # The mean exponent of Gaussian values lies 1.4 below that of their standard deviation; two above it covers most.
    typical = torch.div(exponent_sum, num_sampled.clamp(min=1), rounding_mode="floor") + 2
    if bound.dim() == 2:
        typical = typical[:, None]
    for level in range(_LEVELS):
        field = typical - mantissa_bits - level  # biased exponent of u
        inside = (field >= 1) & (field <= 254)
        unit = (field.clamp(1, 254) << 23).to(torch.int32).view(torch.float32)
        count = torch.floor(bound / unit)
        limit = (2 * count + 1) * unit
        step = torch.where(inside & (count < _FINE) & (limit < step), limit, step)
    if channel_steps:
        step = (step.view(torch.int32) & -65536).view(torch.float32)
    step = torch.where(step >= SMALLEST_STEP, step, 0.0)
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    return step, inverse
