"""Batches of real KV for the codec `transform`: the cache of the model that the profile is of, at its own positions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvferry.bench.codec_batch import Batch, Kind, Timer, basis_of
from kvferry.bench.pipeline_cache import PagedCache, Shape
from kvferry.blocks import MANTISSA_BITS
from kvferry.codecs.slots import raw_slot_bytes
from kvferry.codecs.transform import ROUNDING, Transform, l2_bound, relative_error
from kvferry.codecs.transform.profile import SIDES, Profile
from kvferry.codecs.transform.reference import Angles, Matrices, group_rows
from kvferry.errors import ProfileMismatch


def check_profile(tensors: Mapping[str, Tensor], profile: Profile) -> None:
    """Raise `ProfileMismatch` unless `profile` is of layers and heads like those of `tensors` (as for `PagedCache`),
    `ValueError` for a dtype that `Transform` does not take."""
    first = next(iter(tensors.values()))
    try:
        profile.check(layers=len(tensors) // 2, heads=first.shape[1], head_dim=first.shape[3])
    except ProfileMismatch as error:
        raise ProfileMismatch(f"profile and KV are not of the same model: {error}, or take KV of the other") from error
    if first.dtype not in Transform.dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in Transform.dtypes)
        raise ValueError(f"the KV is {first.dtype}, and codec transform takes {wanted}: make it with a model in those")


def describe_profile(profile: Profile) -> dict[str, Any]:
    """What a result must say of it."""
    shape = {name: getattr(profile, name) for name in ("heads", "head_dim", "group_heads")}
    return {"digest": profile.digest, "layers": len(profile.layers), **shape, "basis": basis_of(profile)}


class ModelCache(PagedCache):
    """A `PagedCache` of the very model that made `tensors`: every head of every layer holds its own values, at their
    own positions. Sequences are cut to whole chunks of `chunk_tokens` and follow one another, again and again.

    Raises `ValueError` for sequences shorter than a chunk.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], shape: Shape, tokens: int, chunk_tokens: int, device: torch.device
    ) -> None:
        length = next(iter(tensors.values())).shape[2]
        self.sequence_tokens, self._chunk_tokens = length // chunk_tokens * chunk_tokens, chunk_tokens
        if not self.sequence_tokens:
            raise ValueError(
                f"the KV's sequences of {length} tokens are shorter than a chunk of {chunk_tokens}: take longer ones"
            )
        super().__init__(tensors, shape, tokens, 1.0, device)

    def places(self, tokens: Tensor) -> Tensor:
        """Where `tokens`, counted through the cache, are in the sequences, one behind the other. The first chunk is a
        sequence's second (if it has one): at position 0, a codec that ignores positions would not be noticed."""
        return tokens + self._chunk_tokens

    def _values(self, side: Tensor, number: int, head: int, wanted: Tensor) -> Tensor:
        sequences = len(side) // self.shape.heads
        sequence, position = self.places(wanted) // self.sequence_tokens, self.places(wanted) % self.sequence_tokens
        return side[sequence % sequences * self.shape.heads + head, position]


class TransformBatch(Batch):
    """A `Batch` in a `ModelCache` of the `profile`'s layers and heads (`check_profile`), with its chunks' positions."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        profile: Profile,
        page_tokens: int,
        chunk_tokens: int,
        num_bytes: int,
        timer: Timer,
        device: torch.device,
    ) -> None:
        self.profile = profile
        shape = Shape(len(profile.layers), profile.heads, page_tokens)
        super().__init__(tensors, shape, chunk_tokens, num_bytes, timer, device)
        starts = torch.arange(self.sets * self.chunks, device=device) * chunk_tokens
        assert isinstance(self.cache, ModelCache)
        found = self.cache.places(starts) % self.cache.sequence_tokens
        self.positions: Tensor = found.to(torch.int32).view(self.sets, self.chunks)
        self.max_positions = max(self.max_positions, self.cache.sequence_tokens)

    def _cache(
        self, tensors: Mapping[str, Tensor], shape: Shape, tokens: int, chunk_tokens: int, device: torch.device
    ) -> PagedCache:
        return ModelCache(tensors, shape, tokens, chunk_tokens, device)

    @property
    def _slot_bytes(self) -> int:
        return raw_slot_bytes(self.kv, self.chunk_pages, Transform(self.profile))

    def share_of_bound(self, kind: Kind) -> float:
        """Largest Euclidean error of a group's vector over what `Transform` promises of it, in float64: `l2_bound`,
        `relative_error` of its distance from the mean, float32 rounding of its length, and rounding to the dtype."""
        profile, shape = self.profile, self.cache.shape
        offsets = torch.arange(self.chunk_pages * shape.page_tokens, device=self.positions.device)
        positions = (self.positions.view(-1, 1) + offsets).flatten()
        angles = {side: Angles.of(profile, side, positions) for side in SIDES}
        worst = []
        for number, layer in enumerate(profile.layers):
            halves = (both.split(profile.head_dim, 3) for both in self._both(number))
            for side, part, before, after in zip(SIDES, layer, *halves, strict=True):
                matrices, turn = Matrices.of(part, before.device), angles[side]
                x, y, units = (
                    values.transpose(0, 1).flatten(1, 2) for values in (before.double(), after.double(), _units(after))
                )
                turned = x if turn is None else turn.rope.unrotate(x, turn.cos, turn.sin)
                distance = (group_rows(turned, matrices) - matrices.mean[:, None]).norm(dim=-1)
                error, length, rounding = (group_rows(z, matrices).norm(dim=-1) for z in (y - x, x, 0.5 * units))
                allowed = l2_bound(part, 1.0) + relative_error(part) * distance + ROUNDING * length + rounding
                worst.append((error / allowed).amax())
        return float(torch.stack(worst).amax())


def _units(values: Tensor) -> Tensor:
    """A unit in the last place of each value, float64."""
    smallest = torch.finfo(values.dtype).smallest_normal
    exponent = torch.frexp(values.double().abs().clamp(min=smallest)).exponent - 1
    return torch.exp2((exponent - MANTISSA_BITS[values.dtype]).double())
