"""`kvferry calibrate`: from files to a profile, interrupted, and errors in one line."""

import pytest
import torch

import kvferry

pytest.importorskip("typer.testing")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from command_line import assert_one_line_error, run

from kvferry import data

SMALL = ("--windows", 3, "--window-tokens", 256, "--held-out", 1)


@pytest.fixture
def command(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(data.DOCUMENT_SEPARATOR.join(data.demo_documents()))
    return "calibrate", data.demo_model_dir(), "--text", text, "--out", tmp_path / "a.safetensors", *SMALL


def test_a_profile_is_written_with_its_certificate(command, tmp_path):
    result = run(*command, "--target-ratio", 5)
    assert result.exit_code == 0, result.output
    for part in ("Target ratio of 5 (given)", "transform", "bounded, by layer", "fp8 e4m3 cast", "nothing was fitted"):
        assert part in result.stdout
    profile = kvferry.Profile.load(tmp_path / "a.safetensors")
    assert profile.digest in result.stdout
    assert profile.model["name"] == "demo"
    assert profile.certificate["text"]["name"] == "text.txt"
    assert f"{profile.certificate['unseen']['transform']['kl_nats']:.6f}" in result.stdout
    assert not (tmp_path / "a.safetensors.state").exists()


def test_a_state_is_gone_on_from_unless_told_otherwise(command, tmp_path):
    state = tmp_path / "a.safetensors.state"
    missed = run(*command, "--target-kl", 1e-7)
    assert missed.exit_code == 2
    assert missed.stderr.startswith("error: a KL of at most 1e-07 cannot be reached")
    assert state.is_file()
    other = run(*command, "--scope", "head")
    assert other.exit_code == 2
    assert "group_heads was 2, and is 1 now" in other.stderr
    fresh = run(*command, "--scope", "head", "--fresh", "--no-rope")
    assert fresh.exit_code == 0, fresh.output
    assert "KL of an fp8 e4m3 cast" in " ".join(fresh.stdout.split())
    profile = kvferry.Profile.load(tmp_path / "a.safetensors")
    assert (profile.group_heads, profile.rope) == (1, kvferry.Rope.none(64))
    assert not state.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-kl", 0.001, "--target-ratio", 4), "exclude each other"),
        (("--windows", 500), "fewer or shorter windows"),
        (("--out", "/nowhere/a.safetensors"), "--out /nowhere/a.safetensors"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--tokens", "ids.u16"), "exclude each other"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(command, options, message):
    assert_one_line_error(run(*command, *options), message)


def test_a_text_is_needed(command):
    result = run(*command[:2])
    assert result.exit_code == 2
    assert "give --text or --tokens" in result.stderr


def test_token_files_need_no_tokenizer(tmp_path):
    ids = torch.randint(1, 2048, (3000,), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    (tmp_path / "ids.u16").write_bytes(ids.numpy().astype("<u2").tobytes())
    out = tmp_path / "b.safetensors"
    options = ("--tokens", tmp_path / "ids.u16", "--out", out, "--target-ratio", 3, "--dtype", "float16")
    result = run("calibrate", data.demo_model_dir(), *options, *SMALL)
    assert result.exit_code == 0, result.output
    assert kvferry.Profile.load(out).model["dtype"] == "float16"
