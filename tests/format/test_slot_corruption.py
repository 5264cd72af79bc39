"""Everything that can be wrong with a slot: the status says so, and no value is written that was not stored."""

import random
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from contract import slot_cases
from contract.cases import bounded, case_id
from contract.slot_cases import PLACES, Engine, chunk_rows, device_of, seal, take_apart, with_fields
from kvferry import Codec, Lossless, Raw, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes
from kvferry.format.slot import SlotStatus

CODECS: list[Codec] = [
    Raw(),
    Lossless("ans"),
    Lossless("bitpack"),
    bounded("fixed", "token", "ans", "absolute"),
    bounded("plain", "token", "ans", "channel"),
    bounded("outlier", "token", "bitpack", "tile"),
    bounded("fixed", "token", "bitpack", "channel"),
]
PAGES = torch.tensor([[5, 0, 3, 1, 4]])
TILE_ROWS = ((0, 64), (64, 80))
"""Tokens of the two blocks of a chunk; its tiles are of two lines."""


def engine_of(place: str) -> Engine:
    return Engine("heads_first", torch.bfloat16, layers=1, heads=1, pages=6, head_dim=5, device=device_of(place))


def small(codec: Codec, place: str) -> tuple[Engine, SlotCodec, Tensor]:
    """An engine, what encodes its pages, and the slot of its chunk; tiles are small."""
    engine = engine_of(place)
    engine.write(slot_cases.noise(engine.shape, torch.bfloat16))
    slot_codec = SlotCodec(engine.kv, codec, 5, raw_slot_bytes(engine.kv, 5))
    return engine, slot_codec, slot_cases.encode(slot_codec, place, PAGES)[0]


def check(
    codec: Codec, place: str, slots: list[Tensor], status: list[int], bad_tiles: list[set[int]] | None = None
) -> None:
    """Decode each of `slots`: its `status`, and with CORRUPT the values of its `bad_tiles` untouched, all others there;
    with other faults no value touched."""
    _, slot_codec, good = small(codec, place)
    reference = engine_of(place)
    assert slot_cases.decode(SlotCodec(reference.kv, codec, 5, slot_codec.slot_bytes), place, good[None], PAGES) == [0]
    right = chunk_rows(reference.read(), PAGES[0])
    poison = engine_of("cpu").read()
    for number, slot in enumerate(slots):
        engine = engine_of(place)
        found = slot_cases.decode(SlotCodec(engine.kv, codec, 5, slot_codec.slot_bytes), place, slot[None], PAGES)
        assert found == [status[number]], f"slot {number}"
        read = engine.read()
        assert torch.equal(read[:, 2], poison[:, 2]), "a page of no chunk was written"
        rows, expected = chunk_rows(read, PAGES[0]), right.clone()
        bad = set(range(4))
        if found == [SlotStatus.GOOD]:
            bad = set()
        elif found == [SlotStatus.CORRUPT]:
            assert bad_tiles is not None
            bad = bad_tiles[number]
        for tile in bad:
            start, end = TILE_ROWS[tile // 2]
            expected[tile % 2, start:end] = poison[0, 0, 0, 0]
        assert torch.equal(rows, expected), f"slot {number}: tiles {bad} are bad, others are not there or these are"


def altered(slot: Tensor, at: int, change: int = 1) -> Tensor:
    result = slot.clone()
    result[at] ^= change
    return result


def resealed(slot: Tensor, tile: int, data: bytes) -> Tensor:
    """The slot with the bytes of `tile` replaced by as many others, whose checksum is right."""
    parts = take_apart(slot)
    identity = parts.fields["identity0"], parts.fields["identity1"]
    assert len(data) == len(parts.tiles[tile])
    result = slot.clone()
    at = 64 + 8 * len(parts.tiles) + sum(map(len, parts.tiles[:tile]))
    result[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    number = slot_cases.checksum(data, slot_cases.tile_seed(identity, tile, len(data)))
    result[64 + 8 * tile + 4 : 72 + 8 * tile] = torch.frombuffer(
        bytearray(struct.pack("<I", number)), dtype=torch.uint8
    )
    return result


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("codec", CODECS, ids=case_id)
class TestCorruption:
    def test_any_bit_of_the_header(self, codec: Codec, place: str) -> None:
        slot = small(codec, place)[2]
        flips = [altered(slot, bit // 8, 1 << bit % 8) for bit in range(0, 8 * 64, 3)]
        check(codec, place, flips, [SlotStatus.NO_SLOT] * len(flips))

    def test_each_field_of_the_header(self, codec: Codec, place: str) -> None:
        """With a checksum that is right: another slot, not a damaged one."""
        slot = small(codec, place)[2]
        fields = take_apart(slot).fields
        wrong: list[tuple[int, str, object]] = [
            (1, "magic", b"KVFY"),
            (1, "magic", b"\0\0\0\0"),
            (1, "version", 0),
            (1, "version", 2),
            (1, "header_bytes", 72),
            (1, "state", 0),
            (1, "state", 3),
            (1, "reserved", 1),
            (1, "reserved2", 1),
            (1, "reserved2", 1 << 63),
            (4, "state", 2),
            (3, "identity0", fields["identity0"] ^ 1),
            (3, "identity0", fields["identity0"] ^ 1 << 63),
            (3, "identity1", fields["identity1"] ^ 1 << 32),
            (0, "relaxed", 5),
            (0, "bound_used", 7.0),
        ]
        kinds = ("codec", "dtype", "packing", "mode", "relative_to", "num_tiles", "layout_digest", "tokens")
        wrong += [(2, name, fields[name] ^ 1) for name in kinds]
        wrong += [(2, name, fields[name] ^ 1 << 31) for name in ("num_tiles", "layout_digest", "tokens")]
        check(codec, place, [with_fields(slot, **{name: value}) for _, name, value in wrong], [w[0] for w in wrong])

    def test_the_first_that_applies_is_the_status(self, codec: Codec, place: str) -> None:
        slot = small(codec, place)[2]
        slot[64 + 4] ^= 1
        faults = {"state": 2, "identity1": 0, "tokens": 81, "version": 9}
        slots, expected = [slot], [5]
        for (name, value), status in zip(faults.items(), (4, 3, 2, 1), strict=True):
            slots.append(with_fields(slots[-1], **{name: value}))
            expected.append(status)
        check(codec, place, slots, expected, [{0}] + [set()] * 4)

    def test_payload_bytes(self, codec: Codec, place: str) -> None:
        slot_bytes = small(codec, place)[1].slot_bytes
        slot = small(codec, place)[2]
        parts = take_apart(slot)
        used = parts.fields["payload_bytes"]
        room = slot_bytes - 64 - 8 * 4
        last = used - len(parts.tiles[3])
        cases = [(used - 4, {3}), (used + 4, {3} if used + 4 <= room else {0, 1, 2, 3}), (last - 4, {2, 3})]
        cases += [(room + 1, {0, 1, 2, 3}), (2**32 - 1, {0, 1, 2, 3}), (0, {0, 1, 2, 3}), (last, {3})]
        slots = [with_fields(slot, payload_bytes=value) for value, _ in cases]
        check(codec, place, slots, [5] * len(cases), [bad for _, bad in cases])

    def test_directory(self, codec: Codec, place: str) -> None:
        slot = small(codec, place)[2]
        ends = np.cumsum([len(tile) for tile in take_apart(slot).tiles])
        slots, bad = [], []
        for tile in range(4):
            for bit in range(0, 32, 5):
                slots.append(altered(slot, 64 + 8 * tile + 4 + bit // 8, 1 << bit % 8))
                bad.append({tile})
            for value in (
                0,
                int(ends[tile]) - 4,
                int(ends[tile]) + 1,
                int(ends[tile]) + 4,
                int(ends[3]) + 8,
                2**31,
                2**32 - 4,
            ):
                changed = slot.clone()
                changed[64 + 8 * tile : 68 + 8 * tile] = torch.from_numpy(np.array([value], dtype="<u4").view(np.uint8))
                slots.append(changed)
                bad.append({tile, min(tile + 1, 3)})
        check(codec, place, slots, [5] * len(slots), bad)

    def test_any_byte_of_the_payload(self, codec: Codec, place: str) -> None:
        slot = small(codec, place)[2]
        tiles = take_apart(slot).tiles
        at, slots, bad = 64 + 8 * 4, [], []
        for number, tile in enumerate(tiles):
            for place_in_tile in sorted({0, 1, 4, 13, len(tile) // 2, len(tile) - 1, *range(7, len(tile), 41)}):
                slots.append(altered(slot, at + place_in_tile, 1 << place_in_tile % 8))
                bad.append({number})
            at += len(tile)
        check(codec, place, slots, [5] * len(slots), bad)
        check(codec, place, [altered(slot, at)] if at < len(slot) else [slot], [0])

    def test_truncated(self, codec: Codec, place: str) -> None:
        """As a copy that stopped leaves it: zeros behind some place."""
        slot = small(codec, place)[2]
        tiles = take_apart(slot).tiles
        payload_at = 64 + 8 * 4
        ends = payload_at + np.cumsum([len(tile) for tile in tiles])
        cuts: list[tuple[int, int, set[int]]] = [(0, 1, set()), (8, 1, set()), (63, 1, set()), (64, 5, {0, 1, 2, 3})]
        cuts += [(72, 5, {0, 1, 2, 3}), (80, 5, {0, 1, 2, 3})]
        cuts += [(payload_at + 4, 5, {0, 1, 2, 3}), (int(ends[0]), 5, {1, 2, 3}), (int(ends[1]), 5, {2, 3})]
        slots = []
        for cut, _, _ in cuts:
            slots.append(slot.clone())
            slots[-1][cut:] = 0
        check(codec, place, slots, [status for _, status, _ in cuts], [bad for _, _, bad in cuts])

    def test_tiles_of_other_chunks_or_places(self, codec: Codec, place: str) -> None:
        """A tile's checksum says whose it is: neither a slot half overwritten nor one put together passes."""
        engine, slot_codec, slot = small(codec, place)
        other = slot_cases.encode(slot_codec, place, PAGES.repeat(2, 1))[1]
        assert take_apart(other).tiles == take_apart(slot).tiles
        mixed = slot.clone()
        mixed[64:] = other[64:]
        check(codec, place, [mixed], [5], [{0, 1, 2, 3}])
        engine.write(torch.ones(engine.shape))
        same = slot_cases.encode(slot_codec, place, PAGES)[0]
        tiles = take_apart(same).tiles
        assert tiles[0] == tiles[1]
        swapped = same.clone()
        swapped[68:72], swapped[76:80] = same[76:80], same[68:72]
        fresh = engine_of(place)
        fresh_codec = SlotCodec(fresh.kv, codec, 5, slot_codec.slot_bytes)
        assert slot_cases.decode(fresh_codec, place, swapped[None], PAGES) == [5]

    def test_contents_that_contradict_themselves(self, codec: Codec, place: str) -> None:
        """With checksums that are right, which no accident makes: refused, and nothing else is written."""
        slot = small(codec, place)[2]
        tiles = take_apart(slot).tiles
        slots, bad = [], []
        for number in (0, 3):
            kinds = {0, 1, 2, 255} - {tiles[number][0]}
            for kind in kinds:
                slots.append(resealed(slot, number, bytes([kind]) + tiles[number][1:]))
                bad.append({number})
            if tiles[number][0] == 1:
                for at, value in ((1, 5), (2, 3), (6, 0xFF), (7, 0xFF)):
                    slots.append(resealed(slot, number, tiles[number][:at] + bytes([value]) + tiles[number][at + 1 :]))
                    bad.append({number})
        check(codec, place, slots, [5] * len(slots), bad)

    def test_random_contents_stay_in_their_pages(self, codec: Codec, place: str) -> None:
        """Whatever a tile with a checksum that is right holds, other tiles come back and other pages stay. A GPU writes
        while it decodes: of such a tile, which only a forger makes, it may leave anything in the tile's own place."""
        _, slot_codec, slot = small(codec, place)
        parts, rng = take_apart(slot), random.Random(4)
        reference = engine_of(place)
        slot_cases.decode(SlotCodec(reference.kv, codec, 5, slot_codec.slot_bytes), place, slot[None], PAGES)
        right = chunk_rows(reference.read(), PAGES[0])
        poison = slot_cases.poison_of(right)
        for _ in range(30):
            tile = rng.randrange(4)
            data = bytearray(parts.tiles[tile])
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            fresh = engine_of(place)
            fresh_codec = SlotCodec(fresh.kv, codec, 5, slot_codec.slot_bytes)
            status = slot_cases.decode(fresh_codec, place, resealed(slot, tile, bytes(data))[None], PAGES)
            assert status in ([SlotStatus.GOOD], [SlotStatus.CORRUPT])
            assert (fresh.read()[:, 2] == poison).all()
            found, expected = chunk_rows(fresh.read(), PAGES[0]), right.clone()
            start, end = TILE_ROWS[tile // 2]
            bad = found[tile % 2, start:end]
            assert place != "cpu" or status == [SlotStatus.GOOD] or (bad == poison).all()
            expected[tile % 2, start:end] = bad
            assert torch.equal(found, expected)

    def test_noise_and_zeros_are_no_slots(self, codec: Codec, place: str) -> None:
        slot_bytes = small(codec, place)[1].slot_bytes
        generator = torch.Generator().manual_seed(1)
        slots = [torch.zeros(slot_bytes, dtype=torch.uint8), torch.full((slot_bytes,), 255, dtype=torch.uint8)]
        slots += [torch.randint(0, 256, (slot_bytes,), generator=generator).to(torch.uint8) for _ in range(5)]
        slots.append(seal(slots[-1]))
        check(codec, place, slots, [1] * len(slots))
