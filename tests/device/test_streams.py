"""Side streams, recorded events, and tensors kept until copies are done."""

import weakref

import pytest
import torch
from fake_cuda import Event, Stream, cuda  # noqa: F401 - a fixture

from kvferry.device import recorded, side_stream, streams


def on_gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


def test_tensors_are_let_go_in_order(cuda):  # noqa: F811
    stream = Stream()
    tensors = [torch.zeros(3) for _ in range(3)]
    dead = [weakref.ref(tensor) for tensor in tensors]
    events = [streams.hold_until_done(stream, [tensors.pop(0)]) for _ in range(3)]
    assert stream.events == events
    assert all(ref() is not None for ref in dead)
    events[1].done = True
    streams.hold_until_done(stream, [])
    assert all(ref() is not None for ref in dead)
    events[0].done = True
    streams.hold_until_done(stream, [])
    assert [ref() is None for ref in dead] == [True, True, False]


def test_a_done_event_holds_nothing(monkeypatch):
    held = streams._Held()
    held.hold(Event(done=True), (torch.zeros(1),))
    assert len(held) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_cuda_pytorch_says_so():
    with pytest.raises((RuntimeError, AssertionError)):
        side_stream(0)


@on_gpu
def test_gpu_side_streams():
    assert side_stream(0) is side_stream(0)
    assert side_stream(0) != side_stream(0, high_priority=True)
    assert side_stream(0, high_priority=True).priority < side_stream(0).priority
    assert side_stream(0).cuda_stream not in streams.LEGACY_STREAMS
    assert torch.cuda.default_stream().cuda_stream in streams.LEGACY_STREAMS
    with torch.cuda.stream(side_stream(0)):
        torch.cuda._sleep(200_000_000)
    event = recorded(side_stream(0))
    assert not event.query()
    event.synchronize()
    assert side_stream(0).query()
