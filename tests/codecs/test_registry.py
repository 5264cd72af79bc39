"""Codecs of other packages, found by entry point: they work throughout, and broken ones do no harm."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import kvferry
from kvferry import BlockSpec, Codec, CorruptFrame, UnsupportedVersion
from kvferry import codecs as registered
from kvferry.codecs.base import Encoded
from kvferry.format.frame import Frame, FrameHeader


@dataclass(frozen=True)
class Negated(Codec):
    """The values negated, behind a parameter that the frame carries."""

    tag: bytes = b"tag"

    name: ClassVar[str] = "x-negated"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    exact: ClassVar[bool] = True

    def num_tiles(self, spec: BlockSpec) -> int:
        return 0

    def encode(self, tensor: Tensor) -> Encoded:
        header = FrameHeader(self.name, tensor.dtype, tuple(tensor.shape), params=self.tag)
        return Encoded(header, np.zeros(0, dtype=np.int64), (-tensor).contiguous().reshape(-1).view(torch.uint8))

    @classmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        if frame.header.params != b"tag":
            raise CorruptFrame("no tag")
        out.copy_(-torch.frombuffer(bytearray(frame.payload), dtype=torch.float32).view(out.shape))


class TakesTheName(Negated):
    name: ClassVar[str] = "lossless"


class NoCodec:
    name = "x-none"


def raises() -> None:
    raise RuntimeError("this plugin is broken")


PLUGINS: dict[str, str] = {
    "missing": "kvferry_no_such_module:Codec",
    "no-attribute": f"{__name__}:Absent",
    "no-codec": f"{__name__}:NoCodec",
    "no-class": f"{__name__}:raises",
    "clash": f"{__name__}:TakesTheName",
    "negated": f"{__name__}:Negated",
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make `codecs()` find these plugins (and nothing that happens to be installed)."""

    def make(*names: str) -> None:
        found = [EntryPoint(name, PLUGINS[name], "kvferry.codecs") for name in names]

        def entry_points(*, group: str) -> list[EntryPoint]:
            assert group == "kvferry.codecs"
            return found

        # By its module: the attribute `kvferry.codecs` is the function.
        monkeypatch.setattr(import_module("kvferry.codecs"), "entry_points", entry_points)
        registered.cache_clear()

    yield make
    monkeypatch.undo()
    registered.cache_clear()


def test_built_in_codecs(install: Callable[..., None]) -> None:
    install()
    built_in = (kvferry.Raw, kvferry.Lossless, kvferry.Bounded, kvferry.Transform)
    assert kvferry.codecs() == {codec.name: codec for codec in built_in}


def test_third_party_codec(install: Callable[..., None]) -> None:
    install("negated")
    assert kvferry.codecs()["x-negated"] is Negated
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    frame = kvferry.compress(tensor, Negated())
    assert kvferry.inspect(frame).codec == "x-negated"
    assert kvferry.decompress(frame).equal(tensor)
    with pytest.raises(CorruptFrame, match="no tag"):
        kvferry.decompress(kvferry.compress(tensor, Negated(b"other")))
    with pytest.raises(TypeError, match="x-negated takes float32, not bfloat16"):
        kvferry.compress(tensor.bfloat16(), Negated())


def test_its_frames_need_it(install: Callable[..., None]) -> None:
    install("negated")
    frame = kvferry.compress(torch.ones(3), Negated())
    install()
    with pytest.raises(UnsupportedVersion, match=r"'x-negated'.*bounded, lossless, raw, transform"):
        kvferry.decompress(frame)
    assert kvferry.inspect(frame).shape == (3,)


def test_its_claims_are_checked_before_memory_is_taken(install: Callable[..., None]) -> None:
    """The general limit holds for codecs that set none of their own."""
    from kvferry.format.frame import write_frame

    install("negated")
    frame = write_frame(FrameHeader("x-negated", torch.float32, (1 << 40,)), np.zeros(0, dtype=np.int64), bytes(64))
    with pytest.raises(CorruptFrame, match="cannot come from 64 bytes"):
        kvferry.decompress(frame)


@pytest.mark.parametrize("name", ["missing", "no-attribute", "no-codec", "no-class", "clash"])
def test_broken_plugins_are_left_out_and_logged(
    name: str, install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install(name, "negated")
    with caplog.at_level(logging.WARNING, logger="kvferry.codecs"):
        found = kvferry.codecs()
    assert set(found) == {"raw", "lossless", "bounded", "transform", "x-negated"}
    assert found["lossless"] is kvferry.Lossless
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"codec {name} left out" in caplog.text
