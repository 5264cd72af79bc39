"""Positions of chunks on their way to the coder: those that were given, each with its own chunk, or none."""

from typing import Any

import numpy as np
import pytest
import torch
from scene import PAGE_TOKENS, Scene, chunk_pages, names
from simulated import SimulatedMachine
from test_orders import open_transfers

import kvferry
from contract.profiles import make_profile
from kvferry.codecs.slots import SlotCodec
from kvferry.pipeline import Transfers

CHUNKS = 20
AT = np.random.default_rng(7).integers(0, 2000, CHUNKS) * PAGE_TOKENS


def transform_scene(seed: int = 0) -> Scene:
    return Scene.make(kvferry.Transform(make_profile(2, 32, step=0.05)), ratio=1.0, seed=seed, max_positions=1 << 16)


def decoded(scene: Scene, pages: np.ndarray, positions: np.ndarray | None) -> list[torch.Tensor]:
    """The cache once `pages` have gone through slots without a pipeline."""
    table, index = torch.from_numpy(pages).int(), torch.arange(len(pages), dtype=torch.int32)
    ids = torch.from_numpy(names(len(pages)).view(np.int64))
    at = None if positions is None else torch.from_numpy(positions).int()
    slots, status = torch.zeros_like(scene.slots), torch.zeros(len(pages), dtype=torch.int32)
    before = scene.snapshot()
    scene.codec.encode(table, slots, index, ids, at)
    scene.codec.decode(slots, index, table, ids, status, at)
    assert not status.any()
    wanted = scene.snapshot()
    for layer, values in zip(scene.layers, before, strict=True):
        layer.copy_(values)
    return wanted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("ring_slots", "rows"), [(2, 16), (5, 64)])
def test_each_chunk_keeps_its_own_position(seed: int, ring_slots: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    scene, machine = transform_scene(seed), SimulatedMachine(seed)
    pages, slots, ids = chunk_pages(rng, CHUNKS), rng.permutation(40)[:CHUNKS], names(CHUNKS)
    wanted = decoded(scene, pages, AT)
    transfers, _ = open_transfers(machine, scene, ring_slots, rows)
    given = AT.copy()
    stores = [transfers.store(pages[part], slots[part], ids[part], given[part]) for part in (slice(7), slice(7, None))]
    given[:] = 3  # they were copied
    machine.steps(int(rng.integers(30)))
    assert machine.host_waits == 0
    transfers.wait(stores)
    scene.wipe()
    order = rng.permutation(CHUNKS)
    load = transfers.load(pages[order], slots[order], ids[order], torch.from_numpy(AT[order]))
    load.wait()
    assert all(job.result().ok for job in (*stores, load))
    assert scene.same(wanted, pages)
    # The same slots, turned by other angles, are other keys.
    again = transfers.load(pages[order], slots[order], ids[order], AT[order] + 1)
    again.wait()
    assert again.result().ok and not scene.same(wanted, pages)


def test_no_positions_are_the_coders_none(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, pages = transform_scene(), chunk_pages(np.random.default_rng(0), 4)
    wanted, seen = decoded(scene, pages, None), []
    for name in ("encode", "decode"):
        call = getattr(SlotCodec, name)

        def spy(self: SlotCodec, *given: Any, call: Any = call) -> None:
            if self is scene.codec:  # and not what codes its coefficients
                seen.append(given[-1])
            call(self, *given)

        monkeypatch.setattr(SlotCodec, name, spy)
    with Transfers(scene.codec, scene.slots) as transfers:
        assert transfers.store(pages, range(4), names(4)).result().ok
        scene.wipe()
        assert transfers.load(pages, range(4), names(4)).result().ok
    assert seen == [None, None]
    assert scene.same(wanted, pages)


def test_positions_cost_no_copy_of_their_own() -> None:
    copies = []
    for positions in (None, AT[:4]):
        scene, machine = transform_scene(), SimulatedMachine(0)
        transfers, _ = open_transfers(machine, scene, ring_slots=40)
        machine.settle()
        before = machine.copies
        transfers.store(chunk_pages(np.random.default_rng(0), 4), range(4), names(4), positions).wait()
        copies.append(machine.copies - before)
    assert copies[0] == copies[1]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0], r"positions has the shape \(1,\); for 2 slots pass \(2,\)"),
        ([[0, 1]], r"positions has the shape \(1, 2\)"),
        ([0.0, 16.0], r"positions holds float64; pass integers"),
        ([0, -16], r"positions holds -16; there are positions 0 to 2147483647"),
        ([1 << 31, 0], r"positions holds 2147483648; there are positions 0 to"),
    ],
)
def test_positions_that_cannot_be(positions: Any, message: str) -> None:
    scene = transform_scene()
    transfers = Transfers(scene.codec, scene.slots)
    for call in (transfers.store, transfers.load):
        with pytest.raises(ValueError, match=message):
            call([[0, 1], [2, 3]], [0, 1], names(2), positions)
    assert transfers.finished() == []
    assert transfers.store([], [], np.zeros((0, 2), dtype=np.uint64), []).result().ok
