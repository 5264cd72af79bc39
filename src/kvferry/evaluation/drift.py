"""How long greedy generation from a restored cache goes on as it does from the untouched one.

Each token is fed back, so the first difference is the end of the comparison: after it the texts are different texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import DynamicCache


@torch.inference_mode()
def continue_greedily(model: Any, cache: DynamicCache, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Feed token `first` `[1, 1]` and then the most likely ones; the cache grows.

    Returns the tokens int64 `[steps]` and the logits they were picked from `[steps, vocabulary]`; both are empty for
    no steps.
    """
    tokens, logits = [], []
    token = first
    for _ in range(steps):
        row = model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        token = row.argmax().reshape(1, 1)
        tokens.append(token[0, 0])
        logits.append(row)
    if not tokens:
        return first.new_empty(0), torch.empty(0, 0, device=first.device)
    return torch.stack(tokens), torch.stack(logits)


@torch.inference_mode()
def tokens_until_difference(model: Any, cache: DynamicCache, first: Tensor, reference: Tensor) -> int:
    """Tokens that greedy generation after `first` `[1, 1]` has in common with `reference` `[steps]`, from the start.

    The cache grows, up to the first difference.
    """
    token = first
    for step, expected in enumerate(reference):
        row = model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        token = row.argmax().reshape(1, 1)
        if int(token) != int(expected):
            return step
    return len(reference)
