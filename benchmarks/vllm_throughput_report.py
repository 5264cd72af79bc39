"""Rows, tables and a plot of `benchmarks.vllm_throughput`."""

from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def row_of(served: dict[str, Any]) -> Row:
    """What an arm tells of a point, in figures. Times in milliseconds; None where there was nothing to time."""
    seconds, prompt = served["seconds"], served["prompt_tokens"]
    first, each = np.array(served["first_token_s"]) * 1e3, np.array(served["each_token_s"]) * 1e3
    return {
        "requests": served["requests"],
        "seconds": seconds,
        "requests_per_s": served["requests"] / seconds,
        "output_tokens_per_s": served["output_tokens"] / seconds,
        "ttft_median_ms": float(np.median(first)),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "tpot_median_ms": float(np.median(each)) if len(each) else None,
        "hit_rate": served["cached_tokens"] / prompt,
        "host_hit_rate": served["host_tokens"] / prompt,
        "preemptions": served["preemptions"],
    }


def by_point(rows: list[Row]) -> dict[str, dict[int, dict[str, Row]]]:
    """Rows by workload, concurrency and arm."""
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault(row["workload"], {}).setdefault(row["concurrency"], {})[row["arm"]] = row
    return found


def tables(rows: list[Row], arms: list[str]) -> None:
    """Print one table a workload."""
    from rich.console import Console
    from rich.table import Table

    for workload, points in by_point(rows).items():
        table = Table(title=workload, title_justify="left")
        for name in ("in flight", "arm", "requests", "requests/s", f"of {arms[0]}", "tokens/s", "TTFT ms", "p99 ms",
                     "TPOT ms", "hits", "from host"):  # fmt: skip
            table.add_column(name, justify="left" if name == "arm" else "right")
        for concurrency, found in points.items():
            base = found[arms[0]]["requests_per_s"]
            for arm in arms:
                row = found[arm]
                each = row["tpot_median_ms"]
                table.add_row(
                    str(concurrency), arm, str(row["requests"]), f"{row['requests_per_s']:.2f}",
                    f"{row['requests_per_s'] / base:.2f}", f"{row['output_tokens_per_s']:.0f}",
                    f"{row['ttft_median_ms']:.1f}", f"{row['ttft_p99_ms']:.1f}", f"{each:.1f}" if each else "",
                    f"{row['hit_rate']:.1%}", f"{row['host_hit_rate']:.1%}",
                    end_section=arm == arms[-1],
                )  # fmt: skip
        Console(width=120).print(table)


def plot(rows: list[Row], arms: list[str], file: Path) -> None:
    """Requests a second, median time to the first token and share of tokens that were not computed, over requests in
    flight; one row of axes a workload."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        "requests_per_s": "requests a second",
        "ttft_median_ms": "time to first token, median, ms",
        "hit_rate": "prompt tokens out of a cache",
    }
    points = by_point(rows)
    figure = Figure(figsize=(4.2 * len(shown), 3.4 * max(1, len(points))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(points)), len(shown), squeeze=False)
    for line, (workload, found) in zip(axes, points.items(), strict=False):
        for axis, (name, said) in zip(line, shown.items(), strict=True):
            for arm in arms:
                axis.plot(list(found), [found[each][arm][name] for each in found], marker="o", label=arm)
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(found), [str(each) for each in found])
            axis.set_ylim(0, 1.05 if name == "hit_rate" else None)
            axis.set_xlabel("requests in flight")
            axis.set_ylabel(said)
            axis.set_title(workload)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
