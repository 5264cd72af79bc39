"""Held-out text: how far the next tokens' distributions move when a prefix's cache is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvferry.calibration.simulate import Change
from kvferry.evaluation import prefill
from kvferry.evaluation.prefix import score
from kvferry.evaluation.tally import LogitTally


@dataclass(frozen=True)
class _Window:
    """One window in host memory: the cache of its prefix, the tokens scored after it `[1, score]`, the true next token
    of each `[score]`, and their logits `[score, vocabulary]`."""

    cache: Any
    scored: Tensor
    targets: Tensor
    logits: Tensor


class HeldOut:
    """Windows int64 `[count, prefix + score + 1]` of one text; `prefix` tokens of each are cached, `score` scored.

    Caches and logits wait in host memory; on the model's device there is one window at a time.
    """

    def __init__(self, model: Any, windows: Tensor, prefix: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._windows: list[_Window] = []
        for window in windows.to(self.device):
            cache = prefill(model, window[None, :prefix])
            scored, targets = window[None, prefix:-1], window[prefix + 1 :]
            logits = score(model, _with(cache, self.device, _untouched), scored).cpu()
            self._windows.append(_Window(_with(cache, torch.device("cpu"), _untouched), scored, targets, logits))

    @property
    def raw_bytes(self) -> int:
        """Of all caches."""
        return sum(tensor.numel() * tensor.element_size() for _, _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[int, int, Tensor]]:
        """(layer, side, K or V `[1, heads, tokens, head_dim]` on the model's device) of every window."""
        for window in self._windows:
            for index, layer in enumerate(window.cache.layers):
                yield index, 0, layer.keys.to(self.device)
                yield index, 1, layer.values.to(self.device)

    def divergence(self, change: Change) -> float:
        """KL(untouched || changed), mean over the scored tokens of all windows, in nats a token."""
        tally = LogitTally()
        for window in self._windows:
            changed = score(self.model, _with(window.cache, self.device, change), window.scored)
            tally.add(window.logits.to(self.device), changed, window.targets)
        return tally.kl_mean


def _with(cache: Any, device: torch.device, change: Change) -> Any:
    """A cache on `device` whose tensors went through `change`; the one given stays as it is."""
    # Layers replace their tensors when they grow, they do not write into them: a shallow copy is enough.
    fresh = copy.copy(cache)
    fresh.layers = []
    for index, layer in enumerate(cache.layers):
        fresh.layers.append(copy.copy(layer))
        fresh.layers[-1].keys = change(index, 0, layer.keys.to(device))
        fresh.layers[-1].values = change(index, 1, layer.values.to(device))
    return fresh


def _untouched(layer: int, side: int, tensor: Tensor) -> Tensor:
    return tensor
