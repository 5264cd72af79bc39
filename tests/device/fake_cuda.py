"""A CUDA device made of host memory: enough for the copy layer to run, and to say afterwards what it asked for.

What the driver itself does with these calls is tested on a GPU (marked `gpu`).
"""

import ctypes
from contextlib import nullcontext

import pytest
import torch

from kvferry.device import copy, driver, memory, streams

DEVICE = torch.device("cuda", 0)


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: DEVICE)

    def record_stream(self, stream):
        stream.recorded.append(self.data_ptr())


class Event:
    def __init__(self, done=False):
        self.done = done
        self.waited = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = self.waited = True

    def record(self, stream):
        stream.events.append(self)


class Stream:
    def __init__(self, handle=0x7000, device=DEVICE):
        self.cuda_stream = handle
        self.device = device
        self.recorded, self.events, self.waits = [], [], []
        self.synchronized = 0

    def synchronize(self):
        self.synchronized += 1

    def wait_stream(self, other):
        self.waits.append(other)


class FakeCuda:
    """`calls` in order; `locked` address ranges; `current`, the current stream."""

    def __init__(self):
        self.calls, self.locked, self.capturing = [], [], False
        self.current, self.beside = Stream(), Stream(0x8000)
        self.has_batch, self.knows_allocations = True, True
        self.queries = 0

    def device(self, tensor):
        return tensor.as_subclass(OnDevice)

    def pin(self, tensor):
        start = tensor.untyped_storage().data_ptr()
        self.locked.append((start, start + tensor.untyped_storage().nbytes()))
        return tensor

    def is_page_locked(self, address):
        self.queries += 1
        return any(start <= address < end for start, end in self.locked)

    def allocation_of(self, address):
        if not self.knows_allocations:
            return address, address
        return next((start, end) for start, end in self.locked if start <= address < end)

    def memcpy(self, dst, src, num_bytes, *, dst_on_device, src_on_device, stream):
        self.calls.append(("memcpy", num_bytes, dst_on_device, src_on_device, stream))
        ctypes.memmove(dst, src, num_bytes)

    def memcpy_rows(self, dst, src, width, rows, *, to_device, from_device, stream):
        self.calls.append(("rows", width, rows, dst[1], src[1], stream))
        for row in range(rows):
            ctypes.memmove(dst[0] + row * dst[1], src[0] + row * src[1], width)

    def batch(self, dsts, srcs, sizes, stream):
        assert all(column.dtype == "uint64" for column in (dsts, srcs, sizes))
        self.calls.append(("batch", sizes.tolist(), stream))
        for dst, src, size in zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(dst, src, size)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(driver, "is_cuda_memcpy_available", lambda: True)
    monkeypatch.setattr(memory, "is_cuda_memcpy_available", lambda: True)
    monkeypatch.setattr(driver, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(memory, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(driver, "memcpy", fake.memcpy)
    monkeypatch.setattr(driver, "memcpy_rows", fake.memcpy_rows)
    monkeypatch.setattr(driver, "batch_copy", lambda: fake.batch if fake.has_batch else None)
    monkeypatch.setattr(driver, "is_capturing", lambda stream: fake.capturing)
    monkeypatch.setattr(streams, "is_capturing", lambda stream: fake.capturing)
    monkeypatch.setattr(memory, "is_page_locked", fake.is_page_locked)
    monkeypatch.setattr(memory, "allocation_of", fake.allocation_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("kvferry.device.batch.batch_stream", lambda device: fake.beside)
    monkeypatch.setattr(streams, "_held", streams._Held())
    assert copy.driver is driver
    return fake
