"""The `ans` tables as the CUDA coders read them (docs/format.md, "ans")."""

from functools import cache

import torch
from torch import Tensor

from kvferry.packing.ans.tables import PROB_SCALE, covered_radius, family

ALPHABET = 64


def encoder_entries(one_sided: bool) -> Tensor:
    """The encoder's view of a family: int32 `[(tables + 1) * 64, 2]`, the reciprocal of the frequency, and the
    reciprocal's shift (8 bits), 256 minus the frequency (8) and bias (16); both 0 where there is no symbol.

    Symbol s is entry s, or s + 32 in the two-sided family; the outermost entries are empty. Behind the family's tables
    comes one whose only symbol, 0, has probability 1: what lanes without a channel code.

    Dividing by multiplication (T. Granlund and P. Montgomery, PLDI 1994): x // f = (x * ceil(2**(31+s) / f)) >> (31+s),
    exact for the x that occur (below f * 2**24) if the error of the reciprocal times the largest x stays below
    2**(31+s).
    """
    tables = family(one_sided)
    middle = 0 if one_sided else ALPHABET // 2
    rows = []
    for c in range(tables.count):
        origin = int(tables.origin[c])
        entries = [(0, 0)] * ALPHABET
        for column in range(int(tables.size[c])):
            entries[column - origin + middle] = _entry(int(tables.freq[c, column]), int(tables.cum[c, column]))
        rows += entries
    idle = [(0, 0)] * ALPHABET
    idle[middle] = _entry(PROB_SCALE, 0)
    rows += idle
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def _entry(frequency: int, cum: int) -> tuple[int, int]:
    if frequency == 1:
        # x * (2**32 - 1) >> 32 = x - 1; the bias makes up for it.
        reciprocal, shift, bias = 2**32 - 1, 0, cum + PROB_SCALE - 1
    else:
        bits = (frequency - 1).bit_length()
        reciprocal, shift, bias = ((1 << (bits + 31)) + frequency - 1) // frequency, bits - 1, cum
        error = reciprocal * frequency - (1 << (bits + 31))
        if error * min(frequency << 24, 1 << 32) >= 1 << (bits + 31):
            raise ValueError(f"frequency {frequency} has no exact 32-bit reciprocal; the tables must avoid it")
    return reciprocal, shift | (PROB_SCALE - frequency) << 8 | bias << 16


def decoder_slots(one_sided: bool) -> Tensor:
    """The decoder's view: int32 `[(tables + 1) * 256]`, frequency (16 bits), slot - cum (8), symbol (8, signed); the
    last table is the one of lanes without a channel."""
    tables = family(one_sided)
    slots = (tables.slot_freq | tables.slot_bias << 16 | (tables.symbol & 255) << 24).flatten()
    return torch.cat([slots, PROB_SCALE | torch.arange(PROB_SCALE) << 16]).to(torch.int32)


@cache
def encoder_tables(one_sided: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """`encoder_entries`, and the reach of each class, on a device."""
    return encoder_entries(one_sided).to(device), covered_radius().to(torch.int32).to(device)


@cache
def decoder_table(one_sided: bool, device: torch.device) -> Tensor:
    return decoder_slots(one_sided).to(device)
