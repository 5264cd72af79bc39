"""vLLM's engine with two workers, each with half of the heads and slots of its own for them: on two GPUs, and on the
CPU where there is none. A chunk is there only if both workers can load their part of it.

Answers are compared between the same computations, on blocks out of the GPU's cache and out of host memory: see
`test_engine_gpu`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test installs it)")

from trained import model_folder, record, text_tokens, token_bytes
from transformers import AutoConfig

from kvferry import Profile, Rope

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.xdist_group("vllm engine"),
    *([pytest.mark.gpu] if ON_GPU else []),
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

BLOCK, WORKERS, ANSWER = 64, 2, 16
PROMPTS = 16 if ON_GPU else 3
CHUNKS = 12 if ON_GPU else 3
"""Of each prompt; a few tokens more."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = text_tokens()
    return [text[at : at + CHUNKS * BLOCK + 20] for at in range(0, PROMPTS * 1500, 1500)]


@pytest.fixture
def two(start_two: Any) -> Any:
    """The engine, its caches empty."""
    return start_two({"compression_codec": "lossless"})


@pytest.fixture
def start_two(start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts engines with settings."""
    options: dict[str, Any] = {"worker_extension_cls": "shared_rows.SharedRows"}
    if ON_GPU:
        # Sums over workers by NCCL alone, without multicast: how they are made is not what is tested.
        options = {"disable_custom_all_reduce": True}
        # This process has used CUDA: workers cannot be forks of it.
        environment = {
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    def start_two(settings: dict[str, Any]) -> Any:
        extra = {**settings, "blocks_per_chunk": 1, "cpu_bytes_to_use": 16384 * token_bytes()}
        return start(
            extra, folder=model_folder(), tensor_parallel_size=WORKERS, distributed_executor_backend="mp",
            blocks=PROMPTS * (CHUNKS + 2), block_size=BLOCK, max_model_len=(CHUNKS + 2) * BLOCK, **options,
        )  # fmt: skip

    return start_two


def on_workers(engine: Any, call: Any) -> list[Any]:
    """What `call(rank, slot_worker)` returns in each worker's process."""

    def run(worker: Any) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return call(worker.rank, get_kv_transfer_group().connector_worker.worker)

    return list(engine.llm.collective_rpc(run))


def ask_each(engine: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Answers of prompts asked alone, and how many of their tokens were cached."""
    found = [engine.ask([prompt], ANSWER)[0] for prompt in prompts]
    return [answer for answer, _ in found], [cached for _, cached in found]


@pytest.fixture
def stored(two: Any, prompts: list[list[int]]) -> tuple[Any, list[list[int]]]:
    """The engine with `prompts` in host memory only, and their answers with blocks out of the GPU's cache."""
    ask_each(two, prompts)
    near, cached = ask_each(two, prompts)
    assert cached == [CHUNKS * BLOCK] * PROMPTS
    two.forget_gpu()
    return two, near


def test_answers_are_the_same_out_of_both_workers_slots(
    stored: tuple[Any, list[list[int]]], prompts: list[list[int]]
) -> None:
    engine, near = stored
    far, cached = ask_each(engine, prompts)
    record("tensor-parallel", {
        "workers": WORKERS, "prompts": PROMPTS, "prompt_tokens": CHUNKS * BLOCK + 20, "answer_tokens": ANSWER,
        "identical_to_gpu_cache": sum(a == b for a, b in zip(near, far, strict=True)),
        "ratio": engine.counted.stored_raw_bytes / engine.counted.stored_bytes,
    })  # fmt: skip
    assert far == near
    assert cached == [CHUNKS * BLOCK] * PROMPTS
    found = engine.counted
    # Both workers counted, each its half.
    assert found.loaded_raw_bytes == found.stored_raw_bytes == PROMPTS * CHUNKS * BLOCK * token_bytes()
    assert not found.corrupt_slots and not found.failed_loads and not found.failed_stores


def test_each_worker_has_slots_of_its_own(stored: tuple[Any, list[list[int]]]) -> None:
    engine, _ = stored

    def look(rank: int, worker: Any) -> Any:
        region = worker._region
        at = worker._rows.data_ptr() - region.base_tensor.data_ptr()
        return rank, at, worker._rows[:4, :64].tolist(), tuple(worker._rows.shape), region.total_size_bytes

    found = on_workers(engine, look)
    (one, begin, mine, shape, size), (other, next_begin, others, other_shape, other_size) = sorted(found)
    assert (one, other, begin) == (0, 1, 0)
    assert (shape, size) == (other_shape, other_size)
    assert shape[1] <= next_begin
    assert WORKERS * shape[0] * shape[1] <= size <= 16384 * token_bytes()
    assert all(a != b for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_corrupt_slot_of_one_worker_is_a_miss_of_both(
    stored: tuple[Any, list[list[int]]], prompts: list[list[int]], rank: int
) -> None:
    engine, near = stored

    def damage(own: int, worker: Any) -> None:
        if own == rank:
            worker._rows[1, 1000:1008] ^= 0xA5  # the second chunk of the first prompt

    on_workers(engine, damage)
    before = engine.counted.stored_raw_bytes
    whole = [CHUNKS * BLOCK] * (PROMPTS - 1)
    for known in (None, 1, CHUNKS, CHUNKS):
        # What is behind the chunk is computed by the first request, which vLLM does not let store what it was to load.
        # The second finds one chunk, and stores the next. A computation in another shape may change that prompt's
        # answers on a GPU.
        answers, cached = ask_each(engine, prompts)
        assert answers[1:] == near[1:]
        assert ON_GPU or answers[0] == near[0]
        assert cached[1:] == whole
        assert known is None or cached[0] == known * BLOCK
        engine.forget_gpu()
        # Of both workers' parts.
        assert engine.counted.stored_raw_bytes - before == (0 if known is None else BLOCK * token_bytes())
    assert engine.counted.corrupt_slots == 1
    assert not engine.connector.connector_scheduler._jobs


def test_what_one_worker_cannot_store_is_not_there(two: Any, prompts: list[list[int]]) -> None:
    def break_encoding(rank: int, worker: Any) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a kernel that does not work")

        if rank == 1:
            for transfers in (transfers for group in worker._transfers for transfers in group):
                transfers.kept, transfers.store = transfers.store, fail

    def mend(rank: int, worker: Any) -> None:
        if rank == 1:
            for transfers in (transfers for group in worker._transfers for transfers in group):
                transfers.store = transfers.kept

    on_workers(two, break_encoding)
    try:
        first, _ = ask_each(two, prompts)
        two.forget_gpu()
        assert two.used_slots == 0
        second, cached = ask_each(two, prompts)
        assert second == first
        assert cached == [0] * PROMPTS
        two.settle()
        assert two.counted.failed_stores == 2 * PROMPTS * CHUNKS
    finally:
        on_workers(two, mend)
    two.forget_gpu()
    ask_each(two, prompts)
    two.forget_gpu()
    assert ask_each(two, prompts)[1] == [CHUNKS * BLOCK] * PROMPTS


def profile_of_the_model(folder: Path) -> str:
    """Hadamard bases of each head, with steps at which hardly anything is lost."""
    config = json.loads((model_folder() / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    rope = Rope.from_config(AutoConfig.from_pretrained(model_folder()))
    profile = Profile.hadamard(layers, heads, config["head_dim"], rope, [(0.004, 0.004)] * layers)
    profile.save(folder / "profile.safetensors")
    return str(folder / "profile.safetensors")


def test_each_worker_transforms_its_heads(start_two: Any, prompts: list[list[int]], tmp_path: Path) -> None:
    path = profile_of_the_model(tmp_path)
    engine = start_two({"compression_profile": path, "compression_ratio": 1.3})
    whole = Profile.load(path)

    def look(rank: int, worker: Any) -> Any:
        codec = worker._parts[0][0].slot_codec.codec
        return rank, codec.name, codec.profile.heads, codec.profile.digest

    found = sorted(on_workers(engine, look))
    share = whole.heads // WORKERS
    assert [each[:3] for each in found] == [(rank, "transform", share) for rank in range(WORKERS)]
    assert [each[3] for each in found] == [whole.for_heads(rank * share, share).digest for rank in range(WORKERS)]
    ask_each(engine, prompts)
    near, _ = ask_each(engine, prompts)
    engine.forget_gpu()
    far, cached = ask_each(engine, prompts)
    assert cached == [CHUNKS * BLOCK] * PROMPTS
    counted = engine.counted
    assert not counted.corrupt_slots and not counted.failed_loads and not counted.failed_stores
    assert counted.loaded_raw_bytes == PROMPTS * CHUNKS * BLOCK * token_bytes()
    # Near enough for the first tokens.
    assert [answer[:2] for answer in far] == [answer[:2] for answer in near]
