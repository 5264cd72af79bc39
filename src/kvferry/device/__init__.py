"""What touches the GPU below PyTorch: copies and page-locked memory; kernels compiled at run time (`device.nvrtc`).

Nothing here needs CUDA or its bindings to be imported.
"""

from kvferry.device.batch import copy_batch, copy_ranges
from kvferry.device.copy import cuda_copy_, cuda_copy_d2d, cuda_copy_d2h, cuda_copy_event, cuda_copy_h2d
from kvferry.device.driver import CudaError, is_cuda_memcpy_available
from kvferry.device.memory import MemoryKind, memory_kind
from kvferry.device.pinned import PinnedBlock, PinnedPool, PoolUsage
from kvferry.device.streams import CompletedEvent, Event, recorded, side_stream

__all__ = [
    "CompletedEvent",
    "CudaError",
    "Event",
    "MemoryKind",
    "PinnedBlock",
    "PinnedPool",
    "PoolUsage",
    "copy_batch",
    "copy_ranges",
    "cuda_copy_",
    "cuda_copy_d2d",
    "cuda_copy_d2h",
    "cuda_copy_event",
    "cuda_copy_h2d",
    "is_cuda_memcpy_available",
    "memory_kind",
    "recorded",
    "side_stream",
]
