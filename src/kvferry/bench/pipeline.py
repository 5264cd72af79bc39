"""Speed of the pipeline, end to end: paged GPU cache, compressed, pinned host slots, and back.

Elapsed times are the host's, from submitting a job with the device idle to `Job.wait` returning. GB/s count raw bytes.
Every configuration is checked in the same run before it is timed. "Wire" is one bare copy of as many bytes.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvferry.bench.pipeline_cache import PagedCache
from kvferry.bench.pipeline_rig import MIB, Arguments, Plan, Rig, Row, summary
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.raw import Raw
from kvferry.device import PinnedPool

FORMS: dict[str, dict[str, Any]] = {"staged": {}, "fused": {"fused_store": True, "fused_load": True}}
ORDERS = ("in order", "anywhere")
JOBS_IN_FLIGHT = 3


def run(
    tensors: Mapping[str, Tensor], plan: Plan, device: torch.device, sections: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """Measure `sections` (default: all) and return their rows by name. `tensors` as for `PagedCache`.

    Raises `ValueError` for unknown sections and files that do not fit, `RuntimeError` where a check fails.
    """
    chosen = list(sections or SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    first = next(iter(tensors.values()))
    token_bytes = plan.shape.layers * plan.shape.heads * 2 * first.shape[-1] * first.element_size()
    tokens = max(
        *(plan.restore_tokens if "restore" in chosen else (0,)),
        max(*plan.sizes_mib, plan.ablation_mib) * MIB // token_bytes,
        plan.host_chunks * plan.chunk_tokens,
        *plan.chunk_sizes,
    )
    tokens += plan.chunk_tokens
    need = max(
        int(token_bytes * tokens / plan.ratio * 1.1),  # the largest restore, or two of the largest size
        int(2.2 * max(plan.sizes_mib) * MIB),
        int(2.2 * plan.ablation_mib * MIB * (1 + 1 / min(plan.ratios))),
        5 * token_bytes * max(*plan.chunk_sizes, plan.chunk_tokens),
    )
    cache = PagedCache(tensors, plan.shape, tokens, plan.sigma, device)
    with PinnedPool(need, device=device) as pool:
        memory = pool.allocate(need).tensor
        memory.fill_(0)
        bench = PipelineBench(cache, memory, plan)
        return {name: SECTIONS[name](bench) for name in chosen}


class PipelineBench:
    """The sections, on one cache and one piece of page-locked memory."""

    def __init__(self, cache: PagedCache, memory: Tensor, plan: Plan) -> None:
        self.cache, self.memory, self.plan = cache, memory, plan

    def bounded(self) -> Codec:
        # The cache's bounds, line by line, stand in for 1.0.
        return Bounded(1.0, relative=False, packing=self.plan.packing)

    def rig(self, codec: Codec | None = None, memory: Tensor | None = None, **options: Any) -> Rig:
        memory = self.memory if memory is None else memory
        return Rig(self.cache, codec or self.bounded(), memory, self.plan, **options)

    def sizes(self) -> list[Row]:
        """By size: staged, fused and raw; jobs one at a time, in a stream, and in both directions at once."""
        rows = []
        for name, codec, options in [
            *((name, self.bounded(), form) for name, form in FORMS.items()),
            ("raw", Raw(), {}),
        ]:
            with self.rig(codec, **options) as rig:
                for mib in self.plan.sizes_mib:
                    chunks = rig.chunks(mib * MIB)
                    row: Row = {"form": name} | rig.legs(chunks)
                    row |= {f"{way} stream": rig.streamed(way, chunks) for way in ("store", "load")}
                    row["both"] = self._both(rig, rig, chunks)
                    alone = (row["store"]["gb_per_s"] + row["load"]["gb_per_s"]) / 2
                    row["both_over_alone"] = row["both"]["gb_per_s"] / alone
                    rows.append(row)
        return rows

    def _both(self, store: Rig, load: Rig, chunks: int) -> Row:
        """A store and a load at once, in slots of their own."""
        load.do("store", chunks, first_slot=chunks)
        out, back = store.arguments("store", chunks), load.arguments("load", chunks, first_slot=chunks)
        seconds = store.timed(lambda: [store.submit("store", out), load.submit("load", back)])
        load.finish(())
        return summary(seconds, 2 * chunks * store.chunk_bytes)

    def ablation(self) -> list[Row]:
        """Compression on the way out, on the way in, on both, on neither: one after the other, and at once."""
        half = int(len(self.memory) * self.plan.ratio / (1 + self.plan.ratio)) // 512 * 512
        rows = []
        with self.rig(Raw(), self.memory[:half]) as raw, self.rig(memory=self.memory[half:]) as bounded:
            legs = {rig: rig.legs(rig.chunks(self.plan.ablation_mib * MIB)) for rig in (raw, bounded)}
            for name, out, back in (
                ("neither", raw, raw),
                ("D2H only", bounded, raw),
                ("H2D only", raw, bounded),
                ("both", bounded, bounded),
            ):
                chunks = legs[out]["chunks"]
                ms = legs[out]["store"]["median_ms"] + legs[back]["load"]["median_ms"]
                row: Row = {"compressed": name, "raw_mib": legs[out]["raw_mib"], "store": legs[out]["store"]}
                row |= {"load": legs[back]["load"], "store_then_load_ms": ms, "both": self._both(out, back, chunks)}
                rows.append(row)
        return rows

    def restore(self) -> list[Row]:
        """A prefix back into the cache, its slots in order or anywhere; beside it, what its raw bytes take."""
        rows = []
        with self.rig() as rig:
            for tokens in self.plan.restore_tokens:
                chunks = -(-tokens // self.plan.chunk_tokens)
                for shuffled in (False, True):
                    row: Row = {"tokens": tokens, "slots": ORDERS[shuffled]}
                    row |= rig.legs(chunks, ("load",), shuffled=shuffled)
                    row["raw_wire_ms"] = rig.wire.seconds("load", chunks * rig.chunk_bytes) * 1e3
                    rows.append(row)
        return rows

    def _each(self, key: str, cases: Sequence[tuple[Any, dict[str, Any]]]) -> list[Row]:
        """Both directions at the ablation's size, for each `(value of key, options of the rig)`."""
        rows = []
        for value, options in cases:
            with self.rig(**options) as rig:
                rows.append({key: value} | rig.legs(rig.chunks(self.plan.ablation_mib * MIB)))
        return rows

    def chunk_size(self) -> list[Row]:
        """By tokens of a chunk."""
        return self._each("chunk_tokens", [(n, {"chunk_tokens": n}) for n in self.plan.chunk_sizes])

    def slot_size(self) -> list[Row]:
        """By ratio of the slots: what room to spare in them costs."""
        return self._each("ratio", [(ratio, {"ratio": ratio}) for ratio in self.plan.ratios])

    def num_sms(self) -> list[Row]:
        """By multiprocessors that the kernels may use."""
        rows = []
        for form, options in FORMS.items():
            cases = [(cap, options | {"num_sms": cap}) for cap in self.plan.sm_caps]
            rows += [{"form": form} | row for row in self._each("num_sms", cases)]
        return rows

    def bites(self) -> list[Row]:
        """By how jobs are cut: smallest and largest bite in MiB raw, and growth."""
        cases = []
        for smallest, largest, growth in self.plan.bites_mib:
            settings = replace(
                self.plan.settings, first_bite_bytes=smallest * MIB, bite_bytes=largest * MIB, growth=growth
            )
            cases.append((f"{smallest} to {largest} x{growth}", {"settings": settings}))
        return self._each("bites", cases)

    def host(self) -> list[Row]:
        """The host's time for one job: submitting it, and collecting it once it is done."""
        rows, chunks = [], self.plan.host_chunks
        for form, options in FORMS.items():
            with self.rig(**options) as rig:
                for direction in ("store", "load"):
                    for shuffled in (False, True):
                        rig.checked(chunks, shuffled=shuffled)
                        given = rig.arguments(direction, chunks, shuffled=shuffled)
                        laps = [_host_times(rig, direction, given) for _ in range(3 * self.plan.repeats)]
                        row: Row = {"form": form, "direction": direction, "slots": ORDERS[shuffled], "chunks": chunks}
                        rows.append(row | _host_summary(laps[self.plan.repeats :]))
        return rows

    def interference(self) -> list[Row]:
        """What a loop of matrix products loses to transfers that never stop, by form and multiprocessors; with bare
        copies to compare. Nothing without a GPU."""
        if self.cache.device.type != "cuda":
            return []
        cases = [(form, self.bounded(), cap, options) for form, options in FORMS.items() for cap in (None, 16)]
        rows: list[Row] = []
        for form, codec, cap, options in [*cases, ("raw", Raw(), None, {})]:
            with self.rig(codec, num_sms=cap, **options) as rig:
                rig.checked(rig.chunks(self.plan.ablation_mib * MIB))
                place = {"form": form, "num_sms": cap}
                rows += [place | {"direction": way} | _interference(rig, way) for way in ("store", "load")]
        return rows


def _host_times(rig: Rig, direction: str, given: Arguments) -> tuple[float, float]:
    """Seconds that submitting a job takes, and asking for it once it is done."""
    rig.wire.settle()
    start = time.perf_counter()
    rig.submit(direction, given)
    submitted = time.perf_counter()
    rig.wire.settle()
    again = time.perf_counter()
    (job,) = rig.transfers.finished()
    result = job.result()
    end = time.perf_counter()
    if not result.ok:
        raise RuntimeError(f"{job!r}: {result}")
    return submitted - start, end - again


def _host_summary(laps: list[tuple[float, float]]) -> Row:
    submit, collect = ([lap[side] * 1e6 for lap in laps] for side in (0, 1))
    both = summary((sum(lap) for lap in laps), 0)
    return {
        "repeats": len(laps),
        "submit_us": statistics.median(submit),
        "collect_us": statistics.median(collect),
        "median_us": both["median_ms"] * 1e3,
        "p99_us": both["p99_ms"] * 1e3,
    }


def _interference(rig: Rig, direction: str) -> Row:
    plan, device = rig.plan, rig.cache.device
    stream = torch.cuda.Stream(device)
    a, b = (torch.randn(plan.matmul, plan.matmul, dtype=torch.bfloat16, device=device) for _ in range(2))
    out, chunks = torch.empty_like(a), rig.chunks(plan.ablation_mib * MIB)
    given = rig.arguments(direction, chunks)

    def products() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Start and end of the loop, without its first tenth."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            for number in range(plan.matmuls + plan.matmuls // 10):
                if number == plan.matmuls // 10:
                    start.record()
                torch.mm(a, b, out=out)
            end.record()
        return start, end

    rig.wire.settle()
    alone, beside, speeds = [], [], []
    for _ in range(3):
        start, end = products()
        end.synchronize()
        alone.append(start.elapsed_time(end))
        start, end = products()
        began, in_flight, moved = time.perf_counter(), 0, 0
        while not end.query():
            while in_flight < JOBS_IN_FLIGHT:
                rig.submit(direction, given)
                in_flight += 1
            over = len(rig.transfers.finished())
            in_flight -= over
            moved += over * chunks * rig.chunk_bytes
        speeds.append(moved / (time.perf_counter() - began) / 1e9)
        beside.append(start.elapsed_time(end))
        rig.wire.settle()
        rig.finish(())
    return {
        "lost": 1 - statistics.median(alone) / statistics.median(beside),
        "matmul": plan.matmul,
        "alone_ms": statistics.median(alone) / plan.matmuls,
        "beside_ms": statistics.median(beside) / plan.matmuls,
        "gb_per_s": statistics.median(speeds),
    }


SECTIONS: dict[str, Callable[[PipelineBench], list[Row]]] = {
    "sizes": PipelineBench.sizes,
    "ablation": PipelineBench.ablation,
    "restore": PipelineBench.restore,
    "chunk_size": PipelineBench.chunk_size,
    "slot_size": PipelineBench.slot_size,
    "num_sms": PipelineBench.num_sms,
    "bites": PipelineBench.bites,
    "host": PipelineBench.host,
    "interference": PipelineBench.interference,
}
