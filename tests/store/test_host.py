"""`HostStore`: budget, order of use, pins, statistics, and that a put that fails loses nothing."""

import threading
from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvferry.errors import CorruptFrame, KVFerryError, OutOfHostMemory
from kvferry.store import HostStore


def test_put_then_get_gives_the_entry_back():
    store = HostStore(100)
    put = store.put("a", [b"12", b"345"], raw_bytes=20, metadata={"layer": 3})
    got = store.get("a")
    assert got is put
    assert got.frames == (b"12", b"345")
    assert got.metadata == {"layer": 3}
    assert (got.encoded_bytes, got.raw_bytes, got.ratio) == (5, 20, 4.0)
    assert "a" in store
    assert "b" not in store
    assert len(store) == 1
    store.check_integrity()


def test_least_recently_used_goes_first():
    store = HostStore(3)
    for key in "abc":
        store.put(key, [b"x"])
    store.get("a")
    store.put("d", [b"x"])
    assert store.keys() == ["c", "a", "d"]
    store.put("e", [b"xx"])
    assert store.keys() == ["d", "e"]
    assert store.stats().evictions == 3
    store.check_integrity()


def test_pinned_stays_until_unpinned_as_often():
    store = HostStore(2)
    store.put("a", [b"x"])
    store.put("b", [b"x"])
    store.pin("a")
    store.pin("a")
    store.put("c", [b"x"])
    assert store.keys() == ["a", "c"]
    store.unpin("a")
    assert store.stats().pinned_entries == 1
    store.unpin("a")
    assert store.stats().pinned_bytes == 0
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin("a")
    store.put("d", [b"x"])
    assert store.keys() == ["c", "d"]


def test_pinned_block_unpins_after_an_error():
    store = HostStore(10)
    store.put("a", [b"x"])

    def fail() -> None:
        with store.pinned("a") as entry:
            assert entry.frames == (b"x",)
            assert store.stats().pinned_entries == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert store.stats().pinned_entries == 0


def test_a_put_larger_than_the_store_loses_nothing():
    store = HostStore(10)
    store.put("a", [b"old"])
    store.put("b", [b"other"])
    before = store.stats()
    with pytest.raises(OutOfHostMemory, match=r"11 bytes does not fit.*10 bytes.*capacity_bytes"):
        store.put("a", [b"x" * 11])
    assert store.keys() == ["a", "b"]
    assert store.get("a").frames == (b"old",)
    after = store.stats()
    assert (after.used_bytes, after.evictions, after.stores) == (before.used_bytes, 0, before.stores)
    assert after.rejected == 1
    store.check_integrity()


def test_a_put_that_pins_leave_no_room_for_loses_nothing():
    store = HostStore(10)
    store.put("a", [b"aaaa"])
    store.put("b", [b"bbbb"])
    store.put("c", [b"c"])
    with store.pinned("b"), pytest.raises(OutOfHostMemory, match=r"pinned entries hold 4; .*unpin"):
        store.put("d", [b"d" * 7])
    assert set(store.keys()) == {"a", "b", "c"}
    store.put("d", [b"d" * 7])
    assert "d" in store


def test_replacing_counts_the_old_entry_as_free_and_keeps_pins():
    store = HostStore(10)
    store.put("a", [b"x" * 8])
    store.pin("a")
    store.put("a", [b"y" * 10])
    assert store.get("a").frames == (b"y" * 10,)
    assert store.stats().evictions == 0
    assert store.stats().pinned_bytes == 10
    with pytest.raises(ValueError, match="pinned 1 times"):
        store.delete("a")
    assert store.clear() == 0
    store.unpin("a")
    assert store.delete("a")
    assert not store.delete("a")
    assert store.stats().used_bytes == 0


def test_mutable_buffers_are_copied():
    store = HostStore(10)
    buffer = bytearray(b"abc")
    store.put("a", [buffer])
    buffer[0] = 0
    assert store.get("a").frames == (b"abc",)
    store.check_integrity()


def test_statistics_count_hits_misses_and_ratio():
    store = HostStore(100)
    assert store.get("a") is None
    store.put("a", [b"x" * 10], raw_bytes=30)
    store.get("a")
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.stores, stats.entries) == (1, 1, 1, 1)
    assert (stats.used_bytes, stats.raw_bytes, stats.capacity_bytes, stats.ratio) == (10, 30, 100, 3.0)


@pytest.mark.parametrize(
    ("capacity", "error"), [(0, ValueError), (-5, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_capacity_must_be_whole_bytes(capacity, error):
    with pytest.raises(error, match="capacity_bytes"):
        HostStore(capacity)


def test_a_bare_byte_string_is_refused():
    with pytest.raises(TypeError, match="wrap a single frame in a list"):
        HostStore(10).put("a", b"abc")


def test_absent_keys_name_themselves():
    store = HostStore(10)
    for action in (store.pin, store.unpin, store.restore_cache if _has_transformers() else store.pin):
        with pytest.raises(KeyError, match="no entry under key 'gone'"):
            action("gone")


def _has_transformers() -> bool:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda store: setattr(store._state, "used_bytes", 7), KVFerryError, "used_bytes is accounted as 7"),
        (lambda store: setattr(store._state, "raw_bytes", 7), KVFerryError, "raw_bytes is accounted as 7"),
        (lambda store: setattr(store._state.slots["a"], "pins", -1), KVFerryError, "'a' has -1 pins"),
        (lambda store: setattr(store._state.slots["a"], "num_bytes", 9), KVFerryError, "'a' is accounted with 9"),
        (lambda store: store._state.slots.move_to_end("a"), KVFerryError, "order of their last use"),
        (lambda store: setattr(store._state.slots["a"], "digests", (1,)), CorruptFrame, "frame 0 of key 'a'"),
        (lambda store: setattr(store, "_capacity_bytes", 1), KVFerryError, "2 bytes are held in a store of 1"),
    ],
)
def test_check_integrity_names_the_damage(damage, error, message):
    store = HostStore(100)
    store.put("a", [b"x"])
    store.put("b", [b"y"])
    store.check_integrity()
    damage(store)
    with pytest.raises(error, match=message):
        store.check_integrity()


def test_threads_share_a_store():
    store = HostStore(64)
    problems = []

    def work(seed: int) -> None:
        try:
            for step in range(300):
                key = (seed * 7 + step) % 11
                store.put(key, [bytes([key]) * (key + 1)])
                try:
                    with store.pinned((key + 3) % 11) as entry:
                        assert entry.frames[0][:1] == bytes([(key + 3) % 11])
                except KeyError:
                    pass
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert store.stats().pinned_entries == 0
    store.check_integrity()


CAPACITY = 20
KEYS = st.integers(0, 7)


class StoreAgainstModel(RuleBasedStateMachine):
    """Random operations on the store and on a plain ordered dictionary that evicts one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.store = HostStore(CAPACITY)
        self.model: OrderedDict[int, list[bytes]] = OrderedDict()
        self.pins: dict[int, int] = {}

    @rule(key=KEYS, frames=st.lists(st.binary(max_size=9), max_size=3))
    def put(self, key: int, frames: list[bytes]) -> None:
        others = OrderedDict((k, v) for k, v in self.model.items() if k != key)
        size = sum(map(len, frames))
        while sum(len(f) for v in others.values() for f in v) + size > CAPACITY:
            victim = next((k for k in others if not self.pins.get(k)), None)
            if victim is None:
                with pytest.raises(OutOfHostMemory):
                    self.store.put(key, frames)
                return
            del others[victim]
        self.store.put(key, frames)
        others[key] = frames
        self.model = others

    @rule(key=KEYS)
    def get(self, key: int) -> None:
        entry = self.store.get(key)
        if key in self.model:
            assert list(entry.frames) == self.model[key]
            self.model.move_to_end(key)
        else:
            assert entry is None

    @rule(key=KEYS)
    def pin(self, key: int) -> None:
        if key in self.model:
            self.store.pin(key)
            self.model.move_to_end(key)
            self.pins[key] = self.pins.get(key, 0) + 1
        else:
            with pytest.raises(KeyError):
                self.store.pin(key)

    @rule(key=KEYS)
    def unpin(self, key: int) -> None:
        if self.pins.get(key):
            self.store.unpin(key)
            self.pins[key] -= 1
        else:
            with pytest.raises((KeyError, ValueError)):
                self.store.unpin(key)

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        if self.pins.get(key):
            with pytest.raises(ValueError, match="pinned"):
                self.store.delete(key)
        else:
            assert self.store.delete(key) == (self.model.pop(key, None) is not None)

    @rule()
    def clear(self) -> None:
        unpinned = [key for key in self.model if not self.pins.get(key)]
        assert self.store.clear() == len(unpinned)
        for key in unpinned:
            del self.model[key]

    @invariant()
    def agrees(self) -> None:
        assert self.store.keys() == list(self.model)
        stats = self.store.stats()
        assert stats.used_bytes == sum(len(f) for v in self.model.values() for f in v) <= CAPACITY
        assert stats.pinned_entries == sum(1 for count in self.pins.values() if count)
        self.store.check_integrity()


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
