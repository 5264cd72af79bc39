"""The contract that every codec keeps, with all its parameters, on every device (docs/codecs.md, docs/format.md)."""

from functools import cache

import pytest
import torch
from torch import Tensor

import kvferry
from contract import cases
from contract.cases import (
    DEVICES,
    MEDIUM,
    all_cases,
    assert_kept,
    bits_of,
    bounded,
    gaussian,
    medium_input,
    some_cases,
)
from kvferry import BlockSpec, Bounded, Codec, Lossless
from kvferry.format.frame import read_frame

SHAPES = [
    (),
    (0,),
    (1,),
    (3,),
    (64,),
    (8192 + 130,),
    (0, 5),
    (5, 0),
    (0, 0),
    (2, 0, 3),
    (0, 64, 128),
    (1, 1),
    (1, 128),
    (31, 1),
    (32, 7),
    (33, 64),
    (63, 80),
    (64, 96),
    (65, 128),
    (129, 129),
    (64, 256),
    (31, 576),
    (2, 33, 257),
    (3, 2, 65, 7),
    (2, 3, 64, 64),
    (300, 1, 2),
    (40, 3, 33, 1),
    (1,) * 15 + (2,),
]


@cache
def medium_frame(codec: Codec, dtype: torch.dtype, device: str) -> bytes:
    return kvferry.compress(medium_input(dtype, codec)[0].to(device), codec)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str, byte: int) -> Tensor:
    """A tensor full of what no decoder may leave behind, with the channels two elements apart."""
    count = 2 * torch.Size(shape).numel()
    memory = torch.full((count * dtype.itemsize,), byte, dtype=torch.uint8, device=device)
    spread = memory.view(dtype).view(*shape, 2) if count else memory.view(dtype).reshape(*shape, 2)
    return spread[..., 0]


def decode_over(
    frame: bytes, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, device: str, byte: int
) -> Tensor:
    """What the codec itself makes of poisoned memory (`decompress` gives it memory of its own, then copies)."""
    out = poisoned(shape, dtype, device, byte).contiguous()
    type(codec).decode(read_frame(frame), out)
    return out


def test_every_codec_has_cases() -> None:
    """A codec that is added, here or by an installed plugin, comes with cases, or its promises go untested."""
    for name, codec in kvferry.codecs().items():
        assert cases.CASES.get(name), f"no cases for the codec {name!r}: add them to tests/contract/cases.py"
        assert {type(case) for case in cases.CASES[name]} == {codec}


def test_every_mode_packing_and_grouping_has_cases() -> None:
    """The lists in cases.py are the package's own: a mode that is added must not go untested."""
    from kvferry.codecs.bounded import RELATIVE_TO
    from kvferry.codecs.bounded.reference import BASES
    from kvferry.format.frame import GROUPINGS
    from kvferry.packing import PACKERS

    assert set(cases.MODES) == set(BASES)
    assert set(cases.PACKINGS) == set(PACKERS)
    assert set(cases.GROUPINGS) == set(GROUPINGS)
    assert set(cases.RELATIVE_TO) == {"absolute", *RELATIVE_TO}


def test_cases_of_shapes_meet_in_pairs() -> None:
    """The shapes are not tried with every parameter, but every two parameters meet on some shape."""
    turns = [case for turn in range(len(SHAPES)) for case in some_cases(turn)]
    seen = {
        (c.mode, c.grouping, c.packing, c.relative_to if c.relative else "absolute", dtype)
        for c, dtype in turns
        if isinstance(c, Bounded)
    }
    options = (cases.MODES, cases.GROUPINGS, cases.PACKINGS, cases.RELATIVE_TO, cases.FLOATS)
    for i in range(len(options)):
        for j in range(i):
            pairs = {(case[i], case[j]) for case in seen}
            assert len(pairs) == len(options[i]) * len(options[j]), f"parameters {j} and {i} do not meet in all pairs"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("codec", "dtype"), all_cases())
class TestMedium:
    """All parameters on one shape whose tiles are of all kinds, special values among them."""

    def test_round_trip(self, codec: Codec, dtype: torch.dtype, device: str) -> None:
        tensor, _ = medium_input(dtype, codec)
        frame = medium_frame(codec, dtype, device)
        back = kvferry.decompress(frame, device=device)
        assert back.device.type == device
        assert back.is_contiguous()
        assert_kept(tensor, frame, back, codec)

    def test_special_values_come_back_bit_for_bit(self, codec: Codec, dtype: torch.dtype, device: str) -> None:
        tensor, special = medium_input(dtype, codec)
        assert special.sum() > 2 * len(cases.special_patterns(dtype))
        back = kvferry.decompress(medium_frame(codec, dtype, device), device=device)
        assert torch.equal(bits_of(back)[special], bits_of(tensor)[special])

    def test_same_bytes_again_and_input_unchanged(self, codec: Codec, dtype: torch.dtype, device: str) -> None:
        tensor = medium_input(dtype, codec)[0].to(device)
        before = bits_of(tensor).clone()
        assert kvferry.compress(tensor, codec) == medium_frame(codec, dtype, device)
        assert torch.equal(bits_of(tensor), before)

    @pytest.mark.parametrize("byte", [0xFF, 0xEE])
    def test_every_element_of_out_is_written(self, codec: Codec, dtype: torch.dtype, device: str, byte: int) -> None:
        """0xFF fills floats with NaN, 0xEE with large numbers."""
        frame = medium_frame(codec, dtype, device)
        out = poisoned(MEDIUM, dtype, device, byte)
        assert kvferry.decompress(frame, out=out) is out
        assert torch.equal(bits_of(out), bits_of(kvferry.decompress(frame, device=device)))
        beside = out.as_strided(out.shape, out.stride(), out.storage_offset() + 1)
        assert (beside.contiguous().view(torch.uint8) == byte).all()
        assert torch.equal(bits_of(decode_over(frame, codec, MEDIUM, dtype, device, byte)), bits_of(out))


@pytest.mark.parametrize("codec", [c for c in cases.CASES["bounded"] if isinstance(c, Bounded)], ids=cases.case_id)
def test_bound_used_is_the_bound_asked(codec: Bounded) -> None:
    """Not vacuous: the bound in the frame is the largest that was asked, up to float32, and is made use of."""
    tensor, _ = medium_input(torch.bfloat16)
    info = kvferry.inspect(medium_frame(codec, torch.bfloat16, "cpu"))
    asked = float(cases.allowed_errors(tensor, codec).max())
    assert asked * (1 - 2**-22) <= info.bound_used <= asked
    assert info.error_bound == codec.error_bound
    back = kvferry.decompress(medium_frame(codec, torch.bfloat16, "cpu"))
    error = (back.double() - tensor.double()).abs()
    assert error[tensor.isfinite()].max() > 0.5 * info.bound_used
    assert info.ratio > 1.3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turn", range(len(SHAPES)), ids=lambda turn: "x".join(map(str, SHAPES[turn])) or "scalar")
@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_shapes(turn: int, special: bool, device: str) -> None:
    for codec, dtype in some_cases(turn + special, SHAPES[turn]):
        tensor = gaussian(SHAPES[turn], dtype, turn)
        if special:
            tensor, _ = cases.with_specials(tensor)
        frame = kvferry.compress(tensor.to(device), codec)
        for byte in (0xFF, 0xEE):
            out = poisoned(SHAPES[turn], dtype, device, byte)
            assert_kept(tensor, frame, kvferry.decompress(frame, out=out), codec)
            assert torch.equal(bits_of(decode_over(frame, codec, SHAPES[turn], dtype, device, byte)), bits_of(out))
        assert kvferry.inspect(frame).num_tiles == codec.num_tiles(BlockSpec.of(tensor))


STRIDES = {
    "transposed": lambda x: x.reshape(150, 194).T,
    "permuted": lambda x: x.reshape(5, 30, 97, 2).permute(3, 0, 2, 1),
    "tokens-first": lambda x: x.permute(1, 0, 2),
    "slice-of-tokens": lambda x: x[:, 11:80],
    "slice-of-channels": lambda x: x[:, :, 7:77],
    "every-second-channel": lambda x: x[..., 1::2],
    "every-third-token": lambda x: x[:, 2::3],
    "expanded-rows": lambda x: x[:1].expand(3, -1, -1),
    "expanded-tokens": lambda x: x[:, :1].expand(-1, 70, -1),
    "expanded-channels": lambda x: x[..., :1].expand(-1, -1, 40),
    "expanded-scalar": lambda x: x[0, 0, 0].expand(40, 33),
    "every-second-value": lambda x: x.reshape(-1)[1:5000:2],
    "negated-view": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STRIDES)
def test_strides(name: str, device: str) -> None:
    """A frame does not depend on how its tensor lies in memory, and the tensor stays as it was."""
    shape = tuple(STRIDES[name](gaussian(MEDIUM, torch.float32)).shape)
    for codec, dtype in some_cases(list(STRIDES).index(name), shape):
        if name == "negated-view" and dtype in cases.FP8:
            continue
        base = gaussian(MEDIUM, dtype, 5).to(device)
        before = bits_of(base).clone()
        tensor = STRIDES[name](base)
        wanted = tensor.clone(memory_format=torch.contiguous_format).resolve_neg()
        assert name == "negated-view" or not tensor.is_contiguous()
        frame = kvferry.compress(tensor, codec)
        assert frame == kvferry.compress(wanted, codec)
        assert torch.equal(bits_of(base), before)
        assert_kept(wanted.cpu(), frame, kvferry.decompress(frame, device=device), codec)


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_into_a_transposed_view(device: str) -> None:
    tensor = gaussian((65, 40), torch.bfloat16)
    memory = torch.full((40, 65), torch.nan, dtype=torch.bfloat16, device=device)
    kvferry.decompress(kvferry.compress(tensor, Lossless()), out=memory.T)
    assert torch.equal(memory.T.cpu(), tensor)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_many_tiles(mode: str, packing: str, dtype: torch.dtype) -> None:
    """More tiles than the reference codes at once, of two shapes that take turns."""
    tensor = gaussian((300, 66, 8), dtype)
    codec = bounded(mode, "token", packing, "tile")
    frame = kvferry.compress(tensor, codec)
    assert kvferry.inspect(frame).num_tiles == 600
    assert_kept(tensor, frame, kvferry.decompress(frame), codec)


@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("dtype", cases.FLOATS + cases.FP8, ids=cases.case_id)
def test_every_bit_pattern(dtype: torch.dtype, packing: str) -> None:
    """All values of the 8 and 16-bit dtypes (float32: every 65535th pattern) through the exact codec."""
    if dtype.itemsize == 4:
        words = torch.arange(-(2**31), 2**31, 65535, dtype=torch.int64).to(torch.int32)[: 256 * 256]
    else:
        words = torch.arange(1 << 8 * dtype.itemsize).to(cases.BITS[dtype.itemsize])
    tensor = words.view(dtype).reshape(-1, 64)
    for ordered in (tensor, tensor.flip(0), tensor[:, ::3]):
        back = kvferry.decompress(kvferry.compress(ordered, Lossless(packing)))
        assert torch.equal(bits_of(back), bits_of(ordered))


@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("relative_to", cases.RELATIVE_TO)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.case_id)
def test_every_bit_pattern_within_the_bound(dtype: torch.dtype, relative_to: str, packing: str) -> None:
    tensor = torch.arange(1 << 16).to(torch.int16).view(dtype).reshape(-1, 64)
    for ordered, mode in ((tensor, "fixed"), (tensor.T, "plain"), (tensor[:, ::3], "outlier")):
        codec = bounded(mode, "token", packing, relative_to)
        frame = kvferry.compress(ordered, codec)
        assert_kept(ordered, frame, kvferry.decompress(frame), codec)


def test_what_does_not_shrink_is_stored_raw() -> None:
    """Random bit patterns cost what they weigh, plus eight bytes a tile at most and the frame."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**15), 2**15, (4, 128, 128), generator=generator, dtype=torch.int32).to(torch.int16)
    tensor = words.view(torch.bfloat16)
    tight = [Bounded(1e-30, relative=False, packing=packing) for packing in cases.PACKINGS]
    for codec in (Lossless("ans"), Lossless("bitpack"), *tight):
        frame = kvferry.compress(tensor, codec)
        assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor)) < tensor.nbytes * 1.01
        assert torch.equal(bits_of(kvferry.decompress(frame)), words)


@pytest.mark.gpu
@pytest.mark.skipif(not cases.HAS_CUDA, reason="no CUDA device")
class TestDevicesAgree:
    """The kernels' bytes are the reference's, and either decodes the other's frames to the same bits."""

    @pytest.mark.parametrize(("codec", "dtype"), all_cases())
    def test_all_parameters(self, codec: Codec, dtype: torch.dtype) -> None:
        self.check(medium_input(dtype, codec)[0], codec)

    @pytest.mark.parametrize("turn", range(len(SHAPES)), ids=lambda turn: "x".join(map(str, SHAPES[turn])) or "scalar")
    def test_shapes(self, turn: int) -> None:
        for more in (0, 1):
            for codec, dtype in some_cases(turn + more, SHAPES[turn]):
                self.check(cases.with_specials(gaussian(SHAPES[turn], dtype, turn))[0], codec)

    @pytest.mark.parametrize("packing", cases.PACKINGS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.case_id)
    def test_every_bit_pattern(self, dtype: torch.dtype, packing: str) -> None:
        tensor = torch.arange(1 << 16).to(torch.int16).view(dtype).reshape(-1, 64)
        for mode in cases.MODES:
            for relative_to in cases.RELATIVE_TO:
                self.check(tensor, bounded(mode, "token", packing, relative_to))
        self.check(tensor, Lossless(packing))

    @staticmethod
    def check(tensor: Tensor, codec: Codec) -> None:
        frame = kvferry.compress(tensor, codec)
        assert kvferry.compress(tensor.cuda(), codec) == frame, f"{codec} {tensor.dtype} {tuple(tensor.shape)}"
        wanted = bits_of(kvferry.decompress(frame))
        assert torch.equal(bits_of(kvferry.decompress(frame, device="cuda")), wanted)
