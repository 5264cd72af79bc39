"""What a caller sees: arguments, results, order, threads; on the CPU, where jobs are done at once."""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from scene import CHUNK_PAGES, PAGES, Scene, chunk_pages, names
from simulated import SimulatedMachine
from test_orders import open_transfers

import kvferry
from kvferry.codecs.slots import SlotCodec
from kvferry.pipeline import JobResult, Settings, Transfers

CODECS = [
    kvferry.Raw(),
    kvferry.Lossless(),
    kvferry.Lossless("bitpack"),
    kvferry.Bounded(0.05, relative=False),
    kvferry.Bounded(0.01, relative=True, relative_to="tile"),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{getattr(codec, 'packing', '')}")
def test_a_round_trip_is_done_when_it_is_submitted(codec: kvferry.Codec) -> None:
    scene = Scene.make(codec)
    pages, original = chunk_pages(np.random.default_rng(1), 10), scene.snapshot()
    with Transfers(scene.codec, scene.slots, timing=True) as transfers:
        store = transfers.store(pages, range(5, 15), names(10))
        assert store.done() and store.result().ok
        assert store.result().encode_s is not None and store.result().encode_s > 0
        scene.wipe()
        load = transfers.load(pages, range(5, 15), names(10))
        assert load.result().ok
        assert [job.direction for job in transfers.finished()] == ["store", "load"]
    assert (store.id, load.id) == (0, 1)
    assert store.result().encoded_bytes == load.result().encoded_bytes > 0
    if codec.exact:
        assert scene.same(original, pages)
    else:
        index = pages.reshape(-1)
        pairs = zip(scene.layers, original, strict=True)
        error = max(float((x[index].double() - y[index].double()).abs().max()) for x, y in pairs)
        assert error <= 0.05 or codec.relative  # type: ignore[attr-defined]


def test_pages_left_out_of_a_store_are_zeros():
    scene = Scene.make(kvferry.Lossless())
    original = scene.snapshot()
    transfers = Transfers(scene.codec, scene.slots)
    assert transfers.store([[4, -1]], [0], names(1)).result().raw_bytes == scene.codec.kv.page_bytes
    assert transfers.load([[8, 9]], [0], names(1)).result().ok
    for layer, before in zip(scene.layers, original, strict=True):
        assert torch.equal(layer[8], before[4]) and not layer[9].any()


def test_pages_left_out_of_a_load_stay():
    scene = Scene.make()
    pages, original = chunk_pages(np.random.default_rng(1), 4), scene.snapshot()
    transfers = Transfers(scene.codec, scene.slots)
    transfers.store(pages, range(4), names(4))
    scene.wipe()
    wiped, part = scene.snapshot(), pages.copy()
    part[0, 0] = part[3, 1] = -1
    assert transfers.load(part, range(4), names(4)).result().raw_bytes == 6 * scene.codec.kv.page_bytes
    assert scene.same(original, part[part >= 0])
    assert scene.same(wiped, pages[part < 0])


def test_rows_with_gaps_on_the_cpu():
    scene = Scene.make()
    rows = torch.zeros(20, 2 * scene.codec.slot_bytes, dtype=torch.uint8)
    mine = rows[:, scene.codec.slot_bytes :]
    pages, original = chunk_pages(np.random.default_rng(1), 20), scene.snapshot()
    transfers = Transfers(scene.codec, mine, ring_bytes=3 * scene.codec.slot_bytes)
    assert transfers.store(pages, range(20), names(20)).result().ok
    scene.wipe()
    assert transfers.load(pages, range(20), names(20)).result().ok
    assert scene.same(original, pages)
    assert int(rows[:, : scene.codec.slot_bytes].sum()) == 0


@pytest.mark.parametrize(
    ("pages", "slots", "ids", "message"),
    [
        ([[0, 1], [2, 3]], [0, 1, 2], names(3), r"pages has the shape \(2, 2\); for 3 slots pass \(3, 2\)"),
        ([[0, 1]], [[0]], names(1), r"slots has the shape \(1, 1\); for 1 slots pass \(1,\)"),
        ([[0, 1]], [0], names(2), r"identities has the shape \(2, 2\)"),
        ([[0, PAGES]], [0], names(1), rf"pages holds {PAGES}; there are pages -1 to {PAGES - 1}"),
        ([[-2, 0]], [0], names(1), r"pages holds -2; there are pages -1 to"),
        ([[0, 1]], [40], names(1), r"slots holds 40; there are slots 0 to 39"),
        ([[0, 1]], [-1], names(1), r"slots holds -1"),
        ([[0, 1], [2, 3]], [5, 5], names(2), r"slots names a slot twice"),
        ([[0.5, 1]], [0], names(1), r"pages holds float64; pass integers"),
        ([[0, 1]], [0], np.zeros((1, 2)), r"identities holds float64"),
    ],
)
def test_arguments_that_do_not_go_together(pages: object, slots: object, ids: object, message: str) -> None:
    scene = Scene.make()
    transfers = Transfers(scene.codec, scene.slots)
    with pytest.raises(ValueError, match=message):
        transfers.store(pages, slots, ids)  # type: ignore[arg-type]
    assert transfers.finished() == []


def test_loads_may_leave_pages_out_and_read_a_slot_twice():
    scene = Scene.make()
    transfers = Transfers(scene.codec, scene.slots)
    transfers.store([[0, 1]], [3], [[2**64 - 1, 5]])
    assert transfers.load([[-1, 2], [4, 5]], [3, 3], [[2**64 - 1, 5]] * 2).result().ok
    assert transfers.load([[-2, 2]] * 0, [], []).result() == JobResult()
    with pytest.raises(ValueError, match="pages holds -2"):
        transfers.load([[-2, 2]], [3], [[2**64 - 1, 5]])


def test_lists_arrays_and_tensors_of_integers_are_taken_and_copied():
    scene, machine = Scene.make(), SimulatedMachine(0)
    transfers, _ = open_transfers(machine, scene)
    pages, slots, ids, original = np.arange(8).reshape(4, 2), np.arange(4), names(4), scene.snapshot()
    jobs = [transfers.store(pages, slots, ids)]
    pages[:], slots[:], ids[:] = 9, 9, 9
    jobs.append(transfers.store([[8, 9]], (7,), names(1, 50).tolist()))
    jobs.append(transfers.store(torch.tensor([[10, 11]]), torch.tensor([8]), names(1, 60).view(np.int64)))
    transfers.wait(jobs)
    assert all(job.result().ok for job in jobs)
    scene.wipe()
    load = transfers.load(np.arange(8).reshape(4, 2), range(4), names(4))
    load.wait()
    assert load.result().ok and scene.same(original, np.arange(8))


def test_slots_that_are_of_no_use():
    scene = Scene.make()
    size = scene.codec.slot_bytes
    for wrong in (torch.zeros(4, size), torch.zeros(4, size + 16, dtype=torch.uint8), scene.slots[0]):
        with pytest.raises(ValueError, match=rf"pass uint8 \[num_slots, {size}\]"):
            Transfers(scene.codec, wrong)
    with pytest.raises(ValueError, match="has 0 rows"):
        Transfers(scene.codec, scene.slots[:0])
    rows = torch.zeros(4, size + 16, dtype=torch.uint8)[:, :size]
    with pytest.raises(ValueError, match="fused_store=False"):
        Transfers(scene.codec, rows, machine=SimulatedMachine(), fused_store=True)


def test_num_sms_stands_in_for_the_codecs():
    scene = Scene.make()
    transfers = Transfers(scene.codec, scene.slots, num_sms=7)
    assert isinstance(transfers.slot_codec, SlotCodec) and transfers.slot_codec.num_sms == 7
    assert scene.codec.num_sms is None


def test_a_result_before_the_end_is_refused():
    scene, machine = Scene.make(), SimulatedMachine(0)
    transfers, _ = open_transfers(machine, scene)
    job = transfers.store([[0, 1]], [0], names(1))
    with pytest.raises(RuntimeError, match=r"<store job 0, 1 chunks> is not over: wait\(\)"):
        job.result()
    job.wait()
    assert job.result().ok


def test_closing_waits_and_takes_no_more():
    scene, machine = Scene.make(), SimulatedMachine(0)
    transfers, _ = open_transfers(machine, scene, rows=16, jobs_in_flight=1)
    with transfers:
        jobs = [transfers.store([[i, i + 1]], [i], names(1, i)) for i in range(5)]
    assert all(job.result().ok for job in jobs)
    assert transfers.finished() == jobs
    with pytest.raises(ValueError, match="these Transfers are closed"):
        transfers.load([[0, 1]], [0], names(1))
    transfers.close()


def test_forgotten_transfers_come_to_rest_first():
    scene, machine = Scene.make(), SimulatedMachine(0)
    transfers, _ = open_transfers(machine, scene)
    transfers.store(np.arange(40).reshape(20, 2), range(20), names(20))
    gone = weakref.ref(transfers)
    del transfers
    gc.collect()
    assert gone() is None
    assert not any(stream.queue for stream in machine.streams)


def test_many_threads():
    scene = Scene.make()
    original = scene.snapshot()
    transfers = Transfers(scene.codec, scene.slots, settings=Settings(table_bytes=1))
    reported: list[int] = []
    problems: list[object] = []

    def work(number: int) -> None:
        for turn in range(10):
            pages = np.arange(4).reshape(2, CHUNK_PAGES) + 4 * number
            ids = names(2, 100 * number + turn)
            jobs = [transfers.store(pages, [2 * number, 2 * number + 1], ids)]
            jobs.append(transfers.load(pages, [2 * number, 2 * number + 1], ids))
            transfers.wait(jobs)
            problems.extend(job.result() for job in jobs if not job.result().ok)
            reported.extend(job.id for job in transfers.finished())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    reported += [job.id for job in transfers.finished()]
    assert sorted(reported) == list(range(160))
    assert scene.same(original, np.arange(32))
