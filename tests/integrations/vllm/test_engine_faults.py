"""vLLM's engine on the CPU while things go wrong: every request is answered as if nothing had been stored."""

from pathlib import Path
from typing import Any

import pytest
from prompts import PROMPTS, cached_of, tokens_of

from kvferry.codecs.slots import SlotCodec
from kvferry.format.slot import HEADER_BYTES

pytestmark = pytest.mark.xdist_group("vllm engine")

LOSSLESS = {"compression_codec": "lossless"}


def fail(*_: Any) -> None:
    raise RuntimeError("a kernel that does not work")


@pytest.fixture
def stored(start: Any) -> tuple[Any, list[list[int]]]:
    """An engine that has `PROMPTS` in host memory only, and their answers."""
    engine = start(LOSSLESS)
    first = tokens_of(engine.ask(PROMPTS))
    engine.forget_gpu()
    return engine, first


@pytest.mark.parametrize("at", [0, 16, HEADER_BYTES + 3, HEADER_BYTES + 700], ids=["magic", "header", "sizes", "tiles"])
def test_a_corrupt_slot_is_computed_again(stored: tuple[Any, list[list[int]]], at: int) -> None:
    engine, first = stored
    row = 1  # the second chunk of the first prompt
    engine.rows[row, at : at + 8] ^= 0xA5
    second = engine.ask(PROMPTS)
    assert tokens_of(second) == first
    assert engine.counted.corrupt_slots == 1
    # The chunk was forgotten, stored again, and is good now.
    engine.forget_gpu()
    third = engine.ask(PROMPTS)
    assert tokens_of(third) == first
    assert engine.counted.corrupt_slots == 1
    assert cached_of(third)[0] == 256


def test_every_slot_is_corrupt(stored: tuple[Any, list[list[int]]]) -> None:
    engine, first = stored
    engine.rows.zero_()
    assert tokens_of(engine.ask(PROMPTS)) == first
    assert engine.counted.corrupt_slots >= len(PROMPTS)
    engine.forget_gpu()
    assert tokens_of(engine.ask(PROMPTS)) == first


def test_slots_change_places(stored: tuple[Any, list[list[int]]]) -> None:
    """Each is a good slot, of another chunk."""
    engine, first = stored
    rows = engine.rows
    rows[[0, 1]] = rows[[1, 0]].clone()
    assert tokens_of(engine.ask(PROMPTS)) == first
    assert engine.counted.corrupt_slots == 2


def test_encoding_fails(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(LOSSLESS)
    monkeypatch.setattr(SlotCodec, "encode", fail)
    asked = PROMPTS[:3]  # which share nothing, so that none finds another's blocks on the GPU
    first = tokens_of(engine.ask(asked))
    engine.forget_gpu()
    second = engine.ask(asked)
    assert tokens_of(second) == first
    assert cached_of(second) == [0, 0, 0]
    assert engine.counted.failed_stores > 0
    assert engine.used_slots == 0
    monkeypatch.undo()
    engine.forget_gpu()
    engine.ask(asked)
    engine.forget_gpu()
    assert all(cached_of(engine.ask(asked)))


def test_decoding_fails(stored: tuple[Any, list[list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, first = stored
    monkeypatch.setattr(SlotCodec, "decode", fail)
    assert tokens_of(engine.ask(PROMPTS)) == first
    assert engine.counted.failed_loads > 0
    monkeypatch.undo()
    engine.forget_gpu()
    assert tokens_of(engine.ask(PROMPTS)) == first


def test_the_pipeline_takes_nothing(stored: tuple[Any, list[list[int]]], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, first = stored
    for transfers in (transfers for group in engine.worker._transfers for transfers in group):
        monkeypatch.setattr(transfers, "load", fail)
        monkeypatch.setattr(transfers, "store", fail)
    assert tokens_of(engine.ask(PROMPTS)) == first
    engine.settle()
    assert engine.counted.failed_loads > 0
    assert engine.counted.failed_stores > 0
    assert not engine.worker._under_way


def test_keeping_account_fails(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(LOSSLESS)
    monkeypatch.setattr(engine.connector, "_learn", fail)
    monkeypatch.setattr(engine.connector, "_add_gauges", fail)
    first = tokens_of(engine.ask(PROMPTS))
    engine.forget_gpu()
    second = engine.ask(PROMPTS)
    assert tokens_of(second) == first
    assert all(cached_of(second))


def test_files_that_are_damaged(start: Any, tmp_path: Path) -> None:
    tiers = [{"type": "fs", "root_dir": str(tmp_path), "n_read_threads": 1, "n_write_threads": 1}]
    extra = {**LOSSLESS, "secondary_tiers": tiers, "cpu_bytes_to_use": 1 << 20}
    engine = start(extra, fresh=True)
    first = tokens_of(engine.ask(PROMPTS[:2]))
    engine.empty()
    files = sorted(tmp_path.rglob("*.bin"))
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[HEADER_BYTES + 200] ^= 0xFF
        file.write_bytes(data)
    assert tokens_of(engine.ask(PROMPTS[:2])) == first
    assert engine.counted.corrupt_slots > 0
    engine.empty()
    assert tokens_of(engine.ask(PROMPTS[:2])) == first


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"compression_codec": "zip"}, "compression_codec='zip'"),
        ({"compression_error_bound": 0}, "compression_error_bound=0.0"),
        ({"compression_eror_bound": 0.1}, "did you mean compression_error_bound"),
        ({"cpu_bytes_to_use": 4096}, "cpu_bytes_to_use=4096"),
        ({"canonical_layout": True, "secondary_tiers": []}, "canonical_layout"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
@pytest.mark.usefixtures("no_engine")
def test_the_engine_does_not_start(model: Path, extra: dict[str, Any], said: str) -> None:
    from engine import Engine

    with pytest.raises(ValueError, match=said):
        Engine(model, extra)
