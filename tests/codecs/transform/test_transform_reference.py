"""The transform's arithmetic against Python's integers and fractions: exact where docs/format.md says so, and rounded
once where it says so."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import DEVICES
from contract.profiles import make_profile, orthonormal
from kvferry.codecs.transform import reference
from kvferry.codecs.transform.profile import SideProfile
from kvferry.codecs.transform.reference import LARGEST, SMALLEST, Angles, Matrices

EXTREMES = [0.0, -0.0, 1e-45, 1e-38, -1e-38, 2.0**-61, 2.0**-60, 1e-20, 1.0, -1.0, 32767.5, 3.3e38, -3.4028234e38]


def float32(value: Fraction) -> float:
    """Rounded to nearest, ties to even; overflow to infinity."""
    if not value:
        return 0.0
    # float64 first, to odd: then the second rounding is the only one that shows.
    close = float(value)
    if Fraction(close) != value:
        bits = struct.unpack("<q", struct.pack("<d", close))[0]
        if not bits & 1:
            bits += 1 if (abs(value) > abs(Fraction(close))) else -1
        close = struct.unpack("<d", struct.pack("<q", bits))[0]
    with np.errstate(over="ignore"):
        return float(np.float32(close))


def scaled_row(row: list[float]) -> tuple[int, list[int]]:
    """(exponent, integers of 16 bits) of a row: docs/format.md, "transform", by fractions."""
    largest = max(abs(Fraction(value)) for value in row)
    exponent = -60
    while largest >= Fraction(2) ** exponent:
        exponent += 1
    if largest * Fraction(2) ** (15 - exponent) >= Fraction(65535, 2):  # 17 bits once rounded
        exponent += 1
    return exponent, [round(Fraction(value) * Fraction(2) ** (15 - exponent)) for value in row]  # ties to even


def product(row: list[float], matrix: list[list[int]]) -> list[float]:
    """What `scaled_product` is to make of a row."""
    exponent, whole = scaled_row(row)
    sums = [sum(a * b for a, b in zip(whole, column, strict=True)) for column in zip(*matrix, strict=True)]
    return [float32(Fraction(np.float32(total // 256).item()) * Fraction(2) ** (exponent - 22)) for total in sums]


def matrices_of(n: int, step: float = 1.0, mean: float = 0.0, seed: int = 0) -> Matrices:
    part = SideProfile.of(torch.full((1, n), mean), orthonormal(1, n, seed), step)
    return Matrices.of(part, torch.device("cpu"))


values = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=300)
@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_scaled_product_is_exact(data: st.DataObject, n: int, count: int, seed: int) -> None:
    rows = [[data.draw(values) for _ in range(n)] for _ in range(count)]
    matrix = torch.randint(-32767, 32768, (n, n), generator=torch.Generator().manual_seed(seed))
    found = reference.scaled_product(torch.tensor([rows], dtype=torch.float32), matrix[None].double())
    assert found.dtype == torch.float32
    assert found[0].tolist() == [product(row, matrix.tolist()) for row in rows]


@pytest.mark.parametrize("device", DEVICES)
def test_scaled_product_is_exact_in_long_sums(device: str) -> None:
    """1024 products of the largest integers: beyond float32's 24 bits and int32, within float64's 53."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randint(-32767, 32768, (1024, 1024), generator=generator)
    matrix[:, 0], matrix[:, 1] = 32767, torch.arange(1024) % 2 * 65534 - 32767
    rows = torch.randint(-32767, 32768, (3, 1024), generator=generator)
    rows[0], rows[1] = 32767, matrix[:, 1]
    found = reference.scaled_product(rows[None].to(device).float() / 8, matrix[None].to(device).double()).cpu()
    # Their largest has 15 bits: the scaling takes them as they are.
    assert (rows.abs().amax(1) >= 1 << 14).all()
    assert int((rows[0] * matrix[:, 0]).sum()) == 1024 * 32767**2 > 1 << 39
    wanted = (rows @ matrix // 256).numpy().astype(np.float32) * np.float32(2.0**-10)
    assert found[0].numpy().tolist() == wanted.tolist()


@pytest.mark.parametrize("value", EXTREMES)
def test_rows_at_the_extremes(value: float) -> None:
    """Alone and beside others, each to 2**-15 of its row's largest and the bits that sums drop, or 2**-75 in rows of
    nothing larger than 2**-60. Only the very largest may leave float32."""
    identity = torch.eye(3, dtype=torch.float64)[None] * 2**15
    for row in ([value, 0.0, 0.0], [value, value, value], [value, 1e-30, 3e38], [value, -1.0, 2.0**-9]):
        rows = torch.tensor([[row]], dtype=torch.float32)
        found = reference.scaled_product(rows, identity)[0, 0].double()
        exact = rows[0, 0].double()
        near = (found - exact).abs() <= max(2.0**-75, (2.0**-15 + 2.0**-21) * float(exact.abs().max()))
        assert (near | (exact.abs() > 3.4e38) & (found == exact * torch.inf)).all()


def test_row_exponent() -> None:
    """Of rows of zeros it does not matter; what would round to 2**15 takes one more."""
    rows = torch.tensor([[2.0**-60, 0.0], [1.0, -1.5], [-2.0, 1.0], [1e-45, 0.0], [3.4e38, 1.0], [0.49999997, 0.0]])
    assert reference.row_exponent(rows).flatten().tolist() == [-59, 1, 2, -60, 128, 0]
    assert [scaled_row(row)[0] for row in rows.tolist()] == [-59, 1, 2, -60, 128, 0]
    rows = torch.tensor([[32767.498], [-32767.5], [3.4028234e38]])
    assert reference.row_exponent(rows).flatten().tolist() == [15, 16, 129]


def test_powers_of_two() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert reference.power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


def forward(x: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor]:
    coefficients, bad = reference.forward(x, matrices, None)
    assert coefficients.dtype == torch.float16
    assert coefficients.isfinite().all()
    return coefficients, bad


@settings(max_examples=200)
@given(
    scale=st.integers(-40, 40),
    step=st.integers(-40, 40),
    mean=st.sampled_from([0.0, 1.0, -300.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_coefficients_are_never_negative_zero_or_denormal(
    scale: int, step: int, mean: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 9, 6, generator=generator) * 2.0**scale
    x[0, 3] = mean
    x[0, 4, :3] = -0.0
    finite = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    coefficients, bad = forward(finite, matrices_of(6, 2.0**step, mean, seed % 5))
    words = coefficients.view(torch.int16)
    assert not (words == -(1 << 15)).any()
    small = (words & 0x7FFF) < 1 << 10
    assert not (small & (words != 0)).any()
    assert not coefficients[:, bad[0]].any()
    assert ((coefficients == 0) | (coefficients.abs() >= SMALLEST)).all()


def test_where_coefficients_begin_and_end() -> None:
    """Below 2**-12 they are zero; beyond float16's largest there are none."""
    identity = Matrices(
        torch.zeros(1, 2), torch.eye(2, dtype=torch.float64)[None] * 2**15, torch.tensor(1.0), torch.tensor(1.0)
    )
    cases = {
        SMALLEST: (SMALLEST, False),
        -SMALLEST: (-SMALLEST, False),
        SMALLEST * (1 - 2**-8): (0.0, False),
        -SMALLEST * (1 - 2**-8): (0.0, False),
        LARGEST - 256: (65248.0, False),
        65280.0: (65280.0, False),
        65536.0: (0.0, True),
        -3e38: (0.0, True),
        float("inf"): (0.0, True),
        float("nan"): (0.0, True),
    }
    for value, (wanted, none) in cases.items():
        x = torch.tensor([[[value, 0.0], [0.0, 1.0]]])
        coefficients, bad = forward(x, identity)
        assert coefficients[0, 0].tolist() == [wanted, 0.0]
        assert bad.tolist() == [[none, False]]
        assert coefficients[0, 1].tolist() == [0.0, 1.0]


def test_the_whole_forward_and_inverse_by_fractions() -> None:
    """Every step as the format says, one after another, for groups of two heads."""
    profile = make_profile(4, 3, 2, "none", step=0.3)
    part = profile.side(0, "v")
    matrices = Matrices.of(part, torch.device("cpu"))
    x = (3 * torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(8))).bfloat16()
    coefficients, bad = reference.forward(x, matrices, None)
    assert not bad.any()
    delivered = reference.inverse(coefficients, matrices, None, torch.bfloat16)
    step = Fraction(np.float32(part.step).item())
    inverse = Fraction(float32(1 / step))
    for group in range(2):
        basis = part.basis[group].tolist()
        transposed = [list(row) for row in zip(*basis, strict=True)]
        mean = part.mean[group].tolist()
        for token in range(5):
            vector = x[2 * group : 2 * group + 2, token].flatten().tolist()
            row = [float32(Fraction(a) - Fraction(b)) for a, b in zip(vector, mean, strict=True)]
            units = [float32(Fraction(u) * inverse) for u in product(row, basis)]
            wanted = [0.0 if abs(u) < SMALLEST else float(np.float16(u)) for u in units]
            mine = coefficients[2 * group : 2 * group + 2, token].flatten().tolist()
            assert mine == wanted
            back = product(wanted, transposed)
            sums = [
                float32(Fraction(float32(Fraction(b) * step)) + Fraction(m)) for b, m in zip(back, mean, strict=True)
            ]
            rounded = torch.tensor(sums).bfloat16().tolist()
            assert delivered[2 * group : 2 * group + 2, token].flatten().tolist() == rounded


def test_rope_is_taken_off_keys_in_single_roundings() -> None:
    profile = make_profile(1, 4, 1, "halves")
    angles = Angles.of(profile, "k", torch.arange(7, 9))
    assert angles is not None
    assert Angles.of(profile, "v", torch.arange(2)) is None
    assert Angles.of(make_profile(1, 4, 1, "none"), "k", torch.arange(2)) is None
    x = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(2))
    turned = angles.rope.unrotate(x, angles.cos, angles.sin)
    for token in range(2):
        for pair in range(2):
            a, b = (Fraction(float(x[0, token, pair + 2 * half])) for half in range(2))
            cos, sin = Fraction(float(angles.cos[token, pair])), Fraction(float(angles.sin[token, pair]))
            first = float32(Fraction(float32(a * cos)) + Fraction(float32(b * sin)))
            second = float32(Fraction(float32(b * cos)) - Fraction(float32(a * sin)))
            assert (float(turned[0, token, pair]), float(turned[0, token, pair + 2])) == (first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delivered_values_are_finite(dtype: torch.dtype) -> None:
    """Whatever coefficients a frame holds, and at the ends of what profiles may be."""
    for step, mean in ((2.0**100, 2.0**100), (2.0**100, 0.0), (2.0**-40, -(2.0**100)), (1.0, 0.0)):
        coefficients = torch.full((1, 4, 64), 65504.0, dtype=torch.float16)
        coefficients[0, 1] = -65504.0
        coefficients[0, 2] = 2.0**-24
        values = reference.inverse(coefficients, matrices_of(64, step, mean), None, dtype)
        assert values.isfinite().all()


def test_groups_and_heads() -> None:
    """Coefficient j of a group lies in its head j // head_dim; heads and tokens return to their places, or none do."""
    for tokens in (0, 1, 5):
        x = torch.arange(6 * tokens * 4, dtype=torch.float32).view(6, tokens, 4)
        matrices = Matrices.of(make_profile(6, 4, 3).side(0, "k"), torch.device("cpu"))
        rows = reference.group_rows(x, matrices)
        assert rows.shape == (2, tokens, 12)
        for group in range(2):
            for head in range(3):
                assert rows[group, :, 4 * head : 4 * head + 4].equal(x[3 * group + head])
        assert reference.ungroup_rows(rows, 4).equal(x)
