"""The model to evaluate and the text to evaluate it on, from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

if TYPE_CHECKING:
    from kvferry.evaluation.prefix import PrefixProtocol


@dataclass(frozen=True)
class ModelSource:
    """The model, its tokenizer (None where it has none and the text came as tokens) and the documents' tokens, int64
    `[tokens]` each; `text` names where they are from."""

    name: str
    device: torch.device
    model: Any
    tokenizer: Any
    documents: list[Tensor]
    text: str

    def describe(self) -> dict[str, Any]:
        """The model's shape, as it goes into the JSON."""
        config = self.config
        heads = config.num_attention_heads
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "layers": config.num_hidden_layers,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }

    def describe_text(self) -> dict[str, Any]:
        """The text's name, size, and a digest of its tokens."""
        state = xxhash.xxh3_128()
        for document in self.documents:
            state.update(document.numpy().tobytes())
        tokens = sum(map(len, self.documents))
        return {"name": self.text, "documents": len(self.documents), "tokens": tokens, "digest": state.hexdigest()}

    @property
    def config(self) -> Any:
        """transformers' configuration of the language model itself."""
        return self.model.config.get_text_config()

    def check_context(self, protocol: PrefixProtocol) -> None:
        """Raise `ValueError` if the protocol needs more context than the model has."""
        context = getattr(self.config, "max_position_embeddings", None)
        after = max(protocol.score, protocol.generate)
        if context and protocol.prefix + after > context:
            what = "score" if after == protocol.score else "generate"
            raise ValueError(
                f"prefix {protocol.prefix} and {what} {after} exceed the model's context of {context} tokens: "
                f"give smaller --prefix or --{what}"
            )


def load_source(
    folder: Path | None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    text: Path | None = None,
    tokens: Path | None = None,
    need_tokenizer: bool = True,
) -> ModelSource:
    """The model in `folder` (None: the one that ships with kvferry) in `dtype` (None: as stored), and a UTF-8 `text`,
    or `tokens` (little-endian uint16 ids); without both, the held-out documents that ship with kvferry.

    Raises `ValueError` or `FileNotFoundError` for whatever is not there or does not belong together.
    """
    import numpy as np

    from kvferry import data
    from kvferry.integrations.transformers.models import encode_text, load_causal_lm, load_tokenizer

    if text and tokens:
        raise ValueError("--text and --tokens exclude each other: give one")
    target = parse_device(device)
    path = folder or data.demo_model_dir()
    model = load_causal_lm(path, target, dtype)
    tokenizer: Any = None
    try:
        tokenizer = load_tokenizer(path)
    except ValueError:
        if need_tokenizer or not tokens:
            raise
    if tokens:
        # One stream: its documents may be shorter than a window.
        documents = [torch.from_numpy(np.fromfile(tokens, dtype="<u2").astype(np.int64))]
    else:
        texts = data.split_documents(text.read_text(encoding="utf-8")) if text else data.demo_documents()
        documents = [encode_text(tokenizer, part) for part in texts]
    vocabulary = model.config.get_text_config().vocab_size
    if any(len(document) and int(document.max()) >= vocabulary for document in documents):
        raise ValueError(f"the tokens are not this model's: it has {vocabulary}, the text has larger ids")
    given = tokens or text
    name = folder.resolve().name if folder else "built-in"
    return ModelSource(name, target, model, tokenizer, documents, given.name if given else "built-in")


def parse_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`. Raises `ValueError` for others, and where there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: use --device cpu")
    return device
