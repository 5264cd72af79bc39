"""Sums of what two caches make of the same tokens: the untouched one and the restored one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvferry.blocks import as_bits

SCORE_ROWS = 128  # tokens whose log-probabilities over the vocabulary are in float64 at once
TOP = 5


@dataclass
class LogitTally:
    """Over all tokens added: KL of each in nats, negative log-likelihoods of the true next tokens, agreement."""

    kl: list[Tensor] = field(default_factory=list)  # float64 [rows], on the CPU
    nll_untouched: float = 0.0
    nll_restored: float = 0.0
    top1: int = 0
    top5: int = 0  # of TOP (or the vocabulary, if smaller) for each token
    identical: bool = True
    scored: int = 0
    width: int = TOP

    def add(self, untouched: Tensor, restored: Tensor, targets: Tensor) -> None:
        """Add logits `[tokens, vocabulary]` of both, for the true next tokens `targets` int64 `[tokens]`."""
        self.identical &= same_bits(untouched, restored)
        self.width = min(TOP, untouched.shape[-1])
        for p_rows, q_rows, target in zip(
            untouched.split(SCORE_ROWS), restored.split(SCORE_ROWS), targets.split(SCORE_ROWS), strict=True
        ):
            p, q = p_rows.double().log_softmax(-1), q_rows.double().log_softmax(-1)
            # A token that the model rules out (logit -inf) has no share in the sum.
            self.kl.append(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).cpu())
            self.nll_untouched -= float(p.gather(1, target[:, None]).sum())
            self.nll_restored -= float(q.gather(1, target[:, None]).sum())
            self.top1 += int((p_rows.argmax(-1) == q_rows.argmax(-1)).sum())
            best, others = p_rows.topk(self.width).indices, q_rows.topk(self.width).indices
            self.top5 += int((best[:, :, None] == others[:, None, :]).sum())
            self.scored += len(target)

    @property
    def kl_mean(self) -> float:
        """KL(untouched || restored), nats a token."""
        return float(torch.cat(self.kl).mean())

    @property
    def kl_p99(self) -> float:
        """The KL that 99 of 100 tokens stay below (interpolated between neighbours)."""
        return float(torch.cat(self.kl).quantile(0.99))

    @property
    def top1_agreement(self) -> float:
        """Share of tokens after which both find the same next token most likely."""
        return self.top1 / self.scored

    @property
    def top5_agreement(self) -> float:
        """Share of the untouched cache's five most likely tokens that are among the restored cache's five."""
        return self.top5 / (self.scored * self.width)


@dataclass
class CacheTally:
    """Sizes and errors of one scheme's caches, and what the model made of them."""

    logits: LogitTally = field(default_factory=LogitTally)
    raw_bytes: int = 0
    encoded_bytes: list[int] = field(default_factory=lambda: [0, 0])  # K, V
    num_values: list[int] = field(default_factory=lambda: [0, 0])
    max_abs_error: float = 0.0
    error_over_bound: float | None = None
    kv_identical: bool = True
    encode_gbps: list[float] = field(default_factory=list)
    decode_gbps: list[float] = field(default_factory=list)
    drift: list[int] = field(default_factory=list)  # greedy tokens until the first difference, each sequence

    def add_tensor(self, side: int, original: Tensor, restored: Tensor, frame: bytes, bound: float | None) -> None:
        """Add K (`side` 0) or V (1) of a layer, the bytes it was written as and the bound promised for it."""
        self.encoded_bytes[side] += len(frame)
        self.num_values[side] += original.numel()
        self.kv_identical &= same_bits(original, restored)
        error = largest_error(original, restored)
        self.max_abs_error = max(self.max_abs_error, error)
        if bound is not None:
            share = error / bound if bound else (0.0 if error == 0 else float("inf"))
            self.error_over_bound = max(self.error_over_bound or 0.0, share)

    def bits(self, side: int) -> float:
        """Bits per value of K (0) or V (1)."""
        return 8 * self.encoded_bytes[side] / self.num_values[side] if self.num_values[side] else 0.0


def largest_error(original: Tensor, restored: Tensor) -> float:
    """Largest |restored - original| in float64 over the finite originals; inf if anything else changed a bit."""
    finite = torch.isfinite(original)
    if not same_bits(original[~finite], restored[~finite]):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    error = (restored[finite].double() - original[finite].double()).abs()
    return float(error.nan_to_num(nan=float("inf")).max())


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype agree bit for bit (NaN equals NaN, 0 differs from -0)."""
    return torch.equal(as_bits(left.contiguous()), as_bits(right.contiguous()))
