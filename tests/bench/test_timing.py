"""Rounds and summaries."""

import math

import pytest

from kvferry.bench.timing import Lap, host_clock, interleaved, summary


def test_methods_take_turns_and_each_begins_some_rounds():
    order = []
    methods = {name: lambda name=name: order.append(name) for name in "abc"}
    laps = interleaved(methods, 3, host_clock)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(found) for found in laps.values()] == [3, 3, 3]


def test_long_cases_get_fewer_rounds():
    def clock(run):
        run()
        return Lap(1.0, 0.5)

    assert len(interleaved({"a": list, "b": list}, 100, clock, max_seconds=40)["a"]) == 20
    assert len(interleaved({"a": list, "b": list}, 100, clock, max_seconds=1)["a"]) == 5
    assert len(interleaved({"a": list}, 100, clock, max_seconds=math.inf)["a"]) == 100
    assert len(interleaved({"a": list}, 2, clock, max_seconds=0)["a"]) == 2


def test_summary():
    laps = [Lap(work / 1e6, 2e-6) for work in range(1, 101)]
    found = summary(laps, 505_000)
    assert found["repeats"] == 100
    assert found["median_us"] == pytest.approx(50.5)
    assert found["p99_us"] == pytest.approx(99)
    assert found["gb_per_s"] == pytest.approx(10)
    assert found["host_median_us"] == pytest.approx(2)
    assert summary(laps[:1], 1)["p99_us"] == pytest.approx(1)
