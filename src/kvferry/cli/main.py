"""The entry point: one typer application, one module a command."""

import typer

from kvferry.cli.bench import bench
from kvferry.cli.bench_codec import codec
from kvferry.cli.bench_pipeline import pipeline
from kvferry.cli.calibrate import calibrate
from kvferry.cli.demo import demo
from kvferry.cli.doctor import doctor
from kvferry.cli.evaluate import evaluate
from kvferry.cli.inspect import inspect
from kvferry.cli.serve import SERVE_CONTEXT, serve

app = typer.Typer(
    name="kvferry",
    help="Compress a language model's KV cache with a stated guarantee, move it, and get it back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo)
app.command()(evaluate)
app.command()(calibrate)
app.command()(inspect)
app.command()(doctor)
app.command(context_settings=SERVE_CONTEXT)(serve)
bench.command()(codec)
bench.command()(pipeline)
app.add_typer(bench)


def main() -> None:
    """Run the command line."""
    app(prog_name="kvferry")
