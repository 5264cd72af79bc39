"""What the CUDA coders read as tables is the format's tables."""

import random

import pytest
import torch

from kvferry.codecs.fused.tables import ALPHABET, decoder_slots, encoder_entries
from kvferry.packing.ans.tables import PROB_SCALE, family


def entry(one_sided: bool, table: int, symbol: int) -> tuple[int, int, int, int]:
    """(reciprocal, 256 - frequency, bias, shift)"""
    middle = 0 if one_sided else ALPHABET // 2
    reciprocal, packed = (
        x & 0xFFFFFFFF for x in encoder_entries(one_sided).tolist()[ALPHABET * table + symbol + middle]
    )
    return reciprocal, packed >> 8 & 255, packed >> 16, packed & 31


def coded(x: int, reciprocal: int, complement: int, bias: int, shift: int) -> int:
    """`code_symbol` of ans_encode.cu."""
    quotient = (x * reciprocal >> 32) >> shift
    return quotient * complement + x + bias


@pytest.mark.parametrize("one_sided", [False, True])
def test_multiplying_by_the_reciprocal_divides(one_sided: bool) -> None:
    """The update x -> (x // f << 8) + x % f + cum, done as the kernel does it, at the edges of quotient ranges."""
    tables = family(one_sided)
    drawn = random.Random(0)
    for c in range(tables.count):
        for column in range(int(tables.size[c])):
            f, cum = int(tables.freq[c, column]), int(tables.cum[c, column])
            found = entry(one_sided, c, column - int(tables.origin[c]))
            assert found[1] == PROB_SCALE - f
            top = min(f << 24, 1 << 32)  # states are below this when a symbol is coded
            edges = [k * f + d for k in (1, 2, top // f - 1, top // f) for d in (-1, 0, 1)]
            for x in edges + [drawn.randrange(1, top) for _ in range(200)]:
                if 0 < x < top:
                    assert coded(x, *found) == (x // f << 8) + x % f + cum, (f, x)


@pytest.mark.parametrize("one_sided", [False, True])
def test_what_is_found_has_its_top_bit_set_and_what_is_not_is_zero(one_sided: bool) -> None:
    """The encoder tells missing symbols by the top bit of the reciprocals alone."""
    entries = encoder_entries(one_sided).reshape(-1, ALPHABET, 2)
    missing = (entries == 0).all(-1)
    assert torch.equal(entries[..., 0] < 0, ~missing)
    assert missing[:, -1].all()
    assert one_sided or missing[:, 0].all()


@pytest.mark.parametrize("one_sided", [False, True])
def test_decoder_slots_invert_the_tables(one_sided: bool) -> None:
    tables = family(one_sided)
    slots = decoder_slots(one_sided).reshape(tables.count + 1, PROB_SCALE).long()
    for c in range(tables.count):
        for column in range(int(tables.size[c])):
            cum, f = int(tables.cum[c, column]), int(tables.freq[c, column])
            run = slots[c, cum : cum + f]
            assert torch.all(run >> 24 == column - int(tables.origin[c]))
            assert torch.all(run & 0xFFFF == f)
            assert torch.equal(run >> 16 & 0xFF, torch.arange(f))


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_idle_table_leaves_every_state_as_it_is(one_sided: bool) -> None:
    count = family(one_sided).count
    slots = decoder_slots(one_sided)[PROB_SCALE * count :].long()
    for x in (1 << 16, 123456789, 2**32 - 1):
        assert coded(x, *entry(one_sided, count, 0)) == x
        slot = int(slots[x & 255]) & 0xFFFFFFFF
        assert slot >> 24 == 0
        assert (slot & 0xFFFF) * (x >> 8) + (slot >> 16 & 0xFF) == x
