"""Frames of the transform codec: the guarantee on every vector, what is stored as it is, ratios, and frames that are
not sound."""

import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvferry
from contract.cases import bits_of, gaussian
from contract.profiles import assert_within_profile, group_vectors, make_profile, stored_blocks
from kvferry import (
    BlockSpec,
    BoundTooTight,
    CorruptFrame,
    Lossless,
    Profile,
    ProfileMismatch,
    Rope,
    Transform,
    UnsupportedVersion,
)
from kvferry.codecs import transform
from kvferry.codecs.fitting import SCALES
from kvferry.format.frame import Frame, read_frame, write_frame

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("noise", "outlier", "wide", "constant", "grid", "at the mean", "alternating")


def make(kind: str, shape: tuple[int, int, int], scale: float, mean: Tensor, seed: int) -> Tensor:
    """Values float32 `[heads, tokens, head_dim]` of the `kind`, of about `scale` around `mean` `[heads, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if kind == "outlier":
        noise[..., seed % shape[2]] *= 1000
    elif kind == "wide":
        noise = noise.sign() * torch.exp2(torch.randint(-20, 20, shape, generator=generator).float())
    elif kind == "constant":
        noise = noise[:, :1, :1].expand(shape)
    elif kind == "grid":
        noise = (noise * 4).round() / 2 + 0.5
    elif kind == "at the mean":
        noise = noise * 1e-3
    elif kind == "alternating":
        noise = 1 - 2 * (torch.arange(math.prod(shape)) % 2).float().view(shape)
    return noise * scale + mean[:, None]


def checked(tensor: Tensor, codec: Transform) -> tuple[Tensor, kvferry.FrameInfo]:
    """(each vector's error over its bound, the frame's description) once coded and back."""
    frame = kvferry.compress(tensor, codec)
    assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor))
    info = kvferry.inspect(frame)
    back = kvferry.decompress(frame)
    return assert_within_profile(tensor, back, codec, info.error_bound, info.bound_used), info


@settings(max_examples=400)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    head_dim=st.sampled_from([1, 2, 7, 16, 33]),
    tokens=st.sampled_from([1, 5, 65]),
    rope=st.sampled_from(["halves", "interleaved", "partial", "none"]),
    log_step=st.integers(-18, 12),
    scale=st.floats(-14, 14),
    mean=st.sampled_from([0.0, 1.0, 500.0]),
    dtype=st.sampled_from(DTYPES),
    error_bound=st.sampled_from([1e-6, 0.1, 1.0, 3.0, 1000.0]),
    packing=st.sampled_from(["ans", "bitpack"]),
    side=st.sampled_from("kv"),
    first_position=st.sampled_from([0, 3, 100_000]),
    seed=st.integers(0, 2**16),
)
def test_the_guarantee(
    kind: str, heads: tuple[int, int], head_dim: int, tokens: int, rope: str, log_step: int, scale: float, mean: float,
    dtype: torch.dtype, error_bound: float, packing: str, side: str, first_position: int, seed: int,
) -> None:  # fmt: skip
    profile = make_profile(*(heads[0], head_dim, heads[1]), rope, 2.0**log_step, mean=mean)
    codec = Transform(profile, seed % 2, side, error_bound, None, first_position, packing)
    means = codec.part.mean.reshape(heads[0], head_dim)
    x = make(kind, (heads[0], tokens, head_dim), 2.0**scale, means, seed)
    most = torch.finfo(dtype).max
    checked(x.clamp(-most, most).to(dtype), codec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_step", [-39, -24, -23, 40, 99])
def test_the_guarantee_at_the_ends(dtype: torch.dtype, log_step: int) -> None:
    """Steps as small as float16's denormals and smaller, values as large as the dtype's largest."""
    profile = make_profile(2, 2, 1, "none", 2.0**log_step, mean=2.0 ** min(0, log_step))
    generator = torch.Generator().manual_seed(4)
    most = torch.finfo(dtype).max
    for log_scale in (-45, -25, -23, -16, 0, 15, 90, 127):
        x = torch.randn(2, 200, 2, generator=generator).double() * 2.0**log_scale
        x[0, 7:9] = most
        for side in "kv":
            checked(x.clamp(-most, most).to(dtype), Transform(profile, 0, side))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_made_use_of(dtype: torch.dtype) -> None:
    """Bounds that no error comes near would promise nothing: of vectors of one value they are reached."""
    share, info = checked(gaussian((4, 300, 1), dtype), Transform(make_profile(4, 1, 1, "none"), 0, "v"))
    assert share.max() > 0.95
    assert info.ratio > 1.2
    wide = gaussian((2, 300, 64), dtype)
    for error_bound in (0.25, 1.0, 4.0):
        share, _ = checked(wide, Transform(make_profile(2, 64, 1), 0, "k", error_bound))
        assert 0.3 < share.mean() < 0.9


def test_bounds_add_up() -> None:
    profile = make_profile(4, 16, 2, step=0.5)
    codec = Transform(profile, 0, "k")
    assert codec.l2_bound == pytest.approx(0.5 * 0.5 * math.sqrt(32), rel=2e-3)
    assert replace(codec, error_bound=0.5).l2_bound == pytest.approx(codec.l2_bound / 2, rel=2e-3)
    assert replace(codec, ratio=4.0, error_bound=0.5).l2_bound == codec.l2_bound
    assert replace(codec, side="v").l2_bound == pytest.approx(codec.l2_bound / 2, rel=1e-3)
    assert 2**-11 < codec.relative_error < 2**-9
    assert codec.relative_error < Transform(make_profile(4, 64, 4), 0, "k").relative_error < 0.005


class TestStoredAsTheyAre:
    """Blocks of 64 tokens of a group."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group_heads", [1, 2, 4])
    def test_not_finite(self, dtype: torch.dtype, group_heads: int) -> None:
        """Bit for bit, payloads, signed zeros and denormals of the block included; others are coded as without."""
        plain = gaussian((3, 4, 150, 8), dtype)
        tensor = plain.clone()
        words = bits_of(tensor)  # of the same memory
        tensor[0, 1, 3, 5] = torch.inf
        words[2, 3, 149, 7] = 0x7F81 if dtype == torch.bfloat16 else 0x7C01
        words[2, 3, 130, :3] = torch.tensor([-(1 << 15), 1, 3])
        assert tensor[2, 3, 149, 7].isnan()
        codec = Transform(make_profile(4, 8, group_heads), 0, "k")
        share, info = checked(tensor, codec)
        kept = stored_blocks(tensor, group_heads)
        assert int(kept.sum()) == group_heads * 8 * (64 + 22)
        assert not share[group_vectors(kept, group_heads).any(-1)].any()
        back, without = (kvferry.decompress(kvferry.compress(x, codec)) for x in (tensor, plain))
        assert torch.equal(bits_of(back)[~kept], bits_of(without)[~kept])
        assert info.ratio > 1.2
        assert math.isfinite(info.bound_used)

    def test_nothing_but(self) -> None:
        tensor = torch.full((2, 70, 8), torch.nan, dtype=torch.bfloat16)
        codec = Transform(make_profile(2, 8), 0, "k")
        frame = kvferry.compress(tensor, codec)
        assert torch.equal(bits_of(kvferry.decompress(frame)), bits_of(tensor))
        assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor))

    def test_more_than_a_frame_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their bytes are counted in 32 bits."""
        assert struct.pack("<I", transform.MOST_KEPT_BYTES) == b"\xff" * 4
        codec = Transform(make_profile(2, 8, 1), 0, "v")
        tensor = gaussian((2, 70, 8), torch.bfloat16)
        tensor[1, 0, 0] = tensor[1, 69, 0] = torch.nan
        monkeypatch.setattr(transform, "MOST_KEPT_BYTES", 70 * 8 * 2)
        assert kvferry.decompress(kvferry.compress(tensor, codec))[1, 69, 0].isnan()
        monkeypatch.setattr(transform, "MOST_KEPT_BYTES", 70 * 8 * 2 - 1)
        message = r"2 blocks .* take 1120 bytes .* at most 1119: encode fewer tokens .* kvferry\.Lossless\(\)"
        with pytest.raises(ValueError, match=message):
            kvferry.compress(tensor, codec)

    def test_too_far_from_the_mean(self) -> None:
        """Beyond what a float16 coefficient says at this step."""
        tensor = gaussian((2, 150, 8), torch.bfloat16)
        tensor[1, 70, 3] = 1e6
        back = kvferry.decompress(kvferry.compress(tensor, Transform(make_profile(2, 8, step=0.5), 0, "k")))
        assert back[1, 64:128].equal(tensor[1, 64:128])
        assert not back[1, :64].equal(tensor[1, :64])
        assert not back[0, 64:128].equal(tensor[0, 64:128])


class TestRatio:
    @pytest.mark.parametrize("ratio", [1.0, 3.0, 8.0])
    @pytest.mark.parametrize("packing", ["ans", "bitpack"])
    def test_reached_and_no_coarser_than_needed(self, ratio: float, packing: str) -> None:
        tensor = gaussian((2, 200, 64), torch.bfloat16)
        codec = Transform(make_profile(2, 64), 0, "v", ratio=ratio, packing=packing)
        _, info = checked(tensor, codec)
        assert info.ratio >= ratio
        at = SCALES.index(info.error_bound)
        assert len(kvferry.compress(tensor, replace(codec, ratio=None, error_bound=SCALES[at]))) == info.encoded_bytes
        if at:
            finer = kvferry.compress(tensor, replace(codec, ratio=None, error_bound=SCALES[at - 1]))
            assert tensor.nbytes / len(finer) < ratio

    def test_what_is_stored_counts(self) -> None:
        tensor = gaussian((2, 400, 64), torch.bfloat16)
        codec = Transform(make_profile(2, 64), 0, "v", ratio=4.0)
        _, without = checked(tensor, codec)
        tensor[0, 100, 3] = torch.nan
        _, info = checked(tensor, codec)
        assert info.ratio >= 4
        assert info.error_bound > without.error_bound

    def test_out_of_reach(self) -> None:
        codec = Transform(make_profile(2, 16), 0, "v", ratio=40.0)
        with pytest.raises(BoundTooTight, match=r"ratio=40.0 is out of reach: at 256 times .* still take \d+; ask for"):
            kvferry.compress(gaussian((2, 100, 16), torch.bfloat16), codec)
        with pytest.raises(BoundTooTight):
            kvferry.compress(torch.full((2, 100, 16), torch.nan, dtype=torch.bfloat16), replace(codec, ratio=1.5))


class TestShapes:
    def test_first_position(self) -> None:
        """A sequence may be cut between blocks: each part is coded as it was in the whole."""
        tensor = gaussian((2, 200, 16), torch.bfloat16)
        codec = Transform(make_profile(2, 16), 1, "k")
        whole = kvferry.decompress(kvferry.compress(tensor, codec))
        part = kvferry.compress(tensor[:, 64:], replace(codec, first_position=64))
        assert kvferry.decompress(part).equal(whole[:, 64:])
        assert not kvferry.decompress(kvferry.compress(tensor[:, 64:], codec)).equal(whole[:, 64:])

    def test_leading_dimensions(self) -> None:
        """Each layer's heads of a batch as if alone."""
        tensor = gaussian((2, 3, 4, 70, 8), torch.float16)
        codec = Transform(make_profile(4, 8, 2), 0, "k")
        back = kvferry.decompress(kvferry.compress(tensor, codec))
        for i in range(2):
            for j in range(3):
                assert back[i, j].equal(kvferry.decompress(kvferry.compress(tensor[i, j], codec)))

    def test_strides(self) -> None:
        memory = gaussian((70, 4, 16), torch.bfloat16)
        codec = Transform(make_profile(4, 8, 2), 0, "k")
        views = memory[..., ::2], memory[..., 4:12], memory[:1, :, :8].expand(9, -1, -1)
        for view in (view.transpose(0, 1) for view in views):
            assert not view.is_contiguous()
            assert kvferry.compress(view, codec) == kvferry.compress(view.contiguous(), codec)

    @pytest.mark.parametrize("ratio", [None, 4.0])
    @pytest.mark.parametrize("shape", [(4, 0, 8), (0, 4, 5, 8), (2, 0, 4, 0, 8), (0, 4, 1 << 16, 8)])
    def test_without_values(self, shape: tuple[int, ...], ratio: float | None) -> None:
        codec = Transform(make_profile(4, 8), 0, "k", ratio=ratio)
        frame = kvferry.compress(torch.empty(shape, dtype=torch.bfloat16), codec)
        assert kvferry.decompress(frame).shape == shape
        assert kvferry.inspect(frame).bound_used == 0

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 9, 8), "heads=4, this one has 3"),
            ((4, 9, 6), "head_dim=8, this one has 6"),
            ((9, 8), "has no heads"),
            ((), "has no heads"),
        ],
    )
    def test_of_another_model(self, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ProfileMismatch, match=message):
            kvferry.compress(torch.zeros(shape, dtype=torch.bfloat16), Transform(make_profile(4, 8), 0, "k"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match="transform takes bfloat16, float16"):
            kvferry.compress(torch.zeros(4, 9, 8).to(dtype), Transform(make_profile(4, 8), 0, "k"))


class TestParameters:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"profile": "path"}, TypeError, "Profile.load"),
            ({"error_bound": 0.0}, ValueError, "error_bound=0.0"),
            ({"error_bound": 5e-324}, ValueError, "error_bound=5e-324"),
            ({"error_bound": math.nan}, ValueError, "error_bound=nan"),
            ({"error_bound": math.inf}, ValueError, "error_bound=inf"),
            ({"ratio": 0.5}, ValueError, "ratio=0.5"),
            ({"ratio": math.inf}, ValueError, "ratio=inf"),
            ({"ratio": math.nan}, ValueError, "ratio=nan"),
            ({"layer": None}, ValueError, "layer=None and side='k'"),
            ({"side": None}, ValueError, "layer=0 and side=None"),
            ({"side": "q"}, ValueError, "'q'"),
            ({"layer": 2}, ProfileMismatch, "layer 2 is not in a profile of 2 layers"),
            ({"layer": -1}, ProfileMismatch, "layer -1"),
            ({"first_position": -1}, ValueError, "first_position=-1"),
            ({"first_position": 1.5}, ValueError, "first_position=1.5"),
            ({"first_position": 1 << 48}, ValueError, "first_position=281474976710656"),
            ({"packing": "none"}, ValueError, "'none'"),
        ],
    )
    def test_what_it_is_not(self, changes: dict[str, object], error: type[Exception], message: str) -> None:
        given = {"profile": make_profile(2, 8), "layer": 0, "side": "k"}
        with pytest.raises(error, match=message):
            Transform(**(given | changes))  # type: ignore[arg-type]

    def test_a_choice(self) -> None:
        """Called with layer and side it is the codec for them; alone it encodes nothing."""
        choice = Transform(make_profile(2, 8), error_bound=0.5, packing="bitpack")
        tensor = gaussian((1, 2, 9, 8), torch.bfloat16)
        assert choice(1, "v", tensor) == Transform(choice.profile, 1, "v", 0.5, packing="bitpack")
        with pytest.raises(ValueError, match="for no layer"):
            kvferry.compress(tensor, choice)
        with pytest.raises(ProfileMismatch, match="layer 2"):
            choice(2, "k", tensor)

    def test_the_frame_says_them(self) -> None:
        codec = Transform(make_profile(2, 8), 1, "v", 0.25, first_position=77, packing="bitpack")
        frame = kvferry.compress(gaussian((2, 9, 8), torch.float16), codec)
        info = kvferry.inspect(frame)
        assert (info.codec, info.packing, info.error_bound, info.num_tiles) == ("transform", "bitpack", 0.25, 0)
        # docs/format.md, "transform": version, side, reserved, layer, first position, digest.
        params = struct.unpack("<HBBIQ16s", read_frame(frame).header.params)
        assert params == (1, 1, 0, 1, 77, bytes.fromhex(codec.profile.digest))


@pytest.fixture
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has loaded none."""
    monkeypatch.setattr(transform, "_PROFILES", {})
    monkeypatch.setattr(transform, "_KEPT", {})


@pytest.mark.usefixtures("no_profiles")
def test_decoding_needs_the_profile(tmp_path: Path) -> None:
    profile = Profile.hadamard(1, 2, 8, Rope.none(8), [(0.5, 0.25)])
    tensor = gaussian((2, 9, 8), torch.bfloat16)
    frame = kvferry.compress(tensor, Transform(profile, 0, "k"))
    back = kvferry.decompress(frame)
    profile.save(tmp_path / "profile")
    transform._PROFILES.clear()
    out = torch.full((2, 9, 8), 7, dtype=torch.bfloat16)
    with pytest.raises(ProfileMismatch, match=rf"{profile.digest}.*kvferry.Profile.load.*kvferry.register_profile"):
        kvferry.decompress(frame, out=out)
    assert (out == 7).all()
    # Another one does not help.
    kvferry.register_profile(profile.with_steps([(0.25, 0.25)]))
    with pytest.raises(ProfileMismatch):
        kvferry.decompress(frame)
    kvferry.register_profile(Profile.load(tmp_path / "profile"))
    assert kvferry.decompress(frame).equal(back)


def sealed(body: bytes | bytearray) -> bytes:
    """`body` with a checksum that is right."""
    return bytes(body) + xxhash.xxh3_64_intdigest(bytes(body)).to_bytes(8, "little")


def small_frame() -> tuple[bytes, int]:
    """A frame of one block that is coded and one that is stored, and where the coefficients' frame begins in it."""
    tensor = gaussian((2, 5, 4), torch.bfloat16)
    tensor[1, 2, 3] = torch.nan
    frame = kvferry.compress(tensor, Transform(make_profile(2, 4), 1, "k", packing="bitpack"))
    return frame, frame.index(b"KVFY", 4)


class TestUnsound:
    @staticmethod
    def refused(frame: bytes, *, may_pass: bool = False) -> bool:
        """Whether it is refused as frames are, `out` untouched; what passes is a whole result."""
        out = torch.full((2, 5, 4), 7, dtype=torch.bfloat16)
        try:
            header = kvferry.inspect(frame)
            # Another shape or dtype than `out` has would be the caller's mistake.
            fits = header.shape == out.shape and header.dtype == out.dtype
            kvferry.decompress(frame, out=out if fits else None)
        except (CorruptFrame, UnsupportedVersion, ProfileMismatch):
            assert (out == 7).all()
            return True
        assert may_pass
        assert (out == 7).all() != fits
        return False

    def test_altered_at_any_byte(self) -> None:
        frame, _ = small_frame()
        for at in range(len(frame)):
            data = bytearray(frame)
            data[at] ^= 1 << at % 8
            assert self.refused(bytes(data))

    def test_truncated_at_any_byte(self) -> None:
        frame, _ = small_frame()
        for length in range(len(frame)):
            assert self.refused(frame[:length])
        for length in range(80, len(frame) - 8):
            body = bytearray(frame[:length])
            struct.pack_into("<Q", body, 8, length + 8)
            assert self.refused(sealed(body))

    @pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
    def test_altered_at_any_byte_with_checksums_made_right(self, flip: int) -> None:
        """The frame around, and the one of the coefficients: nothing but the exceptions for it, most are noticed."""
        frame, inner = small_frame()
        refused = {True: 0, False: 0}
        for at in range(len(frame) - 8):
            data = bytearray(frame[:-8])
            data[at] ^= flip
            if inner <= at < len(data) - 8:
                data[-8:] = sealed(data[inner:-8])[-8:]
            refused[self.refused(sealed(data), may_pass=True)] += 1
        assert refused[True] > refused[False]

    @staticmethod
    def forged(frame: bytes, payload: bytes | None = None, sizes: object = None, **header: object) -> bytes:
        """`frame` written again with fields of the header changed."""
        parsed = read_frame(frame)
        new = replace(parsed.header, **header)  # type: ignore[arg-type]
        return write_frame(
            new,
            parsed.sizes if sizes is None else sizes,  # type: ignore[arg-type]
            bytes(parsed.payload) if payload is None else payload,
        )

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (slice(0, 2), 2, "parameters of version 2"),
            (slice(2, 3), 2, "side 2"),
            (slice(3, 4), 1, "not what this version writes"),
            (slice(4, 8), 2, "layer 2 of 2"),
            (slice(8, 16), 1 << 48, "first position"),
            (slice(8, 16), (1 << 64) - 1, "first position"),
        ],
    )
    def test_forged_parameters(self, place: slice, value: int, message: str) -> None:
        frame, _ = small_frame()
        params = bytearray(read_frame(frame).header.params)
        params[place] = value.to_bytes(place.stop - place.start, "little")
        with pytest.raises(CorruptFrame, match=message):
            kvferry.decompress(self.forged(frame, params=bytes(params)))

    def test_forged_headers(self) -> None:
        frame, _ = small_frame()
        parsed: Frame = read_frame(frame)
        payload = bytes(parsed.payload)
        at = payload.index(b"KVFY")
        kept, coefficients = payload[:at], payload[at:]
        values = gaussian((2, 5, 4), torch.float16)
        directory = torch.tensor([len(parsed.payload)]).numpy()
        for forged in (
            self.forged(frame, params=b""),
            self.forged(frame, params=parsed.header.params + b"\0"),
            self.forged(frame, dtype=torch.float32),
            self.forged(frame, packing="ans"),
            self.forged(frame, sizes=directory),
            self.forged(frame, shape=(2, 4, 5)),
            self.forged(frame, kept + self.forged(coefficients, dtype=torch.bfloat16)),
            self.forged(frame, kept + kvferry.compress(values, Lossless("bitpack"))),
            self.forged(frame, kept + kvferry.compress(values[:1], kvferry.Bounded(0.5, False, packing="bitpack"))),
            self.forged(frame, kept + frame),
            self.forged(frame, kept),
            self.forged(frame, b""),
            self.forged(frame, coefficients),
        ):
            with pytest.raises(CorruptFrame):
                kvferry.decompress(forged)

    def test_other_shapes_of_as_many_values(self) -> None:
        """The profile says what heads there are; two dimensions are no layer."""
        tensor = gaussian((2, 6, 4), torch.bfloat16)
        frame = kvferry.compress(tensor, Transform(make_profile(2, 4), 0, "k"))
        payload = bytes(read_frame(frame).payload)
        at = payload.index(b"KVFY")
        for shape in ((4, 3, 4), (2, 3, 8), (1, 12, 4), (12, 4), (48,), (2, 4, 6)):
            inner = kvferry.compress(tensor.reshape(shape).half(), kvferry.Bounded(0.5, False))
            with pytest.raises(CorruptFrame):
                kvferry.decompress(self.forged(frame, payload[:at] + inner, shape=shape))

    def test_no_memory_for_what_is_not_there(self) -> None:
        """A frame without values may claim any number of tokens; a table of angles for them would be terabytes."""
        frame = kvferry.compress(torch.empty(0, 2, 9, 4, dtype=torch.bfloat16), Transform(make_profile(2, 4), 0, "k"))
        payload = bytes(read_frame(frame).payload)
        at = payload.index(b"KVFY")
        shape = (0, 2, 1 << 47, 4)
        forged = self.forged(frame, payload[:at] + self.forged(payload[at:], shape=shape), shape=shape)
        assert kvferry.decompress(forged).shape == shape
        shape = (1, 2, 1 << 40, 4)
        with pytest.raises(CorruptFrame):
            kvferry.decompress(self.forged(frame, payload[:at] + self.forged(payload[at:], shape=shape), shape=shape))

    @pytest.mark.parametrize(
        ("blocks", "message"),
        [
            ([3], "block 3 is not in a tensor of 2"),
            ([1, 1], "in order, and each once"),
            ([1, 0], "in order, and each once"),
            ([(1 << 32) - 1], "is not in a tensor"),
        ],
    )
    def test_forged_blocks(self, blocks: list[int], message: str) -> None:
        frame, _ = small_frame()
        payload = bytes(read_frame(frame).payload)
        inner = payload[payload.index(b"KVFY") :]
        body = struct.pack(f"<II{len(blocks)}I", len(blocks), 40 * len(blocks), *blocks) + bytes(40 * len(blocks))
        body = body.ljust(-(-len(body) // 8) * 8, b"\0")
        with pytest.raises(CorruptFrame, match=message):
            kvferry.decompress(self.forged(frame, body + inner))

    def test_forged_sizes_of_blocks(self) -> None:
        frame, _ = small_frame()
        payload = bytes(read_frame(frame).payload)
        at = payload.index(b"KVFY")
        assert struct.unpack_from("<III", payload) == (1, 40, 1)
        for count, size in ((0, 40), (0, 44), (1, 39), (1, 41), (2, 36), ((1 << 32) - 1, 40), (1, (1 << 32) - 1)):
            with pytest.raises(CorruptFrame):
                kvferry.decompress(self.forged(frame, struct.pack("<II", count, size) + payload[8:]))
        padding = bytearray(payload)
        assert at == 56 and padding[52:56] == bytes(4)
        padding[53] = 1
        with pytest.raises(CorruptFrame, match="padding"):
            kvferry.decompress(self.forged(frame, bytes(padding)))
