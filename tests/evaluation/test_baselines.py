"""The fp8 and int4 baselines: values against their plain formulas, sizes of the actual arrays."""

import pytest
import torch

from kvferry.errors import CorruptFrame
from kvferry.evaluation.baselines import Fp8Cast, Int4PerTokenHead

CPU = torch.device("cpu")
SHAPES = [(1, 2, 33, 64), (2, 3, 7, 80), (1, 1, 5, 7), (1, 2, 0, 64), (3, 1)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def values(shape, dtype):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_the_cast_and_one_byte_a_value(shape, dtype):
    tensor = values(shape, dtype)
    data = Fp8Cast().encode(tensor)
    assert len(data) == tensor.numel()
    expected = tensor.float().to(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(Fp8Cast().decode(data, shape, dtype, CPU), expected)


def test_fp8_saturates():
    data = Fp8Cast().encode(torch.tensor([[1e6, -1e6, 448.0]]))
    assert Fp8Cast().decode(data, (1, 3), torch.float32, CPU).tolist() == [[448.0, -448.0, 448.0]]


def int4_formula(tensor):
    """Smallest value and scale of each row in bfloat16, sixteen levels between."""
    rows = tensor.float()
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float().clamp(min=1e-8)
    zero = low.to(torch.bfloat16).float()
    return (zero + torch.clamp(torch.round((rows - zero) / scale), 0, 15) * scale).to(tensor.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_its_formula_and_counts_codes_scales_and_zeros(shape, dtype):
    tensor = values(shape, dtype)
    data = Int4PerTokenHead().encode(tensor)
    rows = tensor.numel() // shape[-1]
    assert len(data) == rows * ((shape[-1] + 1) // 2 + 2 + 2)
    back = Int4PerTokenHead().decode(data, shape, dtype, CPU)
    assert (back.shape, back.dtype) == (tensor.shape, dtype)
    if tensor.numel():
        assert torch.equal(back, int4_formula(tensor))


def test_int4_of_a_constant_row_is_that_constant():
    tensor = torch.full((2, 64), -1.5, dtype=torch.bfloat16)
    back = Int4PerTokenHead().decode(Int4PerTokenHead().encode(tensor), (2, 64), torch.bfloat16, CPU)
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("baseline", [Fp8Cast(), Int4PerTokenHead()])
def test_a_wrong_length_is_refused(baseline):
    data = baseline.encode(values((2, 8), torch.bfloat16))
    for broken, shape in ((data[:-1], (2, 8)), (data + b"x", (2, 8)), (data, (2, 9)), (data, (0, 8))):
        with pytest.raises(CorruptFrame, match=baseline.name):
            baseline.decode(broken, shape, torch.bfloat16, CPU)
