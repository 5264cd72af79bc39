"""`HostStore`: encoded KV cache in host memory, by the caller's key, within a byte budget.

It holds bytes that somebody encoded (frames) and gives them back; it does not look into them. `put_cache` and
`restore_cache` are the convenience for transformers users and import that integration only when called.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from kvferry.errors import CorruptFrame, KVFerryError, OutOfHostMemory

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from kvferry.integrations.transformers import CodecChoice


@dataclass(frozen=True)
class Entry:
    """What one key holds. Immutable, so it stays valid in the caller's hands when the store evicts the key.

    `frames` are the encoded byte strings in the order they were put, `raw_bytes` what they held before encoding, and
    `metadata` the caller's small description of them; it is kept by reference and must not be changed.
    """

    frames: tuple[bytes, ...]
    raw_bytes: int
    metadata: object = None

    @property
    def encoded_bytes(self) -> int:
        """Bytes of all frames: what the entry costs in the store."""
        return sum(len(frame) for frame in self.frames)

    @property
    def ratio(self) -> float:
        """Raw bytes over encoded bytes; 1.0 for an entry without bytes."""
        return self.raw_bytes / self.encoded_bytes if self.encoded_bytes else 1.0


@dataclass(frozen=True)
class StoreStats:
    """A snapshot. Bytes and entries are as of now, the other counts since the store was made."""

    entries: int
    used_bytes: int  # of frames, counted as held
    raw_bytes: int  # what the frames held before encoding
    capacity_bytes: int
    pinned_entries: int
    pinned_bytes: int
    hits: int
    misses: int
    stores: int
    evictions: int
    rejected: int  # puts that did not fit
    corrupt: int  # restores that found an unreadable frame

    @property
    def ratio(self) -> float:
        """Raw bytes over encoded bytes of everything held; 1.0 for an empty store."""
        return self.raw_bytes / self.used_bytes if self.used_bytes else 1.0


@dataclass
class _Slot:
    """An entry and the store's own notes on it."""

    entry: Entry
    digests: tuple[int, ...]
    num_bytes: int
    last_used: int
    pins: int = 0


@dataclass
class _Counters:
    hits: int = 0
    misses: int = 0
    stores: int = 0
    evictions: int = 0
    rejected: int = 0
    corrupt: int = 0


@dataclass
class _State:
    """Everything the lock guards. `slots` runs from the least to the most recently used."""

    slots: OrderedDict[Hashable, _Slot] = field(default_factory=OrderedDict)
    used_bytes: int = 0
    raw_bytes: int = 0
    clock: int = 0


class HostStore:
    """Encoded KV cache by key: least recently used goes first, pinned stays. Safe to share between threads.

    `capacity_bytes` bounds the sum of the frames' lengths. A put that cannot fit raises `OutOfHostMemory` and changes
    nothing: neither the key's previous entry nor any other is lost.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if not isinstance(capacity_bytes, int) or isinstance(capacity_bytes, bool):
            raise TypeError(f"capacity_bytes must be an int, not {type(capacity_bytes).__name__}: give whole bytes")
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}: give the bytes of host memory to use, at least 1")
        self._capacity_bytes = capacity_bytes
        self._state = _State()
        self._counters = _Counters()
        self._lock = threading.RLock()

    @property
    def capacity_bytes(self) -> int:
        """The most bytes of frames the store holds."""
        return self._capacity_bytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._state.slots)

    def __contains__(self, key: Hashable) -> bool:
        """Whether the key is held. Neither counts as a hit or miss nor as a use."""
        with self._lock:
            return key in self._state.slots

    def keys(self) -> list[Hashable]:
        """The keys held, the least recently used first."""
        with self._lock:
            return list(self._state.slots)

    # -- entries ------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: Hashable,
        frames: Iterable[bytes],
        *,
        raw_bytes: int | None = None,
        metadata: object = None,
    ) -> Entry:
        """Hold `frames` under `key`, in place of what it held, and evict others as far as needed.

        `raw_bytes` is what the frames held before encoding (default: their own length), for the statistics. Pins
        belong to the key and stay. Mutable buffers are copied. Raises `OutOfHostMemory` when the frames are larger
        than the store or than what eviction can free; nothing is lost then.
        """
        if isinstance(frames, (bytes, bytearray, memoryview)):
            raise TypeError("frames must be a sequence of byte strings: wrap a single frame in a list")
        held = tuple(bytes(frame) for frame in frames)
        num_bytes = sum(len(frame) for frame in held)
        if raw_bytes is not None and raw_bytes < 0:
            raise ValueError(f"raw_bytes is {raw_bytes}: give the size before encoding, at least 0")
        entry = Entry(held, num_bytes if raw_bytes is None else raw_bytes, metadata)
        digests = tuple(xxhash.xxh3_64_intdigest(frame) for frame in held)
        with self._lock:
            for victim in self._reserve(key, num_bytes):
                self._free(victim)
                self._counters.evictions += 1
            self._commit(key, entry, digests, num_bytes)
        return entry

    def get(self, key: Hashable) -> Entry | None:
        """The key's entry, now the most recently used, or None. Counts as a hit or a miss."""
        with self._lock:
            slot = self._state.slots.get(key)
            if slot is None:
                self._counters.misses += 1
                return None
            self._counters.hits += 1
            self._touch(key, slot)
            return slot.entry

    def delete(self, key: Hashable) -> bool:
        """Free the key; False if it was not held. Raises `ValueError` when it is pinned."""
        with self._lock:
            slot = self._state.slots.get(key)
            if slot is None:
                return False
            if slot.pins:
                raise ValueError(f"key {key!r} is pinned {slot.pins} times: unpin it before deleting it")
            self._free(key)
            return True

    def clear(self) -> int:
        """Free every key that is not pinned, and return how many there were."""
        with self._lock:
            unpinned = [key for key, slot in self._state.slots.items() if not slot.pins]
            for key in unpinned:
                self._free(key)
            return len(unpinned)

    # -- pins ---------------------------------------------------------------------------------------------------------

    def pin(self, key: Hashable) -> Entry:
        """Keep the key from eviction until it was unpinned as often as pinned. Raises `KeyError` if it is absent."""
        with self._lock:
            slot = self._slot(key)
            slot.pins += 1
            self._touch(key, slot)
            return slot.entry

    def unpin(self, key: Hashable) -> None:
        """Take one pin back. Raises `KeyError` if the key is absent and `ValueError` if it is not pinned."""
        with self._lock:
            slot = self._slot(key)
            if not slot.pins:
                raise ValueError(f"key {key!r} is not pinned: each unpin takes back one pin")
            slot.pins -= 1

    @contextmanager
    def pinned(self, key: Hashable) -> Iterator[Entry]:
        """Pin the key for the length of a `with` block, which gets its entry. Raises `KeyError` if it is absent."""
        entry = self.pin(key)
        try:
            yield entry
        finally:
            self.unpin(key)

    # -- transformers caches ------------------------------------------------------------------------------------------

    def put_cache(self, key: Hashable, past_key_values: DynamicCache, codec: CodecChoice) -> Entry:
        """Encode a transformers `DynamicCache` and hold it under `key`; the cache is read and left as it is.

        `codec` is one codec for everything, or a callable `(layer_index, "k" | "v", tensor) -> codec` that chooses for
        each tensor `[batch, kv_heads, tokens, head_dim]`. Raises `TypeError` for caches that cannot be held (static,
        quantised, encoder-decoder) and `OutOfHostMemory` as `put` does.
        """
        from kvferry.integrations.transformers import encode_cache

        encoded = encode_cache(past_key_values, codec)
        return self.put(key, encoded.frames, raw_bytes=encoded.raw_bytes, metadata=encoded.layout)

    def restore_cache(self, key: Hashable, device: torch.device | str | None = None) -> DynamicCache:
        """A new `DynamicCache` from what `put_cache` held under `key`, on `device` (default: where each layer was).

        Raises `KeyError` if the key is absent, `TypeError` if it does not hold a cache, and `CorruptFrame` if a frame
        is damaged; the key is then freed (unless pinned), so that the next look-up is a plain miss.
        """
        from kvferry.integrations.transformers import CacheLayout, EncodedCache, decode_cache

        entry = self.get(key)
        if entry is None:
            raise KeyError(self._absent(key))
        if not isinstance(entry.metadata, CacheLayout):
            raise TypeError(f"key {key!r} does not hold a cache: read what `put` stored with `get`")
        try:
            return decode_cache(EncodedCache(entry.frames, entry.raw_bytes, entry.metadata), device)
        except CorruptFrame:
            with self._lock:
                self._counters.corrupt += 1
                slot = self._state.slots.get(key)
                if slot is not None and slot.entry is entry and not slot.pins:
                    self._free(key)
            raise

    # -- inspection ---------------------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        """Sizes now and counts so far."""
        with self._lock:
            state, counters = self._state, self._counters
            pinned = [slot.num_bytes for slot in state.slots.values() if slot.pins]
            return StoreStats(
                entries=len(state.slots),
                used_bytes=state.used_bytes,
                raw_bytes=state.raw_bytes,
                capacity_bytes=self._capacity_bytes,
                pinned_entries=len(pinned),
                pinned_bytes=sum(pinned),
                hits=counters.hits,
                misses=counters.misses,
                stores=counters.stores,
                evictions=counters.evictions,
                rejected=counters.rejected,
                corrupt=counters.corrupt,
            )

    def check_integrity(self) -> None:
        """Recompute sizes, pins, the order of use and every frame's digest.

        Raises `KVFerryError` that names what does not add up (`CorruptFrame` where a frame's bytes have changed).
        """
        with self._lock:
            state = self._state
            slots = list(state.slots.items())
            for key, slot in slots:
                if slot.num_bytes != slot.entry.encoded_bytes:
                    raise KVFerryError(
                        f"key {key!r} is accounted with {slot.num_bytes} bytes but holds {slot.entry.encoded_bytes}"
                    )
                if slot.pins < 0:
                    raise KVFerryError(f"key {key!r} has {slot.pins} pins")
            self._check_sum("used_bytes", state.used_bytes, (slot.num_bytes for _, slot in slots))
            self._check_sum("raw_bytes", state.raw_bytes, (slot.entry.raw_bytes for _, slot in slots))
            if state.used_bytes > self._capacity_bytes:
                raise KVFerryError(f"{state.used_bytes} bytes are held in a store of {self._capacity_bytes}")
            times = [slot.last_used for _, slot in slots]
            if times != sorted(set(times)) or (times and times[-1] > state.clock):
                raise KVFerryError(f"the keys are not in the order of their last use: {times}, clock {state.clock}")
        # Outside the lock: entries are immutable, and hashing gigabytes must not stop the store.
        for key, slot in slots:
            for index, (frame, digest) in enumerate(zip(slot.entry.frames, slot.digests, strict=True)):
                if xxhash.xxh3_64_intdigest(frame) != digest:
                    raise CorruptFrame(f"frame {index} of key {key!r} has changed since it was put")

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _reserve(self, key: Hashable, num_bytes: int) -> list[Hashable]:
        """The keys to evict so that `num_bytes` fit under `key`; evicts none itself. Raises `OutOfHostMemory`."""
        state = self._state
        previous = state.slots.get(key)
        missing = state.used_bytes - (previous.num_bytes if previous else 0) + num_bytes - self._capacity_bytes
        victims: list[Hashable] = []
        for other, slot in state.slots.items():
            if missing <= 0:
                break
            if other != key and not slot.pins:
                victims.append(other)
                missing -= slot.num_bytes
        if missing > 0:
            self._counters.rejected += 1
            stays = sum(slot.num_bytes for other, slot in state.slots.items() if slot.pins and other != key)
            remedy = "make capacity_bytes larger" + (", or unpin entries" if stays else ", or store smaller pieces")
            raise OutOfHostMemory(
                f"an entry of {num_bytes} bytes does not fit: the store has {self._capacity_bytes} bytes, "
                f"of which other pinned entries hold {stays}; {remedy}"
            )
        return victims

    def _commit(self, key: Hashable, entry: Entry, digests: tuple[int, ...], num_bytes: int) -> None:
        previous = self._state.slots.get(key)
        pins = previous.pins if previous else 0
        if previous:
            self._free(key)
        slot = _Slot(entry, digests, num_bytes, last_used=0, pins=pins)
        self._state.slots[key] = slot
        self._state.used_bytes += num_bytes
        self._state.raw_bytes += entry.raw_bytes
        self._counters.stores += 1
        self._touch(key, slot)

    def _free(self, key: Hashable) -> None:
        slot = self._state.slots.pop(key)
        self._state.used_bytes -= slot.num_bytes
        self._state.raw_bytes -= slot.entry.raw_bytes

    def _touch(self, key: Hashable, slot: _Slot) -> None:
        self._state.clock += 1
        slot.last_used = self._state.clock
        self._state.slots.move_to_end(key)

    def _slot(self, key: Hashable) -> _Slot:
        slot = self._state.slots.get(key)
        if slot is None:
            raise KeyError(self._absent(key))
        return slot

    @staticmethod
    def _absent(key: Hashable) -> str:
        return f"no entry under key {key!r}: it was never stored, or was evicted to make room; compute it again"

    @staticmethod
    def _check_sum(name: str, accounted: int, parts: Iterable[int]) -> None:
        found = sum(parts)
        if accounted != found:
            raise KVFerryError(f"{name} is accounted as {accounted} but the entries add up to {found}")
