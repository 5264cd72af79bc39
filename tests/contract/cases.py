"""What the contract is tested on: codecs with all parameters, inputs, and bounds computed independently."""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kvferry import Bounded, Codec, Lossless, Raw

HAS_CUDA = torch.cuda.is_available()
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]),
]
PACKINGS = ("ans", "bitpack")
MODES = ("fixed", "plain", "outlier")
GROUPINGS = ("token", "flat")
RELATIVE_TO = ("absolute", "tensor", "tile", "channel")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MANTISSA = {
    torch.bfloat16: 7,
    torch.float16: 10,
    torch.float32: 23,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}


def bounded(mode: str, grouping: str, packing: str, relative_to: str, error_bound: float | None = None) -> Bounded:
    """`relative_to` may be "absolute"; the bounds are such that unit Gaussian values are neither exact nor all 0."""
    relative = relative_to != "absolute"
    bound = error_bound if error_bound is not None else 0.01 if relative else 0.07
    return Bounded(bound, relative, relative_to if relative else "tensor", mode, grouping, packing)


CASES: dict[str, list[Codec]] = {
    "raw": [Raw()],
    "lossless": [Lossless(packing) for packing in PACKINGS],
    "bounded": [bounded(*choice) for choice in itertools.product(MODES, GROUPINGS, PACKINGS, RELATIVE_TO)],
}
"""Every built-in codec with all its parameters. A codec that `kvferry.codecs()` lists must be here."""


def case_id(case: object) -> str:
    if isinstance(case, Bounded):
        return f"bounded-{case.mode}-{case.grouping}-{case.packing}-{case.relative_to if case.relative else 'absolute'}"
    if isinstance(case, Lossless):
        return f"lossless-{case.packing}"
    if isinstance(case, Codec):
        return case.name
    return str(case).removeprefix("torch.")


def all_cases() -> list[object]:
    """Every codec with every dtype that it takes, as pytest parameters."""
    return [
        pytest.param(codec, dtype, id=f"{case_id(codec)}-{case_id(dtype)}")
        for codec in itertools.chain(*CASES.values())
        for dtype in codec.dtypes
    ]


def some_cases(turn: int) -> list[tuple[Codec, torch.dtype]]:
    """Nine cases for input number `turn`, others for other inputs: each pair of parameters meets in some of them."""
    floats = [FLOATS[(turn + i) % 3] for i in range(9)]
    chosen: list[tuple[Codec, torch.dtype]] = [
        (Raw(), (FLOATS + FP8)[turn % 5]),
        (Lossless("ans"), (FLOATS + FP8)[(turn + 1) % 5]),
        (Lossless("bitpack"), (FLOATS + FP8)[(turn + 3) % 5]),
    ]
    for i, (mode, packing) in enumerate(itertools.product(MODES, PACKINGS)):
        at = turn + i
        codec = bounded(mode, GROUPINGS[(at // 2 + turn) % 2], packing, RELATIVE_TO[(at + turn // 4) % 4])
        chosen.append((codec, floats[i]))
    return chosen


def bits_of(tensor: Tensor) -> Tensor:
    """The bit patterns as integers, contiguous and on the CPU: NaN compares as its payload, -0.0 differs from 0.0."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(BITS[tensor.dtype.itemsize])


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Unit noise around a mean of each channel's own, as KV cache has it."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        values = values + 2 * torch.randn(shape[-1], generator=generator)
    return values.to(dtype)


def special_patterns(dtype: torch.dtype) -> list[int]:
    """Bit patterns that must come back as they are: zeros, denormals, infinities, NaNs with payloads."""
    mantissa = MANTISSA[dtype]
    sign = 1 << (8 * dtype.itemsize - 1)
    infinity = (sign - 1) >> mantissa << mantissa
    nans = [infinity | 1, infinity | 1 << (mantissa - 1), sign - 1]
    finite = [0, 1, 2, (1 << mantissa) - 1, 1 << (mantissa - 1)]
    if dtype == torch.float8_e4m3fn:
        infinity, nans = 0x78, [0x7F]
    return [pattern | s for pattern in (*finite, infinity, *nans) for s in (0, sign)]


def with_specials(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` with special patterns strewn over it, and where they are (bool)."""
    patterns = special_patterns(values.dtype)
    words = bits_of(values).clone()
    flat = words.view(-1)
    where = torch.zeros(words.numel(), dtype=torch.bool)
    if words.numel():
        at = torch.arange(min(3, words.numel() - 1), words.numel(), 97)
        chosen = torch.tensor(patterns)[(torch.arange(len(at)) + words.numel()) % len(patterns)]
        flat[at] = chosen.to(words.dtype)
        where[at] = True
    return words.view(values.dtype), where.view(values.shape)


def tiles_of(shape: tuple[int, ...], flat: bool) -> Iterator[Tensor]:
    """Row-major indices `[T, C]` of each tile, in order: docs/format.md, "Tiles", written down once more."""
    count = 1
    for size in shape:
        count *= size
    if count == 0:
        return
    if flat or len(shape) < 2:
        start = 0
        while start < count:
            left = count - start
            columns = min(128, left // 64)
            if columns == 0:
                yield torch.arange(start, count)[:, None]
                return
            yield torch.arange(start, start + 64 * columns).view(columns, 64).T
            start += 64 * columns
        return
    tokens, channels = shape[-2:]
    segments = -(-channels // 128)
    share = -(-channels // segments)
    width = min(128, -(-share // 16) * 16)
    for row in range(count // (tokens * channels)):
        for t in range(0, tokens, 64):
            for c in range(0, channels, width):
                ts = torch.arange(t, min(t + 64, tokens))
                cs = torch.arange(c, min(c + width, channels))
                yield row * tokens * channels + ts[:, None] * channels + cs


def value_ranges(tensor: Tensor, relative_to: str, flat: bool) -> Tensor:
    """float64, shaped like `tensor`: the range of the finite values of what each value's bound is relative to."""
    values = tensor.detach().cpu().contiguous().double().reshape(-1)
    result = torch.zeros_like(values)

    def spread(part: Tensor) -> float:
        part = part[part.isfinite()]
        return float(part.max() - part.min()) if part.numel() else 0.0

    if relative_to == "tensor":
        result[:] = spread(values)
    else:
        for index in tiles_of(tuple(tensor.shape), flat):
            if relative_to == "tile":
                result[index] = spread(values[index])
            else:
                for column in index.T:
                    result[column] = spread(values[column])
    return result.view(tensor.shape)


def allowed_errors(tensor: Tensor, codec: Bounded) -> Tensor:
    """float64, shaped like `tensor`: the error that the caller allowed for each value."""
    if not codec.relative:
        return torch.full(tensor.shape, float(codec.error_bound), dtype=torch.float64)
    return codec.error_bound * value_ranges(tensor, codec.relative_to, codec.flat)


def assert_within_bounds(tensor: Tensor, back: Tensor, codec: Bounded, bound_used: float) -> None:
    """Each finite value within the bound asked and the one that the frame states; everything else bit for bit."""
    tensor, back = tensor.detach().cpu(), back.detach().cpu()
    finite = tensor.isfinite()
    assert torch.equal(bits_of(back)[~finite], bits_of(tensor)[~finite]), "NaN or infinity altered"
    error = (back.double() - tensor.double()).abs()[finite]
    assert not error.isnan().any(), "a finite value became NaN"
    over = error > allowed_errors(tensor, codec)[finite]
    assert not over.any(), f"{int(over.sum())} values beyond the bound asked, the first off by {error[over][0]}"
    assert not (error > bound_used).any(), f"off by {error.max()}, the frame states {bound_used}"


def assert_within_bounds_exactly(tensor: Tensor, back: Tensor, codec: Bounded) -> None:
    """The bound asked, in rational arithmetic, in which no rounding can hide a violation. Values whose error float64
    puts clearly below the bound are spared it."""
    finite = tensor.isfinite()
    assert torch.equal(bits_of(back)[~finite], bits_of(tensor)[~finite]), "NaN or infinity altered"
    assert back[finite].isfinite().all(), "a finite value became NaN or infinite"
    error = (back.double() - tensor.double()).abs().reshape(-1)
    close = finite.reshape(-1) & (error > allowed_errors(tensor, codec).reshape(-1) * (1 - 1e-9))
    values, results = tensor.reshape(-1).double(), back.reshape(-1).double()
    asked = Fraction(codec.error_bound)
    for group in _range_groups(tensor, codec):
        checked = group[close[group]].tolist()
        if not checked:
            continue
        inputs = values[group][finite.reshape(-1)[group]]
        width = Fraction(float(inputs.max())) - Fraction(float(inputs.min())) if codec.relative else 1
        for i in checked:
            x, y = Fraction(float(values[i])), Fraction(float(results[i]))
            assert abs(y - x) <= asked * width, f"{float(x)} became {float(y)}, bound {asked * width}"


def _range_groups(tensor: Tensor, codec: Bounded) -> list[Tensor]:
    if not codec.relative or codec.relative_to == "tensor":
        return [torch.arange(tensor.numel())]
    tiles = list(tiles_of(tuple(tensor.shape), codec.flat))
    if codec.relative_to == "tile":
        return [tile.reshape(-1) for tile in tiles]
    return [column for tile in tiles for column in tile.T]
