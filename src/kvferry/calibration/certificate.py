"""Steps and bounds that meet the target, certified with the codecs themselves: real bytes, the prefix protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import kvferry
from kvferry.calibration.held_out import HeldOut
from kvferry.calibration.moments import SIDES
from kvferry.calibration.search import factor_for_kl, factor_for_ratio
from kvferry.calibration.settings import Report, Settings
from kvferry.calibration.simulate import Scales, fp8_cast, rounded, transformed
from kvferry.calibration.steps import scaled
from kvferry.calibration.windows import Windows, digest
from kvferry.codecs.transform.profile import Profile
from kvferry.evaluation import CodecScheme, Guarantee, Scheme, SchemeResult, evaluate_prefix
from kvferry.evaluation.baselines import Fp8Cast, baseline_scheme

TRANSFORM, BOUNDED, FP8 = "transform", "bounded", "fp8"
CALIBRATED = (TRANSFORM, BOUNDED)
FIGURES = ("ratio", "bits_per_value", "kl_nats", "top1_agreement", "perplexity_change", "max_abs_error")
MOST_CORRECTIONS = 12


@dataclass(frozen=True)
class CalibratedBounded:
    """Chooses, per layer and side, plain `bounded` at the bound that a profile has for it."""

    profile: Profile

    def __call__(self, layer_index: int, which: str, tensor: Tensor) -> kvferry.Bounded:
        bound = self.profile.side(layer_index, which).bound
        if not bound:
            raise ValueError(f"the profile has no bound for layer {layer_index} {which}: calibrate it again")
        return kvferry.Bounded(error_bound=bound, relative=False)


def certified_schemes(profile: Profile) -> dict[str, Scheme]:
    """The rows of a certificate: both codecs as `profile` states them, and what everybody compares with."""
    return {
        TRANSFORM: CodecScheme(TRANSFORM, "calibrated", kvferry.Transform(profile).__call__, Guarantee.BOUND),
        BOUNDED: CodecScheme(BOUNDED, "calibrated", CalibratedBounded(profile), Guarantee.BOUND),
        FP8: baseline_scheme(Fp8Cast()),
    }


def certified_profile(
    model: Any,
    settings: Settings,
    windows: Windows,
    held_out: HeldOut,
    profile: Profile,
    report: Report,
    about: dict[str, Any],
) -> Profile:
    """`profile`, whose steps are right in proportion, with steps, bounds and certificate for the target.

    `about` goes into the certificate. Raises `ValueError` for a target out of reach.
    """
    found = _Search(model, settings, windows, held_out, profile, report)
    factors = {name: found.factor(name) for name in CALIBRATED}
    certified, on_held_out = found.settle(factors)
    report("certificate", 1, 2, "text that neither bases nor steps have seen")
    unseen = found.measure(certified, windows.unseen, tuple(certified_schemes(certified)))
    report("certificate", 2, 2, "")
    protocol = settings.protocol
    return certified.with_certificate(
        about
        | {
            "target": found.target,
            "protocol": {"prefix": protocol.prefix, "score": protocol.score, "windows": settings.held_out},
            "factors": factors,
            "held_out": _figures(on_held_out) | {"digest": digest(windows.held_out)},
            "unseen": _figures(unseen) | {"digest": digest(windows.unseen)},
        }
    )


class _Search:
    """Factors to the steps of `profile`, by simulation and by the codecs."""

    def __init__(
        self,
        model: Any,
        settings: Settings,
        windows: Windows,
        held_out: HeldOut,
        profile: Profile,
        report: Report,
    ) -> None:
        self._model, self._settings, self._windows = model, settings, windows
        self._held_out, self._profile, self._report = held_out, profile, report
        self._scales: Scales = [(layer.k.step, layer.v.step) for layer in profile.layers]
        self._tries = 0
        self.target: dict[str, Any] = {"kind": "ratio", "ratio": settings.target_ratio, "from": "given"}
        if settings.target_ratio is None:
            kl, source = settings.target_kl, "given"
            if kl is None:
                kl = held_out.divergence(fp8_cast)
                source = "KL of an fp8 e4m3 cast of the same cache, measured in this run on the held-out windows"
            self.target = {"kind": "kl", "kl_nats": kl, "from": source}

    def factor(self, name: str) -> float:
        """Of one codec, close to the target."""
        if self.target["kind"] == "ratio":
            return factor_for_ratio(lambda factor: self._ratio(name, factor), self.target["ratio"])
        return factor_for_kl(lambda factor: self._kl(name, factor), self.target["kl_nats"])

    def settle(self, factors: dict[str, float]) -> tuple[Profile, dict[str, SchemeResult]]:
        """The profile with `factors`, corrected in place until the codecs meet the target on the held-out windows, and
        their figures there."""
        results: dict[str, SchemeResult] = {}
        pending: tuple[str, ...] = (*CALIBRATED, FP8)
        for _ in range(MOST_CORRECTIONS):
            self._report("certificate", 0, 2, "held-out text: " + ", ".join(pending))
            profile = self._with_factors(factors)
            results |= self.measure(profile, self._windows.held_out, pending)
            pending = tuple(name for name in CALIBRATED if not self._met(results[name]))
            if not pending:
                return profile, results
            for name in pending:
                factors[name] *= self._correction(results[name])
        missed = ", ".join(
            f"{name}: KL {results[name].kl_nats:.3g}, ratio {results[name].ratio:.3f}" for name in pending
        )
        raise ValueError(f"the target was missed after {MOST_CORRECTIONS} corrections ({missed}): give a looser target")

    def measure(self, profile: Profile, windows: Tensor, names: tuple[str, ...]) -> dict[str, SchemeResult]:
        """The named rows on `windows`. Raises `KVFerryError` where a guarantee is broken: nothing is certified then."""
        schemes = certified_schemes(profile)
        chosen = [schemes[name] for name in names]
        results = evaluate_prefix(self._model, windows, chosen, self._settings.protocol)
        for result in results:
            if not result.guarantee_kept:
                raise kvferry.KVFerryError(
                    f"{result.name} exceeded its bound {result.error_over_bound} times: please report this"
                )
        return dict(zip(names, results, strict=True))

    def _met(self, result: SchemeResult) -> bool:
        if self.target["kind"] == "ratio":
            return bool(result.ratio >= self.target["ratio"])
        return bool(result.kl_nats <= self.target["kl_nats"])

    def _correction(self, result: SchemeResult) -> float:
        """To a factor that missed."""
        if self.target["kind"] == "ratio":
            return 1.005
        return float(max(0.7, 0.98 * math.sqrt(self.target["kl_nats"] / result.kl_nats)))

    def _kl(self, name: str, factor: float) -> float:
        steps = scaled(self._scales, factor)
        change = transformed(self._profile, steps) if name == TRANSFORM else rounded(scaled(steps, 0.5))
        kl = self._held_out.divergence(change)
        self._count(f"{name}: {factor:.3f} gives KL {kl:.3g}")
        return kl

    def _ratio(self, name: str, factor: float) -> float:
        """Of the held-out caches, in bytes of the codec."""
        encoded = 0
        for layer, side, tensor in self._held_out.tensors():
            codec: kvferry.Codec
            if name == TRANSFORM:
                codec = kvferry.Transform(self._profile, layer, SIDES[side], error_bound=factor)
            else:
                codec = kvferry.Bounded(error_bound=self._scales[layer][side] * factor / 2, relative=False)
            encoded += len(kvferry.compress(tensor, codec))
        ratio = self._held_out.raw_bytes / encoded
        self._count(f"{name}: {factor:.3f} gives ratio {ratio:.3f}")
        return ratio

    def _with_factors(self, factors: dict[str, float]) -> Profile:
        bounds = scaled(self._scales, factors[BOUNDED] / 2)
        return self._profile.with_steps(scaled(self._scales, factors[TRANSFORM])).with_bounds(bounds)

    def _count(self, remark: str) -> None:
        self._tries += 1
        self._report("steps", self._tries, 0, remark)


def _figures(results: dict[str, SchemeResult]) -> dict[str, Any]:
    """As a certificate has them. KL in nats a token; ratio is raw over encoded bytes."""
    return {name: {key: getattr(result, key) for key in FIGURES} for name, result in results.items()}
