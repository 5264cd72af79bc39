"""`cuda_copy_` and its kin: on the CPU, and on a made-up device that records the calls."""

import subprocess
import sys

import pytest
import torch
from fake_cuda import DEVICE, OnDevice, Stream, cuda  # noqa: F401 - a fixture

from kvferry import device
from kvferry.device import (
    CompletedEvent,
    MemoryKind,
    cuda_copy_,
    cuda_copy_d2d,
    cuda_copy_d2h,
    cuda_copy_event,
    cuda_copy_h2d,
    driver,
    memory_kind,
    streams,
)


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# -- the CPU ----------------------------------------------------------------------------------------------------------


def test_host_to_host():
    src = values(3, 4)
    dst = torch.zeros(3, 4)
    assert cuda_copy_(dst, src) is dst
    assert torch.equal(dst, src)
    assert torch.equal(cuda_copy_(torch.zeros(4, 3), src.t(), non_blocking=True), src.t())
    event = cuda_copy_event(dst.zero_(), src)
    assert isinstance(event, CompletedEvent)
    assert event.query()
    event.synchronize()
    event.wait()
    assert torch.equal(dst, src)


def test_host_to_host_waits_for_the_stream_it_is_given():
    stream = Stream()
    cuda_copy_(torch.zeros(3), values(3), stream=stream)
    assert stream.synchronized == 1


def test_errors_do_not_depend_on_where_tensors_are():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="overlap"):
        cuda_copy_(x[1:], x[:-1])
    with pytest.raises(ValueError, match="shape"):
        cuda_copy_(x, torch.zeros(5))
    with pytest.raises(ValueError, match="float64"):
        cuda_copy_(x, torch.zeros(4, dtype=torch.float64))
    assert cuda_copy_(x[:0], x[2:2]).shape == (0,)


def test_named_directions_name_both_places():
    x, y = torch.zeros(4), torch.zeros(4).as_subclass(OnDevice)
    wrong = {
        cuda_copy_h2d: [(x, x), (x, y), (y, y)],
        cuda_copy_d2h: [(x, x), (y, x), (y, y)],
        cuda_copy_d2d: [(x, x), (x, y), (y, x)],
    }
    for function, pairs in wrong.items():
        for dst, src in pairs:
            with pytest.raises(
                ValueError, match=rf"{function.__name__}.*src is on {src.device} and dst on {dst.device}"
            ):
                function(dst, src)


def test_importing_needs_no_bindings():
    code = (
        "import sys; sys.modules['cuda'] = None; import torch, kvferry.device as d; x = torch.ones(3);"
        "assert d.cuda_copy_(torch.zeros(3), x).equal(x); assert d.copy_batch([torch.zeros(3)], [x])[0].equal(x);"
        "assert not d.is_cuda_memcpy_available(); d.PinnedPool(1024).allocate(8).free(); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_everything_public_is_there():
    for name in device.__all__:
        assert getattr(device, name).__doc__, name


# -- a made-up device -------------------------------------------------------------------------------------------------


def test_pageable_copies_wait_either_way(cuda):  # noqa: F811
    src, dst = values(3, 4), cuda.device(torch.zeros(3, 4))
    for non_blocking in (False, True):
        dst.zero_()
        assert cuda_copy_h2d(dst, src, non_blocking) is dst
        assert torch.equal(dst, src)
    assert cuda.calls == [("memcpy", 48, True, False, 0x7000)] * 2
    assert cuda.current.synchronized == 2
    assert not len(streams._held)


def test_pinned_copies_wait_unless_non_blocking(cuda):  # noqa: F811
    src, dst = cuda.pin(torch.zeros(3, 4)), cuda.device(values(3, 4))
    cuda_copy_d2h(src, dst)
    assert cuda.current.synchronized == 1
    assert torch.equal(src, dst)
    cuda_copy_d2h(src, dst, True)
    assert cuda.current.synchronized == 1
    assert cuda.calls == [("memcpy", 48, False, True, 0x7000)] * 2
    assert memory_kind(src) is MemoryKind.PINNED
    assert memory_kind(dst) is MemoryKind.DEVICE


def test_device_to_device_never_waits(cuda):  # noqa: F811
    src, dst = cuda.device(values(6)), cuda.device(torch.zeros(6))
    cuda_copy_d2d(dst, src)
    assert cuda.calls == [("memcpy", 24, True, True, 0x7000)]
    assert cuda.current.synchronized == 0
    assert not cuda.current.recorded


def test_a_side_stream_is_told_to_the_allocator(cuda):  # noqa: F811
    stream = Stream(0x9000)
    src, dst = cuda.pin(values(6)), cuda.device(torch.zeros(6))
    cuda_copy_(dst, src, True, stream)
    assert cuda.calls == [("memcpy", 24, True, False, 0x9000)]
    assert stream.recorded == [dst.data_ptr()]
    with pytest.raises(ValueError, match="cuda:1, the tensors are on cuda:0"):
        cuda_copy_(dst, src, True, Stream(device=torch.device("cuda", 1)))


def test_host_tensors_are_kept_until_the_copy_is_done(cuda):  # noqa: F811
    dst = cuda.device(torch.zeros(6))
    first = cuda_copy_event(dst, cuda.pin(values(6)))
    second = cuda_copy_event(dst, cuda.pin(values(6)))
    assert first is not second
    assert len(streams._held) == 2
    first.done = second.done = True
    cuda_copy_event(dst, cuda.pin(values(6)))
    assert len(streams._held) == 1


def test_nothing_is_kept_for_a_graph(cuda):  # noqa: F811
    cuda.capturing = True
    cuda_copy_(cuda.device(torch.zeros(6)), cuda.pin(values(6)), True)
    assert not len(streams._held)


def test_rows_go_by_one_call(cuda):  # noqa: F811
    src, dst = cuda.pin(values(4, 6)), cuda.device(torch.zeros(4, 8))
    cuda_copy_(dst[:, :6], src, True)
    assert cuda.calls == [("rows", 24, 4, 32, 24, 0x7000)]
    assert torch.equal(dst[:, :6], src)
    assert not dst[:, 6:].any()


def test_what_no_rows_are_goes_to_copy(cuda):  # noqa: F811
    src, dst = cuda.pin(values(4, 4)), cuda.device(torch.zeros(4, 4))
    cuda_copy_(dst, src.t(), True)
    assert cuda.calls == []
    assert torch.equal(dst, src.t())
    z = torch.zeros(4, dtype=torch.complex64) + 1j
    assert torch.equal(cuda_copy_(cuda.device(torch.zeros_like(z)), z.conj()), z.conj())
    parameter = torch.ones(3, requires_grad=True)
    out = cuda_copy_(cuda.device(torch.zeros(3)), parameter)
    assert out.requires_grad
    assert cuda.calls == []


def test_autograd_notices_a_changed_tensor(cuda):  # noqa: F811
    dst = cuda.device(torch.zeros(3))
    version = dst._version
    cuda_copy_(dst, values(3))
    assert dst._version > version


def test_inference_tensors_have_no_version(cuda):  # noqa: F811
    with torch.inference_mode():
        dst = cuda.device(torch.zeros(3))
        cuda_copy_(dst, torch.ones(3))
    cuda_copy_(dst, values(3))
    assert dst.equal(values(3))


def test_memory_that_is_page_locked_in_part_is_refused(cuda):  # noqa: F811
    host = values(8)
    cuda.locked.append((host.data_ptr(), host.data_ptr() + 16))
    dst = cuda.device(torch.zeros(8))
    with pytest.raises(ValueError, match="page-locked at its start only"):
        cuda_copy_(dst, host, True)
    cuda_copy_(dst[:4], host[:4], True)
    assert len(cuda.calls) == 1


def test_without_bindings_copy_does_it(cuda, monkeypatch):  # noqa: F811
    monkeypatch.setattr(driver, "is_cuda_memcpy_available", lambda: False)
    monkeypatch.setattr("kvferry.device.memory.is_cuda_memcpy_available", lambda: False)
    src, dst = values(6), cuda.device(torch.zeros(6))
    assert torch.equal(cuda_copy_(dst, src, True), src)
    assert torch.equal(cuda_copy_d2h(torch.zeros(6), dst), src)
    assert cuda.calls == []


def test_empty_tensors_are_no_copy(cuda):  # noqa: F811
    dst = cuda.device(torch.zeros(0, 4))
    assert cuda_copy_(dst, torch.zeros(0, 4)) is dst
    assert cuda.calls == []
    assert cuda_copy_event(dst, torch.zeros(0, 4)) in cuda.current.events


def test_the_made_up_device():
    assert DEVICE.type == "cuda"
