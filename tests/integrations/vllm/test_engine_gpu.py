"""vLLM's engine on a GPU with a trained model: what host memory gives back is what the GPU held, and thousands of
requests leave nothing behind. The model is the demo's, or the one in the folder that KVFERRY_TEST_MODEL names."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.data import demo_documents, demo_model_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.xdist_group("vllm engine"),
]

PROMPTS, SOAKED = 64, 2000
BLOCK = 64


@pytest.fixture(scope="module")
def trained_model() -> Path:
    return Path(os.environ.get("KVFERRY_TEST_MODEL") or demo_model_dir())


@pytest.fixture(scope="module")
def text(trained_model: Path) -> list[int]:
    """Tokens of text that the demo's model was not trained on."""
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(trained_model).encode("\n".join(demo_documents())))


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> list[list[int]]:
    """512 to 3,500 tokens each, from all over the text."""
    draw = random.Random(1)
    made = []
    for _ in range(PROMPTS):
        length = draw.randint(512, 3500)
        at = draw.randrange(len(text))
        made.append((text[at:] + text)[:length])
    return made


@pytest.fixture
def trained(start: Any, trained_model: Path) -> Any:
    """Starts engines of the trained model."""

    def trained(extra: dict[str, Any] | None, blocks: int = 1024) -> Any:
        return start(extra, folder=trained_model, blocks=blocks, block_size=BLOCK, max_model_len=4096, max_num_seqs=32)

    return trained


def asked_twice(engine: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """Answers with the prompt out of the GPU's own prefix cache, and out of host memory: the same computation, on KV
    that should be the same."""
    engine.ask([prompt], tokens)
    ((near, from_gpu),) = engine.ask([prompt], tokens)
    engine.forget_gpu()
    ((far, from_host),) = engine.ask([prompt], tokens)
    assert from_gpu == from_host > 0
    return near, far


def test_lossless_answers_are_the_same(trained: Any, prompts: list[list[int]]) -> None:
    engine = trained({"compression_codec": "lossless", "blocks_per_chunk": 1, "cpu_bytes_to_use": 1 << 30})
    for prompt in prompts:
        near, far = asked_twice(engine, prompt, 32)
        assert near == far
    found = engine.counted
    assert not found.corrupt_slots and not found.failed_loads and not found.failed_stores
    assert found.stored_raw_bytes > 1.3 * found.stored_bytes


def test_bounded_answers_diverge_as_measured(trained: Any, prompts: list[list[int]]) -> None:
    """Writes what it measured to bounded-divergence.json in $OUT, where that is set."""
    engine = trained({"compression_codec": "bounded", "blocks_per_chunk": 1, "cpu_bytes_to_use": 1 << 30})
    same = agreed = 0
    for prompt in prompts:
        near, far = asked_twice(engine, prompt, 32)
        same += near == far
        agreed += next((place for place, (a, b) in enumerate(zip(near, far, strict=True)) if a != b), len(near))
    ratio = engine.counted.stored_raw_bytes / engine.counted.stored_bytes
    measured = {
        "prompts": len(prompts), "identical": same, "mean_tokens_before_divergence_of_32": agreed / len(prompts),
        "ratio": ratio, "relaxed_chunks": engine.counted.relaxed_chunks,
    }  # fmt: skip
    print(json.dumps(measured))
    if folder := os.environ.get("OUT"):
        (Path(folder) / "bounded-divergence.json").write_text(json.dumps(measured, indent=1))
    assert ratio > 2.5
    assert same > 0


def test_thousands_of_requests(trained: Any, text: list[int]) -> None:
    """Mixed lengths, shared beginnings, aborts, in a small GPU cache and a small host cache."""
    draw = random.Random(2)
    shared = [text[at : at + 1024] for at in range(0, 8 * 1024, 1024)]
    engine = trained({"compression_codec": "lossless", "cpu_bytes_to_use": 64 << 20}, blocks=160)
    done = 0
    while done < SOAKED:
        batch = []
        for _ in range(20):
            at, length = draw.randrange(len(text) - 1200), draw.randint(16, 1200)
            batch.append((draw.choice(shared) if draw.random() < 0.6 else []) + text[at : at + length])
        if draw.random() < 0.2:
            engine.begin(batch, steps=draw.randrange(1, 12))
            engine.abort_all()
        else:
            assert all(len(tokens) == 16 for tokens, _ in engine.ask(batch, tokens=16))
        if draw.random() < 0.1:
            engine.forget_gpu()
        done += len(batch)
    engine.settle()
    assert engine.counted.loaded_raw_bytes > 0
    assert not engine.counted.corrupt_slots and not engine.counted.failed_loads and not engine.counted.failed_stores
    assert not engine.worker._under_way and not engine.connector.connector_scheduler._jobs
    assert engine.manager._num_evictable_cache_chunks == engine.used_slots
