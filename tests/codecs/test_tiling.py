"""Tiles: every value in exactly one, where docs/format.md says, for any shape and strides."""

import pytest
import torch

import kvferry
from contract.cases import tiles_of
from kvferry.codecs.tiling import (
    channel_segments,
    count_tiles,
    flat_plan,
    gather_tiles,
    plan_tensor,
    scatter_tiles,
    token_plan,
)

SHAPES = [
    (),
    (1,),
    (63,),
    (64,),
    (65,),
    (8192,),
    (8191,),
    (3 * 8192 + 3 * 64 + 5,),
    (1, 1),
    (64, 128),
    (65, 129),
    (128, 576),
    (2, 70, 40),
    (3, 2, 5, 7),
    (2, 1, 130, 257),
]


@pytest.mark.parametrize("flat", [False, True], ids=["token", "flat"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_are_the_documented_ones(shape: tuple[int, ...], flat: bool) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    target, plan = plan_tensor(tensor, flat)
    expected = list(tiles_of(shape, flat))
    assert plan.num_tiles == count_tiles(shape, flat) == len(expected)
    for i, index in enumerate(expected):
        t, c = index.shape
        assert (int(plan.tokens[i]), int(plan.channels[i])) == (t, c)
        at = plan.offsets[i] + torch.arange(t)[:, None] * plan.token_stride + torch.arange(c) * plan.channel_stride
        assert at.equal(index), "contiguous: an element's offset is its row-major index"
    seen = torch.zeros(tensor.numel(), dtype=torch.int64)
    for tokens, channels, tiles in plan.groups():
        got = gather_tiles(target, plan, tiles, tokens, channels)
        seen.scatter_add_(0, got.reshape(-1).long(), torch.ones(got.numel(), dtype=torch.int64))
        for row, i in enumerate(tiles.tolist()):
            assert got[row].equal(expected[i].int())
    assert (seen == 1).all(), "each value in exactly one tile"
    assert len(plan.groups()) <= 4


@pytest.mark.parametrize("flat", [False, True], ids=["token", "flat"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 2, 3)], ids=str)
def test_nothing_has_no_tiles(shape: tuple[int, ...], flat: bool) -> None:
    _, plan = plan_tensor(torch.zeros(shape), flat)
    assert plan.num_tiles == count_tiles(shape, flat) == 0
    assert plan.groups() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(-1, -2),
        lambda x: x[..., 1::2],
        lambda x: x[:, 3:],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 130),
        lambda x: x.permute(1, 2, 0),
    ],
)
def test_strides(make) -> None:
    tensor = make(torch.arange(2 * 70 * 140, dtype=torch.int32).view(2, 70, 140))
    target, plan = plan_tensor(tensor, flat=False)
    assert target.data_ptr() == tensor.data_ptr(), "token grouping copies nothing"
    values = tensor.reshape(-1)
    expected = list(tiles_of(tuple(tensor.shape), flat=False))
    for tokens, channels, tiles in plan.groups():
        got = gather_tiles(target, plan, tiles, tokens, channels)
        for row, i in enumerate(tiles.tolist()):
            assert got[row].equal(values[expected[i]])


def test_scatter_writes_each_value_once_and_nothing_else() -> None:
    memory = torch.full((3, 70, 300), -1, dtype=torch.int32)
    out = memory[1:, :, 10:280:2]
    values = torch.arange(out.numel(), dtype=torch.int32).view(out.shape)
    _, plan = plan_tensor(values, flat=False)
    target, out_plan = plan_tensor(out, flat=False)
    for tokens, channels, tiles in plan.groups():
        scatter_tiles(target, out_plan, tiles, gather_tiles(values, plan, tiles, tokens, channels))
    assert out.equal(values)
    assert int((memory == -1).sum()) == memory.numel() - out.numel()


def test_segments() -> None:
    """As many as 128 channels need, equally wide, in multiples of 16."""
    assert channel_segments(0) == []
    known = {1: [1], 80: [80], 128: [128], 129: [80, 49], 192: [96, 96], 256: [128, 128], 576: [128] * 4 + [64]}
    for channels, widths in known.items():
        assert [width for _, width in channel_segments(channels)] == widths
    for channels in range(1, 1100):
        segments = channel_segments(channels)
        assert [start for start, _ in segments] == [sum(w for _, w in segments[:i]) for i in range(len(segments))]
        assert sum(width for _, width in segments) == channels
        assert all(0 < width <= 128 for _, width in segments)
        assert count_tiles((1, channels), flat=False) == len(segments)


def test_counting_builds_nothing() -> None:
    """A header may claim any shape: the count must not take memory or time."""
    assert count_tiles((1 << 40, 1 << 40), flat=False) == (1 << 34) * (1 << 33)
    assert count_tiles((1 << 60,), flat=True) == 1 << 47


@pytest.mark.parametrize("shape", [(0, 1 << 34, 8), (5, 1 << 34, 0), (1 << 40, 0, 8), (1 << 40, 3, 0)], ids=str)
def test_tensors_without_values_build_nothing(shape: tuple[int, ...]) -> None:
    """Whatever their other sizes: their tokens or rows would be lists of gigabytes."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    target, plan = plan_tensor(tensor, flat=False)
    assert plan.num_tiles == 0 and plan.groups() == []
    assert (plan.token_stride, plan.channel_stride) == tensor.stride()[-2:] and target is tensor
    frame = kvferry.compress(tensor, kvferry.Bounded(0.1))
    assert kvferry.decompress(frame).shape == shape


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_raw_bytes_are_padded(itemsize: int) -> None:
    plan = token_plan((2, 65, 3), (195, 3, 1))
    assert plan.raw_bytes(itemsize).tolist() == [
        4 + (values * itemsize + 3) // 4 * 4 for values in (64 * 3, 3, 64 * 3, 3)
    ]
    assert flat_plan(5).raw_bytes(itemsize).tolist() == [4 + (5 * itemsize + 3) // 4 * 4]
