"""Many copies in one call: `copy_batch` of tensors, `copy_ranges` of byte ranges within two tensors.

Ranges that continue one another in both memories are merged first; what is left goes to the driver in one
`cuMemcpyBatchAsync`, or one by one where it has none. A copy within a batch costs the driver less than a call of its
own; the merged ones cost nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kvferry.device import driver
from kvferry.device.copy import check_stream, copy_by_torch, cuda_copy_, record_use
from kvferry.device.layout import Rows, check_pair, is_plain, rows_of
from kvferry.device.memory import PAGEABLE, host_allocations
from kvferry.device.ranges import (
    Offsets,
    Ranges,
    coalesce,
    ranges_of,
    ranges_within,
    refuse_overlapping,
    refuse_overlaps,
)
from kvferry.device.streams import LEGACY_STREAMS, batch_stream, hold_until_done

H2D, D2H, D2D = (True, False), (False, True), (True, True)
"""Directions: (dst is on the device, src is on the device)."""


def copy_batch(
    dsts: Sequence[Tensor],
    srcs: Sequence[Tensor],
    stream: torch.cuda.Stream | None = None,
    *,
    non_blocking: bool = True,
) -> list[Tensor]:
    """Copy each of `srcs` to its one of `dsts` and return these. CPU and CUDA tensors of one device, any directions.

    As `cuda_copy_` for each pair, and unlike it non-blocking by default: queued on `stream` (default: the device's
    current one), as a whole in stream order, in no order among themselves; wait for the stream or `recorded(stream)`
    before reading on the host. Copies with pageable memory wait for the stream, as does everything if not
    `non_blocking`. Pairs of contiguous tensors go in one batch a direction, after neighbours in one storage are merged;
    pairs of equally spaced rows by one two-dimensional copy each; others by `copy_`. Without CUDA all of them do.

    Raises what `cuda_copy_` raises, and `ValueError` for lists that differ in length, a destination that overlaps
    another destination or any source, pairs of several devices, and pairs from host to host among others.
    """
    dsts, srcs = list(dsts), list(srcs)
    if len(dsts) != len(srcs):
        raise ValueError(f"{len(dsts)} destinations and {len(srcs)} sources: give one of each for every copy")
    if len(dsts) == 1:  # arrays would only cost
        return [cuda_copy_(dsts[0], srcs[0], non_blocking, stream)]
    linear: list[int] = []  # one run of bytes each
    others: dict[int, Rows | None] = {}
    for number, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        rows = _checked_pair(number, dst, src)
        if dst.numel():
            if rows is not None and rows.number == 1 and is_plain(dst, src):
                linear.append(number)
            else:
                others[number] = rows
    if not linear and not others:
        return dsts
    device = _one_device(dsts, srcs, [*linear, *others])
    pairs = [(dsts[number], srcs[number]) for number in linear]
    ranges = ranges_of(pairs)
    refuse_overlaps(ranges, [(dsts[number], srcs[number], rows) for number, rows in others.items()])
    if device is None or not driver.is_cuda_memcpy_available():
        _copy_by_torch([*pairs, *((dsts[number], srcs[number]) for number in others)], stream, non_blocking)
        return dsts
    queue = stream if stream is not None else torch.cuda.current_stream(device)
    check_stream(stream, torch.device("cuda", device))
    if linear:
        increment_version([dst for dst, _ in pairs])
        directions = np.array([2 * dst.is_cuda + src.is_cuda for dst, src in pairs])
        parts = {way: ranges.take(directions == 2 * way[0] + way[1]) for way in (H2D, D2H, D2D)}
        _submit(parts, queue, [tensor for pair in pairs for tensor in pair if not tensor.is_cuda], non_blocking)
        if stream is not None:
            record_use(stream, *(tensor for pair in pairs for tensor in pair))
    for number in others:
        cuda_copy_(dsts[number], srcs[number], non_blocking, stream)
    return dsts


def copy_ranges(
    dst: Tensor,
    dst_offsets: Offsets,
    src: Tensor,
    src_offsets: Offsets,
    sizes: Offsets,
    stream: torch.cuda.Stream | None = None,
    *,
    non_blocking: bool = True,
) -> Tensor:
    """Copy `sizes[i]` bytes from byte `src_offsets[i]` of `src` to byte `dst_offsets[i]` of `dst`, for all i.

    `copy_batch` for many ranges of two contiguous tensors (slots of a pool, a staging ring) without a tensor for each:
    checks and merging are done on arrays, so that the host's time hardly depends on their number. Integer sequences or
    arrays of one length; the dtypes of the tensors do not matter. At least one of the tensors on CUDA, or both on the
    CPU (then the ranges are copied at once, with `stream` after what is queued there).

    Raises `TypeError` for strides with gaps or other than strided tensors, `ValueError` for ranges outside of their
    tensor, lengths that differ, destinations that overlap anything, tensors of two devices; `CudaError`.
    """
    for name, tensor in (("dst", dst), ("src", src)):
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.is_contiguous():
            raise TypeError(f"{name} must be a contiguous tensor: its ranges are given in bytes")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on {tensor.device}: copies take CPU and CUDA tensors")
    if dst.is_cuda and src.is_cuda and dst.device != src.device:
        raise ValueError(f"dst is on {dst.device} and src on {src.device}: copy between devices by cuda_copy_d2d")
    ranges = ranges_within(dst, dst_offsets, src, src_offsets, sizes)
    if not len(ranges.sizes):
        return dst
    refuse_overlapping(ranges.dsts, ranges.dsts + ranges.sizes, ranges.srcs, ranges.srcs + ranges.sizes)
    if not (dst.is_cuda or src.is_cuda) or not driver.is_cuda_memcpy_available():
        _copy_by_torch(_slices(dst, src, ranges), stream, non_blocking)
        return dst
    check_stream(stream, dst.device, src.device)
    queue = stream if stream is not None else torch.cuda.current_stream((dst if dst.is_cuda else src).device)
    increment_version(dst)
    host = [tensor for tensor in (dst, src) if not tensor.is_cuda]
    _submit({(dst.is_cuda, src.is_cuda): ranges}, queue, host, non_blocking)
    if stream is not None:
        record_use(stream, dst, src)
    return dst


def _checked_pair(number: int, dst: Tensor, src: Tensor) -> Rows | None:
    """`rows_of` the pair. The errors of `check_pair` name its number."""
    try:
        check_pair(dst, src)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pair {number}: {error}") from None
    return rows_of(dst, src)


def _one_device(dsts: list[Tensor], srcs: list[Tensor], numbers: list[int]) -> int | None:
    """Index of the CUDA device of all pairs; None if all are from host to host."""
    found: set[int] = set()
    on_host = []
    for number in numbers:
        cuda = [tensor.device.index for tensor in (dsts[number], srcs[number]) if tensor.is_cuda]
        found.update(cuda)
        if not cuda:
            on_host.append(number)
    if len(found) > 1:
        raise ValueError(f"the batch is on cuda:{', cuda:'.join(map(str, sorted(found)))}: make one for each device")
    if found and on_host:
        raise ValueError(
            f"pair {on_host[0]} is from host to host in a batch for cuda:{found.pop()}: copy it with copy_"
        )
    return found.pop() if found else None


def _copy_by_torch(pairs: list[tuple[Tensor, Tensor]], stream: torch.cuda.Stream | None, non_blocking: bool) -> None:
    """`copy_` of all pairs, which are all on the CPU or none is."""
    on_cpu = not any(tensor.is_cuda for tensor in pairs[0])
    if on_cpu and stream is not None:
        stream.synchronize()
    for dst, src in pairs:
        if on_cpu:
            dst.copy_(src)
        else:
            copy_by_torch(dst, src, non_blocking, stream)


def _slices(dst: Tensor, src: Tensor, ranges: Ranges) -> list[tuple[Tensor, Tensor]]:
    """The merged ranges as uint8 tensors."""
    # as_strided, for a contiguous tensor of one element may have any strides, which no other dtype can view.
    to, of = (tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8) for tensor in (dst, src))
    merged = coalesce(ranges)
    columns = (merged.dsts - np.uint64(dst.data_ptr()), merged.srcs - np.uint64(src.data_ptr()), merged.sizes)
    return [
        (to[at : at + size], of[start : start + size])
        for at, start, size in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _submit(
    parts: dict[tuple[bool, bool], Ranges], queue: torch.cuda.Stream, host: list[Tensor], non_blocking: bool
) -> None:
    """Queue the ranges of every direction on `queue`; `host` are the tensors on the host that they touch."""
    waits = bool(host) and not non_blocking
    with driver.on_device(queue.device.index):
        for way, ranges in parts.items():
            if way == D2D:
                _queue_ranges(way, coalesce(ranges), queue, in_batch=True)
                continue
            starts, owner = (ranges.srcs, ranges.src_owner) if way == H2D else (ranges.dsts, ranges.dst_owner)
            found = host_allocations(starts, starts + ranges.sizes)
            owner = np.where(found >= 0, found, owner)
            ranges = ranges._replace(src_owner=owner) if way == H2D else ranges._replace(dst_owner=owner)
            pageable = found == PAGEABLE
            if pageable.any():
                # The driver stages pageable memory piece by piece: a batch has nothing to win there.
                _queue_ranges(way, coalesce(ranges.take(pageable)), queue, in_batch=False)
                ranges, waits = ranges.take(~pageable), True
            _queue_ranges(way, coalesce(ranges), queue, in_batch=True)
        if host and not waits:
            hold_until_done(queue, host)
    if waits:
        queue.synchronize()


def _queue_ranges(way: tuple[bool, bool], ranges: Ranges, queue: torch.cuda.Stream, *, in_batch: bool) -> None:
    count, handle = len(ranges.sizes), queue.cuda_stream
    batch = driver.batch_copy() if in_batch and count > 1 and not driver.is_capturing(handle) else None
    if batch is None:
        for to, of, size in zip(ranges.dsts.tolist(), ranges.srcs.tolist(), ranges.sizes.tolist(), strict=True):
            driver.memcpy(to, of, size, dst_on_device=way[0], src_on_device=way[1], stream=handle)
    elif handle in LEGACY_STREAMS:
        beside = batch_stream(queue.device.index)
        beside.wait_stream(queue)
        batch(ranges.dsts, ranges.srcs, ranges.sizes, beside.cuda_stream)
        queue.wait_stream(beside)
    else:
        batch(ranges.dsts, ranges.srcs, ranges.sizes, handle)
