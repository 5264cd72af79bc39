"""`kvferry bench pipeline`: stores and loads end to end, on real KV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.errors import one_line_errors

MIB = 1 << 20
PLAIN_WIDTH = 190  # of the output where it is no terminal: the tables are wide


def pipeline(
    kv: Annotated[Path, typer.Option(help="safetensors file of real KV, as benchmarks/dump_kv.py makes it.")],
    device_id: Annotated[int, typer.Option(help="Index of the CUDA device.")] = 0,
    sections: Annotated[str, typer.Option(help="Sections to measure, separated by commas; default: all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and repeats: not for quoting.")] = False,
    packing: Annotated[str, typer.Option(help="ans or bitpack.")] = "ans",
    sigma: Annotated[float, typer.Option(help="Bound, in standard deviations of each layer's K or V.")] = 0.2,
    ratio: Annotated[float, typer.Option(help="Raw bytes over slot bytes.")] = 4.0,
    repeats: Annotated[int | None, typer.Option(help="Timings of each case; default 20, with --quick 6.")] = None,
    ring_mib: Annotated[int | None, typer.Option(help="Staging ring of each direction.")] = None,
    first_bite_mib: Annotated[int | None, typer.Option(help="Smallest bite, raw.")] = None,
    bite_mib: Annotated[int | None, typer.Option(help="Largest bite, raw.")] = None,
    growth: Annotated[int | None, typer.Option(help="How much bites grow.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot.")] = None,
) -> None:
    """Paged GPU cache to pinned host slots and back: sizes, staged and fused, which way is compressed, chunk and slot
    sizes, multiprocessors, restoring a prefix, interference, the host's time. Exit code 1 without a GPU."""
    import torch
    from rich.console import Console

    from kvferry.bench import pipeline_report
    from kvferry.bench.machine import describe
    from kvferry.bench.pipeline import run
    from kvferry.bench.pipeline_rig import Plan
    from kvferry.cli.bench import check_gpu
    from kvferry.pipeline import Settings

    with one_line_errors():
        usual = Settings()
        settings = Settings(
            ring_bytes=usual.ring_bytes if ring_mib is None else ring_mib * MIB,
            first_bite_bytes=usual.first_bite_bytes if first_bite_mib is None else first_bite_mib * MIB,
            bite_bytes=usual.bite_bytes if bite_mib is None else bite_mib * MIB,
            growth=usual.growth if growth is None else growth,
        )
        plan = Plan(packing=packing, sigma=sigma, ratio=ratio, settings=settings)
        plan = plan.quick() if quick else plan
        if repeats is not None:
            plan = replace(plan, repeats=repeats)
        check_gpu("pipeline", device_id)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        from safetensors.torch import load_file

        torch.cuda.set_device(device_id)
        names = tuple(name for name in sections.split(",") if name)
        with console.status("measuring"):
            results = run(load_file(kv), plan, torch.device("cuda", device_id), names)
        machine = describe(device_id)
        for grid in pipeline_report.tables(results):
            console.print(grid)
            console.print()
        if output is not None:
            pipeline_report.write_json(output, results, plan, machine, kv.stem)
            console.print(f"Numbers: {output}", markup=False)
        if plot is not None:
            pipeline_report.plot(plot, results, f"Pipeline, {machine['gpu']}, {kv.stem}")
            console.print(f"Plot: {plot}", markup=False)
