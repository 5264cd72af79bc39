"""The codec that does nothing: the values in row-major order. What compression is compared with, and falls back to."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, FP8_DTYPES, BlockSpec, as_bits
from kvferry.codecs.base import Codec, Encoded
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, FrameHeader


@dataclass(frozen=True)
class Raw(Codec):
    """Stores values as they are."""

    name: ClassVar[str] = "raw"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOAT_DTYPES + FP8_DTYPES
    exact: ClassVar[bool] = True

    def num_tiles(self, spec: BlockSpec) -> int:
        return 0

    def encode(self, tensor: Tensor) -> Encoded:
        header = FrameHeader(codec=self.name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        payload = as_bits(tensor.contiguous()).reshape(-1).view(torch.uint8).cpu()
        return Encoded(header, np.zeros(0, dtype=np.int64), payload)

    @classmethod
    def check_size(cls, frame: Frame) -> None:
        if len(frame.sizes) or len(frame.payload) != frame.header.raw_bytes:
            raise CorruptFrame(f"{len(frame.payload)} bytes of values where {frame.header.raw_bytes} belong")

    @classmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        cls.check_size(frame)
        if out.numel():
            payload = torch.frombuffer(bytearray(frame.payload), dtype=as_bits(out).dtype)
            as_bits(out).reshape(-1).copy_(payload)
