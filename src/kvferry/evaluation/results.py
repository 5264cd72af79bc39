"""The figures of one scheme under the prefix protocol."""

import math
from dataclasses import dataclass

from kvferry.evaluation.schemes import Guarantee


@dataclass(frozen=True)
class SchemeResult:
    """Over all sequences. `ratio` counts whole frames; GB/s count raw bytes, through the store, with one CPU thread."""

    name: str
    family: str
    setting: str
    guarantee: Guarantee
    num_values: int
    raw_bytes: int
    encoded_bytes: int
    bits_k: float  # bits per value of K alone
    bits_v: float
    max_abs_error: float  # of any K or V value
    error_over_bound: float | None  # the largest, each tensor against its own bound; None where none is promised
    kv_identical: bool  # every restored bit
    logits_identical: bool  # every scored logit
    kl_nats: float  # KL(untouched || restored), mean over the scored tokens
    kl_p99: float  # 99 of 100 scored tokens stay below
    nll_untouched: float  # nats per token
    nll_restored: float
    top1_agreement: float  # share of scored tokens with the same most likely next token
    top5_agreement: float  # share of the untouched cache's five most likely tokens among the restored cache's five
    encode_gbps: float  # medians
    decode_gbps: float
    drift_tokens: tuple[int, ...] = ()  # greedy tokens until the first difference, each sequence (the limit if none)

    @property
    def ratio(self) -> float:
        """Raw bytes over encoded bytes."""
        return self.raw_bytes / self.encoded_bytes

    @property
    def bits_per_value(self) -> float:
        """Encoded bits over values."""
        return 8 * self.encoded_bytes / self.num_values

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is one percent more perplexed than with the untouched cache."""
        return math.expm1(self.nll_restored - self.nll_untouched)

    @property
    def drift_mean(self) -> float | None:
        """Mean of the greedy tokens until the first difference; None if none were generated."""
        return sum(self.drift_tokens) / len(self.drift_tokens) if self.drift_tokens else None

    @property
    def guarantee_kept(self) -> bool:
        """Whether the scheme did what it promises; schemes that promise nothing always do."""
        if self.guarantee is Guarantee.EXACT:
            return self.kv_identical and self.logits_identical
        if self.guarantee is Guarantee.BOUND:
            return self.error_over_bound is not None and self.error_over_bound <= 1
        return True
