"""What a row of host memory holds: how large it is (known before there are caches), and how an engine's caches become
the parts of it.

A row belongs to one chunk of one KV cache group. The layers of a group that are plain attention make one part, which is
compressed; all others make another, which is stored raw. Each part is a slot of its own in the row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvferry.codecs.raw import Raw
from kvferry.codecs.slots import SlotCodec, raw_slot_bytes, slot_bytes_for
from kvferry.integrations.vllm.compat import (
    PLAIN_SPECS,
    AttentionSpec,
    CanonicalKVCaches,
    KVQuantMode,
    init_logger,
    layer_specs_of,
    offloaded_groups,
)
from kvferry.integrations.vllm.settings import FIT, OffloadSettings
from kvferry.pages import ROW_STEP, PagedKV

logger = init_logger(__name__)

_ROW_STEP_BYTES = 512
_E5M2 = "e5m2"
_CHOOSE_ANOTHER = "set compression_codec to bounded"


def round_down(value: int, step: int) -> int:
    return value // step * step


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Part:
    """One slot of a group's rows: `pages` as `slot_codec` codes them, from byte `offset` of a row on. Each block of
    vLLM's is `pages_per_block` of these pages."""

    slot_codec: SlotCodec
    offset: int
    pages_per_block: int

    @property
    def codec_name(self) -> str:
        return self.slot_codec.codec.name

    @property
    def stop(self) -> int:
        return self.offset + self.slot_codec.slot_bytes


def value_dtype(spec: Any, cache_dtype: str) -> torch.dtype | None:
    """What a layer's pages hold, if it is plain attention whose values we understand; else None.

    `cache_dtype` is vLLM's name of the cache's dtype: one of float8 is told by it alone, the tensors are bytes.
    """
    if type(spec) not in PLAIN_SPECS or spec.tokens_per_state != 1 or spec.state_content_bytes is not None:
        return None
    if spec.num_head_slots not in (None, spec.num_kv_heads) or spec.block_size % ROW_STEP:
        return None
    if spec.kv_quant_mode == KVQuantMode.FP8_PER_TENSOR and cache_dtype.startswith("fp8"):
        # fp8_ds_mla and its like are bytes of several kinds.
        if cache_dtype in ("fp8", "fp8_e4m3"):
            return torch.float8_e4m3fn
        return torch.float8_e5m2 if cache_dtype.endswith(_E5M2) else None
    if spec.kv_quant_mode != KVQuantMode.NONE:
        return None
    dtype: torch.dtype = spec.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else None


def transformed_layers(kv_cache_config: Any, cache_dtype: str) -> tuple[int, int]:
    """Number of layers and width of their heads, of a model whose layers are all plain attention of one KV cache group.
    Raises `ValueError` for others, which the codec transform does not take."""
    groups = offloaded_groups(kv_cache_config)
    if len(groups) != 1:
        raise ValueError(
            f"the model has {len(groups)} KV cache groups, and the codec transform takes models whose layers are all "
            f"alike: {_CHOOSE_ANOTHER}"
        )
    for name, spec in layer_specs_of(groups[0]).items():
        widths = _widths(spec) if value_dtype(spec, cache_dtype) is not None else []
        if len(widths) != 2 or widths[0] != widths[1]:
            raise ValueError(
                f"layer {name} is {type(spec).__name__}, not plain attention with K and V of one width in values of "
                f"their own, which the codec transform needs: {_CHOOSE_ANOTHER}"
            )
    return len(groups[0].layer_names), widths[0]


def _layer_number(name: str) -> int:
    """The number in a layer's name, such as 3 in "model.layers.3.self_attn.attn"."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(numbers[0]) if numbers else 0


# -- before there are caches: how large rows are ----------------------------------------------------------------------


def worker_row_bytes(
    kv_cache_config: Any, settings: OffloadSettings, cache_dtype: str, blocks_per_chunk: int, bytes_per_block: int
) -> int:
    """Bytes of a row that one worker needs, the most of all groups; a multiple of 512. Scheduler and workers come to
    the same. `bytes_per_block`: what one worker keeps on the GPU for a block, all layers."""
    groups = offloaded_groups(kv_cache_config)
    return max(_group_row_bytes(group, settings, cache_dtype, blocks_per_chunk, bytes_per_block) for group in groups)


def _group_row_bytes(
    group: Any, settings: OffloadSettings, cache_dtype: str, blocks_per_chunk: int, bytes_per_block: int
) -> int:
    # Schedulers know the first layer's spec only. Where layers differ, it stands for all of them.
    spec = next(iter(layer_specs_of(group).values()))
    dtype = value_dtype(spec, cache_dtype)
    layer_bytes = spec.page_size_bytes
    if layer_bytes * len(group.layer_names) <= bytes_per_block:
        # The same for every layer: sizes can be told exactly.
        layers = len(group.layer_names)
        if dtype is not None:
            kv = _paged([_stand_in(spec, dtype)] * layers, _widths(spec))
            codec, ratio = settings.codec_for(dtype, (0, spec.num_kv_heads)), settings.ratio_for(dtype)
            exact = slot_bytes_for(kv, codec, blocks_per_chunk, ratio)
        else:
            page = torch.empty((1, round_up(layer_bytes, ROW_STEP)), dtype=torch.uint8, device="meta")
            exact = raw_slot_bytes(PagedKV.opaque([page] * layers), blocks_per_chunk)
        if bytes_per_block - layer_bytes * layers < layer_bytes:
            return exact
    raw = bytes_per_block * blocks_per_chunk
    if dtype is None or isinstance(settings.codec_for(dtype), Raw):
        # Header, directory and tile headers of raw slots take less than a thirty-second of their values.
        return round_up(raw + raw // 32 + 4096, _ROW_STEP_BYTES)
    return round_up(int(raw / settings.ratio_for(dtype)), _ROW_STEP_BYTES)


def _stand_in(spec: Any, dtype: torch.dtype) -> Tensor:
    """A layer of one block, without memory."""
    shape = (1, spec.num_kv_heads, spec.block_size, sum(_widths(spec)))
    return torch.empty(shape, dtype=dtype, device="meta")


def _widths(spec: Any) -> list[int]:
    """Channels of a token's K and V; of the one latent where there is no V."""
    return [width for width in (spec.head_size, spec.head_size_v) if width]


def _paged(layers: Sequence[Tensor], widths: Sequence[int]) -> PagedKV:
    """`layers` `[pages, heads, tokens, channels]`, each token's K before its V, of `widths` channels."""
    if len(widths) == 1 or widths[0] == widths[1]:
        return PagedKV.heads_first(layers, widths[0])
    return PagedKV.heads_only([half for layer in layers for half in layer.split(list(widths), dim=3)])


# -- with the caches: the parts of a row ------------------------------------------------------------------------------


def group_parts(
    kv_cache_config: Any,
    kv_caches: dict[str, Tensor],
    canonical: CanonicalKVCaches,
    settings: OffloadSettings,
    cache_dtype: str,
    blocks_per_chunk: int,
    row_bytes: int,
    *,
    first_head: int = 0,
    max_positions: int = 1 << 15,
) -> list[list[Part]]:
    """The parts of each group's rows. `kv_caches` are the engine's tensors by layer, `canonical` the same memory as
    vLLM's workers see it. `first_head`: number, among all of the model's, of the first KV head that they hold;
    `max_positions`: tokens of the longest sequence. Raises `ValueError` if raw parts alone do not fit a row, and for
    what the codec transform does not take."""
    made = []
    for number, group in enumerate(offloaded_groups(kv_cache_config)):
        refs = canonical.group_data_refs[number]
        num_blocks = kv_cache_config.num_blocks
        specs = layer_specs_of(group)
        plain = _plain_layers(specs, kv_caches, cache_dtype, num_blocks)
        one_ref_a_layer = len(refs) == len(specs)
        if not one_ref_a_layer and len(plain) < len(specs):
            plain = {}  # layers are packed into blocks that cannot be told apart
        rest = [ref for name, ref in zip(specs, refs, strict=False) if name not in plain] if one_ref_a_layer else refs
        opaque = [_bytes_of(canonical, ref, num_blocks) for ref in rest] if len(plain) < len(specs) else []
        if settings.transforms:
            plain = dict(sorted(plain.items(), key=lambda item: _layer_number(item[0])))  # as the profile has them
        made.append(
            _parts(
                number, list(plain.values()), opaque, settings, blocks_per_chunk, num_blocks, row_bytes, first_head,
                max_positions,
            )
        )  # fmt: skip
    return made


def _plain_layers(
    specs: dict[str, AttentionSpec], kv_caches: dict[str, Tensor], cache_dtype: str, num_blocks: int
) -> dict[str, tuple[Tensor, list[int]]]:
    """The layers that can be compressed together, each with its widths: all of one dtype and of as many pages."""
    found: dict[str, tuple[Tensor, list[int]]] = {}
    kind: tuple[torch.dtype, int, int] | None = None
    for name, spec in specs.items():
        dtype, tensor = value_dtype(spec, cache_dtype), kv_caches.get(name)
        if (
            dtype is None
            or not isinstance(tensor, Tensor)
            or tensor.dim() != 4
            or tensor.dtype.itemsize != dtype.itemsize
        ):
            continue
        pages, heads, tokens, channels = tensor.shape
        fits = pages % num_blocks == 0 and pages * tokens == num_blocks * spec.block_size and tokens % ROW_STEP == 0
        if not fits or heads != spec.num_kv_heads or channels != sum(_widths(spec)) or tensor.stride(3) != 1:
            continue
        kind = kind or (dtype, pages, tokens)
        if (dtype, pages, tokens) == kind:
            found[name] = (tensor if tensor.dtype == dtype else tensor.view(dtype), _widths(spec))
    return found


def _bytes_of(canonical: CanonicalKVCaches, ref: Any, num_blocks: int) -> Tensor:
    """A layer's pages, or those of all layers of a group, as bytes `[blocks, page_bytes]`."""
    tensor = canonical.tensors[ref.tensor_idx].tensor
    pages: Tensor = tensor.view(torch.uint8).view(num_blocks, -1)
    # What pads a page is nobody's, but rows of bytes come in eights.
    return pages[:, : min(pages.shape[1], round_up(ref.page_size_bytes, ROW_STEP))]


def _parts(
    number: int,
    plain: Sequence[tuple[Tensor, list[int]]],
    opaque: Sequence[Tensor],
    settings: OffloadSettings,
    blocks_per_chunk: int,
    num_blocks: int,
    row_bytes: int,
    first_head: int,
    max_positions: int,
) -> list[Part]:
    parts: list[Part] = []
    at = 0
    if opaque and settings.transforms:
        raise ValueError(
            f"{len(opaque)} layers of KV cache group {number} are not laid out as plain attention, which the codec "
            f"transform needs: {_CHOOSE_ANOTHER}"
        )
    if opaque:
        kv = PagedKV.opaque(opaque)
        slot_bytes = raw_slot_bytes(kv, blocks_per_chunk)
        parts.append(Part(SlotCodec(kv, Raw(), blocks_per_chunk, slot_bytes), 0, 1))
        at = slot_bytes
        logger.info(
            "kvferry: %d layers of KV cache group %d are not plain attention; they are stored raw (%d of %d bytes of a "
            "row)", len(opaque), number, slot_bytes, row_bytes,
        )  # fmt: skip
    if at > row_bytes or (plain and row_bytes - at < _ROW_STEP_BYTES):
        raise ValueError(
            f"KV cache group {number} has {at} bytes of a row of {row_bytes} in layers that are stored raw: set "
            "compression_ratio to 1"
        )
    if plain:
        kv = _mixed([layer for layer, _ in plain], [widths for _, widths in plain])
        pages_per_block = kv.num_pages // num_blocks
        chunk_pages = blocks_per_chunk * pages_per_block
        slot_bytes = min(round_down(row_bytes - at, _ROW_STEP_BYTES), raw_slot_bytes(kv, chunk_pages))
        codec = settings.codec_for(kv.dtype, (first_head, plain[0][0].shape[1]))
        if codec.name != settings.codec and settings.enabled:
            logger.info("kvferry: caches of %s are stored %s: %s does not take them",
                        kv.dtype, codec.name, settings.codec)  # fmt: skip
        slot_codec = SlotCodec(
            kv,
            codec,
            chunk_pages,
            slot_bytes,
            "relax" if settings.overflow == FIT else settings.overflow,
            settings.max_relaxations,
            num_sms=settings.num_sms,
            max_positions=max_positions,
        )
        parts.append(Part(slot_codec, at, pages_per_block))
    return parts


def _mixed(layers: Sequence[Tensor], widths: Sequence[list[int]]) -> PagedKV:
    """As `_paged`, the widths each layer's own."""
    if all(each == widths[0] for each in widths):
        return _paged(layers, widths[0])
    halves = [half for layer, each in zip(layers, widths, strict=True) for half in layer.split(each, dim=3)]
    return PagedKV.heads_only(halves)
