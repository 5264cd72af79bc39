"""Tensors into frames and back on a GPU."""

import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import as_bits
from kvferry.codecs.bounded.steps import bound_from_range, round_down
from kvferry.codecs.fused import kernels
from kvferry.codecs.fused.kernels import DECODE, ENCODE, TENSOR, Case
from kvferry.codecs.fused.tables import decoder_table, encoder_tables
from kvferry.codecs.tiles import tile_directory
from kvferry.codecs.tiling import TILE_VALUES, TilePlan, plan_tensor
from kvferry.device.nvrtc import Arguments
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame

if TYPE_CHECKING:
    from kvferry.codecs.bounded import Bounded

SLAB_TILES = 8192
"""Tiles encoded at once: bounds the scratch (their raw size), and is still far more than a GPU runs at a time."""


class _Plan:
    """A tile plan's arrays on a device, as kernels take them."""

    def __init__(self, plan: TilePlan, bits: Tensor) -> None:
        self.size = bits.element_size()
        self.bits = bits
        self.strides = plan.token_stride * self.size, plan.channel_stride * self.size
        self.offsets = torch.from_numpy(plan.offsets).to(bits.device)
        self.tokens = torch.from_numpy(plan.tokens).to(bits.device)
        self.channels = torch.from_numpy(plan.channels).to(bits.device)
        self.num_tiles = len(plan.offsets)
        self.lanes = 0
        for channels in np.unique(plan.channels).tolist():
            self.lanes |= 1 << ((channels + 31) // 32 - 1)

    def source(self, first: int, count: int) -> kernels.Source:
        """Tiles `first` and on."""
        return kernels.Source(
            data=self.bits.data_ptr(),
            offsets=self.offsets[first:].data_ptr(),
            tokens=self.tokens[first:].data_ptr(),
            channels=self.channels[first:].data_ptr(),
            token_bytes=self.strides[0],
            channel_bytes=self.strides[1],
            num_tiles=count,
            tiles_per_chunk=count,
        )


def _encode(tensor: Tensor, plan: TilePlan, case: Case, bounds: kernels.Bounds) -> tuple[np.ndarray, Tensor, float]:
    """(sizes int64, payload uint8 on the CPU, largest bound of a tile), slab by slab."""
    device = tensor.device
    on_device = _Plan(plan, as_bits(tensor))
    case = replace(case, lanes=on_device.lanes)
    sizes, payloads, bound_used = [np.zeros(0, dtype=np.int64)], [torch.empty(0, dtype=torch.uint8)], 0.0
    if on_device.num_tiles == 0:
        return sizes[0], payloads[0], bound_used
    tables, radius = encoder_tables(case.one_sided, device)
    loaded = kernels.load(case, ENCODE, device.index)
    scratch = torch.empty(loaded.scratch_bytes, dtype=torch.uint8, device=device)
    for first in range(0, on_device.num_tiles, SLAB_TILES):
        count = min(SLAB_TILES, on_device.num_tiles - first)
        capacity = count * (4 + TILE_VALUES * on_device.size)
        payload = torch.empty(capacity, dtype=torch.uint8, device=device)
        directory = torch.empty(count, 2, dtype=torch.int32, device=device)
        work = torch.zeros(kernels.work_words(1, count), dtype=torch.int32, device=device)
        sink = kernels.Sink(
            slots=payload.data_ptr(),
            slot_bytes=capacity,
            directory=directory.data_ptr(),
            work=work.data_ptr(),
            scratch=scratch.data_ptr(),
            num_chunks=1,
            ladder=kernels.Ladder(levels=1),
        )
        source = on_device.source(first, count)
        pointers = ctypes.c_void_p(tables.data_ptr()), ctypes.c_void_p(radius.data_ptr())
        loaded.launch(count, None, Arguments(source, sink, bounds, *pointers))
        ends = directory[:, 0].cpu().numpy().astype(np.int64)
        sizes.append(np.diff(ends, prepend=0))
        payloads.append(payload[: int(ends[-1])].cpu())
        # Where tiles have bounds of their own, the kernel says which was the largest.
        largest = float(work[kernels.FIRST_BOUND :][:1].view(torch.float32)) if bounds.relative > 0 else bounds.bound
        bound_used = max(bound_used, largest)
    return np.concatenate(sizes), torch.cat(payloads), bound_used


def encode_bounded(tensor: Tensor, plan: TilePlan, codec: "Bounded") -> tuple[np.ndarray, Tensor, float]:
    """(sizes int64, payload uint8, largest bound of a tile) of a CUDA tensor."""
    kind = codec.relative_to if codec.relative else "none"
    case = Case("bounded", codec.packing, codec.mode, tensor.dtype, kind == "channel", 0, TENSOR)
    with torch.cuda.device_of(tensor):
        if kind in ("tile", "channel"):
            return _encode(tensor, plan, case, kernels.Bounds(None, float(codec.error_bound), 0.0))
        if kind == "none":
            bound = round_down(torch.tensor(codec.error_bound, dtype=torch.float64))
        else:
            finite = tensor.isfinite()
            low = torch.where(finite, tensor, torch.inf).amin() if tensor.numel() else torch.tensor(torch.inf)
            high = torch.where(finite, tensor, -torch.inf).amax() if tensor.numel() else torch.tensor(-torch.inf)
            bound = bound_from_range(low.float(), high.float(), codec.error_bound)
        return _encode(tensor, plan, case, kernels.Bounds(None, 0.0, float(bound)))


def encode_lossless(tensor: Tensor, plan: TilePlan, packing: str) -> tuple[np.ndarray, Tensor]:
    """(sizes int64, payload uint8) of a CUDA tensor."""
    case = Case("lossless", packing, "none", tensor.dtype, False, 0, TENSOR)
    with torch.cuda.device_of(tensor):
        return _encode(tensor, plan, case, kernels.Bounds())[:2]


def decode(frame: Frame, out: Tensor) -> None:
    """Decode a `bounded` or `lossless` frame into `out` (contiguous, CUDA). Raises `CorruptFrame`."""
    header = frame.header
    starts, sizes = tile_directory(frame, header.grouping == "flat")
    if not len(sizes):
        return
    target, plan = plan_tensor(out, header.grouping == "flat")
    with torch.cuda.device_of(out):
        on_device = _Plan(plan, as_bits(target))
        channel_steps = header.relative_to == "channel"
        case = Case(header.codec, header.packing, header.mode, out.dtype, channel_steps, on_device.lanes, TENSOR)
        payload = torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8).to(out.device)
        starts_dev, sizes_dev = torch.from_numpy(starts).to(out.device), torch.from_numpy(sizes).int().to(out.device)
        status = torch.ones(len(sizes), dtype=torch.int32, device=out.device)
        data = kernels.Input(
            slots=payload.data_ptr(),
            starts=starts_dev.data_ptr(),
            sizes=sizes_dev.data_ptr(),
            status=status.data_ptr(),
        )
        table = decoder_table(case.one_sided, out.device)
        arguments = Arguments(on_device.source(0, len(sizes)), data, ctypes.c_void_p(table.data_ptr()))
        kernels.load(case, DECODE, out.device.index).launch(len(sizes), None, arguments)
        bad = status.nonzero().flatten().tolist()
    if bad:
        raise CorruptFrame(f"the sections of tile {bad[0]} contradict its header")
