"""What the tests ask of the tiny Llama. Needs no vLLM."""

from collections.abc import Sequence

BLOCK = 32
"""Tokens of one of vLLM's blocks."""
VOCABULARY = 1024
BLOCK_BYTES = 2 * 2 * 2 * 32 * 2 * BLOCK
"""Of one block, raw: layers, K and V, heads, channels, bytes, tokens."""

Answers = Sequence[tuple[list[int], int]]


def prompt(seed: int, length: int) -> list[int]:
    """`length` tokens that go another way for every seed."""
    return [(seed * 7919 + 31 * place + place * place * seed) % (VOCABULARY - 8) + 3 for place in range(length)]


def tokens_of(found: Answers) -> list[list[int]]:
    return [answer for answer, _ in found]


def cached_of(found: Answers) -> list[int]:
    """Tokens of each prompt that came out of a cache."""
    return [count for _, count in found]


PROMPTS = [prompt(1, 300), prompt(2, 200), prompt(3, 161), prompt(1, 250) + prompt(4, 60)]
"""The first and the last begin alike."""
