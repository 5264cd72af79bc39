"""Which layers and which side bear an error: one of them through a scheme, everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvferry.evaluation.prefix import PrefixProtocol, cache_tensors, prefill, restore_through, roomy_store, score
from kvferry.evaluation.schemes import Scheme
from kvferry.evaluation.tally import LogitTally

if TYPE_CHECKING:
    from transformers import DynamicCache

SIDES = ("k", "v")


@dataclass(frozen=True)
class SensitivityResult:
    """What a scheme's error in one layer's K or V alone does, over all sequences."""

    name: str  # of the scheme
    layer: int
    side: str  # "k" or "v"
    relative_error: float  # root of the squared error over the squared deviation from the mean, of the tensor
    kl_nats: float  # KL(untouched || restored), mean over the scored tokens
    kl_p99: float
    top1_agreement: float


def evaluate_sensitivity(
    model: Any,
    windows: Tensor,
    schemes: Sequence[Scheme],
    protocol: PrefixProtocol,
    on_step: Callable[[int, Scheme, int, str], None] = lambda sequence, scheme, layer, side: None,
) -> list[SensitivityResult]:
    """Score each row of `windows` int64 `[sequences, protocol.window]` once for each scheme, layer and side.

    Results are in the order of schemes, layers, K before V; layers without a cache of their own have none. `on_step` is
    called before each forward.
    """
    device = next(model.parameters()).device
    tallies: dict[tuple[str, int, str], LogitTally] = {}
    errors: dict[tuple[str, int, str], list[float]] = {}
    for sequence, window in enumerate(windows.to(device)):
        cache = prefill(model, window[None, : protocol.prefix])
        scored, targets = window[None, protocol.prefix : -1], window[protocol.prefix + 1 :]
        untouched = score(model, copy.deepcopy(cache), scored)
        store = roomy_store(cache)
        for scheme in schemes:
            restored = restore_through(scheme, store, cache, device)
            places = [(layer, side) for layer in _layers(cache) for side in SIDES]
            tensors = zip(cache_tensors(cache), cache_tensors(restored), strict=True)
            for (layer, side), (original, copied) in zip(places, tensors, strict=True):
                on_step(sequence, scheme, layer, side)
                key = (scheme.name, layer, side)
                mixed = _with_tensor(cache, layer, side, copied)
                tallies.setdefault(key, LogitTally()).add(untouched, score(model, mixed, scored), targets)
                errors.setdefault(key, []).append(_relative_error(original, copied))
    return [
        SensitivityResult(*key, sum(errors[key]) / len(errors[key]), tally.kl_mean, tally.kl_p99, tally.top1_agreement)
        for key, tally in tallies.items()
    ]


def _layers(cache: DynamicCache) -> list[int]:
    layers: list[Any] = cache.layers
    return [index for index, layer in enumerate(layers) if layer.is_initialized]


def _with_tensor(cache: DynamicCache, layer: int, side: str, tensor: Tensor) -> DynamicCache:
    """A copy of the cache with `tensor` in place of one layer's K or V."""
    mixed = copy.deepcopy(cache)
    setattr(mixed.layers[layer], "keys" if side == "k" else "values", tensor)
    return mixed


def _relative_error(original: Tensor, copied: Tensor) -> float:
    x, error = original.double(), copied.double() - original.double()
    # Channels have means of their own, and codecs do not pay for them.
    spread = (x - x.mean(dim=-2, keepdim=True)).square().mean()
    return float((error.square().mean() / spread.clamp(min=1e-300)).sqrt())
