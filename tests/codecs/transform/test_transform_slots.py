"""Slots of the transform codec: what comes back, what does not fit, what is damaged; and that a GPU makes the
reference's bytes."""

import math

import pytest
import torch
from torch import Tensor

import kvferry
from contract.cases import HAS_CUDA
from kvferry import PagedKV, Profile, Rope, SlotCodec, Transform
from kvferry.codecs.fitting import SCALES
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for
from kvferry.codecs.transform import l2_bound, relative_error
from kvferry.codecs.transform.profile import Layer, SideProfile
from kvferry.format.slot import SlotHeader, SlotState, SlotStatus

PAGES, PAGE_TOKENS = 12, 16
TABLE = torch.tensor([[3, 1, 4, 0, 7], [8, 2, 6, -1, 9]], dtype=torch.int32)
POSITIONS = torch.tensor([100, 164], dtype=torch.int32)


def profile(
    head_dim: int = 32, heads: int = 4, group: int = 2, rotary: int = 32, interleaved: bool = False, layers: int = 2
) -> Profile:
    """Random bases, means and steps."""
    generator = torch.Generator().manual_seed(head_dim + 7 * group + rotary)
    groups, n = heads // group, group * head_dim
    rope = Rope(head_dim, rotary, tuple(1e4 ** (-2 * i / max(rotary, 1)) for i in range(rotary // 2)), interleaved)

    def side(step: float) -> SideProfile:
        basis = torch.linalg.qr(torch.randn(groups, n, n, generator=generator, dtype=torch.float64))[0]
        return SideProfile.of(torch.randn(groups, n, generator=generator), basis, step)

    return Profile(tuple(Layer(side(0.3), side(0.2)) for _ in range(layers)), heads, head_dim, group, rope)


def engine(
    of: Profile, dtype: torch.dtype = torch.bfloat16, layout: str = "heads_first", seed: int = 1
) -> list[Tensor]:
    """Layers of a paged cache, filled with values whose channels differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = of.heads, of.head_dim
    shape = {
        "heads_first": (PAGES, heads, PAGE_TOKENS, 2 * dim),
        "kv_first": (2, PAGES, PAGE_TOKENS, heads, dim),
    }[layout]
    scales = torch.logspace(-1, 0.5, shape[-1])
    return [(torch.randn(shape, generator=generator) * scales + 0.5).to(dtype) for _ in of.layers]


def paged(tensors: list[Tensor], of: Profile, layout: str = "heads_first") -> PagedKV:
    return PagedKV.heads_first(tensors, of.head_dim) if layout == "heads_first" else PagedKV.kv_first(tensors)


def names(chunks: int) -> Tensor:
    return torch.arange(2 * chunks).view(chunks, 2) * 0x9E3779B97F4A7C1


def encoded(kv: PagedKV, codec: Transform, ratio: float | None = None, **options: object) -> tuple[SlotCodec, Tensor]:
    """The slots of TABLE's chunks, in reverse order, on kv's device."""
    pages = TABLE.shape[1]
    size = raw_slot_bytes(kv, pages, codec) if ratio is None else slot_bytes_for(kv, codec, pages, ratio)
    slot_codec = SlotCodec(kv, codec, pages, size, **options)  # type: ignore[arg-type]
    slots = torch.zeros(2, size, dtype=torch.uint8, device=kv.device)
    index = torch.tensor([1, 0], dtype=torch.int32, device=kv.device)
    to = kv.device
    slot_codec.encode(TABLE.to(to), slots, index, names(2).to(to), POSITIONS.to(to))
    return slot_codec, slots


def decoded(slot_codec: SlotCodec, slots: Tensor, table: Tensor = TABLE) -> list[int]:
    """Decode into the codec's own pages; statuses."""
    to = slot_codec.kv.device
    status = torch.full((2,), -1, dtype=torch.int32, device=to)
    index = torch.tensor([1, 0], dtype=torch.int32, device=to)
    slot_codec.decode(slots, index, table.to(to), names(2).to(to), status, POSITIONS.to(to))
    return status.tolist()


def vectors(tensors: list[Tensor], of: Profile) -> list[tuple[SideProfile, Tensor]]:
    """Of each layer and side, values `[groups, pages, tokens, n]` in float64 (heads first)."""
    found = []
    for layer, tensor in zip(of.layers, tensors, strict=True):
        for part, half in zip(layer, tensor.split(of.head_dim, 3), strict=True):
            grouped = half.double().unflatten(1, (of.groups, -1)).permute(1, 0, 3, 2, 4).flatten(3)
            found.append((part, grouped))
    return found


CASES = {
    "per layer": (profile(group=4), torch.bfloat16),
    "groups of two": (profile(), torch.bfloat16),
    "per head, half": (profile(group=1), torch.float16),
    "part rotary": (profile(head_dim=64, heads=2, group=2, rotary=32), torch.bfloat16),
    "interleaved": (profile(rotary=32, interleaved=True), torch.bfloat16),
    "no rope": (profile(head_dim=48, heads=2, group=1, rotary=0), torch.bfloat16),
    "uneven segments": (profile(head_dim=144, heads=2, group=1, rotary=144, layers=1), torch.bfloat16),
    "two segments": (profile(head_dim=160, heads=1, group=1, rotary=160, layers=1), torch.bfloat16),
    "per head, 128": (profile(head_dim=128, heads=2, group=1, rotary=128, layers=1), torch.bfloat16),
    "per layer, 256": (profile(head_dim=128, heads=2, group=2, rotary=128, layers=1), torch.bfloat16),
    "per layer, 256 of 64": (profile(head_dim=64, heads=4, group=4, rotary=64, layers=1), torch.float16),
    "many channels": (profile(head_dim=128, heads=5, group=5, rotary=128, layers=1), torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_every_vector_comes_back_within_the_bound(name: str) -> None:
    of, dtype = CASES[name]
    before = engine(of, dtype)
    tensors = [tensor.clone() for tensor in before]
    slot_codec, slots = encoded(paged(tensors, of), Transform(of))
    for tensor in tensors:
        tensor.fill_(77)
    assert decoded(slot_codec, slots) == [0, 0]
    used = TABLE[TABLE >= 0].long()
    for (part, x), (_, y) in zip(vectors(before, of), vectors(tensors, of), strict=True):
        error = (y - x)[:, used].norm(dim=-1)
        unit = y[:, used].abs() * torch.finfo(dtype).eps / 2
        distance = x[:, used].norm(dim=-1) + part.mean.double().norm(dim=-1)[:, None, None]
        assert bool((error <= l2_bound(part, 1.0) + relative_error(part) * distance + unit.norm(dim=-1)).all())
        assert float(error.max()) > l2_bound(part, 1.0) / 8, "the test must not pass on exact values"
    unused = [page for page in range(PAGES) if page not in used.tolist()]
    assert all(bool((tensor[unused] == 77).all()) for tensor in tensors)


def test_blocks_that_are_not_finite_come_back_bit_for_bit() -> None:
    of, _ = CASES["groups of two"]
    before = engine(of)
    before[0][4, 1, 3, 5] = math.nan  # K of head 1, in the first chunk's first block
    before[1][9, 3, 2, 40] = -math.inf  # V of head 3, in the second chunk's second block
    tensors = [tensor.clone() for tensor in before]
    slot_codec, slots = encoded(paged(tensors, of), Transform(of))
    for tensor in tensors:
        tensor.zero_()
    assert decoded(slot_codec, slots) == [0, 0]
    same = before[0][[3, 1, 4, 0]][:, :2, :, :32], tensors[0][[3, 1, 4, 0]][:, :2, :, :32]
    assert torch.equal(same[0].contiguous().view(torch.int16), same[1].contiguous().view(torch.int16))
    assert torch.equal(before[1][9, 2:, :, 32:], tensors[1][9, 2:, :, 32:])
    others = before[0][4, 2:].float() - tensors[0][4, 2:].float()
    assert 0 < float(others.abs().max()) < 1.5


def test_a_part_of_a_chunk() -> None:
    of, _ = CASES["per layer"]
    tensors = engine(of)
    slot_codec, slots = encoded(paged(tensors, of), Transform(of))
    assert decoded(slot_codec, slots) == [0, 0]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(77)
    some = torch.tensor([[-1, 1, -1, -1, 7], [-1, -1, -1, -1, -1]], dtype=torch.int32)
    assert decoded(slot_codec, slots, some) == [0, 0]
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(tensor[[1, 7]], wanted[[1, 7]])
        assert bool((tensor[[3, 4, 0, 8, 2]] == 77).all())


def test_what_does_not_fit_is_relaxed_or_rejected() -> None:
    of, _ = CASES["groups of two"]
    kv = paged(engine(of), of)
    codec = Transform(of, error_bound=0.05)
    _, slots = encoded(kv, codec, ratio=3.0)
    header = SlotHeader.unpack(slots[1, :64].numpy().tobytes())
    assert (header.codec, header.state, header.dtype) == ("transform", SlotState.USABLE, torch.bfloat16)
    assert header.relaxed > 0
    assert header.bound_used == pytest.approx(0.025 * 2**header.relaxed)
    slot_codec, slots = encoded(kv, codec, ratio=3.0, on_overflow="reject")
    assert decoded(slot_codec, slots) == [SlotStatus.REJECTED] * 2


@pytest.mark.parametrize("ratio", [2.0, 3.5, 6.0])
def test_a_fixed_rate_uses_its_slot(ratio: float) -> None:
    """Chunks of different scales, each at the finest bound that fits; the bound of each holds."""
    of, _ = CASES["groups of two"]
    before = engine(of)
    for tensor in before:
        tensor[TABLE[1].clamp(min=0).long()] *= 3
    tensors = [tensor.clone() for tensor in before]
    slot_codec, slots = encoded(paged(tensors, of), Transform(of, ratio=ratio), ratio=ratio)
    headers = [SlotHeader.unpack(slots[number, :64].numpy().tobytes()) for number in (1, 0)]
    room = slot_codec.slot_bytes - slot_codec.payload_at
    for number, header in enumerate(headers):
        assert (header.state, header.relaxed) == (SlotState.USABLE, 0)
        level = SCALES.index(2 * header.bound_used)
        finer = Transform(of, error_bound=SCALES[level - 1])
        _, rejected = encoded(paged([t.clone() for t in before], of), finer, ratio=ratio, on_overflow="reject")
        fits = SlotHeader.unpack(rejected[1 - number, :64].numpy().tobytes()).state is SlotState.USABLE
        assert not fits or (room - header.payload_bytes) * 64 <= room
    assert headers[1].bound_used > headers[0].bound_used
    for tensor in tensors:
        tensor.fill_(77)
    assert decoded(slot_codec, slots) == [0, 0]
    for (part, x), (_, y) in zip(vectors(before, of), vectors(tensors, of), strict=True):
        for header, pages in zip(headers, TABLE.long(), strict=True):
            used = pages[pages >= 0]
            error = (y - x)[:, used].norm(dim=-1)
            unit = y[:, used].abs() * torch.finfo(torch.bfloat16).eps / 2
            distance = x[:, used].norm(dim=-1) + part.mean.double().norm(dim=-1)[:, None, None]
            most = l2_bound(part, 2 * header.bound_used) + relative_error(part) * distance + unit.norm(dim=-1)
            assert bool((error <= most).all())


def test_a_fixed_rate_that_no_bound_gives_is_rejected() -> None:
    of, _ = CASES["groups of two"]
    before = engine(of)
    before[0][TABLE[0].long()] = math.nan  # kept bit for bit, whatever the bound
    slot_codec, slots = encoded(paged(before, of), Transform(of, ratio=8.0), ratio=8.0)
    assert decoded(slot_codec, slots) == [SlotStatus.REJECTED, SlotStatus.GOOD]


def test_a_bad_slot_touches_no_page() -> None:
    of, _ = CASES["groups of two"]
    tensors = engine(of)
    slot_codec, slots = encoded(paged(tensors, of), Transform(of))
    for tensor in tensors:
        tensor.fill_(77)
    slots[1, slot_codec.payload_at + 5000] ^= 4
    slots[0, 40] ^= 1
    assert decoded(slot_codec, slots) == [SlotStatus.CORRUPT, SlotStatus.NO_SLOT]
    assert all(bool((tensor == 77).all()) for tensor in tensors)


def test_another_profile_is_another_kind_of_slot() -> None:
    of, _ = CASES["groups of two"]
    tensors = engine(of)
    _, slots = encoded(paged(tensors, of), Transform(of))
    other = of.with_steps([(0.1, 0.1)] * 2)
    slot_codec, _ = encoded(paged(tensors, of), Transform(other))
    assert decoded(slot_codec, slots) == [SlotStatus.OTHER_KIND] * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": 0, "side": "k"}, ValueError, "layer 0 alone"),
        ({"profile": profile(heads=2)}, kvferry.ProfileMismatch, "2 heads of 32"),
    ],
)
def test_codecs_that_slots_do_not_take(change: dict[str, object], error: type[Exception], message: str) -> None:
    of, _ = CASES["groups of two"]
    codec = Transform(**{"profile": of, **change})  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        SlotCodec(paged(engine(of), of), codec, 5, 1 << 20)


@pytest.mark.parametrize(
    ("error_bound", "relaxations", "message"),
    [
        (1.0, 13, "max_relaxations=13 must be 0 to 12"),
        (33.0, 9, "error_bound=33, doubled up to 9 times"),
        (2e4, 0, "error_bound=20000, doubled up to 0 times"),
    ],
)
def test_bounds_that_would_swallow_marks_are_refused(error_bound: float, relaxations: int, message: str) -> None:
    of, _ = CASES["groups of two"]
    kv = paged(engine(of), of)
    with pytest.raises(ValueError, match=message):
        SlotCodec(kv, Transform(of, error_bound=error_bound), 5, 1 << 20, max_relaxations=relaxations)


def test_marks_survive_the_largest_bound() -> None:
    of, _ = CASES["groups of two"]
    before = engine(of)
    before[0][4, 1, 3, 5] = math.nan
    tensors = [tensor.clone() for tensor in before]
    slot_codec, slots = encoded(paged(tensors, of), Transform(of, error_bound=16384.0), max_relaxations=0)
    for tensor in tensors:
        tensor.zero_()
    assert decoded(slot_codec, slots) == [0, 0]
    same = before[0][[3, 1, 4, 0]][:, :2, :, :32], tensors[0][[3, 1, 4, 0]][:, :2, :, :32]
    assert torch.equal(same[0].contiguous().view(torch.int16), same[1].contiguous().view(torch.int16))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_mark_is_not_taken_from_another_chunk(device: str) -> None:
    """A chunk whose first page is not wanted, after one whose values were kept as they are."""
    if device == "cuda" and not HAS_CUDA:
        pytest.skip("no CUDA device")
    of, _ = CASES["groups of two"]
    tensors = [tensor.to(device) for tensor in engine(of)]
    tensors[0][TABLE[0, 0], 1, 3, 5] = math.nan
    slot_codec, slots = encoded(paged(tensors, of), Transform(of))

    def decode(chunk: int, table: Tensor) -> list[Tensor]:
        status = torch.full((1,), -1, dtype=torch.int32, device=device)
        index, named = torch.tensor([1 - chunk], dtype=torch.int32), names(2)[chunk, None]
        arguments = (index, table[None], named, status, POSITIONS[chunk, None])
        slot_codec.decode(slots, *(argument.to(device) for argument in arguments))
        assert status.tolist() == [0]
        return [tensor.cpu().clone() for tensor in tensors]

    wanted = TABLE[1].clone()
    wanted[0] = -1
    expected = decode(1, TABLE[1])
    for tensor in tensors:
        tensor.zero_()
    decode(0, TABLE[0])
    found = decode(1, wanted)
    pages = wanted[wanted >= 0].long()
    for left, right in zip(expected, found, strict=True):
        assert torch.equal(left[pages].view(torch.int16), right[pages].view(torch.int16))


def test_positions_are_checked() -> None:
    of, _ = CASES["groups of two"]
    kv = paged(engine(of), of)
    slot_codec, slots = encoded(kv, Transform(of))
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"positions is .*int64"):
        slot_codec.encode(TABLE, slots, index, names(2), POSITIONS.long())
    with pytest.raises(ValueError, match="max_positions=0"):
        SlotCodec(kv, Transform(of), 5, slots.shape[1], max_positions=0)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("nasty", [False, True], ids=["plain", "nasty"])
@pytest.mark.parametrize("layout", ["heads_first", "kv_first"])
@pytest.mark.parametrize("name", CASES)
def test_the_gpu_makes_the_references_bytes(name: str, layout: str, nasty: bool) -> None:
    of, dtype = CASES[name]
    original = engine(of, dtype, layout)
    if nasty:
        generator = torch.Generator().manual_seed(5)
        for tensor in original:
            chance = torch.rand(tensor.shape, generator=generator)
            tensor[chance < 1e-4] = math.nan
            tensor[(chance > 0.1) & (chance < 0.11)] = 0.0
            tensor[(chance > 0.2) & (chance < 0.2001)] = 3e4
            tensor[..., 0] *= 1e-4
        of = of.with_steps([(1e-4, 1e-3)] * len(of.layers))
    packing = "bitpack" if nasty else "ans"
    loose, fixed = Transform(of, packing=packing), Transform(of, packing=packing, ratio=2.5)
    for codec, ratio in ((loose, None), (loose, 2.5), (fixed, 2.5), (fixed, 5.0)):
        tensors, on_gpu = [tensor.clone() for tensor in original], [tensor.cuda() for tensor in original]
        slot_codec, expected = encoded(paged(tensors, of, layout), codec, ratio)
        gpu_codec, found = encoded(paged(on_gpu, of, layout), codec, ratio)
        for number in range(2):
            header = SlotHeader.unpack(expected[number, :64].numpy().tobytes())
            end = 64 if header.state is SlotState.REJECTED else slot_codec.payload_at + header.payload_bytes
            assert torch.equal(expected[number, :end], found[number, :end].cpu()), header
        for tensor in (*tensors, *on_gpu):
            tensor.fill_(77)
        assert decoded(slot_codec, expected) == decoded(gpu_codec, expected.cuda())
        for left, right in zip(tensors, on_gpu, strict=True):
            assert torch.equal(left.view(torch.int16), right.cpu().view(torch.int16))
