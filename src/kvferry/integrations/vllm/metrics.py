"""What is counted: on /metrics, and in the line that vLLM logs at intervals."""

from dataclasses import dataclass, field, fields
from typing import Any

from kvferry.format.slot import SlotStatus
from kvferry.integrations.vllm.compat import (
    OffloadingConnectorStats,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadingWorkerMetadata,
)
from kvferry.pipeline import JobResult

PREFIX = "vllm:kvferry_"
SLOTS_USED = PREFIX + "slots_used"
SLOTS = PREFIX + "slots"
RATIO = PREFIX + "ratio"


@dataclass
class Counters:
    """What a worker counted since it was asked last. Bytes and seconds add up over tensor-parallel workers."""

    stored_raw_bytes: int = field(default=0, metadata={"help": "Bytes of KV cache that were stored, before coding."})
    stored_bytes: int = field(default=0, metadata={"help": "Bytes that this came to, coded."})
    loaded_raw_bytes: int = field(default=0, metadata={"help": "Bytes of KV cache that were loaded, after decoding."})
    loaded_bytes: int = field(default=0, metadata={"help": "Bytes that were decoded for them."})
    encode_seconds: float = field(default=0.0, metadata={"help": "Device time spent on encoding."})
    store_copy_seconds: float = field(default=0.0, metadata={"help": "Time that slots were on their way to the host."})
    load_copy_seconds: float = field(default=0.0, metadata={"help": "Time that slots were on their way to the GPU."})
    decode_seconds: float = field(default=0.0, metadata={"help": "Device time spent on decoding."})
    relaxed_chunks: int = field(
        default=0, metadata={"help": "Chunks that fit their slot with doubled error bounds only."}
    )
    rejected_chunks: int = field(default=0, metadata={"help": "Chunks that fit no slot and were not stored."})
    corrupt_slots: int = field(
        default=0, metadata={"help": "Slots that did not hold what they should when they were loaded."}
    )
    failed_stores: int = field(default=0, metadata={"help": "Chunks that an error kept from being stored."})
    failed_loads: int = field(default=0, metadata={"help": "Chunks that an error kept from being loaded."})

    def add(self, other: "Counters") -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def count(self, direction: str, result: JobResult) -> None:
        """Count what came of a transfer, but for chunks that errors took (`failed_stores`, `failed_loads`)."""
        if direction == "store":
            self.stored_raw_bytes += result.raw_bytes
            self.stored_bytes += result.encoded_bytes
            self.relaxed_chunks += result.relaxed
            self.rejected_chunks += result.rejected
            self.encode_seconds += result.encode_s or 0.0
            self.store_copy_seconds += result.copy_s or 0.0
            return
        self.loaded_raw_bytes += result.raw_bytes
        self.loaded_bytes += result.encoded_bytes
        self.corrupt_slots += sum(status != SlotStatus.REJECTED for status in result.statuses)
        self.load_copy_seconds += result.copy_s or 0.0
        self.decode_seconds += result.decode_s or 0.0

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


@dataclass
class KVFerryWorkerMetadata(OffloadingWorkerMetadata):
    """vLLM's facts from workers to the scheduler, and ours: chunks that were not stored or not loaded, by transfer
    (their identities, without the rank), and counters."""

    failed_stores: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    failed_loads: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)

    def aggregate(self, other: Any) -> "KVFerryWorkerMetadata":
        base = super().aggregate(other)
        merged = KVFerryWorkerMetadata(base.completed_jobs, base.transfer_stats)
        for each in (self, other):
            if isinstance(each, KVFerryWorkerMetadata):
                merged.counters.add(each.counters)
                for failed, found in (
                    (merged.failed_stores, each.failed_stores),
                    (merged.failed_loads, each.failed_loads),
                ):
                    for job, identities in found.items():
                        failed.setdefault(job, set()).update(identities)
        return merged


class KVFerryStats(OffloadingConnectorStats):
    """vLLM's statistics; its log line also says the interval's ratio."""

    def reduce(self) -> dict[str, int | float]:
        said: dict[str, int | float] = super().reduce()
        for word, name in (("stored", "stored"), ("loaded", "loaded")):
            raw, coded = said.get(f"{PREFIX}{name}_raw_bytes"), said.get(f"{PREFIX}{name}_bytes")
            if raw and coded:
                said[f"{PREFIX}{word}_ratio"] = round(raw / coded, 3)
        return said


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """What we count, as vLLM wants to have it declared."""
    declared: dict[str, OffloadingMetricMetadata] = {
        PREFIX + each.name: OffloadingCounterMetadata(documentation="kvferry: " + each.metadata["help"])
        for each in fields(Counters)
    }
    declared[SLOTS_USED] = OffloadingGaugeMetadata(documentation="kvferry: Slots that hold a chunk, or are about to.")
    declared[SLOTS] = OffloadingGaugeMetadata(documentation="kvferry: Slots in host memory.")
    declared[RATIO] = OffloadingGaugeMetadata(
        documentation="kvferry: Raw bytes over coded bytes of everything stored since the start."
    )
    return declared


def put(counters: Counters, stats: OffloadingConnectorStats) -> None:
    """Add counters to vLLM's statistics."""
    for each in fields(counters):
        value = getattr(counters, each.name)
        if value:
            stats.increase_counter(PREFIX + each.name, value)


def put_zeros(stats: OffloadingConnectorStats) -> None:
    """Let every counter be on /metrics, also those that never count: absent is not zero."""
    for each in fields(Counters):
        stats.increase_counter(PREFIX + each.name, 0)
