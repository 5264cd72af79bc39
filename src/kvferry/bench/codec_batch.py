"""Batches of real KV in a paged cache, and what is checked and timed on them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.bench.pipeline_cache import PagedCache, Shape
from kvferry.bench.timing import (
    Clock,
    DeviceClock,
    Lap,
    QueuedClock,
    Rotation,
    SeriesClock,
    host_clock,
    host_series,
    summary,
)
from kvferry.blocks import as_bits
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.codecs.slots import SlotCodec, raw_slot_bytes
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform.profile import Profile
from kvferry.errors import KVFerryError
from kvferry.evaluation import one_cpu_thread
from kvferry.format.slot import HEADER_BYTES, SlotState, are_headers, read_headers
from kvferry.pages import PagedKV

Row = dict[str, Any]
MIB = 1 << 20
LEGS = ("encode", "decode")
CACHE_FACTOR = 4
"""Sets of input hold at least so many times the device's L2 cache."""


class Timer:
    """Times encoding and decoding on `device`: `iterations` laps of each, or what fits into `case_seconds`.
    `bytes_per_s` is the ceiling that speeds are compared with: bytes read and written by a device copy."""

    _FEWEST, _MOST_ALONE = 5, 20

    def __init__(self, device: torch.device, iterations: int, case_seconds: float) -> None:
        on_gpu = device.type == "cuda"
        index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else 0
        self._series: SeriesClock = QueuedClock(index) if on_gpu else host_series
        self._clock: Clock = DeviceClock(index) if on_gpu else host_clock
        self._iterations, self._case_seconds = iterations, case_seconds
        self.l2_bytes = int(torch.cuda.get_device_properties(index).L2_cache_size) if on_gpu else 0
        self.bytes_per_s = math.nan

    def sets(self, num_bytes: int) -> int:
        """Sets of `num_bytes` that do not fit into the L2 cache together."""
        return max(1, -(-CACHE_FACTOR * self.l2_bytes // num_bytes))

    def legs(
        self, calls: Mapping[str, Callable[[int], object]], sets: int, raw_bytes: int, *, waits: bool = False
    ) -> dict[str, Row]:
        """`timing.summary` of each of `calls`, which take the number of a set: as the device runs them when they are
        queued; beside it `alone_us`, the median of calls that find the device idle, and `queued`, false where the
        device had to wait for the host. `waits`: they wait for the device themselves, so there is only the latter."""
        rotation = Rotation(sets)
        for call in calls.values():
            call(0)
        alone = {name: self._alone(rotation, call) for name, call in calls.items()}
        laps, queued = alone, dict.fromkeys(calls, False)
        if not waits:
            laps, queued = rotation.laps(calls, self._iterations, self._series, self._case_seconds)
        return {
            name: summary(laps[name], raw_bytes)
            | {"alone_us": summary(alone[name], raw_bytes)["median_us"], "queued": queued[name]}
            for name in calls
        }

    def _alone(self, rotation: Rotation, call: Callable[[int], object]) -> list[Lap]:
        laps: list[Lap] = []
        while len(laps) < min(self._MOST_ALONE, self._iterations):
            laps.append(self._clock(rotation.next(call)))
            if len(laps) >= self._FEWEST and sum(lap.work for lap in laps) > self._case_seconds / 4:
                break
        return laps

    def row(
        self,
        calls: Mapping[str, Callable[[int], object]],
        sets: int,
        raw_bytes: int,
        moved_bytes: float,
        *,
        waits: bool = False,
    ) -> Row:
        """`legs` of calls that each read and write `moved_bytes` in all for `raw_bytes` of KV, and what the ceiling
        allows for that: `limit_us`, and of each call its share of it, `of_limit`."""
        limit_us = moved_bytes / self.bytes_per_s * 1e6
        legs = self.legs(calls, sets, raw_bytes, waits=waits)
        for leg in legs.values():
            leg["of_limit"] = limit_us / max(leg["median_us"], 1e-6)
        return {
            "raw_bytes": raw_bytes,
            "raw_mib": raw_bytes / MIB,
            "sets": sets,
            "moved_bytes": round(moved_bytes),
            "limit_us": limit_us,
            "limit_gb_per_s": raw_bytes / limit_us / 1e3,
            **legs,
        }


@dataclass(frozen=True)
class Kind:
    """One codec as it is measured. `mode`: a mode of `Bounded`, "lossless", "raw" or "transform"; `sigma`: the bound of
    `Bounded`, in standard deviations of each layer's K or V; `profile`: what "transform" needs."""

    mode: str
    packing: str
    sigma: float = 0.0
    profile: Profile | None = None

    @property
    def codec(self) -> Codec:
        if self.profile is not None:
            return Transform(self.profile, packing=self.packing)
        if self.mode == "raw":
            return Raw()
        if self.mode == "lossless":
            return Lossless(packing=self.packing)
        # The batch's bounds, line by line, stand in for 1.0.
        return Bounded(1.0, relative=False, mode=self.mode, packing=self.packing)

    @property
    def name(self) -> str:
        parts = [self.mode, *([] if self.mode == "raw" else [self.packing])]
        if self.profile is not None:
            parts.insert(1, basis_of(self.profile))
        return " ".join(parts) + (f", bound {self.sigma:g} sigma" if isinstance(self.codec, Bounded) else "")

    @property
    def facts(self) -> Row:
        """What a row says of it."""
        packing = None if self.mode == "raw" else self.packing
        sigma = self.sigma if isinstance(self.codec, Bounded) else None
        facts = {"method": "slots", "mode": self.mode, "packing": packing, "bound_sigma": sigma}
        return facts if self.profile is None else facts | {"basis": basis_of(self.profile)}


def basis_of(profile: Profile) -> str:
    """What has a basis of its own in `profile`."""
    if profile.group_heads == 1:
        return "per head"
    return "per layer" if profile.groups == 1 else f"per {profile.group_heads} heads"


class Sample:
    """The slot that the CPU reference makes of a chunk, kept for each kind while the chunk's values stay the same."""

    def __init__(self) -> None:
        self._layers: list[Tensor] = []
        self._slots: dict[Kind, np.ndarray] = {}

    def slot(
        self, layers: list[Tensor], kind: Kind, slot_codec: SlotCodec, identity: Tensor, position: Tensor | None = None
    ) -> np.ndarray:
        """Header, directory and payload, uint8, of the chunk that `layers` `[chunk_pages, heads, tokens, K|V]` on the
        CPU are, at `position` (int32 `[1]`); `slot_codec` is the one that is checked."""
        same = len(layers) == len(self._layers) and all(map(torch.equal, layers, self._layers))
        if not same:
            self._layers, self._slots = layers, {}
        if kind not in self._slots:
            kv = PagedKV.heads_first(layers, layers[0].shape[3] // 2)
            bounds = None if slot_codec.bounds is None else slot_codec.bounds.cpu()
            pages, slot_bytes = slot_codec.chunk_pages, slot_codec.slot_bytes
            reference = replace(slot_codec, kv=kv, bounds=bounds, num_sms=None)
            slots = torch.zeros(1, slot_bytes, dtype=torch.uint8)
            table = torch.arange(pages, dtype=torch.int32)[None]
            with one_cpu_thread():
                reference.encode(table, slots, torch.zeros(1, dtype=torch.int32), identity, position)
            payload = int(read_headers(slots[:, :HEADER_BYTES].numpy())["payload_bytes"][0])
            self._slots[kind] = slots[0, : reference.payload_at + payload].numpy().copy()
        return self._slots[kind]


class Batch:
    """`timer.sets(...)` sets of about `num_bytes` of raw KV each, in one paged cache of that shape, with slots for them
    and pages to decode into. `tensors` as for `PagedCache`."""

    positions: Tensor | None = None
    """Of each chunk's first token, int32 `[sets, chunks]`, where a codec needs them."""
    max_positions: int = SlotCodec.max_positions

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        chunk_tokens: int,
        num_bytes: int,
        timer: Timer,
        device: torch.device,
    ) -> None:
        first = next(iter(tensors.values()))
        self.chunk_bytes = shape.layers * shape.heads * 2 * first.shape[-1] * first.element_size() * chunk_tokens
        self.chunks = round(num_bytes / self.chunk_bytes)
        if not self.chunks:
            raise ValueError(f"{num_bytes} bytes are less than a chunk of {self.chunk_bytes}: take a larger size")
        self.raw_bytes = self.chunks * self.chunk_bytes
        self.sets, self._timer = timer.sets(self.raw_bytes), timer
        self.cache = self._cache(tensors, shape, self.sets * self.chunks * chunk_tokens, chunk_tokens, device)
        self.kv, self.chunk_pages = self.cache.kv, chunk_tokens // shape.page_tokens
        if self.chunk_pages * shape.page_tokens != chunk_tokens:
            raise ValueError(f"chunks of {chunk_tokens} tokens are no whole pages of {shape.page_tokens}")
        total = self.sets * self.chunks
        tables = (
            self.cache.table(pages, total, self.chunk_pages) for pages in (self.cache.sources, self.cache.destinations)
        )
        self.sources, self.destinations = (
            torch.from_numpy(table).to(device).view(self.sets, self.chunks, -1) for table in tables
        )
        self.slots = torch.zeros(total, self._slot_bytes, dtype=torch.uint8, device=device)
        self.slot_index = torch.arange(total, dtype=torch.int32, device=device).view(self.sets, -1)
        names = torch.stack([torch.arange(total), torch.full((total,), 7)], dim=1)
        self.identities = names.to(device).view(self.sets, self.chunks, 2)
        self.status = torch.zeros(self.sets, self.chunks, dtype=torch.int32, device=device)

    def _cache(
        self, tensors: Mapping[str, Tensor], shape: Shape, tokens: int, chunk_tokens: int, device: torch.device
    ) -> PagedCache:
        return PagedCache(tensors, shape, tokens, 1.0, device)

    @property
    def _slot_bytes(self) -> int:
        return raw_slot_bytes(self.kv, self.chunk_pages)

    @property
    def facts(self) -> Row:
        """What a row says of it."""
        return {
            "chunks": self.chunks,
            "chunk_bytes": self.chunk_bytes,
            "lines": self.kv.num_lines,
            "page_shape": list(self.cache.layers[0].shape[1:]),
        }

    def contiguous(self) -> Tensor:
        """The sources without pages between them, `[sets, layers, pages, heads, page_tokens, K|V]`."""
        pages = self.sources.flatten(1).long()
        return torch.stack([torch.stack([layer[at] for layer in self.cache.layers]) for at in pages])

    def error_over_bound(self, sigma: float, layers: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> float:
        """Largest |delivered - original| over the bound, in float64; NaN if a value became NaN. `layers(n)` gives both
        of layer n, `[pages, heads, page_tokens, K|V]`; default: the sources and the destinations."""
        shape = self.cache.shape
        bounds = (self.cache.sigma_bounds * sigma).double().view(shape.layers, 2, shape.heads, -1)[..., 0]
        worst = []
        for number in range(shape.layers):
            before, after = (layers or self._both)(number)
            error = (before.double() - after.double()).abs().unflatten(3, (2, -1)).amax((0, 2, 4))
            worst.append((error.T / bounds[number]).amax())
        return float(torch.stack(worst).amax())

    def share_of_bound(self, kind: Kind) -> float:
        """Largest error of what was decoded, over what `kind`, not an exact one, promises; NaN if a value became
        NaN."""
        return self.error_over_bound(kind.sigma)

    def _both(self, number: int) -> tuple[Tensor, Tensor]:
        layer = self.cache.layers[number]
        return layer[self.sources.flatten().long()], layer[self.destinations.flatten().long()]

    def measure(self, kind: Kind, sample: Sample, on_overflow: str, num_sms: int | None = None) -> Row:
        """Check `kind` in slots, then time it. Raises `KVFerryError` if it is not right."""
        bounds = self.cache.sigma_bounds * kind.sigma if isinstance(kind.codec, Bounded) else None
        slot_codec = SlotCodec(
            self.kv,
            kind.codec,
            self.chunk_pages,
            self.slots.shape[1],
            on_overflow,
            bounds=bounds,
            num_sms=num_sms,
            max_positions=self.max_positions,
        )

        def encode(number: int) -> None:
            index, names = self.slot_index[number], self.identities[number]
            slot_codec.encode(self.sources[number], self.slots, index, names, *self._at(number))

        def decode(number: int) -> None:
            index, names, status = self.slot_index[number], self.identities[number], self.status[number]
            slot_codec.decode(self.slots, index, self.destinations[number], names, status, *self._at(number))

        encoded, worst = self._check(kind, slot_codec, encode, decode, sample)
        facts = kind.facts | {"num_sms": num_sms, "ratio": self.raw_bytes / encoded, "error_over_bound": worst}
        moved = self.raw_bytes + encoded
        legs = dict(zip(LEGS, (encode, decode), strict=True))
        row = self._timer.row(legs, self.sets, self.raw_bytes, moved)
        self._check_status(kind)
        return facts | self.facts | row

    def _at(self, number: int) -> list[Tensor]:
        """What calls are told of a set's positions."""
        return [] if self.positions is None else [self.positions[number]]

    def _check_status(self, kind: Kind) -> None:
        if bad := int((self.status != 0).sum()):
            raise KVFerryError(f"{kind.name}: the decoder refused {bad} of {self.status.numel()} slots")

    def _check(
        self,
        kind: Kind,
        slot_codec: SlotCodec,
        encode: Callable[[int], None],
        decode: Callable[[int], None],
        sample: Sample,
    ) -> tuple[float, float]:
        """(encoded bytes of a set, headers and directories counted; largest error over bound)."""
        self.cache.forget(self.sets * self.chunks, self.chunk_pages)
        self.slots.zero_()
        self.status.fill_(-1)
        for leg in (encode, decode):
            for number in range(self.sets):
                leg(number)
        name = kind.name
        headers = read_headers(self.slots[:, :HEADER_BYTES].cpu().numpy())
        if not are_headers(headers).all() or (headers["state"] != SlotState.USABLE).any() or headers["relaxed"].any():
            raise KVFerryError(f"{name}: not every slot holds its chunk at the asked bound")
        self._check_status(kind)
        worst = 0.0
        if kind.codec.exact:
            for number in range(len(self.cache.layers)):
                if not torch.equal(*map(as_bits, self._both(number))):
                    raise KVFerryError(f"{name}: layer {number} is not bit-identical")
        else:
            worst = self.share_of_bound(kind)
            if not worst <= 1:
                raise KVFerryError(f"{name}: the largest error is {worst:g} of the bound")
        pages = self.sources[0, 0].long()
        layers = [layer[pages].cpu() for layer in self.cache.layers]
        position = None if self.positions is None else self.positions[0, :1].cpu()
        expected = sample.slot(layers, kind, slot_codec, self.identities[0, :1].cpu(), position)
        if not np.array_equal(expected, self.slots[0, : len(expected)].cpu().numpy()):
            raise KVFerryError(f"{name}: the encoded bytes of the first chunk are not those of the CPU reference")
        payload = float(headers["payload_bytes"].astype(np.int64).sum())
        return payload / self.sets + self.chunks * slot_codec.payload_at, worst
