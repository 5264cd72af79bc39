"""Chunks that do not fit their slots are coded with doubled bounds, or rejected."""

import pytest
import torch
from torch import Tensor

from contract import cases, slot_cases
from contract.cases import case_id
from contract.slot_cases import (
    PLACES,
    TABLE,
    Engine,
    assert_kept,
    chunk_rows,
    device_of,
    frame_tiles,
    noise,
    take_apart,
)
from kvferry import Bounded, Lossless, PagedKV, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for
from kvferry.format.slot import SlotStatus

BOUNDED = [codec for codec in slot_cases.slot_codecs() if isinstance(codec, Bounded)]


class TestOverflow:
    """Chunks that do not fit: the smallest number of doublings that makes them fit, or a slot that says no."""

    @staticmethod
    def tile_bytes(values: Tensor, pages: Tensor, codec: Bounded, doublings: int) -> int:
        doubled = Bounded(
            codec.error_bound * 2**doublings, codec.relative, codec.relative_to, codec.mode, "token", codec.packing
        )
        return sum(map(len, frame_tiles(chunk_rows(values, pages), doubled)))

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("codec", BOUNDED, ids=case_id)
    def test_smallest_relaxation_that_fits(self, codec: Bounded, place: str) -> None:
        engine = Engine("heads_first", torch.bfloat16, layers=1, device=device_of(place))
        values = cases.gaussian(engine.shape, torch.bfloat16, 3)
        values[:, 4] *= 3  # the first chunk has page 4 and is larger
        overhead = 64 + 8 * engine.kv.num_lines * 2
        sizes = [[self.tile_bytes(values, pages, codec, r) for r in range(5)] for pages in TABLE]
        assert sizes[0] == sorted(sizes[0], reverse=True) and sizes[0][0] > sizes[0][3] + 64
        engine.write(values)
        for doublings in range(4):
            slot_bytes = (overhead + sizes[0][doublings] + 15) // 16 * 16
            room = slot_bytes - overhead
            slot_codec = SlotCodec(engine.kv, codec, 5, slot_bytes)
            slots = slot_cases.encode(slot_codec, place, TABLE)
            for number, slot in enumerate(slots):
                fields = take_apart(slot).fields
                expected = next(r for r in range(5) if sizes[number][r] <= room)
                assert (fields["state"], fields["relaxed"]) == (1, expected)
                assert fields["payload_bytes"] == sizes[number][expected]
                rows = chunk_rows(values, TABLE[number])
                asked = max(float(cases.allowed_errors(row, codec).max()) for row in rows) * 2**expected
                assert asked * (1 - 2**-20) <= float(fields["bound_used"]) <= asked
            for number, pages in enumerate(TABLE[:2]):
                fresh = Engine("plain", torch.bfloat16, layers=1, device=device_of(place))
                slot_codec = SlotCodec(fresh.kv, codec, 5, slot_bytes)
                assert slot_cases.decode(slot_codec, place, slots[:2], TABLE[:2], [number] * 2) == [
                    3 * number,
                    3 - 3 * number,
                ]
                relaxed = take_apart(slots[number]).fields["relaxed"]
                assert_kept(chunk_rows(values, pages), chunk_rows(fresh.read(), pages), codec, relaxed)

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("codec", BOUNDED, ids=case_id)
    def test_rejected(self, codec: Bounded, place: str) -> None:
        """Whether relaxing is not allowed, not allowed often enough, or without effect."""
        engine = Engine("heads_first", torch.bfloat16, layers=1, device=device_of(place))
        values = cases.gaussian(engine.shape, torch.bfloat16, 3)
        overhead = 64 + 8 * engine.kv.num_lines * 2
        sizes = [self.tile_bytes(values, TABLE[0], codec, r) for r in range(3)]
        slot_bytes = (overhead + sizes[2] - 16) // 16 * 16
        for options, tries in (
            ({"on_overflow": "reject"}, 0),
            ({"max_relaxations": 0}, 0),
            ({"max_relaxations": 1}, 1),
            ({"max_relaxations": 2}, 2),
        ):
            slot_codec = SlotCodec(engine.write(values).kv, codec, 5, slot_bytes, **options)
            slots = slot_cases.encode(slot_codec, place, TABLE[:1])
            fields = take_apart(slots[0]).fields
            assert (fields["state"], fields["relaxed"], fields["payload_bytes"]) == (2, tries, sizes[tries])
            rows = chunk_rows(values, TABLE[0])
            asked = max(float(cases.allowed_errors(row, codec).max()) for row in rows) * 2**tries
            assert asked * (1 - 2**-20) <= float(fields["bound_used"]) <= asked
            if place == "cpu":
                assert (slots[0, 64:] == 0xEE).all()
            engine.write(torch.zeros_like(values))
            assert slot_cases.decode(slot_codec, place, slots, TABLE[:1]) == [SlotStatus.REJECTED]
            assert not engine.read().any()

    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("packing", cases.PACKINGS)
    def test_exact_codecs_reject(self, packing: str, place: str) -> None:
        engine = Engine("heads_first", torch.bfloat16, device=device_of(place))
        engine.write(cases.gaussian(engine.shape, torch.bfloat16))
        size = sum(
            map(len, frame_tiles(chunk_rows(cases.gaussian(engine.shape, torch.bfloat16), TABLE[0]), Lossless(packing)))
        )
        overhead = 64 + 8 * engine.kv.num_lines * 2
        for slot_bytes, state in (((overhead + size + 15) // 16 * 16, 1), ((overhead + size - 1) // 16 * 16, 2)):
            slots = slot_cases.encode(SlotCodec(engine.kv, Lossless(packing), 5, slot_bytes), place, TABLE[:1])
            fields = take_apart(slots[0]).fields
            assert (fields["state"], fields["relaxed"], fields["payload_bytes"]) == (state, 0, size)
            assert fields["bound_used"] == 0

    @pytest.mark.parametrize("place", PLACES)
    def test_bounds_stay_finite(self, place: str) -> None:
        """2**126 is the most that a bound becomes: twice that is still a number."""
        engine = Engine("heads_first", torch.float32, layers=1, heads=1, device=device_of(place))
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(-(2**31), 2**31 - 1, engine.shape, generator=generator).int()
        engine.write(words.view(torch.float32))
        codec = Bounded(1e30, relative=False)
        slot_codec = SlotCodec(engine.kv, codec, 5, 112, max_relaxations=64)  # 4 bytes a tile: nothing fits
        slots = slot_cases.encode(slot_codec, place, TABLE[:1])
        fields = take_apart(slots[0]).fields
        assert (fields["state"], fields["relaxed"], fields["bound_used"]) == (2, 64, 2.0**126)
        expected = frame_tiles(chunk_rows(words.view(torch.float32), TABLE[0]), Bounded(2.0**126, relative=False))
        assert fields["payload_bytes"] == sum(map(len, expected))


@pytest.mark.gpu
@pytest.mark.skipif(not cases.HAS_CUDA, reason="no CUDA device")
@pytest.mark.parametrize("num_sms", [None, 1])
@pytest.mark.parametrize("packing", cases.PACKINGS)
def test_many_chunks_overflow_at_once(packing: str, num_sms: int | None) -> None:
    """Each as often as it needs, by all blocks of a GPU together, or by few: the reference's bytes, and no lock."""
    chunks, pages = 60, 5
    codec = Bounded(0.01, relative=False, packing=packing)
    generator = torch.Generator().manual_seed(2)
    layer = torch.randn(chunks * pages, 2, 16, 2 * 64, generator=generator)
    layer *= 2.0 ** torch.randint(-6, 6, (chunks * pages, 1, 1, 1), generator=generator)
    table = torch.arange(chunks * pages, dtype=torch.int32).view(chunks, pages)
    names = torch.arange(2 * chunks).view(chunks, 2)
    index = torch.arange(chunks, dtype=torch.int32).flip(0)
    found = []
    for device in ("cpu", "cuda", "cuda"):
        kv = PagedKV.heads_first([layer.bfloat16().to(device)], 64)
        slot_codec = SlotCodec(kv, codec, pages, slot_bytes_for(kv, codec, pages, 4.0), num_sms=num_sms)
        slots = torch.zeros(chunks, slot_codec.slot_bytes, dtype=torch.uint8, device=device)
        slot_codec.encode(table.to(device), slots, index.to(device), names.to(device))
        found.append(slots.cpu())
    relaxed = set()
    for number in range(chunks):
        fields = take_apart(found[0][number]).fields
        relaxed.add(int(fields["relaxed"]))
        end = 64 if fields["state"] == 2 else slot_codec.payload_at + int(fields["payload_bytes"])
        for slots in found[1:]:
            assert torch.equal(slots[number, :end], found[0][number, :end])
    assert len(relaxed) > 5, "chunks must differ in how often they are tried"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("head_dim", [40, 200])
def test_bounds_line_by_line(head_dim: int, place: str) -> None:
    """Beside the codec's own bound, which they replace; doubled like it."""
    engine = Engine("kv_first", torch.float16, head_dim=head_dim, device=device_of(place))
    values = noise(engine.shape, torch.float16)
    engine.write(values)
    given_bounds = torch.linspace(0.01, 0.3, engine.kv.num_lines, device=device_of(place))
    exact = [float(bound) for bound in given_bounds]
    codec = Bounded(1e-6, relative=False, packing="bitpack")
    slot_codec = SlotCodec(engine.kv, codec, 5, raw_slot_bytes(engine.kv, 5), bounds=given_bounds)
    slots = slot_cases.encode(slot_codec, place, TABLE)
    for slot, pages in zip(slots, TABLE, strict=True):
        parts = take_apart(slot)
        assert list(parts.tiles) == frame_tiles(chunk_rows(values, pages), codec, exact)
        assert parts.fields["bound_used"] == exact[-1]
    small = SlotCodec(
        engine.kv, codec, 5, 64 + len(parts.tiles) * 8 + sum(map(len, parts.tiles)) // 32 * 16, bounds=given_bounds
    )
    parts = take_apart(slot_cases.encode(small, place, TABLE[:1])[0])
    relaxed = int(parts.fields["relaxed"])
    assert relaxed > 0
    doubled = [bound * 2**relaxed for bound in exact]
    assert list(parts.tiles) == frame_tiles(chunk_rows(values, TABLE[0]), codec, doubled)
    assert parts.fields["bound_used"] == doubled[-1]
