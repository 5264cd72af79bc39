"""`kvferry demo`: a model's KV cache is encoded, stored, dropped, restored and used to continue the text."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvferry
from kvferry.cli.errors import one_line_errors

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kvferry.evaluation import PrefixProtocol, Scheme, SchemeResult
    from kvferry.evaluation.source import ModelSource

CONTINUE_TOKENS = 48
PLAIN_WIDTH = 110  # of the output where it is no terminal
TAIL_CHARS = 160  # of the prompt, shown before its continuation
EXPLANATION = (
    "error/bound: largest |restored - original| over the bound, at most 1. KL, perplexity and top-1 compare with the "
    "untouched cache. Bounds are relative to each tensor's value range, 'by sigma' to its standard deviation. Packing "
    "is ans where bitpack is not named. GB/s count raw bytes, with one CPU thread."
)


class CodecName(StrEnum):
    """The codec that the story is told with, beside lossless."""

    BOUNDED = "bounded"
    LOSSLESS = "lossless"
    RAW = "raw"


class DTypeName(StrEnum):
    """What to load the model in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face causal model; else built-in.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[DTypeName, typer.Option(help="Load the model in; auto: as it is stored.")] = DTypeName.AUTO,
    codec: Annotated[CodecName, typer.Option(help="Codec that the story is told with.")] = CodecName.BOUNDED,
    error_bound: Annotated[float, typer.Option(help="Its bound, relative to each tensor's value range.")] = 1e-2,
    prefix: Annotated[int, typer.Option(help="Tokens to store and restore.")] = 1536,
    score: Annotated[int, typer.Option(help="Tokens to score after them.")] = 512,
    sequences: Annotated[int, typer.Option(help="Independent texts to average over.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timings of each store and restore.")] = 1,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: built-in held-out documents.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="In place of a text: token ids, little-endian uint16, documents apart by id 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the numbers.")] = Path("demo-out"),
) -> None:
    """Prefill a long prompt, store its KV cache compressed, drop it, restore it, continue; then measure every codec.

    Exit code 1 if a guarantee does not hold: a value beyond its bound, or lossless not bit-identical.
    """
    options = _Options(model, device, dtype, codec, error_bound, prefix, score, sequences, repeats, text, tokens, out)
    with one_line_errors():
        kept = _run(options)
    if not kept:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Options:
    """What the command line gave, in its order."""

    model: Path | None
    device: str
    dtype: DTypeName
    codec: CodecName
    error_bound: float
    prefix: int
    score: int
    sequences: int
    repeats: int
    text: Path | None
    tokens: Path | None
    out: Path


def _run(options: _Options) -> bool:
    """The whole demo. Returns whether every guarantee was kept."""
    import torch
    from rich.console import Console

    from kvferry.evaluation import PrefixProtocol, default_schemes, one_cpu_thread
    from kvferry.evaluation.schemes import RANGE_BOUNDS
    from kvferry.evaluation.source import load_source

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    protocol = PrefixProtocol(prefix=options.prefix, score=options.score, repeats=options.repeats)
    chosen = _chosen_codec(options.codec, options.error_bound)
    bounds = {*RANGE_BOUNDS} | ({options.error_bound} if options.codec is CodecName.BOUNDED else set())
    schemes = default_schemes(range_bounds=sorted(bounds))
    # The built-in model is too small to gain from a second thread, and loses much where the cores are shared.
    with nullcontext() if options.model else one_cpu_thread():
        with console.status("loading the model"):
            dtype = None if options.dtype is DTypeName.AUTO else getattr(torch, options.dtype)
            source = load_source(options.model, options.device, dtype, options.text, options.tokens)
        return _tell_and_measure(console, source, options, chosen, schemes, protocol)


def _tell_and_measure(
    console: Console,
    source: ModelSource,
    options: _Options,
    chosen: kvferry.Bounded | kvferry.Lossless | kvferry.Raw,
    schemes: list[Scheme],
    protocol: PrefixProtocol,
) -> bool:
    from rich.markup import escape

    from kvferry.evaluation import report, spread_windows

    about = source.describe()
    source.check_context(protocol)
    windows = spread_windows(source.documents, protocol.window, options.sequences)
    options.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]Model[/] {escape(about['name'])}: {about['architecture']}, "
        f"{about['parameters'] / 1e6:.1f}M parameters, {about['layers']} layers, "
        f"{about['kv_heads']} KV heads of {about['head_dim']}, {about['dtype']}, on {source.device}"
    )
    exact = _tell_story(console, source, windows[0], protocol.prefix, chosen)
    results = _measure(console, source, windows, schemes, protocol)
    title = f"{protocol.prefix} tokens restored, the next {protocol.score} scored, {len(windows)} texts"
    console.print()
    console.print(report.table(results, title))
    console.print(EXPLANATION, style="dim")
    png, numbers = options.out / "kvferry-demo.png", options.out / "kvferry-demo.json"
    report.plot(png, results, f"{about['name']}: {title}")
    report.write_json(numbers, results, protocol, len(windows), about, source.device)
    console.print(f"\nPlot: {png}\nNumbers: {numbers}", markup=False)
    return _verdict(console, results, exact)


def _chosen_codec(name: CodecName, error_bound: float) -> kvferry.Bounded | kvferry.Lossless | kvferry.Raw:
    if name is CodecName.LOSSLESS:
        return kvferry.Lossless()
    if name is CodecName.RAW:
        return kvferry.Raw()
    return kvferry.Bounded(error_bound=error_bound)


def _tell_story(
    console: Console,
    source: ModelSource,
    window: torch.Tensor,
    prefix: int,
    chosen: kvferry.Bounded | kvferry.Lossless | kvferry.Raw,
) -> bool:
    """Store, drop, restore and continue one prompt. Returns whether lossless continued bit for bit."""
    import torch
    from rich.text import Text

    from kvferry.evaluation import continue_greedily, one_cpu_thread, prefill
    from kvferry.store import HostStore

    window = window.to(source.device)
    prompt, first = window[None, :prefix], window[None, prefix : prefix + 1]
    start = time.perf_counter()
    cache = prefill(source.model, prompt)
    seconds = time.perf_counter() - start
    codecs: dict[str, kvferry.Bounded | kvferry.Lossless | kvferry.Raw] = {"lossless": kvferry.Lossless()}
    if chosen not in codecs.values():
        bound = f", bound {chosen.error_bound:g} of the range" if isinstance(chosen, kvferry.Bounded) else ""
        codecs[f"{chosen.name}{bound}"] = chosen
    store = HostStore(capacity_bytes=1 << 40)
    with one_cpu_thread():
        entries = {name: store.put_cache(name, cache, codec) for name, codec in codecs.items()}
    raw = entries["lossless"].raw_bytes
    console.print(f"[bold]Prefill[/] {prefix} tokens in {seconds:.2f} s make {raw / 1e6:.2f} MB of KV cache")
    for name, entry in entries.items():
        megabytes = entry.encoded_bytes / 1e6
        console.print(f"[bold]Store[/] {name}: {megabytes:.2f} MB in host memory, ratio {entry.ratio:.2f}")
    untouched, untouched_logits = continue_greedily(source.model, cache, first, CONTINUE_TOKENS)
    del cache
    console.print("[bold]Drop[/] the cache; only the store has it now")
    decode = source.tokenizer.decode
    console.print("[bold]Continue[/]", Text(f"...{decode(window[: prefix + 1])[-TAIL_CHARS:]!r}", style="dim"))
    console.print("  untouched cache:", Text(repr(decode(untouched)), style="cyan"))
    exact = True
    for name in codecs:
        with one_cpu_thread():
            restored = store.restore_cache(name, source.device)
        tokens, logits = continue_greedily(source.model, restored, first, CONTINUE_TOKENS)
        agree = int((tokens == untouched).long().cumprod(0).sum())
        identical = torch.equal(logits, untouched_logits)
        if agree == len(tokens):
            verdict = "identical" + (", every logit bit for bit" if identical else " text")
        else:
            verdict = (
                f"diverges after {agree} of {len(tokens)} tokens: each picks the next, so one close call is enough"
            )
        console.print(f"  restored, {name}:", Text(repr(decode(tokens)), style="cyan"))
        console.print(f"    {verdict}", style="green" if agree == len(tokens) else "yellow")
        if name == "lossless":
            exact = identical
    store.check_integrity()
    return exact


def _measure(
    console: Console, source: ModelSource, windows: torch.Tensor, schemes: list[Scheme], protocol: PrefixProtocol
) -> list[SchemeResult]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from kvferry.evaluation import evaluate_prefix

    columns = (TextColumn("[bold]Measure[/]"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(schemes) * len(windows))

        def on_step(sequence: int, scheme: Scheme) -> None:
            done = sequence * len(schemes) + schemes.index(scheme)
            progress.update(task, completed=done, description=f"text {sequence + 1}: {scheme.name}")

        return evaluate_prefix(source.model, windows, schemes, protocol, on_step=on_step)


def _verdict(console: Console, results: list[SchemeResult], exact: bool) -> bool:
    broken = [result.name for result in results if not result.guarantee_kept]
    if not exact:
        broken.append("lossless continuation")
    if broken:
        console.print(f"GUARANTEE BROKEN: {', '.join(broken)}", style="bold red")
        return False
    console.print("Every guarantee held: no value beyond its bound, lossless bit for bit.", style="green")
    return True
