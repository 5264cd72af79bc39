"""What the codecs are compared with: bare device copies, a cast to fp8 and back, nvCOMP's ANS where it is installed."""

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvferry.bench.codec_batch import LEGS, Batch, Row, Timer
from kvferry.blocks import as_bits
from kvferry.device import cuda_copy_, cuda_copy_d2d, side_stream
from kvferry.errors import KVFerryError

NVCOMP_TYPES = {"|u1": torch.uint8, "<f2": torch.float16}
"""How nvCOMP is told to see the values: as bytes, and as 16-bit floats (of bfloat16 too: it has no type for that)."""
NO_NVCOMP = "nvCOMP is not installed (pip install nvidia-nvcomp-cu13): its rows are left out"


def measure_ceiling(timer: Timer, num_bytes: int, device: torch.device) -> Row:
    """Time a copy of `num_bytes` within the device; from then on `timer` compares with what it reached."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = cuda_copy_d2d if device.type == "cuda" else cuda_copy_
    leg = timer.legs({"copy": lambda number: copy(target, source, True)}, 1, num_bytes)["copy"]
    if not torch.equal(source, target):
        raise KVFerryError("the device copy did not copy")
    timer.bytes_per_s = 2 * num_bytes / (leg["median_us"] / 1e6)
    found = {name: leg[name] for name in ("repeats", "median_us", "p99_us")}
    return {"num_bytes": num_bytes, "read_and_written_gb_per_s": timer.bytes_per_s / 1e9, **found}


def measure_baselines(batch: Batch, timer: Timer, sigma: float) -> tuple[list[Row], list[str]]:
    """(rows, notes on what is missing), on the batch's values without pages between them. `sigma`: what errors are
    compared with. Raises `KVFerryError` where a round trip is not what it should be."""
    values = batch.contiguous()
    rows = [_copies(batch, timer, values)]
    if values.element_size() > 1:
        rows.append(_fp8(batch, timer, values, sigma))
    if values.device.type != "cuda":
        return rows, []
    try:
        nvcomp = import_module("nvidia.nvcomp")
    except ImportError:
        return rows, [NO_NVCOMP]
    notes = []
    for name, dtype in NVCOMP_TYPES.items():
        try:
            rows.append(_nvcomp(nvcomp, batch, timer, values, name, dtype))
        except Exception as error:  # what an optional package raises must not cost the run
            notes.append(f"nvCOMP ANS {name} failed and is left out: {type(error).__name__}: {error}")
    return rows, notes


def _row(
    batch: Batch, timer: Timer, method: str, ratio: float, error: float | None, legs: tuple[Any, Any], **how: bool
) -> Row:
    facts = {"method": method, "mode": None, "packing": None, "bound_sigma": None, "num_sms": None, "ratio": ratio}
    moved = batch.raw_bytes * (1 + 1 / ratio)
    measured = timer.row(dict(zip(LEGS, legs, strict=True)), batch.sets, batch.raw_bytes, moved, **how)
    return facts | {"error_over_bound": error} | batch.facts | measured


def _copies(batch: Batch, timer: Timer, values: Tensor) -> Row:
    other = torch.empty_like(values)
    copy = cuda_copy_d2d if values.device.type == "cuda" else cuda_copy_
    legs = (
        lambda number: copy(other[number], values[number], True),
        lambda number: copy(values[number], other[number], True),
    )
    for number in range(batch.sets):
        legs[0](number)
    if not torch.equal(as_bits(values), as_bits(other)):
        raise KVFerryError("the device copy did not copy")
    return _row(batch, timer, "device copy", 1.0, 0.0, legs)


def _fp8(batch: Batch, timer: Timer, values: Tensor, sigma: float) -> Row:
    small = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    back = torch.empty_like(values)
    legs = (
        lambda number: small[number].copy_(values[number]),
        lambda number: back[number].copy_(small[number]),
    )
    for leg in legs:
        for number in range(batch.sets):
            leg(number)
    worst = batch.error_over_bound(sigma, lambda layer: (values[:, layer].flatten(0, 1), back[:, layer].flatten(0, 1)))
    error = worst if math.isfinite(worst) else None
    return _row(batch, timer, "fp8 e4m3 cast", float(values.element_size()), error, legs)


def _nvcomp(nvcomp: Any, batch: Batch, timer: Timer, values: Tensor, name: str, dtype: torch.dtype) -> Row:
    """nvCOMP ANS through its Python package as documented: one call a set, output allocated by it. Its calls wait for
    the device."""
    stream = side_stream(values.device.index)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        codec = nvcomp.Codec(
            algorithm="ANS", device_id=values.device.index, cuda_stream=stream.cuda_stream, data_type=name
        )
        arrays = [nvcomp.as_array(part.flatten().view(dtype), stream.cuda_stream) for part in values]
        coded = [codec.encode(array) for array in arrays]
        stream.synchronize()
        for part, array in zip(values, coded, strict=True):
            back = codec.decode(array)
            stream.synchronize()
            found = torch.as_tensor(back, device=values.device).flatten().view(torch.uint8)
            if not torch.equal(found, part.flatten().view(torch.uint8)):
                raise KVFerryError("its round trip is not bit-identical")
        encoded = sum(int(array.buffer_size) for array in coded) / batch.sets
        legs = (lambda number: codec.encode(arrays[number]), lambda number: codec.decode(coded[number]))
        method, ratio = f"nvCOMP {nvcomp.__version__} ANS {name}", batch.raw_bytes / encoded
        row = _row(batch, timer, method, ratio, 0.0, legs, waits=True)
        stream.synchronize()
    return row
