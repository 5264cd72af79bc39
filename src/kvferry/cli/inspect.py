"""`kvferry inspect FILE`: what a frame says about itself."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

import kvferry
from kvferry.cli.errors import one_line_errors


def inspect(file: Annotated[Path, typer.Argument(help="A file with one frame, as kvferry.compress made it.")]) -> None:
    """Check a frame and print its codec, bounds, shape and sizes. Exit code 2 if it is damaged or not a frame."""
    from rich.console import Console
    from rich.table import Table

    with one_line_errors():
        info = kvferry.inspect(file.read_bytes())
        grid = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
        for field in fields(info):
            grid.add_row(field.name.replace("_", " "), _text(getattr(info, field.name)))
        grid.add_row("ratio", f"{info.ratio:.3f}")
        Console().print(grid)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value)) or "scalar"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.") if value not in (None, "") else "-"
