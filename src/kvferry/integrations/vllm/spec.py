"""vLLM's CPU tier and its tiering spec, with rows of slot size: everything that counts rows gains by the ratio."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvferry.integrations.vllm import metrics
from kvferry.integrations.vllm.compat import (
    REGISTERED_BYTES,
    CanonicalKVCaches,
    CPUOffloadingInfo,
    CPUOffloadingSpec,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingWorker,
    TieringOffloadingSpec,
    current_platform,
    init_logger,
    make_region,
    pin_mmap_region,
)
from kvferry.integrations.vllm.layout import group_parts, round_down, round_up, transformed_layers, worker_row_bytes
from kvferry.integrations.vllm.manager import adopt
from kvferry.integrations.vllm.profiles import check_model, part_of
from kvferry.integrations.vllm.settings import OffloadSettings
from kvferry.integrations.vllm.worker import SlotWorker

logger = init_logger(__name__)

_SLOT_STEP = 512


@dataclass(frozen=True)
class Engine:
    """What the connector knows and specs are not told: KV cache groups, the name of the cache's dtype, the model's
    configuration (transformers'), its KV heads (of all workers), and tokens of the longest sequence."""

    kv_cache_config: Any
    cache_dtype: str
    text_config: Any
    kv_heads: int
    max_positions: int

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> "Engine":
        model = vllm_config.model_config
        return cls(
            kv_cache_config,
            str(vllm_config.cache_config.cache_dtype),
            model.hf_text_config,
            model.get_total_num_kv_heads(),
            model.max_model_len,
        )


_engine: ContextVar[Engine] = ContextVar("kvferry_engine")


@contextmanager
def told(engine: Engine) -> Iterator[None]:
    """Specs made inside learn of the engine."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


class _SlotRows(CPUOffloadingSpec):
    """What both specs share."""

    unlinks_region = True
    """Whether nobody but the workers is to map their memory."""

    # What vLLM's class has of its own; mypy does not follow imports of vLLM.
    num_chunks: int
    _manager: OffloadingManager | None
    _worker: OffloadingWorker | None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {**super().build_metric_definitions(extra_config), **metrics.definitions()}

    def __init__(self, config: Any) -> None:
        engine = _engine.get(None)
        if engine is None:
            raise ValueError(
                "kvferry's spec needs kvferry's connector: set kv_connector to KVFerryConnector and "
                "kv_connector_module_path to kvferry.integrations.vllm.connector"
            )
        self.settings = OffloadSettings.read(config.extra_config)
        if config.canonical_layout:
            raise ValueError("canonical_layout=True has no meaning for compressed slots: leave it out")
        if self.settings.transforms:
            _check_profile(self.settings, engine, config.parallel)
        super().__init__(config)
        self.engine = engine
        self._kv_caches: dict[str, Tensor] = {}
        self.raw_chunks = self.num_chunks
        if self.num_chunks or config.worker_kv_bytes_per_block:
            self._size_rows(int(self.extra_config["cpu_bytes_to_use"]))
        self.config = self._named(config)

    def _size_rows(self, cpu_bytes: int) -> None:
        config = self.config
        workers = 1 if self.replicated_layout else config.parallel.world_size
        own = worker_row_bytes(
            self.engine.kv_cache_config,
            self.settings,
            self.engine.cache_dtype,
            self.blocks_per_chunk,
            config.worker_kv_bytes_per_block,
        )
        self.kv_bytes_per_chunk = round_up(own * workers, self.BLOCK_SIZE_ALIGNMENT)
        # What would pad the row to whole pages is room in the slots.
        self.cpu_page_size_per_worker = round_down(self.kv_bytes_per_chunk // workers, _SLOT_STEP)
        self.num_chunks = cpu_bytes // self.kv_bytes_per_chunk
        if not self.num_chunks:
            raise ValueError(
                f"cpu_bytes_to_use={cpu_bytes} holds no chunk of {self.kv_bytes_per_chunk} bytes: give more host memory"
            )
        self.cpu_info = CPUOffloadingInfo.from_config(config, self.num_chunks, self.kv_bytes_per_chunk)
        logger.info(
            "kvferry: %s; %d chunks of %d bytes in %.2f GiB, %.2f times as many as raw",
            self.settings.identity, self.num_chunks, self.kv_bytes_per_chunk, cpu_bytes / 2**30,
            self.num_chunks / max(1, self.raw_chunks),
        )  # fmt: skip

    def _named(self, config: Any) -> Any:
        """`config` with what slots hold in the name of their dtype, from which every namespace that outlives the
        process is made. Slots of one parallel layout are of no use to another."""
        name = f"{config.model.dtype}+{self.settings.identity}-{self.cpu_page_size_per_worker}"
        return replace(
            config,
            model=replace(config.model, dtype=name),
            parallel=replace(config.parallel, is_parallelism_agnostic=False),
        )

    def note_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Tell the engine's tensors, before a worker is made for them."""
        self._kv_caches = kv_caches

    def get_manager(self) -> OffloadingManager:
        if not self._manager:
            self._manager = adopt(super().get_manager())
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not self._worker:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        on_gpu = bool(current_platform.is_cuda())
        if not on_gpu and not current_platform.is_cpu():
            raise ValueError(f"kvferry works on CUDA; this is {current_platform.device_name}: switch compression off")
        parts = group_parts(
            self.engine.kv_cache_config,
            self._kv_caches,
            kv_caches,
            self.settings,
            self.engine.cache_dtype,
            self.blocks_per_chunk,
            self.cpu_page_size_per_worker,
            first_head=_first_head(self.engine, self.config.parallel),
            max_positions=self.engine.max_positions,
        )
        region = make_region(self, self.unlinks_region) if self._uses_shared_region() else None
        try:
            return SlotWorker(
                parts,
                self._rows(region, on_gpu),
                self.settings,
                self.blocks_per_chunk,
                # Workers that hold the same bytes share one slot.
                0 if self.replicated_layout else self.config.parallel.rank,
                split_rows=max(REGISTERED_BYTES // self.kv_bytes_per_chunk, 1),
                region=region,
            )
        except Exception:
            if region is not None:
                region.cleanup()
            raise

    def _rows(self, region: Any, on_gpu: bool) -> Tensor:
        """uint8 `[num_chunks, cpu_page_size_per_worker]`: this worker's part of every row."""
        if region is None:
            return torch.zeros((self.num_chunks, self.cpu_page_size_per_worker), dtype=torch.uint8)
        if on_gpu:
            # All of it, not this worker's slots one by one: a copy of several rows must not leave a registration.
            pin_mmap_region(region)
            if not region.is_pinned:
                raise ValueError(
                    f"{region.total_size_bytes >> 30} GiB of host memory cannot be page-locked: raise the limit on "
                    "locked memory (ulimit -l), or give fewer cpu_bytes_to_use"
                )
        rows: Tensor = region.create_next_worker_view(self.cpu_page_size_per_worker)
        return rows.view(torch.uint8)


def _check_profile(settings: OffloadSettings, engine: Engine, parallel: Any) -> None:
    """Raise, and say what to do about it, unless the profile is the model's, and each worker's heads can be coded by
    themselves."""
    for kind, size in (("pipeline", parallel.pp_size), ("context", parallel.pcp_size * parallel.dcp_size)):
        if size > 1:
            raise ValueError(
                f"the codec transform does not work with {kind} parallelism ({size} workers): use tensor parallelism, "
                "or set compression_codec to bounded"
            )
    layers, head_dim = transformed_layers(engine.kv_cache_config, engine.cache_dtype)
    profile = settings.load_profile()
    check_model(profile, layers=layers, heads=engine.kv_heads, head_dim=head_dim, text_config=engine.text_config)
    part_of(profile, _first_head(engine, parallel), max(1, engine.kv_heads // parallel.tp_size))
    logger.info("kvferry: profile %s of %s", settings.profile, profile.model.get("name", "no model in particular"))


def _first_head(engine: Engine, parallel: Any) -> int:
    """Number of the first KV head that a worker holds. Where there are more workers than heads, several hold one."""
    return int(parallel.rank % parallel.tp_size * engine.kv_heads // parallel.tp_size)


class KVFerrySpec(_SlotRows):
    """vLLM's CPU tier."""


class KVFerryTieringSpec(_SlotRows, TieringOffloadingSpec):
    """vLLM's CPU tier with other tiers below it: files, objects, peers. They move whole, compressed rows."""

    unlinks_region = False
