"""The Triton kernels of the `bitpack` packer against the PyTorch reference and an oracle of its own: the same bytes,
always.

Without a GPU they run in Triton's interpreter, which must be chosen before triton is first imported; with one,
compiled.
"""

# ruff: noqa: E402

import os
import sys

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton was imported before its interpreter could be chosen", allow_module_level=True)
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import oracle

from kvferry.codecs.bounded import Bounded, _tile_statistics
from kvferry.codecs.bounded import reference as bounded_reference
from kvferry.codecs.fused import bitpack, bitpack_encode
from kvferry.codecs.fused.compaction import compact
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.fused.stats import tile_stats
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.lossless.reference import SPLITS
from kvferry.codecs.tiling import plan_tensor
from kvferry.packing import PACKERS

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MODES = ("fixed", "plain", "outlier")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
POISON = 0xEE

pytestmark = [
    *([pytest.mark.gpu] if ON_GPU else []),
    # numpy, behind the interpreter, mentions every NaN and overflow.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """Whatever the encoder does not write shows."""
    allocate = bitpack_encode._scratch

    def poisoned(*args):
        scratch, sizes = allocate(*args)
        return scratch.fill_(POISON), sizes.fill_(-1)

    monkeypatch.setattr(bitpack_encode, "_scratch", poisoned)


def bits_of(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def smooth(shape, dtype, seed=0):
    """Like KV cache: channels of different scale and mean, a little smooth along the tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    scale = torch.exp(torch.randn(shape[-1], generator=generator))
    return ((noise.cumsum(-2) * 0.2 + noise + 2 * torch.randn(shape[-1], generator=generator)) * scale).to(dtype)


def awkward(shape, dtype, seed=0):
    """Smooth, with a few of every value that quantisers trip over."""
    x = smooth(shape, dtype, seed)
    info = torch.finfo(dtype)
    values = [
        float("inf"),
        -float("inf"),
        float("nan"),
        -0.0,
        0.0,
        info.smallest_normal,
        info.max,
        info.smallest_normal / 4,
    ]
    generator = torch.Generator().manual_seed(seed + 1)
    flat = x.view(-1)
    places = torch.randperm(flat.numel(), generator=generator)[: 2 * len(values)]
    flat[places] = torch.tensor(values * 2).to(dtype)[: len(places)]
    bits = bits_of(x).view(-1)
    # A NaN with a payload and a sign.
    bits[int(places[0])] = {2: -3 if dtype is torch.bfloat16 else -5, 4: -7}[x.element_size()]
    return x


def check_bounded(x, mode, relative_to="tile", error_bound=0.01, flat=False, with_oracle=True):
    """Statistics, bytes and decoded values of one tensor, `relative_to` None for an absolute bound."""
    codec = Bounded(
        error_bound=error_bound,
        relative=relative_to is not None,
        relative_to=relative_to or "tile",
        mode=mode,
        grouping="flat" if flat else "token",
        packing="bitpack",
    )
    expected = codec.encode(x)
    on_host, host_plan = plan_tensor(x, flat)
    steps = codec.tile_steps(on_host, host_plan)
    channel_steps = steps.step.dim() == 2
    src = on_host if not ON_GPU else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
    plan = DevicePlan.of(host_plan, DEVICE)

    per_tile = (t.to(DEVICE) for t in (steps.step, steps.inverse, steps.bound))
    scratch, sizes = bitpack.encode_bounded(src, plan, *per_tile, mode=mode, channel_steps=channel_steps)
    payload, starts = compact(scratch, sizes)
    assert sizes.tolist() == expected.sizes.tolist()
    assert torch.equal(payload.cpu(), expected.payload)
    if with_oracle:
        tile = on_host.reshape(on_host.shape[-2:])
        of_channels = [
            (t[0] if channel_steps else t.expand(128))[: tile.shape[1]].numpy()
            for t in (steps.step, steps.inverse, steps.bound)
        ]
        assert oracle.encode_bounded(tile, *of_channels, mode, channel_steps) == payload.cpu().numpy().tobytes()

    out = torch.empty_strided(src.shape, src.stride(), dtype=x.dtype, device=DEVICE).fill_(float("nan"))
    status = torch.full_like(sizes, -1)
    bitpack.decode_bounded(payload, starts, sizes, out, plan, mode=mode, channel_steps=channel_steps, status=status)
    assert not status.any()
    check_values(x, out.cpu().reshape(x.shape), codec, steps)
    return payload, starts, sizes


def check_values(x, out, codec, steps):
    finite = x.isfinite()
    assert torch.equal(bits_of(x)[~finite], bits_of(out)[~finite])
    small = x.abs() < torch.finfo(x.dtype).smallest_normal
    assert torch.equal(bits_of(x)[small], bits_of(out)[small])
    if steps.bound.numel():
        error = (x.double() - out.double()).abs()[finite]
        assert not error.numel() or float(error.max()) <= float(steps.bound.max())


CASES = [
    (mode, dtype, shape, relative_to)
    for i, mode in enumerate(MODES)
    for j, dtype in enumerate(FLOATS)
    for shape, relative_to in (
        (((1, 1), (31, 7), (33, 80))[(i + j) % 3], "channel"),
        (((64, 7), (1, 128), (40, 17))[(i + 2 * j) % 3], "tile"),
    )
]


@pytest.mark.parametrize(("mode", "dtype", "shape", "relative_to"), CASES)
def test_bounded_tile_is_what_reference_and_oracle_write(mode, dtype, shape, relative_to):
    check_bounded(awkward(shape, dtype), mode, relative_to)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bounded_full_tile_of_smooth_values(mode, dtype):
    check_bounded(smooth((64, 128), dtype), mode, "channel", with_oracle=False)


@pytest.mark.parametrize("mode", MODES)
def test_values_at_exactly_the_bound(mode):
    """Steps and bounds with few mantissa bits: the rounded difference equals the bound, and its error decides."""
    x = (torch.arange(33 * 9).reshape(33, 9) % 37 - 18).float() * 0.125 + 1e-9
    x[::3] = torch.nextafter(x[::3], torch.zeros(()))
    x[0, 0] = 1 - 2.0**-24
    check_bounded(x, mode, None, error_bound=0.25)
    check_bounded(x.bfloat16(), mode, None, error_bound=0.25)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channel_steps", [False, True])
def test_steps_as_coarse_as_the_dtype(dtype, channel_steps):
    """Rounding to the dtype moves delivered values about: neighbours are taken, and much is stored exactly."""
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(34, 19, generator=generator) * 300).to(dtype)
    # The unit of values from 256 on; coarser where it would need integers above 2**22, or more bits than raw tiles.
    unit = 2.0 ** (8 - {torch.bfloat16: 7, torch.float16: 8, torch.float32: 20}[dtype])
    bound = unit * torch.linspace(0.3, 3.0, 128)
    if not channel_steps:
        bound = bound[40:41]
    step = (2 * bound).bfloat16().float()
    plan = DevicePlan.of(plan_tensor(x, False)[1], DEVICE)
    args = [(t[None] if channel_steps else t).to(DEVICE) for t in (step, 1 / step, bound)]
    scratch, sizes = bitpack.encode_bounded(x.to(DEVICE), plan, *args, mode="fixed", channel_steps=channel_steps)
    of_channels = [t.expand(128)[:19].numpy() for t in (step, 1 / step, bound)]
    expected = oracle.encode_bounded(x, *of_channels, "fixed", channel_steps)
    assert compact(scratch, sizes)[0].cpu().numpy().tobytes() == expected
    assert expected[0] == 1


@pytest.mark.parametrize("tokens", [16, 17, 49])
def test_what_a_base_must_save(tokens):
    """A first value one bit wider than the rest pays for a base from 17 tokens on."""
    x = torch.ones(tokens, 5).cumsum(0).remainder(2) + torch.tensor([0.0, 2.0, 3.0, 5.0, 9.0])
    check_bounded(x, "outlier", None, error_bound=0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(33, 5),
        torch.full((33, 5), -0.0),
        torch.full((33, 5), 3.25),
        torch.full((33, 5), float("nan")),
        torch.tensor([1e30, -1e-30, 5.0, 1e-42, -7e37]).repeat(33, 1),
        torch.full((33, 5), 1e-40),
    ],
    ids=["zeros", "negative zeros", "constant", "nan", "huge range", "denormals"],
)
def test_bounded_special_tiles(values, mode):
    dtype = (torch.float32, torch.bfloat16)[MODES.index(mode) % 2]
    check_bounded(values.to(dtype), mode, "tile")
    check_bounded(values.to(dtype), mode, None, error_bound=1e-38)


def test_large_first_values_are_kept_apart():
    x = smooth((64, 48), torch.float32) + 1e4 * (torch.arange(48) % 3)
    payload, _, _ = check_bounded(x, "outlier", None, error_bound=0.05)
    assert payload.numel() < check_bounded(x, "plain", None, error_bound=0.05)[0].numel()


@pytest.mark.parametrize("mode", MODES)
def test_bounded_strides(mode):
    rows = smooth((35, 2, 33), torch.bfloat16)
    check_bounded(rows.transpose(0, 1), mode, with_oracle=False)
    check_bounded(smooth((20, 34), torch.float16).mT, mode, with_oracle=False)
    check_bounded(smooth((34, 20), torch.float32)[1:, 3:], mode, with_oracle=False)


def test_bounded_flat():
    check_bounded(smooth((3, 70), torch.bfloat16), "plain", "tile", flat=True, with_oracle=False)


def check_lossless(x):
    expected = Lossless(packing="bitpack").encode(x)
    on_host, host_plan = plan_tensor(x, False)
    src = on_host if not ON_GPU else on_host.to(DEVICE)
    plan = DevicePlan.of(host_plan, DEVICE)
    scratch, sizes = bitpack.encode_lossless(src, plan)
    payload, starts = compact(scratch, sizes)
    assert sizes.tolist() == expected.sizes.tolist()
    assert torch.equal(payload.cpu(), expected.payload)
    if plan.num_tiles == 1:
        words = (bits_of(x).long() & ((1 << 8 * x.element_size()) - 1)).reshape(-1, x.shape[-1]).tolist()
        name = str(x.dtype).removeprefix("torch.")
        assert oracle.encode_lossless(words, name) == payload.cpu().numpy().tobytes()
    out = torch.empty_like(src)
    out.view(INTEGERS[x.element_size()]).fill_(POISON)
    status = torch.full_like(sizes, -1)
    bitpack.decode_lossless(payload, starts, sizes, out, plan, status=status)
    assert not status.any()
    assert torch.equal(bits_of(out.cpu()), bits_of(x))


@pytest.mark.parametrize("dtype", FLOATS + FP8)
@pytest.mark.parametrize("shape", [(1, 1), (31, 7), (33, 80), (64, 128)])
def test_lossless_tile_is_what_reference_and_oracle_write(dtype, shape):
    check_lossless(smooth(shape, torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS + FP8)
def test_lossless_of_random_bits(dtype):
    generator = torch.Generator().manual_seed(3)
    random = torch.randint(0, 256, (33, 21 * dtype.itemsize), generator=generator, dtype=torch.uint8)
    check_lossless(random.view(dtype))
    check_lossless(random[:1, : dtype.itemsize].contiguous().view(dtype))


def test_lossless_strides():
    check_lossless(smooth((35, 2, 33), torch.bfloat16).transpose(0, 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics(dtype):
    x = awkward((2, 70, 33), dtype)
    host_plan = plan_tensor(x, False)[1]
    low, high, exponent_sum = _tile_statistics(x, host_plan, ranges=True)
    stats = tile_stats(x.to(DEVICE), DevicePlan.of(host_plan, DEVICE))
    assert torch.equal(stats.minimum.cpu(), low)
    assert torch.equal(stats.maximum.cpu(), high)
    assert stats.exponent_sum.tolist() == exponent_sum.tolist()
    only_sums = tile_stats(x.to(DEVICE), DevicePlan.of(host_plan, DEVICE), ranges=False)
    assert only_sums.exponent_sum.tolist() == exponent_sum.tolist()
    assert only_sums.minimum.shape == low.shape


def test_compaction_keeps_to_the_payload():
    sizes = torch.tensor([8, 4112, 4, 0, 20], dtype=torch.int32, device=DEVICE)
    scratch = torch.arange(5 * 4112, device=DEVICE).to(torch.uint8).reshape(5, 4112)
    expected = torch.cat([row[:size] for row, size in zip(scratch, sizes.tolist(), strict=True)])
    payload, starts = compact(scratch, sizes)
    assert torch.equal(payload, expected)
    assert starts.tolist() == [0, 8, 4120, 4124, 4124]
    assert torch.equal(compact(scratch, sizes, total=6000)[0][: len(expected)], expected)
    assert torch.equal(compact(scratch, sizes, total=100)[0], expected[:100])


def test_empty_plan():
    x = torch.zeros(0, 8, dtype=torch.bfloat16, device=DEVICE)
    plan = DevicePlan.of(plan_tensor(x, False)[1], DEVICE)
    scratch, sizes = bitpack.encode_lossless(x, plan)
    payload, starts = compact(scratch, sizes)
    bitpack.decode_lossless(payload, starts, sizes, x, plan, status=torch.empty_like(sizes))
    assert payload.numel() == 0


def damaged_tiles(tile: bytes, generator: np.random.Generator, count: int) -> list[bytes]:
    """The tile with bytes changed (in its first ones more often, where the sizes are) or cut off, always whole
    words."""
    result = []
    for i in range(count):
        data = bytearray(tile)
        for _ in range(generator.integers(1, 4)):
            reach = (16, 64, len(data))[generator.integers(3)]
            data[generator.integers(min(reach, len(data)))] = generator.integers(256)
        keep = len(data) if i % 3 else 4 * generator.integers(1, len(data) // 4 + 1)
        result.append(bytes(data[:keep]))
    return result


def expected_status(tile: bytes, tokens: int, channels: int, layout, payload, start: int) -> int:
    raw_bytes = 4 + -(-tokens * channels * layout.itemsize // 4) * 4
    if tile[0] == 0:
        return int(len(tile) != raw_bytes)
    if tile[0] != 1 or not 16 <= len(tile) < raw_bytes:
        return 1
    at, size = torch.tensor([start]), torch.tensor([len(tile)])
    return 1 - int(PACKERS["bitpack"].unpack(payload, at, size, tokens, channels, layout).good[0])


@pytest.mark.parametrize("mode", [*MODES, "lossless"])
def test_damaged_tiles_are_found_or_decoded_and_stay_in_their_place(mode):
    """Every tile's bytes lie between other bytes, which are changed: what is decoded must not depend on them."""
    tokens, channels, count = 33, 7, 16
    x = awkward((tokens, channels), torch.bfloat16)
    if mode == "lossless":
        encoded, layout = Lossless(packing="bitpack").encode(x), SPLITS[x.dtype].layout()
    else:
        encoded = Bounded(error_bound=0.02, relative_to="channel", mode=mode, packing="bitpack").encode(x)
        layout = bounded_reference.layout(x.dtype, mode, True)
    tiles = damaged_tiles(encoded.payload.numpy().tobytes(), np.random.default_rng(len(mode)), count)
    tiles += [bytes([0]) + bytes(3), encoded.payload.numpy().tobytes()]
    starts = np.cumsum([8] + [len(tile) + 8 for tile in tiles[:-1]])
    sizes = torch.tensor([len(tile) for tile in tiles], dtype=torch.int32, device=DEVICE)
    # Every second row and column of the tensor belongs to no tile.
    shape = (len(tiles), tokens, 2, channels, 2)
    results = []
    for filler in (b"\0", b"\xff"):
        payload = torch.frombuffer(bytearray(filler * 8 + b"".join(t + filler * 8 for t in tiles)), dtype=torch.uint8)
        out = torch.zeros(shape, dtype=torch.int16, device=DEVICE).fill_(POISON).view(torch.bfloat16)
        target = out[:, :, 0, :, 0]
        plan = DevicePlan.of(plan_tensor(target, False)[1], DEVICE)
        status = torch.full_like(sizes, -1)
        args = (payload.to(DEVICE), torch.from_numpy(starts).to(DEVICE), sizes, target, plan)
        if mode == "lossless":
            bitpack.decode_lossless(*args, status=status)
        else:
            bitpack.decode_bounded(*args, mode=mode, channel_steps=True, status=status)
        expected = [
            expected_status(tile, tokens, channels, layout, payload, int(start))
            for tile, start in zip(tiles, starts, strict=True)
        ]
        assert status.tolist() == expected
        bits = out.view(torch.int16).cpu()
        assert (bits[:, :, 1] == POISON).all()
        assert (bits[..., 1] == POISON).all()
        assert (bits[status.cpu() == 1] == POISON).all()
        results.append(bits)
    assert torch.equal(*results)
    assert 0 < sum(expected) < len(tiles)
    assert expected[-1] == 0


def plain_tile(classes: bytes = b"", class0: int = 0, low_words: int = 0, positions: tuple[int, ...] = ()) -> bytes:
    """A bfloat16 tile of mode plain whose sizes add up."""
    stored = b"".join(p.to_bytes(2, "little") for p in positions)
    stored += bytes(-len(stored) % 4)
    header = bytes([1, 0, 2 if classes else 0, class0, 0, 0, len(positions), 0]) + bytes(8)
    return header + classes + bytes(-len(classes) % 4) + bytes(4 * low_words) + 2 * stored


@pytest.mark.parametrize(
    ("tokens", "tile", "bad"),
    [
        (2, plain_tile(), 0),
        (2, plain_tile(positions=(0, 13)), 0),
        (2, plain_tile(positions=(0, 14)), 1),
        (2, plain_tile(positions=(0, 0xFFFF)), 1),
        (2, plain_tile(positions=(0, 1, 2, 3)), 1),
        (32, plain_tile(classes=bytes([0, 32, 0, 0, 0, 0, 0]), low_words=32), 0),
        (32, plain_tile(classes=bytes([0, 33, 0, 0, 0, 0, 0]), low_words=33), 1),
    ],
    ids=["zeros", "last", "behind last", "far behind", "as large as raw", "widest", "too wide"],
)
def test_tiles_whose_sections_add_up(tokens, tile, bad):
    x = torch.ones(tokens, 7, dtype=torch.bfloat16, device=DEVICE)
    plan = DevicePlan.of(plan_tensor(x, False)[1], DEVICE)
    payload = torch.frombuffer(bytearray(tile), dtype=torch.uint8)
    layout = bounded_reference.layout(x.dtype, "plain", False)
    assert expected_status(tile, tokens, 7, layout, payload, 0) == bad
    starts = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    sizes = torch.tensor([len(tile)], dtype=torch.int32, device=DEVICE)
    status = torch.full_like(sizes, -1)
    args = (payload.to(DEVICE), starts, sizes, x, plan)
    bitpack.decode_bounded(*args, mode="plain", channel_steps=False, status=status)
    assert status.tolist() == [bad]
    assert bool((x == 1).all()) == bool(bad)


def test_tiles_outside_the_payload_or_between_words_are_refused():
    x = smooth((33, 7), torch.bfloat16)
    payload = Lossless(packing="bitpack").encode(x).payload
    size = len(payload)
    padded = torch.cat([payload, torch.zeros(8, dtype=torch.uint8)]).to(DEVICE)
    plan = DevicePlan.of(plan_tensor(x, False)[1], DEVICE)
    for start, length, bad in ((0, size, 0), (-4, size, 1), (12, size, 1), (2, size, 1), (0, size - 2, 1), (0, 0, 1)):
        out = torch.zeros_like(x, device=DEVICE)
        status = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
        starts = torch.tensor([start], device=DEVICE)
        bitpack.decode_lossless(padded, starts, torch.full_like(status, length), out, plan, status=status)
        assert status.tolist() == [bad]
        assert torch.equal(out.cpu(), x) != bool(bad)


def test_payload_at_an_odd_address():
    x = smooth((33, 7), torch.bfloat16)
    payload = Lossless(packing="bitpack").encode(x).payload
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), payload]).to(DEVICE)[1:]
    plan = DevicePlan.of(plan_tensor(x, False)[1], DEVICE)
    out = torch.zeros_like(x, device=DEVICE)
    status = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    sizes = torch.full_like(status, len(payload))
    bitpack.decode_lossless(shifted, torch.zeros(1, dtype=torch.int64, device=DEVICE), sizes, out, plan, status=status)
    assert torch.equal(out.cpu(), x)


def test_unsupported_dtypes_are_refused():
    x = torch.zeros(4, 4, dtype=torch.float64)
    plan = DevicePlan.of(plan_tensor(x, False)[1], "cpu")
    with pytest.raises(TypeError, match="float64"):
        bitpack.encode_lossless(x, plan)
    with pytest.raises(TypeError, match="float8"):
        tile_stats(x.to(torch.float8_e5m2), plan)
