"""Which bytes the CUDA machine asks the driver to copy, with a driver that copies host memory at once."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.device import driver
from kvferry.pipeline.cuda import CudaMachine


class FakeDriver:
    """Counts the calls and makes the copies."""

    def __init__(self) -> None:
        self.calls = 0

    def memcpy(self, dst: int, src: int, num_bytes: int, **devices: object) -> None:
        assert devices["stream"] == 7
        self.calls += 1
        ctypes.memmove(dst, src, num_bytes)

    def memcpy_rows(self, dst: tuple[int, int], src: tuple[int, int], width: int, rows: int, **devices: object) -> None:
        assert devices["stream"] == 7
        self.calls += 1
        for row in range(rows):
            ctypes.memmove(dst[0] + row * dst[1], src[0] + row * src[1], width)

    def batch(self, dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        assert stream == 7
        assert all(column.dtype == np.uint64 and column.flags.c_contiguous for column in (dsts, srcs, sizes))
        self.calls += 1
        for d, s, n in zip(dsts.tolist(), srcs.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(d, s, n)


class Stream:
    cuda_stream = 7


@given(st.data(), st.booleans(), st.booleans(), st.booleans())
def test_rows_arrive(data: st.DataObject, dst_gaps: bool, src_gaps: bool, batch: bool) -> None:
    size, width = data.draw(st.integers(1, 20)), 24
    fake = FakeDriver()
    machine = CudaMachine.__new__(CudaMachine)
    machine._batch = fake.batch if batch else None
    dst = torch.zeros(size, width + 8 * dst_gaps, dtype=torch.uint8)
    src = torch.randint(1, 256, (size, width + 8 * src_gaps), dtype=torch.uint8)
    wanted, taken = dst.clone(), np.zeros(size, bool)
    dsts, srcs, counts = [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, size))
        d, s = data.draw(st.integers(0, size - count)), data.draw(st.integers(0, size - count))
        if taken[d : d + count].any():
            continue
        taken[d : d + count] = True
        wanted[d : d + count, :width] = src[s : s + count, :width]
        dsts.append(d)
        srcs.append(s)
        counts.append(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "memcpy", fake.memcpy)
        patch.setattr(driver, "memcpy_rows", fake.memcpy_rows)
        machine.copy_rows(
            dst[:, :width],
            np.array(dsts, np.int32),
            src[:, :width],
            np.array(srcs, np.int64),
            np.array(counts),
            Stream(),
        )
    assert torch.equal(dst, wanted)
    if len(counts) == 1 or batch:
        assert fake.calls == 1


def test_without_bindings_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "is_cuda_memcpy_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'kvferry\[gpu\]', or keep the pages on the CPU"):
        CudaMachine(torch.device("cuda", 0))
