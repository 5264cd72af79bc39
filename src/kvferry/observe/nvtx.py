"""Named ranges on the profiler's timeline; nothing at all where no profiler asks for them."""

import functools
import os
from types import TracebackType
from typing import Protocol

import torch

PROFILER_VARIABLES = ("NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH")
"""Set in processes that Nsight Systems, or another tool that reads NVTX, has started."""


class Range(Protocol):
    """A context manager."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class _Nothing:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


class _NvtxRange:
    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.cuda.nvtx.range_pop()


_NOTHING = _Nothing()


@functools.cache
def nvtx_enabled() -> bool:
    """Whether ranges are recorded: KVFERRY_NVTX=1, or a profiler has started the process and KVFERRY_NVTX is not 0, and
    PyTorch has NVTX. Found out once a process."""
    asked = os.environ.get("KVFERRY_NVTX", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"KVFERRY_NVTX is {asked!r}: set it to 1 or 0, or not at all")
    if asked == "0" or (not asked and not any(os.environ.get(name) for name in PROFILER_VARIABLES)):
        return False
    try:
        torch.cuda.nvtx.range_push("kvferry")
        torch.cuda.nvtx.range_pop()
    except RuntimeError:  # a build of PyTorch without CUDA
        return False
    return True


def nvtx_range(name: str) -> Range:
    """`with nvtx_range("encode"):` marks what the host does in it, in this thread. The same no-op object where
    `nvtx_enabled()` is False: a fraction of a microsecond. Raises `ValueError` for a KVFERRY_NVTX that says neither."""
    return _NvtxRange(name) if nvtx_enabled() else _NOTHING
