"""The prefix-reuse protocol: what it costs a model to read a prefix's KV cache back from a store.

Prefill a prefix, put its cache into a `HostStore`, restore it, and score the tokens that follow (given, not generated)
with the restored and with the untouched cache. One sequence at a time, as a server restores one request's prefix.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.schemes import Scheme
from kvferry.store import HostStore

if TYPE_CHECKING:
    from transformers import DynamicCache

T = TypeVar("T")

SCORE_ROWS = 128  # tokens whose log-probabilities over the vocabulary are in float64 at once


@dataclass(frozen=True)
class PrefixProtocol:
    """Tokens to restore, tokens to score after them, and how often to time each store and restore."""

    prefix: int = 1536
    score: int = 512
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("prefix", "score", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")

    @property
    def window(self) -> int:
        """Tokens one sequence needs: each scored token predicts the next."""
        return self.prefix + self.score + 1


@dataclass
class _Tally:
    """Sums over sequences for one scheme."""

    raw_bytes: int = 0
    encoded_bytes: int = 0
    num_values: int = 0
    max_abs_error: float = 0.0
    error_over_bound: float | None = None
    kv_identical: bool = True
    logits_identical: bool = True
    kl: float = 0.0
    nll_untouched: float = 0.0
    nll_restored: float = 0.0
    agreed: int = 0
    scored: int = 0
    encode_gbps: list[float] = field(default_factory=list)
    decode_gbps: list[float] = field(default_factory=list)


def spread_windows(documents: Sequence[Tensor], length: int, count: int) -> Tensor:
    """`count` windows of `length` tokens, int64 `[count, length]`, taken from the documents in turn and evenly within.

    Raises `ValueError` when no document holds a window.
    """
    usable = [document for document in documents if len(document) >= length]
    if not usable or count < 1:
        longest = max((len(document) for document in documents), default=0)
        raise ValueError(f"{count} windows of {length} tokens were asked of texts of at most {longest}: ask for less")
    rows = []
    for index, document in enumerate(usable):
        share = len(range(index, count, len(usable)))
        step = (len(document) - length) // max(share - 1, 1)
        rows.append([document[i * step : i * step + length] for i in range(share)])
    turns = [rows[i % len(usable)][i // len(usable)] for i in range(count)]
    return torch.stack(turns).long()


@torch.inference_mode()
def prefill(model: Any, tokens: Tensor) -> DynamicCache:
    """The cache of `tokens` `[batch, tokens]`; logits are computed for the last token only where the model can."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache: DynamicCache = model(input_ids=tokens, use_cache=True, **last_only).past_key_values
    return cache


@torch.inference_mode()
def continue_greedily(model: Any, cache: DynamicCache, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Feed token `first` `[1, 1]` and then the most likely ones; the cache grows.

    Returns the tokens int64 `[steps]` and the logits they were picked from `[steps, vocabulary]`.
    """
    tokens, logits = [], []
    token = first
    for _ in range(steps):
        row = model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        token = row.argmax().reshape(1, 1)
        tokens.append(token[0, 0])
        logits.append(row)
    return torch.stack(tokens), torch.stack(logits)


def evaluate_prefix(
    model: Any,
    windows: Tensor,
    schemes: Sequence[Scheme],
    protocol: PrefixProtocol,
    store: HostStore | None = None,
    on_step: Callable[[int, Scheme], None] = lambda sequence, scheme: None,
) -> list[SchemeResult]:
    """Evaluate each scheme on every row of `windows` int64 `[sequences, protocol.window]`.

    `on_step` is called before each scheme of each sequence. Without a `store`, one of the size of a few raw caches is
    used. Raises what storing and restoring raise.
    """
    if windows.dim() != 2 or windows.shape[1] != protocol.window:
        raise ValueError(f"windows are {tuple(windows.shape)}: give [sequences, {protocol.window}] tokens")
    device = next(model.parameters()).device
    tallies = [_Tally() for _ in schemes]
    for sequence, window in enumerate(windows.to(device)):
        cache = prefill(model, window[None, : protocol.prefix])
        if store is None:
            store = HostStore(max(4 * sum(t.numel() * t.element_size() for t in cache_tensors(cache)), 1 << 20))
        scored, targets = window[None, protocol.prefix : -1], window[protocol.prefix + 1 :]
        untouched = _score(model, copy.deepcopy(cache), scored)
        if sequence == 0:
            _warm_up(schemes, cache, device)
        for scheme, tally in zip(schemes, tallies, strict=True):
            on_step(sequence, scheme)
            restored = _store_and_restore(scheme, store, cache, device, protocol.repeats, tally)
            _compare_logits(untouched, _score(model, restored, scored), targets, tally)
    return [_result(scheme, tally) for scheme, tally in zip(schemes, tallies, strict=True)]


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Let PyTorch use one CPU thread inside.

    The reference codecs are thousands of small operations. Two threads make them hardly faster, and up to 50 times
    slower where anything else runs on one of the cores: every operation then waits for the scheduler.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cache_tensors(cache: DynamicCache) -> list[Tensor]:
    """K and V of every initialised layer, in the order of the frames."""
    layers: list[Any] = cache.layers
    return [tensor for layer in layers if layer.is_initialized for tensor in (layer.keys, layer.values)]


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


@torch.inference_mode()
def _score(model: Any, cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` of `tokens` `[1, tokens]` after `cache`, which grows."""
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0]
    return logits


def _warm_up(schemes: Sequence[Scheme], cache: DynamicCache, device: torch.device) -> None:
    """Run every scheme once on a few tokens, so that no time counted later includes imports and first calls."""
    small = copy.deepcopy(cache)
    del small.layers[1:]
    layers: list[Any] = small.layers
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :64, :], layer.values[..., :64, :]
    store = HostStore(1 << 30)
    with one_cpu_thread():
        for scheme in schemes:
            scheme.store(store, "warm-up", small)
            scheme.restore(store, "warm-up", device)


def _store_and_restore(
    scheme: Scheme, store: HostStore, cache: DynamicCache, device: torch.device, repeats: int, tally: _Tally
) -> DynamicCache:
    for _ in range(repeats):
        with one_cpu_thread():
            entry, encode_s = _timed(lambda: scheme.store(store, "prefix", cache), device)
            restored, decode_s = _timed(lambda: scheme.restore(store, "prefix", device), device)
        tally.encode_gbps.append(entry.raw_bytes / encode_s / 1e9)
        tally.decode_gbps.append(entry.raw_bytes / decode_s / 1e9)
    tally.raw_bytes += entry.raw_bytes
    tally.encoded_bytes += entry.encoded_bytes
    pairs = zip(cache_tensors(cache), cache_tensors(restored), scheme.bounds(entry), strict=True)
    for original, copied, bound in pairs:
        tally.num_values += original.numel()
        tally.kv_identical &= same_bits(original, copied)
        error = largest_error(original, copied)
        tally.max_abs_error = max(tally.max_abs_error, error)
        if bound is not None:
            share = error / bound if bound else (0.0 if error == 0 else float("inf"))
            tally.error_over_bound = max(tally.error_over_bound or 0.0, share)
    store.delete("prefix")
    return restored


def _timed(action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The action's result and its seconds, with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _compare_logits(untouched: Tensor, restored: Tensor, targets: Tensor, tally: _Tally) -> None:
    """Add up both caches' logits `[tokens, vocabulary]` for the true next tokens `targets` `[tokens]`."""
    tally.logits_identical &= same_bits(untouched, restored)
    for p_rows, q_rows, target in zip(
        untouched.split(SCORE_ROWS), restored.split(SCORE_ROWS), targets.split(SCORE_ROWS), strict=True
    ):
        p, q = p_rows.double().log_softmax(-1), q_rows.double().log_softmax(-1)
        # A token that the model rules out (logit -inf) has no share in the sum.
        tally.kl += float(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum())
        tally.nll_untouched -= float(p.gather(1, target[:, None]).sum())
        tally.nll_restored -= float(q.gather(1, target[:, None]).sum())
        tally.agreed += int((p_rows.argmax(-1) == q_rows.argmax(-1)).sum())
        tally.scored += len(target)


def _result(scheme: Scheme, tally: _Tally) -> SchemeResult:
    return SchemeResult(
        name=scheme.name,
        family=scheme.family,
        setting=scheme.setting,
        guarantee=scheme.guarantee,
        num_values=tally.num_values,
        raw_bytes=tally.raw_bytes,
        encoded_bytes=tally.encoded_bytes,
        max_abs_error=tally.max_abs_error,
        error_over_bound=tally.error_over_bound,
        kv_identical=tally.kv_identical,
        logits_identical=tally.logits_identical,
        kl_nats=tally.kl / tally.scored,
        nll_untouched=tally.nll_untouched / tally.scored,
        nll_restored=tally.nll_restored / tally.scored,
        top1_agreement=tally.agreed / tally.scored,
        encode_gbps=median(tally.encode_gbps),
        decode_gbps=median(tally.decode_gbps),
    )
