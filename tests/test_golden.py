"""Frames of the format's first version decode for good, on every machine, to the same bits; and the encoder still
writes them byte for byte. Made by tests/golden/make.py; a missing one fails."""

import itertools
import json

import pytest
import torch

import kvferry
from contract.cases import DEVICES, FLOATS, FP8, MODES, PACKINGS, bits_of
from golden.make import DIGESTS, FOLDER, cases, digest
from kvferry import Transform
from kvferry.format.frame import read_frame

CASES = cases()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_golden_frame(name: str, device: str) -> None:
    path = FOLDER / f"{name}.kvf"
    assert path.is_file(), f"the golden frame {path.name} is missing: restore it (it is part of the format)"
    frame = path.read_bytes()
    codec, tensor = CASES[name]
    back = kvferry.decompress(frame, device=device).cpu()
    assert digest(back) == json.loads(DIGESTS.read_text())[name]
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    if codec.exact:
        assert torch.equal(bits_of(back), bits_of(tensor))
    info = kvferry.inspect(frame)
    assert info.codec == codec.name
    if not codec.exact:
        finite = tensor.isfinite()
        assert not ((back.double() - tensor.double()).abs()[finite] > info.bound_used).any()
    assert kvferry.compress(tensor.to(device), codec) == frame, "the encoder's bytes have changed"


def test_nothing_else_is_there() -> None:
    """A frame whose case was removed would no longer be read by any test."""
    assert {path.stem for path in FOLDER.glob("*.kvf")} == set(CASES)
    assert set(json.loads(DIGESTS.read_text())) == set(CASES)
    assert sum(path.stat().st_size for path in FOLDER.glob("*.kvf")) < 600_000


def test_every_codec_mode_packing_and_dtype_is_there() -> None:
    infos = [kvferry.inspect((FOLDER / f"{name}.kvf").read_bytes()) for name in CASES]
    assert set(kvferry.codecs()) <= {info.codec for info in infos}, "a codec comes with golden frames"
    seen = {(info.codec, info.mode, info.packing, info.dtype) for info in infos}
    expected = {("raw", "none", "none", dtype) for dtype in FLOATS + FP8}
    expected |= {("lossless", "none", packing, dtype) for packing, dtype in itertools.product(PACKINGS, FLOATS + FP8)}
    expected |= {("transform", "none", *case) for case in itertools.product(PACKINGS, Transform.dtypes)}
    expected |= {("bounded", *case) for case in itertools.product(MODES, PACKINGS, FLOATS)}
    assert expected <= seen
    assert {"none", "tensor", "tile", "channel"} == {info.relative_to for info in infos}


def test_most_golden_tiles_are_coded() -> None:
    """Frames of raw tiles would say nothing about the packers."""
    for name, (codec, tensor) in CASES.items():
        if codec.name == "raw" or tensor.numel() < 1000:
            continue
        frame = (FOLDER / f"{name}.kvf").read_bytes()
        if codec.name == "transform":
            frame = coefficients_of(frame)
        info = kvferry.inspect(frame)
        header_bytes = int.from_bytes(frame[6:8], "little")
        first = frame[header_bytes + (4 * info.num_tiles + 7) // 8 * 8]
        assert first == 1, f"the first tile of {name} is stored raw"


def coefficients_of(frame: bytes) -> bytes:
    """The frame within a transform frame."""
    payload = read_frame(frame).payload
    blocks, num_bytes = (int.from_bytes(payload[at : at + 4], "little") for at in (0, 4))
    return bytes(payload[(8 + 4 * blocks + num_bytes + 7) // 8 * 8 :])


def test_golden_profiles_are_the_same() -> None:
    """Frames name their profile by its digest: those of the frames here can be made again."""
    for name, (codec, _) in CASES.items():
        if isinstance(codec, Transform):
            params = read_frame((FOLDER / f"{name}.kvf").read_bytes()).header.params
            assert params[-16:].hex() == codec.profile.digest
