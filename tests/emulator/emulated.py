"""The kernels of codecs/fused on a CPU: compiled as C++ behind emulator.h, launched in a GPU's place."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.codecs.fused import kernels, slots, transform
from kvferry.codecs.fused.kernels import ENTRIES, Case, Loaded

COMPILER = shutil.which("g++") or shutil.which("c++")
BLOCKS = 3
"""Of a grid, at most: each is a thread."""
_HEADER = Path(__file__).with_name("emulator.h")
_ENTRY = """
extern "C" void emulated_launch(void **arguments, unsigned grid, unsigned size) {{
    emulator::launch({name}, arguments, grid, size);
}}
"""


@dataclass(frozen=True)
class EmulatedKernel:
    """What `kvferry.device.nvrtc.Kernel` is on a GPU; a launch returns when it is done."""

    launcher: Any

    def launch(self, grid: int, block: int, shared_bytes: int, arguments: Any) -> None:
        assert shared_bytes <= 227 << 10
        self.launcher(ctypes.c_void_p(arguments.address), grid, block)


@cache
def compiled(source: str, defines: tuple[tuple[str, int], ...], name: str) -> EmulatedKernel:
    """`name` of the CUDA C++ `source`, which begins with intrinsics.cu."""
    intrinsics = files("kvferry.codecs.fused").joinpath("intrinsics.cu").read_text()
    assert source.startswith(intrinsics)
    text = "".join(f"#define {key} {value}\n" for key, value in defines)
    text += _HEADER.read_text() + source.removeprefix(intrinsics) + _ENTRY.format(name=name)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    # Shared by the processes of a test run, and kept for the next: what has this name has these contents.
    folder = Path(tempfile.gettempdir()) / f"kvferry-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            program = Path(work) / "kernel.cpp"
            program.write_text(text)
            # No contraction of products and sums, as the kernels are compiled; words alias as they do in CUDA.
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
            options += ["-ffp-contract=off", "-fno-strict-aliasing"]
            assert COMPILER is not None
            done = subprocess.run(
                [COMPILER, *options, str(program), "-o", f"{work}/kernel.so"], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:4000]
            os.replace(f"{work}/kernel.so", library)
    launcher = ctypes.CDLL(str(library)).emulated_launch
    launcher.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    launcher.restype = None
    return EmulatedKernel(launcher)


@cache
def load(case: Case, kernel: str, device: int) -> Loaded:
    """`kernels.load`: `BLOCKS` multiprocessors with a block each."""
    shape = case.shape(kernel)
    threads, shared_bytes = 32 * shape.warps, case.table_bytes[kernel] + shape.warps * shape.warp_bytes
    defines = tuple(case.defines(kernel, threads).items())
    loaded: Any = compiled(case.source(kernel), defines, ENTRIES[kernel])
    return Loaded(loaded, threads, shared_bytes, 1, BLOCKS, shape.round_time)


def load_transform(case: transform.TransformCase, device: int) -> tuple[Any, int, int]:
    return compiled(transform.source(), tuple(case.defines.items()), transform.KERNEL), 1, BLOCKS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`slots.encode` and `decode`, and transform's, take tensors on the CPU and run the emulated kernels."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    prepared_of = slots._Prepared.of
    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(slots._Prepared, "of", lambda codec: replace(prepared_of(codec), device=torch.device("cpu", 0)))
    monkeypatch.setattr(slots, "current_stream_handle", lambda device: 0)
    for module in (slots, transform):
        monkeypatch.setattr(module, "zero_words", lambda address, count, device: ctypes.memset(address, 0, 4 * count))
    monkeypatch.setattr(transform, "_loaded", load_transform)
    monkeypatch.setattr(transform, "most_shared_bytes", lambda device: 227 << 10)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield
    slots._PREPARED.clear()
    slots._WORKSPACES.clear()
    transform._PREPARED.clear()
