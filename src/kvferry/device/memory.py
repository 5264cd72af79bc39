"""What kind of memory a tensor has, for copies: device, page-locked host, pageable host."""

import enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvferry.device.driver import Addresses, allocation_of, is_cuda_memcpy_available, is_page_locked, on_device

PAGEABLE, UNKNOWN = -1, -2
"""In `host_allocations`: pageable memory, and page-locked memory of which the driver does not say how far it goes."""


class MemoryKind(enum.Enum):
    """Where a tensor's bytes lie.

    `PINNED` is page-locked host memory, whether CUDA allocated it (`pin_memory`, cudaHostAlloc) or registered what was
    there (cudaHostRegister, `PinnedPool.register`): nothing about copies depends on which.
    """

    DEVICE = "device"
    PINNED = "pinned host"
    PAGEABLE = "pageable host"


def memory_kind(tensor: Tensor) -> MemoryKind:
    """The kind of memory under a CUDA or CPU tensor; without CUDA every CPU tensor is pageable.

    All of the tensor's span is looked at, where `Tensor.is_pinned` looks at the start of its storage. Raises
    `ValueError` if only one end of it is page-locked: CUDA copies no such range.
    """
    if tensor.is_cuda:
        return MemoryKind.DEVICE
    if tensor.numel() == 0 or not torch.cuda.is_available():
        return MemoryKind.PAGEABLE
    if not is_cuda_memcpy_available():
        return MemoryKind.PINNED if tensor.is_pinned() else MemoryKind.PAGEABLE
    with on_device(torch.cuda.current_device()):
        return MemoryKind.PINNED if locked(*span(tensor)) else MemoryKind.PAGEABLE


def span(tensor: Tensor) -> tuple[int, int]:
    """`(start, end)`: addresses from a strided tensor's first byte to one past its last; equal if it has none."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def host_allocations(starts: Addresses, ends: Addresses) -> npt.NDArray[np.int64]:
    """For ranges of host memory: int64 `[ranges]`, a number for each page-locked allocation, or `PAGEABLE`, `UNKNOWN`.

    Asks the driver once an allocation, not once a range. Needs a current context. Raises `ValueError` for a range that
    is page-locked at one end only.
    """
    found = np.full(len(starts), PAGEABLE, np.int64)
    left = np.ones(len(starts), bool)
    while left.any():
        first = int(left.argmax())
        left[first] = False
        start, end = int(starts[first]), int(ends[first])
        if not locked(start, end):
            continue
        low, high = allocation_of(start)
        if not low <= start < end <= high:
            found[first] = UNKNOWN
            continue
        same = left & (starts >= np.uint64(low)) & (ends <= np.uint64(high))
        found[first] = first
        found[same] = first
        left &= ~same
    return found


def locked(start: int, end: int) -> bool:
    """Whether the host memory from `start` up to `end` is page-locked, judged by both ends. Needs a current context.

    Raises `ValueError` if the ends differ.
    """
    first, last = is_page_locked(start), is_page_locked(end - 1)
    if first != last:
        raise ValueError(
            f"host memory from {start:#x} to {end:#x} is page-locked at its {'start' if first else 'end'} only: "
            "register all of it in one call, or copy the parts one by one"
        )
    return first
