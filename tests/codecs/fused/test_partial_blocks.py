"""Tiles whose last group of tokens is of any length: a GPU's frames are the reference's.

The encoder takes four tokens at a time, and once counted those behind the last: a word too many then fell on the next
channel's.
"""

import pytest
import torch

import kvferry
from contract.cases import HAS_CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]


@pytest.mark.parametrize("packing", ["bitpack", "ans"])
@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_length(dtype: torch.dtype, mode: str, packing: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codec = kvferry.Bounded(0.5, relative=False, mode=mode, packing=packing)
    for tokens in range(1, 70):
        for channels, scale in ((24, 20.0), (72, 3.0), (128, 40.0)):
            values = (torch.randn(tokens, channels, generator=generator) * scale).to(dtype)
            frame = kvferry.compress(values.cuda(), codec)
            assert frame == kvferry.compress(values, codec), (tokens, channels)
            assert float((kvferry.decompress(frame).double() - values.double()).abs().max()) <= 0.5
