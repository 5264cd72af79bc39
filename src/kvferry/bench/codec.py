"""Speed and ratio of the codecs in slots: pages of real KV into slots and back, within one device.

Every configuration is checked in the same run before it is timed: all slots usable at the asked bound and good to the
decoder, exact codecs bit-identical, no value (of `transform`: no group's vector) beyond its bound in float64, and the
first chunk's encoded bytes those of the CPU reference.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvferry.bench.codec_baselines import measure_baselines, measure_ceiling
from kvferry.bench.codec_batch import MIB, Batch, Kind, Row, Sample, Timer
from kvferry.bench.codec_transform import TransformBatch, check_profile, describe_profile
from kvferry.bench.pipeline_cache import Shape
from kvferry.codecs.checks import one_of
from kvferry.codecs.slots import ON_OVERFLOW
from kvferry.codecs.transform.profile import Profile

BOUNDED_MODES = ("fixed", "plain", "outlier")
MODES = (*BOUNDED_MODES, "lossless", "raw")
PACKINGS = ("ans", "bitpack")


@dataclass(frozen=True)
class CodecPlan:
    """What is measured. `sizes` in bytes of raw KV a batch, rounded to whole chunks; `sigma`: the bound, in standard
    deviations of each layer's K or V; `sweep_sigmas` and `sweep_sms` (multiprocessors) at the largest size.
    `case_seconds` bounds what timing one row takes; `ceiling_bytes` is what is copied to find the device's bandwidth.

    Raises `ValueError` for what cannot be.
    """

    sizes: tuple[int, ...] = (512 * MIB, 64 * MIB, 8 * MIB)
    sigma: float = 0.2
    modes: tuple[str, ...] = MODES
    packings: tuple[str, ...] = PACKINGS
    on_overflow: str = "relax"
    iterations: int = 100
    sweep_sigmas: tuple[float, ...] = ()
    sweep_sms: tuple[int, ...] = ()
    shape: Shape = field(default_factory=Shape)
    chunk_tokens: int = 64
    case_seconds: float = 1.0
    ceiling_bytes: int = 512 * MIB

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes are {list(self.sizes)}: give one or more, of at least 1 byte")
        for sigma in (self.sigma, *self.sweep_sigmas):
            if not (math.isfinite(sigma) and sigma > 0):
                raise ValueError(f"the error bound is {sigma}: give standard deviations above 0, such as 0.2")
        if self.iterations < 1 or min(self.sweep_sms, default=1) < 1:
            raise ValueError(f"iterations is {self.iterations}, sweep_sms {list(self.sweep_sms)}: at least 1 each")
        if not self.modes or not self.packings:
            raise ValueError("no encoding mode or no packing: give at least one of each")
        for mode in self.modes:
            one_of("encoding mode", mode, MODES)
        for packing in self.packings:
            one_of("packing", packing, PACKINGS)
        one_of("on_overflow", self.on_overflow, ON_OVERFLOW)

    @property
    def kinds(self) -> list[Kind]:
        """Modes times packings; raw has none."""
        found = [
            Kind(mode, packing if mode != "raw" else "none", self.sigma)
            for packing, mode in itertools.product(self.packings, self.modes)
        ]
        return list(dict.fromkeys(found))


def run(
    tensors: Mapping[str, Tensor],
    plan: CodecPlan,
    device: torch.device,
    on_case: Callable[[str], None] = lambda name: None,
    profile: Profile | None = None,
) -> dict[str, Any]:
    """`ceiling`, `notes`, and the rows of the sections `codecs`, `transform`, `baselines`, `bounds` and `num_sms`
    (`transform` empty without a `profile`, which `profile` describes; the sweeps unless asked for). `tensors` as for
    `PagedCache`; `on_case` is told of each case before it begins.

    Raises `KVFerryError` where a check fails, `ProfileMismatch` if the profile is not of the model that made `tensors`,
    `ValueError` for a size below one chunk, or tensors that `Transform` does not take.
    """
    if profile is not None:
        check_profile(tensors, profile)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        timer = Timer(device, plan.iterations, plan.case_seconds)
        on_case("device copy")
        bench = _Bench(plan, timer, on_case)
        ceiling = measure_ceiling(timer, plan.ceiling_bytes, device)
        for size in sorted(set(plan.sizes), reverse=True):
            if profile is not None:  # first: what it does not take is known before the others are measured
                page_tokens = plan.shape.page_tokens
                bench.measure_transform(
                    TransformBatch(tensors, profile, page_tokens, plan.chunk_tokens, size, timer, device)
                )
                _forget(device)
            bench.measure(Batch(tensors, plan.shape, plan.chunk_tokens, size, timer, device), size == max(plan.sizes))
            _forget(device)
    facts = {"l2_bytes": timer.l2_bytes, "ceiling": ceiling, "notes": bench.notes}
    return facts | {"profile": None if profile is None else describe_profile(profile)} | bench.sections


def _forget(device: torch.device) -> None:
    """Free what a batch leaves: the next has other sizes, for which it does not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Bench:
    """Fills the sections, batch by batch."""

    def __init__(self, plan: CodecPlan, timer: Timer, on_case: Callable[[str], None]) -> None:
        self._plan, self._timer, self._on_case = plan, timer, on_case
        self._sample, self._transform_sample = Sample(), Sample()  # of different chunks
        names = ("codecs", "transform", "baselines", "bounds", "num_sms")
        self.sections: dict[str, list[Row]] = {name: [] for name in names}
        self.notes: list[str] = []

    def measure(self, batch: Batch, sweep: bool) -> None:
        """All kinds and the baselines; the sweeps if `sweep`."""
        plan = self._plan
        for kind in plan.kinds:
            self._slots("codecs", batch, kind)
        self._on_case(f"{batch.raw_bytes / MIB:g} MiB, baselines")
        rows, notes = measure_baselines(batch, self._timer, plan.sigma)
        self.sections["baselines"] += rows
        self.notes += [note for note in notes if note not in self.notes]
        if not sweep:
            return
        for kind in plan.kinds:
            if kind.mode in BOUNDED_MODES:
                for sigma in plan.sweep_sigmas:
                    self._slots("bounds", batch, replace(kind, sigma=sigma))
            for num_sms in (*plan.sweep_sms, None) if plan.sweep_sms else ():
                self._slots("num_sms", batch, kind, num_sms)

    def measure_transform(self, batch: TransformBatch) -> None:
        """`transform` with every packing."""
        for packing in self._plan.packings:
            kind = Kind("transform", packing, profile=batch.profile)
            self._on_case(f"{batch.raw_bytes / MIB:g} MiB, {kind.name}")
            row = batch.measure(kind, self._transform_sample, self._plan.on_overflow)
            self.sections["transform"].append(row)

    def _slots(self, section: str, batch: Batch, kind: Kind, num_sms: int | None = None) -> None:
        capped = "" if num_sms is None else f", {num_sms} multiprocessors"
        self._on_case(f"{batch.raw_bytes / MIB:g} MiB, {kind.name}{capped}")
        self.sections[section].append(batch.measure(kind, self._sample, self._plan.on_overflow, num_sms))
