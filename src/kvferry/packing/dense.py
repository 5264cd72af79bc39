"""Dense bit streams (docs/format.md): values of one group, w bits each, one after another in little-endian u32
words."""

import torch
from torch import Tensor


def group_lengths(tokens: int, group_tokens: int, device: torch.device) -> Tensor:
    """Tokens of each group along the token axis, int64 `[G]`."""
    starts = torch.arange(0, tokens, group_tokens, device=device)
    return torch.clamp(tokens - starts, max=group_tokens)


def stream_words(widths: Tensor, lengths: Tensor) -> Tensor:
    """u32 words of each group's stream; `widths` int64 `[N, G, C]`, `lengths` `[G]`."""
    return (widths * lengths[None, :, None] + 31) >> 5


def _bit_positions(widths: Tensor, tokens: int, group_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Word index within the tile `[N, T, C]`, shift within the word, and total words `[N]`."""
    n, groups, channels = widths.shape
    words = stream_words(widths, group_lengths(tokens, group_tokens, widths.device)).reshape(n, -1)
    ends = words.cumsum(1)
    starts = (ends - words).reshape(n, groups, channels)
    t = torch.arange(tokens, device=widths.device)
    group = t // group_tokens
    bit = (t % group_tokens)[None, :, None] * widths[:, group]
    total = ends[:, -1] if ends.shape[1] else torch.zeros(n, dtype=torch.int64, device=widths.device)
    return starts[:, group] + (bit >> 5), bit & 31, total


def pack(values: Tensor, widths: Tensor, group_tokens: int) -> tuple[Tensor, Tensor]:
    """Streams of `values` int64 `[N, T, C]` (each below 2**width): bytes uint8 `[N, L]` (rows padded) and lengths
    `[N]`."""
    n, tokens, _ = values.shape
    word, shift, total = _bit_positions(widths, tokens, group_tokens)
    longest = int(total.max()) if n else 0
    # One word more than needed: the part that spills over is 0 at the end of a stream, and must land somewhere.
    out = torch.zeros(n, longest + 1, dtype=torch.int64, device=values.device)
    spread = values << shift
    flat = word.reshape(n, -1)
    # A value of width 0 may sit behind the last stream: it is 0, so where it lands does not matter.
    out.scatter_add_(1, flat.clamp(max=longest), (spread & 0xFFFFFFFF).reshape(n, -1))
    out.scatter_add_(1, (flat + 1).clamp(max=longest), (spread >> 32).reshape(n, -1))
    words = out[:, :longest].to(torch.int32).contiguous()
    return words.view(torch.uint8).reshape(n, longest * 4), total * 4


def unpack(data: Tensor, widths: Tensor, tokens: int, group_tokens: int) -> Tensor:
    """Values int64 `[N, T, C]` from `data` uint8 `[N, L]`, rows starting at their streams."""
    n = data.shape[0]
    word, shift, total = _bit_positions(widths, tokens, group_tokens)
    longest = int(total.max()) if n else 0
    padded = torch.zeros(n, 4 * longest + 8, dtype=torch.uint8, device=data.device)
    length = min(data.shape[1], 4 * longest)
    padded[:, :length] = data[:, :length]
    words = padded.view(torch.int32).long() & 0xFFFFFFFF
    flat = word.reshape(n, -1)
    low = words.gather(1, flat).reshape(word.shape) >> shift
    high = words.gather(1, flat + 1).reshape(word.shape) << (32 - shift)
    per_token = widths[:, torch.arange(tokens, device=data.device) // group_tokens]
    return (low | high) & ((1 << per_token) - 1)
