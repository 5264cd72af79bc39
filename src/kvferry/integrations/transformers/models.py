"""Loading a causal language model and its tokenizer from a folder, without the network."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load_causal_lm(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The model in `folder`, for inference, on `device`, in `dtype` (default: the one it is stored in).

    Raises `ValueError` if the folder does not hold a model that transformers can load.
    """
    _check_folder(folder)
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load a causal language model from {folder}: {_first_line(error)}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises `ValueError` if there is none."""
    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load a tokenizer from {folder}: {_first_line(error)}") from error


def encode_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of `text`, int64 `[tokens]`, however long it is and without special tokens."""
    # verbose=False: no warning that the text exceeds the context; windows are cut from it.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
