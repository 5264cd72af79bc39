"""Speed of the fused GPU kernels on real KV: encode, compaction, decode, by device events.

    python -m benchmarks.codec_speed --kv kv.safetensors --out results.json

The caches are repeated until they fill the size. Bounds are 0.2 standard deviations of each layer's K or V. In the same
run every case is checked first: the encoded bytes of one copy equal the CPU reference's, the decoded values keep the
bound.
GB/s count the bytes of the uncompressed tensor.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

import kvferry
from benchmarks.machine import describe
from kvferry.codecs import fused
from kvferry.codecs.bounded.reference import Steps
from kvferry.codecs.fused import ans, bitpack
from kvferry.codecs.fused.compaction import compact
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.tiling import plan_tensor

SIGMA = 0.2
MODES = ("fixed", "plain", "outlier", None)


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs after three to warm up."""
    for _ in range(3):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def summary(seconds: list[float], num_bytes: int) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] * 1e6,
        "gb_per_s": num_bytes / statistics.median(ordered) / 1e9,
    }


class Case:
    """One mode and packing on a batch `x` `[rows, tokens, channels]` whose rows have the bounds `row_bounds`."""

    def __init__(self, x: Tensor, row_bounds: Tensor, mode: str | None, packing: str) -> None:
        self.x, self.mode, self.packing = x, mode, packing
        _, plan = plan_tensor(x, flat=False)
        self.plan = DevicePlan.of(plan, x.device)
        self.out = torch.empty_like(x)
        self.status = torch.ones(self.plan.num_tiles, dtype=torch.int32, device=x.device)
        self.steps: Steps | None = None
        if mode is not None:
            tiles_per_row = self.plan.num_tiles // x.shape[0]
            parts = []
            for bound in row_bounds.unique().tolist():
                codec = kvferry.Bounded(bound, relative=False, mode=mode, packing=packing)
                parts.append((row_bounds == bound, fused.bounded_steps(x, self.plan, codec)))
            merged = parts[0][1]
            for rows, steps in parts[1:]:
                mine = rows.repeat_interleave(tiles_per_row)
                merged = Steps(
                    torch.where(mine, steps.step, merged.step),
                    torch.where(mine, steps.inverse, merged.inverse),
                    torch.where(mine, steps.bound, merged.bound),
                )
            self.steps = merged

    def encode(self) -> tuple[Tensor, Tensor]:
        if self.packing == "ans":
            if self.steps is None:
                return ans.encode_lossless(self.x, self.plan)
            return ans.encode_bounded(self.x, self.plan, self.steps, self.mode or "")
        if self.steps is None:
            return bitpack.encode_lossless(self.x, self.plan)
        step, inverse, bound = self.steps.step, self.steps.inverse, self.steps.bound
        return bitpack.encode_bounded(self.x, self.plan, step, inverse, bound, mode=self.mode, channel_steps=False)

    def decode(self, payload: Tensor, starts: Tensor, sizes: Tensor) -> None:
        if self.packing == "ans":
            ans.decode(payload, starts, sizes, self.out, self.plan, self.status, mode=self.mode)
        elif self.mode is None:
            bitpack.decode_lossless(payload, starts, sizes, self.out, self.plan, status=self.status)
        else:
            bitpack.decode_bounded(
                payload, starts, sizes, self.out, self.plan, mode=self.mode, channel_steps=False, status=self.status
            )

    def check(self, row_bounds: Tensor) -> None:
        """Raise unless the decoded batch is what the guarantee says."""
        if int(self.status.sum()):
            raise RuntimeError(f"{int(self.status.sum())} tiles were refused by the decoder")
        if self.mode is None:
            if not torch.equal(self.x.view(torch.int16), self.out.view(torch.int16)):
                raise RuntimeError("lossless is not bit-identical")
            return
        for start in range(0, len(self.x), 64):
            part = slice(start, start + 64)
            error = (self.x[part].double() - self.out[part].double()).abs().amax((1, 2))
            if bool((error > row_bounds[part].double()).any()):
                raise RuntimeError("the bound is broken")


def fill(tensors: dict[str, Tensor], num_bytes: int) -> tuple[Tensor, Tensor]:
    """(batch `[rows, tokens, channels]` of about `num_bytes`, bound of each row), on the GPU."""
    rows, bounds = [], []
    for tensor in tensors.values():
        flat = tensor.flatten(0, 1).cuda()
        rows.append(flat)
        bounds.append(torch.full((len(flat),), SIGMA * float(tensor.float().std()), device="cuda"))
    one, bound = torch.cat(rows), torch.cat(bounds)
    wanted = max(1, num_bytes // (one[0].numel() * one.element_size()))
    index = torch.arange(wanted, device="cuda") % len(one)
    # A small batch takes rows of all layers rather than the first ones.
    if wanted < len(one):
        index = torch.arange(wanted, device="cuda") * len(one) // wanted
    return one[index], bound[index]


def check_reference(tensors: dict[str, Tensor], mode: str | None, packing: str) -> None:
    """Raise unless the GPU's frames equal the CPU reference's, byte for byte, on the first layer's K and V."""
    for tensor in list(tensors.values())[:2]:
        part = tensor[:1, :, :512]
        bound = SIGMA * float(tensor.float().std())
        codec: kvferry.Codec = kvferry.Lossless(packing)
        if mode is not None:
            codec = kvferry.Bounded(bound, relative=False, mode=mode, packing=packing)
        if kvferry.compress(part, codec) != kvferry.compress(part.cuda(), codec):
            raise RuntimeError(f"{mode} {packing}: the GPU's bytes differ from the reference's")


def main(
    kv: Annotated[Path, typer.Option(help="safetensors file of benchmarks.dump_kv.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
    sizes: Annotated[str, typer.Option(help="Batch sizes in MiB.")] = "8,64,512",
    packings: str = "ans,bitpack",
    repeats: int = 30,
) -> None:
    """Measure, print a table, write JSON."""
    tensors = load_file(kv)
    results = []
    table = Table("MiB", "mode", "packing", "ratio", "encode GB/s", "compact GB/s", "decode GB/s")
    for packing in packings.split(","):
        for mode in MODES:
            check_reference(tensors, mode, packing)
            for mib in map(int, sizes.split(",")):
                x, row_bounds = fill(tensors, mib << 20)
                case = Case(x, row_bounds, mode, packing)
                scratch, lengths = case.encode()
                payload, starts = compact(scratch, lengths)
                case.out.fill_(float("nan"))
                case.decode(payload, starts, lengths)
                case.check(row_bounds)
                total = payload.numel()
                row = {"mib": mib, "mode": mode or "lossless", "packing": packing, "ratio": x.nbytes / total}
                row["shape"] = list(x.shape)
                row["encode"] = summary(timed(case.encode, repeats), x.nbytes)
                row["compact"] = summary(
                    timed(lambda s=scratch, n=lengths, t=total: compact(s, n, total=t), repeats), x.nbytes
                )
                row["decode"] = summary(
                    timed(lambda c=case, p=payload, s=starts, n=lengths: c.decode(p, s, n), repeats), x.nbytes
                )
                results.append(row)
                speeds = (f"{row[stage]['gb_per_s']:.0f}" for stage in ("encode", "compact", "decode"))
                table.add_row(str(mib), row["mode"], packing, f"{row['ratio']:.3f}", *speeds)
                del case, scratch, payload
    Console(width=100).print(table)
    if out is not None:
        facts = {"machine": describe(), "data": kv.stem, "bound_sigma": SIGMA, "repeats": repeats, "results": results}
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
