"""`PinnedPool`: who gets memory when; with made-up events on the CPU, and (`gpu`) with copies under way."""

import gc
import mmap
import tempfile
import threading

import pytest
import torch
from fake_cuda import Event

from kvferry.device import MemoryKind, PinnedPool, cuda_copy_, driver, memory_kind, recorded
from kvferry.errors import KVFerryError, OutOfHostMemory

KIB = 1024


def on_gpu(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


@pytest.fixture
def pool():
    with PinnedPool(16 * KIB, device="cpu") as made:
        yield made
        made.check_integrity()


def test_blocks_are_aligned_and_apart(pool):
    blocks = [pool.allocate(size) for size in (1, 511, 512, 513, 4000)]
    for number, block in enumerate(blocks):
        assert block.tensor.data_ptr() % 512 == 0
        assert block.tensor.dtype is torch.uint8
        block.tensor.fill_(number)
    assert [block.num_bytes for block in blocks] == [1, 511, 512, 513, 4000]
    for number, block in enumerate(blocks):
        assert block.tensor.eq(number).all()
    usage = pool.usage()
    assert usage.in_use == usage.peak == 512 * 3 + 1024 + 4096
    assert usage.blocks_in_use == 5
    assert usage.free == usage.largest_free == usage.capacity - usage.in_use
    assert not usage.page_locked


@pytest.mark.parametrize("alignment", [512, 4096, 1 << 16])
def test_alignment_can_be_larger(alignment):
    with PinnedPool(100, device="cpu", alignment=alignment) as pool:
        assert pool.capacity == alignment
        assert pool.allocate(1).tensor.data_ptr() % alignment == 0


def test_memory_comes_back_only_after_the_event(pool):
    block = pool.allocate(16 * KIB)
    event = Event()
    block.free(after=event)
    usage = pool.usage()
    assert (usage.in_use, usage.pending, usage.free, usage.blocks_pending) == (0, 16 * KIB, 0, 1)
    with pytest.raises(OutOfHostMemory):
        pool.allocate(1)
    assert not event.waited
    event.done = True
    assert pool.allocate(16 * KIB).tensor.numel() == 16 * KIB
    assert pool.usage().pending == 0


def test_a_slow_event_holds_up_only_its_own_blocks(pool):
    slow, fast = Event(), Event()
    first, second = pool.allocate(8 * KIB), pool.allocate(8 * KIB)
    first.free(after=slow)
    second.free(after=fast)
    fast.done = True
    again = pool.allocate(8 * KIB)
    assert again.offset == 8 * KIB
    assert pool.usage().blocks_pending == 1


def test_events_that_are_done_and_none_free_at_once(pool):
    for after in (None, Event(done=True)):
        pool.allocate(16 * KIB).free(after)
        assert pool.usage().free == 16 * KIB


def test_out_of_memory_says_what_there_is(pool):
    blocks = [pool.allocate(2 * KIB) for _ in range(8)]
    blocks[0].free()
    blocks[2].free()
    blocks[4].free(after=Event())
    message = (
        r"wanted 2049 bytes \(2560 with alignment\), but of 16384 bytes 4096 are free, the largest free range has "
        "2048, and 2048 wait for copies to end: free blocks"
    )
    with pytest.raises(OutOfHostMemory, match=message):
        pool.allocate(2049)
    assert pool.usage().largest_free == 2048
    blocks[1].free()
    assert pool.usage().largest_free == 6 * KIB
    assert pool.allocate(6 * KIB).offset == 0


def test_wrong_use_is_an_error(pool):
    block = pool.allocate(10)
    block.free()
    with pytest.raises(ValueError, match="freed"):
        block.free()
    with pytest.raises(ValueError, match="freed"):
        block.tensor  # noqa: B018
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"num_bytes is {size}"):
            pool.allocate(size)
        with pytest.raises(ValueError, match=f"num_bytes is {size}"):
            PinnedPool(size, device="cpu")
    for alignment in (0, 256, 768):
        with pytest.raises(ValueError, match="power of two"):
            PinnedPool(10, device="cpu", alignment=alignment)
    with pytest.raises(ValueError, match="'meta' page-locks no memory"):
        PinnedPool(10, device="meta")
    with pytest.raises(OutOfHostMemory, match="ask for less"):
        PinnedPool(1 << 62, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_cuda_the_pool_is_plain_memory():
    with PinnedPool(KIB) as pool:
        assert not pool.usage().page_locked
    with pytest.raises(ValueError, match="cuda:0"):
        PinnedPool(KIB, device="cuda:0")


def test_closing(pool):
    block, pending = pool.allocate(KIB), pool.allocate(KIB)
    event = Event()
    tensor = block.tensor
    pending.free(after=event)
    pool.close()
    assert event.waited
    pool.close()
    block.free()
    tensor.fill_(3)
    assert tensor.eq(3).all()
    for call in (lambda: pool.allocate(1), lambda: pool.register(torch.zeros(8))):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_registered_memory_is_the_callers(pool):
    mine = torch.zeros(KIB)
    assert pool.register(mine) is mine
    assert pool.usage().registered == mine.nbytes
    with pytest.raises(ValueError, match="already"):
        pool.register(mine)
    pool.unregister(mine)
    assert pool.usage().registered == 0
    with pytest.raises(ValueError, match="not registered"):
        pool.unregister(mine)
    for wrong in (torch.zeros(4, 4).t(), torch.zeros(0), torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match="only dense CPU tensors"):
            pool.register(wrong)


def test_integrity_is_checked(pool):
    pool.allocate(KIB)
    pool._in_use[0] = 512
    with pytest.raises(KVFerryError, match="pool"):
        pool.check_integrity()
    pool._in_use_bytes = 512
    with pytest.raises(KVFerryError, match="follow a range that ends at 512"):
        pool.check_integrity()
    pool._in_use[0] = pool._in_use_bytes = KIB


def test_threads_share_a_pool():
    pool = PinnedPool(64 * KIB, device="cpu")
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        held, events = [], []
        for step in range(150):
            for event in events:
                event.done = True
            try:
                block = pool.allocate(int(torch.randint(1, 9000, (1,), generator=generator)))
                block.tensor.fill_(seed)
                held.append(block)
            except OutOfHostMemory:
                pass
            if len(held) > 3 or step % 2:
                if not held:
                    continue
                block = held.pop(0)
                if not block.tensor.eq(seed).all():
                    failures.append(seed)
                events.append(Event())
                block.free(after=events[-1])
            pool.check_integrity()
        for event in events:
            event.done = True
        for block in held:
            block.free()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    usage = pool.usage()
    assert usage.in_use == usage.pending == 0
    assert usage.free == usage.largest_free == 64 * KIB
    assert 0 < usage.peak <= 64 * KIB


def test_what_it_asks_of_cuda(monkeypatch):
    """Page-locked once at the start and unlocked once, after waiting for the device; and if nobody closes the pool."""
    from contextlib import nullcontext

    calls = []
    monkeypatch.setattr(driver, "is_cuda_memcpy_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(driver, "on_device", lambda device: nullcontext())
    monkeypatch.setattr(driver, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(driver, "register_host", lambda address, size: calls.append(("lock", size)))
    monkeypatch.setattr(driver, "unregister_host", lambda address: calls.append("unlock"))
    pool = PinnedPool(5000)
    pool.allocate(100).free()
    assert pool.usage().page_locked
    mine = pool.register(torch.zeros(10))
    assert calls == [("lock", 5120), ("lock", 40)]
    pool.unregister(mine)
    assert calls[2:] == ["wait", "unlock"]
    pool.register(mine)
    pool.close()
    assert calls[5:] == ["wait", "unlock", "unlock"]
    del calls[:]
    forgotten = PinnedPool(512)
    view = forgotten.allocate(8).tensor
    del forgotten
    gc.collect()
    assert calls == [("lock", 512), "wait", "unlock"]
    view.fill_(1)


# -- a GPU ------------------------------------------------------------------------------------------------------------

SLEEP_CYCLES = 400_000_000  # some 0.2 s


@on_gpu
def test_gpu_pool_is_page_locked_and_exact():
    size = (48 << 20) + 512
    with PinnedPool(size) as pool:
        assert pool.capacity == size
        assert pool.usage().page_locked
        whole = pool.allocate(size).tensor
        assert memory_kind(whole) is MemoryKind.PINNED
        assert whole.is_pinned()
        there = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        cuda_copy_(whole, there, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(whole, there.cpu())
    assert memory_kind(whole) is MemoryKind.PAGEABLE
    assert torch.equal(whole, there.cpu())


@on_gpu
@pytest.mark.parametrize("by", ["event", "stream"])
def test_gpu_memory_is_reused_only_after_the_copy(by):
    size, stream = 1 << 20, torch.cuda.Stream()
    there = torch.zeros(size, dtype=torch.uint8, device="cuda")
    with PinnedPool(size) as pool:
        block = pool.allocate(size)
        block.tensor.fill_(7)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
            cuda_copy_(there, block.tensor, True, stream)
            block.free(after=recorded(stream) if by == "event" else stream)
            with pytest.raises(OutOfHostMemory, match=f"{size} wait for copies"):
                pool.allocate(size)
            assert not stream.query()  # it did not wait
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
        again = pool.allocate(size)
        again.tensor.fill_(9)
        assert bool((there == 7).all())
        again.free()


@on_gpu
def test_gpu_close_waits_for_copies_of_blocks_in_use():
    size, stream = 1 << 20, torch.cuda.Stream()
    there = torch.full((size,), 5, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    pool = PinnedPool(size)
    block = pool.allocate(size)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
    cuda_copy_(block.tensor, there, True, stream)
    tensor = block.tensor
    pool.close()
    assert tensor.eq(5).all()


@on_gpu
def test_gpu_an_event_that_was_never_recorded_is_refused():
    with PinnedPool(KIB) as pool:
        block = pool.allocate(KIB)
        with pytest.raises(ValueError, match="never recorded"):
            block.free(after=torch.cuda.Event())
        block.free()


@on_gpu
def test_gpu_registered_memory():
    # As engines share memory between processes: a file that lies in memory (drivers refuse files on a disk).
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(8 * mmap.PAGESIZE)
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    shared = torch.zeros(1 << 20, dtype=torch.uint8).share_memory_()
    there = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8, device="cuda")
    with PinnedPool(KIB) as pool:
        for memory in (mapped, shared):
            pool.register(memory)
            assert memory_kind(memory) is MemoryKind.PINNED
            with pytest.raises(ValueError, match="already"):
                pool.register(memory)
            cuda_copy_(memory, there[: memory.numel()], non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(memory, there[: memory.numel()].cpu())
        with pytest.raises(driver.CudaError, match=r"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"), driver.on_device(0):
            driver.register_host(shared.data_ptr(), shared.nbytes)
        pool.unregister(shared)
        assert memory_kind(shared) is MemoryKind.PAGEABLE
    assert memory_kind(mapped) is MemoryKind.PAGEABLE


@on_gpu
def test_gpu_a_kernel_reads_the_pool_at_the_hosts_address():
    """What a fused pipeline needs: one address for both."""
    with PinnedPool(4096) as pool:
        block = pool.allocate(4096)
        with driver.on_device(0):
            attribute = driver.driver().CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
            status, address = driver.driver().cuPointerGetAttribute(attribute, block.tensor.data_ptr())
        assert not status
        assert int(address) == block.tensor.data_ptr()
