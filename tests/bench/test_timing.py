"""Rounds and summaries."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from kvferry.bench import timing
from kvferry.bench.timing import BURST, Lap, QueuedClock, Rotation, host_clock, host_series, interleaved, summary


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


def test_calls_rotate_over_sets_through_legs_and_bursts():
    seen = []
    legs = {"out": lambda number: seen.append(("out", number)), "back": lambda number: seen.append(("back", number))}
    laps, ahead = Rotation(3).laps(legs, BURST + 1, host_series)
    assert [len(found) for found in laps.values()] == [BURST + 1] * 2 and all(ahead.values())
    assert [number for _, number in seen] == [place % 3 for place in range(len(seen))]
    names = "".join(name[0] for name, _ in seen)
    assert names == "o" * 3 + "b" * 3 + "o" * BURST + "b" * BURST + "ob"


def test_long_legs_get_fewer_laps():
    laps, ahead = Rotation(1).laps(
        {"a": lambda number: None}, 50, lambda runs: ([Lap(1.0, 0.5) for _ in runs], False), 9
    )
    assert len(laps["a"]) == 9 and not ahead["a"]


class SlowDevice:
    """A CUDA stream in made-up time: runs take `work` on the device and `host` to submit."""

    def __init__(self, host, work):
        self.now = self.free = 0.0  # of the host; when the device has done what it was given
        self.host, self.work = host, work
        self.holds = []
        event = self.event
        self.cuda = SimpleNamespace(
            Event=lambda enable_timing: event(),
            current_stream=lambda: SimpleNamespace(synchronize=self.wait),
            device=lambda index: nullcontext(),
            _sleep=self.hold,
        )

    def event(self):
        found = SimpleNamespace(at=None)
        found.record = lambda stream: setattr(found, "at", max(self.now, self.free))
        found.query = lambda: found.at <= self.now
        found.elapsed_time = lambda end: (end.at - found.at) * 1e3
        return found

    def hold(self, cycles):
        self.holds.append(cycles / 2e9)
        self.free = max(self.now, self.free) + cycles / 2e9

    def wait(self):
        self.now = max(self.now, self.free)

    def run(self):
        self.now += self.host
        self.free = max(self.now, self.free) + self.work


def clock_of(monkeypatch, device):
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=device.cuda))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: device.now))
    return QueuedClock(0)


def test_queued_runs_are_timed_without_the_hosts_share(monkeypatch):
    device = SlowDevice(host=100e-6, work=30e-6)
    clock = clock_of(monkeypatch, device)
    assert device.holds[-1] == pytest.approx(0.01), "cycles are calibrated"
    for _ in range(2):
        laps, ahead = clock([device.run] * 32)
        assert ahead and [lap.work for lap in laps] == [pytest.approx(30e-6)] * 32
        assert laps[0].host == pytest.approx(100e-6)


def test_the_device_is_held_longer_for_a_slow_host(monkeypatch):
    device = SlowDevice(host=2e-3, work=30e-6)
    clock = clock_of(monkeypatch, device)
    laps, ahead = clock([device.run] * 32)
    assert ahead and max(lap.work for lap in laps) == pytest.approx(30e-6)
    held = [hold for hold in device.holds if hold != pytest.approx(0.01, rel=0.6)]
    assert len(held) == 2 and held[1] == pytest.approx(4 * held[0])


def test_runs_that_wait_for_the_device_are_marked(monkeypatch):
    device = SlowDevice(host=1e-6, work=30e-6)
    clock = clock_of(monkeypatch, device)

    def waits():
        device.wait()
        device.run()

    assert clock([waits] * 4)[1] is False
