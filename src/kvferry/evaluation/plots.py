"""Figures of an evaluation, as PNG: rate against distortion, drift, and sensitivity by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.sensitivity import SIDES, SensitivityResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPX*hp<>"
BITS_TICKS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_NEAR_X, _NEAR_Y = 0.035, 0.035  # of the axes: labels nearer than that to another one are left out


@dataclass(frozen=True)
class Distortion:
    """What goes up the y axis: a figure of a result, 0 for no distortion."""

    of: Callable[[SchemeResult], float]
    label: str
    log: bool = True  # else linear, and points are not joined: what is counted in few steps jumps


KL = Distortion(lambda result: result.kl_nats, "KL to the untouched cache,\nmean, nats per token")
KL_P99 = Distortion(lambda result: result.kl_p99, "KL to the untouched cache,\n99th percentile, nats")
DISAGREEMENT = Distortion(lambda result: 1 - result.top1_agreement, "most likely next token differs,\nshare of tokens")
DRIFT = Distortion(
    lambda result: result.drift_mean or 0.0, "greedy tokens until the first difference,\nmean", log=False
)


def rate_distortion(
    results: Sequence[SchemeResult], distortion: Distortion, title: str, size: tuple[float, float] = (9.5, 5.6)
) -> bytes:
    """A PNG: bits per value against `distortion`, one line a family, points labelled by their setting."""
    figure = _figure(size)
    axes = figure.add_subplot()
    heights = [distortion.of(result) for result in results]
    positive = [height for height in heights if height > 0 and math.isfinite(height)]
    zero = min(positive, default=1e-4) / 4 if distortion.log else 0.0  # where 0 is drawn on a log axis
    axes.set_xscale("log", base=2)
    if distortion.log:
        axes.set_yscale("log")
        if len(positive) < len(heights):
            axes.axhline(zero, color="0.75", linewidth=0.8, zorder=0)
            where = ("axes fraction", "data")
            axes.annotate(
                "0: as the untouched cache", (0.01, zero), xycoords=where, fontsize=7, color="0.4", va="bottom"
            )
    points = []
    for index, family in enumerate(dict.fromkeys(result.family for result in results)):
        members = sorted((r for r in results if r.family == family), key=lambda result: result.bits_per_value)
        x = [result.bits_per_value for result in members]
        y = [distortion.of(result) for result in members]
        y = [height if height > 0 or not distortion.log else zero for height in y]
        colour = f"C{index % 10}"
        axes.plot(
            x,
            y,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            markerfacecolor="none",  # families that coincide are both seen
            linewidth=1.2,
            linestyle="-" if len(x) > 1 and distortion.log else "none",
            label=family,
        )
        points += [(member.setting, a, b, colour) for member, a, b in zip(members, x, y, strict=True) if member.setting]
    axes.margins(x=0.06, y=0.08)
    _bits_axis(axes, [result.bits_per_value for result in results])
    axes.set_ylabel(distortion.label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.canvas.draw()
    _label(axes, points)
    return _png(figure)


def sensitivity(results: Sequence[SensitivityResult], title: str) -> bytes:
    """A PNG: KL of each layer's K and V alone, one row of axes a scheme, a log scale that all share."""
    schemes = list(dict.fromkeys(result.name for result in results))
    figure = _figure((9.5, 0.9 + 2.4 * len(schemes)))
    lowest = min((r.kl_nats for r in results if r.kl_nats > 0), default=1e-6)
    rows: Any = figure.subplots(len(schemes), 1, sharex=True, sharey=True, squeeze=False)
    for axes, scheme in zip(rows[:, 0], schemes, strict=True):
        for offset, side in zip((-0.2, 0.2), SIDES, strict=True):
            mine = [result for result in results if (result.name, result.side) == (scheme, side)]
            heights = [max(result.kl_nats, lowest / 2) for result in mine]
            places = [result.layer + offset for result in mine]
            axes.bar(places, heights, width=0.38, label=side.upper(), color="C0" if side == "k" else "C1")
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 2)
        axes.set_title(scheme, loc="left", fontsize=9)
        axes.grid(alpha=0.25, axis="y")
        axes.set_ylabel("KL, nats")
    rows[0, 0].legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    rows[-1, 0].set_xlabel("layer whose K or V alone went through the codec")
    rows[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return _png(figure)


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    # No version of matplotlib, which would change the file and nothing in the picture.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bits_axis(axes: Axes, bits: Sequence[float]) -> None:
    low, high = (min(bits), max(bits)) if bits else (1, 16)
    ticks = [tick for tick in BITS_TICKS if low / 1.1 <= tick <= high * 1.1] or [round(low, 2), round(high, 2)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bits per value, everything counted (16: as the cache is)")


def _label(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (text, x, y, colour) beside its point, unless an earlier one is there."""
    taken: list[tuple[float, float]] = []
    for text, x, y, colour in points:
        across, up = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
        if any(abs(across - a) < _NEAR_X and abs(up - b) < _NEAR_Y for a, b in taken):
            continue
        taken.append((across, up))
        axes.annotate(text, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=6.5, color=colour)
