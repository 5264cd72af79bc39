"""`cuda_copy_` and its kin on a GPU: the bytes, what waits and what does not, and whose memory is kept."""

import gc
import mmap
import threading
import time

import pytest
import torch

from kvferry import device
from kvferry.device import (
    MemoryKind,
    PinnedPool,
    cuda_copy_,
    cuda_copy_d2d,
    cuda_copy_d2h,
    cuda_copy_event,
    cuda_copy_h2d,
    driver,
    memory_kind,
)


def on_gpu(*, count=1):
    return lambda test: pytest.mark.gpu(
        pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA devices")(test)
    )


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


SLEEP_CYCLES = 400_000_000  # some 0.2 s


@pytest.fixture
def no_sync():
    """PyTorch raises where it makes the host wait."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@on_gpu()
def test_gpu_is_available():
    assert device.is_cuda_memcpy_available()


@on_gpu()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_gpu_directions(dtype, pinned, non_blocking):
    src = values(33, 65).to(dtype)
    src = src.pin_memory() if pinned else src
    there, again = torch.empty_like(src, device="cuda"), torch.empty_like(src, device="cuda")
    back = torch.empty_like(src, pin_memory=pinned)
    for stream in (None, torch.cuda.Stream()):
        there.zero_(), again.zero_()
        torch.cuda.synchronize()
        assert cuda_copy_h2d(there, src, non_blocking, stream) is there
        assert cuda_copy_d2d(again, there, non_blocking, stream) is again
        assert cuda_copy_d2h(back.zero_(), again, non_blocking, stream) is back
        if pinned and non_blocking:
            (stream or torch.cuda.current_stream()).synchronize()
        assert torch.equal(back.view(torch.uint8), src.view(torch.uint8))


@on_gpu()
@pytest.mark.parametrize("num_bytes", [1, 3, 4096, 65536, (1 << 20) + 7, 64 << 20])
def test_gpu_sizes(num_bytes):
    src = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8).pin_memory()
    there = cuda_copy_(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"), src)
    assert torch.equal(cuda_copy_(torch.zeros(num_bytes, dtype=torch.uint8), there), src)


@on_gpu()
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, :40],
        lambda x: x[::2],
        lambda x: x[:, 5:6],
        lambda x: x.t(),
        lambda x: x[:, ::3],
        lambda x: x.view(4, 8, 64)[:, :5, :7],
        lambda x: x.view(4, 8, 64).permute(1, 0, 2)[:, :, :60],
        lambda x: x[3],
    ],
)
def test_gpu_strides(cut, pinned):
    whole = values(32, 64)
    host = whole.pin_memory() if pinned else whole
    there = torch.full((32, 64), 7.0, device="cuda")
    for non_blocking in (False, True):
        cuda_copy_(cut(there), cut(host), non_blocking)
        torch.cuda.synchronize()
        wanted = torch.full((32, 64), 7.0)
        cut(wanted).copy_(cut(whole))
        assert torch.equal(there.cpu(), wanted)
        # Between layouts, and back: dense on one side.
        dense = cut(there).contiguous()
        back = torch.full((32, 64), 7.0, pin_memory=pinned)
        cuda_copy_(cut(back), dense, non_blocking)
        torch.cuda.synchronize()
        assert torch.equal(back, wanted)
        other = torch.full((32, 64), 7.0, device="cuda")
        cuda_copy_(cut(other), dense, non_blocking)
        assert torch.equal(other.cpu(), wanted)


@on_gpu()
def test_gpu_refusals():
    x = torch.zeros(64, device="cuda")
    for dst, src, message in (
        (x[1:], x[:-1], "overlap"),
        (x, x, "overlap"),
        (x, torch.zeros(64, dtype=torch.float64), "float64"),
        (x, torch.zeros(63), "shape"),
        (x[:1].expand(64), torch.zeros(64), "share memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_copy_(dst, src)
    assert cuda_copy_(x[:0], torch.zeros(0)).numel() == 0
    y = torch.arange(64.0, device="cuda").view(8, 8)
    cuda_copy_(y[:, :4], y[:, 4:])
    assert torch.equal(y[:, :4].cpu(), torch.arange(64.0).view(8, 8)[:, 4:])


@on_gpu()
def test_gpu_kinds_of_memory():
    plain, pinned = torch.zeros(5000), torch.zeros(5000).pin_memory()
    assert memory_kind(plain) is MemoryKind.PAGEABLE
    assert memory_kind(pinned) is MemoryKind.PINNED
    assert memory_kind(pinned[4000:]) is MemoryKind.PINNED
    assert memory_kind(torch.zeros(1, device="cuda")) is MemoryKind.DEVICE
    mapped = torch.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE), dtype=torch.uint8)
    assert memory_kind(mapped) is MemoryKind.PAGEABLE
    with PinnedPool(1 << 20) as pool:
        half = pool.register(mapped[: 2 * mmap.PAGESIZE])
        assert memory_kind(half) is MemoryKind.PINNED
        assert memory_kind(mapped[2 * mmap.PAGESIZE :]) is MemoryKind.PAGEABLE
        with pytest.raises(ValueError, match="at its start only"):
            memory_kind(mapped)
        with pytest.raises(ValueError, match="at its start only"):
            cuda_copy_(torch.zeros(mapped.numel(), dtype=torch.uint8, device="cuda"), mapped, True)
    assert memory_kind(half) is MemoryKind.PAGEABLE


@on_gpu()
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_gpu_non_blocking_copies_do_not_wait(direction, no_sync):
    stream = torch.cuda.Stream()
    host, there = torch.zeros(1 << 20, pin_memory=True), torch.ones(1 << 20, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    for warm in (True, False):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1000 if warm else SLEEP_CYCLES)
        start = time.perf_counter()
        if direction == "h2d":
            cuda_copy_(there, host, True, stream)
        else:
            cuda_copy_(host, there, True, stream)
        took = time.perf_counter() - start
        event = cuda_copy_event(*((there, host) if direction == "h2d" else (host, there)), stream)
    assert not event.query()
    assert took < 0.05
    torch.cuda.set_sync_debug_mode("default")
    event.synchronize()
    assert torch.equal(host, there.cpu())


@on_gpu()
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_gpu_pageable_copies_wait_for_the_stream(direction):
    stream = torch.cuda.Stream()
    host, there = values(1 << 16), torch.zeros(1 << 16, device="cuda")
    wanted = host.clone() if direction == "h2d" else torch.zeros(1 << 16)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    if direction == "h2d":
        cuda_copy_(there, host, True, stream)
        host.zero_()
    else:
        cuda_copy_(host, there, True, stream)
    assert stream.query()
    assert torch.equal(host if direction == "d2h" else there.cpu(), wanted)


@on_gpu()
def test_gpu_blocking_copies_wait():
    stream = torch.cuda.Stream()
    host, there = torch.zeros(1 << 16, pin_memory=True), torch.ones(1 << 16, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    cuda_copy_d2h(host, there, stream=stream)
    assert stream.query()
    assert torch.equal(host, torch.ones(1 << 16))


@on_gpu()
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_gpu_memory_freed_during_the_copy_is_not_given_out_again(direction):
    """Both caching allocators give a freed block to the next request of its size."""
    stream, size = torch.cuda.Stream(), 1 << 20
    kept = torch.full((size,), 5, dtype=torch.uint8, device="cuda")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    if direction == "h2d":
        temporary = torch.full((size,), 3, dtype=torch.uint8).pin_memory()
        cuda_copy_(kept, temporary, True, stream)
        address = temporary.data_ptr()
        del temporary
        others = [torch.full((size,), 9, dtype=torch.uint8).pin_memory() for _ in range(4)]
    else:
        temporary = torch.full((size,), 3, dtype=torch.uint8, device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        cuda_copy_(host if direction == "d2h" else kept, temporary, True, stream)
        address = temporary.data_ptr()
        del temporary
        others = [torch.full((size,), 9, dtype=torch.uint8, device="cuda") for _ in range(4)]
    gc.collect()
    assert address not in [other.data_ptr() for other in others]
    torch.cuda.synchronize()
    assert bool(((host if direction == "d2h" else kept) == 3).all())


@on_gpu()
def test_gpu_copies_in_a_thread_without_a_context():
    host, there, done = values(100).pin_memory(), torch.zeros(100, device="cuda"), []

    def work():
        cuda_copy_(there, host)
        done.append(memory_kind(host))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [MemoryKind.PINNED]
    assert torch.equal(there.cpu(), host)


@on_gpu()
def test_gpu_copies_are_captured_in_graphs():
    host, there, back = values(1000).pin_memory(), torch.zeros(1000, device="cuda"), torch.zeros(1000, pin_memory=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_copy_(there, host, True)
        cuda_copy_(back, there, True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(back, host)


@on_gpu()
def test_gpu_errors_name_the_cuda_error():
    host, there = torch.zeros(64, pin_memory=True).data_ptr(), torch.zeros(64, device="cuda").data_ptr()
    message = r"copy of 2 rows of 8 bytes, pitches 4 and 4 bytes: CUDA_ERROR_INVALID_VALUE \(1\): check that"
    with driver.on_device(0), pytest.raises(driver.CudaError, match=message):
        driver.memcpy_rows((there, 4), (host, 4), 8, 2, to_device=True, from_device=False, stream=0)
    torch.zeros(1, device="cuda").cpu()  # it leaves nothing behind


@on_gpu(count=2)
@pytest.mark.parametrize("stream_of", [None, 0, 1])
def test_gpu_device_to_other_device(stream_of):
    src = torch.arange(1 << 20, device="cuda:0")
    dst = torch.zeros(1 << 20, dtype=torch.int64, device="cuda:1")
    torch.cuda.synchronize(0), torch.cuda.synchronize(1)
    stream = None if stream_of is None else torch.cuda.Stream(stream_of)
    assert cuda_copy_d2d(dst, src, stream=stream) is dst
    if stream is not None:
        stream.synchronize()
    assert torch.equal(dst.cpu(), torch.arange(1 << 20))
    cuda_copy_(dst.view(1024, 1024)[:, :5], src.view(1024, 1024)[:, 5:10])
    assert torch.equal(dst.cpu().view(1024, 1024)[:, :5], torch.arange(1 << 20).view(1024, 1024)[:, 5:10])
    host = torch.zeros(1 << 20, dtype=torch.int64, pin_memory=True)
    with torch.cuda.device(0):
        assert torch.equal(cuda_copy_(host, dst), dst.cpu())
