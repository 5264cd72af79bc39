"""Transfers on a simulated device, under many orders of what streams may do: nothing is lost, mixed up or too early."""

import numpy as np
import pytest
import torch
from scene import CHUNK_PAGES, Scene, chunk_pages, names
from simulated import SimulatedCodec, SimulatedMachine

import kvferry
from kvferry.format.slot import SlotStatus
from kvferry.pipeline import Settings, Transfers

SEEDS = range(25)


def open_transfers(
    machine: SimulatedMachine, scene: Scene, ring_slots: int = 4, rows: int = 64, **options: object
) -> tuple[Transfers, SimulatedCodec]:
    """Transfers with a ring that a job fills several times over."""
    codec = SimulatedCodec(machine, scene.codec)
    chunk_bytes = scene.codec.kv.page_bytes * CHUNK_PAGES
    settings = Settings(
        ring_bytes=ring_slots * scene.codec.slot_bytes,
        first_bite_bytes=chunk_bytes,
        bite_bytes=4 * chunk_bytes,
        growth=2,
        table_bytes=rows * 4 * (CHUNK_PAGES + 9),
        **options,
    )
    return Transfers(codec, scene.slots, settings=settings, machine=machine), codec


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ring_slots", "rows"), [(1, 16), (2, 64), (5, 16), (40, 256)])
def test_jobs_in_flight_in_both_directions(seed: int, ring_slots: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    scene, machine = Scene.make(seed=seed), SimulatedMachine(seed)
    transfers, _ = open_transfers(machine, scene, ring_slots, rows)
    original = scene.snapshot()
    pages, slots, ids = chunk_pages(rng, 30), rng.permutation(40)[:30], names(30)
    parts = np.split(np.arange(30), np.sort(rng.choice(29, 3, replace=False)) + 1)
    stores = []
    for part in parts:
        stores.append(transfers.store(pages[part], slots[part], ids[part]))
        machine.steps(int(rng.integers(20)))
    while not all(job.done() for job in stores):
        machine.step()
    assert transfers.finished() == stores
    # The cache is written over; loads and further stores run side by side.
    scene.wipe()
    half, other = np.arange(15), np.arange(15, 30)
    loads = [transfers.load(pages[part], slots[part], ids[part]) for part in np.split(half, 3)]
    free = np.setdiff1d(np.arange(40), slots)
    more = transfers.store(pages[other][:10], free, names(10, 100))
    again = transfers.load(pages[other], slots[other], ids[other])  # overwrites what `more` reads
    assert machine.host_waits == 0
    transfers.wait([more])
    transfers.close()
    assert all(job.result().ok for job in (*stores, *loads, again, more))
    assert transfers.finished() == [more, *loads, again]
    assert transfers.finished() == []
    assert scene.same(original, pages)
    assert again.result().raw_bytes == 15 * CHUNK_PAGES * scene.codec.kv.page_bytes


@pytest.mark.parametrize("seed", SEEDS)
def test_stores_read_and_loads_write_after_what_the_caller_queued(seed: int) -> None:
    scene, machine = Scene.make(seed=seed), SimulatedMachine(seed)
    transfers, _ = open_transfers(machine, scene)
    pages = chunk_pages(np.random.default_rng(seed), 12)
    wanted = scene.snapshot()
    for layer in wanted:
        layer.mul_(-2)

    def write() -> None:
        for layer, values in zip(scene.layers, wanted, strict=True):
            layer.copy_(values)

    machine.caller.queue.append(write)
    store = transfers.store(pages, range(12), names(12))
    store.wait()
    assert store.result().ok
    # A stream other than the current one is waited for if it is named.
    aside = machine.stream_named("aside")
    aside.queue.append(scene.wipe)
    load = transfers.load(pages, range(12), names(12), after=aside)  # type: ignore[arg-type]
    load.wait()
    assert load.result().ok
    assert scene.same(wanted, pages)


def test_submitting_returns_while_the_callers_stream_is_blocked():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene)
    with machine.caller_blocked():
        job = transfers.store(chunk_pages(np.random.default_rng(0), 20), range(20), names(20))
        machine.settle()
        assert not job.done()
        assert transfers.finished() == []
    job.wait()
    assert job.result().ok


def test_neighbouring_slots_go_by_one_copy():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene, ring_slots=40)
    machine.settle()
    pages = chunk_pages(np.random.default_rng(0), 7)
    before = machine.copies
    transfers.store(pages, range(7), names(7)).wait()
    assert machine.copies - before == 1 + 3  # the table; bites of 1, 2 and 4
    before = machine.copies
    transfers.store(pages, [9, 3, 4, 11, 12, 14, 15], names(7)).wait()
    assert machine.copies - before == 1 + 1 + 1 + 2


@pytest.mark.parametrize("seed", SEEDS)
def test_more_jobs_than_there_is_room_for(seed: int) -> None:
    scene, machine = Scene.make(seed=seed), SimulatedMachine(seed)
    transfers, _ = open_transfers(machine, scene, rows=16, jobs_in_flight=2)
    original, rng = scene.snapshot(), np.random.default_rng(seed)
    pages = chunk_pages(rng, 32)
    stores = [transfers.store(pages[i : i + 2], [i, i + 1], names(2, i)) for i in range(0, 32, 2)]
    seen = []
    while len(seen) < 16:
        machine.step()
        seen += transfers.finished()
    assert seen == stores
    assert machine.host_waits == 0
    scene.wipe()
    loads = [transfers.load(pages[i : i + 2], [i, i + 1], names(2, i)) for i in range(0, 32, 2)]
    transfers.wait(reversed(loads))
    assert all(job.result().ok for job in loads)
    assert scene.same(original, pages)


@pytest.mark.parametrize("seed", SEEDS)
def test_cancelling(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene, machine = Scene.make(seed=seed), SimulatedMachine(seed)
    transfers, _ = open_transfers(machine, scene, rows=32, jobs_in_flight=2)
    pages, original = chunk_pages(rng, 30), scene.snapshot()
    transfers.store(pages, range(30), names(30)).wait()
    transfers.finished()
    scene.wipe()
    jobs = [transfers.load(pages[i : i + 10], range(i, i + 10), names(10, i)) for i in (0, 10, 20)]
    machine.steps(int(rng.integers(60)))
    victim = jobs[int(rng.integers(3))]
    over = victim.done()
    nothing_more = victim.cancel()
    assert not (over and nothing_more)
    if nothing_more:
        now = scene.snapshot()
    assert not victim.cancel(), "a second time there is nothing left to cancel"
    transfers.close()
    mine = pages[jobs.index(victim) * 10 :][:10]
    if nothing_more:
        assert scene.same(now, mine)
    assert transfers.finished() == jobs
    assert victim.result().cancelled == (not over)
    assert victim.result().ok == over
    for job in set(jobs) - {victim}:
        assert job.result().ok
        assert scene.same(original, pages[jobs.index(job) * 10 :][:10])


def test_a_job_that_has_not_started_is_dropped():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene, jobs_in_flight=1)
    pages = chunk_pages(np.random.default_rng(0), 4)
    before = scene.slots.clone()
    first, second = (transfers.store(pages[i : i + 2], [i, i + 1], names(2, i)) for i in (0, 2))
    assert second.cancel()
    assert second.done() and second.result().cancelled
    assert transfers.finished() == [], "the first comes first"
    transfers.close()
    assert transfers.finished() == [first, second]
    assert first.result().ok and not first.cancel()
    assert torch.equal(scene.slots[2:], before[2:])


def test_what_has_not_started_of_a_job_is_dropped():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene, rows=16, jobs_in_flight=1)  # parts of 4 chunks
    job = transfers.store(chunk_pages(np.random.default_rng(0), 12), range(12), names(12))
    assert not job.cancel()
    assert not job.done()
    job.wait()
    assert job.result().cancelled
    assert bool(scene.slots[:4, 0].all()) and not scene.slots[4:].any()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fused", [(True, True), (True, False), (False, True)])
def test_fused_directions(seed: int, fused: tuple[bool, bool]) -> None:
    scene, machine = Scene.make(kvferry.Lossless(), seed=seed), SimulatedMachine(seed)
    codec = SimulatedCodec(machine, scene.codec)
    settings = Settings(ring_bytes=3 * scene.codec.slot_bytes)
    transfers = Transfers(
        codec, scene.slots, settings=settings, machine=machine, fused_store=fused[0], fused_load=fused[1]
    )
    pages, original = chunk_pages(np.random.default_rng(seed), 8), scene.snapshot()
    machine.caller.queue.append(lambda: [layer.neg_() for layer in scene.layers] and None)
    store = transfers.store(pages, range(3, 11), names(8))
    store.wait()
    scene.wipe()
    load = transfers.load(pages, range(3, 11), names(8))
    load.wait()
    assert store.result().ok and load.result().ok
    assert scene.same([-layer for layer in original], pages)
    assert store.result().encoded_bytes == load.result().encoded_bytes


def test_results_count_what_slots_say():
    codec = kvferry.Bounded(0.01, relative=False)
    scene, machine = Scene.make(codec, ratio=3.0), SimulatedMachine(3)
    transfers, _ = open_transfers(machine, scene, timing=True)
    pages = chunk_pages(np.random.default_rng(0), 9)
    job = transfers.store(pages, range(9), names(9))
    job.wait()
    result = job.result()
    assert result.ok
    assert result.relaxed == 9, "a ratio of 3 at this bound takes doubling"
    assert result.raw_bytes == 9 * CHUNK_PAGES * scene.codec.kv.page_bytes
    assert 0.8 * result.raw_bytes / 3.0 < result.encoded_bytes <= 9 * scene.codec.slot_bytes
    assert result.encode_s is not None and result.copy_s is not None and result.decode_s is None
    part = pages.copy()
    part[0, 0] = part[4, 1] = -1
    load = transfers.load(part, range(9), names(9))
    load.wait()
    assert load.result().raw_bytes == result.raw_bytes - 2 * scene.codec.kv.page_bytes
    assert load.result().encoded_bytes == result.encoded_bytes
    assert load.result().relaxed == 9
    assert load.result().decode_s is not None and load.result().encode_s is None


def test_a_bad_slot_fails_its_chunk_alone():
    scene, machine = Scene.make(kvferry.Lossless()), SimulatedMachine(1)
    transfers, _ = open_transfers(machine, scene)
    pages, original = chunk_pages(np.random.default_rng(0), 12), scene.snapshot()
    transfers.store(pages, range(12), names(12)).wait()
    scene.wipe()
    before = scene.snapshot()
    scene.damage(3)
    scene.slots[7, 2] ^= 1  # the magic
    asked = names(12)
    asked[10] += np.uint64(1)
    job = transfers.load(pages, range(12), asked)
    job.wait()
    result = job.result()
    assert not result.ok and result.error is None
    assert result.failed_chunks == (3, 7, 10)
    assert result.statuses == (SlotStatus.CORRUPT, SlotStatus.NO_SLOT, SlotStatus.OTHER_IDENTITY)
    good = np.setdiff1d(np.arange(12), result.failed_chunks)
    assert scene.same(original, pages[good])
    assert scene.same(before, pages[[7, 10]])


def test_chunks_that_do_not_fit_are_reported_and_refused_later():
    scene = Scene.make(kvferry.Bounded(1e-3, relative=False), ratio=4.0, on_overflow="reject")
    for layer in scene.layers:
        layer[:8] = 0
    machine = SimulatedMachine(2)
    transfers, _ = open_transfers(machine, scene)
    pages = np.arange(24).reshape(12, CHUNK_PAGES)
    store = transfers.store(pages, range(12), names(12))
    store.wait()
    assert store.result().failed_chunks == tuple(range(4, 12))
    assert set(store.result().statuses) == {SlotStatus.REJECTED}
    assert store.result().rejected == 8 and not store.result().ok and store.result().error is None
    load = transfers.load(pages, range(12), names(12))
    load.wait()
    assert load.result().failed_chunks == tuple(range(4, 12))
    assert load.result().rejected == 8


def test_host_slots_with_gaps_between_them():
    scene, machine = Scene.make(), SimulatedMachine(5)
    rows = torch.zeros(40, scene.codec.slot_bytes + 512, dtype=torch.uint8)
    scene.slots = rows[:, : scene.codec.slot_bytes]
    transfers, _ = open_transfers(machine, scene)
    pages, original = chunk_pages(np.random.default_rng(0), 12), scene.snapshot()
    transfers.store(pages, range(12), names(12)).wait()
    scene.wipe()
    transfers.load(pages, range(12), names(12)).wait()
    assert scene.same(original, pages)
    assert int(rows[:, scene.codec.slot_bytes :].sum()) == 0
