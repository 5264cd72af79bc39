"""`benchmarks.vllm_throughput`: its requests, and all of it with tiny engines, on the CPU where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.vllm_throughput_report import row_of
from benchmarks.vllm_workloads import SIZES, WORKLOADS, random_tokens, tokens_of_text

pytestmark = pytest.mark.xdist_group("vllm engine")

ROOT = Path(__file__).parents[3]
SIZE = SIZES["tiny"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_hang_on_the_seed_only(name: str) -> None:
    one, other, another = (WORKLOADS[name](SIZE, random_tokens(1024), seed) for seed in (1, 1, 2))
    assert one.fill() == other.fill() != another.fill()
    assert one.take(7) + one.take(30) == other.take(37)
    longest = {"shared-prefix": SIZE.prefix + SIZE.suffix, "multi-turn": SIZE.first + (SIZE.turns - 1) * SIZE.a_turn}
    assert max(len(request.prompt) for request in one.take(200)) == longest[name] <= SIZE.longest


def test_turns_send_what_was_said_before_and_more() -> None:
    workload = WORKLOADS["multi-turn"](SIZE, random_tokens(1024), 1)
    last = {request.conversation: request.prompt for request in workload.fill()}
    ended = 0
    for request in workload.take(400):
        before = last[request.conversation]
        last[request.conversation] = request.prompt
        if len(before) == SIZE.first + 2 * SIZE.a_turn:
            ended += 1
            assert len(request.prompt) == SIZE.first
            assert request.prompt[:32] != before[:32]
        else:
            assert request.prompt[: len(before)] == before
            assert len(request.prompt) == len(before) + SIZE.a_turn
    assert ended > 50


def test_prefixes_are_shared_and_the_rest_is_not() -> None:
    workload = WORKLOADS["shared-prefix"](SIZE, random_tokens(1024), 1)
    asked = [tuple(request.prompt) for request in workload.fill() + workload.take(100)]
    assert len(set(asked)) == len(asked)
    assert len({prompt[: SIZE.prefix] for prompt in asked}) == SIZE.prefixes


@pytest.mark.parametrize("name", SIZES)
def test_working_sets_fit_compressed_only(name: str) -> None:
    sizes = SIZES[name]
    assert sizes.gpu < 0.6 * sizes.working_set
    assert sizes.host_share < 0.5
    assert sizes.host_share * 3 > 1
    assert sizes.gpu > 4 * (sizes.longest + sizes.output)


def test_prompts_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "text.u16"
    np.arange(1000, dtype="<u2").tofile(file)
    taken = tokens_of_text(file)(np.random.default_rng(1), 100)
    assert taken == list(range(taken[0], taken[0] + 100))
    with pytest.raises(ValueError, match="1000 tokens, prompts of 5000"):
        tokens_of_text(file)(np.random.default_rng(1), 5000)


def test_figures_of_a_point() -> None:
    served = {
        "requests": 4, "seconds": 2.0, "prompt_tokens": 400, "output_tokens": 40, "cached_tokens": 300,
        "host_tokens": 100, "gpu_tokens": 200, "preemptions": 0,
        "first_token_s": [0.1, 0.2, 0.3, 1.0], "each_token_s": [0.01, 0.03],
    }  # fmt: skip
    row = row_of(served)
    assert row["requests_per_s"] == 2.0
    assert row["output_tokens_per_s"] == 20.0
    assert row["ttft_median_ms"] == pytest.approx(250)
    assert 900 < row["ttft_p99_ms"] <= 1000
    assert row["tpot_median_ms"] == pytest.approx(20)
    assert (row["hit_rate"], row["host_hit_rate"]) == (0.75, 0.25)
    assert row_of({**served, "each_token_s": []})["tpot_median_ms"] is None


@pytest.mark.usefixtures("no_engine")
def test_engines_are_measured(tmp_path: Path) -> None:
    output, plot = tmp_path / "found.json", tmp_path / "found.png"
    words = ["--shape", "tiny", "--arms", "none,bounded", "--concurrency", "1,6", "--requests", "24",
             "--budget-seconds", "200", "--output", output, "--plot", plot, "--logs", tmp_path]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.vllm_throughput", *map(str, words)],
        cwd=ROOT, env={**os.environ, "KVFERRY_COMMIT": "abc"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["machine"]["commit"] == "abc"
    assert found["answers_agree"] and not found["left_out"]
    points = {(row["workload"], row["concurrency"], row["arm"]): row for row in found["rows"]}
    assert len(points) == 2 * 2 * 2
    for (workload, concurrency, arm), row in points.items():
        assert row["requests"] == 24
        assert row["requests_per_s"] > 0 and row["ttft_median_ms"] <= row["ttft_p99_ms"]
        other = points[workload, concurrency, "none" if arm == "bounded" else "bounded"]
        assert (row["host_hit_rate"] > 0) == (arm == "bounded")
        assert (row["hit_rate"] > other["hit_rate"]) == (arm == "bounded")
    assert found["engines"]["bounded"]["ratio"] > 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "shared-prefix" in done.stdout
