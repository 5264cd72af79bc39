"""vLLM with its own OffloadingConnector against kvferry's, interleaved: time to the first token of prompts that are
computed, and of prompts that come out of host memory; decoding meanwhile; how much fits; and whether answers agree.

python -m benchmarks.vllm_offload [--quick] [--output results.json]

All engines are up at the same time, each in a process of its own and idle while another is measured: every repetition
measures all of them, so that what drifts, drifts for all. Needs a GPU with room for them (three times an 8B model and
its cache: an H200).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvferry.bench.machine import describe

DECODING = 8
"""Requests that decode while a prompt is restored."""
ANSWER_TOKENS = 16


class Process:
    """An engine in a process of its own, which runs `module`. Call `wait_until_up` before anything else."""

    facts: dict[str, Any]

    def __init__(self, arm: str, plan: dict[str, Any], logs: Path, module: str = "benchmarks.vllm_offload_arm") -> None:
        self.arm = arm
        self.log = logs / f"vllm-{arm.replace(':', '-')}.log"
        read, write = os.pipe()
        words = [
            sys.executable,
            "-m",
            module,
            json.dumps({**plan, "arm": arm, "replies": write}),
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[write], text=True
            )
        os.close(write)
        self._replies = os.fdopen(read)

    def wait_until_up(self) -> None:
        self.facts = self._reply()

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps({"do": what, **arguments}), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            self._process.wait()
            raise SystemExit(
                f"the engine of {self.arm!r} ended:\n" + "\n".join(self.log.read_text().splitlines()[-40:])
            )
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def measure(engines: list[Process], lengths: list[int], colds: int, restores: int, quick: bool) -> dict[str, Any]:
    """Everything, by arm."""
    found: dict[str, Any] = {engine.arm: {"facts": engine.facts} for engine in engines}
    seed = 1
    for length in lengths:
        rows = {engine.arm: {"cold_s": [], "restored_s": []} for engine in engines}
        for engine in engines:  # kernels, allocations
            engine.do("cold", seed=seed, length=length)
            engine.do("restored", seed=seed, length=length)
        for repetition in range(colds):
            seed += 1
            for engine in _turned(engines, repetition):
                rows[engine.arm]["cold_s"].append(engine.do("cold", seed=seed, length=length)["seconds"])
        for repetition in range(restores):
            for engine in _turned(engines, repetition):
                reply = engine.do("restored", seed=seed, length=length)
                rows[engine.arm]["restored_s"].append(reply["seconds"])
                rows[engine.arm]["restored_tokens"] = reply["cached"]
        for engine in engines:
            rows[engine.arm]["answer"] = engine.do("answer", seed=seed, length=length, tokens=ANSWER_TOKENS)["tokens"]
        if not quick:
            for _ in range(2):  # the first run warms up batches of that size
                for engine in engines:
                    rows[engine.arm]["decoding"] = engine.do("decoding", seed=seed, length=length, running=DECODING)
        seed += 1
        for arm, row in rows.items():
            found[arm][str(length)] = row
    for engine in engines:
        found[engine.arm]["facts"] = engine.do("facts")
    return found


def measure_working_set(engines: list[Process], length: int, chunk_tokens: int) -> dict[str, Any]:
    """A working set of twice what the first arm holds, in each arm."""
    prompts = max(2, 2 * engines[0].facts["host_chunks"] * chunk_tokens // length)
    rows = {
        engine.arm: engine.do("working_set", first_seed=10**5, prompts=prompts, length=length) for engine in engines
    }
    return {"prompts": prompts, "length": length, **rows}


def measure_startup(
    arms: list[str], plan: dict[str, Any], logs: Path, repetitions: int, budget_s: float
) -> dict[str, list[dict[str, float]]]:
    """Start each arm and close it before the next, in turn, `repetitions` times or until `budget_s` would be over, but
    each once at least. The first one to fault so much memory in may pay for it in a virtual machine.

    Seconds, by arm: `up` from the process's start to its first answer; of these, `import` of vLLM, `engine` the rest;
    of that, `allocate` and `register` host memory, and the `offload_worker` as a whole; and to `close`.
    """
    began = time.perf_counter()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    longest = 0.0
    for repetition in range(repetitions):
        for arm in arms if repetition % 2 == 0 else arms[::-1]:
            start = time.perf_counter()
            if found[arm] and start - began + longest > budget_s:
                return found
            engine = Process(arm, plan, logs)
            try:
                engine.wait_until_up()
                up = time.perf_counter()
            finally:
                engine.close()
            done = time.perf_counter()
            facts = engine.facts
            row = {"up": up - start, "import": facts["import_s"], "engine": facts["startup_s"], **facts["of_it_s"],
                   "close": done - up}  # fmt: skip
            found[arm].append(row)
            longest = max(longest, done - start)
            print(f"{arm}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in row.items()), flush=True)
    return found


def report_startup(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """A table of medians."""
    names = ["up", "import", "engine", "allocate", "register", "offload_worker", "close"]
    lines = [f"{'arm':16}{'starts':>8}" + "".join(f"{name:>16}" for name in names)]
    for arm, rows in found.items():
        medians = [statistics.median(row[name] for row in rows) if rows else float("nan") for name in names]
        lines.append(f"{arm:16}{len(rows):8}" + "".join(f"{median:16.2f}" for median in medians))
    return lines


def _turned(engines: list[Process], by: int) -> list[Process]:
    by %= len(engines)
    return engines[by:] + engines[:by]


def report(found: dict[str, Any], lengths: list[int]) -> tuple[list[str], bool]:
    """A table, and whether answers agree where they must: out of host memory, exact codecs as raw."""
    first = next(iter(found))
    lines = [
        f"{'arm':16}{'tokens':>8}{'cold ms':>10}{'restored ms':>13}{'of ' + first:>10}{'from host':>11}{'ratio':>8}"
    ]
    right = True
    for length in map(str, lengths):
        base = statistics.median(found[first][length]["restored_s"])
        for arm, rows in found.items():
            row = rows[length]
            cold, restored = (statistics.median(row[name]) for name in ("cold_s", "restored_s"))
            lines.append(
                f"{arm:16}{length:>8}{cold * 1e3:10.1f}{restored * 1e3:13.1f}{restored / base:10.3f}"
                f"{row['restored_tokens']:11d}{rows['facts'].get('ratio', 1.0):8.2f}"
            )
            if "decoding" in row:
                step = row["decoding"]
                lines.append(f"{'':24}step of {DECODING}: alone {step['alone_ms']:.2f} ms, "
                             f"while restoring {step['during_ms']:.2f} ms")  # fmt: skip
            if arm == "lossless" and row["answer"] != found[first][length]["answer"]:
                right = False
                lines.append(f"{'':24}ANSWERS DIFFER: {row['answer']} and {found[first][length]['answer']}")
    return lines, right


def write(results: dict[str, Any], began: float, output: Path | None) -> None:
    """Write results where there is an `output`, with the seconds since `began`."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**results, "seconds": time.perf_counter() - began}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms_help = "raw, none, lossless, bounded, bounded:ERROR_BOUND; the first is what others are compared with"
    parser.add_argument("--arms", default="raw,bounded,lossless", help=arms_help)
    parser.add_argument("--quick", action="store_true", help="two arms, few repetitions, no decoding, no working set")
    parser.add_argument("--lengths", default="4096,30000", help="tokens of the prompts")
    parser.add_argument("--cpu-gib", type=float, default=12.0, help="host memory of each arm")
    parser.add_argument("--gpu-memory", type=float, default=0.3, help="share of the GPU's memory for each arm")
    parser.add_argument("--chunk-tokens", type=int, default=64)
    parser.add_argument("--shape", default="8b", choices=("8b", "tiny"), help="of a model with random weights")
    parser.add_argument("--model", help="a model's folder, instead of random weights")
    parser.add_argument("--options", default="{}", help="more of vLLM's engine arguments, JSON")
    parser.add_argument("--startup-only", action="store_true", help="start arms one after another, measure only that")
    parser.add_argument("--repetitions", type=int, default=3, help="with --startup-only: starts of each arm, at most")
    parser.add_argument("--budget-seconds", type=float, default=500.0, help="with --startup-only: start no more after")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder for vLLM's logs")
    given = parser.parse_args()
    arms = given.arms.split(",")
    if given.quick and given.arms == parser.get_default("arms"):
        arms = arms[:2]
    lengths = [int(length) for length in given.lengths.split(",")]
    plan = {
        "shape": given.shape, "model": given.model, "cpu_gib": given.cpu_gib, "gpu_memory": given.gpu_memory,
        "chunk_tokens": given.chunk_tokens, "max_model_len": max(lengths) + 512, "options": json.loads(given.options),
    }  # fmt: skip
    began = time.perf_counter()
    if given.startup_only:
        starts = measure_startup(arms, plan, given.logs, given.repetitions, given.budget_seconds)
        write({"machine": describe(), "plan": plan, "startup": starts}, began, given.output)
        print("\n".join(report_startup(starts)))
        return
    engines: list[Process] = []
    try:
        for arm in arms:
            # One after another: each looks at how much of the GPU is free.
            engines.append(Process(arm, plan, given.logs))
            engines[-1].wait_until_up()
            print(f"{arm}: up after {time.perf_counter() - began:.0f} s", flush=True)
        colds, restores = (2, 5) if given.quick else (5, 11)
        results: dict[str, Any] = {"machine": describe(), "plan": plan, "arms": {}}
        results["arms"] = found = measure(engines, lengths, colds, restores, given.quick)
        lines, right = report(found, lengths)
        if not given.quick and "host_chunks" in engines[0].facts:
            results["working_set"] = held = measure_working_set(engines, lengths[0], given.chunk_tokens)
            lines += [
                f"{arm:16}{held['prompts']} prompts of {held['length']}: {held[arm]['hit_rate']:.1%} from host memory, "
                f"{held[arm]['prompts_a_second']:.2f} prompts/s"
                for arm in found
            ]
    finally:
        for engine in engines:
            engine.close()
    results["answers_agree"] = right
    print("\n".join(lines))
    write(results, began, given.output)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
