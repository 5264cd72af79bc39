"""`kvferry evaluate`: what codecs do to a model, against the untouched cache, in numbers and on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.demo import DTypeName
from kvferry.cli.errors import one_line_errors

if TYPE_CHECKING:
    from rich.console import Console

    from kvferry.evaluation.codec_names import NamedProfile
    from kvferry.evaluation.run import Evaluation, Plan
    from kvferry.evaluation.source import ModelSource

PLAIN_WIDTH = 130  # of the output where it is no terminal


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a causal model that transformers loads.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: built-in held-out documents.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="In place of a text: token ids, little-endian uint16, documents apart by id 0.")
    ] = None,
    codecs: Annotated[
        str,
        typer.Option(
            help="Names between commas, as bounded:0.1sigma,fp8,kivi3; default: all; an unknown one lists them."
        ),
    ] = "default",
    profile: Annotated[
        list[Path] | None, typer.Option(help="A profile from kvferry calibrate, for transform; may be repeated.")
    ] = None,
    studies: Annotated[
        str, typer.Option(help="Ablations, between commas; default: all; none; an unknown one lists them.")
    ] = "default",
    sensitivity: Annotated[
        str, typer.Option(help="Codecs to try on one layer's K or V at a time, between commas; or none.")
    ] = "bounded:0.2sigma,int4",
    trials: Annotated[int, typer.Option(help="Prefixes for retrieval (needles, key-value recall); 0: none.")] = 2,
    generate: Annotated[int, typer.Option(help="Greedy tokens to see where texts part; 0: none.")] = 64,
    prefix: Annotated[int, typer.Option(help="Tokens to store and restore.")] = 1536,
    score: Annotated[int, typer.Option(help="Tokens to score after them.")] = 512,
    sequences: Annotated[int, typer.Option(help="Independent texts to average over.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timings of each store and restore.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[DTypeName, typer.Option(help="Load the model in; auto: as it is stored.")] = DTypeName.AUTO,
    out: Annotated[Path, typer.Option(help="Folder for the page, the numbers and the plots.")] = Path("evaluation"),
) -> None:
    """Restore a prefix through each codec and score what follows against the untouched cache.

    Writes evaluation.html (one page with everything), evaluation.json, CSV tables and PNG plots. Exit code 1 if a
    guarantee does not hold: a value beyond its bound, or lossless not bit-identical.
    """
    with one_line_errors():
        import matplotlib  # noqa: F401  (found missing now rather than after measuring)
        import torch
        from rich.console import Console

        from kvferry.evaluation.prefix import PrefixProtocol
        from kvferry.evaluation.source import load_source

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        protocol = PrefixProtocol(prefix, score, repeats, generate)
        plan = _plan(protocol, sequences, trials, codecs, profile or [], studies, sensitivity)
        given = None if dtype is DTypeName.AUTO else getattr(torch, dtype)
        with console.status("loading the model"):
            source = load_source(model, device, given, text, tokens, need_tokenizer=False)
        broken = _run(console, source, plan, out)
    if broken:
        raise typer.Exit(1)


def _plan(
    protocol: Any, sequences: int, trials: int, codecs: str, profiles: list[Path], studies: str, sensitivity: str
) -> Plan:
    """Raises `ValueError` for names that are none, `CorruptProfile` and `FileNotFoundError` for profiles."""
    from kvferry.codecs.transform.profile import Profile
    from kvferry.evaluation.codec_names import NamedProfile, split_names
    from kvferry.evaluation.run import Plan

    named = _with_names([NamedProfile(path.stem, Profile.load(path)) for path in profiles])
    return Plan(
        protocol,
        sequences,
        split_names(codecs, with_profile=bool(named)),
        named,
        [] if sensitivity == "none" else split_names(sensitivity, with_profile=bool(named)),
        [part.strip() for part in studies.split(",") if part.strip()],
        trials,
    )


def _with_names(profiles: list[NamedProfile]) -> list[NamedProfile]:
    """Raises `ValueError` where two profiles would be called the same."""
    names = [named.name for named in profiles]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two profiles are called {name!r}: rename one of the files")
    return profiles


def _run(console: Console, source: ModelSource, plan: Plan, out: Path) -> list[str]:
    """Evaluate, write and print. Returns the schemes whose guarantee was broken."""
    from kvferry.bench.machine import commit
    from kvferry.evaluation import report
    from kvferry.evaluation.output import write_all

    evaluation = _with_progress(console, source, plan)
    versions = report.versions() | {"commit": commit()}
    path = write_all(out, evaluation, report.machine(source.device), versions)
    title = f"{plan.protocol.prefix} tokens restored, the next {plan.protocol.score} scored, {plan.sequences} texts"
    console.print(report.evaluation_table(evaluation.results, title))
    for remark in evaluation.remarks:
        console.print(remark, style="dim", markup=False)
    console.print(f"Page: {path}\nNumbers: {path.with_suffix('.json')}", markup=False)
    if evaluation.broken:
        console.print(f"GUARANTEE BROKEN: {', '.join(evaluation.broken)}", style="bold red", markup=False)
    else:
        console.print("Every guarantee held: no value beyond its bound, lossless bit for bit.", style="green")
    return evaluation.broken


def _with_progress(console: Console, source: ModelSource, plan: Plan) -> Evaluation:
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from kvferry.evaluation.run import evaluate

    columns = (TextColumn("[bold]{task.fields[stage]}[/]"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def on_step(stage: str, done: int, total: int, what: str) -> None:
            if stage not in tasks:
                for earlier in tasks.values():
                    progress.update(earlier, completed=progress.tasks[earlier].total, description="")
                tasks[stage] = progress.add_task("", total=total, stage=stage)
            progress.update(tasks[stage], completed=done, description=what)

        return evaluate(source, plan, on_step)
