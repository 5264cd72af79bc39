"""Which bytes a copy moves: what may be copied, and whether runs or rows of bytes do it. Pure arithmetic on strides."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvferry.blocks import each_element_once
from kvferry.device.memory import span

MAX_PITCH = (1 << 31) - 1
"""Bytes from row to row that CUDA's two-dimensional copies allow (CU_DEVICE_ATTRIBUTE_MAX_PITCH of every GPU yet)."""


class Rows(NamedTuple):
    """`number` runs of `width` bytes; from the start of one to the next `dst_pitch` and `src_pitch` bytes.

    One run is a plain copy: its pitches are its width.
    """

    number: int
    width: int
    dst_pitch: int
    src_pitch: int


def check_pair(dst: Tensor, src: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `src` can be copied to `dst` value by value: same dtype and shape,
    strided, on CPU or CUDA, no element of `dst` in two places."""
    for name, tensor in (("dst", dst), ("src", src)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, not a torch.Tensor")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} has the layout {tensor.layout}: copies take strided tensors, use copy_")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} is on {tensor.device}: copies take CPU and CUDA tensors")
    if dst.dtype is not src.dtype:
        raise ValueError(f"dst is {dst.dtype} and src is {src.dtype}: copies do not convert, use src.to({dst.dtype})")
    if dst.shape != src.shape:
        raise ValueError(
            f"dst has the shape {list(dst.shape)} and src {list(src.shape)}: copies do not broadcast, "
            "use view or expand to make them agree"
        )
    if not dst.is_contiguous() and dst.numel() and not each_element_once(dst):
        raise ValueError(
            f"elements of dst share memory or may do so (shape {list(dst.shape)}, strides {list(dst.stride())}): "
            "copy to a tensor without overlap"
        )


def rows_of(dst: Tensor, src: Tensor) -> Rows | None:
    """How to copy `src` to `dst`, of one shape and dtype, by runs of bytes that lie alike in both.

    None if it takes more than one level of equally spaced runs: `copy_` is for that.
    """
    size = dst.element_size()
    if dst.is_contiguous() and src.is_contiguous():
        return Rows(1, dst.nbytes, dst.nbytes, dst.nbytes)
    dims = [
        (extent, to, of)
        for extent, to, of in zip(dst.shape, dst.stride(), src.stride(), strict=True)
        if extent > 1  # the stride of a dimension of one element says nothing
    ]
    # The order of dimensions is free as long as both tensors take the same one.
    dims.sort(key=lambda dim: (dim[1], dim[2]), reverse=True)
    merged: list[tuple[int, int, int]] = []
    for extent, to, of in dims:
        if merged and merged[-1][1] == extent * to and merged[-1][2] == extent * of:
            merged[-1] = (merged[-1][0] * extent, to, of)
        else:
            merged.append((extent, to, of))
    width = size
    if merged and merged[-1][1] == merged[-1][2] == 1:
        width = merged.pop()[0] * size
    if not merged:
        return Rows(1, width, width, width)
    if len(merged) > 1:
        return None
    count, to, of = merged[0]
    rows = Rows(count, width, to * size, of * size)
    fits = width <= min(rows.dst_pitch, rows.src_pitch) and max(rows.dst_pitch, rows.src_pitch) <= MAX_PITCH
    return rows if fits else None


def overlap(dst: Tensor, src: Tensor, rows: Rows | None) -> bool:
    """Whether the copy might write memory that it reads. Two tensors whose rows interleave without touching do not."""
    (to, to_end), (of, of_end) = span(dst), span(src)
    if to_end <= of or of_end <= to:
        return False
    if rows is None or rows.number == 1 or rows.dst_pitch != rows.src_pitch:
        return True
    apart = (to - of) % rows.dst_pitch
    return not rows.width <= apart <= rows.dst_pitch - rows.width


def refuse_overlap(dst: Tensor, src: Tensor, rows: Rows | None) -> None:
    """Raise `ValueError` if `overlap`."""
    if overlap(dst, src, rows):
        (to, to_end), (of, of_end) = span(dst), span(src)
        raise ValueError(
            f"dst ({to:#x} to {to_end:#x}) and src ({of:#x} to {of_end:#x}) overlap or may do so: "
            "copy through a temporary, dst.copy_(src.clone())"
        )


def is_plain(dst: Tensor, src: Tensor) -> bool:
    """Whether moving bytes means what `copy_` means: no gradient to record, no conjugation or negation to resolve."""
    if dst.is_neg() != src.is_neg() or dst.is_conj() != src.is_conj():
        return False
    return not ((dst.requires_grad or src.requires_grad) and torch.is_grad_enabled())
