"""The few calls of the CUDA driver that the copy layer makes, through cuda-bindings.

The driver's API and not the runtime's: it is what `nvrtc` uses, it needs nothing but the driver (a CUDA 13 runtime does
not run on a CUDA 12 driver), its failures leave no "last error" behind that PyTorch would find later, and it says
exactly which context a call goes to. `cuMemcpyAsync` and its kin are what `cudaMemcpyAsync` calls.
"""

import ctypes
import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvferry.errors import KVFerryError

Addresses = npt.NDArray[np.uint64]
"""Addresses or sizes in bytes, one a range."""

DRIVER_12_8, DRIVER_13_0 = 12080, 13000
"""The two versions of `cuMemcpyBatchAsync`: the first has one argument more."""

_EARLIER_WORK = (
    "work queued earlier has failed, and this call is the first to say so: run with CUDA_LAUNCH_BLOCKING=1, or under "
    "compute-sanitizer, to see which"
)
_REMEDIES = {
    "CUDA_ERROR_INVALID_VALUE": (
        "check that the memory still exists, and that host memory is page-locked in one piece or not at all"
    ),
    "CUDA_ERROR_OUT_OF_MEMORY": "ask for less, or raise the limit on locked memory (ulimit -l, the container's memory)",
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": "register a range once, and not one that shares a page with another",
    "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED": "it was unregistered before: let one owner register and unregister it",
    "CUDA_ERROR_NOT_SUPPORTED": "this system cannot do it: use plain memory and copy_",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "make this copy outside of graph capture",
    "CUDA_ERROR_ILLEGAL_ADDRESS": _EARLIER_WORK,
    "CUDA_ERROR_LAUNCH_FAILED": _EARLIER_WORK,
}


class CudaError(KVFerryError):
    """A call of the CUDA driver failed. The message names what was asked, the CUDA error and the remedy."""


def failure(status: Any, asked: str) -> CudaError:
    """The error for `status`, a `CUresult`, of the call that `asked` describes."""
    remedy = _REMEDIES.get(status.name, "see the CUDA driver's documentation of this error")
    return CudaError(f"{asked}: {status.name} ({int(status)}): {remedy}")


@functools.cache
def driver() -> Any:
    """The module `cuda.bindings.driver`, imported on first use. Raises `ImportError` where it is not installed."""
    from cuda.bindings import driver as module

    return module


@functools.cache
def is_cuda_memcpy_available() -> bool:
    """Whether copies go through the CUDA driver: a CUDA device, an NVIDIA build of PyTorch, cuda-bindings installed.

    Where it is not, every function of the copy layer falls back to `Tensor.copy_`. Found out once a process.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        return not driver().cuInit(0)[0]
    except (ImportError, RuntimeError):  # RuntimeError: the bindings find no libcuda
        return False


@functools.cache
def primary_context(device: int) -> Any:
    """The context that PyTorch uses on `device`. Kept for the life of the process. Raises `CudaError`."""
    driver().cuInit(0)  # PyTorch may have counted devices without it; where it fails, so does the next call
    status, handle = driver().cuDeviceGet(device)
    if status:
        raise failure(status, f"CUDA device {device}")
    status, context = driver().cuDevicePrimaryCtxRetain(handle)
    if status:
        raise failure(status, f"primary context of CUDA device {device}")
    return context


class on_device:  # noqa: N801 - used as a statement, like torch.cuda.device
    """`with on_device(index)`: driver calls go to that device's context. A thread may have none, or another's."""

    __slots__ = ("_context", "_pushed")

    def __init__(self, device: int) -> None:
        self._context = primary_context(device)
        self._pushed = False

    def __enter__(self) -> None:
        status, current = driver().cuCtxGetCurrent()
        if status or int(current) != int(self._context):
            (status,) = driver().cuCtxPushCurrent(self._context)
            if status:
                raise failure(status, "making a CUDA context current")
            self._pushed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pushed:
            driver().cuCtxPopCurrent()


def is_capturing(stream: int) -> bool:
    """Whether the stream with that handle records a graph. Needs a current context."""
    status, capture = driver().cuStreamIsCapturing(stream)
    return bool(status) or int(capture) != 0  # an error: the legacy stream, while another one captures


def is_page_locked(address: int) -> bool:
    """Whether the byte of host memory at `address` was allocated or registered through CUDA. Needs a current context.

    Raises `CudaError` for what CUDA says beyond yes and no.
    """
    cuda = driver()
    status, kind = cuda.cuPointerGetAttribute(cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
    if status == cuda.CUresult.CUDA_ERROR_INVALID_VALUE:  # CUDA does not know the address
        return False
    if status:
        raise failure(status, f"kind of the memory at {address:#x}")
    return int(kind) == int(cuda.CUmemorytype.CU_MEMORYTYPE_HOST)


def allocation_of(address: int) -> tuple[int, int]:
    """`(start, end)` of the CUDA allocation or registration that holds `address`; `(address, address)` if unknown."""
    cuda = driver()
    attribute = cuda.CUpointer_attribute
    failed, start = cuda.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address)
    if not failed:
        failed, size = cuda.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_RANGE_SIZE, address)
        if not failed:
            return int(start), int(start) + int(size)
    return address, address


def memcpy(dst: int, src: int, num_bytes: int, *, dst_on_device: bool, src_on_device: bool, stream: int) -> None:
    """Queue one copy between two addresses of one device or of it and the host. Raises `CudaError`."""
    cuda = driver()
    if not src_on_device:
        (status,) = cuda.cuMemcpyHtoDAsync(dst, src, num_bytes, stream)
    elif not dst_on_device:
        (status,) = cuda.cuMemcpyDtoHAsync(dst, src, num_bytes, stream)
    else:
        (status,) = cuda.cuMemcpyDtoDAsync(dst, src, num_bytes, stream)
    if status:
        names = ("host", "device")
        raise failure(status, f"copy of {num_bytes} bytes, {names[src_on_device]} to {names[dst_on_device]}")


def memcpy_rows(
    dst: tuple[int, int],
    src: tuple[int, int],
    width: int,
    rows: int,
    *,
    to_device: bool,
    from_device: bool,
    stream: int,
) -> None:
    """Queue a copy of `rows` rows of `width` bytes; `dst` and `src` are (address, bytes from row to row).

    Raises `CudaError`.
    """
    cuda = driver()
    what = cuda.CUDA_MEMCPY2D()
    what.WidthInBytes, what.Height = width, rows
    kinds = cuda.CUmemorytype
    if to_device:
        what.dstMemoryType, what.dstDevice = kinds.CU_MEMORYTYPE_DEVICE, dst[0]
    else:
        what.dstMemoryType, what.dstHost = kinds.CU_MEMORYTYPE_HOST, dst[0]
    if from_device:
        what.srcMemoryType, what.srcDevice = kinds.CU_MEMORYTYPE_DEVICE, src[0]
    else:
        what.srcMemoryType, what.srcHost = kinds.CU_MEMORYTYPE_HOST, src[0]
    what.dstPitch, what.srcPitch = dst[1], src[1]
    (status,) = cuda.cuMemcpy2DAsync(what, stream)
    if status:
        raise failure(status, f"copy of {rows} rows of {width} bytes, pitches {dst[1]} and {src[1]} bytes")


def memcpy_peer(dst: int, dst_device: int, src: int, src_device: int, num_bytes: int, stream: int) -> None:
    """Queue one copy from device to device. Raises `CudaError`."""
    contexts = primary_context(dst_device), primary_context(src_device)
    (status,) = driver().cuMemcpyPeerAsync(dst, contexts[0], src, contexts[1], num_bytes, stream)
    if status:
        raise failure(status, f"copy of {num_bytes} bytes, cuda:{src_device} to cuda:{dst_device}")


BatchCopy = Callable[[Addresses, Addresses, Addresses, int], None]


@functools.cache
def batch_copy() -> BatchCopy | None:
    """`f(dst addresses, src addresses, sizes, stream)`: `cuMemcpyBatchAsync`, or None where the driver has none.

    The binding's own wrapper wants Python lists of objects and takes a microsecond a range to convert them; the
    function that `cuGetProcAddress` gives is called with the arrays as they are. It takes no legacy default stream.
    Sources are read in stream order. `f` raises `CudaError`.
    """
    for version in (DRIVER_13_0, DRIVER_12_8):
        pointer = _entry_point(b"cuMemcpyBatchAsync", version)
        if pointer:
            return _batch_caller(pointer, version)
    return None


def _entry_point(name: bytes, version: int) -> int:
    """Address of the driver's function as of that CUDA version, 0 if the driver is older."""
    cuda = driver()
    flags = cuda.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    status, pointer, _ = cuda.cuGetProcAddress(name, version, int(flags))
    return 0 if status else int(pointer or 0)


def _batch_caller(pointer: int, version: int) -> BatchCopy:
    cuda = driver()
    attributes = cuda.CUmemcpyAttributes()
    attributes.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    with_fail_index = version == DRIVER_12_8
    array, size = ctypes.c_void_p, ctypes.c_size_t
    types = [array, array, array, size, array, array, size, *([array] if with_fail_index else []), array]
    function = ctypes.CFUNCTYPE(ctypes.c_int, *types)(pointer)  # lets go of the GIL while it runs

    def call(dsts: Addresses, srcs: Addresses, sizes: Addresses, stream: int) -> None:
        failed = ctypes.c_size_t(0)
        first = ctypes.c_size_t(0)  # the attributes hold from the first range on
        found = [ctypes.addressof(failed)] if with_fail_index else []
        columns = [np.ascontiguousarray(column, np.uint64) for column in (dsts, srcs, sizes)]
        code = function(
            *(column.ctypes.data for column in columns),
            len(sizes),
            int(attributes.getPtr()),
            ctypes.addressof(first),
            1,
            *found,
            stream,
        )
        if code:
            asked = f"cuMemcpyBatchAsync of {len(sizes)} ranges, {int(sizes.sum())} bytes"
            raise failure(cuda.CUresult(code), asked)

    return call


def register_host(address: int, num_bytes: int) -> None:
    """Page-lock host memory that exists, for every device. Needs a current context. Raises `CudaError`."""
    cuda = driver()
    flags = cuda.CU_MEMHOSTREGISTER_PORTABLE | cuda.CU_MEMHOSTREGISTER_DEVICEMAP
    (status,) = cuda.cuMemHostRegister(address, num_bytes, flags)
    if status:
        raise failure(status, f"page-locking {num_bytes} bytes of host memory at {address:#x}")


def unregister_host(address: int) -> None:
    """Undo `register_host`. Needs a current context. Raises `CudaError`."""
    (status,) = driver().cuMemHostUnregister(address)
    if status:
        raise failure(status, f"unlocking host memory at {address:#x}")


def synchronize(device: int) -> None:
    """Wait for everything queued on the device. Raises `CudaError`."""
    with on_device(device):
        (status,) = driver().cuCtxSynchronize()
    if status:
        raise failure(status, f"waiting for CUDA device {device}")
