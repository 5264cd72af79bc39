"""Runs of bytes to copy, as arrays: made, checked and merged without a step of Python for each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvferry.device.driver import Addresses
from kvferry.device.layout import Rows
from kvferry.device.memory import span

Offsets = Sequence[int] | npt.NDArray[np.integer]
"""Byte offsets or sizes."""


class Ranges(NamedTuple):
    """Runs of bytes to copy: addresses, sizes, and `dst_owner`, `src_owner`, int64: ranges merge within one owner."""

    dsts: Addresses
    srcs: Addresses
    sizes: Addresses
    dst_owner: npt.NDArray[np.int64]
    src_owner: npt.NDArray[np.int64]

    def take(self, index: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> "Ranges":
        """The ranges at `index`."""
        return Ranges(
            self.dsts[index], self.srcs[index], self.sizes[index], self.dst_owner[index], self.src_owner[index]
        )


def coalesce(ranges: Ranges) -> Ranges:
    """The same bytes in fewer ranges: those that continue one another in both memories, within the same owners, become
    one. Sorted by destination. `dsts` must not overlap."""
    if len(ranges.sizes) < 2:
        return ranges
    ranges = ranges.take(np.argsort(ranges.dsts, kind="stable"))
    same = (
        (ranges.dsts[:-1] + ranges.sizes[:-1] == ranges.dsts[1:])
        & (ranges.srcs[:-1] + ranges.sizes[:-1] == ranges.srcs[1:])
        & (ranges.dst_owner[:-1] == ranges.dst_owner[1:])
        & (ranges.src_owner[:-1] == ranges.src_owner[1:])
    )
    starts = np.flatnonzero(np.concatenate(([True], ~same)))
    merged = ranges.take(starts)
    return merged._replace(sizes=np.add.reduceat(ranges.sizes, starts))


def ranges_of(pairs: list[tuple[Tensor, Tensor]]) -> Ranges:
    """One range a pair of contiguous tensors."""
    columns = [
        (
            dst.data_ptr(),
            src.data_ptr(),
            dst.nbytes,
            # Allocations may touch, and a copy across their border fails: only a storage is sure to be in one.
            dst.untyped_storage().data_ptr(),
            src.untyped_storage().data_ptr(),
        )
        for dst, src in pairs
    ]
    table = np.array(columns, np.uint64).reshape(-1, 5).T.copy()
    return Ranges(table[0], table[1], table[2], table[3].view(np.int64), table[4].view(np.int64))


def ranges_within(dst: Tensor, dst_offsets: Offsets, src: Tensor, src_offsets: Offsets, sizes: Offsets) -> Ranges:
    """Addresses of the ranges that have bytes. Raises `TypeError` for what is no integer, `ValueError` unless all lie
    in their tensors."""
    columns = [_integers(column) for column in (dst_offsets, src_offsets, sizes)]
    lengths = [column.shape for column in columns]
    if len(set(lengths)) != 1 or columns[0].ndim != 1:
        raise ValueError(
            f"destination offsets, source offsets and sizes have the shapes {lengths}: give one of each a range"
        )
    to, of, size = columns
    for name, tensor, offsets in (("dst", dst, to), ("src", src, of)):
        outside = (offsets < 0) | (size < 0) | (offsets > tensor.nbytes - size)
        if outside.any():
            first = int(outside.argmax())
            raise ValueError(
                f"range {first}: {int(size[first])} bytes from byte {int(offsets[first])} of {name} are not within its "
                f"{tensor.nbytes} bytes"
            )
    some = size > 0
    owner = np.zeros(int(some.sum()), np.int64)
    return Ranges(
        (to[some] + dst.data_ptr()).astype(np.uint64),
        (of[some] + src.data_ptr()).astype(np.uint64),
        size[some].astype(np.uint64),
        owner,
        owner,
    )


def _integers(column: Offsets) -> npt.NDArray[np.int64]:
    array = np.asarray(column)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"offsets and sizes are integers, not {array.dtype}")
    return array.astype(np.int64)


def refuse_overlaps(ranges: Ranges, others: list[tuple[Tensor, Tensor, Rows | None]]) -> None:
    """`refuse_overlapping` of runs and all others; equally spaced rows one by one: they may interleave."""
    dsts, dst_ends = [ranges.dsts], [ranges.dsts + ranges.sizes]
    srcs, src_ends = [ranges.srcs], [ranges.srcs + ranges.sizes]
    for dst, src, rows in others:
        for tensor, pitch, starts, ends in (
            (dst, rows.dst_pitch if rows else 0, dsts, dst_ends),
            (src, rows.src_pitch if rows else 0, srcs, src_ends),
        ):
            start, end = span(tensor)
            count, width = (rows.number, rows.width) if rows else (1, end - start)
            starts.append(np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(pitch))
            ends.append(starts[-1] + np.uint64(width))
    joined = (np.concatenate(column) for column in (dsts, dst_ends, srcs, src_ends))
    refuse_overlapping(*joined)


def refuse_overlapping(dsts: Addresses, dst_ends: Addresses, srcs: Addresses, src_ends: Addresses) -> None:
    """Raise `ValueError` if any two destinations share a byte, or any destination and any source."""
    order = np.argsort(dsts, kind="stable")
    starts, ends = dsts[order], dst_ends[order]
    clash = ends[:-1] > starts[1:]
    if clash.any():
        first = int(clash.argmax())
        raise ValueError(
            f"two destinations overlap, from {int(starts[first]):#x} and {int(starts[first + 1]):#x}: the copies of a "
            "batch have no order, make batches one after another"
        )
    # The last destination that starts before the source ends is the one with the last end: they do not overlap.
    before = np.searchsorted(starts, src_ends, side="left")
    clash = (before > 0) & (ends[np.maximum(before, 1) - 1] > srcs)
    if clash.any():
        source = int(srcs[int(clash.argmax())])
        raise ValueError(
            f"a destination overlaps the source from {source:#x}: copy through a temporary, or in batches one after "
            "another"
        )
