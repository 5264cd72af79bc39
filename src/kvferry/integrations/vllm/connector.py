"""`KVFerryConnector`: vLLM's OffloadingConnector, through slots, and able to say that a load failed.

After the engine has started, nothing of ours raises into it: what fails is a miss, a counter and a line in the log.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kvferry.codecs.tiling import TILE_TOKENS
from kvferry.integrations.vllm import compat, metrics
from kvferry.integrations.vllm.compat import (
    KVConnectorTransferResults,
    OffloadingConnector,
    OffloadingConnectorStats,
    OffloadingWorkerMetadata,
    init_logger,
)
from kvferry.integrations.vllm.manager import Forgetful, keys_named
from kvferry.integrations.vllm.metrics import Counters, KVFerryStats, KVFerryWorkerMetadata
from kvferry.integrations.vllm.select import complete_extra_config
from kvferry.integrations.vllm.settings import OffloadSettings
from kvferry.integrations.vllm.spec import Engine, told
from kvferry.integrations.vllm.worker import SlotWorker

logger = init_logger(__name__)

_Result = TypeVar("_Result")


class KVFerryConnector(OffloadingConnector):
    """Keeps KV cache in host memory, compressed. Raises `ValueError` while the engine starts, for settings that cannot
    be."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        settings = _complete(vllm_config)
        # vLLM's default is to fail the request. A cache's loads can always be made up for.
        transfer.kv_load_failure_policy = settings.load_failure_policy
        extra = transfer.kv_connector_extra_config
        if "block_size" not in extra and "blocks_per_chunk" not in extra:
            extra["blocks_per_chunk"] = _default_blocks_per_chunk(kv_cache_config)
        if len(compat.offloaded_groups(kv_cache_config)) > 1 and extra.pop("sync_load_budget_bytes", 0):
            logger.warning("kvferry: sync_load_budget_bytes is left out: with several KV cache groups vLLM cannot be "
                           "told that a synchronous load failed")  # fmt: skip
        with told(Engine.of(vllm_config, kv_cache_config)):
            super().__init__(vllm_config, role, kv_cache_config)
        self._one_group = len(kv_cache_config.kv_cache_groups) == 1
        self._since_start = Counters()
        self._on_metrics = False
        self._said: set[str] = set()

    # -- worker side --------------------------------------------------------------------------------------------------

    @property
    def _slot_worker(self) -> SlotWorker | None:
        worker = self.connector_worker.worker if self.connector_worker is not None else None
        return worker if isinstance(worker, SlotWorker) else None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self.connector_worker is not None
        self.connector_worker.spec.note_caches(kv_caches)
        super().register_kv_caches(kv_caches)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        nothing: dict[int, str | None] = {}
        requests = self._guard(lambda: compat.requests_of(self.connector_worker), nothing)
        results = super().get_transfer_results(finished_req_ids)
        worker = self._slot_worker
        if worker is not None and not self._one_group:
            # Block numbers mean different blocks in different groups: whole requests fail.
            failed = {requests.get(job) for job in worker.failed_load_jobs}
            results.failed_recving |= {request for request in failed if request is not None}
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        worker = self._slot_worker
        if worker is None:
            return set()
        blocks = worker.take_bad_blocks()
        return blocks if self._one_group else set()

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        meta = super().build_connector_worker_meta()
        worker = self._slot_worker
        if worker is None:
            return meta
        report = worker.take_report()
        if meta is None and not (report.counters or report.failed_stores or report.failed_loads):
            return None
        if meta is None:
            meta = OffloadingWorkerMetadata()
        return KVFerryWorkerMetadata(
            meta.completed_jobs, meta.transfer_stats, report.failed_stores, report.failed_loads, report.counters
        )

    # -- scheduler side -----------------------------------------------------------------------------------------------

    def update_connector_output(self, connector_output: Any) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KVFerryWorkerMetadata):
            self._guard(lambda: self._learn(meta), None)
        super().update_connector_output(connector_output)

    def _learn(self, meta: KVFerryWorkerMetadata) -> None:
        """Take note of what workers found out, before the transfers it is about are completed."""
        scheduler = self.scheduler
        manager = scheduler.manager
        assert isinstance(manager, Forgetful)
        with scheduler._manager_locked():
            for job, identities in meta.failed_stores.items():
                manager.store_failed(keys_named(compat.job_keys(scheduler, job), identities))
            for job, identities in meta.failed_loads.items():
                manager.load_failed(keys_named(compat.job_keys(scheduler, job), identities))
        self._since_start.add(meta.counters)
        metrics.put(meta.counters, scheduler._connector_stats)

    def get_kv_connector_stats(self) -> OffloadingConnectorStats | None:
        stats = super().get_kv_connector_stats()
        if self.connector_scheduler is None:
            return stats
        found = KVFerryStats()
        if stats is not None:
            found.aggregate(stats)
        self._guard(lambda: self._add_gauges(found), None)
        return found

    def _add_gauges(self, stats: KVFerryStats) -> None:
        manager = self.scheduler.manager
        if not self._on_metrics:
            self._on_metrics = True
            metrics.put_zeros(stats)
        stats.set_gauge(metrics.SLOTS_USED, compat.slots_used(manager))
        stats.set_gauge(metrics.SLOTS, compat.slots_of(manager))
        if self._since_start.stored_bytes:
            stats.set_gauge(metrics.RATIO, self._since_start.stored_raw_bytes / self._since_start.stored_bytes)

    # -- both ---------------------------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> OffloadingConnectorStats | None:
        return KVFerryStats(data=data) if data is not None else KVFerryStats()

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        _complete(vllm_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)

    def _guard(self, call: Callable[[], _Result], otherwise: _Result) -> _Result:
        """What `call` returns, or, if it fails, a line in the log and `otherwise`."""
        try:
            return call()
        except Exception as error:
            key = type(error).__name__
            if key not in self._said:
                self._said.add(key)
                logger.warning("kvferry: keeping account failed: %r", error)
            return otherwise


def _default_blocks_per_chunk(kv_cache_config: Any) -> int:
    """Chunks as long as a tile: shorter ones cost ratio."""
    most: int = max(group.kv_cache_spec.block_size for group in compat.offloaded_groups(kv_cache_config))
    return max(1, TILE_TOKENS // most)


def _complete(vllm_config: Any) -> OffloadSettings:
    """Name our spec in the connector's extra config where it names none. Returns what is set."""
    transfer = vllm_config.kv_transfer_config
    settings = OffloadSettings.read(transfer.kv_connector_extra_config)
    complete_extra_config(transfer.kv_connector_extra_config)
    return settings
