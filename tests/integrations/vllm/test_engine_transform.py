"""vLLM's engine on the CPU with the codec transform: what comes out of host memory is within the profile's bounds, at
the position where it was stored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_files import HEADS, LAYERS, certificate, make_file
from prompts import PROMPTS, cached_of, prompt, tokens_of

from kvferry import Profile, Transform
from kvferry.codecs.slots import SlotCodec

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.xdist_group("vllm engine"), *([pytest.mark.gpu] if ON_GPU else [])]

CHUNK = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("safetensors")
    return make_file(tmp_path_factory.mktemp("profile"))


def settings(path: str, **more: Any) -> dict[str, Any]:
    return {"compression_codec": "transform", "compression_profile": path, "compression_ratio": 1.2, **more}


@dataclass
class Seen:
    """What the coders were given: of each chunk, by identity, its values and its position; and how far off they came
    back."""

    stored: dict[tuple[int, int], tuple[list[torch.Tensor], int]] = field(default_factory=dict)
    loaded: dict[tuple[int, int], int] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    encode, decode = SlotCodec.encode, SlotCodec.decode

    def values(codec: SlotCodec, pages: torch.Tensor) -> list[torch.Tensor]:
        return [line[pages[pages >= 0].long()].float() for line in codec.kv.lines]

    def named(identities: torch.Tensor) -> list[tuple[int, int]]:
        return [(first, second) for first, second in identities.tolist()]

    def wait() -> None:
        if ON_GPU:
            torch.cuda.synchronize()

    # Without positions, kernels are warmed up.
    def spy_encode(self: Any, table: Any, slots: Any, index: Any, identities: Any, positions: Any = None) -> None:
        if isinstance(self.codec, Transform) and positions is not None:
            wait()
            for name, pages, at in zip(named(identities), table, positions.tolist(), strict=True):
                found.stored[name] = (values(self, pages), at)
        encode(self, table, slots, index, identities, positions)

    def spy_decode(self: Any, slots: Any, index: Any, table: Any, ids: Any, status: Any, positions: Any = None) -> None:
        decode(self, slots, index, table, ids, status, positions)
        if isinstance(self.codec, Transform) and positions is not None:
            wait()
            for name, pages, at in zip(named(ids), table, positions.tolist(), strict=True):
                before, _ = found.stored[name]
                assert bool((pages >= 0).all())
                found.loaded[name] = at
                pairs = zip(before, values(self, pages), strict=True)
                found.errors.append(max(float((a - b).norm(dim=-1).max()) for a, b in pairs))

    monkeypatch.setattr(SlotCodec, "encode", spy_encode)
    monkeypatch.setattr(SlotCodec, "decode", spy_decode)
    return found


def test_restored_caches_are_close_and_answers_the_same(start: Any, path: str, seen: Seen) -> None:
    engine = start(settings(path, compression_error_bound=0.01))
    assert engine.worker._parts[0][0].codec_name == "transform"
    first = engine.ask(PROMPTS, tokens=2)
    engine.forget_gpu()
    second = engine.ask(PROMPTS, tokens=2)
    assert all(count >= 2 * CHUNK for count in cached_of(second))
    assert tokens_of(second) == tokens_of(first)
    counted = engine.counted
    assert counted.loaded_raw_bytes > 0 and not counted.failed_loads and not counted.corrupt_slots
    # A vector of 32 values, of size about 1: what steps of 0.0005 and rounding to bfloat16 add up to.
    assert seen.errors and 0 < max(seen.errors) < 0.15


def test_a_chunk_is_loaded_at_the_position_of_its_store(start: Any, path: str, seen: Seen) -> None:
    engine = start(settings(path, blocks_per_chunk=2))
    engine.ask(PROMPTS)
    engine.forget_gpu()
    engine.ask(PROMPTS)
    assert {at for _, at in seen.stored.values()} == {0, CHUNK, 2 * CHUNK, 3 * CHUNK}
    assert set(seen.loaded.values()) == {0, CHUNK, 2 * CHUNK, 3 * CHUNK}
    assert all(seen.stored[name][1] == at for name, at in seen.loaded.items())


def test_a_store_with_chunks_left_out_has_each_ones_position(start: Any, path: str, seen: Seen) -> None:
    """Two of four chunks were evicted: one transfer stores them, neighbours that they are not."""
    from kvferry.integrations.vllm import compat

    engine = start(settings(path, blocks_per_chunk=2))
    asked = prompt(1, 260)
    engine.ask([asked])
    engine.settle()
    first = {at: name for name, (_, at) in seen.stored.items()}
    keys = list(engine.manager._policy.chunks)
    seen.stored.clear()
    for key in (keys[0], keys[2]):
        assert compat.forget(engine.manager, key)
    assert engine.llm.reset_prefix_cache()
    engine.ask([asked])
    engine.settle()
    assert {at: name for name, (_, at) in seen.stored.items()} == {0: first[0], 2 * CHUNK: first[2 * CHUNK]}


def test_the_certificates_ratio_sizes_the_slots(start: Any, path: str) -> None:
    raw = start({"compression_codec": "raw"}).manager._num_chunks
    extra = settings(path)
    del extra["compression_ratio"]
    engine = start(extra)
    assert 2.9 < engine.manager._num_chunks / raw < 3.7  # 3.62, in rows of whole pages
    engine.ask(PROMPTS)
    engine.forget_gpu()
    assert all(cached_of(engine.ask(PROMPTS)))
    said = engine.connector.get_kv_connector_stats().reduce()
    assert said["vllm:kvferry_ratio"] > 1


def test_a_fixed_rate_fills_the_slots(start: Any, path: str, seen: Seen) -> None:
    """Steps finer than what the slots have room for: each chunk is coded looser, as loose as need be."""
    fine = Profile.load(path)
    fine = fine.with_steps([(part.k.step / 4, part.v.step / 4) for part in fine.layers])
    fine.with_certificate(certificate()).save(Path(path).with_name("fine.safetensors"))
    extra = settings(str(Path(path).with_name("fine.safetensors")), compression_ratio=3.0, compression_overflow="fit")
    engine = start(extra)
    codec = engine.worker._parts[0][0].slot_codec
    first = engine.ask(PROMPTS, tokens=2)
    engine.settle()
    engine.forget_gpu()
    assert all(count >= 2 * CHUNK for count in cached_of(engine.ask(PROMPTS, tokens=2)))
    counted = engine.counted
    assert not counted.relaxed_chunks and not counted.rejected_chunks and not counted.failed_loads
    stored = counted.stored_bytes / (counted.stored_raw_bytes / (codec.chunk_pages * codec.kv.page_bytes))
    assert 0.85 * codec.slot_bytes < stored <= codec.slot_bytes
    assert first and seen.errors and 0 < max(seen.errors) < 1.0


def test_slots_of_another_position_are_misses(start: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvferry.integrations.vllm import manager

    engine = start(settings(path))
    first = engine.ask(PROMPTS[:2])
    engine.forget_gpu()
    ends = manager._ends
    monkeypatch.setattr(manager, "_ends", lambda keys, request: ends(keys, request) + CHUNK)
    assert tokens_of(engine.ask(PROMPTS[:2])) == tokens_of(first)
    assert engine.counted.corrupt_slots > 0


def test_files_are_of_one_profile_and_bound(start: Any, path: str, tmp_path: Path) -> None:
    tiers = [{"type": "fs", "root_dir": str(tmp_path), "n_read_threads": 1, "n_write_threads": 1}]
    extra = settings(path, secondary_tiers=tiers, cpu_bytes_to_use=1 << 20)
    start(extra, fresh=True).ask(PROMPTS[:2])
    second = start(extra, fresh=True)
    assert all(cached_of(second.ask(PROMPTS[:2])))
    assert second.counted.loaded_raw_bytes > 0 and not second.counted.corrupt_slots
    (described,) = (found.read_text() for found in tmp_path.rglob("config.json"))  # whose digest names the folder
    assert f"transform-{Profile.load(path).digest}-1.0-" in described
    other = start({**extra, "compression_error_bound": 0.5}, fresh=True)
    assert cached_of(other.ask(PROMPTS[:1])) == [0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": LAYERS + 1}, "layers=3, this one has 2: calibrate this model"),
        ({"heads": 2 * HEADS}, "heads=4, this one has 2"),
        ({"head_dim": 64}, "head_dim=64, this one has 32"),
        ({"theta": 5e5}, "another RoPE"),
    ],
    ids=["layers", "heads", "head_dim", "rope"],
)
@pytest.mark.usefixtures("no_engine")
def test_another_models_profile(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    from engine import Engine

    from kvferry import ProfileMismatch

    with pytest.raises(ProfileMismatch, match=said):
        Engine(model, settings(make_file(tmp_path, **changes)))


@pytest.mark.usefixtures("no_engine")
def test_a_target_that_the_profile_misses(model: Path, path: str) -> None:
    from engine import Engine

    with pytest.raises(ValueError, match=r"compression_target_kl=0.001, .* states a KL of 0.004"):
        Engine(model, settings(path, compression_target_kl=0.001))


@pytest.mark.usefixtures("no_engine")
def test_a_hybrid_model_is_refused(model: Path, path: str, tmp_path: Path) -> None:
    from engine import Engine, make_hybrid_model

    with pytest.raises(ValueError, match=r"2 KV cache groups.* set compression_codec to bounded"):
        Engine(make_hybrid_model(tmp_path), settings(path))
