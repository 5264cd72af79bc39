"""Which pages a chunk is: vLLM names the blocks of a transfer in one list, slots take them chunk by chunk."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

MISSING = -1
"""In place of a block that a chunk's transfer leaves out."""
_RANK_FACTOR = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class GroupChunks:
    """The chunks of one transfer that belong to KV cache group number `group`: in the transfer's order, those from
    `first` on. `blocks` int64 `[chunks, blocks_per_chunk]`, `MISSING` where the transfer leaves a block out."""

    group: int
    first: int
    blocks: np.ndarray

    @property
    def stop(self) -> int:
        return self.first + len(self.blocks)


def group_chunks(
    block_ids: np.ndarray,
    group_sizes: Sequence[int],
    block_indices: Sequence[int],
    blocks_per_chunk: int,
    num_chunks: int,
) -> list[GroupChunks]:
    """Cut a transfer's `block_ids` `[blocks]` into its `num_chunks` chunks.

    The first `group_sizes[0]` blocks are group 0's, and so on. Blocks of a group are neighbours in their sequence, the
    first one being number `block_indices[group]` there, so a transfer may start and end in the middle of a chunk.
    Raises `ValueError` if the blocks and the chunks do not go together.
    """
    if len(group_sizes) != len(block_indices):
        raise ValueError(f"{len(group_sizes)} group sizes, but {len(block_indices)} block indices")
    if sum(group_sizes) != len(block_ids):
        raise ValueError(f"{len(block_ids)} blocks, but the groups have {sum(group_sizes)}")
    parts: list[GroupChunks] = []
    at = first = 0
    for group, (size, index) in enumerate(zip(group_sizes, block_indices, strict=True)):
        if not size:
            continue
        skipped = index % blocks_per_chunk
        chunks = -(-(skipped + size) // blocks_per_chunk)
        blocks = np.full(chunks * blocks_per_chunk, MISSING, dtype=np.int64)
        blocks[skipped : skipped + size] = block_ids[at : at + size]
        parts.append(GroupChunks(group, first, blocks.reshape(chunks, blocks_per_chunk)))
        at, first = at + size, first + chunks
    if first != num_chunks:
        raise ValueError(f"the blocks make {first} chunks of {blocks_per_chunk}, but {num_chunks} slots are named")
    return parts


def pages_of(blocks: np.ndarray, pages_per_block: int) -> np.ndarray:
    """Pages int32 `[chunks, blocks_per_chunk * pages_per_block]` of `blocks`, where attention kernels cut each block
    into `pages_per_block` pages of their own."""
    if pages_per_block == 1:
        return blocks.astype(np.int32)
    pages = blocks[:, :, None] * pages_per_block + np.arange(pages_per_block)
    pages[blocks == MISSING] = MISSING
    return pages.reshape(len(blocks), -1).astype(np.int32)


def identity_of(key: bytes) -> tuple[int, int]:
    """The identity of the chunk that vLLM offloads under `key`: 128 bits of digest, as two u64."""
    digest = xxhash.xxh3_128_intdigest(key)
    return digest >> 64, digest & _WORD


def identities_of(keys: Sequence[bytes]) -> np.ndarray:
    """uint64 `[keys, 2]`."""
    return np.array([identity_of(key) for key in keys], dtype=np.uint64).reshape(len(keys), 2)


def for_rank(identities: np.ndarray, rank: int) -> np.ndarray:
    """The identities of what worker `rank` holds of these chunks: another worker's slot does not pass for its own."""
    own = identities.copy()
    own[:, 1] ^= np.uint64(rank * _RANK_FACTOR & _WORD)
    return own


def first_positions(ends: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """Where chunks of `chunk_tokens` begin in their sequences, int32 `[chunks]`, of where they end, `[chunks]` (0: not
    known, which counts as the first chunk)."""
    positions: np.ndarray = np.maximum(ends - 1, 0) // chunk_tokens * chunk_tokens
    return positions.astype(np.int32)


def for_positions(identities: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The identities of these chunks, coded as if they began at `positions`: a slot that was coded at another is not
    decoded at these."""
    own = identities.copy()
    own[:, 0] ^= positions.astype(np.uint64) * np.uint64(_RANK_FACTOR)
    return own
