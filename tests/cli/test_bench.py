"""`kvferry bench`: without a GPU it says so; (`gpu`) with one it measures."""

import json
from dataclasses import replace

import pytest
import torch

typer_testing = pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from kvferry import Profile, Rope  # noqa: E402
from kvferry.cli.main import app  # noqa: E402


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_baseline_needs_a_gpu(tmp_path):
    result = run("baseline", "--output", tmp_path / "a.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: kvferry bench baseline needs an NVIDIA GPU")
    assert "run it on a machine with" in result.stderr
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-sizes", "4KiB,many"), "'many' is no size"),
        (("--iterations", 0), "iterations is 0"),
        (("--range-size", "0"), "'0' is no size"),
    ],
)
def test_baseline_refuses_what_cannot_be(options, message):
    result = run("baseline", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_baseline_reports_what_it_measured(monkeypatch, tmp_path):
    """With the CPU in the GPU's place."""
    pytest.importorskip("matplotlib")
    from kvferry.bench import baseline
    from kvferry.cli import bench

    measure = baseline.measure_baseline
    monkeypatch.setattr(bench, "check_gpu", lambda command, device: None)
    monkeypatch.setattr(
        baseline, "measure_baseline", lambda device, settings, on_case: measure(torch.device("cpu"), settings, on_case)
    )
    monkeypatch.setattr("kvferry.bench.machine.describe", lambda device: {"gpu": "none", "commit": "abc"})
    options = ("--tensor-sizes", "4KiB,128KiB", "--iterations", 2, "--range-size", "16KiB")
    result = run("baseline", *options, "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    for part in ("scattered", "128 KiB", "copy_ranges", "a.json", "a.png"):
        assert part in result.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["machine"]["commit"] == "abc"
    assert content["settings"]["sizes"] == [4096, 131072]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_codec_needs_a_gpu():
    result = run("codec", "--tensor-size", "8MiB")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: kvferry bench codec needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-size", "8MB"), "'8MB' is no size"),
        (("--encoding-mode", "fixed,quick"), "encoding mode='quick' is unknown"),
        (("--error-bound", "-1"), "the error bound is -1.0"),
        (("--sweep-bounds", "0.1,wide"), "could not convert string to float: 'wide'"),
        (("--sweep-sms", "4,0"), "sweep_sms [4, 0]"),
    ],
)
def test_codec_refuses_what_cannot_be(options, message):
    result = run("codec", *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def profile_file(folder, layers):
    """A profile of one head of 32 channels."""
    path = folder / f"{layers}.profile"
    Profile.hadamard(layers, 1, 32, Rope.none(32), [(0.5, 0.5)] * layers).save(path)
    return path


def test_codec_refuses_what_is_no_profile(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "other").write_bytes(b"nonsense")
    for name, message in (("other", "is no profile, or a damaged one"), ("none", "make one with kvferry calibrate")):
        result = run("codec", "--profile", tmp_path / name)
        assert result.exit_code == 2 and message in result.stderr


def test_codec_reports_what_it_measured(monkeypatch, tmp_path):
    """With the CPU in the GPU's place, and a small cache."""
    pytest.importorskip("matplotlib")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from kvferry.bench import codec
    from kvferry.bench.pipeline_cache import Shape
    from kvferry.cli import bench

    measure, small = codec.run, {"shape": Shape(2, 1), "chunk_tokens": 16, "ceiling_bytes": 4096}
    monkeypatch.setattr(bench, "check_gpu", lambda command, device: None)
    monkeypatch.setattr(
        codec,
        "run",
        lambda tensors, plan, device, told, profile: measure(
            tensors, replace(plan, **small), torch.device("cpu"), told, profile
        ),
    )
    monkeypatch.setattr("kvferry.bench.machine.describe", lambda device: {"gpu": "none", "commit": "abc"})
    names = [f"layer.{layer:02}.{side}" for layer in range(2) for side in "kv"]
    save_file({name: torch.randn(1, 1, 40, 32).bfloat16() for name in names}, tmp_path / "noise.safetensors")
    profile = profile_file(tmp_path, layers=2)
    options = ("--kv", tmp_path / "noise.safetensors", "--tensor-size", "8KiB,16KiB", "--encoding-mode", "fixed")
    options += ("--encoding-mode", "raw", "--packing", "bitpack", "--iterations", 1, "--sweep-bounds", "0.1,0.4")
    options += ("--profile", profile)
    result = run("codec", *options, "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    for part in ("KV: noise, repeated", "16 KiB x 1", "fixed bitpack", "fp8 e4m3 cast", "By error bound", "a.json"):
        assert part in result.stdout
    assert "transform per head bitpack" in result.stdout and "2 layers, 1 heads of 32" in result.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["machine"]["commit"] == "abc" and content["data"]["name"] == "noise"
    assert content["plan"]["sizes"] == [8192, 16384] and content["plan"]["modes"] == ["fixed", "raw"]
    assert [row["raw_bytes"] for row in content["transform"]] == [16384, 8192]
    assert content["profile"]["digest"] == Profile.load(profile).digest

    result = run("codec", *options[:-1], profile_file(tmp_path, layers=3), "--output", tmp_path / "b.json")
    assert result.exit_code == 2 and not (tmp_path / "b.json").exists()
    assert "the profile is of a model with layers=3, this one has 2" in result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_codec_command(tmp_path):
    options = ("--tensor-size", "8MiB", "--encoding-mode", "fixed", "--packing", "ans", "--iterations", 3)
    result = run("codec", *options, "--output", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a.json").read_text())["machine"]["gpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_baseline_command(tmp_path):
    result = run("baseline", "--tensor-sizes", "4KiB,256KiB", "--iterations", 3, "--output", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a.json").read_text())["machine"]["gpu"]
    refused = run("baseline", "--device-id", 99)
    assert refused.exit_code == 2
    assert "--device-id is 99" in refused.stderr
