"""Launches the fused `ans` kernels (ans_*.cu): one warp a tile, compiled for the device and the case at first use."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, as_bits
from kvferry.codecs.bounded.reference import BASES as MODE_BASES
from kvferry.codecs.bounded.reference import Steps
from kvferry.codecs.fused.plan import DevicePlan
from kvferry.codecs.lossless.reference import SPLITS
from kvferry.codecs.tiling import TILE_VALUES
from kvferry.device.nvrtc import I64, POINTER, Kernel, cached_cubin, load_kernel
from kvferry.packing.ans.tables import PROB_SCALE, covered_radius, family
from kvferry.packing.columns import Bases

BASES = {Bases.ALL: 0, Bases.NONE: 1, Bases.APART: 2}


@dataclass(frozen=True)
class _Shape:
    """How a kernel is launched: warps a block (as in its source), and blocks a multiprocessor: its registers' bound."""

    warps: int
    blocks: int


# H200, bf16, real KV. Encode at 512 / 64 MiB with 3, 4, 5 blocks: 471 / 336, 453 / 383, 462 / 368 GB/s (`fixed`), and
# 624 / 467, 588 / 529, 588 / 496 (`lossless`). Decode: two blocks are what the tables leave room for in shared memory.
SHAPES = {"kvf_encode": _Shape(8, 3), "kvf_decode": _Shape(16, 2)}


PARTS = {
    "kvf_encode": ("ans_common.cu", "ans_choose.cu", "ans_encode.cu"),
    "kvf_decode": ("ans_common.cu", "ans_decode.cu"),
}


class _Source(ctypes.Structure):
    """`Source` of ans_common.cu."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("channels", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("channel_stride", ctypes.c_int64),
        ("num_tiles", ctypes.c_int32),
    )

    @classmethod
    def of(cls, tensor: Tensor, plan: DevicePlan) -> "_Source":
        return cls(
            tensor.data_ptr(),
            plan.offsets.data_ptr(),
            plan.tokens.data_ptr(),
            plan.channels.data_ptr(),
            plan.token_stride,
            plan.channel_stride,
            plan.num_tiles,
        )


def source_text(kernel: str) -> str:
    """CUDA C++ of `kernel`, "kvf_encode" or "kvf_decode"."""
    folder = files(__package__)
    return "".join(folder.joinpath(part).read_text() for part in PARTS[kernel])


def defines(kernel: str, dtype: torch.dtype, mode: str | None, channel_steps: bool) -> dict[str, int]:
    """What the kernel's source is compiled with; `mode` None is lossless."""
    split = SPLITS[dtype]
    return {
        "KVF_BOUNDED": int(mode is not None),
        "KVF_ITEM": split.itemsize,
        "KVF_MANTISSA": split.mantissa_bits,
        "KVF_EXPONENT": split.exponent_bits,
        "KVF_BASES": BASES[MODE_BASES[mode] if mode else Bases.ALL],
        "KVF_CHANNEL_STEPS": int(channel_steps),
        f"{kernel.upper()}_BLOCKS": SHAPES[kernel].blocks,
    }


def encoder_entries(one_sided: bool) -> Tensor:
    """The encoder's view of a family: int32 `[(tables + 1) * 64, 2]`, the reciprocal of the frequency, and frequency,
    bias and the reciprocal's shift packed as ans_encode.cu reads them; 0 where there is no symbol.

    Symbol s is entry s, or s + 32 in the two-sided family; the outermost entries are empty. Behind the family's tables
    comes one whose only symbol, 0, has probability 1: what lanes without a channel code.

    Dividing by multiplication (T. Granlund and P. Montgomery, PLDI 1994): x // f = (x * ceil(2**(31+s) / f)) >> (31+s),
    exact for the x that occur (below f * 2**22) if the error of the reciprocal times the largest x stays below
    2**(31+s).
    """
    tables = family(one_sided)
    middle = 0 if one_sided else 32
    rows = []
    for c in range(tables.count):
        origin = int(tables.origin[c])
        entries = [(0, 0)] * 64
        for column in range(int(tables.size[c])):
            f, cum = int(tables.freq[c, column]), int(tables.cum[c, column])
            if f == 1:
                # x * (2**32 - 1) >> 32 = x - 1; the bias makes up for it.
                reciprocal, shift, bias = 2**32 - 1, 0, cum + PROB_SCALE - 1
            else:
                bits = (f - 1).bit_length()
                reciprocal, shift, bias = ((1 << (bits + 31)) + f - 1) // f, bits - 1, cum
                error = reciprocal * f - (1 << (bits + 31))
                if error * min(f << 22, 1 << 32) >= 1 << (bits + 31):
                    raise ValueError(f"frequency {f} has no exact 32-bit reciprocal; the tables must avoid it")
            entries[column - origin + middle] = (reciprocal, f | bias << 11 | shift << 22)
        rows += entries
    idle = [(0, 0)] * 64
    idle[middle] = (1 << 31, PROB_SCALE | (PROB_SCALE.bit_length() - 2) << 22)
    rows += idle
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def decoder_slots(one_sided: bool) -> Tensor:
    """The decoder's view: int32 `[(tables + 1) * 1024]`, symbol (8 bits, signed), frequency (12), slot - cum (12); the
    last table is the one of lanes without a channel."""
    tables = family(one_sided)
    slots = (tables.symbol << 24 | tables.slot_freq << 12 | tables.slot_bias).flatten()
    return torch.cat([slots, PROB_SCALE << 12 | torch.arange(PROB_SCALE)]).to(torch.int32)


@cache
def _encoder_tables(one_sided: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    return encoder_entries(one_sided).to(device), covered_radius().to(torch.int32).to(device)


@cache
def _decoder_table(one_sided: bool, device: torch.device) -> Tensor:
    return decoder_slots(one_sided).to(device)


@cache
def _kernel(
    name: str, dtype: torch.dtype, mode: str | None, channel_steps: bool, device: int, shared_bytes: int
) -> tuple[Kernel, int]:
    """The kernel, and how many of its blocks the whole device holds at a time."""
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    cubin = cached_cubin(source_text(name), arch, defines(name, dtype, mode, channel_steps))
    kernel = load_kernel(cubin, name, device, shared_bytes)
    threads = 32 * SHAPES[name].warps
    return kernel, kernel.resident_blocks(threads, shared_bytes) * properties.multi_processor_count


def _launch(
    name: str, kernel: Kernel, resident: int, num_tiles: int, shared_bytes: int, *arguments: tuple[Any, Any]
) -> None:
    warps = SHAPES[name].warps
    values, types = zip(*arguments, strict=True)
    kernel.launch(min(resident, -(-num_tiles // warps)), 32 * warps, shared_bytes, values, types)


def row_bytes(itemsize: int) -> int:
    """Scratch a tile needs: its raw size, and behind it a word and a position for every value while it is coded."""
    return (4 + TILE_VALUES * itemsize + 15) // 16 * 16 + 4 * TILE_VALUES


def _encode(src: Tensor, plan: DevicePlan, steps: Steps | None, mode: str | None) -> tuple[Tensor, Tensor]:
    bits, device = as_bits(src), src.device
    width = row_bytes(bits.element_size())
    scratch = torch.empty(plan.num_tiles, width, dtype=torch.uint8, device=device)
    sizes = torch.empty(plan.num_tiles, dtype=torch.int32, device=device)
    if plan.num_tiles == 0:
        return scratch, sizes
    quantisers = torch.stack([steps.step, steps.inverse, steps.bound], -1).contiguous() if steps else sizes
    tables, radius = _encoder_tables(mode is None, device)
    channel_steps = steps is not None and steps.step.dim() == 2
    kernel, resident = _kernel("kvf_encode", src.dtype, mode, channel_steps, device.index, 0)
    _launch(
        "kvf_encode",
        kernel,
        resident,
        plan.num_tiles,
        0,
        (_Source.of(bits, plan), None),
        (quantisers.data_ptr(), POINTER),
        (tables.data_ptr(), POINTER),
        (radius.data_ptr(), POINTER),
        (scratch.data_ptr(), POINTER),
        (width, I64),
        (sizes.data_ptr(), POINTER),
    )
    return scratch, sizes


def encode_bounded(src: Tensor, plan: DevicePlan, steps: Steps, mode: str) -> tuple[Tensor, Tensor]:
    """Tiles of `src` (CUDA, bf16, fp16 or fp32): rows uint8 `[N, row_bytes]` and sizes int32 `[N]`, on the device."""
    if src.dtype not in FLOAT_DTYPES:
        raise TypeError(f"no bounded kernel for {src.dtype}")
    return _encode(src, plan, steps, mode)


def encode_lossless(src: Tensor, plan: DevicePlan) -> tuple[Tensor, Tensor]:
    """As `encode_bounded`, exact, and fp8 too."""
    return _encode(src, plan, None, None)


def decode(
    payload: Tensor,
    starts: Tensor,
    sizes: Tensor,
    dst: Tensor,
    plan: DevicePlan,
    status: Tensor,
    *,
    mode: str | None,
    channel_steps: bool = False,
) -> None:
    """Decode tiles at `starts` int64 `[N]` of `payload`, `sizes` int32 `[N]` bytes each, into `dst`; `mode` None is
    lossless.

    `status` int32 `[N]`: 1 for a tile whose bytes contradict themselves (its part of `dst` is undefined then), else 0.
    """
    if plan.num_tiles == 0:
        return
    slots = _decoder_table(mode is None, dst.device)
    shared_bytes = 4 * slots.numel()
    kernel, resident = _kernel("kvf_decode", dst.dtype, mode, channel_steps, dst.device.index, shared_bytes)
    _launch(
        "kvf_decode",
        kernel,
        resident,
        plan.num_tiles,
        shared_bytes,
        (_Source.of(as_bits(dst), plan), None),
        (payload.data_ptr(), POINTER),
        (starts.data_ptr(), POINTER),
        (sizes.data_ptr(), POINTER),
        (slots.data_ptr(), POINTER),
        (status.data_ptr(), POINTER),
    )
