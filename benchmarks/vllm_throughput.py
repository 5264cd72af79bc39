"""How many requests a second vLLM answers with its own OffloadingConnector, and with kvferry's, over the number of
requests in flight: conversations that grow turn by turn, and requests that share long prefixes.

python -m benchmarks.vllm_throughput [--output results.json] [--plot throughput.png]

The working set fits neither the GPU's cache nor host memory raw, but host memory at the ratio of the bounded codec. All
engines are up at the same time, each in a process of its own and idle while another is measured; at every point all of
them get the same requests, and another one goes first. How many requests a point takes follows from the time left and
from how fast the first arm was while the working set was filled in.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.vllm_offload import Process, write
from benchmarks.vllm_offload_arm import SHAPES
from benchmarks.vllm_throughput_report import plot, row_of, tables
from benchmarks.vllm_workloads import SIZES, WORKLOADS, Sizes
from kvferry.bench.machine import describe

EXACT = ("raw", "lossless")
ANSWER_TOKENS = 16
LEAST_REQUESTS = 12
"""Of one point, and twice as many as are in flight."""
SECONDS_TO_CLOSE = 8.0


@dataclass
class Pace:
    """How fast the first arm was: seconds a request while filling in (nothing is restored), and one at a time."""

    filling_s: float
    alone_s: float

    def point_s(self, concurrency: int) -> float:
        """Of a point with as few requests as can be."""
        return least_requests(concurrency) * max(self.filling_s, self.alone_s / concurrency)


def least_requests(concurrency: int) -> int:
    return max(LEAST_REQUESTS, 2 * concurrency)


class Measurement:
    """Points measured on engines that are up, until `deadline` (of `perf_counter`), of at most `most` requests each."""

    def __init__(
        self, engines: list[Process], workloads: list[str], concurrency: list[int], deadline: float, most: int
    ) -> None:
        self._engines, self._concurrency, self._deadline, self._most = engines, concurrency, deadline, most
        self._unfilled, self._fill_s = list(workloads), 0.0
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []

    def run(self) -> None:
        while self._unfilled:
            workload = self._unfilled.pop(0)
            if self._left_s() < self._fill_s:
                self._leave_out(workload, self._concurrency)
                continue
            pace = self._fill(workload)
            for number, concurrency in enumerate(self._concurrency):
                self._point(workload, concurrency, pace, self._concurrency[number:])

    def _fill(self, workload: str) -> Pace:
        began = time.perf_counter()
        most = max(self._concurrency)
        filled = [engine.do("fill", workload=workload, concurrency=most) for engine in self._engines]
        # Also lets every arm run once with one request alone.
        alone = [engine.do("serve", workload=workload, requests=4, concurrency=1) for engine in self._engines]
        self._fill_s = time.perf_counter() - began
        return Pace(filled[0]["seconds"] / filled[0]["requests"], alone[0]["seconds"] / 4)

    def _point(self, workload: str, concurrency: int, pace: Pace, to_come: list[int]) -> None:
        """`to_come`: the points of this workload from this one on."""
        arms = len(self._engines)
        if self._left_s() < arms * pace.point_s(concurrency):
            self._leave_out(workload, [concurrency])
            return
        # The same share of the time left for each point, by what the least of it takes.
        least_s = arms * sum(pace.point_s(each) for each in to_come + len(self._unfilled) * self._concurrency)
        share = (self._left_s() - len(self._unfilled) * self._fill_s) / least_s
        requests = max(least_requests(concurrency), min(self._most, int(share * least_requests(concurrency))))
        first = len(self.rows) // len(self._engines) % len(self._engines)
        found = {}
        for engine in self._engines[first:] + self._engines[:first]:
            found[engine.arm] = engine.do("serve", workload=workload, requests=requests, concurrency=concurrency)
        for engine in self._engines:
            self.rows.append({"workload": workload, "concurrency": concurrency, "arm": engine.arm,
                              **row_of(found[engine.arm])})  # fmt: skip

    def _left_s(self) -> float:
        return self._deadline - time.perf_counter()

    def _leave_out(self, workload: str, concurrency: list[int]) -> None:
        for each in concurrency:
            self.left_out.append({"workload": workload, "concurrency": each})
            print(f"{workload}, {each} in flight: left out, no time", flush=True)


def answers_agree(engines: list[Process], length: int) -> bool:
    """Whether arms that are exact give the same greedy answer to a prompt out of host memory."""
    answers = []
    for engine in engines:
        engine.do("cold", seed=1, length=length)
        found = engine.do("answer", seed=1, length=length, tokens=ANSWER_TOKENS)
        if engine.arm in EXACT:
            answers.append((found["tokens"], found["cached"] > 0))
    return all(found == answers[0] and found[1] for found in answers)


def token_bytes(shape: dict[str, Any]) -> int:
    """Bytes of KV of one token in bfloat16, from a model's config."""
    heads = shape.get("num_key_value_heads", shape["num_attention_heads"])
    width = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return int(2 * 2 * shape["num_hidden_layers"] * heads * width)


def make_plan(given: argparse.Namespace) -> dict[str, Any]:
    """What engines are told. Raises `SystemExit` for sizes that the model does not take."""
    sizes: Sizes = SIZES["tiny" if given.model is None and given.shape == "tiny" else "8b"]
    if given.output_tokens:
        sizes = replace(sizes, output=given.output_tokens)
    if given.gpu_tokens:
        sizes = replace(sizes, gpu=given.gpu_tokens)
    shape = SHAPES[given.shape]
    if given.model is not None:
        shape = json.loads(Path(given.model, "config.json").read_text())
        positions = shape.get("max_position_embeddings", 0)
        if positions < sizes.longest + sizes.output:
            raise SystemExit(f"{given.model} takes {positions} tokens, prompts have up to {sizes.longest}")
    host_gib = given.cpu_gib or sizes.host_share * sizes.working_set * token_bytes(shape) / 2**30
    most = max(int(each) for each in given.concurrency.split(","))
    return {
        "shape": given.shape, "model": given.model, "tokens": given.tokens, "seed": given.seed,
        "sizes": asdict(sizes), "working_set_gib": sizes.working_set * token_bytes(shape) / 2**30,
        "cpu_gib": host_gib, "gpu_memory": given.gpu_memory, "chunk_tokens": 64, "max_num_seqs": max(32, most),
        "max_model_len": sizes.longest + sizes.output + 64, "gpu_tokens": sizes.gpu,
        # Whatever its size, it keeps vLLM from measuring how much memory is free while other engines start.
        "options": {"kv_cache_memory_bytes": sizes.gpu * token_bytes(shape), **json.loads(given.options)},
    }  # fmt: skip


def start(arms: list[str], plan: dict[str, Any], logs: Path, one_by_one: bool, engines: list[Process]) -> None:
    """Append engines that are up to `engines`."""
    began = time.perf_counter()
    for arm in arms:
        engines.append(Process(arm, plan, logs, "benchmarks.vllm_throughput_arm"))
        if one_by_one:
            engines[-1].wait_until_up()
    for engine in engines:
        if not one_by_one:
            engine.wait_until_up()
        print(f"{engine.arm}: up after {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms_help = "raw, none, lossless, bounded, bounded:ERROR_BOUND; the first is what others are compared with"
    parser.add_argument("--arms", default="raw,bounded,lossless", help=arms_help)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of these")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32", help="requests in flight")
    parser.add_argument("--budget-seconds", type=float, default=250.0, help="of the whole run, start-up included")
    parser.add_argument("--requests", type=int, default=400, help="of one point, at most")
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES), help="of a model with random weights")
    parser.add_argument("--model", help="a model's folder, instead of random weights")
    parser.add_argument("--tokens", help="a file of u16 token ids to make prompts of, instead of random tokens")
    parser.add_argument("--output-tokens", type=int, help="of each answer")
    parser.add_argument("--gpu-tokens", type=int, help="what the GPU's cache holds")
    parser.add_argument("--cpu-gib", type=float, help="host memory of each arm; by default 3/8 of the working set, raw")
    parser.add_argument("--gpu-memory", type=float, default=0.25, help="share of the GPU that must be free for an arm")
    parser.add_argument("--one-by-one", action="store_true", help="start an engine when the one before is up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options", default="{}", help="more of vLLM's engine arguments, JSON")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG file for requests a second and time to first token")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs")
    given = parser.parse_args()
    arms, workloads = given.arms.split(","), given.workloads.split(",")
    if unknown := set(workloads) - set(WORKLOADS):
        raise SystemExit(f"--workloads: no {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    concurrency = [int(each) for each in given.concurrency.split(",")]
    plan = make_plan(given)
    began = time.perf_counter()
    engines: list[Process] = []
    results: dict[str, Any] = {"machine": describe(), "plan": plan}
    try:
        start(arms, plan, given.logs, given.one_by_one, engines)
        results["answers_agree"] = right = answers_agree(engines, plan["sizes"]["prefix"])
        measured = Measurement(
            engines, workloads, concurrency, began + given.budget_seconds - SECONDS_TO_CLOSE, given.requests
        )
        results["rows"], results["left_out"] = measured.rows, measured.left_out
        try:
            measured.run()
        finally:  # what was measured before something broke is kept
            write(results, began, given.output)
        results["engines"] = {engine.arm: engine.do("facts") for engine in engines}
    finally:
        for engine in engines:
            engine.close()
    write(results, began, given.output)
    tables(results["rows"], arms)
    if given.plot:
        plot(results["rows"], arms, given.plot)
    if not right:
        raise SystemExit("answers of raw and lossless differ")


if __name__ == "__main__":
    main()
