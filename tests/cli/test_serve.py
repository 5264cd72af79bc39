"""kvferry serve: the line it prints, and what it becomes."""

import json
import os
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from kvferry.cli.main import app
from kvferry.integrations.vllm import version

run = CliRunner().invoke


def test_it_prints_the_line() -> None:
    found = run(
        app,
        ["serve", "some/model", "--dry-run", "--compression-error-bound", "0.005", "--cpu-gib", "2", "--port", "81"],
    )
    assert found.exit_code == 0, found.output
    words = shlex.split(found.output)
    assert words[:5] == ["vllm", "serve", "some/model", "--port", "81"]
    extra = json.loads(words[6])["kv_connector_extra_config"]
    assert extra["cpu_bytes_to_use"] == 2 << 30
    assert (extra["compression_codec"], extra["compression_error_bound"]) == ("bounded", 0.005)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--compression-codec", "zip"], "compression_codec='zip' is none of"),
        (["--compression-error-bound", "-1"], "compression_error_bound=-1.0"),
        (["--compression-mode", "flat"], "compression_mode='flat'"),
        (["--compression-ratio", "0.1"], "compression_ratio=0.1"),
        (["--cpu-gib", "0"], "cpu_gib=0.0"),
        (["--kv-transfer-config", "{"], "is no JSON"),
    ],
)
def test_wrong_options(options: list[str], said: str) -> None:
    found = run(app, ["serve", "m", "--dry-run", *options])
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())


def test_it_becomes_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: "0.33.0")
    monkeypatch.setattr(os, "execvp", lambda file, words: became.append((os.path.basename(file), words)))
    found = run(app, ["serve", "m", "--compression-codec", "lossless"])
    assert found.exit_code == 0, found.output
    (file, words), *_ = became
    assert file == "vllm" and words == shlex.split(found.output)


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: "0.24.0")
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("it must not start"))
    found = run(app, ["serve", "m"])
    assert found.exit_code == 2
    assert "kvferry works with 0.33.x" in " ".join(found.output.split())
