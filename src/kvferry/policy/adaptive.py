"""Bounds that move at run time: looser while slots overflow or the wire is busy, back when it is calm."""

import logging
import math
from dataclasses import dataclass, fields, is_dataclass, replace
from threading import Lock
from typing import Any

from torch import Tensor

from kvferry.codecs.base import Codec
from kvferry.codecs.transform import Transform
from kvferry.policy.choice import CodecChoice, KOrV, check_choice, choose
from kvferry.policy.fixed import Constant

_log = logging.getLogger(__name__)
SMALLEST_STEP = 1.01
_MOST_CHUNKS = 1 << 63
SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER = 2.0**-64, 2.0**64


@dataclass(frozen=True)
class AdaptiveStats:
    """A snapshot: the multiplier now, and counts since the policy was made. `loosened` and `tightened` are steps."""

    multiplier: float
    observations: int
    loosened: int
    tightened: int

    @property
    def changes(self) -> int:
        """Steps either way."""
        return self.loosened + self.tightened


class Adaptive:
    """What `base` chooses (a policy, or a codec), its error bound times a multiplier that moves between `tightest` and
    `loosest`, the user's limits, in factors of `step`. It starts at `tightest`. Exact codecs that a policy chooses for
    some tensors stay as they are.

    `observe` is told what happened since the last call. An observation is under pressure where more than
    `overflow_above` of the chunks fitted no slot at the asked bound, or the wire was busy for more than
    `wire_busy_above` of the time; it is calm where neither is above `overflow_below` and `wire_busy_below`, also when
    nothing was stored. `patience` observations under pressure in a row loosen the bound by one step, as many calm ones
    tighten it; those in between do neither, and end either row. So does a change: what it does is waited for.

    The limits are on what is asked of codecs. Slots with `on_overflow="relax"` double the bounds of a chunk on top of
    that, at most `max_relaxations` times: with "reject", or 0, the loosest is the last word. What was encoded keeps the
    bound that it was encoded at. Every change is logged (INFO, once) and counted. Thread-safe.

    Raises `TypeError` for a `base` that is neither codec nor policy, and for codecs without an error bound: an exact
    one, or a `Transform` with a ratio (that a policy chooses: when called); `ValueError` for other parameters.
    """

    def __init__(
        self,
        base: CodecChoice,
        tightest: float,
        loosest: float,
        *,
        step: float = math.sqrt(2),
        patience: int = 3,
        overflow_above: float = 0.05,
        overflow_below: float = 0.01,
        wire_busy_above: float = 0.95,
        wire_busy_below: float = 0.7,
    ) -> None:
        check_choice(base)
        codec = base.codec if isinstance(base, Constant) else base
        if isinstance(codec, Codec):
            if codec.exact:
                raise TypeError(f"{codec} is exact and has no error bound to move: use it without Adaptive")
            _with_bound_times(codec, 1.0)
        if not SMALLEST_MULTIPLIER <= tightest <= loosest <= LARGEST_MULTIPLIER:
            raise ValueError(
                f"tightest={tightest!r}, loosest={loosest!r}: give multipliers of the error bound, 2**-64 to 2**64, "
                "the loosest not below the tightest, such as 1.0 and 4.0"
            )
        if not SMALLEST_STEP <= step < math.inf:
            raise ValueError(f"step={step!r} must be a finite factor of at least {SMALLEST_STEP}, such as 1.414")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r} must be a whole number of observations, at least 1")
        _check_thresholds("overflow", overflow_below, overflow_above)
        _check_thresholds("wire_busy", wire_busy_below, wire_busy_above)
        self._base = base
        self._multipliers = _ladder(float(tightest), float(loosest), step)
        self._patience = patience
        self._overflow = overflow_below, overflow_above
        self._wire = wire_busy_below, wire_busy_above
        self._lock = Lock()
        self._rung = 0
        self._pressed, self._calm = 0, 0  # observations in a row
        self._observations, self._loosened, self._tightened = 0, 0, 0

    @property
    def tightest(self) -> float:
        """The smallest multiplier."""
        return self._multipliers[0]

    @property
    def loosest(self) -> float:
        """The largest multiplier."""
        return self._multipliers[-1]

    @property
    def multiplier(self) -> float:
        """What error bounds are multiplied by now."""
        with self._lock:
            return self._multipliers[self._rung]

    def stats(self) -> AdaptiveStats:
        """The multiplier now and counts so far."""
        with self._lock:
            return AdaptiveStats(
                self._multipliers[self._rung], self._observations, self._loosened, self._tightened
            )  # fmt: skip

    def __call__(self, layer_index: int, which: KOrV, tensor: Tensor, /) -> Codec:
        """What the base chooses, at its error bound times the multiplier now."""
        return _with_bound_times(choose(self._base, layer_index, which, tensor), self.multiplier)

    def observe(self, *, stored: int, relaxed: int = 0, rejected: int = 0, wire_busy: float = 0.0) -> float:
        """Tell what happened since the last call, and get the multiplier that follows.

        Chunks: `stored`, `relaxed` of them at a doubled bound, and `rejected`, which fitted no slot and are not among
        the stored (as in `JobResult` and vLLM's metrics). `wire_busy`: share of the time that copies were under way, 0
        to 1. Raises `ValueError`, and counts nothing, for numbers that are none of this.
        """
        for name, count in (("stored", stored), ("relaxed", relaxed), ("rejected", rejected)):
            if not 0 <= count < _MOST_CHUNKS:
                raise ValueError(f"{name}={count!r} must be a number of chunks, 0 or more, since the last call")
        if not 0 <= wire_busy <= 1:
            raise ValueError(f"wire_busy={wire_busy!r} must be a share of the time, 0 to 1")
        # Counters that are read one after the other may tell of more relaxed chunks than stored ones.
        chunks = max(stored, relaxed) + rejected
        return self._weigh((relaxed + rejected) / chunks if chunks else 0.0, wire_busy)

    def _weigh(self, overflow: float, wire_busy: float) -> float:
        shares = (overflow, self._overflow), (wire_busy, self._wire)
        pressed = any(share > above for share, (_, above) in shares)
        calm = all(share <= below for share, (below, _) in shares)
        with self._lock:
            self._observations += 1
            self._pressed = self._pressed + 1 if pressed else 0
            self._calm = self._calm + 1 if calm else 0
            before = self._rung
            if self._pressed >= self._patience:
                self._rung = min(before + 1, len(self._multipliers) - 1)
                self._loosened += self._rung - before
            elif self._calm >= self._patience:
                self._rung = max(before - 1, 0)
                self._tightened += before - self._rung
            after = self._rung
            if after != before:
                self._pressed, self._calm = 0, 0
        if after != before:  # outside the lock: handlers may ask for the stats
            _log.info(
                "error bounds %s: %.4g times the base's, before %.4g (limits %.4g to %.4g; overflow %.3g, wire %.3g)",
                "loosened" if after > before else "tightened", self._multipliers[after], self._multipliers[before],
                self.tightest, self.loosest, overflow, wire_busy,
            )  # fmt: skip
        return self._multipliers[after]


def _ladder(tightest: float, loosest: float, step: float) -> tuple[float, ...]:
    """Every value of the multiplier, ascending; both limits are among them, exactly."""
    found = [tightest]
    while found[-1] * step < loosest * (1 - 2.0**-20):  # powers of sqrt(2) are rounded: no rung just below the last
        found.append(found[-1] * step)
    return (*found, loosest) if loosest > tightest else (tightest,)


def _with_bound_times(codec: Codec, factor: float) -> Codec:
    """`codec` at `factor` times its error bound; exact codecs have none. Raises `TypeError` for one that is fixed."""
    if codec.exact:
        return codec
    bound = getattr(codec, "error_bound", None)
    if isinstance(codec, Transform) and codec.ratio is not None:
        raise TypeError(f"a Transform with ratio={codec.ratio} has no error bound to move: give error_bound= instead")
    if bound is None or not is_dataclass(codec) or "error_bound" not in {each.name for each in fields(codec)}:
        raise TypeError(f"{codec} has no error_bound to move: use Bounded, Transform or another codec that has one")
    changed: Any = replace(codec, error_bound=bound * factor)
    assert isinstance(changed, Codec)
    return changed


def _check_thresholds(name: str, below: float, above: float) -> None:
    if not 0 <= below < above <= 1:
        raise ValueError(
            f"{name}_below={below!r}, {name}_above={above!r}: give shares from 0 to 1, the first smaller: between them "
            "nothing changes"
        )
