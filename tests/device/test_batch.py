"""`copy_batch` and `copy_ranges`: on the CPU, on a made-up device, and (`gpu`) on a real one."""

import time

import numpy as np
import pytest
import torch
from fake_cuda import Stream, cuda  # noqa: F401 - a fixture
from hypothesis import given
from hypothesis import strategies as st

from kvferry.device import copy_batch, copy_ranges, driver, streams

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SLEEP_CYCLES = 400_000_000  # some 0.2 s


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# -- the CPU ----------------------------------------------------------------------------------------------------------


def test_host_to_host():
    srcs = [values(3, 4), values(4, 3).t(), values(5), values(0)]
    dsts = [torch.zeros(src.shape) for src in srcs]
    assert all(got is dst for got, dst in zip(copy_batch(dsts, srcs), dsts, strict=True))
    assert all(dst.equal(src) for dst, src in zip(dsts, srcs, strict=True))
    assert copy_batch([], []) == []
    stream = Stream()
    copy_batch(dsts, srcs, stream)
    assert stream.synchronized == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 9)), max_size=8))
def test_ranges_from_host_to_host(rows):
    src, dst = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    wanted, clash = dst.clone(), False
    written = []
    for at, of, size in rows:
        inside = at + size <= 64 and of + size <= 64
        clash |= not inside
        if inside:
            wanted[at : at + size] = src[of : of + size]
            written += range(at, at + size)
    arguments = [row[0] for row in rows], src, [row[1] for row in rows], [row[2] for row in rows]
    if clash or len(set(written)) < len(written):
        with pytest.raises(ValueError, match=r"overlap|within"):
            copy_ranges(dst, *arguments)
        assert not dst.any()
    else:
        assert copy_ranges(dst, *arguments) is dst
        assert dst.equal(wanted)


def test_refusals_name_the_pair():
    x, y = torch.zeros(8), torch.ones(8)
    with pytest.raises(ValueError, match="pair 1: dst has the shape"):
        copy_batch([x[:4], x[4:]], [y[:4], y[5:]])
    with pytest.raises(ValueError, match=r"pair 0: dst is torch.float32 and src is torch.int8"):
        copy_batch([x, y], [torch.zeros(8, dtype=torch.int8), torch.zeros(8)])
    with pytest.raises(ValueError, match="dst has the shape"):
        copy_batch([x], [y[:4]])
    with pytest.raises(ValueError, match="2 destinations and 1 sources"):
        copy_batch([x[:4], x[4:]], [y[:4]])
    with pytest.raises(ValueError, match="two destinations overlap"):
        copy_batch([x[:5], x[4:]], [y[:5], y[4:]])
    with pytest.raises(ValueError, match="overlaps the source"):
        copy_batch([x[:4], y[:4]], [y[2:6], x[4:]])
    with pytest.raises(TypeError, match="contiguous"):
        copy_ranges(torch.zeros(4, 4).t(), [0], x, [0], [4])
    assert not x.any()
    assert y.all()


# -- a made-up device -------------------------------------------------------------------------------------------------


def test_neighbours_are_merged_and_the_rest_is_one_call(cuda):  # noqa: F811
    src, dst = cuda.pin(values(100)), cuda.device(torch.zeros(100))
    order = [(0, 10), (20, 30), (10, 20), (50, 60), (90, 100)]
    dsts, srcs = [dst[a:b] for a, b in order], [src[a:b] for a, b in order]
    assert copy_batch(dsts, srcs)[0] is dsts[0]
    assert cuda.calls == [("batch", [120, 40, 40], 0x7000)]
    assert cuda.queries == 2  # one allocation, asked about once
    for a, b in order:
        assert dst[a:b].equal(src[a:b])
    assert dst.count_nonzero() == 50
    assert cuda.current.synchronized == 0
    assert len(streams._held) == 1
    copy_batch(dsts, srcs, non_blocking=False)
    assert cuda.current.synchronized == 1


def test_a_batch_that_is_one_run_is_a_plain_copy(cuda):  # noqa: F811
    src, dst = cuda.pin(torch.zeros(64)), cuda.device(values(64))
    copy_batch(list(src.split(8)), list(dst.split(8)))
    assert cuda.calls == [("memcpy", 256, False, True, 0x7000)]
    assert src.equal(dst)


def test_nothing_is_merged_where_the_driver_does_not_say_how_far_memory_goes(cuda):  # noqa: F811
    cuda.knows_allocations = False
    one, other = cuda.pin(values(16)), cuda.pin(values(16))
    dst = cuda.device(torch.zeros(32))
    copy_batch(list(dst.split(8)), [*one.split(8), *other.split(8)])
    assert dst.equal(torch.cat([one, other]))
    # Within a storage it is safe.
    assert [len(call[1]) for call in cuda.calls] == [2]


def test_the_legacy_stream_forks(cuda):  # noqa: F811
    cuda.current.cuda_stream = 0
    src, dst = cuda.pin(values(32)), cuda.device(torch.zeros(32))
    copy_batch([dst[:4], dst[8:12]], [src[:4], src[8:12]])
    assert cuda.calls == [("batch", [16, 16], 0x8000)]
    assert cuda.beside.waits == [cuda.current]
    assert cuda.current.waits == [cuda.beside]


@pytest.mark.parametrize("why", ["old driver", "capture"])
def test_without_batches_ranges_go_one_by_one(cuda, why):  # noqa: F811
    cuda.has_batch, cuda.capturing = why != "old driver", why == "capture"
    src, dst = cuda.pin(values(32)), cuda.device(torch.zeros(32))
    copy_batch([dst[:4], dst[8:12]], [src[:4], src[8:12]])
    assert cuda.calls == [("memcpy", 16, True, False, 0x7000)] * 2
    assert dst[8:12].equal(src[8:12])


def test_a_mixed_batch(cuda):  # noqa: F811
    stream = Stream(0x9000)
    there, pinned, plain = cuda.device(values(64)), cuda.pin(values(64)), values(32)
    wanted = [there[:4].clone(), pinned[8:12].clone(), plain[:4].clone(), there[32:36].clone()]
    dsts = [pinned[:4], there[8:12], there[16:20], there[24:28]]
    copy_batch(dsts, [there[:4], pinned[8:12], plain[:4], there[32:36]], stream)
    assert [torch.equal(dst, value) for dst, value in zip(dsts, wanted, strict=True)] == [True] * 4
    assert [call[0] for call in cuda.calls] == ["memcpy"] * 4
    assert stream.synchronized == 1  # the pageable one
    assert len(stream.recorded) == 5


def test_strided_pairs(cuda):  # noqa: F811
    src, dst = cuda.pin(values(4, 2, 8)), cuda.device(torch.zeros(4, 2, 8))
    # Two planes that interleave, and one pair that no rows are.
    other = cuda.device(torch.zeros(4, 4))
    copy_batch([dst[:, 0], dst[:, 1], other], [src[:, 0], src[:, 1], cuda.pin(values(4, 4)).t()])
    assert dst.equal(src)
    assert other.equal(values(4, 4).t())
    assert [call[:3] for call in cuda.calls] == [("rows", 32, 4)] * 2
    with pytest.raises(ValueError, match="two destinations overlap"):
        copy_batch([dst[:, 0], dst[3, :1]], [src[:, 0], src[3, :1]])


def test_ranges_of_two_tensors(cuda):  # noqa: F811
    src, dst = cuda.pin(values(100)), cuda.device(torch.zeros(100))
    to, size = np.array([0, 80, 40, 200]), np.array([40, 40, 40, 0])
    assert copy_ranges(dst, to, src, to, size) is dst
    assert cuda.calls == [("memcpy", 120, True, False, 0x7000)]
    assert dst[:30].equal(src[:30])
    copy_ranges(dst, [0, 80], src, [80, 0], [40, 40], non_blocking=False)
    assert cuda.calls[1:] == [("batch", [40, 40], 0x7000)]
    assert cuda.current.synchronized == 1
    assert dst[:10].equal(src[20:30])


def test_what_a_batch_refuses(cuda):  # noqa: F811
    there, host = cuda.device(torch.zeros(8)), torch.zeros(8)
    with pytest.raises(ValueError, match="pair 1 is from host to host in a batch for cuda:0"):
        copy_batch([there[:4], host[:4]], [host[4:], torch.zeros(4)])
    with pytest.raises(ValueError, match="cuda:1, the tensors are on cuda:0"):
        copy_batch([there], [host], Stream(device=torch.device("cuda", 1)))
    assert cuda.calls == []


def test_without_bindings_copy_does_it(cuda, monkeypatch):  # noqa: F811
    monkeypatch.setattr(driver, "is_cuda_memcpy_available", lambda: False)
    monkeypatch.setattr("kvferry.device.memory.is_cuda_memcpy_available", lambda: False)
    src, dst = values(64), cuda.device(torch.zeros(64))
    copy_batch(list(dst.split(8)), list(src.split(8)))
    assert dst.equal(src)
    copy_ranges(dst, [0, 64], src, [64, 0], [64, 64])
    assert dst[:16].equal(src[16:32])
    assert cuda.calls == []


# -- a GPU ------------------------------------------------------------------------------------------------------------


def scattered(count, size, seed=0):
    """Offsets of `count` distinct ranges of `size` bytes in twice as many, in random order."""
    return torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))[:count].numpy() * size


@on_gpu
def test_gpu_driver_has_batches():
    """Of drivers from 12.8 on; the fallback is tested with a made-up device."""
    with driver.on_device(0):
        assert driver.batch_copy() is not None


@on_gpu
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("size", [64, 4096, 65536])
@pytest.mark.parametrize("direction", ["h2d", "d2h", "d2d"])
def test_gpu_scattered(direction, size, side):
    count = 200
    host = torch.randint(0, 256, (2 * count * size,), dtype=torch.uint8).pin_memory()
    src = host if direction == "h2d" else host.cuda()
    dst = torch.zeros_like(host, device="cuda") if direction != "d2h" else torch.zeros_like(host).pin_memory()
    to, of = scattered(count, size, 1), scattered(count, size, 2)
    wanted = torch.zeros_like(host)
    for at, start in zip(to, of, strict=True):
        wanted[at : at + size] = host[start : start + size]
    stream = torch.cuda.Stream() if side else None
    torch.cuda.synchronize()
    for by_tensors in (True, False):
        dst.zero_()
        torch.cuda.synchronize()
        if by_tensors:
            copy_batch([dst[at : at + size] for at in to], [src[at : at + size] for at in of], stream)
        else:
            copy_ranges(dst, to, src, of, np.full(count, size), stream)
        (stream or torch.cuda.current_stream()).synchronize()
        assert torch.equal(dst.cpu(), wanted)


@on_gpu
def test_gpu_neighbours_and_pieces_of_several_allocations():
    blocks = [torch.randint(0, 256, (4096,), dtype=torch.uint8).pin_memory() for _ in range(8)]
    there = torch.zeros(8 * 4096, dtype=torch.uint8, device="cuda")
    copy_batch([*there.split(512)], [piece for block in blocks for piece in block.split(512)])
    assert torch.equal(there.cpu(), torch.cat(blocks))
    back = [torch.zeros(4096, dtype=torch.uint8, pin_memory=i % 2 == 0) for i in range(8)]
    copy_batch([piece for block in back for piece in block.split(512)], [*there.split(512)])
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(back), torch.cat(blocks))


@on_gpu
def test_gpu_the_driver_says_how_far_host_memory_goes():
    """Then a batch asks once an allocation and merges across tensors of one."""
    host = torch.zeros(1 << 20, dtype=torch.uint8).pin_memory()
    with driver.on_device(0):
        start, end = driver.allocation_of(host.data_ptr() + 4096)
    assert start <= host.data_ptr() < host.data_ptr() + host.numel() <= end


@on_gpu
def test_gpu_mixed_and_strided():
    there, pinned, plain = values(64, 64).cuda(), values(64, 64).pin_memory(), values(64, 64) + 1
    dsts = [there[:8], there[8:16, :5], pinned[:8], pinned[8:16, ::2], there[16:24].t(), there[40:48]]
    srcs = [plain[:8], pinned[16:24, :5], there[32:40], plain.cuda()[8:16, ::2], plain[:8].t(), there[32:40]]
    wanted = [src.cpu().clone() for src in srcs]
    torch.cuda.synchronize()
    copy_batch(dsts, srcs)
    torch.cuda.synchronize()
    for number, (dst, value) in enumerate(zip(dsts, wanted, strict=True)):
        assert torch.equal(dst.cpu(), value), number


@on_gpu
@pytest.mark.parametrize("side", [False, True])
def test_gpu_a_batch_does_not_wait_and_keeps_stream_order(side):
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    src, dst = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, pin_memory=True)
    pairs = [dst[i : i + 100] for i in range(0, 1 << 20, 4096)], [src[i : i + 100] for i in range(0, 1 << 20, 4096)]
    copy_batch(*pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            src.fill_(1)  # the batch reads what this writes
            start = time.perf_counter()
            copy_batch(*pairs, stream if side else None)
            took = time.perf_counter() - start
            src.fill_(2)  # and has read it before this writes
            event = streams.recorded(stream)
        assert not event.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert took < 0.1
    event.synchronize()
    assert all(part.eq(1).all() for part in pairs[0])
    assert dst.count_nonzero() == sum(part.numel() for part in pairs[0])


@on_gpu
def test_gpu_host_time_of_ranges_hardly_depends_on_their_number():
    size, count = 4096, 4096
    src, dst = torch.zeros(2 * count * size, dtype=torch.uint8, device="cuda"), None
    dst = torch.zeros(2 * count * size, dtype=torch.uint8, pin_memory=True)
    stream, to, of = torch.cuda.Stream(), scattered(count, size, 1), scattered(count, size, 2)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        copy_ranges(dst, to, src, of, np.full(count, size), stream)
        times.append(time.perf_counter() - start)
        stream.synchronize()
    print(f"copy_ranges: {min(times) * 1e6:.0f} us on the host for {count} ranges")
    assert min(times) < 0.02


@on_gpu
def test_gpu_batches_in_a_graph():
    src, dst = values(4000).pin_memory(), torch.zeros(4000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy_batch([dst[:100], dst[200:300]], [src[:100], src[200:300]])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(dst[200:300].cpu(), src[200:300])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices")
def test_gpu_batches_of_two_devices_are_refused():
    x, y = torch.zeros(8, device="cuda:0"), torch.zeros(8, device="cuda:1")
    with pytest.raises(ValueError, match="cuda:0, cuda:1"):
        copy_batch([x, y], [torch.zeros(8), torch.zeros(8)])
    with pytest.raises(ValueError, match="cuda_copy_d2d"):
        copy_ranges(x, [0], y, [0], [4])
    copy_batch([y[:4], y[6:]], [torch.ones(8)[:4], torch.ones(8)[6:]])
    assert y.cpu().tolist() == [1, 1, 1, 1, 0, 0, 1, 1]
