"""What a result must say about where it was measured: see kvferry.bench.machine."""

from kvferry.bench.machine import commit, describe

__all__ = ["commit", "describe"]
