"""The baselines: values against plain formulas, sizes of the actual arrays."""

import math

import pytest
import torch

from kvferry.errors import CorruptFrame
from kvferry.evaluation.baselines import Fp8Cast, HadamardInt, IntPerTokenHead, Kivi, hadamard
from kvferry.evaluation.coders import Place

CPU = torch.device("cpu")
K, V = Place(0, "k"), Place(0, "v")
SHAPES = [(1, 2, 33, 64), (2, 3, 7, 80), (1, 1, 5, 7), (1, 2, 0, 64), (3, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALL = [Fp8Cast(), IntPerTokenHead(), IntPerTokenHead(3), HadamardInt(), Kivi(2), Kivi(3, 16)]


def values(shape, dtype, offset=0.0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)


def through(baseline, tensor, place=K):
    return baseline.decode(baseline.encode(tensor, place), place, tuple(tensor.shape), tensor.dtype, CPU)


def levels_formula(rows, bits, dtype):
    """Smallest value and scale of each row in 16 bits, 2**bits levels between."""
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    rows = rows.float()
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7).to(half).float()
    zero = low.to(half).float()
    return zero + torch.clamp(torch.round((rows - zero) / scale), 0, 2**bits - 1) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_the_cast_and_one_byte_a_value(shape, dtype):
    tensor = values(shape, dtype)
    assert len(Fp8Cast().encode(tensor, K)) == tensor.numel()
    assert torch.equal(through(Fp8Cast(), tensor), tensor.float().to(torch.float8_e4m3fn).to(dtype))


def test_fp8_saturates():
    assert through(Fp8Cast(), torch.tensor([[1e6, -1e6, 448.0]])).tolist() == [[448.0, -448.0, 448.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int_is_its_formula_and_counts_codes_scales_and_zeros(shape, dtype, bits):
    tensor = values(shape, dtype)
    rows = tensor.numel() // shape[-1]
    assert len(IntPerTokenHead(bits).encode(tensor, K)) == math.ceil(tensor.numel() * bits / 8) + 4 * rows
    back = through(IntPerTokenHead(bits), tensor)
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    if tensor.numel():
        assert torch.equal(back, levels_formula(tensor, bits, dtype).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_come_back(dtype):
    tensor = torch.full((2, 64), -1.5, dtype=dtype)
    for baseline in (IntPerTokenHead(), IntPerTokenHead(2), Kivi(2), Kivi(4)):
        assert torch.equal(through(baseline, tensor), tensor)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("place", [K, V])
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (1, 2, 64, 96), (1, 1, 31, 30)])
def test_kivi_quantises_keys_over_tokens_and_values_over_channels(shape, place, bits):
    tensor = values(shape, torch.bfloat16)
    kivi = Kivi(bits)
    back = through(kivi, tensor, place)
    assert (back.shape, back.dtype) == (tensor.shape, tensor.dtype)
    along = tensor.transpose(-1, -2) if place.side == "k" else tensor
    groups = along.split(32, dim=-1) if along.shape[-1] else []
    whole = sum(group.numel() for group in groups if group.shape[-1] == 32)
    codes = math.ceil(whole * bits / 8) + math.ceil((tensor.numel() - whole) * bits / 8)
    rows = sum(group.numel() // group.shape[-1] for group in groups)
    assert len(kivi.encode(tensor, place)) == codes + 4 * rows
    if tensor.numel():
        expected = torch.cat([levels_formula(group, bits, tensor.dtype) for group in groups], -1).to(tensor.dtype)
        assert torch.equal(back, expected.transpose(-1, -2) if place.side == "k" else expected)


def test_kivi_keeps_channels_apart_that_int_does_not():
    tensor = values((1, 1, 64, 64), torch.bfloat16)
    tensor[..., 5] += 200
    others = [channel for channel in range(64) if channel != 5]
    error = {b: (through(b, tensor) - tensor)[..., others].abs().max() for b in (Kivi(4), IntPerTokenHead(4))}
    assert error[Kivi(4)] < error[IntPerTokenHead(4)] / 5


@pytest.mark.parametrize("size", [1, 7, 64, 80, 128])
def test_hadamard_matrices_are_orthonormal_and_spread_channels(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-6)
    block = size & -size
    assert matrix.abs().max() == pytest.approx(block**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_hadamard_int_is_int_on_turned_values(shape, dtype):
    tensor = values(shape, dtype)
    assert len(HadamardInt(4).encode(tensor, K)) == len(IntPerTokenHead(4).encode(tensor, K))
    back = through(HadamardInt(4), tensor)
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    if tensor.numel():
        turned = hadamard(shape[-1])
        expected = (levels_formula(tensor.float() @ turned, 4, dtype) @ turned.T).to(dtype)
        assert torch.equal(back, expected)


def test_hadamard_helps_where_one_channel_is_large():
    tensor = values((1, 1, 64, 64), torch.bfloat16)
    tensor[..., 5] *= 50
    error = {
        b: float((through(b, tensor) - tensor).float().square().mean()) for b in (HadamardInt(4), IntPerTokenHead(4))
    }
    assert error[HadamardInt(4)] < 0.5 * error[IntPerTokenHead(4)]


@pytest.mark.parametrize("baseline", ALL, ids=lambda baseline: baseline.name)
def test_a_wrong_length_is_refused(baseline):
    data = baseline.encode(values((2, 8), torch.bfloat16), K)
    for broken, shape in ((data[:-1], (2, 8)), (data + b"x", (2, 8)), (data, (2, 9)), (data, (0, 8))):
        with pytest.raises(CorruptFrame, match="bytes where the shape needs"):
            baseline.decode(broken, K, shape, torch.bfloat16, CPU)


@pytest.mark.parametrize("baseline", ALL, ids=lambda baseline: baseline.name)
def test_nothing_is_promised(baseline):
    assert baseline.bound(b"", K) is None


@pytest.mark.parametrize(
    "make", [lambda: IntPerTokenHead(5), lambda: Kivi(1), lambda: HadamardInt(16), lambda: Kivi(4, 0)]
)
def test_parameters_are_checked(make):
    with pytest.raises(ValueError, match=r"must be one of 2, 3, 4, 8|groups of 0"):
        make()
