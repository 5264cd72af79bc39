"""`kvferry bench codec`: the codecs in slots, on real KV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.errors import one_line_errors

PLAIN_WIDTH = 170  # of the output where it is no terminal: the tables are wide
_DEFAULT_SIZES = ["512MiB", "64MiB", "8MiB"]
_DEFAULT_MODES = ["fixed", "plain", "outlier", "lossless", "raw"]
_DEFAULT_PACKINGS = ["ans", "bitpack"]


def codec(
    kv: Annotated[
        Path | None,
        typer.Option(help="safetensors file of real KV, as benchmarks/dump_kv.py makes it; else the demo model's KV."),
    ] = None,
    device_id: Annotated[int, typer.Option(help="Index of the CUDA device.")] = 0,
    tensor_size: Annotated[list[str], typer.Option(help="Raw bytes of a batch; may be repeated.")] = _DEFAULT_SIZES,
    error_bound: Annotated[float, typer.Option(help="In standard deviations of each layer's K or V.")] = 0.2,
    encoding_mode: Annotated[list[str], typer.Option(help="Modes to measure; may be repeated.")] = _DEFAULT_MODES,
    packing: Annotated[list[str], typer.Option(help="Packings to measure; may be repeated.")] = _DEFAULT_PACKINGS,
    on_overflow: Annotated[str, typer.Option(help="relax (the product's default) or reject.")] = "relax",
    iterations: Annotated[int, typer.Option(help="Timings of every call; fewer where a case takes long.")] = 100,
    sweep_bounds: Annotated[str, typer.Option(help="Error bounds to sweep, separated by commas.")] = "",
    sweep_sms: Annotated[str, typer.Option(help="Numbers of multiprocessors to sweep, separated by commas.")] = "",
    profile: Annotated[
        Path | None,
        typer.Option(help="Profile (kvferry calibrate) of the model that made the KV: adds rows for codec transform."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot.")] = None,
) -> None:
    """Pages of real KV into slots and back by every mode and packing, and by codec transform with a --profile: ratio,
    GB/s, share of what memory allows; with device copies, an fp8 cast and nvCOMP (if installed) to compare. Exit code 1
    without a GPU."""
    import torch
    from rich.console import Console

    from kvferry.bench import codec_report
    from kvferry.bench.codec import CodecPlan, run
    from kvferry.bench.kv_source import load_kv
    from kvferry.bench.machine import describe
    from kvferry.bench.units import parse_size
    from kvferry.cli.bench import check_gpu
    from kvferry.codecs.transform.profile import Profile

    with one_line_errors():
        plan = CodecPlan(
            sizes=tuple(parse_size(size) for size in _parts(tensor_size)),
            sigma=error_bound,
            modes=tuple(_parts(encoding_mode)),
            packings=tuple(_parts(packing)),
            on_overflow=on_overflow,
            iterations=iterations,
            sweep_sigmas=tuple(float(part) for part in _parts([sweep_bounds])),
            sweep_sms=tuple(int(part) for part in _parts([sweep_sms])),
        )
        calibrated = None if profile is None else Profile.load(profile)
        check_gpu("codec", device_id)
        if plot is not None:
            import matplotlib  # noqa: F401  (found missing now rather than after measuring)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        source = load_kv(kv)
        with console.status("measuring") as status:
            try:
                results = run(source.tensors, plan, torch.device("cuda", device_id), status.update, calibrated)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"the GPU has no room for the largest size: smaller --tensor-size ({error})"
                ) from error
        machine = describe(device_id)
        console.print(f"{machine['gpu']}, KV: {source.name}, repeated to the sizes", markup=False)
        for grid in codec_report.tables(results):
            console.print(grid)
            console.print()
        for line in codec_report.remarks(results):
            console.print(line, markup=False, style="dim")
        if output is not None:
            codec_report.write_json(output, results, plan, machine, source.describe())
            console.print(f"Numbers: {output}", markup=False)
        if plot is not None:
            codec_report.plot(plot, results, f"Codecs in slots, {machine['gpu']}, {source.name}")
            console.print(f"Plot: {plot}", markup=False)


def _parts(values: list[str]) -> list[str]:
    """The values of an option that may be repeated, and hold several between commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
