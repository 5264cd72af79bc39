"""The GPU's kernels, run on the CPU, make the reference's bytes and give its values back: slots of pages of every sort,
chunks that are tried again, transforms, frames."""

from typing import Any

import pytest
import torch
from emulated import gpu  # noqa: F401  a fixture
from torch import Tensor

import kvferry
from contract import slot_cases
from contract.cases import bits_of, case_id
from contract.profiles import make_profile
from contract.slot_cases import TABLE, Engine, identities_of, noise, take_apart
from kvferry import Bounded, Codec, Lossless, PagedKV, Raw, SlotCodec, Transform
from kvferry.codecs.fused import frames, kernels
from kvferry.codecs.fused import slots as fused
from kvferry.codecs.fused import transform as fused_transform
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for
from kvferry.codecs.tiling import plan_tensor
from kvferry.codecs.transform import slots as transform_slots
from kvferry.format.frame import read_frame
from kvferry.format.slot import SlotStatus

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
pytestmark = pytest.mark.usefixtures("gpu")


def encode(slot_codec: SlotCodec, table: Tensor) -> Tensor:
    """As `slot_cases.encode`, by the kernels."""
    slots = torch.full((len(table), slot_codec.slot_bytes), 0xEE, dtype=torch.uint8)
    index = torch.arange(len(table), dtype=torch.int32)
    fused.encode(slot_codec, table.int(), slots, index, identities_of(len(table)))
    return slots


def decode(slot_codec: SlotCodec, slots: Tensor, table: Tensor) -> list[int]:
    """As `slot_cases.decode`, by the kernels."""
    status = torch.full((len(table),), 77, dtype=torch.int32)
    index = torch.arange(len(table), dtype=torch.int32)
    fused.decode(slot_codec, slots, index, table.int(), identities_of(len(table)), status)
    found: list[int] = status.tolist()
    return found


def used(slots: Tensor) -> list[bytes]:
    return [take_apart(slot).used for slot in slots]


def assert_values_of_the_reference(slot_codec: SlotCodec, slots: Tensor, table: Tensor, *sizes: Any) -> None:
    """Good chunks in `slots` leave the same pages of engines of `sizes` by the kernels as by the reference."""
    layout, dtype, page_tokens, head_dim = sizes
    back, wanted = (Engine(layout, dtype, layers=1, page_tokens=page_tokens, head_dim=head_dim) for _ in range(2))
    of_back, of_wanted = (
        SlotCodec(each.kv, slot_codec.codec, slot_codec.chunk_pages, slot_codec.slot_bytes) for each in (back, wanted)
    )
    assert decode(of_back, slots, table) == [0] * len(slots)
    slot_cases.decode(of_wanted, "cpu", slots, table)
    assert torch.equal(bits_of(back.read()), bits_of(wanted.read()))


CASES: list[tuple[Codec, torch.dtype, str, int, int]] = [
    # codec, dtype, layout, tokens of a page, head_dim
    (Bounded(0.0625, False), BF16, "heads_first", 16, 128),
    (Bounded(0.0625, False, mode="outlier"), BF16, "kv_first", 24, 40),
    (Bounded(0.01, True, "channel", "plain", "token", "ans"), FP16, "strided", 16, 72),
    (Bounded(0.01, True, "tile"), FP32, "heads_only", 16, 24),
    (Bounded(0.0625, False, packing="bitpack"), BF16, "plain", 16, 128),
    (Bounded(0.01, True, "channel", "outlier", "token", "bitpack"), BF16, "kv_second", 16, 100),
    (Bounded(0.01, True, "tile", "plain", "token", "bitpack"), FP16, "heads_first", 8, 56),
    (Lossless("ans"), BF16, "heads_first", 16, 128),
    (Lossless("bitpack"), BF16, "strided", 16, 40),
    (Lossless("ans"), FP32, "kv_first", 16, 24),
    (Lossless("ans"), FP8, "mla", 16, 72),
    (Lossless("ans"), FP16, "kv_second", 16, 64),
    (Raw(), torch.uint8, "heads_first", 16, 40),
]


@pytest.mark.parametrize(("codec", "dtype", "layout", "page_tokens", "head_dim"), CASES, ids=case_id)
class TestSlots:
    def engine(self, dtype: torch.dtype, layout: str, page_tokens: int, head_dim: int) -> Engine:
        engine = Engine(layout, dtype, layers=1, page_tokens=page_tokens, head_dim=head_dim)
        if dtype == torch.uint8:
            return engine.write(torch.arange(torch.Size(engine.shape).numel()).view(engine.shape).to(dtype))
        return engine.write(noise(engine.shape, dtype))

    def test_the_references_bytes_and_values(
        self, codec: Codec, dtype: torch.dtype, layout: str, page_tokens: int, head_dim: int
    ) -> None:
        engine = self.engine(dtype, layout, page_tokens, head_dim)
        slot_codec = SlotCodec(engine.kv, codec, 5, raw_slot_bytes(engine.kv, 5))
        table = torch.cat([TABLE, torch.tensor([[0, -1, 2, -1, 3]])])
        expected, found = slot_cases.encode(slot_codec, "cpu", table), encode(slot_codec, table)
        assert used(found) == used(expected)
        table = torch.tensor([[3, 1, -1, 0, 7], [8, -1, 6, 5, 9]])
        assert_values_of_the_reference(slot_codec, expected[:2], table, layout, dtype, page_tokens, head_dim)

    def test_damage_is_found(
        self, codec: Codec, dtype: torch.dtype, layout: str, page_tokens: int, head_dim: int
    ) -> None:
        engine = self.engine(dtype, layout, page_tokens, head_dim)
        slot_codec = SlotCodec(engine.kv, codec, 5, raw_slot_bytes(engine.kv, 5))
        slots = slot_cases.encode(slot_codec, "cpu", TABLE)
        slots[0, 20] ^= 1
        slots[1, slot_codec.payload_at + 9] ^= 16
        slots[2, 33] ^= 1
        statuses = decode(slot_codec, slots, TABLE)
        assert statuses == [SlotStatus.NO_SLOT, SlotStatus.CORRUPT, SlotStatus.NO_SLOT]
        assert statuses == slot_cases.decode(slot_codec, "cpu", slots, TABLE)


@pytest.mark.parametrize("mode", ["fixed", "plain"])
@pytest.mark.parametrize("reach", [20, 62])
def test_tiles_with_low_bits(mode: str, reach: int) -> None:
    """What fits the scratch, and what goes to its place at once."""
    engine = Engine("heads_first", BF16, layers=1, page_tokens=16, head_dim=128)
    codes = reach * (2 * torch.randint(2, engine.shape, generator=torch.Generator().manual_seed(4)) - 1)
    slot_codec = SlotCodec(
        engine.write(codes.to(BF16)).kv, Bounded(0.5, False, mode=mode), 5, raw_slot_bytes(engine.kv, 5)
    )
    expected, found = slot_cases.encode(slot_codec, "cpu", TABLE), encode(slot_codec, TABLE)
    assert used(found) == used(expected)
    assert any(len(tile) > kernels.SCRATCH_BYTES for tile in take_apart(found[0]).tiles) == (reach > 20)


@pytest.mark.parametrize("bound", slot_cases.NEAR_A_POWER)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_values_between_codes(dtype: torch.dtype, bound: float) -> None:
    engine = Engine("heads_first", dtype, layers=1, page_tokens=16, head_dim=128)
    values = slot_cases.between_codes(engine.shape, dtype, bound)
    slot_codec = SlotCodec(engine.write(values).kv, Bounded(bound, False), 5, raw_slot_bytes(engine.kv, 5))
    expected, found = slot_cases.encode(slot_codec, "cpu", TABLE), encode(slot_codec, TABLE)
    assert used(found) == used(expected)


@pytest.mark.parametrize("far", slot_cases.FAR)
@pytest.mark.parametrize("mode", ["fixed", "plain", "outlier"])
def test_channels_far_from_zero(mode: str, far: float) -> None:
    engine = Engine("heads_first", FP32, layers=1, page_tokens=16, head_dim=24)
    codes = slot_cases.far_from_zero(engine.shape, far)
    slot_codec = SlotCodec(engine.write(codes).kv, Bounded(0.5, False, mode=mode), 5, raw_slot_bytes(engine.kv, 5))
    expected, found = slot_cases.encode(slot_codec, "cpu", TABLE), encode(slot_codec, TABLE)
    assert used(found) == used(expected)
    assert_values_of_the_reference(slot_codec, expected[:2], TABLE[:2], "heads_first", FP32, 16, 24)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 40.0])
@pytest.mark.parametrize("packing", ["ans", "bitpack"])
def test_chunks_that_overflow_at_once(packing: str, ratio: float) -> None:
    """Each as often as it needs, by all blocks together; some for good."""
    chunks, pages = 14, 5
    codec = Bounded(0.01, relative=False, packing=packing)
    generator = torch.Generator().manual_seed(2)
    layer = torch.randn(chunks * pages, 2, 16, 2 * 64, generator=generator)
    layer *= 2.0 ** torch.randint(-6, 6, (chunks * pages, 1, 1, 1), generator=generator)
    kv = PagedKV.heads_first([layer.bfloat16()], 64)
    slot_codec = SlotCodec(kv, codec, pages, slot_bytes_for(kv, codec, pages, ratio))
    table = torch.arange(chunks * pages).view(chunks, pages)
    expected, found = slot_cases.encode(slot_codec, "cpu", table), encode(slot_codec, table)
    assert used(found) == used(expected)
    if ratio > 2:
        assert max(take_apart(slot).fields["relaxed"] for slot in found) > 3


@pytest.mark.parametrize(
    "how",
    [{}, {"packing": "bitpack", "error_bound": 0.7}, {"error_bound": 0.03}, {"ratio": 3.0}, {"ratio": 20.0}],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "dim", "group", "rope"),
    [
        (2, 32, 2, "halves"),
        (4, 64, 1, "partial"),
        (2, 48, 1, "none"),
        (2, 32, 1, "interleaved"),
        (2, 144, 1, "halves"),
        (2, 128, 1, "halves"),
    ],
)
def test_transform(heads: int, dim: int, group: int, rope: str, how: dict[str, Any]) -> None:
    check_transform(heads, dim, group, rope, how, gap=0)


def test_transform_of_rows_that_begin_anywhere() -> None:
    check_transform(2, 64, 2, "halves", {}, gap=3)


@pytest.mark.parametrize("bound", [0.25, 0.12])
def test_transform_of_tokens_that_are_alike(bound: float) -> None:
    """Coefficients far from zero that do not vary: beyond what bytes reach, and without low bits."""
    check_transform(2, 32, 2, "halves", {"error_bound": bound}, gap=0, alike=True)


@pytest.mark.parametrize(("heads", "dim", "kibibytes"), [(2, 128, 227), (4, 64, 99), (2, 64, 48)])
def test_transform_of_all_heads(monkeypatch: pytest.MonkeyPatch, heads: int, dim: int, kibibytes: int) -> None:
    """Vectors of 128 channels and more; of less shared memory, that has no room for two items."""
    monkeypatch.setattr(fused_transform, "most_shared_bytes", lambda device: kibibytes << 10)
    check_transform(heads, dim, heads, "halves", {"error_bound": 0.7}, gap=0)


def check_transform(
    heads: int, dim: int, group: int, rope: str, how: dict[str, Any], gap: int, *, alike: bool = False
) -> None:
    """`gap`: values between rows; `alike`: all tokens' values are the same."""
    of = make_profile(heads, dim, group, rope)
    dtype = FP16 if dim == 64 else BF16
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(10, heads, 16, 2 * dim, generator=generator) * torch.logspace(-1, 0.5, 2 * dim) for _ in "01"]
    if alike:
        values = [tensor[:1, :, :1].expand_as(tensor).clone() for tensor in values]
    values[1][4, 1, 3, 5] = values[0][6, 0, 2, 1] = float("nan")  # the latter in a block with a missing page

    def placed(tensor: Tensor) -> Tensor:
        if not gap:
            return tensor.to(dtype)
        return torch.zeros(10, 16, heads, 2 * dim + gap, dtype=dtype)[..., : 2 * dim].transpose(1, 2).copy_(tensor)

    layers, other = ([placed(tensor) for tensor in values] for _ in range(2))
    slot_codec, emulated = (
        SlotCodec(kv := PagedKV.heads_first(each, dim), codec := Transform(of, **how), 5,
                  slot_bytes_for(kv, codec, 5, codec.ratio or 1.5))
        for each in (layers, other)
    )  # fmt: skip
    table, positions = (
        torch.tensor([[3, 1, 4, 0, 7], [8, 2, 6, -1, 9]], dtype=torch.int32),
        torch.tensor([100, 164]).int(),
    )
    index, names = torch.arange(2, dtype=torch.int32), identities_of(2)
    expected, found = (torch.zeros(2, slot_codec.slot_bytes, dtype=torch.uint8) for _ in range(2))
    slot_codec.encode(table, expected, index, names, positions)

    space = transform_slots._workspace(emulated)
    scratch = space.scratch(2)
    fused_transform.forward(emulated, scratch, table, positions)
    fused.encode(scratch.slots, table, found, index, names)
    assert used(found) == used(expected)
    for tensor in (*layers, *other):
        tensor.fill_(77)
    statuses = [torch.full((2,), 9, dtype=torch.int32) for _ in range(2)]
    slot_codec.decode(expected, index, table, names, statuses[0], positions)
    fused.decode(scratch.slots, expected, index, table, names, statuses[1])
    fused_transform.inverse(emulated, scratch, table, positions, statuses[1])
    assert statuses[0].tolist() == statuses[1].tolist() and (0 in statuses[0].tolist() or how.get("ratio") == 20.0)
    for left, right in zip(layers, other, strict=True):
        assert torch.equal(bits_of(left), bits_of(right))


FRAMES: list[tuple[Codec, torch.dtype, tuple[int, ...]]] = [
    (Bounded(0.5, False), BF16, (2, 69, 128)),
    (Bounded(0.5, False, packing="bitpack"), BF16, (3, 30, 72)),
    (Bounded(0.01, True, "channel", "outlier", "token", "bitpack"), FP16, (2, 67, 24)),
    (Bounded(0.01, True, "tensor", "plain", "flat"), FP32, (517,)),
    (Lossless("ans"), BF16, (2, 69, 200)),
    (Lossless("bitpack"), FP32, (33, 7)),
]


@pytest.mark.parametrize(("codec", "dtype", "shape"), FRAMES, ids=case_id)
def test_frames(codec: Codec, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = noise(shape, dtype) * 3
    expected = codec.encode(values)
    target, plan = plan_tensor(values, getattr(codec, "grouping", "token") == "flat")
    if isinstance(codec, Bounded):
        sizes, payload, bound = frames.encode_bounded(target, plan, codec)
        assert bound == expected.header.bound_used
    else:
        assert isinstance(codec, Lossless)
        sizes, payload = frames.encode_lossless(target, plan, codec.packing)
    assert sizes.tolist() == expected.sizes.tolist()
    assert torch.equal(payload, expected.payload)
    frame = kvferry.compress(values, codec)
    out = torch.full_like(values, 7)
    frames.decode(read_frame(frame), out)
    assert torch.equal(bits_of(out), bits_of(kvferry.decompress(frame)))


def test_rows_that_lie_far_apart() -> None:
    """The last of 64 is more than 2**32 bytes from the first (of which only the pages that are touched exist)."""
    values = torch.empty_strided((64, 20), (36_000_000, 1), dtype=BF16).copy_(noise((64, 20), BF16))
    codec = Bounded(0.5, False)
    sizes, payload, _ = frames.encode_bounded(*plan_tensor(values, False), codec)
    expected = codec.encode(values.contiguous())
    assert sizes.tolist() == expected.sizes.tolist() and torch.equal(payload, expected.payload)


@pytest.mark.parametrize("packing", ["bitpack", "ans"])
def test_blocks_of_any_length(packing: str) -> None:
    """Four tokens at a time are coded, and those behind the last must not count."""
    generator = torch.Generator().manual_seed(0)
    codec = Bounded(0.5, relative=False, packing=packing)
    for tokens in range(1, 66):
        values = (torch.randn(tokens, 24, generator=generator) * 20).to(BF16)
        expected = codec.encode(values)
        sizes, payload, _ = frames.encode_bounded(*plan_tensor(values, False), codec)
        assert sizes.tolist() == expected.sizes.tolist() and torch.equal(payload, expected.payload), tokens
