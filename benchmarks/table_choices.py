"""What the `ans` packer's design choices cost, in bits per value of coded symbols on real KV.

    python -m benchmarks.table_choices --kv one.safetensors --kv other.safetensors --out results.json

For each choice the tables are drawn from the model of a channel (as tools/make_tables.py does), and real channels of 64
tokens, quantised at 0.2 standard deviations of their layer's K or V, are scored by the tables' code lengths; a value
that its table does not hold costs 32 bits more. Ideal lengths: no states, headers or rounding of the coder.
"""

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.machine import describe
from kvferry.packing.ans.tables import PROB_BITS
from kvferry.packing.ans.tables import family as tables_as_arrays

TOKENS = 64
REACH = 40
CLASSES = 17
DRAWN = 60_000


def channels(kv: dict[str, Tensor]) -> Tensor:
    """Codes of all channels, float32 `[num_channels, 64]`."""
    parts = []
    for tensor in kv.values():
        step = 0.4 * float(tensor.float().std())
        tiles = torch.round(tensor.float() / step).unflatten(2, (-1, TOKENS))
        parts.append(tiles.transpose(-1, -2).reshape(-1, TOKENS))
    return torch.cat(parts)


def drawn(noise: str, generator: torch.Generator) -> Tensor:
    """Codes of channels of the model, `[DRAWN, 64]`."""
    scale = torch.exp2(torch.rand(DRAWN, 1, generator=generator) * 8.2 - 4)
    mean = torch.rand(DRAWN, 1, generator=generator) - 0.5
    gauss = torch.randn(DRAWN, TOKENS, generator=generator)
    sign = torch.sign(torch.rand(DRAWN, TOKENS, generator=generator) - 0.5)
    laplace = torch.empty(DRAWN, TOKENS).exponential_(generator=generator) * sign / 2**0.5
    mixed = torch.where(torch.arange(DRAWN)[:, None] % 2 == 0, gauss, laplace)
    return torch.round({"gauss": gauss, "laplace": laplace, "both": mixed}[noise] * scale + mean)


def classified(codes: Tensor, centre: str, spread: str) -> tuple[Tensor, Tensor]:
    """(symbols, class of each), by the channel's centre and spread; wide channels lose low bits, which are not
    counted."""
    middle = (
        torch.floor(codes.mean(1, keepdim=True) + 0.5) if centre == "mean" else codes.median(1, keepdim=True).values
    )
    residual = codes - middle
    deviation = (
        residual.abs().mean(1, keepdim=True) * 1.2533 if spread == "mad" else codes.std(1, keepdim=True, correction=0)
    )
    index = torch.floor(3 * (torch.log2(deviation.clamp(min=1e-9)) + 3) + 1.5).clamp(min=1)
    index = torch.where(deviation == 0, 0, index).long()
    shift = torch.where(index >= CLASSES, (index - CLASSES + 3) // 3, 0)
    symbol = torch.floor((residual + torch.where(shift > 0, 2.0 ** (shift - 1), 0.0)) / 2.0**shift)
    return symbol.clamp(-REACH, REACH).long() + REACH, (index - 3 * shift).expand_as(codes)


def tables(codes: Tensor, centre: str, spread: str, bits: int) -> Tensor:
    """Frequencies `[CLASSES, 2 * REACH + 1]` that sum to 2**bits, rounded."""
    symbol, index = classified(codes, centre, spread)
    counts = torch.zeros(CLASSES, 2 * REACH + 1, dtype=torch.float64)
    counts.index_put_(
        (index.flatten(), symbol.flatten()), torch.ones(symbol.numel(), dtype=torch.float64), accumulate=True
    )
    prob = (counts + counts.flip(1)) / (2 * counts.sum(1, keepdim=True)).clamp(min=1)
    # Left out: what would cost less so, at 40 bits each time, than a count taken from all others costs.
    keep = -math.log2(1 - 2.0**-bits) / 40
    freq = torch.where(prob >= keep, torch.round(prob * 2**bits).clamp(min=1), 0)
    freq[:, REACH] += 2**bits - freq.sum(1)
    return freq


def tables_of_the_format() -> Tensor:
    """The same for the tables that the format has: the model's too, but the best frequencies that the encoder can
    divide by (tools/make_tables.py)."""
    family = tables_as_arrays(one_sided=False)
    freq = torch.zeros(CLASSES, 2 * REACH + 1, dtype=torch.float64)
    for c in range(CLASSES):
        first, size = REACH - int(family.origin[c]), int(family.size[c])
        freq[c, first : first + size] = family.freq[c, :size].double()
    return freq


def score(codes: Tensor, freq: Tensor, centre: str, spread: str, bits: int) -> dict[str, float]:
    symbol, index = classified(codes, centre, spread)
    found = freq[index, symbol]
    outside = found == 0
    instead = freq[index, REACH]
    length = bits - torch.log2(torch.where(outside, instead, found)) + 32.0 * outside
    return {"bits": float(length.mean()), "outside": float(outside.double().mean())}


def main(
    kv: Annotated[list[Path], typer.Option(help="safetensors files of benchmarks.dump_kv.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
) -> None:
    """Score the choices, print a table, write JSON."""
    real = {path.stem: channels(load_file(path)) for path in kv}
    choices = [("mean", "variance", "both", 11), ("mean", "mad", "both", 11), ("median", "variance", "both", 11)]
    choices += [("mean", "variance", noise, 11) for noise in ("gauss", "laplace")]
    choices += [("mean", "variance", "both", bits) for bits in (10, 9, 8)]
    drawings = [(*choice, "rounded") for choice in choices] + [("mean", "variance", "both", PROB_BITS, "the format's")]
    table = Table("centre", "spread", "noise", "probability bits", "frequencies", *real)
    results = []
    for centre, spread, noise, bits, made in drawings:
        if made == "rounded":
            freq = tables(drawn(noise, torch.Generator().manual_seed(1)), centre, spread, bits)
        else:
            freq = tables_of_the_format()
        scores = {name: score(codes, freq, centre, spread, bits) for name, codes in real.items()}
        results.append(
            {
                "centre": centre,
                "spread": spread,
                "noise": noise,
                "probability_bits": bits,
                "frequencies": made,
                "scores": scores,
            }
        )
        cells = (f"{s['bits']:.3f} ({s['outside']:.3%} outside)" for s in scores.values())
        table.add_row(centre, spread, noise, str(bits), made, *cells)
    Console(width=120).print(table)
    if out is not None:
        shapes = {name: list(codes.shape) for name, codes in real.items()}
        out.write_text(json.dumps({"machine": describe(), "shapes": shapes, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
