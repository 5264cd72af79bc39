"""The way from tensor to frame and back through the GPU kernels, taken on the CPU: `bitpack` runs in Triton's
interpreter."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

import kvferry
from kvferry.codecs import fused
from kvferry.codecs.tiling import plan_tensor
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, read_frame, write_frame

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the contract tests compare the compiled kernels")

CODECS = [
    kvferry.Bounded(0.02, relative_to="tensor", packing="bitpack"),
    kvferry.Bounded(0.02, relative_to="channel", mode="plain", packing="bitpack"),
    kvferry.Bounded(0.1, relative=False, mode="outlier", grouping="flat", packing="bitpack"),
]


@pytest.fixture
def tensor() -> torch.Tensor:
    return (torch.randn(2, 70, 24, generator=torch.Generator().manual_seed(3)) * 2 + 1).to(torch.bfloat16)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.mode)
def test_bounded(codec: kvferry.Bounded, tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SLAB_TILES", 3)  # the last slab is a short one
    expected = kvferry.compress(tensor, codec)
    target, plan = plan_tensor(tensor, codec.flat)
    header, sizes, payload = fused.encode_bounded(target, plan, codec, codec._header)
    assert write_frame(header, sizes, payload.numpy().data) == expected
    out = torch.full_like(tensor, torch.nan)
    fused.decode_bounded(read_frame(expected), out)
    assert torch.equal(out, kvferry.decompress(expected))


def test_lossless(tensor: torch.Tensor) -> None:
    frame = read_frame(kvferry.compress(tensor, kvferry.Lossless("bitpack")))
    target, plan = plan_tensor(tensor, flat=False)
    sizes, payload = fused.encode_lossless(target, plan, "bitpack")
    assert sizes.tolist() == frame.sizes.tolist()
    assert payload.numpy().tobytes() == bytes(frame.payload)
    out = torch.full_like(tensor, torch.nan)
    fused.decode_lossless(frame, out)
    assert torch.equal(out, tensor)


def test_a_tile_that_contradicts_itself_is_named(tensor: torch.Tensor) -> None:
    frame = read_frame(kvferry.compress(tensor, kvferry.Lossless("bitpack")))
    payload = bytearray(frame.payload)
    payload[int(frame.sizes[0]) + 1] = 9  # the second tile's base code
    with pytest.raises(CorruptFrame, match="tile 1"):
        fused.decode_lossless(Frame(frame.header, frame.sizes, memoryview(bytes(payload))), torch.empty_like(tensor))
