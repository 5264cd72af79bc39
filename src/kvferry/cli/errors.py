"""Errors that a user can act on leave as one line on stderr, not as a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kvferry.errors import KVFerryError

USAGE_ERROR = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors that kvferry and the file system raise on purpose into `error: ...` and exit code 2."""
    try:
        yield
    except (KVFerryError, ValueError, TypeError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(USAGE_ERROR) from error
    except ModuleNotFoundError as error:
        typer.echo(f"error: {error.name} is not installed: pip install 'kvferry[transformers]'", err=True)
        raise typer.Exit(USAGE_ERROR) from error
