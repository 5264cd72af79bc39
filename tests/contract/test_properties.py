"""Adversarial tensors: what a quantiser, a range or a float format gets wrong first. Bounds are checked exactly."""

import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvferry
from contract import cases
from contract.cases import assert_within_bounds_exactly, bits_of
from kvferry import BlockSpec, Bounded, Lossless

KINDS = (
    "bits",
    "huge-range",
    "denormal",
    "constant",
    "one-outlier",
    "alternating",
    "near-largest",
    "grid",
    "halves",
    "one-binade",
    "drift",
)


def make(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of the `kind`; the seed draws it and its scale."""
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    info = torch.finfo(dtype)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    log_scale = torch.rand((), generator=generator, dtype=torch.float64) * 12 - 8
    scale = torch.exp2(log_scale)
    if kind == "bits":
        width = 8 * dtype.itemsize
        words = torch.randint(-(1 << (width - 1)), 1 << (width - 1), (count,), generator=generator)
        return words.to(cases.BITS[dtype.itemsize]).view(dtype).view(shape)
    if kind == "huge-range":
        exponent = torch.randint(-140, 127, (count,), generator=generator).double()
        values = noise.sign() * torch.exp2(exponent)
    elif kind == "denormal":
        values = noise * info.smallest_normal
    elif kind == "constant":
        values = noise[:1].expand(count) * scale
    elif kind == "one-outlier":
        values = noise * scale
        values[seed % count] = info.max * (1 if seed % 2 else -1) / (1 + seed % 7)
    elif kind == "alternating":
        values = torch.where(torch.arange(count) % 2 == 0, info.max, -info.max).double()
        values[seed % count] = 0
    elif kind == "near-largest":
        values = info.max * (1 - noise.abs() * 0.01)
    elif kind == "grid":
        values = (noise * 20).round() * scale
    elif kind == "halves":
        values = ((noise * 40).floor() + 0.5) * 2**-6
    elif kind == "one-binade":
        values = (1 + torch.rand(count, generator=generator, dtype=torch.float64)) * scale
    else:
        values = noise.cumsum(0) * scale
    return values.clamp(-info.max, info.max).to(dtype).view(shape)


tensors = st.builds(
    make,
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.sampled_from([1, 2, 5, 31, 32, 33, 65]), st.sampled_from([1, 2, 3, 17, 40])),
    dtype=st.sampled_from(cases.FLOATS),
    seed=st.integers(0, 2**20),
)
bounds = st.one_of(
    st.sampled_from([5e-324, 1e-310, 1e-45, 2.0**-149, 2.0**-126, 1e-30, 2.0**-101, 2.0**-100, 1.0, 2.0**126, 1e300]),
    st.just(sys.float_info.max),
    st.floats(-12, 6).map(lambda exponent: 2.0**exponent),
    st.integers(-20, 8).map(lambda exponent: 2.0**exponent),
)
codecs = st.builds(
    cases.bounded,
    mode=st.sampled_from(cases.MODES),
    grouping=st.sampled_from(cases.GROUPINGS),
    packing=st.sampled_from(cases.PACKINGS),
    relative_to=st.sampled_from(cases.RELATIVE_TO),
    error_bound=bounds,
)


def assert_specials_kept(tensor: Tensor, back: Tensor) -> None:
    """Signed zeros and denormals too: not within the bound, but as they were."""
    magnitude = bits_of(tensor).long() & ((1 << (8 * tensor.element_size() - 1)) - 1)
    special = magnitude < 1 << cases.MANTISSA[tensor.dtype]
    assert torch.equal(bits_of(back)[special], bits_of(tensor)[special]), "a zero or denormal altered"


@settings(max_examples=1000)
@given(tensor=tensors, codec=codecs)
def test_bounded_keeps_the_bound(tensor: Tensor, codec: Bounded) -> None:
    frame = kvferry.compress(tensor, codec)
    assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor))
    back = kvferry.decompress(frame)
    assert_within_bounds_exactly(tensor, back, codec)
    assert_specials_kept(tensor, back)


@settings(max_examples=400)
@given(tensor=tensors, packing=st.sampled_from(cases.PACKINGS), fp8=st.sampled_from([None, *cases.FP8]))
def test_lossless_is_bit_identical(tensor: Tensor, packing: str, fp8: torch.dtype | None) -> None:
    if fp8 is not None:
        tensor = tensor.contiguous().view(torch.uint8).view(fp8)
    codec = Lossless(packing)
    frame = kvferry.compress(tensor, codec)
    assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor))
    assert torch.equal(bits_of(kvferry.decompress(frame)), bits_of(tensor))


@settings(max_examples=400)
@given(
    dtype=st.sampled_from(cases.FLOATS),
    exponent=st.integers(-110, 100),
    numerator=st.integers(1, 255),
    mode=st.sampled_from(cases.MODES),
    packing=st.sampled_from(cases.PACKINGS),
    seed=st.integers(0, 2**20),
)
@example(dtype=torch.bfloat16, exponent=0, numerator=1, mode="fixed", packing="ans", seed=0)
def test_bounds_that_meet_the_resolution(
    dtype: torch.dtype, exponent: int, numerator: int, mode: str, packing: str, seed: int
) -> None:
    """Values a few units in the last place apart, and bounds of a few quarters of such a unit: every rounding shows."""
    if dtype == torch.float16:
        exponent = exponent % 24 - 12
    generator = torch.Generator().manual_seed(seed)
    unit = 2.0 ** (exponent - cases.MANTISSA[dtype])
    steps = torch.randint(-40, 40, (33, 7), generator=generator)
    tensor = (2.0**exponent + steps.double() * unit).to(dtype)
    codec = Bounded(numerator * unit / 16, relative=False, mode=mode, packing=packing)
    back = kvferry.decompress(kvferry.compress(tensor, codec))
    assert_within_bounds_exactly(tensor, back, codec)
    if codec.error_bound < unit / 2:
        assert torch.equal(bits_of(back), bits_of(tensor)), "a bound below the resolution must be exact"


@pytest.mark.parametrize("relative_to", ["tensor", "tile", "channel"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
def test_range_of_nothing_finite_and_range_zero(dtype: torch.dtype, relative_to: str) -> None:
    """A range of 0 leaves no error: what comes back is exact."""
    for fill in (float("nan"), float("inf"), 0.0, -0.0, 1.5):
        tensor = torch.full((40, 9), fill, dtype=dtype)
        codec = Bounded(0.5, relative_to=relative_to)
        frame = kvferry.compress(tensor, codec)
        assert torch.equal(bits_of(kvferry.decompress(frame)), bits_of(tensor))
        assert kvferry.inspect(frame).bound_used == 0


@pytest.mark.parametrize("relative_to", ["tensor", "tile", "channel"])
@pytest.mark.parametrize("error_bound", [1e-3, 0.3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.case_id)
def test_range_beyond_float32(dtype: torch.dtype, error_bound: float, relative_to: str) -> None:
    """A range of twice float32's largest number is no infinity: the bound is finite, and so is what comes back."""
    tensor = torch.linspace(-1, 1, 40 * 9, dtype=torch.float64).view(40, 9) * torch.finfo(dtype).max
    tensor = tensor.to(dtype)
    assert tensor.isfinite().all()
    codec = Bounded(error_bound, relative_to=relative_to)
    frame = kvferry.compress(tensor, codec)
    assert 0 < kvferry.inspect(frame).bound_used <= 2.0**126
    assert_within_bounds_exactly(tensor, kvferry.decompress(frame), codec)
