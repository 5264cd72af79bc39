"""`kvferry evaluate`: its files, its exit codes, and errors in one line, on the model that ships with kvferry."""

import json

import pytest
import torch

from kvferry import data

pytest.importorskip("typer.testing")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from command_line import assert_one_line_error, break_decompress, run


@pytest.fixture
def command(tmp_path):
    quick = ("--prefix", 48, "--score", 12, "--sequences", 1, "--trials", 0, "--generate", 0)
    few = ("--codecs", "lossless,bounded:0.2sigma,int2", "--studies", "none", "--sensitivity", "none")
    return ("evaluate", data.demo_model_dir(), *quick, *few, "--out", tmp_path / "out")


def test_a_text_through_chosen_codecs(command, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30, encoding="utf-8")
    options = ("--text", tmp_path / "text.txt", "--generate", 3, "--sensitivity", "int2", "--studies", "modes")
    result = run(*command, *options)
    assert result.exit_code == 0, result.output
    for part in ("bounded:0.2sigma", "int2", "drift", "evaluation.html", "Every guarantee held"):
        assert part in result.stdout
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["name"] for row in content["results"]] == ["lossless", "bounded:0.2sigma", "int2"]
    assert content["text"]["name"] == "text.txt"
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["commit"]
    assert content["machine"]["cpu"]
    assert str(tmp_path) not in json.dumps(content)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"evaluation.html", "evaluation.csv", "sensitivity.csv", "studies.csv", "rate-kl.png"} <= names
    assert "retrieval.csv" not in names


def test_tokens_and_a_profile(command, tmp_path):
    from kvferry.codecs.transform.profile import Profile
    from kvferry.codecs.transform.rope import Rope

    ids = torch.randint(1, 2048, (200,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "ids.u16").write_bytes(ids.numpy().astype("<u2").tobytes())
    rope = Rope(64, 64, tuple(10000 ** (-i / 32) for i in range(32)))
    profile = Profile.hadamard(4, 2, 64, rope, [(0.1, 0.1)] * 4).with_bounds([(0.1, 0.05)] * 4)
    profile.save(tmp_path / "mine.safetensors")
    options = ("--tokens", tmp_path / "ids.u16", "--profile", tmp_path / "mine.safetensors")
    result = run(*command, *options, "--codecs", "transform:1,bounded:profile*2")
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["profiles"][0]["name"] == "mine"
    assert [row["name"] for row in content["results"]] == ["transform:1", "bounded:profile*2"]
    assert all(row["guarantee_kept"] for row in content["results"])
    twice = run(*command, *options, "--profile", tmp_path / "mine.safetensors")
    assert twice.exit_code == 2
    assert "two profiles are called 'mine'" in twice.stderr


def test_a_broken_guarantee_is_exit_code_1(command, monkeypatch):
    break_decompress(monkeypatch)
    result = run(*command, "--codecs", "lossless")
    assert result.exit_code == 1
    assert "GUARANTEE BROKEN: lossless" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--codecs", "zip"), "unknown codec 'zip': give raw, lossless"),
        (("--codecs", "transform:1"), "--profile FILE"),
        (("--studies", "moon"), "unknown study 'moon'"),
        (("--sensitivity", "int5"), "5 bits"),
        (("--profile", "gone.safetensors"), "gone.safetensors"),
        (("--prefix", 0), "prefix is 0"),
        (("--prefix", 5000), "context of 4096 tokens: give smaller --prefix or --score"),
        (("--prefix", 4000, "--generate", 200), "smaller --prefix or --generate"),
        (("--trials", 1), "no room"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--text", "a", "--tokens", "b"), "exclude each other"),
    ],
)
def test_what_cannot_be_is_one_line(command, options, message):
    assert_one_line_error(run(*command, *options), message)


def test_a_folder_without_a_model(tmp_path):
    result = run("evaluate", tmp_path)
    assert result.exit_code == 2
    assert "no config.json" in result.stderr
