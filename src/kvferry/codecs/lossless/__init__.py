"""Bit-identical compression: exponents are predictable, signs and mantissas are not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, FP8_DTYPES, BlockSpec
from kvferry.codecs import tiles
from kvferry.codecs.base import Codec, Encoded
from kvferry.codecs.checks import gpu_kernels, one_of
from kvferry.codecs.lossless.reference import SPLITS, to_bits, to_columns
from kvferry.codecs.tiling import count_tiles, plan_tensor
from kvferry.format.frame import Frame, FrameHeader
from kvferry.packing import PACKERS


@dataclass(frozen=True)
class Lossless(Codec):
    """What comes back is bit-identical, NaN payloads included.

    `packing`: "ans" (default, smaller) or "bitpack". Raises `ValueError` for another one.
    """

    packing: str = "ans"

    name: ClassVar[str] = "lossless"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOAT_DTYPES + FP8_DTYPES
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("packing", self.packing, PACKERS)

    def num_tiles(self, spec: BlockSpec) -> int:
        return count_tiles(spec.shape, flat=False)

    def encode(self, tensor: Tensor) -> Encoded:
        header = FrameHeader(self.name, tensor.dtype, tuple(tensor.shape), packing=self.packing)
        target, plan = plan_tensor(tensor, flat=False)
        split = SPLITS[tensor.dtype]
        if tensor.is_cuda:
            return Encoded(header, *gpu_kernels("frames").encode_lossless(target, plan, self.packing))
        coded = tiles.encode_tiles(
            target, plan, split.layout(), PACKERS[self.packing], lambda bits, _: to_columns(bits, split)
        )
        return Encoded(header, *coded)

    @classmethod
    def check_size(cls, frame: Frame) -> None:
        tiles.tile_directory(frame, flat=False)

    @classmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        split = SPLITS[frame.header.dtype]
        one_of("packing", frame.header.packing, PACKERS, corrupt=True)
        if out.is_cuda:
            gpu_kernels("frames").decode(frame, out)
            return
        packer = PACKERS[frame.header.packing]
        tiles.decode_tiles(frame, False, split.layout(), packer, lambda decoded: to_bits(decoded, split), out)
