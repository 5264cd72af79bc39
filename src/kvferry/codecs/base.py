"""What a codec is. A codec is one folder, one line in `codecs/__init__.py` and golden frames; contract tests find it
there."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import BlockSpec
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, FrameHeader, frame_overhead

MOST_VALUES_PER_BYTE = 2048
"""A tile takes at least 4 bytes and holds at most 8192 values."""


@dataclass(frozen=True)
class Encoded:
    """An encoded tensor before it is framed: `sizes` int64 `[num_tiles]`, `payload` uint8 on the CPU."""

    header: FrameHeader
    sizes: np.ndarray
    payload: Tensor


class Codec(ABC):
    """Encodes one tensor; the parameters are the object's, a frame repeats what decoding needs.

    Subclasses are frozen dataclasses that check their own parameters (`ValueError`).
    """

    name: ClassVar[str]
    """The name in frames: 1 to 16 ASCII characters."""
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    """What it takes."""
    exact: ClassVar[bool]
    """Whether what comes back is bit-identical."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> Encoded:
        """Encode `tensor` (any strides, CPU or CUDA, a dtype out of `dtypes`); it is not changed."""

    @classmethod
    def check_size(cls, frame: Frame) -> None:
        """Raise `CorruptFrame` if the payload cannot hold what the header claims; called before anything is
        allocated."""
        if frame.header.num_values > MOST_VALUES_PER_BYTE * len(frame.payload):
            raise CorruptFrame(f"{frame.header.num_values} values cannot come from {len(frame.payload)} bytes")

    @classmethod
    @abstractmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        """Decode into `out`, a contiguous tensor of the frame's shape and dtype on the CPU or a GPU.

        Raises `CorruptFrame` if the tiles contradict the header or themselves; `out` is then undefined.
        """

    @abstractmethod
    def num_tiles(self, spec: BlockSpec) -> int:
        """Tiles of a tensor like `spec`."""

    def max_payload_bytes(self, spec: BlockSpec) -> int:
        """The most `encode` makes of a tensor like `spec`, without the frame around it."""
        # A tile that does not shrink is stored raw: 4 bytes more than its values, and these padded to 4.
        return spec.raw_bytes + 8 * self.num_tiles(spec)

    def max_encoded_bytes(self, spec: BlockSpec) -> int:
        """The most a frame of a tensor like `spec` takes."""
        return self.max_payload_bytes(spec) + frame_overhead(len(spec.shape), self.num_tiles(spec))
