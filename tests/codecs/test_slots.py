"""What `SlotCodec` promises, with every codec, layout and device: the tiles of frames, the bound, pages that are not
asked for untouched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from contract import slot_cases
from contract.cases import bits_of, case_id
from contract.slot_cases import (
    FAR,
    LAYOUTS,
    NEAR_A_POWER,
    PLACES,
    TABLE,
    Engine,
    absolute_codec,
    assert_kept,
    between_codes,
    chunk_rows,
    device_of,
    far_from_zero,
    frame_tiles,
    noise,
    poison_of,
    take_apart,
)
from kvferry import Bounded, Codec, Lossless, PagedKV, Raw, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for
from kvferry.format.slot import SlotStatus

CODECS = slot_cases.slot_codecs()
HEAD_DIMS = {8: 24, 16: 40, 24: 72, 32: 100, 64: 128, 128: 56}
"""Of each page_tokens that is tried: kernels differ by the channels that a lane has, 1 to 4."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("codec", "dtype"), [(codec, dtype) for codec in CODECS for dtype in codec.dtypes], ids=case_id
)
class TestRoundTrip:
    """All parameters on chunks whose tiles are of all kinds, special values among them."""

    def prepared(self, codec: Codec, dtype: torch.dtype, place: str, **options: object) -> tuple[Engine, SlotCodec]:
        engine = Engine("heads_first", dtype, head_dim=150, layers=1, device=device_of(place))
        engine.write(noise(engine.shape, dtype))
        return engine, SlotCodec(engine.kv, codec, 5, raw_slot_bytes(engine.kv, 5), **options)

    def test_values_come_back(self, codec: Codec, dtype: torch.dtype, place: str) -> None:
        engine, slot_codec = self.prepared(codec, dtype, place)
        values, table = noise(engine.shape, dtype), TABLE[:2]
        slots = slot_cases.encode(slot_codec, place, table)
        assert torch.equal(engine.read(), bits_of(values)), "encoding altered the pages"
        other = Engine("strided", dtype, head_dim=150, layers=1, device=device_of(place))
        other_codec = SlotCodec(other.kv, codec, 5, slot_codec.slot_bytes)
        assert slot_cases.decode(other_codec, place, slots[1:], table[:1]) == [SlotStatus.OTHER_IDENTITY]
        assert (other.memory[0] == 0xEE).all()
        assert slot_cases.decode(other_codec, place, slots, table) == [0, 0]
        for chunk in table:
            assert_kept(chunk_rows(values, chunk), chunk_rows(other.read(), chunk), codec, 0)
        padding = other.memory[0].view(dtype).view(10, 16, 2, 303)[..., 300:]
        assert (padding.contiguous().view(torch.uint8) == 0xEE).all(), "bytes beside the lines were written"

    def test_tiles_are_those_of_frames(self, codec: Codec, dtype: torch.dtype, place: str) -> None:
        """An oracle that shares nothing with the reference's gathering, directory and checksums."""
        engine, slot_codec = self.prepared(codec, dtype, place)
        for number, slot in enumerate(slot_cases.encode(slot_codec, place, TABLE)):
            parts = take_apart(slot)
            rows = chunk_rows(noise(engine.shape, dtype), TABLE[number])
            assert list(parts.tiles) == frame_tiles(rows, codec)
            identity = int(parts.fields["identity0"]), int(parts.fields["identity1"])
            assert identity == tuple(i % 2**64 for i in slot_cases.identities_of(3)[number].tolist())
            assert parts.checksums == tuple(
                slot_cases.checksum(tile, slot_cases.tile_seed(identity, at, len(tile)))
                for at, tile in enumerate(parts.tiles)
            )
            assert parts.fields["checksum"] == slot_cases.checksum(parts.used[:60], 0)
            assert (slot[len(parts.used) :] == 0xEE).all() or place != "cpu"

    def test_same_bytes_on_every_device(self, codec: Codec, dtype: torch.dtype, place: str) -> None:
        engine, slot_codec = self.prepared(codec, dtype, place)
        expected = Engine("kv_second", dtype, head_dim=150, layers=1).write(noise(engine.shape, dtype))
        wanted = slot_cases.encode(SlotCodec(expected.kv, codec, 5, slot_codec.slot_bytes), "cpu", TABLE)
        found = slot_cases.encode(slot_codec, place, TABLE)
        assert [take_apart(slot).used for slot in found] == [take_apart(slot).used for slot in wanted]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_tokens", HEAD_DIMS)
def test_layouts_and_pages(layout: str, page_tokens: int, place: str) -> None:
    """A slot does not depend on how the engine's memory lies, nor a tile on where pages end."""
    for turn, dtype in enumerate((torch.bfloat16, torch.float32)):
        codec = CODECS[(LAYOUTS.index(layout) * 6 + page_tokens // 8 + 7 * turn) % len(CODECS)]
        sizes = {"page_tokens": page_tokens, "head_dim": HEAD_DIMS[page_tokens], "heads": 1 + turn}
        engine = Engine(layout, dtype, device=device_of(place), **sizes)
        plain = Engine("mla" if layout == "mla" else "kv_first", dtype, **sizes)
        values = noise(engine.shape, dtype)
        slots = []
        for one, where in ((engine, place), (plain, "cpu")):
            slot_codec = SlotCodec(one.write(values).kv, codec, 3, raw_slot_bytes(one.kv, 3))
            slots.append(slot_cases.encode(slot_codec, where, TABLE[:, :3]))
        assert [take_apart(s).used for s in slots[0]] == [take_apart(s).used for s in slots[1]]
        fresh = Engine(layout, dtype, device=device_of(place), **sizes)
        slot_codec = SlotCodec(fresh.kv, codec, 3, raw_slot_bytes(fresh.kv, 3))
        assert slot_cases.decode(slot_codec, place, slots[1], TABLE[:, :3]) == [0, 0, 0]
        rows = chunk_rows(values, TABLE[0, :3])
        assert list(take_apart(slots[0][0]).tiles) == frame_tiles(rows, codec)
        last = TABLE[2, [0, 2]]  # decoded last; its first page is there twice
        assert_kept(chunk_rows(values, last), chunk_rows(fresh.read(), last), *absolute_codec(codec, slots[1]))


Values = Callable[[tuple[int, ...]], Tensor]


def check_values(codec: Bounded, dtype: torch.dtype, values_of: Values, place: str) -> None:
    """`values_of` a cache's shape are coded as on the CPU, and come back within the bound."""
    engine, plain = (Engine("heads_first", dtype, device=where) for where in (device_of(place), "cpu"))
    values = values_of(engine.shape)
    slots = []
    for one, where in ((engine, place), (plain, "cpu")):
        slot_codec = SlotCodec(one.write(values).kv, codec, 5, raw_slot_bytes(one.kv, 5))
        slots.append(slot_cases.encode(slot_codec, where, TABLE))
    assert [take_apart(s).used for s in slots[0]] == [take_apart(s).used for s in slots[1]]
    fresh = Engine("heads_first", dtype, device=device_of(place))
    slot_codec = SlotCodec(fresh.kv, codec, 5, slot_codec.slot_bytes)
    assert slot_cases.decode(slot_codec, place, slots[1][:1], TABLE[:1]) == [0]
    assert_kept(chunk_rows(values, TABLE[0]), chunk_rows(fresh.read(), TABLE[0]), *absolute_codec(codec, slots[1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(
    "codec", [each for each in CODECS if isinstance(each, Bounded) and not each.relative], ids=case_id
)
def test_channels_far_from_zero(codec: Bounded, far: float, place: str) -> None:
    check_values(codec, torch.float32, lambda shape: far_from_zero(shape, far), place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bound", NEAR_A_POWER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_between_codes(dtype: torch.dtype, bound: float, place: str) -> None:
    codec = Bounded(bound, relative=False)
    check_values(codec, dtype, lambda shape: between_codes(shape, dtype, bound), place)


@pytest.mark.parametrize("place", PLACES)
def test_slots_are_written_where_asked(place: str) -> None:
    engine = Engine("heads_first", torch.bfloat16, device=device_of(place))
    engine.write(noise(engine.shape, torch.bfloat16))
    slot_codec = SlotCodec(engine.kv, Lossless(), 5, raw_slot_bytes(engine.kv, 5))
    straight = slot_cases.encode(slot_codec, place, TABLE)
    moved = slot_cases.encode(slot_codec, place, TABLE, [6, 0, 3])
    for number, slot in zip([6, 0, 3], straight, strict=True):
        assert take_apart(moved[number]).used == take_apart(slot).used
    assert (moved[[1, 2, 4, 5]] == 0xEE).all()
    fresh = Engine("heads_first", torch.bfloat16, device=device_of(place))
    slot_codec = SlotCodec(fresh.kv, Lossless(), 5, slot_codec.slot_bytes)
    assert slot_cases.decode(slot_codec, place, moved, TABLE, [6, 0, 3]) == [0, 0, 0]
    assert slot_cases.decode(slot_codec, place, moved, TABLE, [0, 1, 3]) == [3, 1, 0]
    assert torch.equal(fresh.read(), engine.read())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("codec", CODECS, ids=case_id)
def test_pages_that_are_left_alone(codec: Codec, place: str) -> None:
    """Loads that start or end inside a chunk, and pages in the midst of it; a tile whose pages are all left alone may
    be anything."""
    engine = Engine("kv_first", torch.bfloat16, page_tokens=24, pages=12, device=device_of(place))
    values = noise(engine.shape, torch.bfloat16)
    slot_codec = SlotCodec(engine.write(values).kv, codec, 6, raw_slot_bytes(engine.kv, 6))
    table = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    slots = slot_cases.encode(slot_codec, place, table)
    damaged = slots.clone()
    for slot in damaged:  # the tiles of the first block hold tokens 0 to 63, which are pages 0, 1 and 2
        payload_at = 64 + 8 * slot_codec.num_tiles
        slot[payload_at + 8] ^= 1
        slot[64] ^= 4  # where the first of them ends
    for hidden in ([], [0], [0, 1], [5], [2, 3], [0, 1, 2], [0, 2, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]):
        wanted = [page for page in range(6) if page not in hidden]
        masked = table.clone()
        masked[:, hidden] = -1
        for given_slots, status in ((slots, 0), (damaged, 5 if {0, 1, 2} & set(wanted) else 0)):
            fresh = Engine("kv_first", torch.bfloat16, page_tokens=24, pages=12, device=device_of(place))
            fresh_codec = SlotCodec(fresh.kv, codec, 6, slot_codec.slot_bytes)
            assert slot_cases.decode(fresh_codec, place, given_slots, masked) == [status, status]
            read, all_pages = fresh.read(), torch.arange(12)
            untouched = torch.ones(12, dtype=torch.bool)
            untouched[table[:, wanted].flatten()] = False
            assert (read[:, all_pages[untouched]] == bits_of(poison_of(read))).all()
            if status == 0:
                pages = table[:, wanted].flatten()
                assert_kept(chunk_rows(values, pages), chunk_rows(read, pages), *absolute_codec(codec, slots))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("codec", CODECS, ids=case_id)
def test_missing_pages_are_zeros(codec: Codec, place: str) -> None:
    """A chunk may have fewer pages than others."""
    engine = Engine("heads_only", torch.bfloat16, device=device_of(place))
    values = noise(engine.shape, torch.bfloat16).clone()
    slot_codec = SlotCodec(engine.write(values).kv, codec, 5, raw_slot_bytes(engine.kv, 5))
    masked = TABLE.clone()
    masked[0, 3:] = masked[1, 1] = masked[2] = -1
    slots = slot_cases.encode(slot_codec, place, masked)
    for number, slot in enumerate(slots):
        present = (masked[number] >= 0).repeat_interleave(16)[None, :, None]
        rows = torch.where(present, chunk_rows(values, masked[number]), 0)
        assert list(take_apart(slot).tiles) == frame_tiles(rows, codec)


@pytest.mark.parametrize("place", PLACES)
def test_opaque_bytes(place: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for page_bytes in (24, 1000, 64 * 130 * 16):
        layers = [torch.randint(0, 256, (6, page_bytes), generator=generator).to(torch.uint8) for _ in range(2)]
        kv = PagedKV.opaque([layer.to(device_of(place)) for layer in layers])
        slot_codec = SlotCodec(kv, Raw(), 3, slot_bytes_for(kv, Raw(), 3, 1.0))
        table = torch.tensor([[5, 0, 3]])
        slots = slot_cases.encode(slot_codec, place, table)
        assert take_apart(slots[0]).fields["dtype"] == 0
        back = [torch.full_like(layer, 0xEE, device=device_of(place)) for layer in layers]
        assert slot_cases.decode(
            SlotCodec(PagedKV.opaque(back), Raw(), 3, slot_codec.slot_bytes), place, slots, table
        ) == [0]
        for layer, result in zip(layers, back, strict=True):
            assert torch.equal(result.cpu()[[5, 0, 3]], layer[[5, 0, 3]])
            assert (result[[1, 2, 4]] == 0xEE).all()


@pytest.mark.parametrize("place", PLACES)
def test_many_chunks(place: str) -> None:
    """More tiles than the reference holds at once; the results of all lie where they belong."""
    engine = Engine(
        "heads_first", torch.bfloat16, page_tokens=64, pages=30, head_dim=2, heads=25, device=device_of(place)
    )
    values = noise(engine.shape, torch.bfloat16)
    codec = Bounded(0.125, relative=False, packing="bitpack")
    slot_codec = SlotCodec(engine.write(values).kv, codec, 1, raw_slot_bytes(engine.kv, 1))
    table = torch.arange(30)[:, None]
    slots = slot_cases.encode(slot_codec, place, table)
    assert list(take_apart(slots[29]).tiles) == frame_tiles(values[:, 29], codec)
    engine.write(torch.zeros_like(values))
    assert slot_cases.decode(slot_codec, place, slots, table) == [0] * 30
    assert_kept(values.flatten(1, 2), engine.read().flatten(1, 2), codec, 0)
