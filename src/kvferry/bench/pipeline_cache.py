"""A serving engine's paged cache filled with real KV, for measuring the pipeline on it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.slots import SlotCodec, slot_bytes_for
from kvferry.pages import PagedKV

SOURCE_SEED = 17


@dataclass(frozen=True)
class Shape:
    """The model whose cache is measured; the 8B shape by default. The head size is that of the real KV."""

    layers: int = 32
    heads: int = 8
    page_tokens: int = 16


class PagedCache:
    """Layers `[pages, heads, page_tokens, K|V]` on `device`, twice `tokens` of them: sources, full of real KV, and
    destinations. The pages of both lie anywhere, as they do in a serving engine.

    `tensors`: `layer.LL.k` and `layer.LL.v`, `[sequences, heads, tokens, head_dim]` of one dtype, as
    `benchmarks/dump_kv.py` saves them; layers, heads and tokens are repeated until the shape is full, each shifted
    differently. `sigma_bounds` float32 `[lines]`: `sigma` standard deviations of each layer's K or V.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: Shape, tokens: int, sigma: float, device: torch.device
    ) -> None:
        self.shape, self.device = shape, device
        self.pages = -(-tokens // shape.page_tokens)
        order = np.random.default_rng(SOURCE_SEED).permutation(2 * self.pages)
        self.sources, self.destinations = order[: self.pages], order[self.pages :]
        layers, bounds = [], []
        given = len(tensors) // 2
        for layer in range(shape.layers):
            name = f"layer.{layer % given:02}"
            if f"{name}.k" not in tensors or f"{name}.v" not in tensors:
                raise ValueError(f"the file has no tensors {name}.k and .v: make it with benchmarks/dump_kv.py")
            sides = [tensors[f"{name}.{side}"].flatten(0, 1).to(device) for side in "kv"]
            layers.append(self._layer(sides, layer))
            bounds += [sigma * float(side.float().std()) for side in sides for _ in range(shape.heads)]
        self.layers = layers
        self.kv = PagedKV.heads_first(layers, layers[0].shape[3] // 2)
        self.sigma_bounds = torch.tensor(bounds, device=device).repeat_interleave(self.kv.num_lines // len(bounds))

    def _layer(self, sides: list[Tensor], number: int) -> Tensor:
        dim = sides[0].shape[2]
        paged = (2 * self.pages, self.shape.heads, self.shape.page_tokens, 2 * dim)
        layer = torch.zeros(paged, dtype=sides[0].dtype, device=self.device)
        at = torch.from_numpy(self.sources).to(self.device)
        wanted = torch.arange(self.pages * self.shape.page_tokens, device=self.device)
        for half, side in enumerate(sides):
            for head in range(self.shape.heads):
                values = self._values(side, number, head, wanted)
                layer[at, head, :, half * dim : (half + 1) * dim] = values.view(self.pages, -1, dim)
        return layer

    def _values(self, side: Tensor, number: int, head: int, wanted: Tensor) -> Tensor:
        """The tokens `wanted` of a layer's `head`, `[tokens, head_dim]`; `side` is what `tensors` has of the layer's K
        or V, `[sequences * heads, tokens, head_dim]`."""
        rows, tokens, _ = side.shape
        shift = 131 * number + 17 * (head // rows)
        return side[(head + number) % rows][(wanted + shift) % tokens]

    def codec(self, codec: Codec, chunk_tokens: int, ratio: float) -> SlotCodec:
        """For chunks of `chunk_tokens` in slots for that ratio; a `Bounded` takes `sigma_bounds`."""
        chunk_pages = chunk_tokens // self.shape.page_tokens
        if chunk_pages * self.shape.page_tokens != chunk_tokens:
            raise ValueError(f"chunks of {chunk_tokens} tokens are no whole pages of {self.shape.page_tokens}")
        bounds = self.sigma_bounds if isinstance(codec, Bounded) else None
        slot_bytes = slot_bytes_for(self.kv, codec, chunk_pages, ratio)
        return SlotCodec(self.kv, codec, chunk_pages, slot_bytes, bounds=bounds)

    def table(self, pages: np.ndarray, chunks: int, chunk_pages: int) -> np.ndarray:
        """Page table of the first `chunks` chunks of `sources` or `destinations`, int32 `[chunks, chunk_pages]`."""
        if chunks * chunk_pages > self.pages:
            raise ValueError(f"{chunks} chunks of {chunk_pages} pages are more than the cache's {self.pages} pages")
        return pages[: chunks * chunk_pages].astype(np.int32).reshape(chunks, chunk_pages)

    def forget(self, chunks: int, chunk_pages: int) -> None:
        """Fill the destinations of the first chunks with NaN."""
        at = torch.from_numpy(self.table(self.destinations, chunks, chunk_pages).reshape(-1)).to(self.device).long()
        for layer in self.layers:
            layer[at] = float("nan")

    def check(self, chunks: int, chunk_pages: int, codec: Codec, doublings: int) -> None:
        """Raise `RuntimeError` unless the first chunks' destinations are what `codec` promises of their sources, with
        bounds doubled `doublings` times at most."""
        at = [
            torch.from_numpy(self.table(pages, chunks, chunk_pages).reshape(-1)).to(self.device).long()
            for pages in (self.sources, self.destinations)
        ]
        dim, heads = self.layers[0].shape[3] // 2, self.shape.heads
        bounds = self.sigma_bounds.double().view(self.shape.layers, 2, heads, -1)[..., 0] * 2**doublings
        for number, layer in enumerate(self.layers):
            before, after = layer[at[0]], layer[at[1]]
            if codec.exact:
                if not torch.equal(as_bits(before), as_bits(after)):
                    raise RuntimeError(f"layer {number}: {codec.name} is not bit-identical")
                continue
            error = (before.double() - after.double()).abs().unflatten(3, (2, dim)).amax((0, 2, 4))
            if not bool((bounds[number] >= error.T).all()):
                raise RuntimeError(f"layer {number}: the bound is broken")
