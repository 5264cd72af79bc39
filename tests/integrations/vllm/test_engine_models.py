"""vLLM's engine with hybrid models, vLLM's own ways to switch compression on, its metrics, and many requests."""

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
from prompts import PROMPTS, cached_of, prompt, tokens_of

pytestmark = pytest.mark.xdist_group("vllm engine")

LOSSLESS = {"compression_codec": "lossless"}


@pytest.fixture(scope="module")
def hybrid(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engine import make_hybrid_model

    return make_hybrid_model(tmp_path_factory.mktemp("hybrid"))


@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_a_hybrid_model(start: Any, hybrid: Path, blocks_per_chunk: int) -> None:
    engine = start({**LOSSLESS, "blocks_per_chunk": blocks_per_chunk}, folder=hybrid)
    assert len(engine.worker._parts) == 2
    first = engine.ask(PROMPTS)
    engine.forget_gpu()
    second = engine.ask(PROMPTS)
    assert tokens_of(second) == tokens_of(first)
    assert all(cached_of(second))
    assert engine.counted.stored_raw_bytes > 1.2 * engine.counted.stored_bytes


def test_a_hybrid_models_loads_fail(start: Any, hybrid: Path) -> None:
    engine = start({**LOSSLESS, "blocks_per_chunk": 2}, folder=hybrid)
    first = engine.ask(PROMPTS)
    engine.forget_gpu()
    engine.rows.zero_()
    assert tokens_of(engine.ask(PROMPTS)) == tokens_of(first)
    assert engine.counted.corrupt_slots > 0
    engine.forget_gpu()
    third = engine.ask(PROMPTS)
    assert tokens_of(third) == tokens_of(first)
    assert all(cached_of(third))


def test_prometheus_has_what_is_counted(start: Any) -> None:
    engine = start(LOSSLESS, fresh=True)
    engine.ask(PROMPTS[:2])
    engine.forget_gpu()
    engine.ask(PROMPTS[:2])
    engine.ask([prompt(9, 40)])  # statistics travel with a step that comes later
    metrics = engine.metrics()
    assert metrics["vllm:kvferry_stored_raw_bytes"].value >= engine.counted.loaded_raw_bytes > 0
    assert metrics["vllm:kvferry_loaded_bytes"].value > 0
    assert 1.2 < metrics["vllm:kvferry_ratio"].value < 2
    assert metrics["vllm:kvferry_slots_used"].value > 0
    assert metrics["vllm:kv_offload_store_bytes"].value == metrics["vllm:kvferry_stored_bytes"].value
    assert "vllm:kvferry_corrupt_slots" in metrics


def test_many_requests_with_aborts(start: Any) -> None:
    """Prompts that share beginnings, in a small GPU cache and a smaller host cache, some given up on the way."""
    draw = random.Random(0)
    shared = [prompt(seed, 160) for seed in range(1, 5)]
    asked = [shared[number % 4] + prompt(20 + number, 16 + 12 * (number % 9)) for number in range(24)]
    expected = tokens_of(start(None, blocks=64).ask(asked))
    extra = {**LOSSLESS, "blocks_per_chunk": 1, "cpu_bytes_to_use": 20 * 12288}
    engine = start(extra, blocks=32)
    for _ in range(25):
        numbers = [draw.randrange(len(asked)) for _ in range(6)]
        if draw.random() < 0.3:
            engine.begin([asked[number] for number in numbers], steps=draw.randrange(1, 8))
            engine.abort_all()
        else:
            found = engine.ask([asked[number] for number in numbers])
            assert tokens_of(found) == [expected[number] for number in numbers]
        if draw.random() < 0.3:
            engine.forget_gpu()
    engine.settle()
    assert engine.counted.loaded_raw_bytes > 0
    assert not engine.counted.corrupt_slots and not engine.counted.failed_loads
    assert not engine.worker._under_way and not engine.connector.connector_scheduler._jobs
    manager = engine.manager
    assert manager._num_evictable_cache_chunks == engine.used_slots  # nothing is held for ever


@pytest.fixture
def arguments(model: Path) -> Any:
    """vLLM's own EngineArgs, for words of a command line, with what the plugin adds."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvferry.integrations.vllm.plugin import wrap

    load_general_plugins()
    wrap(EngineArgs)  # also where kvferry was not installed as a package

    def arguments(*words: str) -> Any:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed: argparse.Namespace = parser.parse_args(["--model", str(model), "--skip-tokenizer-init", *words])
        return EngineArgs.from_cli_args(parsed)

    return arguments


@pytest.mark.usefixtures("no_engine")
def test_vllms_own_flags(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_ENABLE_COMPRESSION", "KVFERRY_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    assert arguments().create_engine_config().kv_transfer_config is None
    stock = arguments("--kv-offloading-size", "1").create_engine_config().kv_transfer_config
    assert stock.kv_connector == "OffloadingConnector"

    words = ["--enable-compression", "--kv-offloading-size", "1", "--compression-error-bound", "0.02"]
    config = arguments(*words).create_engine_config().kv_transfer_config
    assert config.kv_connector == "KVFerryConnector"
    assert config.kv_connector_extra_config["cpu_bytes_to_use"] == 1 << 30
    with pytest.raises(ValueError, match="compression_mode='flat'"):
        arguments("--enable-compression", "--compression-mode", "flat").create_engine_config()

    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", "1")
    assert arguments().create_engine_config().kv_transfer_config.kv_connector == "KVFerryConnector"
    assert arguments("--disable-compression").create_engine_config().kv_transfer_config is None
