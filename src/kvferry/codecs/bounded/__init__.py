"""Error-bounded compression: cuSZp's scheme made for KV cache. docs/codecs.md says which mode and bound to take."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, BlockSpec, as_bits
from kvferry.codecs import tiles
from kvferry.codecs.base import Codec, Encoded
from kvferry.codecs.bounded import reference
from kvferry.codecs.bounded.steps import (
    SAMPLED_TOKENS,
    bound_from_range,
    loosen_bound,
    round_down,
    step_from_bound,
    tile_statistics,
)
from kvferry.codecs.checks import gpu_kernels, one_of
from kvferry.codecs.tiling import TilePlan, count_tiles, gather_tiles, plan_tensor
from kvferry.format.frame import GROUPINGS, Frame, FrameHeader
from kvferry.packing import PACKERS
from kvferry.packing.columns import Columns

RELATIVE_TO = ("tensor", "tile", "channel")


@dataclass(frozen=True)
class Bounded(Codec):
    """Every finite value comes back within the bound; NaN, infinities, signed zeros and denormals bit for bit.

    `error_bound` > 0: absolute (`relative=False`), or times the range of the finite values of what `relative_to` names:
    the "tensor", each "tile" (64 tokens x 128 channels), each "channel" of a tile. `mode`: "fixed" (no prediction),
    "plain" (first differences), "outlier" (the same, large first values kept apart). `grouping`: "token" (consecutive
    tokens of a channel), "flat" (consecutive values in row-major order). `packing`: "ans" or "bitpack". Raises
    `ValueError` for anything else.
    """

    error_bound: float = 1e-3
    relative: bool = True
    relative_to: str = "tensor"
    mode: str = "fixed"
    grouping: str = "token"
    packing: str = "ans"

    name: ClassVar[str] = "bounded"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOAT_DTYPES
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        bound = self.error_bound
        if isinstance(bound, bool) or not isinstance(bound, (int, float)):
            raise TypeError(f"error_bound={bound!r} is a {type(bound).__name__}; give a float")
        if not 0 < bound <= sys.float_info.max:
            raise ValueError(
                f"error_bound={bound!r} must be a finite number above 0; for exact results use kvferry.Lossless()"
            )
        one_of("relative_to", self.relative_to, RELATIVE_TO)
        one_of("mode", self.mode, reference.BASES)
        one_of("grouping", self.grouping, GROUPINGS)
        one_of("packing", self.packing, PACKERS)

    @property
    def flat(self) -> bool:
        return self.grouping == "flat"

    def num_tiles(self, spec: BlockSpec) -> int:
        return count_tiles(spec.shape, self.flat)

    def encode(self, tensor: Tensor) -> Encoded:
        target, plan = plan_tensor(tensor, self.flat)
        if tensor.is_cuda:
            sizes, payload, bound_used = gpu_kernels("frames").encode_bounded(target, plan, self)
            return Encoded(self._header(tensor, bound_used), sizes, payload)
        steps = self.tile_steps(target, plan)
        channel_steps = self._bound_kind == "channel"
        layout = reference.layout(tensor.dtype, self.mode, channel_steps)
        packer = PACKERS[self.packing]

        def to_columns(bits: Tensor, batch: np.ndarray) -> Columns:
            mine = steps.rows(torch.from_numpy(batch))
            if channel_steps:
                mine = reference.Steps(*(x[:, : bits.shape[2]] for x in (mine.step, mine.inverse, mine.bound)))
            return reference.to_columns(bits.view(tensor.dtype), bits, mine, self.mode, packer.group_tokens)

        sizes, payload = tiles.encode_tiles(target, plan, layout, packer, to_columns)
        bound_used = float(steps.bound.max()) if steps.bound.numel() else 0.0
        return Encoded(self._header(tensor, bound_used), sizes, payload)

    @property
    def _bound_kind(self) -> str:
        return self.relative_to if self.relative else "none"

    def _header(self, tensor: Tensor, bound_used: float) -> FrameHeader:
        return FrameHeader(
            codec=self.name,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            packing=self.packing,
            mode=self.mode,
            grouping=self.grouping,
            relative_to=self._bound_kind,
            bound_asked=float(self.error_bound),
            bound_used=bound_used,
        )

    def tile_steps(self, tensor: Tensor, plan: TilePlan) -> reference.Steps:
        """Bounds and steps of all tiles, `[num_tiles]`, or `[num_tiles, 128]` relative to channels."""
        low, high, exponent_sum = _tile_statistics(tensor, plan, ranges=self.relative)
        sampled = torch.from_numpy((-(-plan.tokens // SAMPLED_TOKENS) * plan.channels).astype(np.int64))
        return self.steps_from_statistics(low, high, exponent_sum, sampled, tensor.dtype)

    def steps_from_statistics(
        self,
        low: Tensor,
        high: Tensor,
        exponent_sum: Tensor,
        sampled: Tensor,
        dtype: torch.dtype,
        *,
        absolute: Tensor | None = None,
        looser: float = 1.0,
    ) -> reference.Steps:
        """Bounds and steps from each channel's smallest and largest finite value, float32 `[N, C]` (+inf and -inf
        where there is none), and each tile's exponent sum over `sampled` values, int64 `[N]`.

        `absolute` float32 `[N]` (at most 2**126) stands in for an absolute error bound; `looser` (a float32) is
        what bounds are multiplied by once they are made.
        """
        kind = self._bound_kind
        if kind == "none":
            asked = torch.tensor(self.error_bound, dtype=torch.float64, device=exponent_sum.device)
            bound = round_down(asked).expand(len(exponent_sum)).contiguous() if absolute is None else absolute
        elif kind == "channel":
            bound = bound_from_range(low, high, self.error_bound)
        else:
            low, high = low.amin(1), high.amax(1)
            if kind == "tensor" and len(low):
                low, high = low.amin().expand(len(low)), high.amax().expand(len(high))
            bound = bound_from_range(low, high, self.error_bound)
        bound = loosen_bound(bound, looser)
        mantissa = reference.MANTISSA_BITS[dtype]
        step, inverse = step_from_bound(bound, exponent_sum.long(), sampled, mantissa, kind == "channel")
        return reference.Steps(step, inverse, bound)

    @classmethod
    def check_size(cls, frame: Frame) -> None:
        tiles.tile_directory(frame, frame.header.grouping == "flat")

    @classmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        header = frame.header
        one_of("dtype", str(header.dtype), map(str, cls.dtypes), corrupt=True)
        one_of("mode", header.mode, reference.BASES, corrupt=True)
        one_of("packing", header.packing, PACKERS, corrupt=True)
        if out.is_cuda:
            gpu_kernels("frames").decode(frame, out)
            return
        layout = reference.layout(header.dtype, header.mode, header.relative_to == "channel")
        packer = PACKERS[header.packing]
        tiles.decode_tiles(
            frame,
            header.grouping == "flat",
            layout,
            packer,
            lambda decoded: reference.to_bits(decoded, header.dtype, header.mode, packer.group_tokens),
            out,
        )


def _tile_statistics(tensor: Tensor, plan: TilePlan, ranges: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest finite value of each channel `[num_tiles, 128]` (+inf and -inf if not asked for `ranges`)
    and exponent sums `[num_tiles]`, on the CPU."""
    low = torch.full((plan.num_tiles, 128), torch.inf)
    high = torch.full((plan.num_tiles, 128), -torch.inf)
    exponent_sum = torch.zeros(plan.num_tiles, dtype=torch.int64)
    bits = as_bits(tensor)
    for tokens, channels, indices in plan.groups():
        for batch in np.split(indices, range(tiles.BATCH_TILES, len(indices), tiles.BATCH_TILES)):
            values = gather_tiles(bits, plan, batch, tokens, channels).view(tensor.dtype).float()
            rows = torch.from_numpy(batch)
            channel_low, channel_high, exponent_sum[rows] = tile_statistics(values, ranges)
            if ranges:
                low[rows, :channels], high[rows, :channels] = channel_low, channel_high
    return low, high, exponent_sum
