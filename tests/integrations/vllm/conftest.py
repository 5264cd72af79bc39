"""Engines for the tests, one at a time: starting another closes the one before."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything imports vLLM, which looks at its platform once.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1"
)
if not torch.cuda.is_available():
    os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")

Start = Callable[..., Any]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama; skips where vLLM's engine cannot run."""
    try:
        from engine import make_model
    except ModuleNotFoundError as missing:
        pytest.skip(f"vLLM's engine does not run here: {missing.name} is not installed (make test installs it)")
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def _running() -> Iterator[dict[str, Any]]:
    running: dict[str, Any] = {}
    yield running
    if running:
        running["engine"].close()


@pytest.fixture
def start(model: Path, _running: dict[str, Any]) -> Start:
    """`start(extra, **options)`: an engine. One that was started the same way before goes on, its caches empty, unless
    it is to be `fresh`."""

    def start(extra: dict[str, Any] | None, fresh: bool = False, folder: Path = model, **options: Any) -> Any:
        from engine import Engine

        asked = repr((extra, folder, options))
        if fresh or _running.get("asked") != asked:
            if _running:
                _running.pop("engine").close()
                _running.clear()
            _running.update(engine=Engine(folder, extra, **options), asked=asked)
        engine = _running["engine"]
        engine.empty()
        return engine

    return start


@pytest.fixture
def no_engine(model: Path, _running: dict[str, Any]) -> Iterator[None]:
    """None runs, and what a test leaves of one is cleared away."""
    from engine import close_what_is_left

    if _running:
        _running.pop("engine").close()
        _running.clear()
    yield
    close_what_is_left()
