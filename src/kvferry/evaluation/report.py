"""The figures of an evaluation as a table for the terminal, JSON with the machine they are from, and a plot."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from kvferry.evaluation.prefix import PrefixProtocol
from kvferry.evaluation.results import SchemeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

PACKAGES = ("kvferry", "torch", "transformers", "cuda-bindings", "numpy")
HEADINGS = (
    "bits/\nvalue",
    "ratio",
    "error/\nbound",
    "KL\n(nats)",
    "perplex.\nchange",
    "top-1\nagree",
    "encode\nGB/s",
    "decode\nGB/s",
)
EVALUATION_HEADINGS = (
    "bits/\nvalue",
    "ratio",
    "KL\nmean",
    "KL\np99",
    "top-1\nagree",
    "top-5\nagree",
    "perplex.\nchange",
)
MARKERS = "osD^vPX*hp<>"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": {"model": torch.get_num_threads(), "codec": 1},
        "system": platform.system(),
        "device": device.type,
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(
    path: Path,
    results: Sequence[SchemeResult],
    protocol: PrefixProtocol,
    sequences: int,
    model: dict[str, Any],
    device: torch.device,
) -> None:
    """Write what is needed to read the figures later: machine, versions, model, shapes, repeats; one row a scheme."""
    content = {
        "protocol": asdict(protocol) | {"sequences": sequences},
        "model": model,
        "machine": machine(device),
        "versions": versions(),
        "units": {"ratio": "raw bytes / encoded bytes", "kl_nats": "nats/token", "gbps": "1e9 raw bytes per second"},
        "results": [_row(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(results: Sequence[SchemeResult], title: str) -> Table:
    """One line a scheme; a promise that was not kept is marked."""
    rows = [
        (
            f"{result.bits_per_value:.2f}",
            f"{result.ratio:.2f}",
            _error_cell(result),
            _kl_cell(result.kl_nats),
            f"{100 * result.perplexity_change:+.2f}%",
            f"{result.top1_agreement:.4f}",
            f"{result.encode_gbps:.3g}",
            f"{result.decode_gbps:.3g}",
        )
        for result in results
    ]
    return _grid(title, HEADINGS, results, rows)


def evaluation_table(results: Sequence[SchemeResult], title: str) -> Table:
    """One line a scheme, with what `kvferry evaluate` adds: tails, top-5, and drift where it was measured."""
    drift = any(result.drift_tokens for result in results)
    rows = [
        (
            f"{result.bits_per_value:.2f}",
            f"{result.ratio:.2f}",
            _kl_cell(result.kl_nats),
            _kl_cell(result.kl_p99),
            f"{result.top1_agreement:.4f}",
            f"{result.top5_agreement:.4f}",
            f"{100 * result.perplexity_change:+.2f}%",
            *((f"{result.drift_mean:.1f}" if result.drift_mean is not None else "-",) if drift else ()),
            _error_cell(result),
        )
        for result in results
    ]
    headings = (*EVALUATION_HEADINGS, *(("drift\ntokens",) if drift else ()), "error/\nbound")
    return _grid(title, headings, results, rows)


def _grid(
    title: str, headings: Sequence[str], results: Sequence[SchemeResult], rows: Sequence[tuple[str, ...]]
) -> Table:
    """A line between families; a promise that was not kept is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.add_column("codec")
    for heading in headings:
        # In a narrow terminal the names wrap; the figures stay whole.
        grid.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    family = None
    for result, row in zip(results, rows, strict=True):
        if family is not None and result.family != family:
            grid.add_section()
        family = result.family
        grid.add_row(escape(result.name), *row, style=None if result.guarantee_kept else "bold red")
    return grid


def plot(path: Path, results: Sequence[SchemeResult], title: str) -> None:
    """Ratio against KL (log), one colour a family, as PNG. Exact schemes lie on a line of their own at KL 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positive = [result.kl_nats for result in results if result.kl_nats > 0]
    lowest = min(positive, default=1e-4)
    zero = lowest / 4  # where KL 0 is drawn on the log axis
    families = list(dict.fromkeys(result.family for result in results))
    labelled: list[tuple[float, float]] = []
    middle = mean([result.ratio for result in results if result.setting] or [0.0])
    for index, family in enumerate(families):
        members = [result for result in results if result.family == family]
        # Labels go to the side away from the other families.
        labels_right = mean(result.ratio for result in members) >= middle
        _draw_family(axes, members, index, zero, labelled, labels_right)
    axes.set_yscale("log")
    axes.margins(x=0.08)
    if any(result.kl_nats <= 0 for result in results):
        axes.axhline(zero, color="0.8", linewidth=0.8, zorder=0)
        axes.set_ylim(bottom=zero / 1.8)
        decades = range(math.ceil(math.log10(lowest) - 1e-9), math.floor(math.log10(max(positive, default=1e-4))) + 1)
        axes.set_yticks([zero, *(10.0**d for d in decades)], ["0", *(f"1e{d}" for d in decades)])
        axes.minorticks_off()
    axes.set_xlabel(
        "ratio: raw bytes / encoded bytes\n(labels: error bound over the value range; by sigma: over the deviation)"
    )
    axes.set_ylabel("KL(untouched || restored), nats per token (lower is better)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_family(
    axes: Axes,
    results: list[SchemeResult],
    index: int,
    zero: float,
    labelled: list[tuple[float, float]],
    labels_right: bool,
) -> None:
    """Draw one family's points; label those that no label in `labelled` (ratio, log10 KL) is too near to."""
    x = [result.ratio for result in results]
    y = [result.kl_nats if result.kl_nats > 0 else zero for result in results]
    colour, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
    line = "-" if len({*y}) > 1 else "none"
    # Hollow markers, so that families that coincide are both seen.
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markerfacecolor="none",
        linewidth=1.2,
        linestyle=line,
        label=results[0].family,
    )
    offset, side = ((7, -9), "left") if labels_right else ((-7, 4), "right")
    for result, left, top in zip(results, x, y, strict=True):
        place = (left, math.log10(top))
        crowded = any(abs(place[0] - a) < 0.4 and abs(place[1] - b) < 0.08 for a, b in labelled)
        if result.setting and not crowded:
            labelled.append(place)
            axes.annotate(
                result.setting.removesuffix(" range"),
                (left, top),
                xytext=offset,
                textcoords="offset points",
                ha=side,
                fontsize=7,
                color=colour,
            )


def _row(result: SchemeResult) -> dict[str, Any]:
    extra = {name: getattr(result, name) for name in ("ratio", "bits_per_value", "perplexity_change", "guarantee_kept")}
    row = asdict(result) | extra
    # JSON has no infinity: a value that is not finite is written as its name.
    return {key: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _kl_cell(nats: float) -> str:
    return "0" if nats == 0 else f"{nats:.5f}"


def _error_cell(result: SchemeResult) -> str:
    if result.guarantee == "exact":
        return "exact" if result.guarantee_kept else "NOT EXACT"
    return "-" if result.error_over_bound is None else f"{result.error_over_bound:.3f}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
