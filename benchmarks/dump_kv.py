"""Save the KV cache that a causal model makes of real tokens, as input of the other benchmarks.

    python -m benchmarks.dump_kv --model DIR --tokens FILE.u16 --out kv.safetensors

Tensors `layer.LL.k` and `layer.LL.v`, `[sequences, heads, tokens, head_dim]`, in the model's dtype.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face model directory.")],
    tokens: Annotated[Path, typer.Option(help="Little-endian uint16 token ids.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    sequences: int = 2,
    length: int = 2048,
    seed: int = 11,
) -> None:
    """Prefill `sequences` windows of `length` tokens and save their caches."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    ids = np.fromfile(tokens, dtype="<u2").astype(np.int64)
    starts = np.random.default_rng(seed).integers(0, len(ids) - length, sequences)
    cache = DynamicCache(config=network.config)
    with torch.inference_mode():
        network(
            torch.from_numpy(np.stack([ids[s : s + length] for s in starts])), past_key_values=cache, logits_to_keep=1
        )
    layers = enumerate(cache.layers)
    tensors = {f"layer.{i:02}.{side}": t for i, layer in layers for side, t in (("k", layer.keys), ("v", layer.values))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    typer.run(main)
