"""The frequency tables of the format (docs/format.md, "ans"), as arrays for the coders. Data: `tables.json`."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

PROB_BITS = 8
PROB_SCALE = 1 << PROB_BITS
STATE_LOW = 1 << 16
MAX_CLASS = 120
"""More classes than any int32 spread needs; a stored class above it is corruption."""
_ALPHABET = 64


@dataclass(frozen=True)
class Tables:
    """One family. Symbol s of table c is column `s + origin[c]` of `freq` and `cum`.

    `freq`, `cum` int64 `[tables, 64]` (freq 0 where there is no symbol); `origin`, `size` int64 `[tables]`; by slot,
    int64 `[tables, 256]`: `symbol`, `slot_freq`, `slot_bias` (slot - cum).
    """

    freq: Tensor
    cum: Tensor
    origin: Tensor
    size: Tensor
    symbol: Tensor
    slot_freq: Tensor
    slot_bias: Tensor

    @property
    def count(self) -> int:
        return len(self.origin)


def load(name: str) -> list[list[int]]:
    """The lists of family `name` ("two_sided", "one_sided") as the format states them."""
    tables: dict[str, list[list[int]]] = json.loads(files(__package__).joinpath("tables.json").read_text())
    return tables[name]


@cache
def family(one_sided: bool) -> Tables:
    rows = load("one_sided" if one_sided else "two_sided")
    freq = torch.zeros(len(rows), _ALPHABET, dtype=torch.int64)
    for c, row in enumerate(rows):
        freq[c, : len(row)] = torch.tensor(row)
    cum = freq.cumsum(1) - freq
    size = torch.tensor([len(row) for row in rows])
    origin = torch.zeros_like(size) if one_sided else size // 2
    column = torch.stack([torch.repeat_interleave(torch.arange(_ALPHABET), row) for row in freq])
    bias = torch.arange(PROB_SCALE) - cum.gather(1, column)
    return Tables(freq, cum, origin, size, column - origin[:, None], freq.gather(1, column), bias)


@cache
def covered_radius() -> Tensor:
    """Largest |residual| that every two-sided class up to MAX_CLASS can hold, int64 `[MAX_CLASS + 1]`, ascending."""
    tables = family(False)
    radius = []
    for c in range(MAX_CLASS + 1):
        shift = low_shift(c)
        reach = int(tables.origin[c - 3 * shift])
        # (r + h) >> k <= reach for all r up to (reach + 1)*2**k - h - 1; the negative side reaches one further.
        radius.append(((reach + 1) << shift) - ((1 << shift) >> 1) - 1)
    return torch.tensor(radius).cummax(0).values


def low_shift(scale_class: int) -> int:
    """Raw low bits of a two-sided class: 0 up to the widest table, then one more every octave."""
    last = family(False).count - 1
    return 0 if scale_class <= last else (scale_class - last + 2) // 3


def split_class(scale_class: Tensor) -> tuple[Tensor, Tensor]:
    """(table, shift) of two-sided classes, int64."""
    last = family(False).count - 1
    shift = torch.where(scale_class <= last, 0, (scale_class - last + 2) // 3)
    return scale_class - 3 * shift, shift
