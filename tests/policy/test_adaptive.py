"""The controller: it stays within its limits whatever it is told, moves for a cause only, and comes back."""

import logging
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvferry
from kvferry import Bounded, Lossless, Profile, Raw, Rope, Transform
from kvferry.evaluation.schemes import SigmaBounded
from kvferry.policy import Adaptive, AdaptiveStats, ByProfile, Constant

BASE = Bounded(0.1, relative=False)
TENSOR = torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
CALM = {"stored": 100}
OVERFLOW = {"stored": 90, "relaxed": 3, "rejected": 10}
BUSY = {"stored": 100, "wire_busy": 0.99}
BETWEEN = {"stored": 100, "relaxed": 3}


def told(policy: Adaptive, *observations: dict[str, float]) -> list[float]:
    return [policy.observe(**each) for each in observations]  # type: ignore[arg-type]


@st.composite
def observations(draw: st.DrawFn) -> dict[str, float]:
    chunks = st.integers(0, 8) | st.integers(0, 2**63 - 1) | st.floats(0, 1e18)
    shares = st.floats(0, 1)
    return {"stored": draw(chunks), "relaxed": draw(chunks), "rejected": draw(chunks), "wire_busy": draw(shares)}


@st.composite
def policies(draw: st.DrawFn) -> Adaptive:
    tightest = draw(st.floats(2.0**-10, 2.0**10))
    loosest = draw(st.floats(tightest, tightest * 64) | st.just(tightest))
    return Adaptive(BASE, tightest, loosest, step=draw(st.floats(1.05, 9)), patience=draw(st.integers(1, 4)))


def pressed(each: dict[str, float]) -> bool:
    """By the defaults: more than 5% of the chunks overflowed, or the wire was busy for more than 95%."""
    over = each["relaxed"] + each["rejected"]
    chunks = max(each["stored"] + each["rejected"], over)
    return (chunks > 0 and over / chunks > 0.05) or each["wire_busy"] > 0.95


def calm(each: dict[str, float]) -> bool:
    over = each["relaxed"] + each["rejected"]
    chunks = max(each["stored"] + each["rejected"], over)
    return (chunks == 0 or over / chunks <= 0.01) and each["wire_busy"] <= 0.7


class TestProperties:
    @given(policies(), st.lists(observations(), max_size=40))
    def test_never_beyond_the_limits(self, policy: Adaptive, sequence: list[dict[str, float]]) -> None:
        for each in sequence:
            (multiplier,) = told(policy, each)
            assert policy.tightest <= multiplier <= policy.loosest
            assert policy.multiplier == multiplier
            codec = policy(0, "k", TENSOR)
            assert isinstance(codec, Bounded)
            assert codec == replace(BASE, error_bound=BASE.error_bound * multiplier)
            assert codec.error_bound <= BASE.error_bound * policy.loosest

    @given(policies(), st.lists(observations(), max_size=40))
    def test_no_change_without_cause(self, policy: Adaptive, sequence: list[dict[str, float]]) -> None:
        """A step up needs pressure now and `patience` times since the last change, a step down as much calm."""
        since: list[dict[str, float]] = []
        before = policy.tightest
        for each in sequence:
            since.append(each)
            (after,) = told(policy, each)
            if after != before:
                last = since[-policy._patience :]
                assert len(last) == policy._patience
                assert all((pressed if after > before else calm)(one) for one in last)
                assert not any((calm if after > before else pressed)(one) for one in last)
                since = []
            before = after

    @given(policies(), st.lists(observations(), max_size=30))
    def test_calm_leads_back(self, policy: Adaptive, sequence: list[dict[str, float]]) -> None:
        told(policy, *sequence)
        steps = len(policy._multipliers)
        told(policy, *[CALM] * (policy._patience * steps))
        assert policy.multiplier == policy.tightest
        stats = policy.stats()
        assert stats.loosened == stats.tightened
        assert stats.changes == 2 * stats.loosened
        told(policy, *[CALM] * 20)
        assert replace(policy.stats(), observations=0) == replace(stats, observations=0)

    @given(policies())
    def test_pressure_reaches_the_loosest(self, policy: Adaptive) -> None:
        seen = told(policy, *[OVERFLOW] * (policy._patience * len(policy._multipliers)))
        assert seen == sorted(seen)
        assert policy.multiplier == policy.loosest
        assert policy.stats().loosened == len(policy._multipliers) - 1

    @given(policies(), observations(), st.sampled_from(["stored", "relaxed", "rejected", "wire_busy"]), st.data())
    def test_nonsense_is_named_and_changes_nothing(
        self, policy: Adaptive, each: dict[str, float], name: str, data: st.DataObject
    ) -> None:
        told(policy, OVERFLOW)
        before = policy.stats()
        wrong = data.draw(st.just(math.nan) | st.just(math.inf) | st.floats(max_value=-1e-300) | st.just(-1))
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={wrong!r} must be')}"):
            told(policy, each | {name: wrong})
        assert policy.stats() == before


class TestMoves:
    def test_up_after_patience_and_back(self) -> None:
        policy = Adaptive(BASE, 1.0, 3.0, step=2.0, patience=3)
        up, down = [OVERFLOW] * 3, [CALM] * 3
        assert told(policy, *up, *up, *up) == [1, 1, 2, 2, 2, 3, 3, 3, 3]
        assert told(policy, *down, *down, *down) == [3, 3, 2, 2, 2, 1, 1, 1, 1]
        assert policy.stats() == AdaptiveStats(multiplier=1.0, observations=18, loosened=2, tightened=2)
        assert policy.stats().changes == 4

    @pytest.mark.parametrize("pressure", [OVERFLOW, BUSY, {"stored": 0, "rejected": 1}, {"stored": 10, "relaxed": 1}])
    def test_causes(self, pressure: dict[str, float]) -> None:
        policy = Adaptive(BASE, 1.0, 4.0, patience=1)
        assert told(policy, pressure) == [math.sqrt(2)]

    @pytest.mark.parametrize("middle", [BETWEEN, CALM])
    def test_a_row_is_broken(self, middle: dict[str, float]) -> None:
        policy = Adaptive(BASE, 1.0, 4.0, patience=2)
        assert set(told(policy, *[OVERFLOW, middle] * 10)) == {1.0}

    def test_between_the_thresholds_it_stays(self) -> None:
        """Hysteresis: a share that made it neither loosen nor tighten keeps what was found."""
        policy = Adaptive(BASE, 1.0, 4.0, step=2.0, patience=2)
        told(policy, OVERFLOW, OVERFLOW)
        assert set(told(policy, *[BETWEEN, {"stored": 9, "wire_busy": 0.8}] * 20)) == {2.0}

    def test_a_wire_that_is_busy_is_not_calm(self) -> None:
        policy = Adaptive(BASE, 1.0, 4.0, step=2.0, patience=1, wire_busy_above=0.5, wire_busy_below=0.2)
        assert told(policy, {"stored": 1, "wire_busy": 0.6}) == [2]
        assert told(policy, {"stored": 1, "wire_busy": 0.3}, {"stored": 0, "wire_busy": 0.2}) == [2, 1]

    def test_the_ladder(self) -> None:
        """Both limits exactly, sqrt(2) apart, and no rung beside the last one for a rounding."""
        policy = Adaptive(BASE, 0.5, 4.0, patience=1)
        seen = [policy.multiplier, *told(policy, *[OVERFLOW] * 9)]
        assert seen == pytest.approx([0.5 * 2 ** (min(i, 6) / 2) for i in range(10)])
        assert (seen[0], seen[-1]) == (0.5, 4.0)

    def test_equal_limits_hold_it(self) -> None:
        policy = Adaptive(BASE, 2.0, 2.0, patience=1)
        assert told(policy, OVERFLOW, CALM) == [2.0, 2.0]
        assert policy.stats().changes == 0


class TestTelling:
    def test_each_change_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        policy = Adaptive(BASE, 1.0, 2.0, step=2.0, patience=1)
        with caplog.at_level(logging.INFO, logger="kvferry.policy"):
            told(policy, OVERFLOW, OVERFLOW, CALM, CALM, BUSY)
        assert [record.levelno for record in caplog.records] == [logging.INFO] * 3 == [20] * policy.stats().changes
        first, second, third = (record.getMessage() for record in caplog.records)
        assert "loosened: 2 times the base's, before 1 (limits 1 to 2; overflow 0.13, wire 0)" in first
        assert "tightened: 1 times the base's, before 2" in second
        assert "loosened" in third and "wire 0.99" in third

    def test_handlers_may_ask(self) -> None:
        policy = Adaptive(BASE, 1.0, 2.0, patience=1)
        seen = []

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.append(policy.stats().multiplier)

        logger, handler = logging.getLogger("kvferry.policy.adaptive"), Handler()
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            told(policy, OVERFLOW)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        assert seen == [math.sqrt(2)]

    def test_a_snapshot_stays(self) -> None:
        policy = Adaptive(BASE, 1.0, 2.0, patience=1)
        stats = policy.stats()
        told(policy, OVERFLOW)
        assert stats == AdaptiveStats(1.0, 0, 0, 0)
        with pytest.raises(FrozenInstanceError):
            stats.multiplier = 3.0  # type: ignore[misc]

    def test_threads(self) -> None:
        """Calls are counted each, and what is read meanwhile is on the ladder."""
        policy = Adaptive(BASE, 1.0, 64.0, patience=2)
        allowed = {BASE.error_bound * each for each in policy._multipliers}
        wrong = []

        def work(kind: Iterable[dict[str, float]]) -> None:
            for each in kind:
                told(policy, each)
                codec = policy(0, "k", TENSOR)
                if codec.error_bound not in allowed:  # type: ignore[attr-defined]
                    wrong.append(codec)

        threads = [threading.Thread(target=work, args=([kind] * 500,)) for kind in (OVERFLOW, CALM, BUSY, BETWEEN)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = policy.stats()
        assert not wrong
        assert stats.observations == 2000
        assert stats.multiplier == policy._multipliers[stats.loosened - stats.tightened]


class TestBases:
    def test_transform(self) -> None:
        profile = Profile.hadamard(2, 2, 16, Rope.none(16), [(0.25, 0.125)] * 2)
        for base in (Transform(profile, error_bound=0.5), ByProfile(profile, error_bound=0.5)):
            policy = Adaptive(base, 1.0, 2.0, step=2.0, patience=1)
            assert policy(1, "v", TENSOR) == Transform(profile, 1, "v", 0.5)
            told(policy, OVERFLOW)
            assert policy(1, "v", TENSOR) == Transform(profile, 1, "v", 1.0)

    def test_a_policy_of_mixed_codecs(self) -> None:
        """What is exact for a reason stays exact."""
        policy = Adaptive(SigmaBounded(0.1), 1.0, 2.0, step=2.0, patience=1)
        tight = policy(0, "k", TENSOR)
        told(policy, OVERFLOW)
        loose = policy(0, "k", TENSOR)
        assert isinstance(tight, Bounded) and isinstance(loose, Bounded)
        assert loose.error_bound == 2 * tight.error_bound
        assert policy(0, "k", torch.zeros_like(TENSOR)) == Lossless()

    def test_a_frame_keeps_the_bound(self) -> None:
        policy = Adaptive(BASE, 1.0, 4.0, step=4.0, patience=1)
        tight = kvferry.compress(TENSOR, policy(0, "k", TENSOR))
        told(policy, OVERFLOW)
        loose = kvferry.compress(TENSOR, policy(0, "k", TENSOR))
        assert len(loose) < len(tight)
        for frame, bound in ((tight, 0.1), (loose, 0.4)):
            assert (kvferry.decompress(frame).double() - TENSOR.double()).abs().max() <= bound
            assert kvferry.inspect(frame).bound_used <= bound

    def test_what_has_no_bound_to_move(self) -> None:
        profile = Profile.hadamard(1, 2, 16, Rope.none(16), [(0.25, 0.125)])
        for base in (Raw(), Lossless(), Constant(Lossless())):
            with pytest.raises(TypeError, match="is exact and has no error bound to move: use it without Adaptive"):
                Adaptive(base, 1.0, 2.0)
        with pytest.raises(TypeError, match=r"ratio=4.0 has no error bound to move: give error_bound="):
            Adaptive(Transform(profile, ratio=4.0), 1.0, 2.0)
        policy = Adaptive(lambda *_: Transform(profile, 0, "k", ratio=4.0), 1.0, 2.0)
        with pytest.raises(TypeError, match="no error bound to move"):
            policy(0, "k", TENSOR)
        with pytest.raises(TypeError, match="codec is a float: give a codec"):
            Adaptive(0.5, 1.0, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tightest": 0.0}, r"tightest=0.0, loosest=4.0: give multipliers"),
        ({"tightest": -1.0}, "tightest=-1.0"),
        ({"tightest": math.nan}, "tightest=nan"),
        ({"loosest": 0.5}, "loosest=0.5"),
        ({"loosest": math.inf}, "loosest=inf"),
        ({"loosest": math.nan}, "loosest=nan"),
        ({"step": 1.0}, "step=1.0 must be a finite factor of at least 1.01"),
        ({"step": math.nan}, "step=nan"),
        ({"step": math.inf}, "step=inf"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"patience": True}, "patience=True"),
        ({"overflow_below": 0.05}, "overflow_below=0.05, overflow_above=0.05: give shares from 0 to 1"),
        ({"overflow_above": 1.5}, "overflow_above=1.5"),
        ({"overflow_below": -0.1}, "overflow_below=-0.1"),
        ({"wire_busy_above": math.nan}, "wire_busy_above=nan"),
        ({"wire_busy_below": 0.99}, "wire_busy_below=0.99"),
    ],
)
def test_parameters_are_checked(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adaptive(**({"base": BASE, "tightest": 1.0, "loosest": 4.0} | changes))  # type: ignore[arg-type]
