"""A trained model and a text for vLLM's engine, how likely its answers are, and where facts go that are worth keeping.

KVFERRY_TEST_MODEL is the folder of a model to take instead of the demo's, KVFERRY_TEST_TOKENS a file of little-endian
u16 token ids of its to take prompts from instead of the demo's text, KVFERRY_RESULTS a folder for facts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvferry.bench.machine import describe
from kvferry.data import demo_documents, demo_model_dir


def model_folder() -> Path:
    return Path(os.environ.get("KVFERRY_TEST_MODEL") or demo_model_dir())


def token_bytes() -> int:
    """Of a token's KV in bfloat16."""
    config = json.loads((model_folder() / "config.json").read_text())
    return int(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def text_tokens() -> list[int]:
    """A text that the model was not trained on."""
    if file := os.environ.get("KVFERRY_TEST_TOKENS"):
        return [int(token) for token in np.fromfile(file, dtype="<u2")]
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(model_folder()).encode("\n".join(demo_documents())))


def shortfalls(asked: Sequence[tuple[list[int], list[int]]]) -> Iterator[float]:
    """Of every token of every answer to a prompt: how much its logit is below the best one's, given all before it,
    by transformers in float32 with nothing cached. Zero if it is the best."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).to(device).eval()
    for prompt, answer in asked:
        with torch.inference_mode():
            known = torch.tensor([prompt + answer[:-1]], device=device)
            logits = model(known, logits_to_keep=len(answer)).logits[0]
            chosen = logits.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
            yield from (logits.amax(1) - chosen).tolist()


def record(name: str, facts: dict[str, Any]) -> None:
    """Print facts, and write them to vllm-<name>.json in KVFERRY_RESULTS."""
    print(f"{name}: {json.dumps(facts)}")
    if folder := os.environ.get("KVFERRY_RESULTS"):
        model = "demo" if model_folder() == Path(demo_model_dir()) else model_folder().name
        found = {"machine": describe(), "model": model, **facts}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"vllm-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
