"""A tile plan whose arrays lie where the kernels run."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvferry.codecs.tiling import TILE_VALUES, TilePlan


@dataclass(frozen=True)
class DevicePlan:
    """`TilePlan`'s arrays on a device: value (t, c) of tile i is element `offsets[i] + t*token_stride +
    c*channel_stride`.

    `offsets` int64 `[N]`, in elements from the tensor's first one; `tokens` and `channels` int32 `[N]`; strides in
    elements.
    `tile_values` is the most values that any tile holds: it sizes the encoder's scratch rows.
    """

    offsets: Tensor
    tokens: Tensor
    channels: Tensor
    token_stride: int
    channel_stride: int
    tile_values: int = TILE_VALUES

    @property
    def num_tiles(self) -> int:
        return self.offsets.shape[0]

    @classmethod
    def of(cls, plan: TilePlan, device: torch.device | str) -> "DevicePlan":
        values = plan.tokens.astype("int64") * plan.channels
        return cls(
            offsets=torch.from_numpy(plan.offsets).to(device),
            tokens=torch.from_numpy(plan.tokens).to(device),
            channels=torch.from_numpy(plan.channels).to(device),
            token_stride=plan.token_stride,
            channel_stride=plan.channel_stride,
            tile_values=int(values.max()) if len(values) else 0,
        )

    def rows(self, part: slice) -> "DevicePlan":
        """The plan of a run of tiles."""
        return replace(self, offsets=self.offsets[part], tokens=self.tokens[part], channels=self.channels[part])
