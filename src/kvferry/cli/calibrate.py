"""`kvferry calibrate`: a model's profile for the transform codec, from a text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.demo import PLAIN_WIDTH
from kvferry.cli.errors import one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.calibration.settings import Report
    from kvferry.codecs.transform.profile import Profile
    from kvferry.evaluation.source import ModelSource

STAGES = {
    "moments": "means and second moments",
    "bases": "bases",
    "sensitivities": "sensitivities, layer by layer",
    "steps": "steps for the target",
    "certificate": "certificate",
}
ROWS = {"transform": "transform", "bounded": "bounded, by layer", "fp8": "fp8 e4m3 cast"}
PARTS = {"held_out": "the held-out text that the steps were searched on", "unseen": "text that nothing was fitted to"}


class ScopeName(StrEnum):
    """Which heads share a basis."""

    AUTO = "auto"
    LAYER = "layer"
    HEAD = "head"


class ProfileDType(StrEnum):
    """What to load the model in; the codec takes caches of 16 bits."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def calibrate(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal model.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text, like what the model will read.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="In place of a text: token ids, little-endian uint16, documents apart by id 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.safetensors"),
    target_kl: Annotated[
        float | None,
        typer.Option(help="KL at most so many nats a token. Default: as an fp8 cast causes, measured on the way."),
    ] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="In place of a KL: raw over encoded bytes, at least.")
    ] = None,
    scope: Annotated[
        ScopeName, typer.Option(help="Heads that share a basis: of a layer, one each; auto: as many as fit.")
    ] = ScopeName.AUTO,
    windows: Annotated[int, typer.Option(help="Windows of text for means and bases.")] = 16,
    window_tokens: Annotated[int, typer.Option(help="Tokens of a window; a quarter is scored in the others.")] = 2048,
    held_out: Annotated[int, typer.Option(help="Windows for the search of steps, and as many to certify with.")] = 4,
    rope: Annotated[
        bool,
        typer.Option("--rope/--no-rope", help="Take the configuration's RoPE off keys, or leave keys as they are."),
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[ProfileDType, typer.Option(help="Load the model in; auto: as it is stored.")] = ProfileDType.AUTO,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from what was interrupted (OUT.state), or begin anew.")
    ] = True,
) -> None:
    """Find means, bases and steps of MODEL's KV cache on a text, for a target, and certify them on other text.

    Writes a profile for kvferry.Transform. Steps for plain bounded, layer by layer, are in it too. Takes minutes on a
    GPU, or for a small model on a CPU; memory for one window's cache there, and for the model. An interrupted run goes
    on where it was.
    """
    with one_line_errors():
        import torch
        from rich.console import Console

        from kvferry.calibration import Settings
        from kvferry.calibration import calibrate as find_profile
        from kvferry.codecs.transform.rope import Rope
        from kvferry.evaluation.source import load_source

        if not (text or tokens):
            raise ValueError("there is no text to calibrate on: give --text or --tokens")
        if not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"--out {out} is no file in a folder that is there: give another")
        settings = Settings(windows, window_tokens, held_out, scope.value, target_kl, target_ratio)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        with console.status("loading the model"):
            chosen = None if dtype is ProfileDType.AUTO else getattr(torch, dtype)
            source = load_source(model, device, chosen, text, tokens, need_tokenizer=False)
        if not rope:
            settings = replace(settings, rope=Rope.none(source.describe()["head_dim"]))
        start = time.perf_counter()
        with _progress(console) as report:
            profile = find_profile(
                source.model,
                source.documents,
                settings,
                name=source.name,
                text=source.text,
                state=out.with_name(out.name + ".state"),
                fresh=not resume,
                report=report,
            )
        profile.save(out)
        _print(console, profile, source, time.perf_counter() - start)
        console.print(f"\nProfile: {out} ({out.stat().st_size / 1e6:.2f} MB, digest {profile.digest})", markup=False)


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """A bar for each stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("[bold]{task.fields[stage]}[/]"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, remark: str) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                tasks[stage] = progress.add_task("", total=total or None, stage=STAGES[stage])
            progress.update(tasks[stage], completed=done, description=remark)

        yield report


def _print(console: Console, profile: Profile, source: ModelSource, seconds: float) -> None:
    """The certificate as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    certificate = profile.certificate
    peak = _peak_bytes(source)
    console.print(
        f"[bold]Calibrated[/] {escape(source.name)} on {escape(source.text)} in {seconds:.1f} s, with {peak / 1e9:.2f} "
        f"GB at most: {len(profile.layers)} layers, bases of {profile.n} channels ({profile.group_heads} heads)"
    )
    target = certificate["target"]
    value = f"KL of at most {target['kl_nats']:.6f}" if target["kind"] == "kl" else f"ratio of {target['ratio']:g}"
    console.print(f"[bold]Target[/] {value} ({target['from']})", markup=True)
    for part, meaning in PARTS.items():
        protocol = certificate["protocol"]
        restored = f"{protocol['windows']} x {protocol['prefix']} tokens restored, {protocol['score']} scored"
        console.print(f"\nOn {meaning}: {restored}", markup=False)
        grid = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        grid.add_column("codec")
        for heading in ("bits/value", "ratio", "KL (nats)", "perplex. change", "top-1 agree"):
            grid.add_column(heading, justify="right", no_wrap=True)
        for name, label in ROWS.items():
            grid.add_row(label, *_cells(certificate[part][name]))
        console.print(grid)


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['bits_per_value']:.2f}",
        f"{figures['ratio']:.2f}",
        f"{figures['kl_nats']:.6f}",
        f"{100 * figures['perplexity_change']:+.2f}%",
        f"{figures['top1_agreement']:.4f}",
    )


def _peak_bytes(source: ModelSource) -> int:
    """The most memory that this process held: on the GPU where the model is on one, else on the host."""
    import resource
    import sys

    import torch

    if source.device.type == "cuda":
        return torch.cuda.max_memory_allocated(source.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
