"""The command line, run in this process, and what is true of every error."""

import pytest

import kvferry

typer_testing = pytest.importorskip("typer.testing")

from kvferry.cli.main import app  # noqa: E402


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line_error(result, message):
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def break_decompress(monkeypatch):
    """Let every tensor come back altered."""
    decompress = kvferry.decompress

    def wrong(frame, device="cpu", out=None):
        tensor = decompress(frame, device, out)
        tensor[..., 0, 0] += 1
        return tensor

    monkeypatch.setattr(kvferry, "decompress", wrong)
