"""Rotary position embeddings (RoPE), to be taken off keys before they are transformed and put on again.

Rotations keep lengths: whatever angles are used here, the error bound holds. The model's own angles make the keys of a
layer alike at all positions, which is what a transform gains from.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTERLEAVED = {
    "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium", "llama4_text",
}  # fmt: skip
"""Model types whose pairs are neighbouring channels; all others pair channel i with i + rotary_dim/2."""
_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Channel pairs of a head of `head_dim` turned by `position * inv_freq[i]` radians (J. Su et al., "RoFormer",
    arXiv:2104.09864, section 3.4). The first `rotary_dim` channels are pairs (i, i + rotary_dim/2), or (2i, 2i+1) if
    `interleaved`; the others are left alone.

    Raises `ValueError` unless `rotary_dim` is twice the number of frequencies and at most `head_dim`.
    """

    head_dim: int
    rotary_dim: int
    inv_freq: tuple[float, ...]
    interleaved: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", tuple(float(f) for f in self.inv_freq))
        if self.rotary_dim != 2 * len(self.inv_freq) or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} with {len(self.inv_freq)} frequencies and head_dim={self.head_dim}: "
                "rotary_dim is twice the number of frequencies, and at most head_dim"
            )
        if not all(math.isfinite(f) for f in self.inv_freq):
            raise ValueError("inv_freq holds a value that is not finite")

    @classmethod
    def none(cls, head_dim: int) -> "Rope":
        """No rotation."""
        return cls(head_dim, 0, ())

    @classmethod
    def from_config(cls, config: Any) -> "Rope":
        """From a transformers configuration of a language model (`config.get_text_config()`).

        Kinds: default; linear (position interpolation, S. Chen et al., arXiv:2306.15595, section 2.3); llama3 (Llama
        3.1's smoothing, A. Dubey et al., arXiv:2407.21783, section 3.4.2, as its configuration defines it); yarn (B.
        Peng et al., arXiv:2309.00071, sections 3.2 and 3.3; its scaling of attention changes no angle). Models without
        RoPE, or whose configuration has no base for it, give `none`. Raises `ValueError` for other kinds, whose angles
        depend on a request's length, and for parameters that are missing.
        """
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        theta = given.get("rope_theta", getattr(config, "rope_theta", None))
        if theta is None and any(isinstance(value, dict) for value in given.values()):
            raise ValueError(
                f"rope_parameters differ from layer to layer ({', '.join(map(str, given))}): calibrate with Rope.none"
            )
        if theta is None:
            return cls.none(head_dim)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _KINDS:
            raise ValueError(f"rope_type {kind!r} is not one of {', '.join(_KINDS)}: calibrate with Rope.none")
        share = given.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        rotary_dim = int(head_dim * (1.0 if share is None else share))
        scaled = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind]
        interleaved = getattr(config, "model_type", "") in _INTERLEAVED
        try:
            inv_freq = [theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]
            frequencies = tuple(scaled(inv_freq, given, theta, rotary_dim, config))
        except (KeyError, TypeError, ArithmeticError) as error:
            raise ValueError(
                f"{kind!r} cannot be had from rope_parameters {given} ({error!r}): calibrate with Rope.none"
            ) from error
        return cls(head_dim, rotary_dim, frequencies, interleaved)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[T, rotary_dim/2]` on the CPU, of integer `positions` `[T]`: the float64
        values, rounded."""
        angles = positions.cpu().double()[:, None] * torch.tensor(self.inv_freq, dtype=torch.float64)
        return angles.cos().float(), angles.sin().float()

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` float32 `[..., T, head_dim]` turned by the angles of `table`."""
        return self._turn(x, cos, sin)

    def unrotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Undo `rotate`, up to float32 rounding."""
        return self._turn(x, cos, -sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Every product and sum is rounded on its own, in this order: kernels do the same.
        if not self.rotary_dim:
            return x
        half = self.rotary_dim // 2
        rotary, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.interleaved:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
        else:
            first, second = rotary[..., :half], rotary[..., half:]
        turned = first * cos - second * sin, second * cos + first * sin
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat((joined, rest), -1) if rest.shape[-1] else joined


def _default(inv_freq: list[float], given: dict[str, Any], theta: float, dim: int, config: Any) -> list[float]:
    return inv_freq


def _linear(inv_freq: list[float], given: dict[str, Any], theta: float, dim: int, config: Any) -> list[float]:
    return [f / given["factor"] for f in inv_freq]


def _llama3(inv_freq: list[float], given: dict[str, Any], theta: float, dim: int, config: Any) -> list[float]:
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    context = given["original_max_position_embeddings"]
    scaled = []
    for f in inv_freq:
        turns = context * f / (2 * math.pi)  # of this pair within the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append((1 - share) * f / factor + share * f)
    return scaled


def _yarn(inv_freq: list[float], given: dict[str, Any], theta: float, dim: int, config: Any) -> list[float]:
    context = given.get("original_max_position_embeddings") or config.max_position_embeddings
    fast, slow = given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns within the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    factor = given.get("factor") or config.max_position_embeddings / context
    scaled = []
    for i, f in enumerate(inv_freq):
        interpolated = min(max((i - low) / width, 0.0), 1.0)
        scaled.append(f * (1 - interpolated) + f / factor * interpolated)
    return scaled
