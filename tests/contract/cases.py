"""What the contract is tested on: codecs with all parameters, inputs, and bounds computed independently."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

import kvferry
from contract.profiles import ROPES, assert_within_profile, make_profile, stored_blocks
from kvferry import BlockSpec, Bounded, Codec, Lossless, Raw, Transform

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


MEDIUM = (2, 97, 150)
"""Full and partial token blocks, two unequal channel segments; flat grouping: tiles of all three kinds. For
`Transform`, two heads."""


def transform(heads: int, head_dim: int, turn: int = 0, **parameters: object) -> Transform:
    """For tensors `[..., heads, tokens, head_dim]`; the turn chooses RoPE, groups, layer and side."""
    groups = [size for size in range(1, heads + 1) if heads % size == 0 and size * head_dim <= 512] or [1]
    profile = make_profile(heads, head_dim, groups[turn % len(groups)], ROPES[turn // 2 % len(ROPES)])
    return Transform(profile, turn // 2 % 2, "vk"[turn % 3 > 0], **parameters)  # type: ignore[arg-type]


CASES: dict[str, list[Codec]] = {
    "raw": [Raw()],
    "lossless": [Lossless(packing) for packing in PACKINGS],
    "bounded": [bounded(*choice) for choice in itertools.product(MODES, GROUPINGS, PACKINGS, RELATIVE_TO)],
    "transform": [
        transform(2, 150, 1),
        transform(2, 150, 2, packing="bitpack", first_position=5000),
        transform(2, 150, 3, error_bound=0.25),
        transform(2, 150, 4, packing="bitpack", error_bound=3.0),
        transform(2, 150, 5, ratio=2.0),
    ],
}
"""Every built-in codec with all its parameters. A codec that `kvferry.codecs()` lists must be here."""


def case_id(case: object) -> str:
    if isinstance(case, Bounded):
        return f"bounded-{case.mode}-{case.grouping}-{case.packing}-{case.relative_to if case.relative else 'absolute'}"
    if isinstance(case, Transform):
        asked = f"{case.error_bound:g}" if case.ratio is None else f"ratio{case.ratio:g}"
        return f"transform-{case.side}{case.layer}-of{case.profile.group_heads}-{case.packing}-{asked}"
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


def some_cases(turn: int, shape: tuple[int, ...] = ()) -> list[tuple[Codec, torch.dtype]]:
    """Nine cases for input number `turn`, others for other inputs: each pair of parameters meets in some of them.
    One more for a `shape` that has heads."""
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
    if len(shape) > 2 and shape[-3] and shape[-1]:
        chosen.append((transform(shape[-3], shape[-1], turn, packing=PACKINGS[turn // 3 % 2]), FLOATS[turn % 2]))
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


@cache
def medium_input(dtype: torch.dtype, codec: Codec | None = None) -> tuple[Tensor, Tensor]:
    """Values of the shape `MEDIUM`, and which of them `codec` promises to bring back bit for bit (bool)."""
    tensor, special = with_specials(gaussian(MEDIUM, dtype))
    if isinstance(codec, Transform):
        # Of its blocks only the last, or every one would be stored as it is.
        spared = torch.zeros(MEDIUM, dtype=torch.bool)
        spared[-1, 64:] = True
        tensor = torch.where(spared | tensor.isfinite(), tensor, 0)
        special = special & stored_blocks(tensor, codec.profile.group_heads)
    return tensor, special


def assert_kept(tensor: Tensor, frame: bytes, back: Tensor, codec: Codec) -> None:
    """What `codec` promises about `back`, decoded from `frame`, which was made of `tensor`."""
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype
    assert len(frame) <= codec.max_encoded_bytes(BlockSpec.of(tensor))
    info = kvferry.inspect(frame)
    if codec.exact:
        assert torch.equal(bits_of(back), bits_of(tensor))
    elif isinstance(codec, Transform):
        assert_within_profile(tensor, back, codec, info.error_bound, info.bound_used)
        assert codec.ratio is not None or info.error_bound == codec.error_bound
        assert codec.ratio is None or info.ratio >= codec.ratio
    else:
        assert isinstance(codec, Bounded), "say here what this codec promises"
        assert_within_bounds(tensor, back, codec, info.bound_used)


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
