"""The pipeline's results as tables, a plot and a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from kvferry.bench.pipeline_rig import Plan, Row

TITLES = {
    "sizes": "Staged, fused, raw",
    "ablation": "Which way is compressed",
    "restore": "A prefix back into the cache",
    "chunk_size": "Tokens of a chunk",
    "slot_size": "Room in the slots (raw bytes over slot bytes)",
    "num_sms": "Multiprocessors that the kernels may use",
    "bites": "How jobs are cut (MiB raw)",
    "host": "The host's time for a job, microseconds",
    "interference": "What a loop of matrix products loses",
}
KEYS = {
    "sizes": ("form", "raw_mib"),
    "ablation": ("compressed", "raw_mib", "store_then_load_ms"),
    "restore": ("tokens", "slots", "raw_mib", "raw_wire_ms"),
    "chunk_size": ("chunk_tokens",),
    "slot_size": ("ratio",),
    "num_sms": ("form", "num_sms"),
    "bites": ("bites",),
    "host": ("form", "direction", "slots", "chunks", "submit_us", "collect_us", "median_us", "p99_us"),
    "interference": ("form", "num_sms", "direction", "lost", "gb_per_s", "alone_ms", "beside_ms"),
}
"""What is shown first of a section's rows; then follows what they have of RATIOS and LEGS."""
RATIOS = ("slot_ratio", "encoded_ratio", "relaxed_chunks")
LEGS = ("store", "store stream", "load", "load stream", "both")
MEANING = (
    "elapsed times of the host, from submitting a job with the device idle to its end; in a stream, of one job of "
    "eight that were submitted together; GB/s (10**9) of raw bytes, in 'both' those of both directions; wire_ms: one "
    "bare page-locked copy of the same slot bytes; overlap: wire_ms over median_ms; every configuration is checked "
    "against its sources before it is timed"
)


def tables(results: dict[str, list[Row]]) -> list[Table]:
    """One table a section: what was varied, ratios, then GB/s, milliseconds and overlap of each direction."""
    from rich.table import Table

    found = []
    for section, rows in results.items():
        if not rows:
            continue
        grid = Table(title=TITLES[section], title_justify="left", pad_edge=False, show_edge=False)
        keys = [*KEYS[section], *(key for key in RATIOS if key in rows[0])]
        legs = [leg for leg in LEGS if leg in rows[0]]
        for key in keys:
            grid.add_column(key.replace("_", " "), justify="right")
        for leg in legs:
            grid.add_column(
                f"{leg}\nGB/s, ms (p99){'' if leg == 'both' else ', overlap'}", justify="right", no_wrap=True
            )
        for row in rows:
            grid.add_row(*(_text(key, row.get(key)) for key in keys), *(_leg(row[leg]) for leg in legs))
        found.append(grid)
    return found


def _leg(leg: Row) -> str:
    text = f"{leg['gb_per_s']:.1f}  {leg['median_ms']:.2f} ({leg['p99_ms']:.2f})"
    return f"{text}  {leg['overlap']:.2f}" if "overlap" in leg else text


def _text(key: str, value: Any) -> str:
    if value is None:
        return "all" if key == "num_sms" else "-"
    if key == "lost":
        return f"{value:.1%}"
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def write_json(path: Path, results: dict[str, list[Row]], plan: Plan, machine: dict[str, str | int], data: str) -> None:
    """Machine, plan, what the numbers mean, and all rows. `data` names the KV that was measured."""
    content = {"machine": machine, "data": data, "plan": asdict(plan), "meaning": MEANING, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, results: dict[str, list[Row]], title: str) -> None:
    """GB/s: by size and form, by which way is compressed, by multiprocessors; as far as the sections were measured."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [name for name in ("sizes", "ablation", "num_sms") if results.get(name)]
    if not panels:
        raise ValueError("there is nothing to plot: measure the sections sizes, ablation or num_sms")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, panels, strict=True):
        rows = results[name]
        if name == "ablation":
            labels = [row["compressed"] for row in rows]
            for place, leg in enumerate(("store", "load", "both")):
                at = [number + 0.27 * (place - 1) for number in range(len(rows))]
                axis.bar(at, [row[leg]["gb_per_s"] for row in rows], 0.25, label=leg)
            axis.set_xticks(range(len(rows)), labels)
        else:
            key = {"sizes": "raw_mib", "num_sms": "num_sms"}[name]
            values = sorted({row[key] for row in rows}, key=lambda value: (value is None, value))
            for form in dict.fromkeys(row["form"] for row in rows):
                for leg, style in (("store", "-"), ("load", "--")):
                    mine = {row[key]: row[leg]["gb_per_s"] for row in rows if row["form"] == form}
                    points = [(place, mine[value]) for place, value in enumerate(values) if value in mine]
                    axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=f"{form} {leg}")
            axis.set_xticks(range(len(values)), [_text(key, value) for value in values])
            axis.set_xlabel({"sizes": "MiB raw", "num_sms": "multiprocessors"}[name])
        axis.set(title=TITLES[name], ylabel="GB/s, raw bytes")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
