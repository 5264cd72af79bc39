"""The profile that the codec "transform" needs: read once in a process, compared with what is asked of it and with the
model that is served. Needs no vLLM."""

import math
import os
from functools import lru_cache
from typing import Any

from kvferry.codecs.transform.profile import Profile
from kvferry.codecs.transform.rope import Rope
from kvferry.errors import ProfileMismatch

TRANSFORM = "transform"
_ROOM = 0.93
"""Of the certified ratio: chunks differ, and slots have a header and marks of their own."""
_BITS = 16


def load_profile(path: str) -> Profile:
    """The profile in the file `path`, read once as long as it is not replaced. Raises `FileNotFoundError`, with what to
    do about it, and as `Profile.load`."""
    try:
        found = os.stat(path)
    except OSError:
        raise FileNotFoundError(
            f"there is no profile {path!r}: make one with kvferry calibrate, where every worker can read it"
        ) from None
    return _load(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _load(path: str, changed: int, size: int) -> Profile:
    return Profile.load(path)


@lru_cache(maxsize=4)
def part_of(profile: Profile, first: int, count: int) -> Profile:
    """`Profile.for_heads`, once."""
    return profile.for_heads(first, count)


def default_ratio(profile: Profile, error_bound: float) -> float:
    """Raw bytes over slot bytes: a little less than what the certificate states of held-out and unseen text, rounded
    down to 2 digits behind the point. A smaller `error_bound` than the certificate's takes a bit more for each halving,
    at most. Raises `ValueError` for a profile without a certificate."""
    stated = [ratio for text in ("held_out", "unseen") if (ratio := _figure(profile, text, "ratio")) is not None]
    if not stated:
        raise ValueError(
            "the profile has no certificate that states a ratio: set compression_ratio, or make one with kvferry "
            "calibrate"
        )
    bits = _BITS / min(stated) + max(0.0, -math.log2(error_bound))
    return max(1.0, math.floor(100 * _ROOM * _BITS / bits) / 100)


def check_target(profile: Profile, path: str, target_kl: float, error_bound: float) -> None:
    """Raise `ValueError` unless the certificate states a KL of at most `target_kl` nats a token on held-out text, and
    `error_bound` is at most the one that it was measured at."""
    found = _figure(profile, "held_out", "kl_nats")
    asked = f"compression_target_kl={target_kl:g}"
    if found is None:
        raise ValueError(f"{asked}, but {path} has no certificate that states a KL: make one with kvferry calibrate")
    if found > target_kl:
        raise ValueError(
            f"{asked}, but the certificate of {path} states a KL of {found:.4g} nats a token: calibrate with "
            f"kvferry calibrate --target-kl {target_kl:g}, or allow more"
        )
    if error_bound > 1:
        raise ValueError(
            f"{asked}, but the certificate of {path} is for compression_error_bound 1.0, not {error_bound:g}: leave "
            "the error bound out"
        )


def check_model(profile: Profile, *, layers: int, heads: int, head_dim: int, text_config: Any) -> None:
    """Raise `ProfileMismatch`, naming what differs, unless `profile` is of a model with `layers` of `heads` KV heads
    (of all workers) of `head_dim`, and of the RoPE that `text_config` (transformers') states."""
    profile.check(layers=layers, heads=heads, head_dim=head_dim)
    if not profile.rope.rotary_dim:
        return  # calibrated without: keys are taken as they are
    try:
        rope = Rope.from_config(text_config)
    except ValueError as error:
        raise ProfileMismatch(
            f"the profile takes off a RoPE of {profile.rope.rotary_dim} channels, and the model's cannot be told: "
            f"{error} (kvferry calibrate --no-rope)"
        ) from error
    profile.check(rope=rope)


def _figure(profile: Profile, text: str, name: str) -> float | None:
    """What the certificate states of the codec on `text`, if anything."""
    codecs = profile.certificate.get(text)
    figures = codecs.get(TRANSFORM) if isinstance(codecs, dict) else None
    value = figures.get(name) if isinstance(figures, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else None
