"""Mean and second moments of a cache, window by window: what a KLT needs, in memory that no text makes larger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvferry.codecs.transform.rope import Rope

SIDES = ("k", "v")


def group_rows(x: Tensor, group_heads: int) -> Tensor:
    """`[heads, tokens, head_dim]` as `[groups, tokens, group_heads * head_dim]`: a group's heads side by side."""
    heads, tokens, dim = x.shape
    groups = heads // group_heads
    return x.reshape(groups, group_heads, tokens, dim).transpose(1, 2).reshape(groups, tokens, group_heads * dim)


def ungroup_rows(rows: Tensor, group_heads: int) -> Tensor:
    """Undo `group_rows`."""
    groups, tokens, n = rows.shape
    heads = rows.reshape(groups, tokens, group_heads, n // group_heads).transpose(1, 2)
    return heads.reshape(groups * group_heads, tokens, n // group_heads)


@dataclass
class Moments:
    """Sums over tokens of un-rotated keys (side 0) and of values (side 1), grouped; float64 on the CPU.

    `sums` `[layers, 2, groups, n]`, `products` `[layers, 2, groups, n, n]`, over `tokens` tokens.
    """

    sums: Tensor
    products: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, layers: int, groups: int, n: int) -> Moments:
        sums = torch.zeros(layers, 2, groups, n, dtype=torch.float64)
        return cls(sums, torch.zeros(layers, 2, groups, n, n, dtype=torch.float64))

    def add(self, cache: Any, rope: Rope) -> None:
        """Add all tokens of a cache of one sequence that begins at position 0. Raises `ValueError` for values that are
        not finite: they would take every mean with them."""
        tokens = cache.layers[0].keys.shape[-2]
        cos, sin = rope.table(torch.arange(tokens))
        group_heads = self.sums.shape[-1] // cache.layers[0].keys.shape[-1]
        for index, layer in enumerate(cache.layers):
            device = layer.keys.device
            keys = rope.unrotate(layer.keys[0].float(), cos.to(device), sin.to(device))
            for side, x in enumerate((keys, layer.values[0])):
                rows = group_rows(x.double(), group_heads)
                sums = rows.sum(1)
                if not bool(sums.isfinite().all()):
                    raise ValueError(
                        f"layer {index} {SIDES[side]} holds values that are not finite: load the model in another dtype"
                    )
                self.sums[index, side] += sums.cpu()
                self.products[index, side] += (rows.transpose(1, 2) @ rows).cpu()
        self.tokens += tokens

    def mean(self, layer: int, side: int) -> Tensor:
        """`[groups, n]`, float64."""
        return self.sums[layer, side] / self.tokens

    def covariance(self, layer: int, side: int) -> Tensor:
        """About the mean, `[groups, n, n]`, float64."""
        mean = self.mean(layer, side)
        return self.products[layer, side] / self.tokens - mean[:, :, None] * mean[:, None, :]

    def deviation(self, layer: int, side: int) -> float:
        """Root of the mean variance of a channel about its own mean."""
        variance = self.covariance(layer, side).diagonal(dim1=1, dim2=2).mean()
        return float(variance.clamp(min=0).sqrt())
