"""GPU kernels that go from tensor to tile bytes in one launch, and back: codec and packer fused, so that nothing but
the tensor and the encoded bytes crosses device memory. Imported only when a CUDA tensor is met.

`ans` is CUDA C++ (its warp votes have no counterpart in Triton), `bitpack` and the statistics are Triton.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvferry.codecs.bounded.reference import Steps
from kvferry.codecs.fused import ans, bitpack
from kvferry.codecs.fused.compaction import compact
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.fused.stats import tile_stats
from kvferry.codecs.tiles import tile_directory
from kvferry.codecs.tiling import TilePlan, plan_tensor
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, FrameHeader

if TYPE_CHECKING:
    from kvferry.codecs.bounded import Bounded

SLAB_TILES = 8192
"""Tiles encoded at once: bounds the scratch (about 50 KiB a tile), and is still far more than a GPU runs at a time."""


def _collect(
    plan: DevicePlan, encode: Callable[[slice, DevicePlan], tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, Tensor]:
    """Sizes int64 and payload uint8 on the CPU of all tiles, encoded slab by slab."""
    sizes, payloads = [np.zeros(0, dtype=np.int64)], [torch.empty(0, dtype=torch.uint8)]
    for start in range(0, plan.num_tiles, SLAB_TILES):
        part = slice(start, start + SLAB_TILES)
        scratch, lengths = encode(part, plan.rows(part))
        payloads.append(compact(scratch, lengths)[0].cpu())
        sizes.append(lengths.cpu().numpy().astype(np.int64))
    return np.concatenate(sizes), torch.cat(payloads)


def encode_bounded(
    tensor: Tensor, plan: TilePlan, codec: "Bounded", header: Callable[[Tensor, float], FrameHeader]
) -> tuple[FrameHeader, np.ndarray, Tensor]:
    """(header, sizes, payload) of a CUDA tensor."""
    on_device = DevicePlan.of(plan, tensor.device)
    with torch.cuda.device_of(tensor):
        steps = bounded_steps(tensor, on_device, codec)

        def encode(part: slice, mine: DevicePlan) -> tuple[Tensor, Tensor]:
            own = Steps(steps.step[part], steps.inverse[part], steps.bound[part])
            if codec.packing == "ans":
                return ans.encode_bounded(tensor, mine, own, codec.mode)
            return bitpack.encode_bounded(
                tensor, mine, own.step, own.inverse, own.bound, mode=codec.mode, channel_steps=own.step.dim() == 2
            )

        sizes, payload = _collect(on_device, encode)
        bound_used = float(steps.bound.max()) if steps.bound.numel() else 0.0
    return header(tensor, bound_used), sizes, payload


def bounded_steps(tensor: Tensor, plan: DevicePlan, codec: "Bounded") -> Steps:
    """Bounds and steps of all tiles, on the device, by the arithmetic of the reference."""
    stats = tile_stats(tensor, plan, ranges=codec.relative)
    sampled = ((plan.tokens + 7) // 8 * plan.channels).long()
    return codec.steps_from_statistics(stats.minimum, stats.maximum, stats.exponent_sum, sampled, tensor.dtype)


def encode_lossless(tensor: Tensor, plan: TilePlan, packing: str) -> tuple[np.ndarray, Tensor]:
    """(sizes, payload) of a CUDA tensor."""
    encode = ans.encode_lossless if packing == "ans" else bitpack.encode_lossless
    with torch.cuda.device_of(tensor):
        return _collect(DevicePlan.of(plan, tensor.device), lambda _, mine: encode(tensor, mine))


def _decode(frame: Frame, out: Tensor, mode: str | None) -> None:
    header = frame.header
    starts, sizes = tile_directory(frame, header.grouping == "flat")
    if not len(sizes):
        return
    target, plan = plan_tensor(out, header.grouping == "flat")
    channel_steps = header.relative_to == "channel"
    with torch.cuda.device_of(out):
        on_device = DevicePlan.of(plan, out.device)
        payload = torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8).to(out.device)
        starts_dev, sizes_dev = torch.from_numpy(starts).to(out.device), torch.from_numpy(sizes).int().to(out.device)
        status = torch.ones(len(sizes), dtype=torch.int32, device=out.device)
        if header.packing == "ans":
            ans.decode(
                payload, starts_dev, sizes_dev, target, on_device, status, mode=mode, channel_steps=channel_steps
            )
        elif mode is None:
            bitpack.decode_lossless(payload, starts_dev, sizes_dev, target, on_device, status=status)
        else:
            bitpack.decode_bounded(
                payload, starts_dev, sizes_dev, target, on_device, mode=mode, channel_steps=channel_steps, status=status
            )
        bad = status.nonzero().flatten().tolist()
    if bad:
        raise CorruptFrame(f"the sections of tile {bad[0]} contradict its header")


def decode_bounded(frame: Frame, out: Tensor) -> None:
    """Decode a `bounded` frame into `out` (contiguous, CUDA). Raises `CorruptFrame`."""
    _decode(frame, out, frame.header.mode)


def decode_lossless(frame: Frame, out: Tensor) -> None:
    """Decode a `lossless` frame into `out` (contiguous, CUDA). Raises `CorruptFrame`."""
    _decode(frame, out, None)
