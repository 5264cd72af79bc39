"""Profiles to test the transform codec with, and what it promises, computed apart from the package: docs/format.md,
"transform", written down once more in float64."""

import math
from functools import cache

import torch
from torch import Tensor

from kvferry import Profile, Rope, Transform
from kvferry.codecs.transform.profile import Layer, SideProfile

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
BLOCK = 64
ROPES = ("halves", "interleaved", "partial", "none")


def rope_of(kind: str, head_dim: int) -> Rope:
    """A RoPE of one of `ROPES`; none where the head is too narrow."""
    pairs = {"halves": head_dim // 2, "interleaved": head_dim // 2, "partial": head_dim // 4, "none": 0}[kind]
    frequencies = tuple(10000.0 ** (-i / max(1, pairs)) for i in range(pairs))
    return Rope(head_dim, 2 * pairs, frequencies, interleaved=kind == "interleaved")


def orthonormal(groups: int, n: int, seed: int) -> Tensor:
    """Random orthonormal bases, float64 `[groups, n, n]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(groups, n, n, dtype=torch.float64, generator=generator))[0]


@cache
def make_profile(
    heads: int,
    head_dim: int,
    group_heads: int = 1,
    rope: str = "halves",
    step: float = 0.25,
    *,
    layers: int = 2,
    mean: float = 1.0,
    seed: int = 0,
) -> Profile:
    """Random bases, and means of about `mean`; K's step is `step`, V's half of it, and other layers' are larger."""
    groups, n = heads // group_heads, heads // (heads // group_heads) * head_dim
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(layers):
        parts = [
            SideProfile.of(
                mean * torch.randn(groups, n, generator=generator),
                orthonormal(groups, n, 2 * layer + side + seed),
                step * (1 + 0.3 * layer) / (1 + side),
                bound=0.1 * (1 + side),
            )
            for side in range(2)
        ]
        found.append(Layer(*parts))
    return Profile(tuple(found), heads, head_dim, group_heads, rope_of(rope, head_dim))


def group_vectors(x: Tensor, group_heads: int) -> Tensor:
    """`[..., heads, tokens, head_dim]` as `[rows, groups, tokens, n]`: what the guarantee calls vectors."""
    rows = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    vectors = [
        torch.cat([rows[:, head] for head in range(start, start + group_heads)], -1)
        for start in range(0, rows.shape[1], group_heads)
    ]
    return torch.stack(vectors, 1)


def turned_back(x: Tensor, rope: Rope, first_position: int) -> Tensor:
    """Keys `[..., tokens, head_dim]` in float64 without their RoPE, by complex numbers."""
    x = x.double()
    pairs = len(rope.inv_freq)
    first = slice(0, 2 * pairs, 2) if rope.interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if rope.interleaved else slice(pairs, 2 * pairs)
    positions = torch.arange(first_position, first_position + x.shape[-2], dtype=torch.float64)
    angle = positions[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float64)
    result = x.clone()
    back = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angle), -angle)
    result[..., first], result[..., second] = back.real, back.imag
    return result


def half_units(y: Tensor) -> Tensor:
    """Half a unit in the last place of each finite value, float64."""
    mantissa, info = MANTISSA[y.dtype], torch.finfo(y.dtype)
    exponent = torch.frexp(y.double().abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.exp2((exponent - mantissa - 1).double())


def bounds_of_vectors(tensor: Tensor, back: Tensor, codec: Transform, error_bound: float) -> Tensor:
    """How far each vector of a group may be off, float64 `[rows, groups, tokens]`; `tensor` is finite."""
    profile, part = codec.profile, codec.part
    n, root = part.n, math.sqrt(part.n)
    basis = part.basis.double() / 2**15
    deviation = float(torch.linalg.matrix_norm(basis @ basis.transpose(1, 2) - torch.eye(n), 2).max()) + 2**-19
    step = part.step * root * (0.5 * error_bound + 2**-14) * (1 + deviation + 2**-15 * root) * (1 + 2**-16)
    relative = (deviation + 2**-11 + (2**-14 + 2**-20) * root) * (1 + deviation) + 2**-18
    rope = profile.rope if codec.side == "k" else Rope.none(profile.head_dim)
    turned = turned_back(tensor, rope, codec.first_position)
    from_mean = group_vectors(turned, profile.group_heads) - part.mean.double()[:, None]
    length = group_vectors(tensor.double(), profile.group_heads).norm(dim=-1)
    rounding = group_vectors(half_units(back), profile.group_heads).norm(dim=-1)
    return step + relative * from_mean.norm(dim=-1) + 2**-21 * length + rounding


def stored_blocks(tensor: Tensor, group_heads: int) -> Tensor:
    """bool, shaped like `tensor`: the values of blocks with one that is not finite, which come back bit for bit."""
    rows = tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])
    result = torch.zeros(rows.shape, dtype=torch.bool)
    for row in range(len(rows)):
        for head in range(0, rows.shape[1], group_heads):
            for start in range(0, rows.shape[2], BLOCK):
                place = (row, slice(head, head + group_heads), slice(start, start + BLOCK))
                result[place] = not rows[place].isfinite().all()
    return result.view(tensor.shape)


def assert_within_profile(
    tensor: Tensor, back: Tensor, codec: Transform, error_bound: float, bound_used: float
) -> Tensor:
    """All that `Transform` promises of `back`; the share of its bound that each vector's error takes,
    `[rows, groups, tokens]`."""
    tensor, back = tensor.detach().cpu(), back.detach().cpu()
    kept = stored_blocks(tensor, codec.profile.group_heads)
    words = (tensor.contiguous().view(torch.int16), back.contiguous().view(torch.int16))
    assert torch.equal(words[1][kept], words[0][kept]), "a block that is not finite was altered"
    assert back[~kept].isfinite().all(), "a finite value became NaN or infinite"
    finite = torch.where(kept, 0, tensor)
    back = torch.where(kept, 0, back)
    error = (back.double() - finite.double()).abs()
    if error.numel():
        assert float(error.max()) <= bound_used, f"off by {error.max()}, the frame states {bound_used}"
    vectors = group_vectors(error, codec.profile.group_heads).norm(dim=-1)
    allowed = bounds_of_vectors(finite, back, codec, error_bound)
    share = vectors / allowed
    assert not (share > 1).any(), f"a vector is off by {share.max()} times what is allowed"
    return share
