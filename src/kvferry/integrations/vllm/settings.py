"""What an operator chooses: `OffloadSettings`, from kv_connector_extra_config and from the environment."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import kvferry
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.codecs.slots import check_transform_bounds
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform.profile import Profile
from kvferry.format.frame import MODES, PACKINGS
from kvferry.format.slot import VERSION
from kvferry.integrations.vllm.profiles import TRANSFORM, check_target, default_ratio, load_profile, part_of

PREFIX = "compression_"
"""Of our keys in kv_connector_extra_config."""
ENABLE_KEY = "enable_compression"
FIT = "fit"
CODECS = ("bounded", "lossless", TRANSFORM, "raw")
RELATIVE_TO = ("tile", "channel", "absolute")
DEFAULT_RATIOS = {"bounded": 3.0, "lossless": 1.35, "raw": 1.0}
"""Of 16-bit caches: a little below what real KV reaches, so that few chunks meet a slot that is too small. The
transform's is its profile's."""
DEFAULT_BOUNDS = {TRANSFORM: 1.0}
"""Of codecs whose bounds have other units than `bounded`'s."""
_BOUND = 1e-2
FP8_LOSSLESS_RATIO = 1.1
"""A float8 has few bits that can be predicted."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_VLLM_NAMES = {
    "VLLM_ENABLE_COMPRESSION": "enabled",
    "VLLM_COMPRESSION_ERROR_BOUND": "error_bound",
    "VLLM_COMPRESSION_MODE": "mode",
    "VLLM_COMPRESSION_PROFILE": "profile",
    "VLLM_COMPRESSION_TARGET_KL": "target_kl",
}


@dataclass(frozen=True)
class OffloadSettings:
    """How offloaded KV cache is coded. Raises `ValueError` for values that cannot be, with name, value and remedy.

    `codec`: "bounded", "lossless", "transform" or "raw". `error_bound` (None: by codec): with "bounded", every value
    comes back within it, times the range of the values of its tile (64 tokens of one head's K or V;
    `relative_to="tile"`), times the range of its channel in the tile ("channel"), or as it stands ("absolute"); with
    "transform", in units of the profile. `mode` and `packing`: those of `kvferry.Bounded` and `Lossless`. `profile`:
    file of the transform's profile; `target_kl`: nats a token that its certificate may state at most (None: any).
    `ratio`: raw bytes over slot bytes, which fixes how many chunks the host memory holds (None: by codec). `overflow`:
    a chunk that does not fit its slot is coded with doubled bounds ("relax", at most `max_relaxations` times), or not
    stored ("reject"); "fit", with "transform": there is no bound, each chunk takes the finest that its slot has room
    for. `ring_mib`: GPU memory of each direction's staging ring. `num_sms`: how much of the GPU the
    coders may use (None: all). `timing`: measure the stages. `load_failure_policy`: what vLLM does with a request whose
    load failed, "recompute" or "fail".
    """

    enabled: bool = True
    codec: str = "bounded"
    error_bound: float | None = None
    relative_to: str = "tile"
    mode: str = "fixed"
    packing: str = "ans"
    ratio: float | None = None
    overflow: str = "relax"
    max_relaxations: int = 8
    ring_mib: int = 128
    num_sms: int | None = None
    timing: bool = True
    load_failure_policy: str = "recompute"
    profile: str | None = None
    target_kl: float | None = None

    def __post_init__(self) -> None:
        _one_of("codec", self.codec, CODECS)
        _one_of("relative_to", self.relative_to, RELATIVE_TO)
        _one_of("mode", self.mode, MODES)
        _one_of("packing", self.packing, PACKINGS)
        _one_of("overflow", self.overflow, ("relax", "reject", FIT))
        _one_of("load_failure_policy", self.load_failure_policy, ("recompute", "fail"))
        if not 0 < self.bound < math.inf:
            raise ValueError(
                f"{PREFIX}error_bound={self.bound!r} must be a finite number above 0, such as 0.01; for exact "
                "results choose the codec lossless"
            )
        if self.ratio is not None and not 1 <= self.ratio <= 64:
            raise ValueError(f"{PREFIX}ratio={self.ratio!r} must be 1 to 64, such as 3.0; leave it out for the default")
        for name, least, most in (("max_relaxations", 0, 64), ("ring_mib", 1, 1 << 16), ("num_sms", 1, 1 << 16)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{PREFIX}{name}={value!r} must be {least} to {most}")
        self._check_transform()

    def _check_transform(self) -> None:
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise ValueError(f"{PREFIX}target_kl={self.target_kl!r} must be a finite number above 0: nats a token")
        if self.codec != TRANSFORM:
            if self.overflow == FIT:
                raise ValueError(
                    f"{PREFIX}overflow={FIT!r} goes with {PREFIX}codec=transform, not {self.codec}: choose relax or "
                    "reject"
                )
            for name in ("profile", "target_kl"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{PREFIX}{name}={getattr(self, name)!r} goes with {PREFIX}codec=transform, not {self.codec}: "
                        "choose that codec, or leave it out"
                    )
            return
        if not self.profile:
            raise ValueError(
                f"{PREFIX}codec=transform needs {PREFIX}profile: name a file that kvferry calibrate made of this model"
            )
        if self.overflow == FIT:
            for name in ("error_bound", "target_kl"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{PREFIX}{name}={getattr(self, name)!r} has no meaning with {PREFIX}overflow={FIT!r}, where "
                        f"the slot's size decides on the error: leave it out, or choose relax or reject"
                    )
        try:
            check_transform_bounds(self.bound, self.max_relaxations if self.overflow == "relax" else 0)
        except ValueError as error:
            raise ValueError(f"{PREFIX}codec=transform: {error}") from None

    @property
    def bound(self) -> float:
        """The error bound, in the codec's units."""
        return DEFAULT_BOUNDS.get(self.codec, _BOUND) if self.error_bound is None else self.error_bound

    @property
    def transforms(self) -> bool:
        """Whether a profile is used."""
        return self.enabled and self.codec == TRANSFORM

    def load_profile(self) -> Profile:
        """The profile, which the codec "transform" has. Raises as `profiles.load_profile`, and `ValueError` if its
        certificate states more than `target_kl`."""
        if self.profile is None:
            raise ValueError(f"the codec {self.codec} has no profile")
        found = load_profile(self.profile)
        if self.target_kl is not None:
            check_target(found, self.profile, self.target_kl, self.bound)
        return found

    def codec_for(self, dtype: torch.dtype, heads: tuple[int, int] | None = None) -> Codec:
        """The codec for pages of `dtype`: as chosen where it takes them, else the nearest that loses no more. `heads`:
        the first one and the number of those that the pages hold, of all heads that a profile has (None: all)."""
        if not self.enabled or self.codec == "raw" or dtype not in Lossless.dtypes:
            return Raw()
        if self.codec == TRANSFORM and dtype in Transform.dtypes:
            profile = self.load_profile()
            own = part_of(profile, *heads) if heads is not None else profile
            ratio = self._transform_ratio(profile) if self.overflow == FIT else None
            return Transform(own, error_bound=self.bound, ratio=ratio, packing=self.packing)
        if self.codec == "bounded" and dtype in Bounded.dtypes:
            relative = self.relative_to != "absolute"
            return Bounded(
                error_bound=self.bound,
                relative=relative,
                relative_to=self.relative_to if relative else "tensor",
                mode=self.mode,
                packing=self.packing,
            )
        return Lossless(packing=self.packing)

    def ratio_for(self, dtype: torch.dtype) -> float:
        """Raw bytes over slot bytes for pages of `dtype`."""
        codec = self.codec_for(dtype)
        if isinstance(codec, Raw):
            return 1.0
        if isinstance(codec, Transform):
            return self._transform_ratio(codec.profile)
        if dtype.itemsize == 1:
            # A ratio that was given for 16-bit values promises nothing for these.
            return min(self.ratio or FP8_LOSSLESS_RATIO, FP8_LOSSLESS_RATIO)
        return self.ratio if self.ratio is not None else DEFAULT_RATIOS[codec.name]

    def _transform_ratio(self, profile: Profile) -> float:
        return self.ratio if self.ratio is not None else default_ratio(profile, self.bound)

    @property
    def identity(self) -> str:
        """Names what slots hold, for namespaces that outlive the process: slots of other settings are not mixed in."""
        codec = self.codec if self.enabled else "raw"
        words = [f"kvferry{kvferry.__version__}", f"slot{VERSION}", codec]
        if codec == "bounded":
            words += [f"{self.bound!r}", self.relative_to, self.mode, self.overflow, str(self.max_relaxations)]
        if codec == TRANSFORM:
            words += [self.load_profile().digest, f"{self.bound!r}", self.overflow, str(self.max_relaxations)]
        if codec != "raw":
            words.append(self.packing)
        return "-".join(words)

    @classmethod
    def read(cls, extra_config: Mapping[str, Any], env: Mapping[str, str] | None = None) -> "OffloadSettings":
        """From kv_connector_extra_config, where each setting is `compression_<name>` (and `enable_compression`), and
        from the environment (`os.environ` if None): `KVFERRY_<NAME>`, or the `VLLM_*` names. What the config says goes
        before the environment. Who names a profile and no codec wants the codec "transform". Raises `ValueError` for
        values and `compression_*` keys that mean nothing, and for a profile that is not there."""
        given = _from_environment(os.environ if env is None else env)
        for key, value in extra_config.items():
            if key == ENABLE_KEY:
                given["enabled"] = _parse("enabled", value, key)
            elif key.startswith(PREFIX):
                name = key.removeprefix(PREFIX)
                if name not in _NAMES or name == "enabled":
                    known = sorted([PREFIX + each for each in _NAMES if each != "enabled"])
                    near = difflib.get_close_matches(name, [each.removeprefix(PREFIX) for each in known], 1)
                    hint = f"did you mean {PREFIX}{near[0]}?" if near else f"there are {', '.join(known)}"
                    raise ValueError(f"{key}={value!r} in kv_connector_extra_config is no setting: {hint}")
                given[name] = _parse(name, value, key)
        if given.get("profile") is not None:
            given.setdefault("codec", TRANSFORM)
        settings = cls(**given)
        if settings.transforms and not Path(str(settings.profile)).is_file():
            raise ValueError(
                f"{PREFIX}profile={settings.profile!r}: there is no such file; make one with kvferry calibrate"
            )
        return settings


_NAMES = {field.name: field for field in fields(OffloadSettings)}
_KINDS: dict[str, type] = {
    "enabled": bool,
    "timing": bool,
    "error_bound": float,
    "ratio": float,
    "target_kl": float,
    "max_relaxations": int,
    "ring_mib": int,
    "num_sms": int,
}
_MAY_BE_NONE = ("error_bound", "ratio", "num_sms", "profile", "target_kl")


def truth(value: Any, name: str) -> bool:
    """A yes or no from a config or the environment. Raises `ValueError` for anything else."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ValueError(f"{name}={value!r} is neither yes nor no: give 1 or 0")


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    names = {**{f"KVFERRY_{name.upper()}": name for name in _NAMES}, **_VLLM_NAMES}
    for variable, name in names.items():
        if env.get(variable, "") != "":
            given[name] = _parse(name, env[variable], variable)
    return given


def _parse(name: str, value: Any, given_as: str) -> Any:
    kind = _KINDS.get(name, str)
    if value is None and name in _MAY_BE_NONE:
        return None
    if kind is bool:
        return truth(value, given_as)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{given_as}={value!r} is a {type(value).__name__}: give a word")
        return value
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{given_as}={value!r} is not {wanted}") from None


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{PREFIX}{name}={value!r} is none of {', '.join(options)}: choose one of them")
