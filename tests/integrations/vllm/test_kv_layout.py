"""How an engine's caches become parts of rows, for every kind of layer; without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1.kv_offload.base", reason="vLLM is not installed (make test installs it)")

from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

from kvferry.integrations.vllm.layout import group_parts, value_dtype, worker_row_bytes
from kvferry.integrations.vllm.settings import OffloadSettings

BLOCKS = 6
BF16 = torch.bfloat16


def full(heads: int = 2, dim: int = 64, dtype: torch.dtype = BF16, **more: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=dim, dtype=dtype, **more)


def mla(dim: int = 576) -> MLAAttentionSpec:
    return MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=dim, dtype=BF16)


def sliding() -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=BF16, sliding_window=64)


class Caches:
    """Tensors for groups of layers, one spec a layer, as vLLM hands them to connectors."""

    def __init__(self, *groups: dict[str, Any], split: int = 1) -> None:
        self.kv_caches: dict[str, torch.Tensor] = {}
        tensors, refs = [], []
        self.groups = []
        for specs in groups:
            kinds = {repr(spec) for spec in specs.values()}
            spec = next(iter(specs.values()))
            if len(kinds) > 1:
                spec = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
            self.groups.append(
                SimpleNamespace(layer_names=list(specs), kv_cache_spec=spec, host_resident=False, role=None)
            )
            refs.append([])
            for name, each in specs.items():
                raw = torch.zeros(BLOCKS, each.page_size_bytes, dtype=torch.uint8)
                self.kv_caches[name] = self._view(raw, each, split)
                refs[-1].append(CanonicalKVCacheRef(len(tensors), each.page_size_bytes))
                tensors.append(CanonicalKVCacheTensor(raw.view(torch.int8), each.page_size_bytes))
        self.canonical = CanonicalKVCaches(tensors, refs)
        self.config = SimpleNamespace(
            kv_cache_groups=self.groups,
            num_blocks=BLOCKS,
            hisparse_host_num_blocks=None,
            prefix_cacheable_group_ids=tuple(range(len(groups))),
        )
        self.bytes_per_block = max(sum(each.page_size_bytes for each in specs.values()) for specs in groups)

    @staticmethod
    def _view(raw: torch.Tensor, spec: Any, split: int) -> torch.Tensor:
        if isinstance(spec, MambaSpec):
            return raw
        dtype = torch.uint8 if spec.dtype.itemsize == 1 else spec.dtype
        shape = (BLOCKS * split, spec.num_kv_heads, 16 // split, -1)
        return raw.view(dtype).view(shape)

    def rows(self, settings: OffloadSettings, chunk: int = 4, dtype: str = "auto") -> int:
        return worker_row_bytes(self.config, settings, dtype, chunk, self.bytes_per_block)

    def parts(self, settings: OffloadSettings, chunk: int = 4, dtype: str = "auto", row: int | None = None) -> Any:
        row = row if row is not None else self.rows(settings, chunk, dtype)
        return group_parts(self.config, self.kv_caches, self.canonical, settings, dtype, chunk, row)


LOSSLESS, BOUNDED, RAW = (OffloadSettings(codec=codec) for codec in ("lossless", "bounded", "raw"))


@pytest.mark.parametrize("settings", [LOSSLESS, BOUNDED, RAW], ids=lambda settings: settings.codec)
def test_plain_attention(settings: OffloadSettings) -> None:
    caches = Caches({f"layer.{number}": full() for number in range(3)})
    raw = 4 * caches.bytes_per_block
    row = caches.rows(settings)
    assert raw / row == pytest.approx(settings.ratio_for(BF16), rel=0.05)
    ((part,),) = caches.parts(settings)
    assert part.codec_name == settings.codec
    assert part.offset == 0 and part.stop <= row and part.pages_per_block == 1
    assert part.slot_codec.kv.num_lines == 3 * 2 * 2 and part.slot_codec.chunk_pages == 4


def test_more_chunks_fit_the_same_memory() -> None:
    caches = Caches({f"layer.{number}": full(heads=8, dim=128) for number in range(4)})
    raw, lossless, bounded = (caches.rows(settings) for settings in (RAW, LOSSLESS, BOUNDED))
    assert raw / 4 / caches.bytes_per_block < 1.01
    assert 1.3 < raw / lossless < 1.4 and 2.9 < raw / bounded < 3.1


def test_kernels_with_smaller_pages() -> None:
    ((part,),) = Caches({"layer": full()}, split=2).parts(LOSSLESS)
    assert part.pages_per_block == 2
    assert part.slot_codec.chunk_pages == 8 and part.slot_codec.kv.page_tokens == 8


def test_mla() -> None:
    ((part,),) = Caches({"a": mla(), "b": mla()}).parts(BOUNDED)
    # 576 channels are four lines of 128 and one of 64.
    assert part.codec_name == "bounded" and part.slot_codec.kv.num_lines == 10


def test_keys_wider_than_values() -> None:
    ((part,),) = Caches({"a": full(dim=96, head_size_v=64)}).parts(LOSSLESS)
    assert sorted(part.slot_codec.kv.channels) == [64, 64, 96, 96]


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("settings", [LOSSLESS, BOUNDED], ids=lambda settings: settings.codec)
def test_float8_is_lossless(name: str, dtype: torch.dtype, settings: OffloadSettings) -> None:
    spec = full(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    ((part,),) = Caches({"a": spec}).parts(settings, dtype=name)
    assert part.codec_name == "lossless" and part.slot_codec.kv.dtype == dtype


@pytest.mark.parametrize(
    ("spec", "cache_dtype"),
    [
        (full(dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4), "nvfp4"),
        (full(dtype=torch.int8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD), "int8_per_token_head"),
        (full(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR), "fp8_ds_mla"),
        (full(state_content_bytes=272), "auto"),
        (full(num_head_slots=1), "auto"),
    ],
    ids=["nvfp4", "int8 with scales", "fp8_ds_mla", "packed content", "packed heads"],
)
def test_what_is_not_understood_is_raw(spec: Any, cache_dtype: str) -> None:
    assert value_dtype(spec, cache_dtype) is None
    caches = Caches({"a": full()})
    caches.groups[0].kv_cache_spec = spec
    caches.groups[0].layer_names = ["a"]
    raw = torch.zeros(BLOCKS, spec.page_size_bytes, dtype=torch.int8)
    caches.canonical = CanonicalKVCaches(
        [CanonicalKVCacheTensor(raw, spec.page_size_bytes)], [[CanonicalKVCacheRef(0, spec.page_size_bytes)]]
    )
    caches.bytes_per_block = spec.page_size_bytes
    ((part,),) = caches.parts(BOUNDED, dtype=cache_dtype)
    assert part.codec_name == "raw" and part.slot_codec.kv.is_opaque


def test_hybrid_models() -> None:
    """Full and sliding attention are compressed; a state-space layer's pages are bytes, and set the size of rows."""
    both = Caches({"a": full(), "b": full()}, {"c": sliding(), "d": sliding()})
    assert [[part.codec_name for part in parts] for parts in both.parts(BOUNDED)] == [["bounded"], ["bounded"]]

    state = MambaSpec(block_size=16, shapes=((8, 1024),), dtypes=(torch.float32,), page_size_padded=32768)
    mamba = Caches({"a": full(), "b": full()}, {"s": state})
    attention, states = mamba.parts(BOUNDED)
    assert [part.codec_name for part in attention] == ["bounded"]
    assert [part.codec_name for part in states] == ["raw"]
    assert mamba.rows(BOUNDED) >= 4 * 32768


def test_layers_of_two_kinds_in_one_group() -> None:
    """As with MLA's indexers: what is understood is compressed into the room that the rest leaves."""
    index = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=132, dtype=torch.uint8)
    caches = Caches({"a": mla(), "a.index": index, "b": mla(), "b.index": index})
    row = caches.rows(BOUNDED)
    # Schedulers see the first layer's spec only, and must come to the same.
    seen = Caches({"a": mla(), "a.index": index, "b": mla(), "b.index": index})
    seen.groups[0].kv_cache_spec = mla()
    assert seen.rows(BOUNDED) == row
    ((raw, coded),) = caches.parts(BOUNDED)
    assert (raw.codec_name, coded.codec_name) == ("raw", "bounded")
    assert raw.stop <= coded.offset and coded.stop <= row

    with pytest.raises(ValueError, match="set compression_ratio to 1"):
        caches.parts(BOUNDED, row=2048)


def test_layers_that_cannot_be_told_apart() -> None:
    """vLLM's packed layout: one region for all layers of a block."""
    caches = Caches({"a": full(), "b": full(dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4)})
    region = torch.zeros(BLOCKS, caches.bytes_per_block, dtype=torch.int8)
    caches.canonical = CanonicalKVCaches(
        [CanonicalKVCacheTensor(region, caches.bytes_per_block)], [[CanonicalKVCacheRef(0, caches.bytes_per_block)]]
    )
    ((part,),) = caches.parts(RAW)
    assert part.codec_name == "raw" and part.slot_codec.kv.page_bytes == caches.bytes_per_block
