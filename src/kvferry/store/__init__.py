"""Where encoded KV cache waits in host memory: `HostStore`."""

from kvferry.store.host import Entry, HostStore, StoreStats

__all__ = ["Entry", "HostStore", "StoreStats"]
