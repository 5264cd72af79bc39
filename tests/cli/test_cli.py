"""The command line: output, exit codes, and errors in one line."""

import json
import subprocess
import sys

import pytest
import torch

import kvferry

pytest.importorskip("typer.testing")
pytest.importorskip("rich")

from command_line import assert_one_line_error, break_decompress, run


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny random model with a byte-level tokenizer, as files."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\0\n".join(f"document {d}: " + "the quick brown fox. " * 20 for d in range(2)))
    return path


@pytest.fixture
def demo(model_dir, text, tmp_path):
    pytest.importorskip("matplotlib")
    return ("demo", "--model", model_dir, "--text", text, "--prefix", 70, "--score", 10, "--out", tmp_path / "out")


def test_demo_tells_the_story_and_writes_its_files(demo, tmp_path):
    result = run(*demo, "--sequences", 3)
    assert result.exit_code == 0, result.output
    for part in ("Prefill 70 tokens", "ratio", "Drop", "identical, every logit bit for bit", "Every guarantee held"):
        assert part in result.stdout
    for name in ("raw", "lossless bitpack", "bounded outlier 0.02", "fp8 e4m3 cast", "int4 per token and head"):
        assert name in result.stdout
    assert (tmp_path / "out" / "kvferry-demo.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "out" / "kvferry-demo.json").read_text())
    assert content["model"]["layers"] == 1
    assert content["protocol"]["sequences"] == 3
    assert len(content["results"]) >= 20


def test_demo_fails_when_a_guarantee_is_broken(demo, monkeypatch):
    break_decompress(monkeypatch)
    result = run(*demo, "--sequences", 1)
    assert result.exit_code == 1
    assert "GUARANTEE BROKEN" in result.stdout


def test_demo_takes_tokens_and_a_chosen_bound(demo, tmp_path):
    ids = torch.randint(1, 256, (200,)).to(torch.uint16)
    (tmp_path / "ids.u16").write_bytes(ids.numpy().astype("<u2").tobytes())
    without_text = [*demo[:3], *demo[5:]]
    options = ("--tokens", tmp_path / "ids.u16", "--error-bound", 0.07, "--sequences", 1, "--dtype", "float32")
    result = run(*without_text, *options)
    assert result.exit_code == 0, result.output
    assert "bound 0.07 of the range" in result.stdout
    assert "bounded plain 0.07" in result.stdout
    assert "float32" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--error-bound", 0), "error_bound"),
        (("--prefix", 0), "prefix is 0"),
        (("--prefix", 600), "context of 512 tokens"),
        (("--prefix", 480), "texts of at most"),
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--device", "meta"), "not supported"),
        (("--sequences", 0), "0 windows"),
    ],
)
def test_demo_refuses_what_cannot_be(demo, options, message):
    assert_one_line_error(run(*demo, *options), message)


def test_demo_names_missing_files(demo, tmp_path):
    assert_one_line_error(run("demo", "--model", tmp_path), "no config.json")
    assert_one_line_error(run(*demo, "--tokens", tmp_path / "ids.u16"), "exclude each other")
    assert_one_line_error(run(*demo[:3], "--text", tmp_path / "gone.txt"), "gone.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_demo_says_that_there_is_no_cuda_device(demo):
    assert_one_line_error(run(*demo, "--device", "cuda"), "--device cpu")


def test_inspect_prints_a_frame(tmp_path):
    frame = kvferry.compress(torch.randn(2, 70, 64), kvferry.Bounded(error_bound=0.5, relative=False, mode="plain"))
    (tmp_path / "a.kvf").write_bytes(frame)
    result = run("inspect", tmp_path / "a.kvf")
    assert result.exit_code == 0, result.output
    for part in ("bounded", "plain", "float32", "2 x 70 x 64", str(len(frame)), "ratio", "0.5"):
        assert part in result.stdout


def test_inspect_refuses_damaged_and_missing_files(tmp_path):
    frame = kvferry.compress(torch.randn(2, 70, 64), kvferry.Lossless())
    (tmp_path / "short.kvf").write_bytes(frame[:-1])
    (tmp_path / "noise").write_bytes(b"not a frame at all")
    for name, message in (("short.kvf", ""), ("noise", ""), ("gone", "gone")):
        assert_one_line_error(run("inspect", tmp_path / name), message)


def test_doctor_tests_the_codecs():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for part in ("torch", "cuda-bindings", "CUDA device", "lossless ans", "bounded outlier bitpack", "ok"):
        assert part in result.stdout


def test_doctor_fails_when_a_codec_does(monkeypatch):
    monkeypatch.setattr(kvferry, "decompress", lambda frame, device="cpu", out=None: torch.zeros(2, 100, 96))
    result = run("doctor")
    assert result.exit_code == 1
    assert "exceeds" in result.stdout


def test_python_m_kvferry():
    done = subprocess.run([sys.executable, "-m", "kvferry", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "doctor" in done.stdout


def test_importing_kvferry_needs_no_command_line_packages():
    unwanted = ("typer", "rich", "matplotlib", "transformers")
    code = f"import sys, kvferry; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
