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

PROB_SCALE = 256
TOKENS = 64
CHANNELS = 400_000
MAX_RADIUS = 31
NUM_TWO_SIDED = 17
NUM_ONE_SIDED = 16
ONE_SIDED_SYMBOLS = 16
# A symbol left out costs 48 bits each time it occurs in float32 (position and value, plus what is coded in its place),
# less in the others; one kept costs all others log2(256/255) = 0.0056 bits. So symbols rarer than about 0.0056/40 are
# left out.
LEFT_OUT_BITS = 48.0
PATH = Path(__file__).parents[1] / "src/kvferry/packing/ans/tables.json"


def noise(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Unit-variance noise, float32 `[channels, TOKENS]`: Gaussian in one half of the channels, Laplacian in the
    other."""
    half = channels // 2
    gauss = rng.standard_normal((half, TOKENS), dtype=np.float32)
    laplace = rng.laplace(scale=2**-0.5, size=(channels - half, TOKENS)).astype(np.float32)
    return np.concatenate([gauss, laplace])


def divides_exactly(freq: int) -> bool:
    """Whether the encoder's division by `freq` can be one 32-bit multiplication: the reciprocal's error times the
    bound of the states that it divides (freq * 2**24) must not reach the quotient's last bit."""
    if freq == 1:
        return True
    bits = (freq - 1).bit_length()
    reciprocal = ((1 << (bits + 31)) + freq - 1) // freq
    return (reciprocal * freq - (1 << (bits + 31))) * min(freq << 24, 1 << 32) < 1 << (bits + 31)


# Bits that a symbol of each frequency costs; infinite where the encoder could not divide.
BITS = np.array(
    [np.inf] + [np.log2(PROB_SCALE / f) if divides_exactly(f) else np.inf for f in range(1, PROB_SCALE + 1)]
)


def best_frequencies(prob: np.ndarray, copies: list[int]) -> list[int]:
    """The frequencies that code symbols of probability `prob` in the fewest bits, exactly: all of the first n symbols
    get one, and those behind them, left out, cost LEFT_OUT_BITS. `copies[i]` symbols share entry i (2 for a symbol on
    both sides of 0): the frequencies, each as often, sum to PROB_SCALE."""
    # cost[s]: the first i symbols with frequencies that sum to s; chosen[i][s]: that of the last of them.
    cost = np.full(PROB_SCALE + 1, np.inf)
    cost[0] = 0.0
    chosen: list[np.ndarray] = []
    best, best_count = np.inf, 0
    for i, p in enumerate(prob):
        previous, cost, choice = cost, np.full(PROB_SCALE + 1, np.inf), np.zeros(PROB_SCALE + 1, dtype=np.int64)
        for f in (f for f in range(1, PROB_SCALE // copies[i] + 1) if np.isfinite(BITS[f])):
            room = PROB_SCALE + 1 - f * copies[i]
            total = previous[:room] + p * BITS[f]
            better = total < cost[f * copies[i] :]
            cost[f * copies[i] :][better] = total[better]
            choice[f * copies[i] :][better] = f
        chosen.append(choice)
        whole = cost[PROB_SCALE] + prob[i + 1 :].sum() * LEFT_OUT_BITS
        if whole < best:
            best, best_count = float(whole), i + 1
    left, freq = PROB_SCALE, []
    for i in range(best_count - 1, -1, -1):
        freq.append(int(chosen[i][left]))
        left -= freq[-1] * copies[i]
    return freq[::-1]


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
        prob = (row + row[::-1])[MAX_RADIUS:] / row.sum()
        prob[0] /= 2
        middle, *side = best_frequencies(prob, [1] + [2] * MAX_RADIUS)
        tables.append([*side[::-1], middle, *side])
    return tables


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
    return [best_frequencies(row / row.sum(), [1] * ONE_SIDED_SYMBOLS) for row in counts]


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
