"""Blocks of KV cache that code swaps to host memory itself, compressed on the way: `CompressedSwapManager`.

A block that was swapped out compressed lies in the host buffer as a slot (docs/format.md) at the start of its own
block's memory: the buffer keeps its size, fewer bytes cross the wire. A block that does not fit its slot, or whose
coding fails, lies there as it is, and swapping in tells one from the other.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvferry.codecs.bounded import Bounded
from kvferry.codecs.slots import SLOT_STEP, SlotCodec, decode_from_slots
from kvferry.format.slot import HEADER_BYTES, SlotStatus, are_headers, read_headers
from kvferry.pages import PagedKV
from kvferry.pipeline import Settings, Transfers

logger = logging.getLogger(__name__)

IDENTITY = (0x6B76666572727973, 0x776170)
"""Of every slot: a block may be swapped in from another place, or by another process, than it was swapped out to."""
_SLOT_PART = 0.8
"""Of a block's bytes, what its slot takes: what does not shrink by a fifth is not worth coding."""
_MOST_PAIRS = 512
# A manager meets as many pairs of caches as the model has layers, each with rings of its own.
_SIZES = Settings(ring_bytes=4 << 20, first_bite_bytes=1 << 20, bite_bytes=4 << 20, table_bytes=1 << 18)


@dataclass
class SwapCounters:
    """Blocks swapped out and in, compressed and as they are, and calls that fell back because something failed."""

    compressed_out: int = 0
    plain_out: int = 0
    compressed_in: int = 0
    plain_in: int = 0
    failures: int = 0
    raw_bytes_out: int = 0
    encoded_bytes_out: int = 0


@dataclass(eq=False)
class CompressedSwapManager:
    """Swaps blocks between a GPU cache and a host cache of the same shape and dtype, whose first dimension is blocks.

    Caches `[blocks, heads, tokens, K|V]`, `[blocks, 2, tokens, heads, channels]` and `[blocks, tokens, channels]` of
    bfloat16, float16 or float32 are compressed within `error_bound` (times the range of each tile, if
    `use_relative_error`); anything else, and whatever fails, is copied as it is. The host cache is dense, and pinned
    where the other is on a GPU. Both methods return when the blocks have arrived. Safe to share between threads.
    """

    enable_compression: bool = True
    error_bound: float = 1e-4
    use_relative_error: bool = True
    encoding_mode: str = "plain"
    device_id: int = 0
    counters: SwapCounters = field(default_factory=SwapCounters)

    def __post_init__(self) -> None:
        relative_to = "tile" if self.use_relative_error else "tensor"
        # Raises for a bound or mode that cannot be.
        self._codec = Bounded(self.error_bound, self.use_relative_error, relative_to, self.encoding_mode)
        self._pairs: OrderedDict[tuple[Any, ...], Transfers | None] = OrderedDict()
        self._lock = threading.RLock()
        self._said: set[str] = set()

    def swap_out_blocks_to_host_compressed(
        self, src_cache: Tensor, dst_cache: Tensor, src_block_indices: Tensor, dst_block_indices: Tensor
    ) -> None:
        """Copy blocks `src_block_indices` of `src_cache` to `dst_block_indices` of `dst_cache`, in host memory."""
        src, dst = _indices(src_block_indices), _indices(dst_block_indices)
        plain = self._attempt(lambda: self._store(src_cache, dst_cache, src, dst), len(src))
        if len(plain):
            _copy_out(src_cache, dst_cache, src[plain], dst[plain])
            self.counters.plain_out += len(plain)

    def swap_in_blocks_from_host_compressed(
        self, src_cache: Tensor, dst_cache: Tensor, src_block_indices: Tensor, dst_block_indices: Tensor
    ) -> None:
        """Copy blocks `src_block_indices` of `src_cache`, in host memory, to `dst_block_indices` of `dst_cache`.

        Raises `ValueError` for a block that was stored compressed and is damaged: its bytes are no values.
        """
        src, dst = _indices(src_block_indices), _indices(dst_block_indices)
        with self._lock:
            compressed = _are_slots(src_cache, src)
            if compressed.any():
                self._load(src_cache, dst_cache, src[compressed], dst[compressed])
                self.counters.compressed_in += int(np.count_nonzero(compressed))
        plain = ~compressed
        if plain.any():
            _copy_in(src_cache, dst_cache, src[plain], dst[plain])
            self.counters.plain_in += int(np.count_nonzero(plain))

    def close(self) -> None:
        """Let go of all device memory. The manager can be used on."""
        with self._lock:
            while self._pairs:
                _, transfers = self._pairs.popitem()
                if transfers is not None:
                    transfers.close()

    def _attempt(self, call: Callable[[], np.ndarray], blocks: int) -> np.ndarray:
        """Indices of the blocks that are still to be copied as they are: all, if `call` fails."""
        with self._lock:
            if not self.enable_compression or not blocks:
                return np.arange(blocks)
            try:
                return call()
            except Exception as error:
                self._failed(error)
                return np.arange(blocks)

    def _failed(self, error: Exception) -> None:
        self.counters.failures += 1
        if type(error).__name__ not in self._said:
            self._said.add(type(error).__name__)
            logger.warning("kvferry: swapping compressed failed, blocks are copied as they are: %r", error)

    def _store(self, cache: Tensor, host: Tensor, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
        transfers = self._transfers(cache, host)
        if transfers is None:
            return np.arange(len(src))
        job = transfers.store(src[:, None], dst, _identities(len(src)))
        job.wait()
        transfers.finished()
        result = job.result()
        if result.error is not None:
            raise result.error
        failed = np.array(result.failed_chunks, dtype=np.int64)
        self.counters.compressed_out += len(src) - len(failed)
        self.counters.raw_bytes_out += result.raw_bytes
        self.counters.encoded_bytes_out += result.encoded_bytes
        return failed

    def _load(self, host: Tensor, cache: Tensor, src: np.ndarray, dst: np.ndarray) -> None:
        try:
            transfers = self._transfers(cache, host)
            if transfers is None:
                raise ValueError("these caches are of no layout that can be decoded in place")
            job = transfers.load(dst[:, None], src, _identities(len(src)))
            job.wait()
            transfers.finished()
            result = job.result()
            if result.error is not None:
                raise result.error
            failed = result.failed_chunks
        except Exception as error:
            self._failed(error)
            failed = self._load_in_host_memory(host, cache, src, dst)
        if failed:
            damaged = [int(src[chunk]) for chunk in failed]
            raise ValueError(f"blocks {damaged} of the host cache are damaged: compute them again")

    def _load_in_host_memory(self, host: Tensor, cache: Tensor, src: np.ndarray, dst: np.ndarray) -> tuple[int, ...]:
        """Decode without the GPU, and copy. The blocks that are damaged, by index in `src`."""
        blocks = host[torch.from_numpy(src)]
        decoded = torch.zeros_like(blocks)
        kv = _paged(decoded)
        if kv is None:
            raise ValueError(f"the host cache is {tuple(host.shape)}, which was never swapped out compressed")
        slots = _bytes_of(blocks)
        slots = slots[:, : _slot_bytes(slots)].contiguous()
        order = torch.arange(len(src), dtype=torch.int32)
        names = torch.from_numpy(_identities(len(src)).astype(np.int64))
        statuses = decode_from_slots(kv, self._codec, slots, order, order[:, None].contiguous(), names)
        good = statuses == SlotStatus.GOOD
        cache[torch.from_numpy(dst)[good].to(cache.device)] = decoded[good].to(cache.device)
        return tuple((~good).nonzero()[:, 0].tolist())

    def _transfers(self, cache: Tensor, host: Tensor) -> Transfers | None:
        """The pipeline between two caches; None where there can be none. Kept for the next call."""
        key = (cache.data_ptr(), cache.shape, cache.stride(), cache.dtype, host.data_ptr(), host.shape, host.stride())
        if key in self._pairs:
            self._pairs.move_to_end(key)
            return self._pairs[key]
        if len(self._pairs) >= _MOST_PAIRS:
            _, oldest = self._pairs.popitem(last=False)
            if oldest is not None:
                oldest.close()
        made = None
        try:
            made = self._make(cache, host)
        finally:
            self._pairs[key] = made
        return made

    def _make(self, cache: Tensor, host: Tensor) -> Transfers | None:
        if not host.is_contiguous() or host.device.type != "cpu" or host.dtype != cache.dtype:
            return None
        if host.shape[1:] != cache.shape[1:] or cache.dtype not in Bounded.dtypes:
            return None
        kv = _paged(cache)
        if kv is None:
            return None
        blocks = _bytes_of(host)
        slot_bytes = _slot_bytes(blocks)
        codec = SlotCodec(kv, self._codec, 1, slot_bytes, on_overflow="reject")
        return Transfers(codec, blocks[:, :slot_bytes], settings=_SIZES)


def _paged(cache: Tensor) -> PagedKV | None:
    """A cache's blocks as pages, if it is of a layout that is known."""
    if cache.dim() == 4 and cache.shape[3] % 2 == 0:
        return PagedKV.heads_first([cache], cache.shape[3] // 2)
    if cache.dim() == 5 and cache.shape[1] == 2:
        return PagedKV.kv_second([cache])
    return PagedKV.heads_only([cache.unsqueeze(1)]) if cache.dim() == 3 else None


def _bytes_of(blocks: Tensor) -> Tensor:
    """uint8 `[blocks, block_bytes]`."""
    return blocks.view(torch.uint8).view(len(blocks), -1)


def _slot_bytes(blocks: Tensor) -> int:
    return int(blocks.shape[1] * _SLOT_PART) // SLOT_STEP * SLOT_STEP


def _are_slots(host: Tensor, blocks: np.ndarray) -> np.ndarray:
    """Which of these blocks were stored compressed, bool `[blocks]`."""
    none = np.zeros(len(blocks), dtype=np.bool_)
    if not len(blocks) or not host.is_contiguous() or host.device.type != "cpu":
        return none
    data = _bytes_of(host)
    if data.shape[1] < HEADER_BYTES:
        return none
    records = read_headers(data[torch.from_numpy(blocks), :HEADER_BYTES].numpy())
    return np.asarray(are_headers(records) & (records["identity"] == _identities(len(blocks))).all(axis=1))


def _indices(given: Tensor) -> np.ndarray:
    return np.asarray(given.detach().cpu(), dtype=np.int64)


def _identities(count: int) -> np.ndarray:
    return np.tile(np.array(IDENTITY, dtype=np.uint64), (count, 1))


def _copy_out(cache: Tensor, host: Tensor, src: np.ndarray, dst: np.ndarray) -> None:
    host[torch.from_numpy(dst)] = cache[torch.from_numpy(src).to(cache.device)].cpu()


def _copy_in(host: Tensor, cache: Tensor, src: np.ndarray, dst: np.ndarray) -> None:
    cache[torch.from_numpy(dst).to(cache.device)] = host[torch.from_numpy(src)].to(cache.device)


_manager: CompressedSwapManager | None = None


def initialize_compressed_swap(
    enable_compression: bool,
    error_bound: float = 1e-4,
    use_relative_error: bool = True,
    encoding_mode: str = "plain",
    device_id: int = 0,
) -> CompressedSwapManager:
    """Make the process's manager, in place of one that was made before. Without `enable_compression` it copies blocks
    as they are. Raises `ValueError` for a bound or mode that cannot be."""
    global _manager
    if _manager is not None:
        _manager.close()
    _manager = CompressedSwapManager(enable_compression, error_bound, use_relative_error, encoding_mode, device_id)
    return _manager


def get_compressed_swap_manager() -> CompressedSwapManager | None:
    """The process's manager; None before `initialize_compressed_swap`."""
    return _manager


def install_on_platform(platform: Any = None) -> Callable[[], None]:
    """Let vLLM's platform class (default: the current platform's) swap through the process's manager, and return what
    undoes it.

    vLLM calls these two methods for NIXL connectors with `kv_buffer_device="cpu"` alone. **The peer must do the same**,
    with a kvferry of the same version: what NIXL carries are compressed blocks, which a vLLM without this takes for
    values. Raises `RuntimeError` before `initialize_compressed_swap`.
    """
    manager = _manager
    if manager is None:
        raise RuntimeError("there is no swap manager: call initialize_compressed_swap(True) first")
    if platform is None:
        from vllm.platforms import current_platform

        platform = type(current_platform)
    names = ("swap_out_blocks_to_host", "insert_blocks_to_device")
    before = {name: platform.__dict__.get(name) for name in names}
    platform.swap_out_blocks_to_host = staticmethod(manager.swap_out_blocks_to_host_compressed)
    platform.insert_blocks_to_device = staticmethod(manager.swap_in_blocks_from_host_compressed)

    def undo() -> None:
        for name, method in before.items():
            if method is None:
                delattr(platform, name)
            else:
                setattr(platform, name, method)

    return undo
