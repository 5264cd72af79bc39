"""One factor to all steps, such that the whole cache meets a target."""

from __future__ import annotations

import math
from collections.abc import Callable

START = 0.5
LEAST, MOST = 1 / 128, 64.0
PRECISION = 1.02  # of factors
MARGIN = 0.97
"""Of the KL asked for, what the search aims at by simulation: the codecs themselves then seldom miss the target."""
RATIO_PRECISION = 1.005  # of ratios
MOST_TRIES = 16


def factor_for_kl(kl: Callable[[float], float], most: float) -> float:
    """The largest factor, within `PRECISION`, with `kl(factor) <= MARGIN * most`. Raises `ValueError` if there is none.

    Where KL is noisy, the largest of those tried.
    """
    meets: float | None = None
    misses: float | None = None
    while meets is None or misses is None or misses / meets > PRECISION:
        if meets and misses:
            factor = math.sqrt(meets * misses)
        elif meets:
            factor = meets * 2
        else:
            factor = misses / 2 if misses else START
        if factor > MOST and meets:
            return meets
        found = kl(factor)
        if found <= MARGIN * most:
            meets = factor
        elif factor < LEAST:
            raise ValueError(
                f"a KL of at most {most:.3g} cannot be reached: steps of {factor:.2g} deviations cause {found:.3g}, by "
                "moving the roundings of the model's dtype alone: give a larger --target-kl"
            )
        else:
            misses = factor
    return meets


def factor_for_ratio(ratio: Callable[[float], float], least: float) -> float:
    """A factor with `least <= ratio(factor)`, and no more than `RATIO_PRECISION` above. Raises `ValueError` if there is
    none."""
    # Bits a value fall by one for each doubling, and bits are what 1/ratio is: nearly straight, and secants meet it
    # fast. Stay between factors known to miss (below) and to meet (above).
    low, high = math.log2(LEAST) - 1, math.log2(MOST) + 1
    points: list[tuple[float, float]] = []
    x, best = math.log2(START), None
    for _ in range(MOST_TRIES):
        found = ratio(2**x)
        points.append((x, 1 / found))
        if found >= least:
            high, best = x, x
            if found <= least * RATIO_PRECISION:
                break
        else:
            low = x
        x = _secant(points, 1 / (least * math.sqrt(RATIO_PRECISION)))
        if not low < x < high:
            x = (low + high) / 2
    if best is None:
        raise ValueError(
            f"a ratio of {least:g} cannot be reached: steps of {2**low:.2g} deviations give "
            f"{1 / min(point[1] for point in points):.3g}: give a smaller --target-ratio"
        )
    return float(2**best)


def _secant(points: list[tuple[float, float]], aim: float) -> float:
    """Where the line through the last two points is `aim`; with one point, half a step of bits of 16."""
    x, y = points[-1]
    slope = -1 / 16
    if len(points) > 1 and points[-2][0] != x:
        slope = min((y - points[-2][1]) / (x - points[-2][0]), -1 / 1024)
    return x + (aim - y) / slope
