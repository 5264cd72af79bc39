"""Dense bit streams: each bit where docs/format.md puts it."""

import pytest
import torch

from kvferry.packing import dense


def expected(values: torch.Tensor, widths: torch.Tensor, group_tokens: int) -> bytes:
    """The streams of one tile, built bit by bit."""
    tokens, channels = values.shape
    data = b""
    for start in range(0, tokens, group_tokens):
        for c in range(channels):
            width = int(widths[start // group_tokens, c])
            group = values[start : start + group_tokens, c].tolist()
            stream = 0
            for i, value in enumerate(group):
                stream |= value << width * i
            data += stream.to_bytes((len(group) * width + 31) // 32 * 4, "little")
    return data


@pytest.mark.parametrize("group_tokens", [32, 64])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("channels", [1, 3, 40])
def test_streams(tokens: int, channels: int, group_tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens * 1000 + channels)
    groups = -(-tokens // group_tokens)
    widths = torch.randint(0, 33, (7, groups, channels), generator=generator)
    widths[0], widths[1], widths[2, :, -1] = 0, 32, 0
    per_token = widths[:, torch.arange(tokens) // group_tokens]
    values = torch.randint(0, 1 << 32, (7, tokens, channels), generator=generator) & ((1 << per_token) - 1)
    data, length = dense.pack(values, widths, group_tokens)
    for n in range(7):
        assert bytes(data[n, : int(length[n])].tolist()) == expected(values[n], widths[n], group_tokens)
    assert dense.unpack(data, widths, tokens, group_tokens).equal(values)


def test_all_ones_touch_no_neighbour() -> None:
    """Every width beside every other, all bits set: what spills over would show in the next stream."""
    widths = torch.arange(33)[None, None]
    values = ((1 << widths) - 1).expand(1, 64, 33).contiguous()
    data, length = dense.pack(values, widths, 64)
    assert bytes(data[0, : int(length)].tolist()) == expected(values[0], widths[0], 64)
    assert dense.unpack(data, widths, 64, 64).equal(values)


def test_rows_that_are_too_short_read_as_zeros() -> None:
    widths = torch.full((1, 1, 2), 9)
    assert not dense.unpack(torch.zeros(1, 0, dtype=torch.uint8), widths, 64, 64).any()
    assert dense.unpack(torch.full((1, 4), 255, dtype=torch.uint8), widths, 64, 64).sum() == 3 * 511 + 31
