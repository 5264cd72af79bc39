"""What runs in vLLM's scheduler process: its own managers, which name the chunks of a transfer and forget those that
are not there."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from kvferry.integrations.vllm import compat
from kvferry.integrations.vllm.chunks import identities_of, identity_of
from kvferry.integrations.vllm.compat import (
    CPULoadStoreSpec,
    CPUOffloadingManager,
    CPUPrimaryTierOffloadingManager,
    LookupResult,
    OffloadingManager,
    ReqContext,
    TieringOffloadingManager,
)


class SlotLoadStoreSpec(CPULoadStoreSpec):
    """vLLM's numbers of rows, and what the chunks in them are called: `identities` uint64 `[rows, 2]`. `ends` int64
    `[rows]`: how many tokens there are in a chunk's sequence up to its end, 0 where that is not known; None: of all."""

    def __init__(self, block_ids: list[int], identities: Any, ends: Any = None) -> None:
        super().__init__(block_ids)
        self.identities = identities
        self.ends = ends


class _NamesChunks(CPUOffloadingManager):
    """Tells workers the identities of chunks, and where they are in their sequences. A chunk's key is made of all
    tokens up to its end, so whoever stores or loads it finds the same place."""

    def prepare_load(self, keys: Collection[bytes], req_context: ReqContext) -> Any:
        spec = super().prepare_load(keys, req_context)
        spec.ends = _ends(keys, req_context)
        return spec

    def prepare_store(self, keys: Collection[bytes], req_context: ReqContext) -> Any:
        output = super().prepare_store(keys, req_context)
        if output is not None:
            output.store_spec.ends = _ends(output.keys_to_store, req_context)
        return output

    def _get_load_store_spec(self, keys: Iterable[bytes], chunks: Iterable[Any]) -> SlotLoadStoreSpec:
        return SlotLoadStoreSpec([chunk.chunk_id for chunk in chunks], identities_of(list(keys)))


def _ends(keys: Iterable[bytes], req_context: ReqContext) -> np.ndarray:
    return np.array([req_context.get_offload_key_position(key) or 0 for key in keys], dtype=np.int64)


class Forgetful(OffloadingManager):
    """A manager that learns of chunks which were not stored (`store_failed`) or cannot be loaded (`load_failed`), and
    from then on does not know them."""

    _not_stored: set[bytes]
    _unloadable: set[bytes]

    def store_failed(self, keys: Iterable[bytes]) -> None:
        """Say, before a store is completed, which of its chunks did not arrive."""
        self._not_stored.update(keys)

    def load_failed(self, keys: Iterable[bytes]) -> None:
        """Say, before a load is completed, which of its chunks are of no use. They are out as soon as nothing uses
        them, and misses until then."""
        for key in keys:
            self._unloadable.add(key)
            compat.forget_on_disk(self, key)

    def lookup(self, key: bytes, req_context: ReqContext, **kwargs: Any) -> LookupResult:
        if self._unloadable and key in self._unloadable and not self._forget(key):
            return LookupResult.MISS
        return super().lookup(key, req_context, **kwargs)

    def complete_store(self, keys: Collection[bytes], req_context: ReqContext, success: bool = True) -> None:
        lost = self._not_stored.intersection(keys) if success and self._not_stored else set()
        if not lost:
            super().complete_store(keys, req_context, success)
            return
        self._not_stored -= lost
        self._complete_partly([key for key in keys if key not in lost], list(lost), req_context)

    def complete_load(self, keys: Collection[bytes], req_context: ReqContext) -> None:
        super().complete_load(keys, req_context)
        if self._unloadable:
            for key in self._unloadable.intersection(keys):
                self._forget(key)

    def reset_cache(self) -> None:
        super().reset_cache()
        self._not_stored.clear()
        self._unloadable.clear()

    def _forget(self, key: bytes) -> bool:
        """Take a chunk out if nothing uses it; whether it is out."""
        if compat.forget(getattr(self, "primary_tier", self), key):
            self._unloadable.discard(key)
            return True
        return False

    def _complete_partly(self, stored: list[bytes], lost: list[bytes], req_context: ReqContext) -> None:
        super().complete_store(lost, req_context, False)
        super().complete_store(stored, req_context, True)


class SlotManager(Forgetful, _NamesChunks):
    """vLLM's manager of the CPU tier."""


class SlotPrimaryManager(_NamesChunks, CPUPrimaryTierOffloadingManager):
    """vLLM's manager of the CPU tier under other tiers."""


class SlotTieringManager(Forgetful, TieringOffloadingManager):
    """vLLM's manager of several tiers."""

    def _complete_partly(self, stored: list[bytes], lost: list[bytes], req_context: ReqContext) -> None:
        # A store is completed once here, whatever came of its chunks: the request's account would not add up.
        self.primary_tier.complete_store(lost, req_context, False)
        TieringOffloadingManager.complete_store(self, stored, req_context, bool(stored))


def adopt(manager: OffloadingManager) -> OffloadingManager:
    """Make a manager that vLLM built one of the above, in place. Raises `TypeError` for one of another kind."""
    if type(manager) is CPUOffloadingManager:
        manager.__class__ = SlotManager
    elif type(manager) is TieringOffloadingManager:
        manager.__class__ = SlotTieringManager
        manager.primary_tier.__class__ = SlotPrimaryManager
    elif not isinstance(manager, Forgetful):
        raise TypeError(f"vLLM made a {type(manager).__name__}, which kvferry does not know")
    if not hasattr(manager, "_not_stored"):
        manager._not_stored, manager._unloadable = set(), set()
    return manager


def keys_named(keys: Iterable[bytes], identities: set[tuple[int, int]]) -> set[bytes]:
    """Those of a transfer's `keys` whose chunks have one of these identities."""
    return {key for key in keys if identity_of(key) in identities}
