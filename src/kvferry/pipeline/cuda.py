"""The machine of a CUDA device: PyTorch's streams and events, copies by kvferry.device."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvferry.device import driver
from kvferry.device.memory import MemoryKind, memory_kind
from kvferry.errors import OutOfDeviceMemory, OutOfHostMemory
from kvferry.pipeline.machine import Event, Machine, Stream


class CudaMachine(Machine):
    """One CUDA device. Raises `ImportError` where the bindings that copies go through are missing."""

    stages = True

    def __init__(self, device: torch.device) -> None:
        if not driver.is_cuda_memcpy_available():
            raise ImportError(
                "transfers to and from a GPU need CUDA's driver and bindings: pip install 'kvferry[gpu]', or keep the "
                "pages on the CPU"
            )
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._index: int = self._device.index
        with driver.on_device(self._index):
            self._batch = driver.batch_copy()

    def stream(self, *, high_priority: bool = False) -> Stream:
        return torch.cuda.Stream(self._device, priority=-1 if high_priority else 0)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self._device)

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        # A thread may have no context yet, or another device's; PyTorch sets it only when it thinks it must.
        with torch.cuda.stream(stream), driver.on_device(self._index):  # type: ignore[arg-type]
            yield

    def event(self, *, timing: bool = False) -> Event:
        return torch.cuda.Event(enable_timing=timing)

    def device_memory(self, num_bytes: int, purpose: str) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self._device)
            raise OutOfDeviceMemory(
                f"{purpose} takes {num_bytes >> 20} MiB, of {total >> 20} MiB of {self._device} {free >> 20} are free: "
                "make ring_bytes or table_bytes smaller, or leave the pipeline more memory"
            ) from error

    def host_memory(self, num_bytes: int, purpose: str) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise OutOfHostMemory(
                f"{num_bytes >> 20} MiB of host memory for {purpose} cannot be pinned ({error}): make table_bytes "
                "smaller, or raise the limit on locked memory (ulimit -l)"
            ) from error

    def check_slots(self, slots: Tensor) -> None:
        if memory_kind(slots) is not MemoryKind.PINNED:
            raise ValueError(
                "slots is pageable memory, which copies would wait for: allocate it with pin_memory=True, or register "
                "it (kvferry.device.PinnedPool)"
            )

    def copy(self, dst: Tensor, src: Tensor, stream: Stream) -> None:
        handle: int = stream.cuda_stream  # type: ignore[attr-defined]
        on_device = {"dst_on_device": dst.is_cuda, "src_on_device": src.is_cuda}
        driver.memcpy(dst.data_ptr(), src.data_ptr(), dst.nbytes, **on_device, stream=handle)

    def copy_rows(
        self, dst: Tensor, dst_rows: np.ndarray, src: Tensor, src_rows: np.ndarray, counts: np.ndarray, stream: Stream
    ) -> None:
        width, to, of = dst.shape[1], dst.stride(0), src.stride(0)
        handle: int = stream.cuda_stream  # type: ignore[attr-defined]
        on_device = {"dst_on_device": dst.is_cuda, "src_on_device": src.is_cuda}
        if len(counts) == 1:
            d, s, rows = dst.data_ptr() + int(dst_rows[0]) * to, src.data_ptr() + int(src_rows[0]) * of, int(counts[0])
            if to == of == width:
                driver.memcpy(d, s, rows * width, **on_device, stream=handle)
            else:
                devices = {"to_device": dst.is_cuda, "from_device": src.is_cuda}
                driver.memcpy_rows((d, to), (s, of), width, rows, **devices, stream=handle)
            return
        if not to == of == width:
            # Rows with gaps between them go one by one.
            each = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            dst_rows, src_rows = np.repeat(dst_rows, counts) + each, np.repeat(src_rows, counts) + each
            counts = np.ones(len(each), dtype=np.int64)
        dsts = dst_rows.astype(np.uint64) * np.uint64(to) + np.uint64(dst.data_ptr())
        srcs = src_rows.astype(np.uint64) * np.uint64(of) + np.uint64(src.data_ptr())
        sizes = counts.astype(np.uint64) * np.uint64(width)
        if self._batch is not None:
            self._batch(dsts, srcs, sizes, handle)
            return
        for d, s, n in zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True):
            driver.memcpy(d, s, n, **on_device, stream=handle)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
