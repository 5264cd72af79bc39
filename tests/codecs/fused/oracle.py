"""Tiles of the `bitpack` packer written and read one value at a time, from docs/format.md alone: what kernels and
reference are both tested against. It shares no code with either, and decides the bound in exact fractions.
"""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch

EXPONENT_BITS = {"bfloat16": 8, "float16": 5, "float32": 8, "float8_e4m3fn": 4, "float8_e5m2": 5}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3fn": 1, "float8_e5m2": 1}
PLANES = {"bfloat16": 1, "float16": 1, "float32": 3, "float8_e4m3fn": 0, "float8_e5m2": 0}
WIDTHS = (0, 4, 8, 16, 32)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _dense(values: list[int], width: int) -> bytes:
    total = sum(value << (i * width) for i, value in enumerate(values))
    return total.to_bytes(4 * -(-len(values) * width // 32), "little")


def _groups(rows: list[list[int]]) -> list[list[int]]:
    """Columns of 32 tokens, by token block, then channel."""
    return [[row[c] for row in rows[t : t + 32]] for t in range(0, len(rows), 32) for c in range(len(rows[0]))]


def _small(values: list[int]) -> tuple[int, int, bytes]:
    """(smallest, code, section) of bases or classes."""
    smallest = min(values, default=0)
    offsets = [v - smallest for v in values]
    code = next(i for i, width in enumerate(WIDTHS) if max(offsets, default=0) < 1 << width)
    total = sum(v << (i * WIDTHS[code]) for i, v in enumerate(offsets))
    return smallest, code, _pad(total.to_bytes(-(-len(values) * WIDTHS[code] // 8), "little"))


def _zigzag(v: int) -> int:
    return 2 * v if v >= 0 else -2 * v - 1


def _coded(values, mode, planes, steps, step, exact, bits, itemsize) -> bytes:
    bases, classes, low = [], [], b""
    for group in _groups(values):
        if mode in ("fixed", "lossless"):
            bases.append(min(group))
            unsigned = [v - min(group) for v in group]
            apart = 0
        else:
            v = [group[0]] + [b - a for a, b in pairwise(group)]
            unsigned = [_zigzag(x) for x in v]
            whole, rest = max(unsigned).bit_length(), max(unsigned[1:], default=0).bit_length()
            apart = int(mode == "outlier" and (whole - rest) * len(v) > 16)
            if apart:
                bases.append(v[0])
                unsigned[0] = 0
        width = max(unsigned).bit_length()
        classes.append(2 * width + apart if mode == "outlier" else width)
        low += _dense(unsigned, width)
    base0, base_code, base_section = _small(bases)
    class0, class_code, class_section = _small(classes)
    header = bytes([1, base_code, class_code, class0]) + bytes(2) + len(exact).to_bytes(2, "little")
    header += base0.to_bytes(4, "little", signed=True) + np.float32(step).tobytes()
    positions = b"".join((t * len(bits[0]) + c).to_bytes(2, "little") for t, c in exact)
    stored = b"".join(bits[t][c].to_bytes(itemsize, "little") for t, c in exact)
    return header + _pad(planes) + _pad(steps) + class_section + base_section + low + _pad(positions) + _pad(stored)


def _or_raw(coded: bytes, bits: list[list[int]], itemsize: int) -> bytes:
    raw = bytes(4) + _pad(b"".join(b.to_bytes(itemsize, "little") for row in bits for b in row))
    return coded if len(coded) < len(raw) else raw


def encode_lossless(bits: list[list[int]], dtype: str) -> bytes:
    """A tile of bit patterns `[T][C]`."""
    planes, itemsize = PLANES[dtype], ITEMSIZE[dtype]
    mantissa = 8 * itemsize - 1 - EXPONENT_BITS[dtype]
    rest = mantissa + 1 - 8 * planes

    def split(b: int) -> tuple[int, int]:
        exponent = b >> mantissa & ((1 << EXPONENT_BITS[dtype]) - 1)
        joined = b >> (8 * itemsize - 1) << mantissa | b & ((1 << mantissa) - 1)
        return (-exponent << rest) + (joined >> 8 * planes), joined

    values = [[split(b)[0] for b in row] for row in bits]
    data = bytes(split(b)[1] >> 8 * p & 255 for p in range(planes) for row in bits for b in row)
    return _or_raw(_coded(values, "lossless", data, b"", 0.0, [], bits, itemsize), bits, itemsize)


def encode_bounded(tile: torch.Tensor, step, inverse, bound, mode: str, channel_steps: bool) -> bytes:
    """A tile `[T, C]`; `step`, `inverse` and `bound` are float32 arrays of one number a channel."""
    dtype = str(tile.dtype).removeprefix("torch.")
    itemsize = tile.element_size()
    bits = (tile.view({2: torch.int16, 4: torch.int32}[itemsize]).long() & ((1 << 8 * itemsize) - 1)).tolist()
    x = tile.float().numpy()
    field = (1 << EXPONENT_BITS[dtype]) - 1 << 8 * itemsize - 1 - EXPONENT_BITS[dtype]

    def deliver(q: int, c: int) -> float:
        return float((torch.tensor(float(q)) * torch.tensor(step[c])).to(tile.dtype))

    def within(value: float, q: int, c: int) -> bool:
        out = deliver(q, c)
        return np.isfinite(out) and abs(Fraction(value) - Fraction(out)) <= Fraction(float(bound[c]))

    values, exact = [[0] * tile.shape[1] for _ in bits], []
    for t, c in np.ndindex(*x.shape):
        with np.errstate(all="ignore"):
            scaled = x[t, c] * inverse[c]
        special = bits[t][c] & field == 0 and bits[t][c] != 0
        kept = False
        if abs(scaled) < 2**22:
            q, value = int(np.rint(scaled)), float(x[t, c])
            other = q + (1 if value > deliver(q, c) else -1)
            chosen = next((k for k in (q, other) if within(value, k, c)), None)
            values[t][c] = q if chosen is None else chosen
            kept = chosen is not None and not special
        if not kept:
            exact.append((t, c))
    steps = b"".join(np.float32(s).tobytes()[2:] for s in step) if channel_steps else b""
    header_step = 0.0 if channel_steps else step[0]
    return _or_raw(_coded(values, mode, b"", steps, header_step, exact, bits, itemsize), bits, itemsize)
