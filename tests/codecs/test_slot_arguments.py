"""Sizes of slots, and arguments that are refused."""

import itertools
from collections.abc import Callable

import pytest
import torch

from contract import slot_cases
from contract.slot_cases import TABLE, Engine, noise
from kvferry import Bounded, Lossless, PagedKV, Raw, SlotCodec, decode_from_slots, encode_into_slots
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for


def test_no_chunks() -> None:
    engine = Engine("heads_first", torch.bfloat16)
    kv, nothing = engine.kv, torch.zeros(0, dtype=torch.int32)
    slots = torch.zeros(2, raw_slot_bytes(kv, 5), dtype=torch.uint8)
    table, identities = nothing.view(0, 5), torch.zeros(0, 2, dtype=torch.int64)
    encode_into_slots(kv, Lossless(), table, slots, nothing, identities)
    assert decode_from_slots(kv, Lossless(), slots, nothing, table, identities).tolist() == []


def test_one_call() -> None:
    """The wrappers take sizes from the tensors."""
    engine = Engine("heads_first", torch.bfloat16)
    engine.write(noise(engine.shape, torch.bfloat16))
    slots = torch.zeros(3, slot_bytes_for(engine.kv, Lossless(), 5, 1.0), dtype=torch.uint8)
    index, identities = torch.arange(3, dtype=torch.int32), slot_cases.identities_of(3)
    before = engine.read()
    encode_into_slots(engine.kv, Lossless(), TABLE.int(), slots, index, identities)
    engine.write(torch.zeros(engine.shape))
    status = decode_from_slots(engine.kv, Lossless(), slots, index, TABLE.int(), identities)
    assert (status.dtype, status.tolist()) == (torch.int32, [0, 0, 0])
    assert torch.equal(engine.read(), before)
    tight = torch.zeros(3, 64 + 8 * 16 + 512, dtype=torch.uint8)
    bounds = torch.full((8,), 2.0**-20)
    codec = Bounded(1.0, relative=False)
    encode_into_slots(engine.kv, codec, TABLE.int(), tight, index, identities, on_overflow="reject", bounds=bounds)
    assert decode_from_slots(engine.kv, codec, tight, index, TABLE.int(), identities).tolist() in ([4] * 3, [0] * 3)


def test_sizes() -> None:
    engine = Engine("heads_first", torch.bfloat16, head_dim=128, heads=8, layers=4)
    kv = engine.kv
    raw = 5 * kv.page_bytes
    assert raw == 5 * 16 * 128 * 8 * 2 * 4 * 2
    assert raw_slot_bytes(kv, 5) == -(-(raw + 64 + (8 + 4) * 128) // 512) * 512
    assert slot_bytes_for(kv, Lossless(), 5, 2.0) == raw // 2
    assert slot_bytes_for(kv, Lossless(), 5, 2.01) == -(-raw * 100 // 201 // 512) * 512
    assert slot_bytes_for(kv, Lossless(), 5, 0.5) == raw_slot_bytes(kv, 5)
    assert slot_bytes_for(kv, Raw(), 5, 3.0) == raw_slot_bytes(kv, 5)
    assert slot_bytes_for(kv, Lossless(), 5, 1e9) == 2048  # header, directory and 4 bytes a tile
    for codec, ratio in itertools.product((Lossless(), Raw()), (0.5, 1.0, 7.0, 1e9)):
        SlotCodec(kv, codec, 5, slot_bytes_for(kv, codec, 5, ratio))


def kv_of(dtype: torch.dtype = torch.bfloat16) -> PagedKV:
    return Engine("heads_first", dtype).kv


ABSOLUTE = Bounded(0.1, relative=False)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "no codec": (TypeError, "str.*Lossless", lambda: SlotCodec(kv_of(), "lossless", 5, 8192)),
    "flat": (
        ValueError,
        "grouping='flat'.*'token'",
        lambda: SlotCodec(kv_of(), Bounded(0.1, False, grouping="flat"), 5, 8192),
    ),
    "tensor": (ValueError, "relative_to='tensor'.*'tile'", lambda: SlotCodec(kv_of(), Bounded(), 5, 8192)),
    "fp8": (ValueError, "float8.*Lossless", lambda: SlotCodec(kv_of(torch.float8_e5m2), ABSOLUTE, 5, 8192)),
    "opaque": (
        ValueError,
        "opaque.*Raw",
        lambda: SlotCodec(PagedKV.opaque([torch.zeros(3, 64, dtype=torch.uint8)]), Lossless(), 5, 8192),
    ),
    "no pages": (ValueError, "chunk_pages=0", lambda: SlotCodec(kv_of(), Lossless(), 0, 8192)),
    "huge": (ValueError, "4 GiB.*fewer", lambda: SlotCodec(kv_of(), Lossless(), 1 << 20, 8192)),
    "slot step": (ValueError, "8200.*16", lambda: SlotCodec(kv_of(), Lossless(), 5, 8200)),
    "slot too small": (ValueError, "slot_bytes=128.*16 tiles.*256", lambda: SlotCodec(kv_of(), Lossless(), 5, 128)),
    "raw too small": (ValueError, "slot_bytes=8192.*30976", lambda: SlotCodec(kv_of(), Raw(), 5, 8192)),
    "overflow": (ValueError, "on_overflow='grow'.*relax", lambda: SlotCodec(kv_of(), Lossless(), 5, 8192, "grow")),
    "relaxations": (ValueError, "max_relaxations=65", lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, "relax", 65)),
    "negative": (ValueError, "max_relaxations=-1", lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, "relax", -1)),
    "sms": (ValueError, "num_sms=0", lambda: SlotCodec(kv_of(), Lossless(), 5, 8192, num_sms=0)),
    "bounds of exact": (
        ValueError,
        "Lossless.*relative=False",
        lambda: SlotCodec(kv_of(), Lossless(), 5, 8192, bounds=torch.ones(8)),
    ),
    "bounds of relative": (
        ValueError,
        "relative=False",
        lambda: SlotCodec(kv_of(), Bounded(relative_to="tile"), 5, 8192, bounds=torch.ones(8)),
    ),
    "number of bounds": (
        ValueError,
        r"\(7,\).*\(8,\)",
        lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, bounds=torch.ones(7)),
    ),
    "bounds' dtype": (
        ValueError,
        "float64",
        lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, bounds=torch.ones(8).double()),
    ),
    "bound of 0": (ValueError, "holds 0.0", lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, bounds=torch.arange(8.0))),
    "bound of NaN": (
        ValueError,
        "nan",
        lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, bounds=torch.ones(8) * torch.nan),
    ),
    "infinite bound": (
        ValueError,
        "inf",
        lambda: SlotCodec(kv_of(), ABSOLUTE, 5, 8192, bounds=torch.ones(8) * torch.inf),
    ),
    "ratio": (ValueError, "ratio=0", lambda: slot_bytes_for(kv_of(), Lossless(), 5, 0)),
    "meta": (
        ValueError,
        "meta",
        lambda: SlotCodec(PagedKV((torch.zeros(2, 8, 4, device="meta"),)), Lossless(), 5, 8192),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, message, make = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_tensors_of_a_call_are_checked() -> None:
    slot_codec = SlotCodec(kv_of(), Lossless(), 5, 8192)
    good = {
        "page_table": TABLE.int(),
        "slots": torch.zeros(4, 8192, dtype=torch.uint8),
        "slot_index": torch.arange(3, dtype=torch.int32),
        "identities": torch.zeros(3, 2, dtype=torch.int64),
    }
    wrong = [
        ("page_table", TABLE, "int64.*int32"),
        ("page_table", TABLE[:, :4].int(), r"\(3, 5\)"),
        ("page_table", TABLE.int() + 2, "page_table holds 10; pages are 0 to 9"),
        ("page_table", TABLE.int() - 2, "page_table holds -2"),
        ("slot_index", good["slot_index"][:2], r"\(3,\)"),
        ("slot_index", good["slot_index"] + 2, "slot_index holds 4; slots are 0 to 3"),
        ("slot_index", good["slot_index"] - 1, "slot_index holds -1"),
        ("identities", good["identities"].T.contiguous(), r"\(3, 2\)"),
        ("slots", good["slots"][:, :4096], "8192"),
        ("slots", torch.zeros(4, 16384, dtype=torch.uint8)[:, ::2], "not contiguous"),
        ("slots", good["slots"].view(torch.int8), "int8.*uint8"),
    ]
    status = torch.zeros(3, dtype=torch.int32)
    for name, tensor, message in wrong:
        with pytest.raises(ValueError, match=message):
            slot_codec.encode(**{**good, name: tensor})
        with pytest.raises(ValueError, match=message):
            slot_codec.decode(**{**good, name: tensor}, status=status)
    with pytest.raises(ValueError, match=r"status.*int64.*int32"):
        slot_codec.decode(**good, status=status.long())
    with pytest.raises(ValueError, match=r"status.*\(2,\).*\(3,\)"):
        slot_codec.decode(**good, status=status[:2])
