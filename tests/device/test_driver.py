"""What of the driver's calls can be checked without a driver: messages, and the batch call's arguments."""

import ctypes

import numpy as np
import pytest

from kvferry.device import driver

bindings = pytest.importorskip("cuda.bindings.driver")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("CUDA_ERROR_INVALID_VALUE", "page-locked in one piece"),
        ("CUDA_ERROR_OUT_OF_MEMORY", "ulimit -l"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_LAUNCH_BLOCKING"),
        ("CUDA_ERROR_NO_DEVICE", "documentation"),
    ],
)
def test_errors_name_the_call_the_error_and_a_remedy(name, remedy):
    status = getattr(bindings.CUresult, name)
    text = str(driver.failure(status, "copy of 3 bytes"))
    assert text.startswith(f"copy of 3 bytes: {name} ({int(status)}): ")
    assert remedy in text


def test_every_remedy_is_of_an_error_that_exists():
    assert all(hasattr(bindings.CUresult, name) for name in driver._REMEDIES)


@pytest.mark.parametrize("version", [driver.DRIVER_12_8, driver.DRIVER_13_0])
def test_a_batch_is_called_as_its_version_wants(version):
    """A C function in place of the driver's reads the arguments back."""
    seen = {}
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    old = version == driver.DRIVER_12_8
    types = [pointer, pointer, pointer, size, pointer, pointer, size, *([pointer] if old else []), pointer]

    def read(address, count):
        return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address)).tolist()

    @ctypes.CFUNCTYPE(ctypes.c_int, *types)
    def stand_in(*arguments):
        dsts, srcs, sizes, count, attributes, first, kinds, *fail, stream = arguments
        seen.update(
            table=[read(column, count) for column in (dsts, srcs, sizes)],
            order=ctypes.c_int.from_address(attributes).value,
            first=read(first, 1),
            kinds=kinds,
            fail=len(fail),
            stream=stream,
        )
        return seen.get("code", 0)

    call = driver._batch_caller(ctypes.cast(stand_in, ctypes.c_void_p).value, version)
    columns = np.array([[1, 2, 3], [2**63, 5, 6], [7, 8, 9]], np.uint64)
    call(*columns, 0x55)
    assert seen["table"] == columns.tolist()
    assert seen["order"] == int(bindings.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM)
    assert (seen["first"], seen["kinds"], seen["fail"], seen["stream"]) == ([0], 1, int(old), 0x55)
    seen["code"] = 1
    with pytest.raises(
        driver.CudaError, match=r"cuMemcpyBatchAsync of 3 ranges, 24 bytes: CUDA_ERROR_INVALID_VALUE \(1\)"
    ):
        call(*columns, 0x55)


def test_rows_are_described_as_the_driver_wants(monkeypatch):
    seen = {}

    def stand_in(what, stream):
        seen.update(what=what, stream=stream)
        return (bindings.CUresult.CUDA_SUCCESS,)

    class Bindings:
        def __getattr__(self, name):
            return stand_in if name == "cuMemcpy2DAsync" else getattr(bindings, name)

    monkeypatch.setattr(driver, "driver", Bindings)
    driver.memcpy_rows((100, 32), (200, 64), 24, 5, to_device=True, from_device=False, stream=9)
    what = seen["what"]
    assert (int(what.dstDevice), what.dstPitch, what.srcHost, what.srcPitch) == (100, 32, 200, 64)
    assert (what.WidthInBytes, what.Height, seen["stream"]) == (24, 5, 9)
    kinds = bindings.CUmemorytype
    assert (what.dstMemoryType, what.srcMemoryType) == (kinds.CU_MEMORYTYPE_DEVICE, kinds.CU_MEMORYTYPE_HOST)
    driver.memcpy_rows((100, 32), (200, 64), 24, 5, to_device=False, from_device=True, stream=9)
    assert (seen["what"].dstHost, int(seen["what"].srcDevice)) == (100, 200)
