"""Real KV to measure on: a file, or what the built-in model makes of text that it was not trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILT_IN_SEQUENCES = 2
BUILT_IN_TOKENS = 2048


@dataclass(frozen=True)
class KVSource:
    """`tensors`: `layer.LL.k` and `layer.LL.v`, `[sequences, heads, tokens, head_dim]` of one dtype, on the CPU.
    `name` says where they come from, without a path."""

    name: str
    tensors: Mapping[str, Tensor]

    def describe(self) -> dict[str, Any]:
        """What a result must say of it."""
        first = next(iter(self.tensors.values()))
        return {
            "name": self.name,
            "dtype": str(first.dtype).removeprefix("torch."),
            "layers": len(self.tensors) // 2,
            "shape_of_a_layers_k": list(first.shape),
        }


def load_kv(path: Path | None) -> KVSource:
    """The tensors of a file of `benchmarks/dump_kv.py`, or without one the built-in model's.

    Raises `OSError` for a file that cannot be read, `ValueError` for one with other tensors or values that are not
    finite (bounds in standard deviations have no meaning there).
    """
    if path is None:
        return built_in_kv()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    first = tensors.get("layer.00.k")
    expected = [f"layer.{layer:02}.{side}" for layer in range(len(tensors) // 2) for side in "kv"]
    if first is None or sorted(tensors) != expected:
        raise ValueError(f"{path} does not hold tensors layer.00.k, layer.00.v and on: make it with dump_kv.py")
    for name, tensor in tensors.items():
        if tensor.dim() != 4 or tensor.dtype != first.dtype or tensor.shape != first.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, layer.00.k {tuple(first.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    return KVSource(path.stem, tensors)


@torch.inference_mode()
def built_in_kv(sequences: int = BUILT_IN_SEQUENCES, tokens: int = BUILT_IN_TOKENS) -> KVSource:
    """The KV cache that the demo's model makes of its held-out text, computed on the CPU.

    Raises `FileNotFoundError` if the model was not installed, `ValueError` if the text is too short,
    `ModuleNotFoundError` without transformers.
    """
    from kvferry import data
    from kvferry.evaluation import prefill, spread_windows
    from kvferry.evaluation.prefix import cache_tensors
    from kvferry.integrations.transformers.models import encode_text, load_causal_lm, load_tokenizer

    folder = data.demo_model_dir()
    model, tokenizer = load_causal_lm(folder, torch.device("cpu")), load_tokenizer(folder)
    windows = spread_windows([encode_text(tokenizer, text) for text in data.demo_documents()], tokens, sequences)
    found = cache_tensors(prefill(model, windows))
    tensors = {f"layer.{n // 2:02}.{'kv'[n % 2]}": tensor.contiguous() for n, tensor in enumerate(found)}
    return KVSource(f"built-in demo model, {sequences} x {tokens} held-out tokens", tensors)
