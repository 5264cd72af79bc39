"""What codecs would deliver, without their bytes: quick enough to search with. Certificates come from the codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvferry.calibration.moments import SIDES, group_rows, ungroup_rows
from kvferry.codecs.transform.profile import BASIS_BITS, Profile
from kvferry.evaluation.baselines import FP8_MAX

Change = Callable[[int, int, Tensor], Tensor]
"""(layer, side 0 for K or 1 for V, tensor `[1, heads, tokens, head_dim]`) to what the model gets in its place."""
Scales = Sequence[tuple[float, float]]
"""Of K and V of every layer."""


def transformed(profile: Profile, steps: Scales) -> Change:
    """Coefficients rounded to the steps."""
    tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def change(layer: int, side: int, tensor: Tensor) -> Tensor:
        device, step = tensor.device, steps[layer][side]
        part = profile.side(layer, SIDES[side])
        basis = part.basis.to(device).float() / (1 << BASIS_BITS)
        mean = part.mean.to(device)[:, None]
        x = tensor[0].float()
        turned = side == 0 and profile.rope.rotary_dim > 0
        if turned:
            at = (x.shape[1], device)
            if at not in tables:
                cos, sin = profile.rope.table(torch.arange(x.shape[1]))
                tables[at] = cos.to(device), sin.to(device)
            x = profile.rope.unrotate(x, *tables[at])
        rows = (group_rows(x, profile.group_heads) - mean) @ basis
        rows = (rows / step).round() * step
        x = ungroup_rows(rows @ basis.transpose(1, 2) + mean, profile.group_heads)
        if turned:
            x = profile.rope.rotate(x, *tables[at])
        return x.to(tensor.dtype)[None]

    return change


def rounded(bounds: Scales) -> Change:
    """Values rounded to twice the bounds, as `bounded` in `fixed` mode."""

    def change(layer: int, side: int, tensor: Tensor) -> Tensor:
        step = 2 * bounds[layer][side]
        return ((tensor.float() / step).round() * step).to(tensor.dtype)

    return change


def fp8_cast(layer: int, side: int, tensor: Tensor) -> Tensor:
    """A saturating cast to float8 e4m3fn and back."""
    return tensor.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(tensor.dtype)


def only(layer: int, sides: tuple[int, ...], change: Change) -> Change:
    """`change` on some sides of one layer, and nothing else."""
    return lambda i, side, tensor: change(i, side, tensor) if i == layer and side in sides else tensor
