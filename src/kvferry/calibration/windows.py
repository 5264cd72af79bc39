"""Which tokens are used for what: no token of the moments is used for the steps, none of either for the last check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Int64 `[count, length]` each: what means and bases are made from, what steps are searched on, and what neither
    has seen. They come from consecutive parts of the text, so that a document is seldom in two of them."""

    moments: Tensor
    held_out: Tensor
    unseen: Tensor


def split_text(documents: Sequence[Tensor], length: int, windows: int, held_out: int) -> Windows:
    """Cut the documents (int64 `[tokens]` each) into windows of `length` that do not overlap, and take `windows` for
    the moments and `held_out` each for search and last check, evenly from their parts of the text.

    Raises `ValueError` when the text has fewer.
    """
    starts = [(document, i * length) for document in documents for i in range(len(document) // length)]
    counts = (windows, held_out, held_out)
    needed = sum(counts)
    if len(starts) < needed:
        longest = max((len(document) for document in documents), default=0)
        raise ValueError(
            f"the text holds {len(starts)} windows of {length} tokens (its longest document has {longest}), and "
            f"{needed} are needed: give a longer text, or fewer or shorter windows"
        )
    parts, end = [], 0
    for taken in range(3):
        begin, end = end, len(starts) * sum(counts[: taken + 1]) // needed
        part, count = starts[begin:end], counts[taken]
        chosen = [part[i * len(part) // count] for i in range(count)]
        parts.append(torch.stack([document[start : start + length] for document, start in chosen]).long())
    return Windows(*parts)


def digest(*tokens: Tensor) -> str:
    """16 hexadecimal digits of token ids."""
    state = xxhash.xxh3_64()
    for part in tokens:
        state.update(part.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
