"""What a calibration is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.calibration.basis import Scope
from kvferry.codecs.transform.rope import Rope
from kvferry.evaluation import PrefixProtocol

Report = Callable[[str, int, int, str], None]
"""Called with (stage, steps done, steps in all or 0 where nobody knows, a remark)."""
CACHED_SHARE = 3 / 4  # of a window; the rest is scored


@dataclass(frozen=True)
class Settings:
    """What to calibrate on, and to which end.

    `windows` texts of `window_tokens` tokens for means and bases; `held_out` more for the steps, and as many that
    neither has seen. `scope`: which heads are transformed together (`basis.heads_of_a_group`). At most one target:
    `target_kl` (nats a token, at most) or `target_ratio` (raw over encoded bytes, at least); with none, the KL of an
    fp8 e4m3 cast of the same cache. `rope`: in place of the one in the model's configuration. Raises `ValueError`.
    """

    windows: int = 16
    window_tokens: int = 2048
    held_out: int = 4
    scope: Scope = "auto"
    target_kl: float | None = None
    target_ratio: float | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("window_tokens", 16), ("held_out", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")
        if self.target_kl is not None and self.target_ratio is not None:
            raise ValueError("target_kl and target_ratio exclude each other: give one")
        if self.target_kl is not None and not (math.isfinite(self.target_kl) and self.target_kl > 0):
            raise ValueError(f"target_kl is {self.target_kl}: give nats a token, above 0")
        if self.target_ratio is not None and not (math.isfinite(self.target_ratio) and self.target_ratio > 1):
            raise ValueError(f"target_ratio is {self.target_ratio}: give raw over encoded bytes, above 1")

    @property
    def protocol(self) -> PrefixProtocol:
        """What is restored (whole tiles where it can be) and scored in a held-out window."""
        prefix = int(self.window_tokens * CACHED_SHARE)
        prefix -= prefix % 64 if prefix >= 64 else 0
        return PrefixProtocol(prefix, self.window_tokens - prefix)
