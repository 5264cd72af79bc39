"""What an operator chooses: `OffloadSettings`, from kv_connector_extra_config and from the environment."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

import kvferry
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.format.frame import MODES, PACKINGS
from kvferry.format.slot import VERSION

PREFIX = "compression_"
"""Of our keys in kv_connector_extra_config."""
ENABLE_KEY = "enable_compression"
CODECS = ("bounded", "lossless", "raw")
RELATIVE_TO = ("tile", "channel", "absolute")
DEFAULT_RATIOS = {"bounded": 3.0, "lossless": 1.35, "raw": 1.0}
"""Of 16-bit caches: a little below what real KV reaches, so that few chunks meet a slot that is too small."""
FP8_LOSSLESS_RATIO = 1.1
"""A float8 has few bits that can be predicted."""
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_VLLM_NAMES = {
    "VLLM_ENABLE_COMPRESSION": "enabled",
    "VLLM_COMPRESSION_ERROR_BOUND": "error_bound",
    "VLLM_COMPRESSION_MODE": "mode",
}


@dataclass(frozen=True)
class OffloadSettings:
    """How offloaded KV cache is coded. Raises `ValueError` for values that cannot be, with name, value and remedy.

    `codec`: "bounded", "lossless" or "raw". `error_bound`: every value comes back within it, times the range of the
    values of its tile (64 tokens of one head's K or V; `relative_to="tile"`), times the range of its channel in the
    tile ("channel"), or as it stands ("absolute"). `mode` and `packing`: those of `kvferry.Bounded` and `Lossless`.
    `ratio`: raw bytes over slot bytes, which fixes how many chunks the host memory holds (None: by codec). `overflow`:
    a chunk that does not fit its slot is coded with doubled bounds ("relax", at most `max_relaxations` times), or not
    stored ("reject"). `ring_mib`: GPU memory of each direction's staging ring. `num_sms`: how much of the GPU the
    coders may use (None: all). `timing`: measure the stages. `load_failure_policy`: what vLLM does with a request whose
    load failed, "recompute" or "fail".
    """

    enabled: bool = True
    codec: str = "bounded"
    error_bound: float = 1e-2
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

    def __post_init__(self) -> None:
        _one_of("codec", self.codec, CODECS)
        _one_of("relative_to", self.relative_to, RELATIVE_TO)
        _one_of("mode", self.mode, MODES)
        _one_of("packing", self.packing, PACKINGS)
        _one_of("overflow", self.overflow, ("relax", "reject"))
        _one_of("load_failure_policy", self.load_failure_policy, ("recompute", "fail"))
        if not 0 < self.error_bound < math.inf:
            raise ValueError(
                f"{PREFIX}error_bound={self.error_bound!r} must be a finite number above 0, such as 0.01; for exact "
                "results choose the codec lossless"
            )
        if self.ratio is not None and not 1 <= self.ratio <= 64:
            raise ValueError(f"{PREFIX}ratio={self.ratio!r} must be 1 to 64, such as 3.0; leave it out for the default")
        for name, least, most in (("max_relaxations", 0, 64), ("ring_mib", 1, 1 << 16), ("num_sms", 1, 1 << 16)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{PREFIX}{name}={value!r} must be {least} to {most}")

    def codec_for(self, dtype: torch.dtype) -> Codec:
        """The codec for pages of `dtype`: as chosen where it takes them, else the nearest that loses no more."""
        if not self.enabled or self.codec == "raw" or dtype not in Lossless.dtypes:
            return Raw()
        if self.codec == "bounded" and dtype in Bounded.dtypes:
            relative = self.relative_to != "absolute"
            return Bounded(
                error_bound=self.error_bound,
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
        if dtype.itemsize == 1:
            # A ratio that was given for 16-bit values promises nothing for these.
            return min(self.ratio or FP8_LOSSLESS_RATIO, FP8_LOSSLESS_RATIO)
        return self.ratio if self.ratio is not None else DEFAULT_RATIOS[codec.name]

    @property
    def identity(self) -> str:
        """Names what slots hold, for namespaces that outlive the process: slots of other settings are not mixed in."""
        codec = self.codec if self.enabled else "raw"
        words = [f"kvferry{kvferry.__version__}", f"slot{VERSION}", codec]
        if codec == "bounded":
            words += [f"{self.error_bound!r}", self.relative_to, self.mode, self.overflow, str(self.max_relaxations)]
        if codec != "raw":
            words.append(self.packing)
        return "-".join(words)

    @classmethod
    def read(cls, extra_config: Mapping[str, Any], env: Mapping[str, str] | None = None) -> "OffloadSettings":
        """From kv_connector_extra_config, where each setting is `compression_<name>` (and `enable_compression`), and
        from the environment (`os.environ` if None): `KVFERRY_<NAME>`, or the three `VLLM_*` names. What the config says
        goes before the environment. Raises `ValueError` for values and `compression_*` keys that mean nothing."""
        settings = cls(**_from_environment(os.environ if env is None else env))
        given: dict[str, Any] = {}
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
        return replace(settings, **given)


_NAMES = {field.name: field for field in fields(OffloadSettings)}
_KINDS: dict[str, type] = {
    "enabled": bool,
    "timing": bool,
    "error_bound": float,
    "ratio": float,
    "max_relaxations": int,
    "ring_mib": int,
    "num_sms": int,
}
_MAY_BE_NONE = ("ratio", "num_sms")


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
