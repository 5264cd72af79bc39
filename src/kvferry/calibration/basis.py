"""The Karhunen-Loève transform: the orthonormal basis in which a layer's channels do not correlate.

Of all orthonormal transforms it packs the most variance into the fewest coefficients, which at a given step takes the
fewest bits (A. K. Jain, "Fundamentals of Digital Image Processing", 1989, section 5.11).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvferry.calibration.moments import Moments
from kvferry.codecs.transform.profile import MOST_GROUP_CHANNELS, Layer, Profile, SideProfile
from kvferry.codecs.transform.rope import Rope

Scope = Literal["auto", "layer", "head"]


def heads_of_a_group(heads: int, head_dim: int, scope: Scope) -> int:
    """How many heads are transformed together: one ("head"), all of a layer ("layer"), or as many as divide them and
    stay within the codec's `MOST_GROUP_CHANNELS` ("auto"). Raises `ValueError` when the scope does not allow for it.
    """
    if scope not in ("auto", "layer", "head"):
        raise ValueError(f"scope={scope!r}: give auto, layer or head")
    if head_dim > MOST_GROUP_CHANNELS or (scope == "layer" and heads * head_dim > MOST_GROUP_CHANNELS):
        raise ValueError(
            f"{heads} heads of {head_dim} channels do not fit a group of at most {MOST_GROUP_CHANNELS}: "
            "give --scope auto or head"
        )
    if scope == "head":
        return 1
    return max(g for g in range(1, heads + 1) if heads % g == 0 and g * head_dim <= MOST_GROUP_CHANNELS)


def klt(covariance: Tensor) -> Tensor:
    """Eigenvectors of `[groups, n, n]` as columns, in order of falling variance; the largest entry of each is positive,
    so that equal moments give equal bases."""
    vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def profile_of(moments: Moments, heads: int, head_dim: int, rope: Rope) -> Profile:
    """Means and bases of all layers, with one standard deviation for a step, and no bounds."""
    layers = []
    for layer, steps in enumerate(deviations(moments)):
        sides = [
            SideProfile.of(moments.mean(layer, side), klt(moments.covariance(layer, side)), step)
            for side, step in enumerate(steps)
        ]
        layers.append(Layer(*sides))
    return Profile(tuple(layers), heads, head_dim, moments.sums.shape[-1] // head_dim, rope)


def deviations(moments: Moments) -> list[tuple[float, float]]:
    """Of K and V of every layer; above 0, also where a side is constant."""
    found = [(moments.deviation(layer, 0), moments.deviation(layer, 1)) for layer in range(len(moments.sums))]
    smallest = max(1e-6 * max(map(max, found)), 1e-12)
    return [(max(k, smallest), max(v, smallest)) for k, v in found]
