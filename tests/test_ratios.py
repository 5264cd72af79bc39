"""Ratios on the KV cache of real language models: whole frames, everything counted. The bars are promises."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kvferry
from kvferry import Bounded, Codec, Lossless
from kvferry.data import demo_documents, demo_model_dir

SHARED = Path(__file__).parents[2] / "shared"
BARS = {("lossless", "ans"): 1.47, ("lossless", "bitpack"): 1.38, ("bounded", "ans"): 4.4, ("bounded", "bitpack"): 3.7}
TOKENS = 2048
SIGMAS = 0.2


def cache_of(folder: Path, ids: Tensor) -> list[Tensor]:
    """K and V of each layer, `[heads, tokens, head_dim]` in bfloat16, of a prefill of `ids`."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        past = model(ids[None], use_cache=True, logits_to_keep=1).past_key_values
    return [side[0].clone() for layer in past.layers for side in (layer.keys, layer.values)]


@cache
def shared_model() -> list[Tensor]:
    """Two sequences of held-out text from the model that lies beside the repository, where it does."""
    folder, data = SHARED / "models/lm-27m", SHARED / "data/heldout-dev.u16"
    if not (folder / "model.safetensors").is_file() or not data.is_file():
        pytest.skip("no ../shared/models/lm-27m beside this repository")
    tokens = torch.from_numpy(np.fromfile(data, dtype="<u2").astype(np.int64))
    starts = (0, len(tokens) // 2)
    return [side for start in starts for side in cache_of(folder, tokens[start : start + TOKENS])]


@cache
def built_in_model() -> list[Tensor]:
    """Two sequences of the shipped text, as long as they and the model's context allow."""
    try:
        folder, documents = demo_model_dir(), demo_documents()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer("\n".join(documents))["input_ids"])
    length = min(TOKENS, config.max_position_embeddings, len(ids) // 2)
    return [side for start in (0, len(ids) // 2) for side in cache_of(folder, ids[start : start + length])]


def frames(sides: list[Tensor], name: str, packing: str) -> Iterator[tuple[Tensor, bytes]]:
    for side in sides:
        codec: Codec = Lossless(packing)
        if name == "bounded":
            codec = Bounded(SIGMAS * float(side.float().std()), relative=False, packing=packing)
        yield side, kvferry.compress(side, codec)


@pytest.mark.parametrize(("name", "packing"), BARS)
@pytest.mark.parametrize(("model", "share"), [(shared_model, 1.0), (built_in_model, 0.98)], ids=["lm-27m", "built-in"])
def test_ratio(model, share: float, name: str, packing: str) -> None:
    raw = encoded = 0
    for side, frame in frames(model(), name, packing):
        raw, encoded = raw + side.nbytes, encoded + len(frame)
    ratio = raw / encoded
    print(f"{name} {packing}: {ratio:.3f}", file=sys.stderr)
    assert ratio >= share * BARS[name, packing]
