"""Small paged caches, codecs and slots that the tests of the pipeline share."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kvferry
from kvferry.codecs.slots import SlotCodec, raw_slot_bytes, slot_bytes_for
from kvferry.format.slot import HEADER_BYTES
from kvferry.pages import PagedKV

PAGES, PAGE_TOKENS, CHUNK_PAGES = 64, 16, 2


def make_layers(seed: int = 0, device: str = "cpu", layers: int = 2, heads: int = 2, dim: int = 32) -> list[Tensor]:
    """Layers `[pages, heads, tokens, 2*dim]` of smooth bfloat16 values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (PAGES, heads, PAGE_TOKENS, 2 * dim)
    return [torch.randn(shape, generator=generator).cumsum(2).to(torch.bfloat16).to(device) for _ in range(layers)]


@dataclass
class Scene:
    """A cache, and host slots for all of it."""

    layers: list[Tensor]
    codec: SlotCodec
    slots: Tensor

    @classmethod
    def make(
        cls,
        codec: kvferry.Codec | None = None,
        num_slots: int = 40,
        ratio: float | None = None,
        device: str = "cpu",
        seed: int = 0,
        **options: object,
    ) -> "Scene":
        layers = make_layers(seed, device)
        kv = PagedKV.heads_first(layers, layers[0].shape[3] // 2)
        codec = codec or kvferry.Raw()
        size = raw_slot_bytes(kv, CHUNK_PAGES) if ratio is None else slot_bytes_for(kv, codec, CHUNK_PAGES, ratio)
        slots = torch.zeros(num_slots, size, dtype=torch.uint8, pin_memory=device != "cpu")
        return cls(layers, SlotCodec(kv, codec, CHUNK_PAGES, size, **options), slots)

    def snapshot(self) -> list[Tensor]:
        return [layer.clone() for layer in self.layers]

    def wipe(self) -> None:
        for layer in self.layers:
            layer.fill_(float("nan"))

    def same(self, wanted: list[Tensor], pages: np.ndarray) -> bool:
        """Whether `pages` are bit for bit those of `wanted`."""
        index = torch.from_numpy(np.asarray(pages).reshape(-1)).long()
        pairs = zip(self.layers, wanted, strict=True)
        return all(torch.equal(x[index].view(torch.int16), y[index].view(torch.int16)) for x, y in pairs)

    def damage(self, slot: int) -> None:
        """Flip a bit of the payload."""
        self.slots[slot, HEADER_BYTES + 8 * self.codec.num_tiles + 9] ^= 16


def chunk_pages(rng: np.random.Generator, chunks: int) -> np.ndarray:
    """A page table of distinct pages, anywhere in the cache."""
    return rng.permutation(PAGES)[: chunks * CHUNK_PAGES].reshape(chunks, CHUNK_PAGES)


def names(chunks: int, start: int = 0) -> np.ndarray:
    """Identities uint64 `[chunks, 2]`, with the highest bits in use."""
    first = np.arange(start, start + chunks, dtype=np.uint64) + np.uint64(1 << 63)
    return np.stack([first, first * np.uint64(7)], axis=1)
