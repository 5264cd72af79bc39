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
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kvferry.evaluation.drift import continue_greedily, tokens_until_difference
from kvferry.evaluation.results import SchemeResult
from kvferry.evaluation.schemes import Scheme
from kvferry.evaluation.tally import SCORE_ROWS as SCORE_ROWS
from kvferry.evaluation.tally import CacheTally
from kvferry.store import HostStore

if TYPE_CHECKING:
    from transformers import DynamicCache

T = TypeVar("T")


@dataclass(frozen=True)
class PrefixProtocol:
    """Tokens to restore, tokens to score after them, how often to time each store and restore, and how many tokens to
    generate greedily to see where texts part (0: none).

    Raises `ValueError` for a negative `generate`, and for the others below 1.
    """

    prefix: int = 1536
    score: int = 512
    repeats: int = 1
    generate: int = 0

    def __post_init__(self) -> None:
        if self.generate < 0:
            raise ValueError(f"generate is {self.generate}: give 0 or more")
        for name in ("prefix", "score", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")

    @property
    def window(self) -> int:
        """Tokens one sequence needs: each scored token predicts the next."""
        return self.prefix + self.score + 1


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
    tallies = [CacheTally() for _ in schemes]
    for sequence, window in enumerate(windows.to(device)):
        cache = prefill(model, window[None, : protocol.prefix])
        store = roomy_store(cache) if store is None else store
        scored, targets = window[None, protocol.prefix : -1], window[protocol.prefix + 1 :]
        first = scored[:, :1]
        untouched = score(model, copy.deepcopy(cache), scored)
        generated = continue_greedily(model, copy.deepcopy(cache), first, protocol.generate)[0]
        if sequence == 0:
            _warm_up(schemes, cache, device)
        for scheme, tally in zip(schemes, tallies, strict=True):
            on_step(sequence, scheme)
            restored = _store_and_restore(scheme, store, cache, device, protocol.repeats, tally)
            if protocol.generate:
                tally.drift.append(tokens_until_difference(model, copy.deepcopy(restored), first, generated))
            tally.logits.add(untouched, score(model, restored, scored), targets)
    return [_result(scheme, tally) for scheme, tally in zip(schemes, tallies, strict=True)]


def restore_through(scheme: Scheme, store: HostStore, cache: DynamicCache, device: torch.device) -> DynamicCache:
    """What comes back of `cache` from `store`, which is left as it was."""
    with one_cpu_thread():
        scheme.store(store, "prefix", cache)
        restored = scheme.restore(store, "prefix", device)
    store.delete("prefix")
    return restored


def roomy_store(cache: DynamicCache) -> HostStore:
    """A store of a few times the size of `cache`: no scheme makes it larger than that."""
    return HostStore(max(4 * sum(t.numel() * t.element_size() for t in cache_tensors(cache)), 1 << 20))


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


@torch.inference_mode()
def score(model: Any, cache: DynamicCache, tokens: Tensor) -> Tensor:
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
    scheme: Scheme, store: HostStore, cache: DynamicCache, device: torch.device, repeats: int, tally: CacheTally
) -> DynamicCache:
    for _ in range(repeats):
        with one_cpu_thread():
            entry, encode_s = _timed(lambda: scheme.store(store, "prefix", cache), device)
            restored, decode_s = _timed(lambda: scheme.restore(store, "prefix", device), device)
        tally.encode_gbps.append(entry.raw_bytes / encode_s / 1e9)
        tally.decode_gbps.append(entry.raw_bytes / decode_s / 1e9)
    tally.raw_bytes += entry.raw_bytes
    pairs = zip(cache_tensors(cache), cache_tensors(restored), entry.frames, scheme.bounds(entry), strict=True)
    for index, (original, copied, frame, bound) in enumerate(pairs):
        tally.add_tensor(index % 2, original, copied, frame, bound)
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


def _result(scheme: Scheme, tally: CacheTally) -> SchemeResult:
    logits = tally.logits
    return SchemeResult(
        name=scheme.name,
        family=scheme.family,
        setting=scheme.setting,
        guarantee=scheme.guarantee,
        num_values=sum(tally.num_values),
        raw_bytes=tally.raw_bytes,
        encoded_bytes=sum(tally.encoded_bytes),
        bits_k=tally.bits(0),
        bits_v=tally.bits(1),
        max_abs_error=tally.max_abs_error,
        error_over_bound=tally.error_over_bound,
        kv_identical=tally.kv_identical,
        logits_identical=logits.identical,
        kl_nats=logits.kl_mean,
        kl_p99=logits.kl_p99,
        nll_untouched=logits.nll_untouched / logits.scored,
        nll_restored=logits.nll_restored / logits.scored,
        top1_agreement=logits.top1_agreement,
        top5_agreement=logits.top5_agreement,
        encode_gbps=median(tally.encode_gbps),
        decode_gbps=median(tally.decode_gbps),
        drift_tokens=tuple(tally.drift),
    )
