"""The names of codecs on the command line, such as `bounded:0.1sigma` or `kivi2@sinks4`, and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor

import kvferry
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform.profile import Profile
from kvferry.codecs.transform.rope import Rope
from kvferry.evaluation.baselines import BITS, Baseline, Fp8Cast, HadamardInt, IntPerTokenHead, Kivi
from kvferry.evaluation.coders import Chunked, CodecCoder, Coder, CoderScheme, OneSide, RawSinks, Side
from kvferry.evaluation.schemes import Guarantee, SigmaBounded

GRAMMAR = """\
raw, lossless, lossless-bitpack;
bounded:0.1sigma (of each tensor's standard deviation), bounded:0.01range (of its value range), bounded:0.01tile,
bounded:0.01channel (of a tile's, a channel's range), bounded:0.05abs; bounded may go on with -plain or -outlier, -flat,
-bitpack, as in bounded-plain-bitpack:0.1sigma; bounded:profile, bounded:profile*1.5 (bounds of a --profile);
fp8; int8, int4, int3, int2; kivi4, kivi3, kivi2, and kivi2:64 for groups of 64; hadamard8, hadamard4, hadamard3,
hadamard2; transform:1.0 (error bound), transform:6x (ratio), transform-hadamard:1.0 (another basis),
transform-rotated:1.0 (RoPE not taken off), all of a --profile;
each may go on with @k or @v (that side only), @sinks4 (the first 4 tokens kept), @chunk256 (tokens in chunks)."""

DEFAULT = (
    "lossless",
    *(f"bounded:{sigmas}sigma" for sigmas in (0.05, 0.1, 0.2, 0.3, 0.5)),
    *(f"bounded:{share}range" for share in (0.003, 0.01, 0.02, 0.04)),
    "fp8",
    *(f"int{bits}" for bits in (8, 4, 3, 2)),
    *(f"kivi{bits}" for bits in (4, 3, 2)),
    "hadamard4",
)
DEFAULT_WITH_PROFILE = (
    *(f"transform:{bound}" for bound in (0.5, 1, 1.5, 2, 3)),
    *(f"bounded:profile*{factor}" for factor in (0.5, 1, 2)),
)
_NUMBER = r"(\d+\.?\d*(?:e-?\d+)?|\.\d+)"
_UNITS = ("sigma", "range", "tile", "channel", "abs")


@dataclass(frozen=True)
class NamedProfile:
    """A profile, and what its results are called."""

    name: str
    profile: Profile


@dataclass(frozen=True)
class ProfileBounded:
    """Chooses, for each layer and side, plain `bounded` at the profile's bound for it times `factor`."""

    profile: Profile
    factor: float = 1.0

    def __call__(self, layer_index: int, which: str, tensor: Tensor) -> kvferry.Bounded:
        """Raises `ValueError` where the profile has no bound, `ProfileMismatch` where it has no such layer."""
        bound = self.profile.side(layer_index, which).bound
        if not bound > 0:
            raise ValueError(
                f"the profile has no bound for layer {layer_index} {which}: calibrate it again (kvferry calibrate)"
            )
        return kvferry.Bounded(error_bound=bound * self.factor, relative=False)


def split_names(names: str, *, with_profile: bool = False) -> list[str]:
    """Names between commas, without repeats; `default` stands for `DEFAULT` (with a profile: and its codecs).

    Raises `ValueError` for no name.
    """
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name == "default":
            found += DEFAULT + (DEFAULT_WITH_PROFILE if with_profile else ())
        elif name:
            found.append(name)
    if not found:
        raise ValueError(f"{names!r} names no codec: give some of {' '.join(GRAMMAR.split())}")
    return list(dict.fromkeys(found))


def parse_codecs(names: Sequence[str], profiles: Sequence[NamedProfile] = ()) -> list[CoderScheme]:
    """The schemes that `names` stand for; a name that needs a profile stands for one scheme with each of `profiles`.

    Raises `ValueError` that names the value and the options for names out of the grammar, parameters out of range, and
    names that need a profile where there is none.
    """
    return [scheme for name in names for scheme in parse_codec(name, profiles)]


def parse_codec(name: str, profiles: Sequence[NamedProfile] = ()) -> list[CoderScheme]:
    """As `parse_codecs`, for one name."""
    base, *modifiers = name.split("@")
    for make in _MAKERS:
        try:
            made = make(base, profiles)
        except ValueError as error:
            raise ValueError(f"codec {name!r}: {error}") from error
        if made:
            break
    else:
        raise ValueError(f"unknown codec {name!r}: give {' '.join(GRAMMAR.split())}")
    for modifier in modifiers:
        made = [_modified(name, scheme, modifier) for scheme in made]
    return made


# -- what stands before the @ -----------------------------------------------------------------------------------------


def _exact(base: str, profiles: Sequence[NamedProfile]) -> list[CoderScheme]:
    codecs = {
        "raw": kvferry.Raw(),
        "lossless": kvferry.Lossless(),
        "lossless-bitpack": kvferry.Lossless(packing="bitpack"),
    }
    if base not in codecs:
        return []
    return [CoderScheme(base, base, "", CodecCoder(codecs[base]), Guarantee.EXACT)]


def _baseline(base: str, profiles: Sequence[NamedProfile]) -> list[CoderScheme]:
    if base == "fp8":
        return [_of_baseline(base, Fp8Cast())]
    match = re.fullmatch(r"(int|kivi|hadamard)(\d+)(?::(\d+))?", base)
    if not match or (match[3] and match[1] != "kivi"):
        return []
    bits = int(match[2])
    if bits not in BITS:
        raise ValueError(f"{bits} bits are none of {', '.join(map(str, BITS))}")
    if match[1] == "kivi":
        return [_of_baseline(base, Kivi(bits, int(match[3])) if match[3] else Kivi(bits))]
    return [_of_baseline(base, IntPerTokenHead(bits) if match[1] == "int" else HadamardInt(bits))]


def _of_baseline(name: str, baseline: Baseline) -> CoderScheme:
    return CoderScheme(name, baseline.family, baseline.setting, baseline, Guarantee.NONE)


def _bounded(base: str, profiles: Sequence[NamedProfile]) -> list[CoderScheme]:
    match = re.fullmatch(rf"(bounded(?:-(plain|outlier))?(-flat)?(-bitpack)?):{_NUMBER}({'|'.join(_UNITS)})", base)
    if not match:
        return []
    family, mode, flat, bitpack, number, unit = match.groups()
    options: dict[str, Any] = {
        "mode": mode or "fixed",
        "grouping": "flat" if flat else "token",
        "packing": "bitpack" if bitpack else "ans",
    }
    bound = float(number)
    codec: Any
    # Made even where only a choice is used: it checks the parameters.
    plain = kvferry.Bounded(error_bound=bound, relative=unit not in ("abs", "sigma"), **options)
    if unit == "sigma":
        codec = SigmaBounded(bound, **options)
    else:
        codec = plain if unit in ("abs", "range") else replace(plain, relative_to=unit)
    return [CoderScheme(base, f"{family} by {unit}", f"{bound:g}", CodecCoder(codec), Guarantee.BOUND)]


def _bounded_by_profile(base: str, profiles: Sequence[NamedProfile]) -> list[CoderScheme]:
    match = re.fullmatch(rf"bounded:profile(?:\*{_NUMBER})?", base)
    if not match:
        return []
    factor = float(match[1] or 1)
    if not factor > 0:
        raise ValueError(f"a factor of {factor:g}: give one above 0")

    def make(profile: Profile) -> Coder:
        return CodecCoder(ProfileBounded(profile, factor))

    return _for_each(base, "bounded by profile", f"{factor:g}", profiles, make)


def _transform(base: str, profiles: Sequence[NamedProfile]) -> list[CoderScheme]:
    match = re.fullmatch(rf"(transform(?:-(hadamard|rotated))?):{_NUMBER}(x)?", base)
    if not match:
        return []
    family, variant, number, by_ratio = match.groups()
    changed: Callable[[Profile], Profile] = {None: _as_it_is, "hadamard": hadamard_basis, "rotated": not_unrotated}[
        variant
    ]

    def make(profile: Profile) -> Coder:
        value = float(number)
        codec = Transform(changed(profile), ratio=value) if by_ratio else Transform(changed(profile), error_bound=value)
        return CodecCoder(codec)

    return _for_each(base, family + (" by ratio" if by_ratio else ""), f"{float(number):g}", profiles, make)


def _for_each(
    base: str, family: str, setting: str, profiles: Sequence[NamedProfile], make: Callable[[Profile], Coder]
) -> list[CoderScheme]:
    if not profiles:
        raise ValueError("it needs a profile: give --profile FILE (kvferry calibrate makes one), or another codec")
    schemes = []
    for named in profiles:
        of = f" ({named.name})" if len(profiles) > 1 else ""
        schemes.append(CoderScheme(base + of, family + of, setting, make(named.profile), Guarantee.BOUND))
    return schemes


_MAKERS = (_exact, _baseline, _bounded, _bounded_by_profile, _transform)


# -- variants of a profile --------------------------------------------------------------------------------------------


def hadamard_basis(profile: Profile) -> Profile:
    """The same steps on a Hadamard basis for each head and mean 0: what calibration of the basis is worth."""
    steps = [(layer.k.step, layer.v.step) for layer in profile.layers]
    return Profile.hadamard(len(profile.layers), profile.heads, profile.head_dim, profile.rope, steps)


def not_unrotated(profile: Profile) -> Profile:
    """The same bases and steps, for keys as they are cached: what taking RoPE off is worth to this profile. One that
    was calibrated on such keys does better (`kvferry calibrate --no-rope`); give it as another profile."""
    return replace(profile, rope=Rope.none(profile.head_dim), certificate={})


def _as_it_is(profile: Profile) -> Profile:
    return profile


# -- what stands behind the @ -----------------------------------------------------------------------------------------


def _modified(name: str, scheme: CoderScheme, modifier: str) -> CoderScheme:
    match = re.fullmatch(r"([kv])|(sinks|chunk)([1-9]\d*)", modifier)
    if not match:
        raise ValueError(f"codec {name!r}: unknown modifier {modifier!r}; give @k, @v, @sinks4 or @chunk256")
    coder: Coder
    if match[1]:
        coder = OneSide(scheme.coder, cast(Side, match[1]))
    else:
        kind: Literal["sinks", "chunk"] = cast(Any, match[2])
        coder = (RawSinks if kind == "sinks" else Chunked)(scheme.coder, int(match[3]))
    return replace(scheme, name=f"{scheme.name}@{modifier}", family=f"{scheme.family} @{modifier}", coder=coder)
