"""What runs in vLLM's worker processes: transfers between KV cache and slots. Nothing here raises once it is made; what
fails is counted, said once, and reported as a chunk that is not there."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.codecs.transform import Transform
from kvferry.format.slot import SlotStatus
from kvferry.integrations.vllm.chunks import (
    MISSING,
    GroupChunks,
    first_positions,
    for_positions,
    for_rank,
    group_chunks,
    pages_of,
)
from kvferry.integrations.vllm.compat import (
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
    init_logger,
)
from kvferry.integrations.vllm.layout import Part
from kvferry.integrations.vllm.metrics import Counters
from kvferry.integrations.vllm.settings import OffloadSettings
from kvferry.pipeline import Job, JobResult, Transfers

logger = init_logger(__name__)

_MIB = 1 << 20


@dataclass
class Report:
    """What a worker found out since it was asked last: chunks that failed, by transfer, as identities without the
    rank, and counters."""

    failed_stores: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    failed_loads: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)


@dataclass
class _Launched:
    """A job of the pipeline: chunks `rows` of its transfer's group."""

    job: Job
    chunks: GroupChunks
    rows: np.ndarray


@dataclass
class _Transfer:
    """A transfer of vLLM's that is under way. `lost`: chunks for which no job could be launched."""

    job_id: int
    direction: str
    identities: np.ndarray
    groups: list[GroupChunks]
    launched: list[_Launched] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    error: Exception | None = None


class SlotWorker(OffloadingWorker):
    """Stores and loads chunks through slots. `parts` are those of each group's rows, `rows` uint8
    `[num_rows, row_bytes]` is this worker's share of host memory, `split_rows` how many rows lie in one registration
    with CUDA (copies must not reach beyond one). `rank` sets this worker's slots apart from other workers'.

    Raises what `Transfers` raises.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Part]],
        rows: Tensor,
        settings: OffloadSettings,
        blocks_per_chunk: int,
        rank: int,
        split_rows: int | None = None,
        region: Any = None,
    ) -> None:
        self._blocks_per_chunk, self._rank, self._split = blocks_per_chunk, rank, split_rows or len(rows)
        self._region = region
        self._parts = parts
        self._rows = rows
        self._transfers: list[list[Transfers]] = []
        self._under_way: dict[int, _Transfer] = {}
        self._report = Report()
        self._bad_blocks: set[int] = set()
        self._said: set[str] = set()
        try:
            for group in parts:
                self._transfers.append([])
                for part in group:
                    slots = rows[:, part.offset : part.stop]
                    self._transfers[-1].append(
                        Transfers(part.slot_codec, slots, ring_bytes=settings.ring_mib * _MIB, timing=settings.timing)
                    )
        except Exception:
            self.shutdown()
            raise

    # -- what vLLM calls ----------------------------------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._submit("store", job_id, src_spec, dst_spec)

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        # Loads are in order, expedited or not: the coder's stream is one, and its priority is high already.
        return self._submit("load", job_id, dst_spec, src_spec)

    def get_finished(self) -> list[TransferResult]:
        results = []
        for group in self._transfers:
            for transfers in group:
                with suppress(Exception):
                    transfers.finished()  # or they would be kept for ever
        for job_id, transfer in list(self._under_way.items()):
            if all(self._is_done(launched.job) for launched in transfer.launched):
                del self._under_way[job_id]
                results.append(self._close(transfer))
        return results

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids:
            transfer = self._under_way.get(job_id)
            for launched in transfer.launched if transfer is not None else ():
                try:
                    launched.job.wait()
                except Exception as error:
                    self._say("waiting for a transfer", error)

    def shutdown(self) -> None:
        for group in self._transfers:
            for transfers in group:
                try:
                    transfers.close()
                except Exception as error:
                    self._say("closing the pipeline", error)
        self._transfers, self._under_way = [], {}
        self._rows = torch.empty(0, dtype=torch.uint8)
        region, self._region = self._region, None
        if region is not None:
            region.cleanup()

    # -- what our connector calls -------------------------------------------------------------------------------------

    def take_report(self) -> Report:
        """What was found out since the last call."""
        report, self._report = self._report, Report()
        return report

    @property
    def failed_load_jobs(self) -> set[int]:
        """Loads of the report to come that failed in any chunk."""
        return set(self._report.failed_loads)

    def take_bad_blocks(self) -> set[int]:
        """Blocks whose load failed, since the last call."""
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    # -- for these ----------------------------------------------------------------------------------------------------

    def _submit(self, direction: str, job_id: int, gpu: Any, host: Any) -> bool:
        identities = getattr(host, "identities", None)
        slots = np.asarray(host.block_ids)
        if identities is None:
            identities = np.zeros((len(slots), 2), dtype=np.uint64)
        transfer = _Transfer(job_id, direction, identities, [])
        self._under_way[job_id] = transfer
        try:
            transfer.groups = group_chunks(
                np.asarray(gpu.block_ids), gpu.group_sizes, gpu.block_indices, self._blocks_per_chunk, len(slots)
            )
            own = for_rank(identities, self._rank)
            ends = getattr(host, "ends", None)
            ends = np.zeros(len(slots), dtype=np.int64) if ends is None else np.asarray(ends)
        except Exception as error:
            self._lose(transfer, set(range(len(slots))), error)
            return True
        for chunks in transfer.groups:
            for rows in self._split_by_registration(slots[chunks.first : chunks.stop]):
                at = chunks.first + rows
                self._launch(transfer, chunks, rows, slots[at], own[at], ends[at])
        return True

    def _split_by_registration(self, slots: np.ndarray) -> list[np.ndarray]:
        """Indices of `slots`, those together that lie in one registration."""
        where = slots // self._split
        return [np.flatnonzero(where == number) for number in np.unique(where)]

    def _launch(
        self,
        transfer: _Transfer,
        chunks: GroupChunks,
        rows: np.ndarray,
        slots: np.ndarray,
        identities: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        try:
            for part, transfers in zip(self._parts[chunks.group], self._transfers[chunks.group], strict=True):
                pages = pages_of(chunks.blocks[rows], part.pages_per_block)
                call = transfers.store if transfer.direction == "store" else transfers.load
                names, positions = identities, None
                if isinstance(part.slot_codec.codec, Transform):
                    positions = first_positions(ends, part.slot_codec.tokens)
                    names = for_positions(identities, positions)
                transfer.launched.append(_Launched(call(pages, slots, names, positions), chunks, rows))
        except Exception as error:
            self._lose(transfer, {chunks.first + int(row) for row in rows}, error)

    def _lose(self, transfer: _Transfer, chunks: set[int], error: Exception) -> None:
        transfer.lost |= chunks
        transfer.error = transfer.error or error
        self._say(f"a {transfer.direction}", error)

    def _is_done(self, job: Job) -> bool:
        try:
            return job.done()
        except Exception as error:
            self._say("asking for a transfer", error)
            return True

    def _close(self, transfer: _Transfer) -> TransferResult:
        """Add what came of a transfer that is over to the report."""
        failed = set(transfer.lost)
        counters = self._report.counters
        broken = len(failed)
        sent, seconds = 0, 0.0
        for launched in transfer.launched:
            result = self._result(launched.job)
            counters.count(transfer.direction, result)
            sent += result.encoded_bytes
            # Stages overlap: the busiest one is about as long as the job.
            seconds += max(result.encode_s or 0.0, result.copy_s or 0.0, result.decode_s or 0.0)
            bad = range(len(launched.rows)) if result.error is not None else result.failed_chunks
            new = {launched.chunks.first + int(launched.rows[chunk]) for chunk in bad} - failed
            failed |= new
            if result.error is not None:
                broken += len(new)
                self._say(f"a {transfer.direction}", result.error)
            elif SlotStatus.CORRUPT in result.statuses or SlotStatus.NO_SLOT in result.statuses:
                self._say_once("corrupt", "kvferry: a slot in host memory is corrupt; its chunk is computed again")
        if failed:
            self._note_failures(transfer, failed, broken)
        return TransferResult(transfer.job_id, True, sent, seconds)

    def _result(self, job: Job) -> JobResult:
        try:
            return job.result()
        except Exception as error:
            return JobResult(error=error)

    def _note_failures(self, transfer: _Transfer, failed: set[int], broken: int) -> None:
        names = {(int(transfer.identities[chunk, 0]), int(transfer.identities[chunk, 1])) for chunk in failed}
        if transfer.direction == "store":
            self._report.counters.failed_stores += broken
            self._report.failed_stores[transfer.job_id] = names
            return
        self._report.counters.failed_loads += broken
        self._report.failed_loads[transfer.job_id] = names
        for chunks in transfer.groups:
            for chunk in failed.intersection(range(chunks.first, chunks.stop)):
                blocks = chunks.blocks[chunk - chunks.first]
                self._bad_blocks.update(int(block) for block in blocks if block != MISSING)

    def _say(self, what: str, error: BaseException) -> None:
        key = f"{what} {type(error).__name__}"
        self._say_once(key, f"kvferry: {what} failed, what it was to bring counts as a miss: {error!r}")

    def _say_once(self, key: str, line: str) -> None:
        """Counters tell how often it happens; the log needs it once."""
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s", line)
