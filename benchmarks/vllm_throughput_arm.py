"""One engine of `benchmarks.vllm_throughput`, which starts it and tells it what to do: a line of JSON a command."""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.vllm_offload_arm import Arm, answer_commands
from benchmarks.vllm_workloads import WORKLOADS, Request, Sizes, Workload, random_tokens, tokens_of_text


@dataclass
class _Sent:
    """A request that an engine works on. Times are of `perf_counter`."""

    request: Request
    at: float
    first_at: float = 0.0


class ServingArm(Arm):
    """An engine that is kept busy with a number of requests at a time."""

    def __init__(self, plan: dict[str, Any]) -> None:
        super().__init__(plan)
        self._sizes = Sizes(**plan["sizes"])
        self._seed = plan["seed"]
        self._source = tokens_of_text(Path(plan["tokens"])) if plan["tokens"] else random_tokens(self.vocabulary)
        self._workloads: dict[str, Workload] = {}
        self._sent = 0

    def fill(self, workload: str, concurrency: int) -> dict[str, Any]:
        """Begin a workload with empty caches, and ask for its working set once."""
        self.forget_gpu()
        made = WORKLOADS[workload](self._sizes, self._source, self._seed)
        self._workloads[workload] = made
        return self._serve(made.fill(), concurrency)

    def serve(self, workload: str, requests: int, concurrency: int) -> dict[str, Any]:
        """The next `requests`, with `concurrency` of them in flight for as long as there are any left."""
        return self._serve(self._workloads[workload].take(requests), concurrency)

    def _serve(self, requests: list[Request], concurrency: int) -> dict[str, Any]:
        engine, greedy = self.llm.llm_engine, self._greedy(self._sizes.output)
        waiting, flying = deque(requests), dict[str, _Sent]()
        first_s, each_s = list[float](), list[float]()
        answered = cached = 0
        before = self._counted()
        began = time.perf_counter()
        while waiting or flying:
            while len(flying) < concurrency and (request := _next(waiting, flying)) is not None:
                self._sent += 1
                flying[name := f"serve-{self._sent}."] = _Sent(request, time.perf_counter())
                engine.add_request(name, {"prompt_token_ids": request.prompt}, greedy)
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                # vLLM adds to the names that it is given.
                name = output.request_id.partition(".")[0] + "."
                tokens = len(output.outputs[0].token_ids)
                sent = flying[name]
                if tokens and not sent.first_at:
                    sent.first_at = now
                    first_s.append(now - sent.at)
                if output.finished:
                    del flying[name]
                    answered += tokens
                    cached += output.num_cached_tokens or 0
                    if tokens > 1:
                        each_s.append((now - sent.first_at) / (tokens - 1))
        seconds = time.perf_counter() - began
        self.settle()
        after = self._counted()
        return {
            "requests": len(requests),
            "seconds": seconds,
            "prompt_tokens": sum(len(request.prompt) for request in requests),
            "output_tokens": answered,
            "cached_tokens": cached,
            **{name: after[name] - before[name] for name in after},
            "first_token_s": first_s,
            "each_token_s": each_s,
        }

    def _counted(self) -> dict[str, int]:
        """vLLM's own counters."""
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        names = {
            "host_tokens": "vllm:external_prefix_cache_hits",
            "gpu_tokens": "vllm:prefix_cache_hits",
            "preemptions": "vllm:num_preemptions",
        }
        return {ours: int(getattr(found.get(name), "value", 0)) for ours, name in names.items()}


def _next(waiting: deque[Request], flying: dict[str, _Sent]) -> Request | None:
    """Take the first request whose conversation has none in flight."""
    busy = {sent.request.conversation for sent in flying.values()} - {None}
    for place, request in enumerate(waiting):
        if request.conversation not in busy:
            del waiting[place]
            return request
    return None


if __name__ == "__main__":
    answer_commands(ServingArm)
