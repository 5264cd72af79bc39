"""Which model a profile is for: the shape of its cache, its RoPE as its keys show it, a digest of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from kvferry.codecs.transform.profile import Profile
from kvferry.codecs.transform.rope import Rope
from kvferry.errors import ProfileMismatch
from kvferry.evaluation import prefill
from kvferry.evaluation.prefix import cache_tensors

SAMPLED_PER_PARAMETER = 512  # values whose bytes go into the digest
PROBE_TOKENS = 64
SPREAD_ALLOWED = 0.1  # of the keys' length, by rounding


@dataclass(frozen=True)
class CacheShape:
    """Of every layer's K and V: `layers` times `[batch, heads, tokens, head_dim]` of `dtype`."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype


def cache_shape(cache: Any, tokens: int) -> CacheShape:
    """The shape of a cache of `tokens` tokens. Raises `ValueError` where layers differ, or do not hold all tokens."""
    layers = len(cache.layers)
    held = cache_tensors(cache)
    shapes = {tuple(tensor.shape) for tensor in held}
    if len(held) != 2 * layers or len(shapes) != 1:
        raise ValueError(
            f"{layers} layers keep {len(held)} tensors of shapes {sorted(shapes)}: only models whose layers all keep K "
            "and V of one shape can be calibrated (no hybrid, cross-layer or latent attention)"
        )
    _, heads, kept, head_dim = next(iter(shapes))
    if kept != tokens:
        raise ValueError(
            f"the cache keeps {kept} of {tokens} tokens (sliding-window attention): give --window-tokens {kept} or less"
        )
    return CacheShape(layers, heads, head_dim, held[0].dtype)


def probe_cache(model: Any, token: int, rope: Rope | None = None) -> tuple[CacheShape, Rope]:
    """The shape of the model's cache, and its RoPE (`rope`, or the one its configuration states), checked on its keys.

    A text of one token repeated gives a model with RoPE nothing to tell positions by, in any layer: un-rotated keys
    must be alike. Raises `ValueError` if they are not, or the configuration's RoPE depends on a request's length.
    """
    cache = _cache_of_one_token(model, token)
    shape = cache_shape(cache, PROBE_TOKENS)
    try:
        stated = rope or Rope.from_config(model.config.get_text_config())
    except ValueError as error:
        raise ValueError(f"{error} (--no-rope)") from error
    if stated.head_dim != shape.head_dim:
        raise ValueError(f"the configuration states head_dim {stated.head_dim}, the cache has {shape.head_dim}")
    if stated.rotary_dim:
        cos, sin = (part.to(cache.layers[0].keys.device) for part in stated.table(torch.arange(PROBE_TOKENS)))
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            keys = layer.keys[0].float()
            unrotated = _spread(stated.unrotate(keys, cos, sin))
            if unrotated > SPREAD_ALLOWED and unrotated > 0.5 * _spread(keys):
                raise ValueError(
                    f"keys of layer {index} are not rotated as the configuration states (they differ by "
                    f"{unrotated:.0%} between positions once un-rotated): calibrate without RoPE (--no-rope)"
                )
    return shape, stated


def model_identity(model: Any, name: str, shape: CacheShape) -> dict[str, Any]:
    """What a profile says about its model. `weights` is a digest of a sample of every parameter's bytes: another
    checkpoint, or the same one in another dtype, has another."""
    return {
        "name": name,
        "architecture": type(model).__name__,
        "layers": shape.layers,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": weights_digest(model),
    }


def weights_digest(model: Any) -> str:
    """32 hexadecimal digits of names, shapes and `SAMPLED_PER_PARAMETER` evenly spread values of all parameters."""
    state = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // SAMPLED_PER_PARAMETER))].contiguous()
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        state.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def check_model(profile: Profile, model: Any) -> None:
    """Raise `ProfileMismatch`, naming what differs, unless `profile` was calibrated for `model`, in its dtype.

    The name is not compared: a model may be moved. A profile without a model's identity is compared by shape only.
    """
    token = model.config.get_text_config().vocab_size // 2
    shape = cache_shape(_cache_of_one_token(model, token), PROBE_TOKENS)
    rope = Rope.from_config(model.config.get_text_config()) if profile.rope.rotary_dim else None
    profile.check(layers=shape.layers, heads=shape.heads, head_dim=shape.head_dim, rope=rope)
    if not profile.model:
        return
    own = model_identity(model, "", shape)
    for key in ("architecture", "dtype", "parameters", "weights"):
        if profile.model.get(key) != own[key]:
            raise ProfileMismatch(
                f"the profile is of {profile.model.get('name')!r}, with {key} {profile.model.get(key)}; this model has "
                f"{own[key]}: calibrate this model (kvferry calibrate)"
            )


def _cache_of_one_token(model: Any, token: int) -> Any:
    """The cache of `PROBE_TOKENS` times the same."""
    device = next(model.parameters()).device
    return prefill(model, torch.full((1, PROBE_TOKENS), token, dtype=torch.int64, device=device))


def _spread(keys: Tensor) -> float:
    """How much keys `[heads, tokens, head_dim]` differ from their mean over tokens, relative to their length."""
    return float((keys - keys.mean(1, keepdim=True)).norm() / keys.norm().clamp(min=1e-30))
