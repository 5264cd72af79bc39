"""vLLM's engine on the CPU with compressed offloading: what comes out of host memory is what went in."""

from pathlib import Path
from typing import Any

import pytest
from prompts import BLOCK, BLOCK_BYTES, PROMPTS, cached_of, prompt, tokens_of

pytestmark = pytest.mark.xdist_group("vllm engine")

LOSSLESS = {"compression_codec": "lossless"}


@pytest.fixture(params=[1, 2, 4], ids=["a block a chunk", "2 blocks a chunk", "4 blocks a chunk"])
def lossless(start: Any, request: pytest.FixtureRequest) -> Any:
    return start({**LOSSLESS, "blocks_per_chunk": request.param})


def test_answers_are_the_same_out_of_host_memory(lossless: Any) -> None:
    first = lossless.ask(PROMPTS)
    lossless.forget_gpu()
    second = lossless.ask(PROMPTS)
    assert tokens_of(second) == tokens_of(first)
    assert all(count >= 4 * BLOCK for count in cached_of(second))
    found = lossless.counted
    assert 0 < found.loaded_raw_bytes <= sum(cached_of(second)) // BLOCK * BLOCK_BYTES
    assert 1.2 < found.stored_raw_bytes / found.stored_bytes < 2
    assert not found.failed_loads and not found.failed_stores and not found.corrupt_slots


def test_a_load_starts_in_the_middle_of_a_chunk(start: Any) -> None:
    engine = start({**LOSSLESS, "blocks_per_chunk": 4})
    first = engine.ask([prompt(1, 300)])
    engine.forget_gpu()
    engine.ask([prompt(1, 80)])  # two blocks, too few for a chunk of four: computed
    assert not engine.counted.loaded_raw_bytes
    second = engine.ask([prompt(1, 300)])
    assert tokens_of(second) == tokens_of(first)
    assert cached_of(second) == [256]
    assert engine.counted.loaded_raw_bytes == 6 * BLOCK_BYTES


def test_requests_are_preempted(start: Any) -> None:
    asked = [prompt(seed, 96) for seed in range(1, 9)]
    roomy = start({**LOSSLESS, "blocks_per_chunk": 1, "offload_prompt_only": False}, blocks=80)
    expected = tokens_of(roomy.ask(asked, tokens=120))
    tight = start({**LOSSLESS, "blocks_per_chunk": 1, "offload_prompt_only": False}, blocks=26)
    assert tokens_of(tight.ask(asked, tokens=120)) == expected
    assert tight.preemptions > 0
    assert tight.counted.loaded_raw_bytes > 0


def test_chunks_are_evicted_when_host_memory_is_full(start: Any) -> None:
    extra = {**LOSSLESS, "blocks_per_chunk": 2, "cpu_bytes_to_use": 12 * 28672}
    engine = start(extra)
    slots = engine.manager._num_chunks
    assert 8 <= slots <= 16
    asked = [prompt(seed, 200) for seed in range(1, 9)]  # three chunks each
    first = [engine.ask([one])[0] for one in asked]
    engine.forget_gpu()
    second = [engine.ask([one])[0] for one in asked]
    engine.forget_gpu()
    latest = engine.ask([asked[-1]])
    assert tokens_of(second) == tokens_of(first)
    assert tokens_of(latest) == tokens_of(first[-1:])
    assert cached_of(latest) == [192]
    assert engine.connector.get_kv_connector_stats().reduce()["vllm:kvferry_slots_used"] <= slots


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_other_eviction_policies(start: Any, policy: str) -> None:
    engine = start({**LOSSLESS, "eviction_policy": policy, "cpu_bytes_to_use": 12 * 28672})
    asked = [prompt(seed, 200) for seed in range(1, 7)]
    first = engine.ask(asked)
    engine.forget_gpu()
    assert tokens_of(engine.ask(asked)) == tokens_of(first)


def test_files_serve_another_engine(start: Any, tmp_path: Path) -> None:
    tiers = [{"type": "fs", "root_dir": str(tmp_path), "n_read_threads": 1, "n_write_threads": 1}]
    extra = {**LOSSLESS, "secondary_tiers": tiers, "cpu_bytes_to_use": 1 << 20}
    first = start(extra, fresh=True).ask(PROMPTS[:2])
    second = start(extra, fresh=True)
    assert tokens_of(second.ask(PROMPTS[:2])) == tokens_of(first)
    assert second.counted.loaded_raw_bytes > 0
    namespaces = {path.name.rsplit("_", 1)[0] for path in tmp_path.iterdir() if "_r" in path.name}

    # Another bound or codec does not read them.
    other = start({**extra, "compression_codec": "bounded"}, fresh=True)
    assert cached_of(other.ask(PROMPTS[:1])) == [0]
    assert {path.name.rsplit("_", 1)[0] for path in tmp_path.iterdir() if "_r" in path.name} > namespaces


def test_bounded_serves_within_its_ratio(start: Any) -> None:
    engine = start({"compression_codec": "bounded", "compression_error_bound": 1e-4, "compression_ratio": 1.2})
    first = engine.ask(PROMPTS, tokens=2)
    engine.forget_gpu()
    second = engine.ask(PROMPTS, tokens=2)
    assert all(cached_of(second))
    # Random weights answer any change sooner or later; with so tight a bound not at once.
    assert tokens_of(second) == tokens_of(first)


def test_what_fits_no_slot_is_not_stored(start: Any) -> None:
    settings = {"compression_codec": "lossless", "compression_ratio": 8.0}
    engine = start(settings)
    first = engine.ask(PROMPTS[:2])
    engine.forget_gpu()
    second = engine.ask(PROMPTS[:2])
    assert tokens_of(second) == tokens_of(first)
    assert cached_of(second) == [0, 0]
    assert engine.counted.rejected_chunks > 0
    assert engine.used_slots == 0


def test_bounds_are_relaxed_where_slots_are_small(start: Any) -> None:
    engine = start({"compression_codec": "bounded", "compression_error_bound": 1e-3, "compression_ratio": 4.0})
    engine.ask(PROMPTS[:2])
    engine.forget_gpu()
    assert all(cached_of(engine.ask(PROMPTS[:2])))
    assert engine.counted.relaxed_chunks > 0


def test_the_interval_line_says_ratio_and_slots(start: Any) -> None:
    engine = start(LOSSLESS)
    engine.ask(PROMPTS[:1])
    engine.settle()
    stats = engine.connector.get_kv_connector_stats()
    said = type(engine.connector).build_kv_connector_stats(stats.to_dict()).reduce()
    assert said["vllm:kvferry_slots"] == engine.manager._num_chunks
    assert said["vllm:kvferry_slots_used"] == engine.used_slots
    assert 1.2 < said["vllm:kvferry_ratio"] < 2


def test_a_cache_reset_during_transfers(start: Any) -> None:
    engine = start(LOSSLESS)
    first = engine.ask(PROMPTS)
    assert engine.llm.reset_prefix_cache(reset_connector=True)  # stores are still to come
    assert tokens_of(engine.ask(PROMPTS)) == tokens_of(first)
    engine.forget_gpu()
    assert tokens_of(engine.ask(PROMPTS)) == tokens_of(first)


def test_requests_are_aborted(start: Any) -> None:
    engine = start(LOSSLESS)
    first = engine.ask(PROMPTS)
    engine.forget_gpu()
    engine.begin(PROMPTS, steps=2)
    engine.abort_all()
    assert tokens_of(engine.ask(PROMPTS)) == tokens_of(first)
    engine.settle()
    assert not engine.worker._under_way


def test_data_that_is_stored_raw(start: Any) -> None:
    engine = start({"compression_codec": "raw"})
    first = engine.ask(PROMPTS)
    engine.forget_gpu()
    second = engine.ask(PROMPTS)
    assert tokens_of(second) == tokens_of(first)
    assert all(cached_of(second))
    assert engine.counted.stored_raw_bytes <= engine.counted.stored_bytes
