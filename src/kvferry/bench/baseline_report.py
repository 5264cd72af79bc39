"""The baseline's results as a table, a plot and a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.bench.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from kvferry.bench.baseline import BaselineSettings

METHODS = ("copy_", "cuda_copy_", "copy_batch", "copy_ranges")
_PLACE = ("memory", "direction", "layout", "num_bytes")


def by_place(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Results by (memory, direction, layout, bytes), then by method; sorted by memory, direction, layout, size."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    order = {name: number for number, name in enumerate(("pinned", "h2d", "d2h", "contiguous", "neighbours"))}
    keys = sorted(
        {tuple(row[name] for name in _PLACE) for row in results},
        key=lambda key: [*(order.get(part, len(order)) for part in key[:3]), key[3]],
    )
    for key in keys:
        found[key] = {row["method"]: row for row in results if tuple(row[name] for name in _PLACE) == key}
    return found


def table(results: list[dict[str, Any]]) -> Table:
    """GB/s of every method by case, and in brackets the host's microseconds."""
    from rich.table import Table

    grid = Table(title="GB/s by device events (microseconds of the host)", pad_edge=False, show_edge=False)
    for heading in ("memory", "direction", "layout", "size"):
        grid.add_column(heading)
    for method in METHODS:
        grid.add_column(method, justify="right", no_wrap=True)
    before = None
    for (memory, direction, layout, num_bytes), rows in by_place(results).items():
        if before not in (None, (memory, direction, layout)):
            grid.add_section()
        before = (memory, direction, layout)
        best = max(row["gb_per_s"] for row in rows.values())
        cells = []
        for method in METHODS:
            row = rows.get(method)
            text = f"{row['gb_per_s']:.2f} ({row['host_median_us']:.0f})" if row else ""
            cells.append(f"[bold]{text}[/]" if row and row["gb_per_s"] >= 0.98 * best else text)
        grid.add_row(memory, direction, layout, format_size(num_bytes), *cells)
    return grid


def write_json(
    path: Path, results: list[dict[str, Any]], settings: BaselineSettings, machine: dict[str, str | int]
) -> None:
    """Machine, settings, results and what the numbers mean."""
    meaning = (
        "bytes are uint8 [num_bytes] in each direction, in equal ranges; times by device events from the first "
        "call to the end of the last copy, methods interleaved, every copy checked first; host: until calls returned"
    )
    content = {"machine": machine, "settings": asdict(settings), "meaning": meaning, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, results: list[dict[str, Any]], title: str) -> None:
    """GB/s over size, one panel for each memory, direction and layout."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for (memory, direction, layout, num_bytes), rows in by_place(results).items():
        lines = panels.setdefault((memory, direction, layout), {})
        for method, row in rows.items():
            lines.setdefault(method, []).append((num_bytes, row["gb_per_s"]))
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows_of_panels, columns, figsize=(4.2 * columns, 3 * rows_of_panels), squeeze=False, layout="constrained"
    )
    flat: list[Any] = list(axes.flat)
    for axis in flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, lines) in zip(flat, panels.items(), strict=False):
        for method, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        axis.set(title=", ".join(name), xscale="log", ylabel="GB/s")
        axis.set_ylim(bottom=0)
        sizes = sorted({size for points in lines.values() for size, _ in points})
        ticks = sizes[:: -(-len(sizes) // 6)]
        axis.set_xticks(ticks, [format_size(size).replace(" ", "\n") for size in ticks], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    max(flat, key=lambda axis: len(axis.lines)).legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
