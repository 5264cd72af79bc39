"""The slot's format: headers, checksums, and golden slots, made by tests/golden/make.py; one that is missing fails."""

import json
import random
import struct

import numpy as np
import pytest
import torch

from contract import slot_cases
from contract.cases import DEVICES, bits_of
from contract.slot_cases import FIELDS, with_fields
from golden.make import FOLDER, SLOT_DIGESTS, digest
from golden.make import slot_cases as golden_cases
from kvferry import CorruptFrame
from kvferry.format import slot as slot_format
from kvferry.format.frame import DTYPES, MODES, PACKINGS, RELATIVE_TO
from kvferry.format.slot import SlotHeader, SlotState, SlotStatus

GOLDEN = golden_cases()


def header(**fields: object) -> SlotHeader:
    usual = {
        "codec": "bounded",
        "dtype": torch.float16,
        "packing": "bitpack",
        "mode": "outlier",
        "state": SlotState.USABLE,
        "relaxed": 3,
        "relative_to": "channel",
        "num_tiles": 70000,
        "payload_bytes": 4_000_000_001,
        "bound_used": 0.125,
        "layout_digest": 0xDEADBEEF,
        "identity": (2**64 - 2, 0x0123456789ABCDEF),
        "tokens": 96,
    }
    return SlotHeader(**{**usual, **fields})


class TestHeader:
    def test_fields_lie_where_the_format_says(self) -> None:
        data = header().pack()
        assert len(data) == 64
        found = {name: struct.unpack_from("<" + code, data, at)[0] for name, (at, code) in FIELDS.items()}
        assert found == {
            "magic": b"KVFS",
            "version": 1,
            "header_bytes": 64,
            "codec": 2,
            "dtype": 2,
            "packing": 2,
            "mode": 3,
            "state": 1,
            "relaxed": 3,
            "relative_to": 3,
            "reserved": 0,
            "num_tiles": 70000,
            "payload_bytes": 4_000_000_001,
            "bound_used": 0.125,
            "layout_digest": 0xDEADBEEF,
            "identity0": 2**64 - 2,
            "identity1": 0x0123456789ABCDEF,
            "tokens": 96,
            "reserved2": 0,
            "checksum": slot_cases.checksum(data[:60], 0),
        }
        assert slot_format.HEADER.itemsize == 64

    def test_round_trip(self) -> None:
        assert SlotHeader.unpack(header().pack()) == header()
        for dtype in (torch.uint8, *DTYPES):
            assert SlotHeader.unpack(header(dtype=dtype).pack()).dtype == dtype
        for name, options in (
            ("codec", ("raw", "lossless", "bounded")),
            ("packing", PACKINGS),
            ("mode", MODES),
            ("relative_to", RELATIVE_TO),
            ("state", list(SlotState)),
        ):
            for option in options:
                assert getattr(SlotHeader.unpack(header(**{name: option}).pack() + b"more"), name) == option

    def test_batch(self) -> None:
        singles = [header(relaxed=i, identity=(i, 2**63 + i)) for i in range(5)]
        data = np.stack([np.frombuffer(one.pack(), dtype=np.uint8) for one in singles])
        records = slot_format.read_headers(data)
        assert slot_format.are_headers(records).all()
        assert records["relaxed"].tolist() == [0, 1, 2, 3, 4]
        assert records["identity"][3].tolist() == [3, 2**63 + 3]
        blank = records.copy()
        for name in ("magic", "version", "header_bytes", "checksum"):
            blank[name] = 0
        assert not slot_format.are_headers(blank).any()
        assert np.array_equal(slot_format.seal_headers(blank), data)
        data[2, 40] ^= 1
        assert slot_format.are_headers(slot_format.read_headers(data)).tolist() == [True, True, False, True, True]

    def test_refused(self) -> None:
        data = torch.frombuffer(bytearray(header().pack()), dtype=torch.uint8)
        with pytest.raises(CorruptFrame, match="63 bytes are too few"):
            SlotHeader.unpack(header().pack()[:63])
        for bit in range(8 * 64):
            altered = data.clone()
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(CorruptFrame, match="no slot's header"):
                SlotHeader.unpack(bytes(altered.numpy()))
        for name, value in (("codec", 4), ("dtype", 6), ("packing", 3), ("mode", 4), ("relative_to", 4)):
            with pytest.raises(CorruptFrame, match=f"unknown {name} {value}"):
                SlotHeader.unpack(bytes(with_fields(data, **{name: value}).numpy()))
        for name, value in (("state", 0), ("state", 3), ("reserved", 1), ("reserved2", 1 << 63), ("version", 2)):
            with pytest.raises(CorruptFrame, match="no slot's header"):
                SlotHeader.unpack(bytes(with_fields(data, **{name: value}).numpy()))
        with pytest.raises(ValueError, match="zstd"):
            header(codec="zstd").pack()


class TestChecksum:
    def test_against_the_format_word_by_word(self) -> None:
        rng = random.Random(1)
        for count in (0, 1, 2, 15, 100, 8193):
            data = rng.randbytes(4 * count)
            words = np.frombuffer(data, dtype="<u4")
            for seed in (0, 1, 2**64 - 1, rng.getrandbits(64)):
                expected = slot_cases.checksum(data, seed)
                assert slot_format.checksum(words, np.uint64(seed)) == expected
                padded = np.pad(words, (0, 5))
                assert slot_format.checksum(padded, np.uint64(seed)) == expected, "zeros change nothing"

    def test_known_values(self) -> None:
        """Numbers that any reader of slots must come to."""
        assert slot_cases.checksum(b"", 0) == 0
        words = np.array([[0, 0, 0], [1, 2, 3], [2**32 - 1] * 3], dtype=np.uint32)
        found = slot_format.checksum(words, np.array([0, 0, 5], dtype=np.uint64)).tolist()
        assert found == [0, 492746408, 2193623919]

    def test_batches(self) -> None:
        rng = np.random.default_rng(2)
        words = rng.integers(0, 2**32, (4, 7, 33), dtype=np.uint32)
        seeds = rng.integers(0, 2**64, (4, 7), dtype=np.uint64)
        found = slot_format.checksum(words, seeds)
        assert found.dtype == np.uint32
        for i, j in np.ndindex(4, 7):
            assert found[i, j] == slot_cases.checksum(words[i, j].tobytes(), int(seeds[i, j]))

    def test_seeds_of_tiles(self) -> None:
        identity = np.array([[0, 0], [2**64 - 1, 2**64 - 1], [3, 5]], dtype=np.uint64)
        tile, size = np.array([0, 7, 2**32 - 1]), np.array([4, 16388, 2**32 - 4])
        found = slot_format.tile_seeds(identity, tile, size)
        expected = [
            slot_cases.tile_seed((int(a), int(b)), int(t), int(n))
            for (a, b), t, n in zip(identity, tile, size, strict=True)
        ]
        assert found.tolist() == expected

    def test_every_bit_counts(self) -> None:
        words = np.random.default_rng(3).integers(0, 2**32, 60, dtype=np.uint32)
        flipped = np.stack(
            [words ^ (np.arange(60) == bit // 32).astype(np.uint32) * np.uint32(1 << bit % 32) for bit in range(1920)]
        )
        found = slot_format.checksum(flipped, np.zeros(1920, dtype=np.uint64))
        assert not (found == slot_format.checksum(words, np.uint64(0))).any()


class TestGolden:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", GOLDEN)
    def test_golden_slot(self, name: str, device: str) -> None:
        path = FOLDER / f"{name}.kvs"
        assert path.is_file(), f"the golden slot {path.name} is missing: restore it (it is part of the format)"
        slot, case = path.read_bytes(), GOLDEN[name]
        status, pages = case.decoded(slot, device)
        assert status == (SlotStatus.REJECTED if name.endswith("rejected") else SlotStatus.GOOD)
        assert digest(pages) == json.loads(SLOT_DIGESTS.read_text())[name]
        assert case.encode(case.memory.to(device)) == slot, "the encoder's bytes have changed"
        if case.codec.exact:
            table = [page for page in case.pages if page >= 0]
            assert torch.equal(bits_of(pages[table]), bits_of(case.memory[table]))

    def test_nothing_else_is_there(self) -> None:
        assert {path.stem for path in FOLDER.glob("*.kvs")} == set(GOLDEN)
        assert set(json.loads(SLOT_DIGESTS.read_text())) == set(GOLDEN)
        assert sum(path.stat().st_size for path in FOLDER.glob("*.kvs")) < 300_000

    def test_every_kind_is_there(self) -> None:
        headers = [SlotHeader.unpack((FOLDER / f"{name}.kvs").read_bytes()) for name in GOLDEN]
        seen = {(h.codec, h.mode, h.packing, h.dtype) for h in headers}
        assert len([one for one in seen if one[0] == "bounded"]) == 3 * 2 * 3
        assert len([one for one in seen if one[0] == "lossless"]) == 2 * 5
        assert {h.dtype for h in headers if h.codec == "raw"} == {torch.uint8, *DTYPES}
        assert {(h.relative_to, h.mode, h.packing) for h in headers if h.codec == "bounded"} == {
            (to, mode, packing)
            for to in ("none", "tile", "channel")
            for mode in ("fixed", "plain", "outlier")
            for packing in ("ans", "bitpack")
        }
        assert {h.relaxed for h in headers} == {0, 1, 2}
        assert {h.state for h in headers} == set(SlotState)

    def test_most_golden_tiles_are_coded(self) -> None:
        for name, case in GOLDEN.items():
            slot = (FOLDER / f"{name}.kvs").read_bytes()
            if case.codec.name != "raw" and slot[12] == SlotState.USABLE:
                num_tiles = int.from_bytes(slot[16:20], "little")
                assert slot[64 + 8 * num_tiles] == 1, f"the first tile of {name} is stored raw"
