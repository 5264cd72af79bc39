"""The built-in model and its text, loaded once."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def source():
    """`model`, and `documents` as token ids."""
    pytest.importorskip("transformers")
    from kvferry import data
    from kvferry.integrations.transformers.models import encode_text, load_causal_lm, load_tokenizer

    folder = data.demo_model_dir()
    tokenizer = load_tokenizer(folder)
    documents = [encode_text(tokenizer, text) for text in data.demo_documents()]
    return SimpleNamespace(model=load_causal_lm(folder, torch.device("cpu")), documents=documents)
