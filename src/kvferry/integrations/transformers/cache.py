"""transformers 5 caches to encoded layers and back.

Covers `DynamicCache` with full-attention and sliding-window layers, which is what `generate` and a model's forward make
for decoder-only models. Everything a layer knows is kept, so that generation continues as from the original cache; in
lossless mode bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvferry
from kvferry.errors import CorruptFrame
from kvferry.policy import CodecChoice as CodecChoice
from kvferry.policy import KOrV, check_choice, choose

TensorEncoder = Callable[[int, KOrV, Tensor], bytes]
TensorDecoder = Callable[[bytes, "TensorLayout", torch.device], Tensor]

LAYER_TYPES: dict[str, type[DynamicLayer]] = {
    "full": DynamicLayer,
    "sliding": DynamicSlidingWindowLayer,
}
# Set by a layer's own initialisation from the restored tensors; everything else a layer knows must be a plain value.
DERIVED_ATTRIBUTES = {"keys", "values", "dtype", "device", "is_initialized", "_sliding_window_tensor"}


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype that a frame must decode to."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerLayout:
    """One layer without its values: its type, its attributes and, once initialised, its device and tensors."""

    kind: str  # a key of LAYER_TYPES
    attributes: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    device: torch.device | None = None
    tensors: tuple[TensorLayout, TensorLayout] | None = None  # K and V; None before the layer's first update


@dataclass(frozen=True)
class CacheLayout:
    """A cache without its values. `grows` says whether updates may add layers (a cache made without a config)."""

    layers: tuple[LayerLayout, ...]
    grows: bool


@dataclass(frozen=True)
class EncodedCache:
    """Frames of all initialised layers, K then V, in layer order, and what is needed to build the cache again."""

    frames: tuple[bytes, ...]
    raw_bytes: int
    layout: CacheLayout


def encode_cache(cache: DynamicCache, codec: CodecChoice) -> EncodedCache:
    """Encode every layer's K and V, each `[batch, kv_heads, tokens, head_dim]`, to one frame.

    `codec` is a codec or a callable `(layer_index, "k" | "v", tensor) -> codec`, such as what `kvferry.policy` has; a
    codec that can be called, as a `Transform` of a whole profile, is asked like any other callable. The cache is only
    read. Raises `TypeError` for caches and layers that are not covered, naming them and what to use instead, and what
    `kvferry.compress` raises.
    """

    def encode(layer_index: int, which: KOrV, tensor: Tensor) -> bytes:
        return kvferry.compress(tensor, choose(codec, layer_index, which, tensor))

    check_choice(codec)
    return encode_cache_with(cache, encode)


def decode_cache(encoded: EncodedCache, device: torch.device | str | None = None) -> DynamicCache:
    """A new cache on `device` (default: where each layer was). Raises `CorruptFrame` for damaged frames."""

    def decode(frame: bytes, layout: TensorLayout, target: torch.device) -> Tensor:
        return kvferry.decompress(frame, device=target)

    return decode_cache_with(encoded, decode, device)


def encode_cache_with(cache: DynamicCache, encode: TensorEncoder) -> EncodedCache:
    """As `encode_cache`, with any function that turns a tensor into bytes."""
    check_cache(cache)
    frames: list[bytes] = []
    layouts: list[LayerLayout] = []
    raw_bytes = 0
    layer: Any  # of a type that describe_layer has checked
    for index, layer in enumerate(cache.layers):
        layout = describe_layer(index, layer)
        layouts.append(layout)
        if layout.tensors is None:
            continue
        which: KOrV
        for which, tensor in (("k", layer.keys), ("v", layer.values)):
            # A forward outside no_grad leaves tensors that require grad; what is stored is their values.
            frames.append(encode(index, which, tensor.detach()))
            raw_bytes += tensor.numel() * tensor.element_size()
    layout_of_all = CacheLayout(tuple(layouts), grows=cache.layer_class_to_replicate is not None)
    return EncodedCache(tuple(frames), raw_bytes, layout_of_all)


def decode_cache_with(
    encoded: EncodedCache, decode: TensorDecoder, device: torch.device | str | None = None
) -> DynamicCache:
    """As `decode_cache`, with the function that undoes what `encode_cache_with` was given."""
    cache = DynamicCache()
    frames = iter(encoded.frames)
    for index, layout in enumerate(encoded.layout.layers):
        layer = build_layer(layout)
        if layout.tensors is not None:
            target = torch.device(device) if device is not None else layout.device
            assert target is not None
            keys, values = (_decode_checked(index, next(frames), part, target, decode) for part in layout.tensors)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    if not encoded.layout.grows:
        cache.layer_class_to_replicate = None
    return cache


def check_cache(cache: object) -> None:
    """Raise `TypeError`, with the remedy, for anything but a `DynamicCache` that holds its own layers."""
    if isinstance(cache, (tuple, list)):
        raise TypeError("past_key_values is in the old tuple form: wrap it, transformers.DynamicCache(past_key_values)")
    # Subclasses and other caches keep state of their own, which would be lost.
    if type(cache) is not DynamicCache:
        raise TypeError(
            f"cannot hold a {type(cache).__name__}: run the model with transformers.DynamicCache(config=model.config)"
        )
    if cache.offloading:
        raise TypeError("cannot hold a cache made with offloading=True, which moves its layers itself: make it without")


def describe_layer(index: int, layer: Any) -> LayerLayout:
    """Everything about a layer but its values. Raises `TypeError` for layers that keep more than K and V."""
    kind = next((name for name, layer_type in LAYER_TYPES.items() if type(layer) is layer_type), None)
    if kind is None:
        raise TypeError(
            f"layer {index} of the cache is a {type(layer).__name__}; only full-attention and sliding-window layers "
            "(DynamicLayer, DynamicSlidingWindowLayer) can be held: keep this model's cache where it is"
        )
    attributes: dict[str, Any] = {name: value for name, value in vars(layer).items() if name not in DERIVED_ATTRIBUTES}
    for name, value in attributes.items():
        if not isinstance(value, (int, float, str, type(None))):
            raise TypeError(f"layer {index} of the cache keeps {name}, a {type(value).__name__}, which cannot be held")
    if not layer.is_initialized:
        return LayerLayout(kind, attributes)
    tensors = (
        TensorLayout(tuple(layer.keys.shape), layer.keys.dtype),
        TensorLayout(tuple(layer.values.shape), layer.values.dtype),
    )
    return LayerLayout(kind, attributes, layer.device, tensors)


def build_layer(layout: LayerLayout) -> DynamicLayer:
    """A layer of the described type with its attributes, not yet initialised."""
    arguments: dict[str, Any] = {}
    if layout.kind == "sliding":
        arguments["sliding_window"] = layout.attributes["sliding_window"]
    layer = LAYER_TYPES[layout.kind](**arguments)
    for name, value in layout.attributes.items():
        setattr(layer, name, value)
    return layer


def _decode_checked(
    index: int, frame: bytes, layout: TensorLayout, device: torch.device, decode: TensorDecoder
) -> Tensor:
    tensor = decode(frame, layout, device)
    if tuple(tensor.shape) != layout.shape or tensor.dtype != layout.dtype:
        raise CorruptFrame(
            f"a frame of layer {index} holds {tuple(tensor.shape)} {tensor.dtype}, "
            f"but the cache had {layout.shape} {layout.dtype}"
        )
    return tensor
