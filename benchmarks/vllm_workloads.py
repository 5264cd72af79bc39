"""What `benchmarks.vllm_throughput` asks of engines: requests by workload and seed, the same for whoever asks for as
many of them. Needs no vLLM."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Tokens = list[int]
TokenSource = Callable[[np.random.Generator, int], Tokens]
"""Draws so many tokens of a prompt."""


@dataclass(frozen=True)
class Sizes:
    """In tokens. Conversations begin with `first`, grow by `a_turn` (the last answer and a new question), end after
    `turns` and make room for new ones. `prefixes` of `prefix` tokens are shared by requests that add `suffix` each.
    Every answer has `output`. `gpu` are what the GPU's cache holds, `host_share` the share of the working set that host
    memory holds raw."""

    conversations: int
    first: int
    a_turn: int
    turns: int
    prefixes: int
    prefix: int
    suffix: int
    output: int
    gpu: int
    host_share: float

    @property
    def longest(self) -> int:
        return max(self.first + (self.turns - 1) * self.a_turn, self.prefix + self.suffix)

    @property
    def working_set(self) -> int:
        """Tokens asked for again and again, of the larger workload: conversations are half grown on average."""
        return max(self.conversations * (self.first + (self.turns - 1) * self.a_turn // 2), self.prefixes * self.prefix)


SIZES = {
    # About 253k tokens: 31 GiB of an 8B model's KV. A quarter of it fits the GPU, three eighths the host raw, and all
    # of it the host at a ratio of 3. Prompts grow by whole chunks of 64.
    "8b": Sizes(conversations=104, first=896, a_turn=512, turns=7, prefixes=72, prefix=3520, suffix=128, output=16,
                gpu=65536, host_share=0.375),
    "tiny": Sizes(conversations=16, first=128, a_turn=64, turns=3, prefixes=16, prefix=192, suffix=16, output=4,
                  gpu=1536, host_share=0.375),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A prompt. Requests of one `conversation` are sent one after another, those without one at any time."""

    prompt: Tokens
    conversation: int | None = None


class Workload(ABC):
    """Requests without end. `seed` and how many were taken decide what comes next, not when."""

    def __init__(self, sizes: Sizes, source: TokenSource, seed: int) -> None:
        self._sizes, self._source, self._seed = sizes, source, seed
        self._draw = np.random.default_rng((seed, 0))

    @abstractmethod
    def fill(self) -> list[Request]:
        """Everything of the working set once, before anything is measured."""

    @abstractmethod
    def take(self, count: int) -> list[Request]:
        """The next `count` requests."""

    def _tokens(self, count: int, *names: int) -> Tokens:
        return self._source(np.random.default_rng((self._seed, 1, *names)), count)


class MultiTurn(Workload):
    """Conversations whose turns send all that was said before, and more. Whose turn it is, is drawn at random. Answers
    in a history are drawn as well, rather than the engine's: engines whose answers differ get the same requests."""

    def __init__(self, sizes: Sizes, source: TokenSource, seed: int) -> None:
        super().__init__(sizes, source, seed)
        count = sizes.conversations
        self._turn = self._draw.integers(0, sizes.turns, count)
        self._successors = np.zeros(count, dtype=np.int64)

    def fill(self) -> list[Request]:
        return [self._request(conversation) for conversation in range(self._sizes.conversations)]

    def take(self, count: int) -> list[Request]:
        taken = []
        for conversation in self._draw.integers(0, self._sizes.conversations, count).tolist():
            self._turn[conversation] += 1
            if self._turn[conversation] == self._sizes.turns:
                self._turn[conversation] = 0
                self._successors[conversation] += 1
            taken.append(self._request(conversation))
        return taken

    def _request(self, conversation: int) -> Request:
        sizes = self._sizes
        longest = sizes.first + (sizes.turns - 1) * sizes.a_turn
        said = self._tokens(longest, conversation, int(self._successors[conversation]))
        return Request(said[: sizes.first + int(self._turn[conversation]) * sizes.a_turn], conversation)


class SharedPrefix(Workload):
    """Requests that each begin with one of a pool of long prefixes, drawn at random, and go on each in its own way."""

    def __init__(self, sizes: Sizes, source: TokenSource, seed: int) -> None:
        super().__init__(sizes, source, seed)
        self._prefixes = [self._tokens(sizes.prefix, 0, number) for number in range(sizes.prefixes)]
        self._taken = 0

    def fill(self) -> list[Request]:
        return [self._request(prefix) for prefix in range(self._sizes.prefixes)]

    def take(self, count: int) -> list[Request]:
        return [self._request(prefix) for prefix in self._draw.integers(0, self._sizes.prefixes, count).tolist()]

    def _request(self, prefix: int) -> Request:
        self._taken += 1
        return Request(self._prefixes[prefix] + self._tokens(self._sizes.suffix, 1, self._taken))


WORKLOADS: dict[str, type[Workload]] = {"multi-turn": MultiTurn, "shared-prefix": SharedPrefix}


def random_tokens(vocabulary: int) -> TokenSource:
    """Tokens that mean nothing, of a vocabulary of so many; without the first three and the last."""
    return lambda draw, count: draw.integers(3, vocabulary - 1, count).tolist()


def tokens_of_text(file: Path) -> TokenSource:
    """Pieces of a text: little-endian u16 token ids. Raises `ValueError` if it is too short."""
    text = np.fromfile(file, dtype="<u2")

    def take(draw: np.random.Generator, count: int) -> Tokens:
        if len(text) <= count:
            raise ValueError(f"{file} has {len(text)} tokens, prompts of {count} are wanted: give a longer text")
        at = int(draw.integers(0, len(text) - count))
        return text[at : at + count].tolist()

    return take
