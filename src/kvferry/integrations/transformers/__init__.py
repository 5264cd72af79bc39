"""Hugging Face transformers: caches to encoded layers and back, and loading of models."""

from kvferry.integrations.transformers.cache import (
    CacheLayout,
    CodecChoice,
    EncodedCache,
    LayerLayout,
    TensorLayout,
    decode_cache,
    encode_cache,
)

__all__ = [
    "CacheLayout",
    "CodecChoice",
    "EncodedCache",
    "LayerLayout",
    "TensorLayout",
    "decode_cache",
    "encode_cache",
]
