"""Encoded tiles from their scratch rows into one payload, one after another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_WORDS = 1024


@triton.jit(do_not_specialize=["row_words", "payload_words"])
def _copy_rows(scratch, sizes, starts, payload, row_words, payload_words, BLOCK: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    words = tl.load(sizes + tile) >> 2
    start = tl.load(starts + tile) >> 2
    # An upper bound that turns out too low must not make the kernel write behind the payload.
    words = tl.minimum(words.to(tl.int64), payload_words - start).to(tl.int32)
    source = scratch + tile * row_words
    lane = tl.arange(0, BLOCK)
    first = 0
    while first < words:
        place = first + lane
        inside = place < words
        tl.store(payload + start + place, tl.load(source + place, mask=inside), mask=inside)
        first += BLOCK


def compact(scratch: Tensor, sizes: Tensor, *, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of `scratch` (uint8 `[N, row_bytes]`, row_bytes a multiple of 4) of which row i holds `sizes[i]` bytes
    (int32 `[N]`, multiples of 4), put together.

    Returns (payload uint8, starts int64 `[N]`). Without `total` the payload's length is read from the device, which
    waits for it; `total` is an upper bound in bytes that avoids the wait: the payload is that long, undefined behind
    the last tile.
    """
    starts = torch.cumsum(sizes, 0, dtype=torch.int64) - sizes
    if total is None:
        total = int(sizes.sum(dtype=torch.int64))
    num_tiles, row_bytes = scratch.shape
    payload = torch.empty(total, dtype=torch.uint8, device=scratch.device)
    if num_tiles and total >= 4:
        with torch.cuda.device_of(scratch):
            _copy_rows[(num_tiles,)](
                scratch.view(torch.int32),
                sizes,
                starts,
                payload[: total // 4 * 4].view(torch.int32),
                row_bytes // 4,
                total // 4,
                BLOCK=_BLOCK_WORDS,
                num_warps=4,
            )
    return payload, starts
