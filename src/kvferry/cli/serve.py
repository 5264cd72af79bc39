"""`kvferry serve`: vLLM's server, with KV cache compressed on its way to host memory."""

import os
import shlex
import shutil
import sys
from typing import Annotated, Any

import typer

from kvferry.cli.errors import one_line_errors

SERVE_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Options that we do not know are vLLM's."""


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model, as vllm serve takes it.")],
    compression_codec: Annotated[
        str | None, typer.Option(help="bounded (the default: within an error bound), lossless, transform, or raw.")
    ] = None,
    compression_error_bound: Annotated[
        float | None,
        typer.Option(
            help="Error bound: of bounded, times the range of each tile of 64 tokens (default 0.01); of transform, in "
            "units of its profile (default 1)."
        ),
    ] = None,
    compression_mode: Annotated[str | None, typer.Option(help="fixed (default), plain or outlier.")] = None,
    compression_ratio: Annotated[
        float | None,
        typer.Option(
            help="Raw bytes over slot bytes (default: bounded 3.0, lossless 1.35, transform what its profile states)."
        ),
    ] = None,
    compression_profile: Annotated[
        str | None, typer.Option(help="Profile of the codec transform, made by kvferry calibrate; implies that codec.")
    ] = None,
    compression_target_kl: Annotated[
        float | None, typer.Option(help="Start only if the profile's certificate states at most so many nats a token.")
    ] = None,
    cpu_gib: Annotated[float, typer.Option(help="Host memory for KV cache, in GiB.")] = 16.0,
    dry_run: Annotated[bool, typer.Option(help="Print the command, and do not run it.")] = False,
) -> None:
    """Serve MODEL with vLLM, its KV cache kept compressed in host memory. Any option of vllm serve may follow. Prints
    the vllm serve command that does the same, and becomes it."""
    with one_line_errors():
        from kvferry.integrations.vllm.select import serve_command
        from kvferry.integrations.vllm.settings import OffloadSettings
        from kvferry.integrations.vllm.version import check_version

        if not dry_run:
            check_version()
        chosen: dict[str, Any] = {
            "codec": compression_codec or ("transform" if compression_profile else OffloadSettings.read({}).codec),
            "error_bound": compression_error_bound,
            "mode": compression_mode,
            "ratio": compression_ratio,
            "profile": compression_profile,
            "target_kl": compression_target_kl,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        command = serve_command(model, cpu_gib, given, context.args)
        typer.echo(shlex.join(command))
        if not dry_run:
            # The vLLM of this environment, on the path or not.
            beside = shutil.which("vllm", path=os.path.dirname(sys.executable))
            os.execvp(beside or command[0], command)
