"""`kvferry bench`: what this machine's wire, kernels and pipeline can do. One function a command."""

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.errors import one_line_errors

NEEDS_GPU = 1
"""Exit code where there is nothing to measure on."""
PLAIN_WIDTH = 120  # of the output where it is no terminal
_DEFAULT_SIZES = "4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,256MiB,1GiB"

bench = typer.Typer(
    name="bench",
    help="Measure on this machine's GPU. JSON with machine, driver and commit on request.",
    no_args_is_help=True,
    add_completion=False,
)


@bench.callback()
def _group() -> None:
    """Keeps the commands' names, also while there is one."""


@bench.command()
def baseline(
    device_id: Annotated[int, typer.Option(help="Index of the CUDA device.")] = 0,
    tensor_sizes: Annotated[str, typer.Option(help="Sizes, separated by commas.")] = _DEFAULT_SIZES,
    iterations: Annotated[int, typer.Option(help="Timings of every method; fewer where a case takes long.")] = 30,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    range_size: Annotated[str, typer.Option(help="Size of one range where copies are many.")] = "64KiB",
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot.")] = None,
) -> None:
    """Copies between host and GPU, pinned and pageable, contiguous, neighbouring and scattered: `tensor.copy_` against
    cuda_copy_, copy_batch and copy_ranges. Exit code 1 without a GPU."""
    import torch
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from kvferry.bench import baseline_report
    from kvferry.bench.baseline import BaselineSettings, Case, cases, measure_baseline
    from kvferry.bench.machine import describe
    from kvferry.bench.units import format_size, parse_size

    with one_line_errors():
        sizes = tuple(parse_size(size) for size in tensor_sizes.split(","))
        settings = BaselineSettings(sizes, iterations, parse_size(range_size))
        check_gpu("baseline", device_id)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        columns = TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=sum(1 for _ in cases(settings)))

            def on_case(case: Case) -> None:
                name = f"{case.memory} {case.direction} {case.layout} {format_size(case.num_bytes)}"
                progress.update(task, advance=1, description=name)

            try:
                results = measure_baseline(torch.device("cuda", device_id), settings, on_case)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"the GPU has no two buffers of the largest size: smaller --tensor-sizes ({error})"
                ) from error
        machine = describe(device_id)
        console.print(baseline_report.table(results))
        if output is not None:
            baseline_report.write_json(output, results, settings, machine)
            console.print(f"Numbers: {output}", markup=False)
        if plot is not None:
            baseline_report.plot(plot, results, f"Copies, {machine['gpu']}")
            console.print(f"Plot: {plot}", markup=False)


def check_gpu(command: str, device_id: int) -> None:
    """End with exit code 1 and the remedy unless CUDA and its bindings are there; `ValueError` for no such device."""
    import torch

    from kvferry.device import is_cuda_memcpy_available

    problem = None
    if not torch.cuda.is_available():
        problem = "this machine, or this build of PyTorch, has no CUDA device: run it on a machine with an NVIDIA GPU"
    elif not is_cuda_memcpy_available():
        problem = "cuda-bindings are not installed: pip install 'kvferry[gpu]'"
    if problem is not None:
        typer.echo(f"error: kvferry bench {command} needs an NVIDIA GPU, and {problem}", err=True)
        raise typer.Exit(NEEDS_GPU)
    if not 0 <= device_id < torch.cuda.device_count():
        raise ValueError(
            f"--device-id is {device_id}: this machine has the CUDA devices 0 to {torch.cuda.device_count() - 1}"
        )
