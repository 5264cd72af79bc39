"""What the public functions refuse, in words that name the value and the remedy, and what `inspect` tells."""

import math

import numpy as np
import pytest
import torch

import kvferry
from contract.cases import gaussian
from kvferry import BlockSpec, Bounded, Lossless, Profile, ProfileMismatch, Raw, Rope, Transform
from kvferry.codecs import transform


@pytest.mark.parametrize("bound", [0, 0.0, -0.0, -1e-3, -1, math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_error_bounds_out_of_range(bound: float) -> None:
    with pytest.raises(ValueError, match=r"error_bound=.*finite number above 0.*kvferry\.Lossless\(\)"):
        Bounded(bound)


@pytest.mark.parametrize("bound", [True, False, "0.1", None, [0.1], 1j, torch.tensor(0.1)])
def test_error_bounds_that_are_no_numbers(bound: object) -> None:
    with pytest.raises(TypeError, match=f"is a {type(bound).__name__}; give a float"):
        Bounded(bound)


@pytest.mark.parametrize("bound", [1, 5e-324, 1e308, np.float64(0.5)])
def test_error_bounds_that_are_numbers(bound: float) -> None:
    assert Bounded(bound).error_bound == bound


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mode", ("fixed", "plain", "outlier")),
        ("grouping", ("token", "flat")),
        ("packing", ("ans", "bitpack")),
        ("relative_to", ("tensor", "tile", "channel")),
    ],
)
@pytest.mark.parametrize("value", ["zip", "", "FIXED", None, 3, ["fixed"]])
def test_unknown_choices(name: str, options: tuple[str, ...], value: object) -> None:
    """The message names the parameter, what was given, and every choice."""
    with pytest.raises(ValueError, match=f"{name}=.*unknown; choose one of") as caught:
        Bounded(**{name: value})
    assert repr(value) in str(caught.value)
    assert all(repr(option) in str(caught.value) for option in options)
    if name == "packing":
        with pytest.raises(ValueError, match=r"packing=.*'ans', 'bitpack'"):
            Lossless(value)


def test_bounded_takes_none_of_the_header_s_own_words() -> None:
    """ "none" stands in frames for absolute bounds and other codecs' fields: not a parameter."""
    for name in ("mode", "packing", "relative_to"):
        with pytest.raises(ValueError, match="unknown"):
            Bounded(**{name: "none"})


def test_codecs_are_values() -> None:
    assert Bounded(0.5) == Bounded(0.5) != Bounded(0.25)
    assert len({Lossless(), Lossless("ans"), Lossless("bitpack"), Raw(), Raw()}) == 3
    with pytest.raises(AttributeError):
        Bounded(0.5).error_bound = 1.0


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("codec", [Raw(), Lossless(), Bounded()], ids=lambda codec: codec.name)
class TestTensors:
    @pytest.mark.parametrize("dtype", [*INTEGERS, torch.complex64, torch.float64], ids=str)
    def test_other_dtypes(self, codec: kvferry.Codec, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(TypeError, match=f"{codec.name} takes bfloat16, float16, float32.*not {name}; convert it"):
            kvferry.compress(torch.zeros(2, 3).to(dtype), codec)

    def test_requires_grad(self, codec: kvferry.Codec) -> None:
        for tensor in (torch.zeros(2, 3, requires_grad=True), torch.nn.Parameter(torch.zeros(2, 3))):
            with pytest.raises(ValueError, match=r"requires grad.*\.detach\(\)"):
                kvferry.compress(tensor, codec)
            assert kvferry.compress(tensor.detach(), codec)

    def test_sparse(self, codec: kvferry.Codec) -> None:
        for tensor in (torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr()):
            with pytest.raises(TypeError, match=r"layout torch\.sparse_\w+ .*\.to_dense\(\)"):
                kvferry.compress(tensor, codec)

    def test_nested(self, codec: kvferry.Codec) -> None:
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        with pytest.raises(TypeError, match="cannot be compressed"):
            kvferry.compress(tensor, codec)

    def test_meta(self, codec: kvferry.Codec) -> None:
        with pytest.raises(TypeError, match="on meta cannot be compressed; move it to the CPU or a CUDA device"):
            kvferry.compress(torch.zeros(2, 3, device="meta"), codec)

    @pytest.mark.parametrize("value", [None, [1.0, 2.0], np.zeros(3, dtype=np.float32), 1.5])
    def test_what_is_no_tensor(self, codec: kvferry.Codec, value: object) -> None:
        with pytest.raises(TypeError, match=rf"expected a torch\.Tensor, got {type(value).__name__}"):
            kvferry.compress(value, codec)

    def test_too_many_dimensions(self, codec: kvferry.Codec) -> None:
        with pytest.raises(ValueError, match="17 dimensions; a frame holds at most 16: reshape"):
            kvferry.compress(torch.zeros((1,) * 17), codec)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_has_no_bounded_codec(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    with pytest.raises(TypeError, match=r"bounded takes .*not float8.*use another codec"):
        kvferry.compress(tensor, Bounded())
    assert kvferry.decompress(kvferry.compress(tensor, Lossless())).dtype == dtype


@pytest.mark.parametrize("codec", [None, "lossless", Lossless, Bounded, 0.1, object()])
def test_what_is_no_codec(codec: object) -> None:
    wanted = rf"codec is a {type(codec).__name__}; pass a codec object.*kvferry\.Lossless\(\)"
    with pytest.raises(TypeError, match=wanted):
        kvferry.compress(torch.zeros(3), codec)


def test_out_of_another_shape_or_dtype() -> None:
    frame = kvferry.compress(gaussian((4, 6), torch.bfloat16), Lossless())
    for shape, dtype in [((6, 4), "bfloat16"), ((24,), "bfloat16"), ((1, 4, 6), "bfloat16"), ((4, 6), "float16")]:
        out = torch.zeros(shape, dtype=getattr(torch, dtype))
        with pytest.raises(ValueError, match=rf"out is .*{dtype}.*\(4, 6\).*bfloat16: pass a matching tensor"):
            kvferry.decompress(frame, out=out)
        assert not out.any()


def test_a_frame_whose_profile_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of its own, which the docstring names; what the frame says of itself can still be read."""
    profile = Profile.hadamard(1, 2, 8, Rope.none(8), [(0.5, 0.25)])
    frame = kvferry.compress(gaussian((2, 9, 8), torch.bfloat16), Transform(profile, 0, "k"))
    monkeypatch.setattr(transform, "_PROFILES", {})
    monkeypatch.setattr(transform, "_KEPT", {})
    out = torch.full((2, 9, 8), 7, dtype=torch.bfloat16)
    with pytest.raises(ProfileMismatch, match=r"register_profile"):
        kvferry.decompress(frame, out=out)
    assert (out == 7).all()
    assert kvferry.inspect(frame).codec == "transform"
    assert "`ProfileMismatch`" in (kvferry.decompress.__doc__ or "")


def test_out_is_what_is_returned() -> None:
    tensor = gaussian((4, 6), torch.bfloat16)
    out = torch.zeros_like(tensor)
    assert kvferry.decompress(kvferry.compress(tensor, Lossless()), out=out) is out
    assert out.equal(tensor)


def test_results_share_no_memory() -> None:
    """Neither with the frame nor with each other."""
    frame = bytearray(kvferry.compress(torch.ones(100, 8), Raw()))
    first, second = kvferry.decompress(frame), kvferry.decompress(frame)
    first.zero_()
    frame[100] ^= 255
    assert second.eq(1).all()


@pytest.mark.parametrize("relative_to", ["tensor", "tile", "channel"])
@pytest.mark.parametrize("relative", [False, True])
def test_inspect(relative: bool, relative_to: str) -> None:
    tensor = gaussian((3, 70, 130), torch.float16)
    codec = Bounded(0.03, relative, relative_to, "outlier", "flat", "bitpack")
    frame = kvferry.compress(tensor, codec)
    info = kvferry.inspect(frame)
    assert info.codec == "bounded"
    assert info.packing == "bitpack"
    assert info.mode == "outlier"
    assert info.grouping == "flat"
    assert info.relative_to == (relative_to if relative else "none")
    assert info.error_bound == 0.03
    assert info.bound_used > 0
    assert info.dtype == torch.float16
    assert info.shape == (3, 70, 130)
    assert isinstance(info.shape, tuple)
    assert info.num_tiles == codec.num_tiles(BlockSpec.of(tensor)) == 5
    assert info.raw_bytes == 3 * 70 * 130 * 2
    assert info.encoded_bytes == len(frame)
    assert info.ratio == info.raw_bytes / len(frame) > 1.5
    assert info.bits_per_value == 8 * len(frame) / (3 * 70 * 130)


def test_inspect_of_exact_codecs() -> None:
    for codec, packing in ((Raw(), "none"), (Lossless(), "ans"), (Lossless("bitpack"), "bitpack")):
        info = kvferry.inspect(kvferry.compress(torch.ones(9, 4), codec))
        assert (info.codec, info.packing, info.mode, info.grouping) == (codec.name, packing, "none", "token")
        assert (info.relative_to, info.error_bound, info.bound_used) == ("none", 0, 0)
        assert info.num_tiles == codec.num_tiles(BlockSpec((9, 4), torch.float32))


def test_inspect_of_no_values() -> None:
    info = kvferry.inspect(kvferry.compress(torch.zeros(0, 4), Lossless()))
    assert info.raw_bytes == 0
    assert info.ratio == 0
    assert info.bits_per_value == math.inf


def test_names() -> None:
    """What `import kvferry` offers is listed, and is there."""
    for name in kvferry.__all__:
        assert hasattr(kvferry, name)
    assert {"Bounded", "Lossless", "Raw", "compress", "decompress", "inspect", "codecs"} <= set(kvferry.__all__)
    for error in (kvferry.CorruptFrame, kvferry.UnsupportedVersion, kvferry.BoundTooTight, kvferry.OutOfHostMemory):
        assert issubclass(error, kvferry.KVFerryError)
        assert not issubclass(error, (ValueError, TypeError))
