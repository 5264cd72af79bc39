"""Transfers between a GPU and pinned host memory: they queue, they do not wait, and everything arrives."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from scene import CHUNK_PAGES, PAGES, Scene, chunk_pages, names

import kvferry
from kvferry.codecs.slots import SlotCodec
from kvferry.device import PinnedPool
from kvferry.errors import OutOfDeviceMemory
from kvferry.format.slot import SlotStatus
from kvferry.pages import PagedKV
from kvferry.pipeline import Settings, Transfers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SLEEP_CYCLES = 400_000_000
"""Some 0.2 s on a GPU of 2 GHz."""
CODECS = [
    kvferry.Raw(),
    kvferry.Lossless(),
    kvferry.Lossless("bitpack"),
    kvferry.Bounded(0.05, relative=False),
    kvferry.Bounded(0.05, relative=False, packing="bitpack"),
]


def small(scene: Scene, ring_slots: int = 4, **options: object) -> Settings:
    """Settings under which a small job takes several bites, and the ring comes around."""
    chunk_bytes = scene.codec.kv.page_bytes * CHUNK_PAGES
    return Settings(
        ring_bytes=ring_slots * scene.codec.slot_bytes,
        first_bite_bytes=chunk_bytes,
        bite_bytes=4 * chunk_bytes,
        growth=2,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("fused", [False, True], ids=["staged", "fused"])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{getattr(codec, 'packing', '')}")
def test_round_trip(codec: kvferry.Codec, fused: bool) -> None:
    scene = Scene.make(codec, device="cuda")
    pages, original = chunk_pages(np.random.default_rng(1), 30), scene.snapshot()
    slots = np.random.default_rng(2).permutation(40)[:30]
    with Transfers(scene.codec, scene.slots, settings=small(scene), fused_store=fused, fused_load=fused) as transfers:
        store = transfers.store(pages, slots, names(30))
        store.wait()
        assert store.result().ok, store.result()
        scene.wipe()
        load = transfers.load(pages, slots, names(30))
        load.wait()
        assert load.result().ok, load.result()
        assert transfers.finished() == [store, load]
    if codec.exact:
        assert scene.same(original, pages)
    index = torch.from_numpy(pages.reshape(-1)).cuda()
    for now, before in zip(scene.layers, original, strict=True):
        assert float((now[index].double() - before[index].double()).abs().max()) <= 0.05
    # A CPU reads the same slots.
    layers = [torch.zeros_like(layer, device="cpu") for layer in scene.layers]
    host = SlotCodec(PagedKV.heads_first(layers, 32), codec, CHUNK_PAGES, scene.codec.slot_bytes)
    assert Transfers(host, scene.slots).load(pages, slots, names(30)).result().ok
    for layer, now in zip(layers, scene.layers, strict=True):
        assert torch.equal(layer[index.cpu()].view(torch.int16), now[index].cpu().view(torch.int16))


@pytest.mark.parametrize("fused", [False, True], ids=["staged", "fused"])
def test_nothing_on_the_way_waits_or_allocates(fused: bool) -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene), fused_store=fused, fused_load=fused)
    pages, original = chunk_pages(np.random.default_rng(1), 20), scene.snapshot()
    for _ in range(2):  # Python and the allocator settle
        transfers.store(pages, range(20), names(20)).wait()  # over before its slots are loaded
        transfers.load(pages, range(20), names(20)).wait()
    assert len(transfers.finished()) == 4
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(SLEEP_CYCLES)  # the caller's stream is busy
        gate = torch.cuda.Event()
        gate.record()
        start = time.perf_counter()
        store = transfers.store(pages, range(20), names(20))
        load = transfers.load(pages, range(20, 40), names(20))  # nothing there: every chunk will fail
        assert transfers.finished() == []
        assert not store.done()
        elapsed = time.perf_counter() - start
        assert not gate.query(), "the kernel was over before the jobs were submitted: make it longer"
        seen: list[object] = []
        while len(seen) < 2:
            time.sleep(1e-3)
            seen += transfers.finished()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert elapsed < 0.05
    assert store.result().ok
    assert set(load.result().statuses) == {SlotStatus.NO_SLOT} and len(load.result().failed_chunks) == 20
    assert scene.same(original, pages)
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocations
    transfers.close()


def test_stores_read_and_loads_write_after_the_callers_work() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene))
    pages = np.arange(PAGES).reshape(-1, CHUNK_PAGES)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES // 4)
        for layer in scene.layers:
            layer.neg_()
        store = transfers.store(pages, range(32), names(32))
    store.wait()
    wanted = scene.snapshot()
    torch.cuda._sleep(SLEEP_CYCLES // 4)
    scene.wipe()
    load = transfers.load(pages, range(32), names(32))
    load.wait()
    assert store.result().ok and load.result().ok
    assert scene.same(wanted, pages)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES // 4)
        scene.wipe()
    load = transfers.load(pages, range(32), names(32), after=side)
    load.wait()
    assert scene.same(wanted, pages)
    transfers.close()


@pytest.mark.parametrize("ring_slots", [1, 3, 40])
def test_many_jobs_in_both_directions(ring_slots: int) -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene, ring_slots, jobs_in_flight=3))
    rng, original = np.random.default_rng(5), scene.snapshot()
    pages = np.arange(PAGES).reshape(-1, CHUNK_PAGES)
    transfers.store(pages, range(32), names(32)).wait()
    transfers.finished()
    jobs = []
    for turn in range(60):
        part = rng.permutation(16)[: rng.integers(1, 12)]
        if turn % 2:  # the upper half of the cache is only read, the lower half only written
            jobs.append(transfers.store(pages[16 + part], 16 + part, names(32)[16 + part]))
        else:
            jobs.append(transfers.load(pages[part], part, names(32)[part]))
    seen = []
    while len(seen) < len(jobs):
        seen += transfers.finished()
    for direction in ("store", "load"):
        assert [j for j in seen if j.direction == direction] == [j for j in jobs if j.direction == direction]
    assert all(job.result().ok for job in jobs)
    assert scene.same(original, pages)
    scene.wipe()
    last = transfers.load(pages, range(32), names(32))
    last.wait()
    assert last.result().ok and scene.same(original, pages)
    transfers.close()


def test_bad_slots_fail_alone() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene))
    pages, original = chunk_pages(np.random.default_rng(0), 12), scene.snapshot()
    transfers.store(pages, range(12), names(12)).wait()
    scene.wipe()
    scene.damage(3)
    scene.slots[7, 2] ^= 1
    before = scene.snapshot()
    job = transfers.load(pages, range(12), names(12))
    job.wait()
    assert job.result().failed_chunks == (3, 7)
    assert job.result().statuses == (SlotStatus.CORRUPT, SlotStatus.NO_SLOT)
    assert scene.same(original, np.delete(pages, [3, 7], axis=0))
    assert scene.same(before, pages[7])
    transfers.close()


@pytest.mark.parametrize("on_overflow", ["relax", "reject"])
def test_chunks_that_do_not_fit(on_overflow: str) -> None:
    codec = kvferry.Bounded(1e-3, relative=False)
    scene = Scene.make(codec, ratio=3.0, device="cuda", on_overflow=on_overflow)
    for layer in scene.layers:
        layer[:8] = 0
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene, timing=True))
    pages = np.arange(24).reshape(12, CHUNK_PAGES)
    store = transfers.store(pages, range(12), names(12))
    store.wait()
    result = store.result()
    assert result.encode_s is not None and result.copy_s is not None and min(result.encode_s, result.copy_s) > 0
    if on_overflow == "relax":
        assert result.ok and result.relaxed == 8
    else:
        assert result.failed_chunks == tuple(range(4, 12)) and result.rejected == 8
    load = transfers.load(pages, range(12), names(12))
    load.wait()
    assert load.result().failed_chunks == result.failed_chunks
    transfers.close()


def test_rows_of_registered_memory_with_gaps() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    width = scene.codec.slot_bytes + 512
    with PinnedPool(64 * width) as pool:
        rows = pool.allocate(40 * width).tensor[: 40 * width].view(40, width)
        rows.zero_()
        transfers = Transfers(scene.codec, rows[:, : scene.codec.slot_bytes], settings=small(scene))
        pages, original = chunk_pages(np.random.default_rng(0), 30), scene.snapshot()
        slots = np.concatenate([np.arange(10), [39, 38, 20, 21, 30], np.arange(11, 20), [25, 26, 28, 33, 35, 37]])
        store = transfers.store(pages, slots, names(30))
        store.wait()
        scene.wipe()
        load = transfers.load(pages, slots, names(30))
        load.wait()
        assert store.result().ok and load.result().ok
        assert scene.same(original, pages)
        assert int(rows[:, scene.codec.slot_bytes :].sum()) == 0
        transfers.close()


def test_memory_that_will_not_do() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    with pytest.raises(ValueError, match=r"slots is pageable memory.*pin_memory=True"):
        Transfers(scene.codec, scene.slots.clone())
    with pytest.raises(OutOfDeviceMemory, match=r"staging ring \(ring_bytes\) takes .* MiB.* make ring_bytes"):
        Transfers(scene.codec, scene.slots, ring_bytes=1 << 44)
    with Transfers(scene.codec, scene.slots) as transfers:
        job = transfers.store([[0, 1]], [0], names(1))
    assert job.result().ok


@pytest.mark.parametrize("fault", ["coder", "copy"])
@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_failed_launch_fails_its_job_alone(fault: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene))
    pages, original = chunk_pages(np.random.default_rng(0), 30), scene.snapshot()
    transfers.store(pages, range(30), names(30)).wait()
    transfers.finished()
    calls = []

    def failing(real: object) -> object:
        def call(*arguments: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("refused")
            return real(*arguments)  # type: ignore[operator]

        return call

    submit = getattr(transfers, direction)
    first = submit(pages[:10], range(10), names(10))
    with monkeypatch.context() as patch:
        if fault == "copy":
            patch.setattr(transfers._machine, "copy_rows", failing(transfers._machine.copy_rows))
        else:
            name = {"store": "encode", "load": "decode"}[direction]
            patch.setattr(SlotCodec, name, failing(getattr(SlotCodec, name)))
        broken = submit(pages[10:20], range(10, 20), names(10, 10))
    last = submit(pages[20:], range(20, 30), names(10, 20))
    transfers.wait([broken, last])
    assert "refused" in str(broken.result().error)
    assert first.result().ok and last.result().ok
    assert transfers.finished() == [first, broken, last]
    assert scene.same(original, pages)
    transfers.close()


def test_threads_that_never_touched_the_gpu() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene))
    original, problems = scene.snapshot(), []

    def work(number: int) -> None:
        pages = np.arange(16).reshape(8, CHUNK_PAGES) + 16 * number
        for turn in range(20):
            ids = names(8, 1000 * number + 8 * turn)
            store = transfers.store(pages, range(8 * number, 8 * number + 8), ids)
            store.wait()
            load = transfers.load(pages, range(8 * number, 8 * number + 8), ids)
            load.wait()
            problems.extend(job.result() for job in (store, load) if not job.result().ok)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(transfers.finished()) == 160
    assert scene.same(original, np.arange(PAGES))
    transfers.close()


def test_cancelling_in_flight() -> None:
    scene = Scene.make(kvferry.Lossless(), device="cuda")
    transfers = Transfers(scene.codec, scene.slots, settings=small(scene, jobs_in_flight=1))
    pages, original = chunk_pages(np.random.default_rng(0), 30), scene.snapshot()
    transfers.store(pages, range(30), names(30)).wait()
    transfers.finished()
    scene.wipe()
    wiped = scene.snapshot()
    torch.cuda._sleep(SLEEP_CYCLES // 4)
    running = transfers.load(pages[:10], range(10), names(10))
    waiting = transfers.load(pages[10:20], range(10, 20), names(10, 10))
    last = transfers.load(pages[20:], range(20, 30), names(10, 20))
    assert waiting.cancel(), "there is no room for it yet"
    assert not running.cancel()
    transfers.close()
    assert transfers.finished() == [running, waiting, last]
    assert running.result().cancelled and waiting.result().cancelled and last.result().ok
    assert scene.same(wiped, pages[10:20])
    assert scene.same(original, pages[20:])


LOST = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, torch
from scene import Scene, names
from kvferry.pipeline import Transfers
scene = Scene.make(device="cuda")
transfers = Transfers(scene.codec, scene.slots)
values = torch.zeros(4, device="cuda")
values[torch.tensor([1 << 20], device="cuda")] = 1  # out of bounds: the context is lost
jobs = [transfers.store(np.arange(8).reshape(4, 2), range(4), names(4)) for _ in range(20)]
jobs.append(transfers.load(np.arange(8).reshape(4, 2), range(4), names(4)))
transfers.wait(jobs)
assert all(job.result().error is not None and not job.result().ok for job in jobs)
assert len(transfers.finished()) == 21
transfers.close()
print("failed as it should", flush=True)
"""


@pytest.mark.timeout(180)
def test_an_error_of_the_stream_fails_jobs_and_hangs_none() -> None:
    script = LOST.format(paths=[path for path in sys.path if path])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150, check=False)
    assert "failed as it should" in done.stdout, done.stderr[-2000:]
