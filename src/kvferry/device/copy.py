"""`cuda_copy_` and its kin: copies between tensors by the CUDA driver, direction found from where the tensors lie.

They do what `dst.copy_(src)` does for tensors of one dtype and shape, or refuse; what memory copies cannot do (two
levels of strides, gradients, conjugation) goes to `copy_`. Nothing is converted or broadcast.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kvferry.device import driver
from kvferry.device.layout import Rows, check_pair, is_plain, refuse_overlap, rows_of
from kvferry.device.memory import MemoryKind, locked, memory_kind, span
from kvferry.device.streams import CompletedEvent, Event, hold_until_done, recorded


def cuda_copy_(dst: Tensor, src: Tensor, non_blocking: bool = False, stream: torch.cuda.Stream | None = None) -> Tensor:
    """Copy `src` to `dst`, tensors of one dtype and shape on CPU or CUDA, and return `dst`.

    The copy is queued on `stream`, by default the current stream of the CUDA device (from device to device the
    source's, with the destination's current stream ordered around it). Copies with the host wait until it is done,
    unless `non_blocking`; copies between devices never wait. `non_blocking` takes effect for page-locked memory only:
    **with pageable memory the call waits for the stream either way**, for only then are the bytes safe. After a
    non-blocking copy to the host, wait for the stream or an event before reading. Memory that the copy uses may be
    freed at once: device tensors are recorded on `stream`, host tensors are kept until the copy is done (except in a
    graph's capture, which needs them for as long as the graph).

    Runs of bytes go by one copy, equally spaced runs by one two-dimensional copy. Everything else, and everything where
    `is_cuda_memcpy_available()` is False, goes to `Tensor.copy_`, which waits where the host takes part. From host to
    host the copy is made at once; with `stream` after what is queued there.

    Raises `TypeError` for what is no strided tensor, `ValueError` for dtypes or shapes that differ, memory that
    overlaps or is page-locked in part, a stream of another device, `CudaError` if the driver refuses.
    """
    _copy(dst, src, non_blocking, stream)
    return dst


def cuda_copy_event(dst: Tensor, src: Tensor, stream: torch.cuda.Stream | None = None) -> Event:
    """`cuda_copy_` without blocking, and the event that is done when the copy is. Raises what it raises.

    The event is a `torch.cuda.Event`, or a `CompletedEvent` where no device takes part. For several copies in a
    row, one `recorded(stream)` after the last is cheaper.
    """
    event = _copy(dst, src, True, stream)
    if event is not None:
        return event
    if not (dst.is_cuda or src.is_cuda):
        return CompletedEvent()
    device = src.device if src.is_cuda else dst.device
    return recorded(stream if stream is not None else torch.cuda.current_stream(device))


def cuda_copy_h2d(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: torch.cuda.Stream | None = None
) -> Tensor:
    """`cuda_copy_` of a CPU tensor to a CUDA tensor; `ValueError` for any other direction."""
    _require("cuda_copy_h2d", dst, src, dst_on_device=True, src_on_device=False)
    return cuda_copy_(dst, src, non_blocking, stream)


def cuda_copy_d2h(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: torch.cuda.Stream | None = None
) -> Tensor:
    """`cuda_copy_` of a CUDA tensor to a CPU tensor; `ValueError` for any other direction."""
    _require("cuda_copy_d2h", dst, src, dst_on_device=False, src_on_device=True)
    return cuda_copy_(dst, src, non_blocking, stream)


def cuda_copy_d2d(
    dst: Tensor, src: Tensor, non_blocking: bool = False, stream: torch.cuda.Stream | None = None
) -> Tensor:
    """`cuda_copy_` between CUDA tensors, of one device or two; `ValueError` for any other direction."""
    _require("cuda_copy_d2d", dst, src, dst_on_device=True, src_on_device=True)
    return cuda_copy_(dst, src, non_blocking, stream)


def _require(name: str, dst: Tensor, src: Tensor, *, dst_on_device: bool, src_on_device: bool) -> None:
    if dst.is_cuda != dst_on_device or src.is_cuda != src_on_device:
        kinds = ("a CPU", "a CUDA")
        raise ValueError(
            f"{name} copies {kinds[src_on_device]} tensor to {kinds[dst_on_device]} tensor, but src is on {src.device} "
            f"and dst on {dst.device}: use cuda_copy_, which takes any direction"
        )


def _copy(dst: Tensor, src: Tensor, non_blocking: bool, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Checks and makes the copy. Returns its event where one was recorded anyway."""
    check_pair(dst, src)
    rows = rows_of(dst, src)
    if dst.numel() == 0:
        return None
    refuse_overlap(dst, src, rows)
    if not (dst.is_cuda or src.is_cuda):
        if stream is not None:
            stream.synchronize()
        dst.copy_(src)
        return None
    check_stream(stream, dst.device, src.device)
    if rows is None or not is_plain(dst, src) or not driver.is_cuda_memcpy_available():
        copy_by_torch(dst, src, non_blocking, stream)
        return None
    increment_version(dst)
    if dst.is_cuda and src.is_cuda and dst.device != src.device:
        _copy_to_peer(dst, src, rows, stream)
        return None
    return _copy_rows(dst, src, rows, non_blocking, stream)


def _copy_rows(
    dst: Tensor, src: Tensor, rows: Rows, non_blocking: bool, stream: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """A copy within one device or between it and the host."""
    device = (dst if dst.is_cuda else src).device.index
    queue = stream if stream is not None else torch.cuda.current_stream(device)
    host = None if dst.is_cuda and src.is_cuda else (src if dst.is_cuda else dst)
    event = None
    with driver.on_device(device):
        wait = host is not None and not (non_blocking and locked(*span(host)))
        to, of, handle = dst.data_ptr(), src.data_ptr(), queue.cuda_stream
        if rows.number == 1:
            on_device = {"dst_on_device": dst.is_cuda, "src_on_device": src.is_cuda}
            driver.memcpy(to, of, rows.width, **on_device, stream=handle)
        else:
            driver.memcpy_rows(
                (to, rows.dst_pitch),
                (of, rows.src_pitch),
                rows.width,
                rows.number,
                to_device=dst.is_cuda,
                from_device=src.is_cuda,
                stream=handle,
            )
        if host is not None and not wait:
            event = hold_until_done(queue, (host,))
    if stream is not None:
        record_use(stream, dst, src)
    if wait:
        queue.synchronize()
    return event


def _copy_to_peer(dst: Tensor, src: Tensor, rows: Rows, stream: torch.cuda.Stream | None) -> None:
    """A copy from device to device."""
    if rows.number != 1:
        copy_by_torch(dst, src, True, stream)
        return
    queue = stream if stream is not None else torch.cuda.current_stream(src.device)
    theirs = torch.cuda.current_stream(dst.device) if stream is None else None
    if theirs is not None:
        queue.wait_stream(theirs)  # it may still read what dst held
    with driver.on_device(queue.device.index):
        to, of = (dst.data_ptr(), dst.device.index), (src.data_ptr(), src.device.index)
        driver.memcpy_peer(*to, *of, rows.width, queue.cuda_stream)
    if theirs is not None:
        theirs.wait_stream(queue)
    else:
        record_use(queue, dst, src)


def check_stream(stream: torch.cuda.Stream | None, *devices: torch.device) -> None:
    """Raise `ValueError` unless `stream` is None or of one of the `devices`, those of the tensors."""
    if stream is not None and stream.device not in devices:
        names = ", ".join(str(device) for device in devices if device.type == "cuda")
        raise ValueError(f"the stream is of {stream.device}, the tensors are on {names}: use a stream of theirs")


def copy_by_torch(dst: Tensor, src: Tensor, non_blocking: bool, stream: torch.cuda.Stream | None) -> None:
    """`dst.copy_(src)` on `stream`, waiting wherever that is what makes it right."""
    device = (src if src.is_cuda else dst).device
    queue = stream if stream is not None else torch.cuda.current_stream(device)
    host = None if dst.is_cuda and src.is_cuda else (src if dst.is_cuda else dst)
    # copy_ of strided host tensors goes through temporaries on the host, which it does not keep for the stream.
    if host is not None:
        direct = dst.is_contiguous() and src.is_contiguous()
        non_blocking = non_blocking and direct and memory_kind(host) is MemoryKind.PINNED
    with torch.cuda.stream(queue):
        dst.copy_(src, non_blocking=non_blocking)
    if stream is not None:
        record_use(stream, dst, src)


def record_use(stream: torch.cuda.Stream, *tensors: Tensor) -> None:
    """Tell PyTorch's allocator that `stream` uses the CUDA `tensors`: once freed, they wait for it."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)
