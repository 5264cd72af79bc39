"""Policies whose choice stays: one codec for all, or what a profile says of each layer's K and V."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.checks import one_of
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform.profile import SIDES, Profile
from kvferry.packing import PACKERS
from kvferry.policy.choice import KOrV, choose


@dataclass(frozen=True)
class Constant:
    """`codec` for everything. A `Transform` of no layer is asked for each. Raises `TypeError` for what is no codec."""

    codec: Codec

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise TypeError(f"codec is a {type(self.codec).__name__}: give a codec such as kvferry.Lossless()")

    def __call__(self, layer_index: int, which: KOrV, tensor: Tensor, /) -> Codec:
        return choose(self.codec, layer_index, which, tensor)


@dataclass(frozen=True)
class ByProfile:
    """What `profile` was calibrated to, for each layer's K and V: `codec` "transform" is `Transform` with its bases and
    steps, "bounded" is `Bounded` at its absolute bounds. `error_bound` multiplies both: 1 is what the profile's
    certificate was measured at. `packing`: "ans" or "bitpack".

    Raises `ValueError` for other parameters, and with "bounded" for a profile without bounds; when called,
    `ProfileMismatch` for a layer that the profile lacks.
    """

    profile: Profile
    codec: Literal["transform", "bounded"] = "transform"
    error_bound: float = 1.0
    packing: str = "ans"

    def __post_init__(self) -> None:
        if not isinstance(self.profile, Profile):
            raise TypeError(f"profile is a {type(self.profile).__name__}; load one with kvferry.Profile.load(path)")
        one_of("codec", self.codec, ("transform", "bounded"))
        one_of("packing", self.packing, PACKERS)
        if self.codec == "transform":
            Transform(self.profile, error_bound=self.error_bound)  # raises for a bound that is none
            return
        if not 0 < self.error_bound < math.inf:
            raise ValueError(f"error_bound={self.error_bound!r} must be a finite number above 0, such as 1.0")
        for number, layer in enumerate(self.profile.layers):
            for side, part in zip(SIDES, layer, strict=True):
                if not part.bound:
                    raise ValueError(
                        f"the profile has no bound for layer {number} {side}: calibrate the model (kvferry calibrate), "
                        'give bounds with Profile.with_bounds, or take codec="transform"'
                    )
                Bounded(part.bound * self.error_bound, relative=False)  # raises where the product is none

    def __call__(self, layer_index: int, which: KOrV, tensor: Tensor, /) -> Codec:
        if self.codec == "transform":
            return Transform(self.profile, layer_index, which, self.error_bound, packing=self.packing)
        bound = self.profile.side(layer_index, which).bound * self.error_bound
        return Bounded(bound, relative=False, packing=self.packing)
