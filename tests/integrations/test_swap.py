"""Blocks swapped to host memory and back through the swap manager: within the bound, or as they are."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvferry.codecs.slots import SlotCodec
from kvferry.format.slot import HEADER_BYTES, MAGIC
from kvferry.integrations import swap
from kvferry.integrations.swap import (
    CompressedSwapManager,
    get_compressed_swap_manager,
    initialize_compressed_swap,
    install_on_platform,
)
from kvferry.pipeline import Transfers

OUT, HOST = torch.tensor([5, 1, 3]), torch.tensor([0, 2, 7])


@pytest.fixture(autouse=True)
def no_manager_stays() -> Iterator[None]:
    yield
    if swap._manager is not None:
        swap._manager.close()
    swap._manager = None


def smooth(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (noise * 0.01 + torch.linspace(-1, 1, shape[-1])).to(dtype)


def round_trip(manager: CompressedSwapManager, cache: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that were swapped out, and what came back."""
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(cache, host, OUT, HOST)
    manager.swap_in_blocks_from_host_compressed(host, back, HOST, OUT)
    return cache[OUT], back[OUT]


@pytest.mark.parametrize(
    "shape",
    [(8, 2, 16, 64), (8, 2, 16, 2, 32), (8, 16, 96)],
    ids=["K and V side by side", "K before V", "latent"],
)
@pytest.mark.parametrize("mode", ["plain", "fixed"])
def test_blocks_come_back_within_the_bound(shape: tuple[int, ...], mode: str) -> None:
    manager = CompressedSwapManager(error_bound=1e-2, encoding_mode=mode)
    sent, back = round_trip(manager, smooth(shape))
    error = (sent.float() - back.float()).abs().max()
    assert 0 < error <= 1e-2 * (sent.float().max() - sent.float().min())
    found = manager.counters
    assert (found.compressed_out, found.compressed_in, found.plain_out, found.plain_in) == (3, 3, 0, 0)
    assert found.raw_bytes_out > 1.25 * found.encoded_bytes_out


def test_what_does_not_shrink_is_copied() -> None:
    manager = CompressedSwapManager(error_bound=1e-7)
    sent, back = round_trip(manager, torch.randn(8, 2, 16, 64).to(torch.float16))
    assert torch.equal(sent, back)
    assert manager.counters.plain_out == manager.counters.plain_in == 3


def test_blocks_of_both_kinds() -> None:
    cache = smooth((8, 2, 16, 64), torch.float16)
    cache[1] = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(2)).mul(2000).to(torch.float16)
    manager = CompressedSwapManager(error_bound=1e-2, use_relative_error=False)
    sent, back = round_trip(manager, cache)
    assert (manager.counters.compressed_out, manager.counters.plain_out) == (2, 1)
    assert (manager.counters.compressed_in, manager.counters.plain_in) == (2, 1)
    assert torch.equal(sent[1], back[1])
    assert (sent.float() - back.float()).abs().max() <= 1e-2


@pytest.mark.parametrize(
    "cache",
    [torch.arange(8 * 16 * 8, dtype=torch.int32).view(8, 16, 8), smooth((8, 6, 10)), torch.randn(8, 12)],
    ids=["other values", "six tokens", "two dimensions"],
)
def test_unknown_caches_are_copied(cache: Tensor) -> None:
    manager = CompressedSwapManager()
    sent, back = round_trip(manager, cache)
    assert torch.equal(sent, back)
    assert manager.counters.compressed_out == 0


def test_compression_is_switched_off() -> None:
    manager = CompressedSwapManager(enable_compression=False)
    sent, back = round_trip(manager, smooth((8, 2, 16, 64)))
    assert torch.equal(sent, back)


def test_coding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a kernel that does not work")

    monkeypatch.setattr(SlotCodec, "encode", fail)
    manager = CompressedSwapManager(error_bound=1e-2)
    sent, back = round_trip(manager, smooth((8, 2, 16, 64)))
    assert torch.equal(sent, back)
    assert manager.counters.failures == 1


def test_decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache is, that is: the blocks are decoded in host memory."""
    manager = CompressedSwapManager(error_bound=1e-2)
    cache = smooth((8, 2, 16, 64))
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    manager.swap_out_blocks_to_host_compressed(cache, host, OUT, HOST)

    def fail(*_: Any) -> None:
        raise RuntimeError("a kernel that does not work")

    monkeypatch.setattr(Transfers, "load", fail)
    manager.swap_in_blocks_from_host_compressed(host, back, HOST, OUT)
    assert (cache[OUT].float() - back[OUT].float()).abs().max() <= 1e-2 * 2.2
    assert manager.counters.failures == 1


def test_damaged_blocks_are_refused() -> None:
    cache = smooth((8, 2, 16, 64))
    host = torch.zeros_like(cache)
    manager = CompressedSwapManager(error_bound=1e-2)
    manager.swap_out_blocks_to_host_compressed(cache, host, OUT, HOST)
    data = host.view(torch.uint8).view(8, -1)
    assert bytes(data[2, :4].tolist()) == MAGIC
    data[2, HEADER_BYTES + 100] ^= 0xFF
    with pytest.raises(ValueError, match=r"blocks \[2\] of the host cache are damaged"):
        manager.swap_in_blocks_from_host_compressed(host, cache, HOST, OUT)


def test_another_manager_reads_them() -> None:
    cache, back = smooth((8, 2, 16, 64)), torch.zeros(8, 2, 16, 64, dtype=torch.bfloat16)
    host = torch.zeros_like(cache)
    CompressedSwapManager(error_bound=1e-2).swap_out_blocks_to_host_compressed(cache, host, OUT, HOST)
    moved = host.roll(1, 0)  # as a peer gets them: elsewhere
    other = CompressedSwapManager(error_bound=1e-2)
    other.swap_in_blocks_from_host_compressed(moved, back, HOST.add(1).remainder(8), OUT)
    assert other.counters.compressed_in == 3
    assert (cache[OUT].float() - back[OUT].float()).abs().max() <= 1e-2 * 2.2


def test_threads_share_a_manager() -> None:
    manager = CompressedSwapManager(error_bound=1e-2)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(round_trip(manager, smooth((8, 2, 16, 64))))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all((a.float() - b.float()).abs().max() <= 1e-2 * 2.2 for a, b in found)


def test_the_process_has_one_manager() -> None:
    assert get_compressed_swap_manager() is None
    with pytest.raises(RuntimeError, match="initialize_compressed_swap"):
        install_on_platform(object)
    manager = initialize_compressed_swap(True, error_bound=1e-3)
    assert get_compressed_swap_manager() is manager
    assert (manager.encoding_mode, manager.use_relative_error, manager.device_id) == ("plain", True, 0)
    with pytest.raises(ValueError, match="error_bound"):
        initialize_compressed_swap(True, error_bound=-1.0)


def test_it_is_installed_on_a_platform_and_taken_off() -> None:
    class Base:
        @classmethod
        def insert_blocks_to_device(cls, *_: Any) -> str:
            return "inherited"

    class Platform(Base):
        @classmethod
        def swap_out_blocks_to_host(cls, *_: Any) -> str:
            return "own"

    manager = initialize_compressed_swap(True, error_bound=1e-2)
    undo = install_on_platform(Platform)
    cache = smooth((8, 2, 16, 64))
    host, back = torch.zeros_like(cache), torch.zeros_like(cache)
    Platform.swap_out_blocks_to_host(cache, host, OUT, HOST)
    Platform.insert_blocks_to_device(host, back, HOST, OUT)
    assert manager.counters.compressed_in == 3
    undo()
    assert Platform.swap_out_blocks_to_host() == "own"
    assert Platform.insert_blocks_to_device() == "inherited"
