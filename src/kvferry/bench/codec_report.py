"""The codecs' results as tables, a plot and a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.bench.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from kvferry.bench.codec import CodecPlan
    from kvferry.bench.codec_batch import Row

LEGS = ("encode", "decode")
TITLES = {
    "codecs": "Slots: pages of KV into slots and back",
    "baselines": "Baselines, on the same values without pages",
    "transform": "Slots, codec transform: the cache of the profile's model, every head at its own positions",
    "bounds": "By error bound",
    "num_sms": "By multiprocessors that the kernels may use",
}
KEYS = {"bounds": "bound_sigma", "num_sms": "num_sms"}
"""What a section varies."""
MEANING = {
    "ratio": "raw bytes over header, directory and payload of the slots",
    "median_us, p99_us": "device events around one call for all chunks of a batch, calls queued ahead of the device",
    "queued": "false where the device waited for the host, whose share is then included",
    "alone_us": "the median where the device is idle when the call is made, the host's share included",
    "host_median_us": "until the call returns",
    "gb_per_s": "raw bytes over the median, 10**9 a second",
    "sets": "data that calls rotate over, each taking what was used longest ago: together larger than the L2 cache",
    "moved_bytes": "what must be read and written: raw pages and used slot bytes, without scratch",
    "limit_us": "moved_bytes over the bandwidth of `ceiling`: a device copy in the same run, reads and writes counted",
    "of_limit": "limit_us over median_us",
    "error_over_bound": "largest error of a value over bound_sigma standard deviations of its layer's K or V, in "
    "float64 (baselines: over the plan's sigma; null: not finite; transform: largest Euclidean error of a group's "
    "vector over what its guarantee adds up to there)",
    "transform": "at error_bound 1, the profile's own steps; its cache has the profile's layers and heads, each filled "
    "with its own values of the KV at their own positions, so a chunk has another size than those of codecs",
    "basis": "what has a basis of its own in the profile: each head, or all heads of a layer together",
    "checked": "in the same run, before it is timed: all slots usable at the asked bound and good to the decoder, "
    "exact codecs bit-identical, no error beyond the bound, the first chunk's slot byte for byte the CPU reference's",
}


def tables(results: dict[str, Any]) -> list[Table]:
    """One table a section: what was coded, ratio, limit, then both directions."""
    from rich.table import Table

    found = []
    for section, title in TITLES.items():
        rows = results.get(section, [])
        if not rows:
            continue
        grid = Table(title=title, title_justify="left", pad_edge=False, show_edge=False)
        grid.add_column("size\nx sets", justify="right", no_wrap=True)
        grid.add_column("what", no_wrap=True)
        headings = [*KEYS.get(section, "").split(), "ratio", "error/\nbound", "moved\nMB", "limit\nGB/s"]
        for leg in LEGS:
            headings += [f"{leg}\nGB/s", "median us\n(p99)", "of\nlimit", "alone\nus"]
        for heading in headings:
            style = "bold" if heading.startswith(LEGS) else None
            grid.add_column(heading.replace("_", "\n"), justify="right", style=style, no_wrap=True)
        before = rows[0]["raw_bytes"]
        for row in rows:
            if row["raw_bytes"] != before:
                grid.add_section()
            before = row["raw_bytes"]
            grid.add_row(*_cells(row, KEYS.get(section)))
        found.append(grid)
    return found


def _cells(row: Row, key: str | None) -> list[str]:
    cells = [f"{format_size(row['raw_bytes'])} x {row['sets']}", what(row)]
    if key:
        cells.append("all" if row[key] is None else f"{row[key]:g}")
    error = row["error_over_bound"]
    cells += [f"{row['ratio']:.3f}", "-" if error is None else f"{error:.3f}"]
    cells += [f"{row['moved_bytes'] / 1e6:.1f}", f"{row['limit_gb_per_s']:.0f}"]
    for leg in LEGS:
        found = row[leg]
        mark = "" if found["queued"] else "*"
        cells += [f"{found['gb_per_s']:.0f}{mark}", f"{found['median_us']:.1f} ({found['p99_us']:.1f})"]
        cells += [f"{found['of_limit']:.0%}", f"{found['alone_us']:.0f}"]
    return cells


def what(row: Row) -> str:
    """The row's mode, basis and packing, or its method."""
    return " ".join(part for part in (row["mode"], row.get("basis"), row["packing"]) if part) or str(row["method"])


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know, a line each."""
    ceiling = results["ceiling"]
    lines = [
        f"Limit: bytes moved over {ceiling['read_and_written_gb_per_s']:.0f} GB/s, which a device copy of "
        f"{format_size(ceiling['num_bytes'])} reads and writes in this run.",
        "Median and p99 by device events, calls queued ahead; alone: on an idle device, with the host's share.",
        "Checked in this run: slots good, exact codecs bit-identical, bounds kept in float64, the first chunk's bytes "
        "those of the CPU reference.",
    ]
    if profile := results.get("profile"):
        lines.append(
            f"Transform: profile {profile['digest'][:8]}, {profile['layers']} layers, {profile['heads']} heads of "
            f"{profile['head_dim']}, a basis {profile['basis']}, at its own steps; error: of a group's vector."
        )
    legs = [row[leg] for section in TITLES for row in results.get(section, []) for leg in LEGS]
    if not all(leg["queued"] for leg in legs):
        lines.append("*: the device waited for the host, so the host's share is included.")
    return lines + list(results["notes"])


def write_json(
    path: Path, results: dict[str, Any], plan: CodecPlan, machine: dict[str, str | int], data: dict[str, Any]
) -> None:
    """Machine, data (`KVSource.describe`), plan, what the numbers mean, and all rows."""
    content = {"machine": machine, "data": data, "plan": asdict(plan), "meaning": MEANING} | results
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, results: dict[str, Any], title: str) -> None:
    """GB/s of both directions at every size against the limit, `transform` in a panel of its own, and the sweeps that
    were measured. `results` may also be the content of a file of `write_json`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sizes = sorted({row["raw_bytes"] for row in results["codecs"]}, reverse=True)
    panels: list[tuple[str, Any]] = [("size", size) for size in sizes]
    panels += [("transform", results["transform"])] if results.get("transform") else []
    panels += [(name, leg) for name in KEYS if results[name] for leg in LEGS]
    columns = min(3, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(5.2 * columns, 3.6 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    flat: list[Any] = list(axes.flat)
    for axis in flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, value) in zip(flat, panels, strict=False):
        if name == "size":
            _bars(axis, [row for part in ("codecs", "baselines") for row in results[part] if row["raw_bytes"] == value])
            axis.set(title=format_size(value), ylabel="GB/s, raw bytes")
        elif name == "transform":
            _bars(axis, value, lambda row: f"{format_size(row['raw_bytes'])}, {what(row)}")
            axis.set(title="Codec transform", ylabel="GB/s, raw bytes")
        else:
            _curves(axis, results[name], KEYS[name], value)
            axis.set(title=f"{TITLES[name]}: {value}", ylabel="GB/s, raw bytes", xlabel=KEYS[name].replace("_", " "))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, rows: list[Row], label: Callable[[Row], str] = what) -> None:
    for place, leg in enumerate(LEGS):
        at = [number + 0.4 * (place - 0.5) for number in range(len(rows))]
        axis.bar(at, [row[leg]["gb_per_s"] for row in rows], 0.38, label=leg)
    # The limit of a copy is far above that of a codec, and would flatten the bars.
    limits = [(number, row["limit_gb_per_s"]) for number, row in enumerate(rows) if row["method"] == "slots"]
    axis.plot(*zip(*limits, strict=True), "k_", markersize=14, label="limit of memory")
    axis.set_xticks(range(len(rows)), [label(row) for row in rows], rotation=40, ha="right", fontsize=7)


def _curves(axis: Any, rows: list[Row], key: str, leg: str) -> None:
    values = sorted({row[key] for row in rows}, key=lambda value: (value is None, value))
    for name in dict.fromkeys(what(row) for row in rows):
        mine = {row[key]: row for row in rows if what(row) == name}
        points = [(place, mine[value][leg]["gb_per_s"]) for place, value in enumerate(values) if value in mine]
        label = name
        if key == "bound_sigma":
            label += " (ratio " + ", ".join(f"{mine[value]['ratio']:.2f}" for value in values if value in mine) + ")"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axis.set_xticks(range(len(values)), ["all" if value is None else f"{value:g}" for value in values])
