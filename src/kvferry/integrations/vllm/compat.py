"""All that we take from vLLM, and what differs between its versions. No other file here imports vLLM.

Importing this raises `UnsupportedVLLM` for a version that was not tried.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from kvferry.integrations.vllm.hostpages import fault_in
from kvferry.integrations.vllm.version import check_version

check_version()

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
    ReqContext,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec, CPUOffloadingInfo
from vllm.v1.kv_offload.cpu.gpu_worker import pin_mmap_region
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import _REGION_SEGMENTS, CPUOffloadingSpec, _all_workers_barrier
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

REGISTERED_BYTES = 64 << 30
"""vLLM registers its shared region with CUDA in pieces of at most so many bytes, whole rows each."""
PLAIN_SPECS: tuple[type, ...] = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec)
"""Kinds of layers (exactly these, no subclass) that hold plain K and V, or MLA's latent."""


class _Region(SharedOffloadRegion):
    """vLLM's shared memory; its constructor asks for a worker's ranges to fault them in, from one thread. Here it gets
    none but those that could not be faulted in from several. `num_workers`: processes that do so at the same time."""

    def __init__(self, *, num_workers: int, **kwargs: Any) -> None:
        self._num_workers, self._faulted_in = num_workers, False
        super().__init__(**kwargs)

    def iter_worker_slot_ranges(self) -> Iterator[tuple[int, int]]:
        ranges = list(super().iter_worker_slot_ranges())
        if not self._faulted_in:
            self._faulted_in = True
            ranges = fault_in(self._base.data_ptr(), ranges, self._num_workers)
        return iter(ranges)


def make_region(spec: Any, barrier: bool) -> Any:
    """The shared memory that a worker of `spec` keeps its slots in, as vLLM's own workers lay it out. `barrier`: wait
    for all workers, and unlink the file when they have mapped it (nobody else is to map it)."""
    rank, world_size = spec.config.parallel.rank, spec.config.parallel.world_size
    kwargs: dict[str, Any] = {}
    if barrier:
        kwargs = {"barrier": _all_workers_barrier, "num_segments": _REGION_SEGMENTS}
        if spec.replicated_layout:
            kwargs["populate_shard"] = (rank, world_size)
    return _Region(
        num_workers=world_size,
        engine_id=spec.config.engine_id,
        num_chunks=spec.num_chunks,
        rank=0 if spec.replicated_layout else rank,
        kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
        cpu_page_size=spec.cpu_page_size_per_worker,
        **kwargs,
    )


def layer_specs_of(group: Any) -> dict[str, Any]:
    """The spec of each layer of a KV cache group, by name. Scheduler processes know one layer's spec for all."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return {name: spec.kv_cache_specs[name] for name in group.layer_names}
    return dict.fromkeys(group.layer_names, spec)


def offloaded_groups(kv_cache_config: Any) -> list[Any]:
    """The KV cache groups that are offloaded, in the order that transfers name them."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import get_offloading_group_ids

    return [kv_cache_config.kv_cache_groups[number] for number in get_offloading_group_ids(kv_cache_config)]


def forget(primary: Any, key: bytes) -> bool:
    """Take a chunk that nothing reads or writes out of a CPU manager, as if it had been evicted. Returns whether it is
    out: False while it is in use."""
    chunk = primary._policy.get(key)
    if chunk is None:
        return True
    if chunk.ref_cnt != 0:
        return False
    primary._policy.mark_non_evictable(key)
    primary._num_evictable_cache_chunks -= 1
    primary._policy.remove(key)
    primary._free_chunk(chunk)
    if primary.events is not None:
        primary.events.append(OffloadingEvent(keys=[key], medium=primary.medium, removed=True))
    return True


def forget_on_disk(manager: Any, key: bytes) -> None:
    """Delete a chunk's file, where there is a tier of files: it would be loaded, and fail, again and again."""
    for tier in getattr(manager, "secondary_tiers", ()):
        if isinstance(tier, FileSystemTierManager):
            with suppress(OSError):
                os.unlink(tier.file_mapper.get_file_name(key))
            tier._lookup_manager.mark_miss([key])


def slots_used(manager: Any) -> int:
    """Slots that hold a chunk, or are about to."""
    primary = getattr(manager, "primary_tier", manager)
    return int(primary._num_allocated_chunks - len(primary._free_list))


def slots_of(manager: Any) -> int:
    """Slots there are."""
    return int(getattr(manager, "primary_tier", manager)._num_chunks)


def job_keys(scheduler: Any, job_id: int) -> set[bytes]:
    """The offload keys of a transfer that is under way; none for one from before a cache reset."""
    job = scheduler._jobs.get(job_id)
    return job.keys if job is not None else set()


def requests_of(worker: Any) -> dict[int, str | None]:
    """The request of each load under way, by job."""
    return dict(worker._load_jobs)
