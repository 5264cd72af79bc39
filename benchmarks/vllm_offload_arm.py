"""One engine of `benchmarks.vllm_offload`, which starts it and tells it what to do: a line of JSON a command."""

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES: dict[str, dict[str, Any]] = {
    # Llama 3.1 8B's; 128 KiB of KV a token in bfloat16.
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024},
}  # fmt: skip
_USUAL_SCALE = 35.0
"""vLLM draws dummy weights from +-0.001; this makes them as large as a model starts training with."""
_DEADLINE_S = 60.0


def transfer(arm: str, cpu_gib: float, chunk_tokens: int) -> dict[str, Any] | None:
    """The kv-transfer-config of an arm: "none", "raw" (vLLM's own), or one of kvferry's codecs."""
    if arm == "none":
        return None
    extra = {"cpu_bytes_to_use": int(cpu_gib * 2**30), "block_size": chunk_tokens}
    if arm == "raw":
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    from kvferry.integrations.vllm import transfer_config

    codec, _, bound = arm.partition(":")
    chosen = {"codec": codec, **({"error_bound": float(bound)} if bound else {})}
    return transfer_config({"kv_connector_extra_config": extra}, None, chosen)


class Arm:
    """An engine and what is measured of it. Prompts are random tokens, by seed and length."""

    def __init__(self, plan: dict[str, Any]) -> None:
        began = time.perf_counter()
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            _prepare_cpu()
        from vllm import LLM

        start = time.perf_counter()
        self.import_s = start - began
        self.watched_s = watch_startup()
        self.shape = dict(SHAPES[plan["shape"]]) if plan["model"] is None else {}
        options: dict[str, Any] = {"model": plan["model"] or self._make_config(), "enforce_eager": True}
        if plan["model"] is None:
            options["load_format"] = "dummy"
        if not on_gpu:
            options |= {"compilation_config": {"custom_ops": ["none"]}, "block_size": 32}
        if plan.get("gpu_tokens"):
            # A block more: vLLM keeps one for itself.
            block = options.setdefault("block_size", 16)
            options["num_gpu_blocks_override"] = plan["gpu_tokens"] // block + 1
        options["skip_tokenizer_init"] = True  # prompts are tokens
        config = transfer(plan["arm"], plan["cpu_gib"], plan["chunk_tokens"])
        if config is not None:
            options["kv_transfer_config"] = config
        self.llm = LLM(
            dtype="bfloat16",
            max_model_len=plan["max_model_len"],
            max_num_seqs=plan.get("max_num_seqs", 32),
            gpu_memory_utilization=plan["gpu_memory"],
            disable_log_stats=False,
            **options,
            **plan["options"],
        )
        if plan["model"] is None:
            self.llm.apply_model(_scale_weights)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.connector = self.core.scheduler.connector
        self.startup_s = time.perf_counter() - start

    def _make_config(self) -> str:
        folder = tempfile.mkdtemp()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False, **self.shape,
        }  # fmt: skip
        Path(folder, "config.json").write_text(json.dumps(config))
        return folder

    # -- commands -----------------------------------------------------------------------------------------------------

    def cold(self, seed: int, length: int) -> dict[str, Any]:
        """Time to the first token of a prompt that is nowhere, storing meanwhile."""
        self.forget_gpu()
        return self._first_token(seed, length)

    def restored(self, seed: int, length: int) -> dict[str, Any]:
        """The same of a prompt that is in host memory."""
        self.forget_gpu()
        return self._first_token(seed, length)

    def answer(self, seed: int, length: int, tokens: int) -> dict[str, Any]:
        """Greedy tokens after a prompt that comes out of host memory, as far as it is there."""
        self.forget_gpu()
        found = self.llm.generate([self._prompt(seed, length)], self._greedy(tokens), use_tqdm=False)[0]
        return {"tokens": list(found.outputs[0].token_ids), "cached": found.num_cached_tokens or 0}

    def decoding(self, seed: int, length: int, running: int) -> dict[str, Any]:
        """Milliseconds of a decoding step of `running` requests: alone, and while the prompt is restored."""
        self.forget_gpu()
        engine = self.llm.llm_engine
        for number in range(running):
            engine.add_request(f"running-{seed}-{number}", self._prompt(10**6 + number, 64), self._greedy(160))
        for _ in range(20):
            engine.step()
        alone = [self._step_ms() for _ in range(40)]
        name = f"restored-{seed}"
        engine.add_request(name, self._prompt(seed, length), self._greedy(1))
        during, done = [], False
        while not done and len(during) < 100:
            began = time.perf_counter()
            done = any(out.request_id.startswith(name) and out.finished for out in engine.step())
            during.append((time.perf_counter() - began) * 1e3)
        while engine.has_unfinished_requests():
            engine.step()
        return {"alone_ms": statistics.median(alone), "during_ms": statistics.fmean(during), "steps": len(during)}

    def working_set(self, first_seed: int, prompts: int, length: int) -> dict[str, Any]:
        """Ask for `prompts` prompts in turn, twice: how much of the second round came out of host memory."""
        for number in range(prompts):
            self.cold(first_seed + number, length)
        began = time.perf_counter()
        again = [self.restored(first_seed + number, length) for number in range(prompts)]
        seconds = time.perf_counter() - began
        hits = sum(each["cached"] for each in again) / (prompts * length)
        return {"hit_rate": hits, "seconds": seconds, "prompts_a_second": prompts / seconds}

    def facts(self) -> dict[str, Any]:
        """What the engine is, and kvferry's counters."""
        from kvferry.integrations.vllm.connector import KVFerryConnector

        blocks = self.core.vllm_config.cache_config.num_gpu_blocks
        found: dict[str, Any] = {
            "import_s": self.import_s, "startup_s": self.startup_s, "of_it_s": self.watched_s, "gpu_blocks": blocks,
        }  # fmt: skip
        if self.connector is not None:
            manager = self.connector.connector_scheduler.manager
            found["host_chunks"] = manager._num_chunks
        if isinstance(self.connector, KVFerryConnector):
            counted = vars(self.connector._since_start)
            found["counted"] = counted
            found["ratio"] = counted["stored_raw_bytes"] / max(1, counted["stored_bytes"])
        return found

    # -- for these ----------------------------------------------------------------------------------------------------

    def forget_gpu(self) -> None:
        """Let stores end, and empty the GPU's prefix cache."""
        for attempt in range(5):
            self.settle()
            if self.llm.reset_prefix_cache():
                return
            # Overlapped steps free a request's blocks with the step after.
            self.llm.generate([self._prompt(10**7 + attempt, 8)], self._greedy(2), use_tqdm=False)
        raise RuntimeError("the prefix cache could not be emptied: blocks are still in use")

    def settle(self) -> None:
        deadline = time.perf_counter() + _DEADLINE_S
        while self.connector is not None and self.connector.has_pending_push_work():
            self.core.step_fn()
            if time.perf_counter() > deadline:
                raise RuntimeError(f"transfers did not end within {_DEADLINE_S:.0f} s")

    def _first_token(self, seed: int, length: int) -> dict[str, Any]:
        prompt, greedy = self._prompt(seed, length), self._greedy(1)
        began = time.perf_counter()
        found = self.llm.generate([prompt], greedy, use_tqdm=False)[0]
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cached": found.num_cached_tokens or 0}

    def _step_ms(self) -> float:
        began = time.perf_counter()
        self.llm.llm_engine.step()
        return (time.perf_counter() - began) * 1e3

    def _prompt(self, seed: int, length: int) -> dict[str, list[int]]:
        import numpy as np

        tokens = np.random.default_rng(seed).integers(3, self.vocabulary - 1, length)
        return {"prompt_token_ids": tokens.tolist()}

    def _greedy(self, tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)


def watch_startup() -> dict[str, float]:
    """Seconds of an engine's start to come, added up while it starts: `allocate` host memory (map it and fault it in),
    `register` it with CUDA, and the whole of making the `offload_worker` (these, and compiling kernels)."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
    from vllm.v1.kv_offload.cpu import gpu_worker
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    spent = {"allocate": 0.0, "register": 0.0, "offload_worker": 0.0}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                spent[name] += time.perf_counter() - began

        return wrapper

    SharedOffloadRegion.__init__ = timed("allocate", SharedOffloadRegion.__init__)
    gpu_worker.host_register = timed("register", gpu_worker.host_register)
    OffloadingConnectorWorker._init_worker = timed("offload_worker", OffloadingConnectorWorker._init_worker)
    return spent


def _prepare_cpu() -> None:
    """Let vLLM's engine run without a GPU, as the tests do."""
    os.environ.update(VLLM_TARGET_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integrations" / "vllm"))
    import cpu_operators  # noqa: F401


def _scale_weights(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.mul_(_USUAL_SCALE)


def answer_commands(kind: type[Arm]) -> None:
    """Answer commands until standard input ends."""
    plan = json.loads(sys.argv[1])
    replies = os.fdopen(plan["replies"], "w")

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    arm = kind(plan)
    reply(arm.facts())
    for line in sys.stdin:
        command = json.loads(line)
        reply(getattr(arm, command.pop("do"))(**command))


if __name__ == "__main__":
    answer_commands(Arm)
