"""Compiling and caching kernels: needs NVRTC's wheel, no GPU."""

from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from kvferry.device import nvrtc

SOURCE = 'extern "C" __global__ void add(float *x) { x[threadIdx.x] += VALUE; }'


def test_compiles_machine_code_for_the_architecture_asked():
    cubin = nvrtc.compile_cubin(SOURCE, "sm_90", {"VALUE": 3})
    assert cubin[:4] == b"\x7fELF"
    assert b"add" in cubin
    assert cubin != nvrtc.compile_cubin(SOURCE, "sm_90", {"VALUE": 4})


def test_a_compile_error_carries_the_compilers_words():
    with pytest.raises(nvrtc.KernelError, match=r"(?s)sm_90.*undefined_name"):
        nvrtc.compile_cubin("__global__ void f() { undefined_name; }", "sm_90", {})


def test_cache_is_keyed_by_everything_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KVFERRY_CACHE_DIR", str(tmp_path))
    first = nvrtc.cached_cubin(SOURCE, "sm_90", {"VALUE": 3})
    (file,) = (tmp_path / "kvferry").iterdir()
    assert file.read_bytes() == first
    file.write_bytes(b"marker")
    assert nvrtc.cached_cubin(SOURCE, "sm_90", {"VALUE": 3}) == b"marker"
    assert nvrtc.cached_cubin(SOURCE, "sm_90", {"VALUE": 4}) != b"marker"
    assert nvrtc.cached_cubin(SOURCE, "sm_80", {"VALUE": 3}) != b"marker"
    assert len(list((tmp_path / "kvferry").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("KVFERRY_CACHE_DIR", str(blocked))
    assert nvrtc.cached_cubin(SOURCE, "sm_90", {"VALUE": 3})[:4] == b"\x7fELF"
