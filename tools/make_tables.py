"""Make the frequency tables of the `ans` packer from a model of a KV channel. Not run by users: the result is data.

The model knows no language model. Two-sided tables: a channel is Gaussian or Laplacian noise of some scale around some
mean, quantised to integers, centred and classified exactly as the packer does it; the table of a class is what such
channels contain. One-sided tables: the same noise around means from none to much larger than the noise, in bfloat16,
and the distance of each value's exponent from the channel's largest. Draws are seeded; the committed tables are the
format, so a rerun (another NumPy's generator, say) that differs must not replace them: `--check` compares, `--write` is
for a new version.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

PROB_SCALE = 1024
TOKENS = 64
CHANNELS = 400_000
MAX_RADIUS = 31
NUM_TWO_SIDED = 17
NUM_ONE_SIDED = 16
ONE_SIDED_SYMBOLS = 16
# A symbol left out costs 48 bits each time it occurs (position and value, plus what is coded in its place); one kept
# costs the others log2(1024/1023) = 0.0014 bits. So symbols rarer than this are left out.
KEEP_PROBABILITY = 0.0014 / 40
PATH = Path(__file__).parents[1] / "src/kvferry/packing/ans/tables.json"


def noise(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Unit-variance noise, float32 `[channels, TOKENS]`: Gaussian in one half of the channels, Laplacian in the
    other."""
    half = channels // 2
    gauss = rng.standard_normal((half, TOKENS), dtype=np.float32)
    laplace = rng.laplace(scale=2**-0.5, size=(channels - half, TOKENS)).astype(np.float32)
    return np.concatenate([gauss, laplace])


def normalise(counts: np.ndarray) -> list[int]:
    """Integer frequencies that sum to PROB_SCALE: symbols too rare to keep get 0, every kept one at least 1."""
    prob = counts / counts.sum()
    freq = np.where(prob >= KEEP_PROBABILITY, np.maximum(np.rint(prob * PROB_SCALE), 1), 0).astype(np.int64)
    while (excess := int(freq.sum()) - PROB_SCALE) != 0:
        # Take from (or give to) the symbol that loses least by it, one count at a time.
        step = -1 if excess > 0 else 1
        movable = freq + step >= 1
        cost = np.where(
            movable & (freq > 0), prob * np.abs(np.log2(np.maximum(freq, 1) / np.maximum(freq + step, 1))), np.inf
        )
        freq[int(np.argmin(cost)) if excess > 0 else int(np.argmax(np.where(np.isfinite(cost), cost, -1)))] += step
    return [int(f) for f in freq]


def two_sided() -> list[list[int]]:
    rng = np.random.default_rng(20261120)
    tables = [[PROB_SCALE]]
    counts = np.zeros((NUM_TWO_SIDED, 2 * MAX_RADIUS + 1))
    for _ in range(4):
        scale = np.exp2(rng.uniform(-4, 2.6, (CHANNELS, 1)).astype(np.float32))
        mean = rng.uniform(-0.5, 0.5, (CHANNELS, 1)).astype(np.float32)
        # Interleave the two noises over the scales.
        q = np.rint(rng.permutation(noise(rng, CHANNELS)) * scale + mean).astype(np.int64)
        total = q.sum(1, keepdims=True)
        spread = TOKENS * (q * q).sum(1, keepdims=True) - total * total
        residual = q - (2 * total + TOKENS) // (2 * TOKENS)
        with np.errstate(divide="ignore"):
            index = np.floor(1.5 * (np.log2(spread / TOKENS**2) + 7))
        index = np.where(spread == 0, 0, np.maximum(index, 1)).astype(np.int64)
        keep = (index < NUM_TWO_SIDED) & (np.abs(residual) <= MAX_RADIUS)
        flat = (index * (2 * MAX_RADIUS + 1) + residual + MAX_RADIUS)[keep]
        counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
    for row in counts[1:]:
        freq = normalise(row + row[::-1])
        radius = max(abs(i - MAX_RADIUS) for i, f in enumerate(freq) if f)
        freq = freq[MAX_RADIUS - radius : MAX_RADIUS + radius + 1]
        tables.append(symmetric(freq))
    return tables


def symmetric(freq: list[int]) -> list[int]:
    """The same table with equal frequencies left and right of 0 and none inside the range absent."""
    radius = len(freq) // 2
    side = [max(1, (freq[radius - i] + freq[radius + i]) // 2) for i in range(1, radius + 1)]
    while not divides_exactly(PROB_SCALE - 2 * sum(side)):
        side[0] += 1
    return [*side[::-1], PROB_SCALE - 2 * sum(side), *side]


def divides_exactly(freq: int) -> bool:
    """Whether the encoder's division by `freq` can be one 32-bit multiplication: the reciprocal's error times the
    largest state before a symbol is coded (freq * 2**22) must not reach the quotient's last bit."""
    if freq == 1:
        return True
    bits = (freq - 1).bit_length()
    reciprocal = ((1 << (bits + 31)) + freq - 1) // freq
    return (reciprocal * freq - (1 << (bits + 31))) * min(freq << 22, 1 << 32) < 1 << (bits + 31)


def one_sided() -> list[list[int]]:
    rng = np.random.default_rng(20261121)
    counts = np.zeros((NUM_ONE_SIDED, ONE_SIDED_SYMBOLS))
    for _ in range(4):
        near = rng.standard_normal((CHANNELS, 1)) * 0.7
        far = np.exp2(rng.uniform(-2, 5, (CHANNELS, 1)))
        mean = np.where(rng.random((CHANNELS, 1)) < 0.5, near, far).astype(np.float32)
        value = (rng.permutation(noise(rng, CHANNELS)) + mean) * np.exp2(rng.random((CHANNELS, 1))).astype(np.float32)
        exponent = (value.view(np.uint32).astype(np.int64) + 0x8000) >> 23 & 255  # as bfloat16 rounds
        symbol = exponent.max(1, keepdims=True) - exponent
        index = np.minimum(5 * symbol.sum(1, keepdims=True) // TOKENS, NUM_ONE_SIDED - 1)
        keep = symbol < ONE_SIDED_SYMBOLS
        counts += np.bincount((index * ONE_SIDED_SYMBOLS + symbol)[keep], minlength=counts.size).reshape(counts.shape)
    tables = []
    for row in counts:
        freq = normalise(row)
        last = max(i for i, f in enumerate(freq) if f)
        side = [max(1, f) for f in freq[: last + 1]]
        side[int(np.argmax(side))] += PROB_SCALE - sum(side)
        tables.append(side)
    return tables


def main(write: Annotated[bool, typer.Option(help="Replace the committed tables.")] = False) -> None:
    """Make the tables, and compare them with the committed ones or (`--write`) replace those."""
    tables = {"two_sided": two_sided(), "one_sided": one_sided()}
    rows = [row for family in tables.values() for row in family]
    assert all(sum(row) == PROB_SCALE and min(row) >= 1 and all(map(divides_exactly, row)) for row in rows)
    if write:
        rows = [
            f'"{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in family) + "\n]"
            for name, family in tables.items()
        ]
        PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    same = json.loads(PATH.read_text()) == tables
    typer.echo(f"{PATH.name}: {'same as the model' if same else 'differs from what this run made'}")
    raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
