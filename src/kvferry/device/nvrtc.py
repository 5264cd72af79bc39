"""CUDA C++ kernels compiled at run time by NVRTC, cached on disk, loaded and launched through cuda-bindings.

A user's machine needs no compiler: NVRTC comes as a wheel, and compiling needs no GPU (CI compiles for every generation
that is supported). `cuda.bindings` is used directly, without `cuda.core` on top: these few calls are the stable part of
both.
"""

import ctypes
import hashlib
import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvferry.errors import KVFerryError


class KernelError(KVFerryError):
    """A kernel could not be compiled, loaded or launched. The message names the CUDA error."""


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a cuda-bindings call, or `KernelError`."""
    status, *values = result
    if int(status) != 0:
        raise KernelError(f"{type(status).__name__}: {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else tuple(values)


def compile_cubin(source: str, arch: str, defines: dict[str, int]) -> bytes:
    """Machine code of `source` for `arch` ("sm_90"). Raises `KernelError` with the compiler's log."""
    from cuda.bindings import nvrtc

    # Without -fmad=false a product and a sum would be contracted, and the bytes differ from the reference.
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-fmad=false", "-default-device"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kvferry.cu", 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if int(status) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise KernelError(f"NVRTC: {status.name} for {arch}: {log.decode(errors='replace').strip(chr(0))}")
        cubin: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _cache_folder() -> Path:
    root = os.environ.get("KVFERRY_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvferry"


def cached_cubin(source: str, arch: str, defines: dict[str, int]) -> bytes:
    """`compile_cubin`, kept on disk under everything it depends on. A cache that cannot be used costs a compilation
    only."""
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, arch, sorted(defines.items()), version)).encode()).hexdigest()
    path = _cache_folder() / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = compile_cubin(source, arch, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written apart and renamed: another process may read at any time.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        pass
    return cubin


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel of one device."""

    function: Any
    device: int

    def launch(self, grid: int, block: int, shared_bytes: int, arguments: "Arguments") -> None:
        """Queue the kernel on the current PyTorch stream of its device. Does not synchronise. Raises `KernelError`."""
        from cuda.bindings import driver

        stream = current_stream_handle(self.device)
        _checked(
            driver.cuLaunchKernel(self.function, grid, 1, 1, block, 1, 1, shared_bytes, stream, arguments.address, 0)
        )

    def resident_blocks(self, block: int, shared_bytes: int) -> int:
        """Blocks of that size that one multiprocessor holds at a time."""
        from cuda.bindings import driver

        return int(_checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, block, shared_bytes)))


def current_stream_handle(device: int) -> int:
    """CUDA's handle of the current PyTorch stream of a device. PyTorch's public way takes microseconds, which count on
    the way of every launch; what its own compiled code uses takes a tenth."""
    handle: int = _raw_stream(device) if _raw_stream else torch.cuda.current_stream(device).cuda_stream
    return handle


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def make_current(index: int) -> AbstractContextManager[object]:
    """Makes a device PyTorch's current one. Where it is already, as on every launch but the odd one, nothing is changed
    and put back, for which `torch.cuda.device` takes microseconds."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def zero_words(address: int, count: int, device: int) -> None:
    """Queue `count` 32-bit zeros at `address` on the current stream. Raises `KernelError`."""
    from cuda.bindings import driver

    _checked(driver.cuMemsetD32Async(address, 0, count, current_stream_handle(device)))


@cache
def most_shared_bytes(device: int) -> int:
    """Of shared memory, what a block may have on CUDA device `device`. Raises `KernelError`."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_checked(driver.cuDeviceGetAttribute(attribute, _checked(driver.cuDeviceGet(device)))))


def load_kernel(cubin: bytes, name: str, device: int, shared_bytes: int = 0) -> Kernel:
    """Kernel `name` of `cubin` on CUDA device `device`, allowed `shared_bytes` of dynamic shared memory."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes sure that the primary context exists and is current
        module = _checked(driver.cuModuleLoadData(cubin))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        if shared_bytes:  # static memory counts too towards the 48 KiB that need no leave
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return Kernel(function, device)


class Arguments:
    """What a kernel is launched with: ctypes values, in its order. They may be changed between launches, which copy
    them."""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self._pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.address = ctypes.addressof(self._pointers)
