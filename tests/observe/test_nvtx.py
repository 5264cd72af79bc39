"""Ranges for profilers: nothing where nobody asks for them."""

import timeit

import pytest
import torch

from kvferry.observe import nvtx


@pytest.fixture
def environment(monkeypatch):
    """Sets variables and forgets what was found out."""
    for name in ("KVFERRY_NVTX", *nvtx.PROFILER_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    yield lambda **names: [monkeypatch.setenv(*item) for item in names.items()] and nvtx.nvtx_enabled.cache_clear()
    nvtx.nvtx_enabled.cache_clear()


@pytest.fixture
def marks(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    return seen


def test_off_by_default(environment, marks):
    nvtx.nvtx_enabled.cache_clear()
    with nvtx.nvtx_range("a"), nvtx.nvtx_range("b"):
        pass
    assert nvtx.nvtx_range("a") is nvtx.nvtx_range("b")
    assert marks == []


@pytest.mark.parametrize("name", ["KVFERRY_NVTX", *nvtx.PROFILER_VARIABLES])
def test_on_when_asked_or_profiled(environment, marks, name):
    environment(**{name: "1"})
    assert nvtx.nvtx_enabled()
    del marks[:]
    with nvtx.nvtx_range("encode"):
        assert marks == ["encode"]
    assert marks == ["encode", "end"]
    with pytest.raises(KeyError), nvtx.nvtx_range("fails"):
        raise KeyError
    assert marks[2:] == ["fails", "end"]


def test_off_when_told_so(environment, marks):
    environment(KVFERRY_NVTX="0", NSYS_PROFILING_SESSION_ID="1")
    assert not nvtx.nvtx_enabled()


def test_a_setting_that_says_neither_is_refused(environment):
    environment(KVFERRY_NVTX="yes")
    with pytest.raises(ValueError, match="KVFERRY_NVTX is 'yes'"):
        nvtx.nvtx_range("a")


def test_off_without_the_library(environment, monkeypatch):
    def missing(name):
        raise RuntimeError("NVTX functions not installed")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", missing)
    environment(KVFERRY_NVTX="1")
    assert not nvtx.nvtx_enabled()


def test_costs_nothing_to_speak_of_when_off(environment):
    nvtx.nvtx_enabled.cache_clear()

    def once():
        with nvtx.nvtx_range("a"):
            pass

    assert min(timeit.repeat(once, number=2000, repeat=20)) / 2000 < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_ranges_are_pushed(environment):
    environment(KVFERRY_NVTX="1")
    assert nvtx.nvtx_enabled()
    with nvtx.nvtx_range("encode"):
        torch.zeros(1, device="cuda")
