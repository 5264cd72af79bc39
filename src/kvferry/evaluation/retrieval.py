"""Long-range retrieval: what was planted in a prefix and is asked for after it, with the restored cache.

Two tasks in one prefix. A needle: one sentence in a text that has nothing to do with it, at several depths (G.
Kamradt, "Needle in a haystack", 2023). Key-value recall: a list of pairs, of which some are asked for (N. F. Liu et
al., "Lost in the middle", arXiv:2307.03172, section 3). The answers are scored, not generated.

Small models hardly answer either. So the yardstick is the untouched cache: what the planted text gains it over the same
prefix without it, and how much of that is left after the cache was restored. Recall in itself stands beside it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvferry.evaluation.prefix import prefill, restore_through, roomy_store, score
from kvferry.evaluation.schemes import Scheme
from kvferry.evaluation.tally import LogitTally

if TYPE_CHECKING:
    from transformers import DynamicCache

NEEDLE, PAIRS = "needle", "key-value"
TASKS = (NEEDLE, PAIRS)
DEPTHS = (0.05, 0.35, 0.7)  # of the needles, as shares of the prefix
PAIRS_DEPTH = 0.5
NUM_PAIRS = 8
ASKED_PAIRS = 4
LEAST_GAIN = 0.5  # nats per answer token; with less, the untouched model does not retrieve
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeo"]


@dataclass(frozen=True)
class Question:
    """Tokens to ask with and tokens of the right answer, int64 `[n]` each."""

    task: str
    cue: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Trial:
    """A prefix int64 `[prefix]` with the planted text, the same without it, and the questions."""

    planted: Tensor
    plain: Tensor
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class RetrievalResult:
    """One scheme on one task, over all trials. Nats are per token of the answers."""

    name: str
    task: str
    answers: int
    tokens: int
    recall_untouched: float  # share of answers whose every token is the most likely one
    recall_restored: float
    rank_untouched: float  # mean over answer tokens of 1 / (rank of the right one)
    rank_restored: float
    agreement: float  # share of answer tokens where both caches find the same token most likely
    kl_nats: float  # KL(untouched || restored) at the answers' tokens
    nll_absent: float  # of the answers where nothing was planted
    nll_untouched: float
    nll_restored: float

    @property
    def gain(self) -> float:
        """Nats that the planted text is worth to the untouched cache: retrieval, if it is clearly above 0."""
        return self.nll_absent - self.nll_untouched

    @property
    def gain_kept(self) -> float | None:
        """Share of the gain that is left with the restored cache; None where there is too little to keep."""
        return (self.nll_absent - self.nll_restored) / self.gain if self.gain >= LEAST_GAIN else None


@dataclass
class _Tally:
    logits: LogitTally = field(default_factory=LogitTally)
    answers: int = 0
    recalled: list[int] = field(default_factory=lambda: [0, 0])  # untouched, restored
    ranks: list[float] = field(default_factory=lambda: [0.0, 0.0])
    nll_absent: float = 0.0


def make_trials(tokenizer: Any, windows: Tensor, prefix: int, seed: int = 0) -> list[Trial]:
    """One trial for each row of `windows` int64 `[trials, at least prefix]`, whose first `prefix` tokens are the hay.

    Planted text replaces tokens, so that all others stay where they were. Raises `ValueError` where it does not fit.
    """
    draw = random.Random(seed)
    return [_trial(tokenizer, window[:prefix].cpu(), draw) for window in windows]


def evaluate_retrieval(
    model: Any,
    trials: Sequence[Trial],
    schemes: Sequence[Scheme],
    on_step: Callable[[int, Scheme], None] = lambda trial, scheme: None,
) -> list[RetrievalResult]:
    """Ask every question with the cache that each scheme restored: one result a scheme and task, in their order.

    `on_step` is called before each scheme of each trial.
    """
    device = next(model.parameters()).device
    tallies = {(scheme.name, task): _Tally() for scheme in schemes for task in TASKS}
    for number, trial in enumerate(trials):
        absent = _ask(model, prefill(model, trial.plain[None].to(device)), trial.questions)
        cache = prefill(model, trial.planted[None].to(device))
        untouched = _ask(model, cache, trial.questions)
        store = roomy_store(cache)
        for scheme in schemes:
            on_step(number, scheme)
            restored = _ask(model, restore_through(scheme, store, cache, device), trial.questions)
            for question, nothing, before, after in zip(trial.questions, absent, untouched, restored, strict=True):
                _add(tallies[scheme.name, question.task], question.answer.to(device), nothing, before, after)
    return [_result(name, task, tally) for (name, task), tally in tallies.items() if tally.answers]


def _ask(model: Any, cache: DynamicCache, questions: Sequence[Question]) -> list[Tensor]:
    """Logits `[answer tokens, vocabulary]` that predict the tokens of each answer; the cache is left as it is."""
    found = []
    for question in questions:
        tokens = torch.cat((question.cue, question.answer))[None, :-1]
        device = next(model.parameters()).device
        found.append(score(model, copy.deepcopy(cache), tokens.to(device))[-len(question.answer) :])
    return found


def _add(tally: _Tally, answer: Tensor, absent: Tensor, untouched: Tensor, restored: Tensor) -> None:
    tally.logits.add(untouched, restored, answer)
    tally.answers += 1
    tally.nll_absent -= float(absent.double().log_softmax(-1).gather(1, answer[:, None]).sum())
    for index, logits in enumerate((untouched, restored)):
        tally.recalled[index] += int(torch.equal(logits.argmax(-1), answer))
        better = (logits > logits.gather(1, answer[:, None])).sum(-1)
        tally.ranks[index] += float((1 / (1 + better.double())).sum())


def _result(name: str, task: str, tally: _Tally) -> RetrievalResult:
    logits = tally.logits
    return RetrievalResult(
        name=name,
        task=task,
        answers=tally.answers,
        tokens=logits.scored,
        recall_untouched=tally.recalled[0] / tally.answers,
        recall_restored=tally.recalled[1] / tally.answers,
        rank_untouched=tally.ranks[0] / logits.scored,
        rank_restored=tally.ranks[1] / logits.scored,
        agreement=logits.top1_agreement,
        kl_nats=logits.kl_mean,
        nll_absent=tally.nll_absent / logits.scored,
        nll_untouched=logits.nll_untouched / logits.scored,
        nll_restored=logits.nll_restored / logits.scored,
    )


# -- what is planted --------------------------------------------------------------------------------------------------


def _trial(tokenizer: Any, hay: Tensor, draw: random.Random) -> Trial:
    from kvferry.integrations.transformers.models import encode_text

    def encode(text: str) -> Tensor:
        return encode_text(tokenizer, text)

    parts: list[tuple[float, Tensor]] = []
    questions = []
    for depth in DEPTHS:
        # Encoded apart, so that the planted tokens are those that are asked for.
        cue, answer = encode(f"\nThe secret number of {_name(draw)} is"), encode(f" {_number(draw)}")
        parts.append((depth, torch.cat((cue, answer, encode(".\n")))))
        questions.append(Question(NEEDLE, cue, answer))
    pairs = [(encode(f"\n{_name(draw)} ="), encode(f" {_number(draw)}")) for _ in range(NUM_PAIRS)]
    parts.append((PAIRS_DEPTH, torch.cat([part for pair in pairs for part in pair])))
    questions += [Question(PAIRS, *pair) for pair in draw.sample(pairs, ASKED_PAIRS)]
    return Trial(_plant(hay, parts), hay, tuple(questions))


def _plant(hay: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """`hay` with each part over what was at its depth, or behind the part before it where that reaches further.

    Raises `ValueError` where they do not fit.
    """
    planted, end = hay.clone(), 0
    for depth, part in sorted(parts, key=lambda placed: placed[0]):
        start = max(int(depth * len(hay)), end)
        end = start + len(part)
        if end > len(hay):
            most = sum(len(part) for _, part in parts)
            raise ValueError(
                f"a prefix of {len(hay)} tokens has no room for {most} planted tokens at their depths: "
                "give a larger --prefix, or --trials 0 for no retrieval"
            )
        planted[start:end] = part
    return planted


def _name(draw: random.Random) -> str:
    return "".join(draw.choice(_SYLLABLES) for _ in range(3)).capitalize()


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10000, 100000))
