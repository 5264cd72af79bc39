"""Workers side by side, as under tensor parallelism, and what they tell the scheduler; without an engine."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm.v1.kv_offload.base", reason="vLLM is not installed (make test installs it)")

from vllm.v1.kv_offload.base import GPULoadStoreSpec

from kvferry import Lossless, PagedKV, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes
from kvferry.integrations.vllm.chunks import identities_of, identity_of
from kvferry.integrations.vllm.layout import Part
from kvferry.integrations.vllm.manager import SlotLoadStoreSpec, keys_named
from kvferry.integrations.vllm.metrics import Counters, KVFerryWorkerMetadata
from kvferry.integrations.vllm.settings import OffloadSettings
from kvferry.integrations.vllm.worker import SlotWorker

KEYS = [bytes([number]) * 36 for number in range(3)]
ROWS = 5


def cache(seed: int) -> Tensor:
    return torch.randn(8, 2, 16, 64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def pair(split_rows: int | None = None) -> tuple[list[Tensor], list[SlotWorker], Tensor]:
    """The caches of two workers, the workers, and the rows that they share: half of each row is each one's."""
    caches = [cache(rank) for rank in range(2)]
    codecs = []
    for layer in caches:
        kv = PagedKV.heads_first([layer], 32)
        codecs.append(SlotCodec(kv, Lossless(), 2, raw_slot_bytes(kv, 2)))
    width = codecs[0].slot_bytes
    rows = torch.zeros(ROWS, 2 * width, dtype=torch.uint8)
    settings = OffloadSettings(codec="lossless", ring_mib=1)
    workers = [
        SlotWorker([[Part(codec, 0, 1)]], rows[:, rank * width : (rank + 1) * width], settings, 2, rank, split_rows)
        for rank, codec in enumerate(codecs)
    ]
    return caches, workers, rows


def host(slots: list[int]) -> SlotLoadStoreSpec:
    return SlotLoadStoreSpec(slots, identities_of(KEYS[: len(slots)]))


BLOCKS = GPULoadStoreSpec([5, 1, 0, 3, 7, 2], group_sizes=[6], block_indices=[0])


@pytest.mark.parametrize("split_rows", [None, 1, 2])
def test_each_worker_has_its_part_of_a_row(split_rows: int | None) -> None:
    caches, workers, _ = pair(split_rows)
    before = [layer.clone() for layer in caches]
    for worker in workers:
        assert worker.submit_store(1, BLOCKS, host([4, 0, 2]))
        assert [result.job_id for result in worker.get_finished()] == [1]
    for layer, worker in zip(caches, workers, strict=True):
        layer.zero_()
        assert worker.submit_load(2, host([4, 0, 2]), BLOCKS)
        worker.wait({2, 99})
        ((result,), report) = worker.get_finished(), worker.take_report()
        assert result.success and result.transfer_size == report.counters.loaded_bytes > 0
        assert not report.failed_loads and not worker.take_bad_blocks()
    for layer, kept in zip(caches, before, strict=True):
        assert torch.equal(layer[BLOCKS.block_ids], kept[BLOCKS.block_ids])


def test_a_worker_does_not_take_anothers_part() -> None:
    _, workers, rows = pair()
    for worker in workers:
        worker.submit_store(1, BLOCKS, host([4, 0, 2]))
    half = rows.shape[1] // 2
    rows[0] = rows[0].roll(half)
    worker = workers[0]
    worker.get_finished()
    worker.submit_load(2, host([4, 0, 2]), BLOCKS)
    assert worker.get_finished()[0].success  # vLLM knows no other end
    report = worker.take_report()
    assert report.failed_loads == {2: {identity_of(KEYS[1])}}
    assert worker.take_bad_blocks() == {0, 3}  # the second chunk's
    assert report.counters.corrupt_slots == 1


def test_what_does_not_go_together_is_lost_and_nothing_raises() -> None:
    _, workers, _ = pair()
    worker = workers[0]
    assert worker.submit_store(1, BLOCKS, host([4, 0]))  # six blocks are three chunks
    assert worker.submit_store(2, BLOCKS, host([4, 0, 99]))  # there is no such row
    assert worker.submit_load(3, host([1, 3, 4]), GPULoadStoreSpec([1, 2, 3, 4, 5, 800], [6], [0]))
    assert {result.job_id: result.success for result in worker.get_finished()} == {1: True, 2: True, 3: True}
    report = worker.take_report()
    assert set(report.failed_stores) == {1, 2} and set(report.failed_loads) == {3}
    # Both chunks of the first; of the second only the one without a row.
    assert report.counters.failed_stores == 3 and report.counters.failed_loads == 3
    worker.shutdown()
    assert worker.get_finished() == []


def test_what_workers_tell_travels_and_adds_up() -> None:
    spec = pickle.loads(pickle.dumps(host([4, 0, 2])))
    assert spec.block_ids.tolist() == [4, 0, 2] and np.array_equal(spec.identities, identities_of(KEYS))

    one = KVFerryWorkerMetadata({1: 1}, failed_stores={1: {(1, 2)}}, counters=Counters(stored_bytes=5))
    other = KVFerryWorkerMetadata(
        {1: 1, 2: 1}, failed_stores={1: {(3, 4)}}, failed_loads={2: {(5, 6)}}, counters=Counters(stored_bytes=7)
    )
    both = pickle.loads(pickle.dumps(one)).aggregate(pickle.loads(pickle.dumps(other)))
    assert both.completed_jobs == {1: 2, 2: 1}
    assert both.failed_stores == {1: {(1, 2), (3, 4)}} and both.failed_loads == {2: {(5, 6)}}
    assert both.counters.stored_bytes == 12


def test_keys_are_told_by_identity() -> None:
    assert keys_named(KEYS, {identity_of(KEYS[2]), (0, 0)}) == {KEYS[2]}
