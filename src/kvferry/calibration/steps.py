"""Steps, layer by layer: each K and V gets the step at which it adds the same KL.

The error of a rounded coefficient has variance step**2 / 12, and KL grows with the variance as long as it is small. At
a given sum of KL, bits (which fall by one for each doubling of a step) are fewest where every tensor contributes the
same: the reverse water-filling of rate-distortion theory, with KL for distortion (T. Cover, J. Thomas, "Elements of
Information Theory", 2006, section 10.3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvferry.calibration.held_out import HeldOut
from kvferry.calibration.simulate import Scales, only, transformed
from kvferry.codecs.transform.profile import Profile

PROBE_STEP = 1.0
"""Standard deviations, of the step whose KL is the sensitivity: about what targets worth aiming at end up with."""
NOISE_STEP = 1 / 32
"""Far below any codec's: a thousandth of the probe's error. In 16-bit floats any change of a cache, however small,
moves every rounding after it, which alone causes more KL than many layers' errors."""
MOST_RATIO = 16.0
"""Of the largest step (in standard deviations) to the smallest; a sensitivity that is lost in noise goes no further."""


def probe_layer(held_out: HeldOut, profile: Profile, deviations: Scales, layer: int) -> tuple[float, float]:
    """KL (nats a token) by K and by V of one layer coded at `PROBE_STEP`, less that of the noise. May be below 0."""

    def divergence(sides: tuple[int, ...], step: float) -> float:
        return held_out.divergence(only(layer, sides, transformed(profile, scaled(deviations, step))))

    noise = divergence((0, 1), NOISE_STEP)
    return divergence((0,), PROBE_STEP) - noise, divergence((1,), PROBE_STEP) - noise


def equal_steps(deviations: Scales, sensitivities: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Steps in proportion to which every K and V adds the same KL, with a geometric mean of one standard deviation.

    `sensitivities`: KL of K and V of each layer at a step of the same number of standard deviations.
    """
    measured = [max(value, 0.0) for pair in sensitivities for value in pair]
    if not max(measured) > 0:
        return list(deviations)
    least = max(measured) / MOST_RATIO**2
    middle = math.exp(sum(math.log(max(value, least)) for value in measured) / len(measured))

    def share(value: float) -> float:
        return math.sqrt(middle / max(value, least))

    return [(k * share(in_k), v * share(in_v)) for (k, v), (in_k, in_v) in zip(deviations, sensitivities, strict=True)]


def scaled(scales: Scales, factor: float) -> list[tuple[float, float]]:
    """All of them times `factor`."""
    return [(k * factor, v * factor) for k, v in scales]
