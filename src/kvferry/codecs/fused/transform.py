"""Pages to transform coefficients and back on a GPU (transform.cu): what `codecs/transform/slots.py` calls."""

import ctypes
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvferry.blocks import MANTISSA_BITS
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform.profile import SIDES
from kvferry.device.nvrtc import (
    Arguments,
    Kernel,
    cached_cubin,
    load_kernel,
    make_current,
    most_shared_bytes,
    zero_words,
)

if TYPE_CHECKING:
    from kvferry.codecs.slots import SlotCodec
    from kvferry.codecs.transform.slots import Scratch

KERNEL = "kvf_transform"
THREADS = 256
_TOKENS = 64
_STATIC_BYTES = 6 << 10
"""Of shared memory that a kernel has beside what a launch gives it: at most so much."""


@dataclass(frozen=True)
class TransformCase:
    """What a kernel is compiled for: direction, dtype of the cache, channels of a group and of a head, RoPE's channels
    of a head, whether its pairs are neighbours; whether shared memory has room for two items and what is delivered."""

    inverse: bool
    dtype: torch.dtype
    n: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    roomy: bool = True

    @property
    def defines(self) -> dict[str, int]:
        return {
            "KVF_INVERSE": int(self.inverse),
            "KVF_MANTISSA": MANTISSA_BITS[self.dtype],
            "KVF_N": self.n,
            "KVF_HEAD": self.head_dim,
            "KVF_ROTARY": self.rotary_dim,
            "KVF_INTERLEAVED": int(self.interleaved),
            "KVF_ROOMY": int(self.roomy),
        }

    @property
    def shared_bytes(self) -> int:
        row = (1 + self.roomy) * (2 * _depth(self.n) + 16) + self.roomy * (2 * self.n + 16) + 4 + 3 * 8
        return _TOKENS * row

    def fitted(self, most_shared_bytes: int) -> "TransformCase":
        """This, or what needs less shared memory than a block may have on some GPUs."""
        return self if self.shared_bytes + _STATIC_BYTES <= most_shared_bytes else replace(self, roomy=False)


def source() -> str:
    """CUDA C++ of the kernel."""
    folder = files(__package__)
    parts = "intrinsics", "transform_items", "transform_rows", "transform"
    return "".join(folder.joinpath(f"{part}.cu").read_text() for part in parts)


class Job(ctypes.Structure):
    """`Job` of transform_items.cu."""

    _fields_ = (
        ("lines", ctypes.c_void_p),
        ("coded_lines", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("basis", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bounds", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("bound", ctypes.c_float),
        ("num_chunks", ctypes.c_int32),
        ("chunk_pages", ctypes.c_int32),
        ("page_tokens", ctypes.c_int32),
        ("num_positions", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("part_lines", ctypes.c_int32),
        ("coded_part_lines", ctypes.c_int32),
        ("coded", ctypes.c_int32),
        ("mark_width", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
    )


def _depth(n: int) -> int:
    return -(-n // 32) * 32


def pack_basis(basis: Tensor) -> Tensor:
    """The operand of the tensor cores, uint8 `[parts, n/8, depth/32, 32, 16]`, of int16 `basis` `[parts, n, n]` (inner
    index first). Lane l of a warp needs of column `l // 4` of 8, inner values `4*(l % 4)` and on and those 16 further:
    high halves of both, then low halves (PTX ISA, mma.m16n8k32, fragments of B)."""
    parts, inner, n = basis.shape
    padded = torch.zeros(parts, _depth(n), n, dtype=torch.int16, device=basis.device)
    padded[:, :inner] = basis
    halves = torch.stack((padded >> 8, padded & 255), -1).to(torch.uint8)  # [parts, depth, n, 2]
    view = halves.view(parts, -1, 2, 4, 4, n // 8, 8, 2)  # [parts, step, second, lane % 4, byte, tile, lane // 4, half]
    return view.permute(0, 5, 1, 6, 3, 7, 2, 4).contiguous().view(parts, n // 8, -1, 32, 16)


@cache
def _loaded(case: TransformCase, device: int) -> tuple[Kernel, int, int]:
    """(kernel, blocks that a multiprocessor holds, multiprocessors)."""
    properties = torch.cuda.get_device_properties(device)
    arch = f"sm_{properties.major}{properties.minor}"
    kernel = load_kernel(cached_cubin(source(), arch, case.defines), KERNEL, device, case.shared_bytes)
    return kernel, kernel.resident_blocks(THREADS, case.shared_bytes), properties.multi_processor_count


def _by_quads(rows: Tensor, record: int) -> Tensor:
    """Each row's first quads of all its records of `record` values, then the second ones, and so on: lanes that have
    neighbouring records read neighbouring quads."""
    return rows.view(len(rows), -1, record // 4, 4).transpose(1, 2).contiguous()


class _Prepared:
    """A profile on a device, as kernels take it."""

    def __init__(self, outer: "SlotCodec") -> None:
        codec = cast(Transform, outer.codec)
        profile = codec.profile
        self.device = outer.kv.device
        self.profile = profile
        self.dtype = outer.kv.dtype
        sides = [profile.side(layer, side) for layer in range(len(profile.layers)) for side in SIDES]
        basis = torch.cat([side.basis for side in sides])
        self.basis = pack_basis(basis).to(self.device), pack_basis(basis.transpose(1, 2)).to(self.device)
        mean = torch.cat([side.mean for side in sides])
        self.mean = _by_quads(mean, 8).to(self.device), mean.to(self.device)
        steps = torch.tensor([side.step for side in sides for _ in range(profile.groups)], dtype=torch.float32)
        self.scale = (1 / steps).to(self.device), steps.to(self.device)
        cos, sin = profile.rope.table(torch.arange(outer.max_positions))
        angles = torch.stack((cos, sin), -1).contiguous().to(self.device)
        plain = profile.rope.interleaved or not profile.rope.rotary_dim
        self.angles = angles if plain else _by_quads(angles.flatten(1), 16), angles
        self.lines = outer.kv.kernel_lines
        self.vectors = all(at % 16 == 0 for place in outer.kv.line_places for at in place)
        self.parts = len(sides) * profile.groups
        self.num_sms = outer.num_sms
        self.chunk_pages, self.page_tokens = outer.chunk_pages, outer.kv.page_tokens
        self.num_positions, self.num_lines = outer.max_positions, outer.kv.num_lines

    @cached_property
    def index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    @cached_property
    def cases(self) -> tuple[TransformCase, TransformCase]:
        """Forward and inverse."""
        profile, rope, most = self.profile, self.profile.rope, most_shared_bytes(self.index)
        shape = profile.n, profile.head_dim, rope.rotary_dim, rope.interleaved
        forward, inverse = (TransformCase(inverse, self.dtype, *shape).fitted(most) for inverse in (False, True))
        return forward, inverse

    def launch(self, inverse: bool, scratch: "Scratch", page_table: Tensor, positions: Tensor, status: int) -> None:
        profile, coded = self.profile, scratch.slots.kv
        case = self.cases[inverse]
        chunks = len(page_table)
        job = Job(
            lines=self.lines.data_ptr(),
            coded_lines=coded.kernel_lines.data_ptr(),
            pages=page_table.data_ptr(),
            positions=positions.data_ptr(),
            angles=self.angles[inverse].data_ptr(),
            basis=self.basis[inverse].data_ptr(),
            mean=self.mean[inverse].data_ptr(),
            scale=self.scale[inverse].data_ptr(),
            bounds=scratch.tile_bounds.data_ptr(),
            status=status,
            bound=scratch.bound,
            num_chunks=chunks,
            chunk_pages=self.chunk_pages,
            page_tokens=self.page_tokens,
            num_positions=self.num_positions,
            parts=self.parts,
            groups=profile.groups,
            part_lines=self.num_lines // self.parts,
            coded_part_lines=scratch.part_lines,
            coded=coded.num_lines,
            mark_width=coded.channels[-1],
            vectors=self.vectors,
        )
        with make_current(self.index):
            kernel, blocks, multiprocessors = _loaded(case, self.index)
            items = self.parts * chunks * -(-self.chunk_pages * self.page_tokens // _TOKENS)
            if not inverse:  # a kernel marks the few blocks that are kept as they are
                words = chunks * self.chunk_pages * scratch.marks[0].nbytes // 4
                zero_words(scratch.marks.data_ptr(), words, self.index)
            sms = min(self.num_sms or multiprocessors, multiprocessors)
            kernel.launch(min(items, blocks * sms), THREADS, case.shared_bytes, Arguments(job))


_PREPARED: "WeakKeyDictionary[SlotCodec, _Prepared]" = WeakKeyDictionary()


def _prepared(outer: "SlotCodec") -> _Prepared:
    found = _PREPARED.get(outer)
    if found is None:
        found = _PREPARED[outer] = _Prepared(outer)
    return found


def forward(outer: "SlotCodec", scratch: "Scratch", page_table: Tensor, positions: Tensor) -> None:
    """Queue filling the scratch's coefficients, marks and bounds from the pages, on the current stream."""
    _prepared(outer).launch(False, scratch, page_table, positions, 0)


def inverse(outer: "SlotCodec", scratch: "Scratch", page_table: Tensor, positions: Tensor, status: Tensor) -> None:
    """Queue filling the pages of chunks whose `status` is good from the scratch, on the current stream."""
    _prepared(outer).launch(True, scratch, page_table, positions, status.data_ptr())
