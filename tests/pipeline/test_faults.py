"""What goes wrong on the way fails the job that it happens to, and no other."""

import numpy as np
import pytest
import torch
from scene import Scene, chunk_pages, names
from simulated import SimulatedMachine
from test_orders import open_transfers

import kvferry
from kvferry.codecs import slots_reference
from kvferry.errors import OutOfDeviceMemory
from kvferry.pipeline import Settings, Transfers


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direction", ["store", "load"])
@pytest.mark.parametrize("fault", ["coder", "copy"])
def test_a_launch_that_fails_half_way(seed: int, direction: str, fault: str) -> None:
    scene, machine = Scene.make(seed=seed), SimulatedMachine(seed)
    transfers, codec = open_transfers(machine, scene, rows=64)
    pages, original = chunk_pages(np.random.default_rng(seed), 30), scene.snapshot()
    slots = np.arange(30)
    slots[10:20] = slots[10:20][::-1]  # a copy for each: it may fail between two of them
    transfers.store(pages, slots, names(30)).wait()
    transfers.finished()
    scene.wipe()
    if direction == "store":
        for layer, values in zip(scene.layers, original, strict=True):
            layer.copy_(values)
        scene.slots.zero_()
    submit, waits = getattr(transfers, direction), machine.host_waits
    first = submit(pages[:10], range(10), names(10))
    if fault == "coder":
        codec.fail_in = seed % 4
    else:
        machine.fail_copy_in = seed % 4
    queued = machine.pending()
    broken = submit(pages[10:20], slots[10:20], names(10, 10))
    of_broken = machine.pending() - queued
    last = submit(pages[20:], range(20, 30), names(10, 20))
    assert machine.host_waits == waits
    transfers.wait([broken])
    assert isinstance(broken.result().error, RuntimeError)
    assert "refused" in str(broken.result().error)
    assert not broken.result().ok
    # A failed job has come to rest too: what it used may be used again.
    assert not of_broken & machine.pending()
    settled = (scene.slots[10:20].clone(), [layer[pages[10:20].reshape(-1)].clone() for layer in scene.layers])
    transfers.wait([first, last])
    assert torch.equal(scene.slots[10:20], settled[0])
    for layer, values in zip(scene.layers, settled[1], strict=True):
        assert torch.equal(layer[pages[10:20].reshape(-1)].view(torch.int16), values.view(torch.int16))
    assert first.result().ok and last.result().ok
    assert transfers.finished() == [first, broken, last]
    if direction == "store":
        again = transfers.store(pages[10:20], slots[10:20], names(10, 10))
        again.wait()
        assert again.result().ok
        scene.wipe()
        transfers.load(pages, slots, names(30)).wait()
        assert scene.same(original, pages)
    else:
        assert scene.same(original, np.concatenate([pages[:10], pages[20:]]))


def test_a_failed_load_is_not_over_before_its_last_copy():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene)
    coder = transfers._load_lane._coder
    machine.favourites = ("caller", coder.name)  # type: ignore[attr-defined]
    machine.fail_copy_in = 1  # after half of the first bite
    job = transfers.load(chunk_pages(np.random.default_rng(0), 3), [5, 9, 7], names(3))
    job.wait()
    assert "refused" in str(job.result().error)
    assert not machine.pending()


def test_a_device_that_is_lost_fails_every_job_but_hangs_none():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene, rows=16, jobs_in_flight=2)
    pages = chunk_pages(np.random.default_rng(0), 30)
    jobs = [transfers.store(pages[i : i + 10], range(i, i + 10), names(10, i)) for i in (0, 10, 20)]
    machine.lost = True
    jobs.append(transfers.load(pages[:2], [0, 1], names(2)))
    transfers.wait(jobs)
    assert all("CUDA error" in str(job.result().error) for job in jobs)
    assert transfers.finished() == jobs
    transfers.close()


def test_an_error_of_waiting_is_the_jobs():
    scene, machine = Scene.make(), SimulatedMachine()
    transfers, _ = open_transfers(machine, scene)
    job = transfers.store(chunk_pages(np.random.default_rng(0), 4), range(4), names(4))
    step, calls = machine.step, []

    def fail_once() -> bool:
        if not calls:
            calls.append(1)
            raise RuntimeError("CUDA error: launch timed out")
        return step()

    machine.step = fail_once  # type: ignore[method-assign]
    job.wait()
    assert "timed out" in str(job.result().error)


def test_no_device_memory_for_the_ring_says_what_to_do():
    class FullMachine(SimulatedMachine):
        def device_memory(self, num_bytes: int, purpose: str) -> torch.Tensor:
            if num_bytes > 1 << 20:
                raise OutOfDeviceMemory(f"{purpose} takes {num_bytes} bytes")
            return super().device_memory(num_bytes, purpose)

    scene = Scene.make()
    with pytest.raises(OutOfDeviceMemory, match=r"staging ring \(ring_bytes\)"):
        open_transfers(FullMachine(), scene, ring_slots=400)
    transfers, _ = open_transfers(FullMachine(), scene)  # a smaller one fits
    transfers.close()


def test_a_ring_below_one_slot_is_refused():
    scene = Scene.make()
    with pytest.raises(ValueError, match=rf"ring_bytes=100 holds no slot of {scene.codec.slot_bytes} bytes"):
        Transfers(scene.codec, scene.slots, machine=SimulatedMachine(), ring_bytes=100)


def test_a_coder_that_fails_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    scene = Scene.make(kvferry.Lossless())
    transfers = Transfers(scene.codec, scene.slots)
    pages = np.arange(8).reshape(4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(slots_reference, "encode", lambda *arguments: (_ for _ in ()).throw(MemoryError("no memory")))
        job = transfers.store(pages, range(4), names(4))
    assert job.done() and not job.result().ok
    assert isinstance(job.result().error, MemoryError)
    good = transfers.store(pages, range(4), names(4))
    assert good.result().ok
    assert transfers.finished() == [job, good]


def test_an_interrupt_leaves_no_job_in_limbo(monkeypatch: pytest.MonkeyPatch):
    scene = Scene.make()
    transfers = Transfers(scene.codec, scene.slots, settings=Settings(table_bytes=1))
    pages = np.arange(32).reshape(16, 2)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(slots_reference, "encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            transfers.store(pages, range(16), names(16))
    (job,) = transfers.finished()
    assert job.result().cancelled
    assert transfers.store(pages, range(16), names(16)).result().ok
