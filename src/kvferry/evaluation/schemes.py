"""What is compared: ways to keep a cache in a store. kvferry's codecs here, the casts in `baselines`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

import kvferry
from kvferry.store import Entry, HostStore

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from kvferry.integrations.transformers import CodecChoice

RANGE_BOUNDS = (3e-3, 1e-2, 2e-2, 4e-2)  # of each tensor's value range
SIGMA_BOUNDS = (0.05, 0.1, 0.2, 0.3)  # of each tensor's standard deviation


class Guarantee(StrEnum):
    """What a scheme promises about the restored values."""

    EXACT = "exact"
    BOUND = "bound"
    NONE = "none"


class Scheme(Protocol):
    """A way to keep a cache in a `HostStore`. Schemes of one `family` differ only in `setting`."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def guarantee(self) -> Guarantee: ...

    def store(self, store: HostStore, key: Hashable, cache: DynamicCache) -> Entry:
        """Put the cache under `key`."""
        ...

    def restore(self, store: HostStore, key: Hashable, device: torch.device | None) -> DynamicCache:
        """A new cache from what is under `key`."""
        ...

    def bounds(self, entry: Entry) -> list[float | None]:
        """The absolute bound of each frame of `entry`, None where nothing is promised."""
        ...


@dataclass(frozen=True)
class CodecScheme:
    """A kvferry codec, or a choice of one per tensor, through `HostStore.put_cache` and `restore_cache`."""

    family: str
    setting: str
    codec: CodecChoice
    guarantee: Guarantee

    @property
    def name(self) -> str:
        """Family and setting."""
        return f"{self.family} {self.setting}".strip()

    def store(self, store: HostStore, key: Hashable, cache: DynamicCache) -> Entry:
        """Put the cache under `key`."""
        return store.put_cache(key, cache, self.codec)

    def restore(self, store: HostStore, key: Hashable, device: torch.device | None) -> DynamicCache:
        """A new cache from what is under `key`."""
        return store.restore_cache(key, device)

    def bounds(self, entry: Entry) -> list[float | None]:
        """Each frame's own record of the largest absolute bound in it (0 for exact codecs)."""
        if self.guarantee is Guarantee.NONE:
            return [None] * len(entry.frames)
        return [kvferry.inspect(frame).bound_used for frame in entry.frames]


@dataclass(frozen=True)
class SigmaBounded:
    """Chooses, per tensor, bounded `mode` at `sigmas` standard deviations of that tensor.

    A tensor without spread or with values that are not finite has no such bound and is stored losslessly.
    """

    sigmas: float
    packing: Literal["ans", "bitpack"] = "ans"
    mode: Literal["fixed", "plain", "outlier"] = "fixed"
    grouping: Literal["token", "flat"] = "token"

    def __call__(self, layer_index: int, which: str, tensor: Tensor) -> kvferry.Bounded | kvferry.Lossless:
        bound = self.sigmas * float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        if not (math.isfinite(bound) and bound > 0):
            return kvferry.Lossless(packing=self.packing)
        return kvferry.Bounded(bound, relative=False, mode=self.mode, grouping=self.grouping, packing=self.packing)


def range_scheme(
    bound: float,
    mode: Literal["fixed", "plain", "outlier"] = "fixed",
    packing: Literal["ans", "bitpack"] = "ans",
) -> CodecScheme:
    """`bounded` at a bound relative to each tensor's value range."""
    codec = kvferry.Bounded(error_bound=bound, mode=mode, packing=packing)
    family = f"bounded {mode}" + (" bitpack" if packing == "bitpack" else "")
    return CodecScheme(family, f"{bound:g} range", codec, Guarantee.BOUND)


def sigma_scheme(sigmas: float) -> CodecScheme:
    """`bounded` at a bound relative to each tensor's standard deviation."""
    return CodecScheme("bounded fixed by sigma", f"{sigmas:g}", SigmaBounded(sigmas), Guarantee.BOUND)


def exact_schemes() -> list[Scheme]:
    """`raw`, and `lossless` with both packers."""
    return [
        CodecScheme("raw", "", kvferry.Raw(), Guarantee.EXACT),
        CodecScheme("lossless", "", kvferry.Lossless(packing="ans"), Guarantee.EXACT),
        CodecScheme("lossless bitpack", "", kvferry.Lossless(packing="bitpack"), Guarantee.EXACT),
    ]


def default_schemes(
    range_bounds: Sequence[float] = RANGE_BOUNDS, sigma_bounds: Sequence[float] = SIGMA_BOUNDS
) -> list[Scheme]:
    """Raw, lossless, bounded in its three modes and per sigma, and the baselines that every user already has."""
    from kvferry.evaluation.baselines import Fp8Cast, IntPerTokenHead, baseline_scheme

    make: list[Callable[[float], Scheme]] = [
        lambda bound: range_scheme(bound, "fixed"),
        lambda bound: range_scheme(bound, "fixed", "bitpack"),
        lambda bound: range_scheme(bound, "plain"),
        lambda bound: range_scheme(bound, "outlier"),
    ]
    schemes = exact_schemes()
    schemes += [scheme(bound) for scheme in make for bound in range_bounds]
    schemes += [sigma_scheme(sigmas) for sigmas in sigma_bounds]
    schemes += [baseline_scheme(Fp8Cast()), baseline_scheme(IntPerTokenHead())]
    return schemes
