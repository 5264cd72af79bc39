"""Compiles and launches the fused kernels (*.cu): one warp a tile, a kernel for each case, made at first use."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from kvferry.codecs.bounded.reference import BASES as MODE_BASES
from kvferry.codecs.fused.tables import ALPHABET
from kvferry.codecs.lossless.reference import SPLITS
from kvferry.codecs.tiling import TILE_VALUES
from kvferry.device.nvrtc import Arguments, Kernel, cached_cubin, load_kernel
from kvferry.packing.ans.tables import PROB_SCALE, family
from kvferry.packing.columns import Bases

CODECS = {"raw": 0, "lossless": 1, "bounded": 2}
PACKINGS = {"none": 0, "ans": 1, "bitpack": 2}
BASES = {Bases.ALL: 0, Bases.NONE: 1, Bases.APART: 2}
ENCODE, RETRY, DECODE = "encode", "retry", "decode"
"""What a kernel does; RETRY encodes chunks that did not fit their slots once more."""
ENTRIES = {ENCODE: "kvf_encode", RETRY: "kvf_encode", DECODE: "kvf_decode"}
SCRATCH_BYTES = 8192
"""Of each warp that encodes (encode.cu)."""


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for. `codec`, `packing` and `mode` by their names in frames ("none" where there is
    none); `lanes`: bit n-1 says that tiles with n channels a lane occur; `paged`: values lie in pages, tiles go to
    slots."""

    codec: str
    packing: str
    mode: str
    dtype: torch.dtype
    channel_steps: bool
    lanes: int
    paged: bool

    @property
    def one_sided(self) -> bool:
        return self.codec == "lossless"

    @property
    def table_bytes(self) -> dict[str, int]:
        if self.packing != "ans":
            return {ENCODE: 0, RETRY: 0, DECODE: 0}
        count = family(self.one_sided).count + 1
        encoder = count * ALPHABET * 8
        return {ENCODE: encoder, RETRY: encoder, DECODE: count * PROB_SCALE * 4}

    def defines(self, kernel: str, threads: int) -> dict[str, int]:
        split = SPLITS.get(self.dtype)
        return {
            "KVF_CODEC": CODECS[self.codec],
            "KVF_PACKING": PACKINGS[self.packing],
            "KVF_ITEM": self.dtype.itemsize,
            "KVF_MANTISSA": split.mantissa_bits if split else 0,
            "KVF_EXPONENT": split.exponent_bits if split else 0,
            "KVF_BASES": BASES[MODE_BASES[self.mode] if self.codec == "bounded" else Bases.ALL],
            "KVF_CHANNEL_STEPS": int(self.channel_steps),
            "KVF_CPLS": self.lanes,
            "KVF_PAGED": int(self.paged),
            "KVF_THREADS": threads,
            "KVF_BLOCKS": self.shape(kernel).blocks,
            "KVF_RETRY": int(kernel == RETRY),
        }

    def shape(self, kernel: str) -> "Shape":
        return SHAPES[DECODE if kernel == DECODE else ENCODE, self.packing]

    def source(self, kernel: str) -> str:
        """CUDA C++ of `kernel`."""
        if kernel == DECODE:
            parts = ["intrinsics", "common", "read", "decode_rows", "decode"]
        else:
            parts = ["intrinsics", "common", "quantise", "choose", "gather", "writer"]
            parts += ["ans_encode" if self.packing == "ans" else "bitpack_encode", "place", "fit", "write", "encode"]
        folder = files(__package__)
        return "".join(folder.joinpath(f"{part}.cu").read_text() for part in parts)


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: warps a block, where the device's shared memory allows them; blocks a multiprocessor,
    which bounds its registers; shared memory a warp needs, bytes."""

    warps: int
    blocks: int
    warp_bytes: int


# A byte and a bit a value; behind them lists, classes, bases (gather.cu).
_ENCODE_STAGE = TILE_VALUES + TILE_VALUES // 8
# On an H200 12 to 20 encoding warps a multiprocessor differ by 10%, 4 blocks of 4 being best at small batches: the
# loops are bound by the integer pipe, what lies between them by the latencies of one warp (docs/architecture.md).
SHAPES = {
    (ENCODE, "ans"): Shape(4, 4, _ENCODE_STAGE + 4 * 384),
    (ENCODE, "bitpack"): Shape(4, 4, _ENCODE_STAGE + 4 * 640),
    (ENCODE, "none"): Shape(8, 4, _ENCODE_STAGE + 4 * 640),
    (DECODE, "ans"): Shape(8, 3, 4096),
    (DECODE, "bitpack"): Shape(10, 2, 8192),
    (DECODE, "none"): Shape(8, 4, 8192),
}


class Source(ctypes.Structure):
    """`Source` of common.cu."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("channels", ctypes.c_void_p),
        ("token_bytes", ctypes.c_int64),
        ("channel_bytes", ctypes.c_int64),
        ("lines", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("num_lines", ctypes.c_int32),
        ("chunk_pages", ctypes.c_int32),
        ("page_tokens", ctypes.c_int32),
        ("page_reciprocal", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("tiles_per_chunk", ctypes.c_int32),
    )


class SlotFacts(ctypes.Structure):
    """`SlotFacts` of common.cu: words 2, 3 (without state and relaxed), 7 and 12 of a header."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("relative_to", ctypes.c_uint32),
        ("layout_digest", ctypes.c_uint32),
        ("tokens", ctypes.c_uint32),
    )


class Ladder(ctypes.Structure):
    """`Ladder` of place.cu: codecs/fitting.py's."""

    _fields_ = (
        ("levels", ctypes.c_int32),
        ("searches", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("retries", ctypes.c_int32),
    )


class Sink(ctypes.Structure):
    """`Sink` of place.cu."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("slot_index", ctypes.c_void_p),
        ("identities", ctypes.c_void_p),
        ("directory", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("facts", SlotFacts),
        ("num_chunks", ctypes.c_int32),
        ("ladder", Ladder),
        ("status_at", ctypes.c_int32),
    )


class Bounds(ctypes.Structure):
    """`Bounds` of quantise.cu."""

    _fields_ = (
        ("bounds", ctypes.c_void_p),
        ("relative", ctypes.c_double),
        ("bound", ctypes.c_float),
        ("per_tile", ctypes.c_int32),
    )


class Input(ctypes.Structure):
    """`Input` of read.cu."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("slot_index", ctypes.c_void_p),
        ("identities", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("facts", SlotFacts),
    )


FIRST_BOUND = 5
"""Which word of an encoder's `work` is the largest bound of chunk 0's tiles."""
_CHUNK_WORDS = 6


def work_words(num_chunks: int, num_tiles: int, retries: int = 0) -> int:
    """Words of an encoder's `work` (place.cu, `Sink`)."""
    return FIRST_BOUND + (_CHUNK_WORDS + retries) * num_chunks + (2 if retries else 1) * num_tiles


@dataclass(frozen=True)
class Loaded:
    """A kernel on a device: `threads` a block, `shared_bytes`, `blocks` that one of its `multiprocessors` holds."""

    kernel: Kernel
    threads: int
    shared_bytes: int
    blocks: int
    multiprocessors: int

    @property
    def scratch_bytes(self) -> int:
        """What an encoder's warps need to keep a tile each in."""
        return self.blocks * self.multiprocessors * self.threads // 32 * SCRATCH_BYTES

    def launch(self, num_tiles: int, num_sms: int | None, arguments: Arguments) -> None:
        """Queue it for `num_tiles` tiles on the current stream, in as many blocks as `num_sms` multiprocessors hold.

        A tile a block while there are few tiles: blocks then spread over the whole device.
        """
        sms = min(num_sms or self.multiprocessors, self.multiprocessors)
        self.kernel.launch(min(self.blocks * sms, num_tiles), self.threads, self.shared_bytes, arguments)


@cache
def load(case: Case, kernel: str, device: int) -> Loaded:
    """The kernel of `case`, compiled (or read from the cache) for the device's generation."""
    properties = torch.cuda.get_device_properties(device)
    shape, tables = case.shape(kernel), case.table_bytes[kernel]
    most = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    warps = max(1, min(shape.warps, (most - 1024 - tables) // shape.warp_bytes))
    threads, shared_bytes = 32 * warps, tables + warps * shape.warp_bytes
    arch = f"sm_{properties.major}{properties.minor}"
    loaded = load_kernel(
        cached_cubin(case.source(kernel), arch, case.defines(kernel, threads)), ENTRIES[kernel], device, shared_bytes
    )
    blocks = loaded.resident_blocks(threads, shared_bytes)
    return Loaded(loaded, threads, shared_bytes, blocks, properties.multi_processor_count)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
