"""vLLM's engine in this process, around a tiny model of random weights: on the CPU, or on a GPU where there is one."""

import gc
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cpu_operators  # noqa: F401  defines them, for which vLLM must not have been started
import torch
from prompts import BLOCK, VOCABULARY
from vllm import LLM, SamplingParams

from kvferry.integrations.vllm import compat
from kvferry.integrations.vllm.connector import KVFerryConnector
from kvferry.integrations.vllm.metrics import Counters
from kvferry.integrations.vllm.select import transfer_config

ON_GPU = torch.cuda.is_available()


def make_model(folder: Path) -> Path:
    """A Llama whose answers hang on every token it has seen: random weights, but not small ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(LlamaForCausalLM, LlamaConfig(**_SHAPE, rope_theta=10000.0), folder)


def make_hybrid_model(folder: Path) -> Path:
    """The same, but every other layer looks back 64 tokens only, which makes two KV cache groups."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 2
    shape = {**_SHAPE, "num_hidden_layers": 4}
    return _save(LlamaForCausalLM, LlamaConfig(**shape, sliding_window=64, layer_types=kinds), folder)


_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _save(kind: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(3)
    kind(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Engine:
    """One engine for the model in `folder`. `extra` goes into kv_connector_extra_config, None leaves vLLM without a
    connector; `blocks` are the KV cache's."""

    def __init__(self, folder: Path, extra: dict[str, Any] | None, *, blocks: int = 64, **options: Any) -> None:
        if extra is not None:
            options["kv_transfer_config"] = config_of(extra)
        if ON_GPU:
            options.setdefault("gpu_memory_utilization", 0.2)
            # Whatever its size, it keeps vLLM from measuring how much memory is free, which other tests change.
            options.setdefault("kv_cache_memory_bytes", 1 << 30)
        else:
            options["compilation_config"] = {"custom_ops": ["none"]}
        options.setdefault("max_model_len", 768)
        options.setdefault("block_size", BLOCK)
        options.setdefault("max_num_seqs", 8)
        self.llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            num_gpu_blocks_override=blocks,
            disable_log_stats=False,
            **options,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core

    def ask(self, prompts: Sequence[Iterable[int]], tokens: int = 8) -> list[tuple[list[int], int]]:
        """Greedy answers to `prompts`, each with how many of its prompt's tokens came out of a cache."""
        greedy = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(asked, greedy, use_tqdm=False)
        return [(list(answer.outputs[0].token_ids), answer.num_cached_tokens or 0) for answer in answers]

    def begin(self, prompts: Sequence[Iterable[int]], steps: int) -> None:
        """Ask, and do `steps` steps of the answers."""
        from vllm import SamplingParams

        greedy = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, temperature=0)
        for number, prompt in enumerate(prompts):
            self.llm.llm_engine.add_request(f"begun-{number}", {"prompt_token_ids": list(prompt)}, greedy)
        for _ in range(steps):
            self.llm.llm_engine.step()

    def abort_all(self) -> None:
        """Give up all requests."""
        scheduler = self.core.scheduler
        self.core.abort_requests(list(scheduler.requests))
        self.llm.llm_engine.output_processor.abort_requests(
            list(self.llm.llm_engine.output_processor.request_states), internal=True
        )
        self.settle()

    def settle(self) -> None:
        """Let stores that are under way come to their end: they are deferred to the step after."""
        for _ in range(8):
            self.core.step_fn()

    def forget_gpu(self) -> None:
        """Empty the GPU's prefix cache: what is wanted again comes out of host memory."""
        self.settle()
        assert self.llm.reset_prefix_cache()

    def empty(self) -> None:
        """Empty both caches, and the counters."""
        self.settle()
        assert self.llm.reset_prefix_cache(reset_connector=True)
        self.settle()
        if isinstance(self.connector, KVFerryConnector):
            self.connector._since_start = Counters()

    @property
    def connector(self) -> Any:
        """The scheduler's half."""
        return self.core.scheduler.connector

    @property
    def manager(self) -> Any:
        return self.connector.connector_scheduler.manager

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().connector_worker.worker

    @property
    def used_slots(self) -> int:
        return compat.slots_used(self.manager)

    @property
    def preemptions(self) -> int:
        """Since the engine was started."""
        counter = self.metrics().get("vllm:num_preemptions")
        return int(counter.value) if counter is not None else 0

    def metrics(self) -> dict[str, Any]:
        """What vLLM offers on /metrics, by name."""
        return {metric.name: metric for metric in self.llm.get_metrics()}

    @property
    def rows(self) -> Any:
        """Host memory, uint8 `[rows, row_bytes]`."""
        return self.worker._rows

    @property
    def counted(self) -> Counters:
        """What was counted since the start, or since `empty`."""
        found: Counters = self.connector._since_start
        return found

    def close(self) -> None:
        with suppress(Exception):
            self.core.shutdown()
        del self.llm, self.core
        close_what_is_left()


def close_what_is_left() -> None:
    """Undo what an engine did to the process, also one that did not come up."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def config_of(extra: dict[str, Any]) -> dict[str, Any]:
    """A kv_transfer_config for `extra`, with room for many chunks unless it says otherwise."""
    return transfer_config({"kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20, **extra}}, None, {})
