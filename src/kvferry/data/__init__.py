"""Data that ships with kvferry: the demo's small language model, its tokenizer and a text it was not trained on."""

from importlib.resources import files
from pathlib import Path

DOCUMENT_SEPARATOR = "\n\0\n"  # in heldout.txt: a line with one NUL character


def demo_model_dir() -> Path:
    """Folder of the built-in model, as transformers loads it. Raises `FileNotFoundError` if it was not installed."""
    folder = Path(str(files("kvferry.data").joinpath("demo")))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the built-in model is not in {folder}: reinstall kvferry, or give a model's folder with --model"
        )
    return folder


def demo_documents() -> list[str]:
    """The held-out documents. Raises `FileNotFoundError` if they were not installed."""
    path = Path(str(files("kvferry.data").joinpath("demo", "heldout.txt")))
    if not path.is_file():
        raise FileNotFoundError(f"the built-in text {path} is missing: reinstall kvferry, or give a text with --text")
    return split_documents(path.read_text(encoding="utf-8"))


def split_documents(text: str) -> list[str]:
    """The documents of a text in which a line with one NUL character separates them."""
    return [document for document in text.split(DOCUMENT_SEPARATOR) if document.strip()]
