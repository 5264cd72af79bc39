"""Compiles and launches the fused kernels (*.cu): one warp a tile, a kernel for each case, made at first use."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
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
TENSOR, PAGES, CHUNKS = "tensor", "pages", "chunks"
"""Where values lie: in one tensor, whose tiles go to one payload; in pages, or chunk after chunk, whose tiles go to
slots."""
PLACES = {TENSOR: 0, PAGES: 1, CHUNKS: 2}
ENCODE, RETRY, DECODE, DECODE_FEW = "encode", "retry", "decode", "decode_few"
"""What a kernel does. RETRY encodes chunks that did not fit their slots once more. DECODE_FEW is DECODE in another
shape, for batches of few tiles."""
ENTRIES = {ENCODE: "kvf_encode", RETRY: "kvf_encode", DECODE: "kvf_decode", DECODE_FEW: "kvf_decode"}
SCRATCH_BYTES = 8192
"""Of each warp that encodes (settle.cu)."""


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for. `codec`, `packing` and `mode` by their names in frames ("none" where there is
    none); `lanes`: bit n-1 says that tiles with n channels a lane occur; `places`: where values lie."""

    codec: str
    packing: str
    mode: str
    dtype: torch.dtype
    channel_steps: bool
    lanes: int
    places: str

    @property
    def one_sided(self) -> bool:
        return self.codec == "lossless"

    @property
    def table_bytes(self) -> dict[str, int]:
        count = family(self.one_sided).count + 1 if self.packing == "ans" else 0
        encoder, decoder = count * ALPHABET * 8, count * PROB_SCALE * 4
        return {ENCODE: encoder, RETRY: encoder, DECODE: decoder, DECODE_FEW: decoder}

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
            "KVF_PLACES": PLACES[self.places],
            "KVF_THREADS": threads,
            "KVF_BLOCKS": self.shape(kernel).blocks,
            "KVF_RETRY": int(kernel == RETRY),
        }

    def shape(self, kernel: str) -> "Shape":
        return SHAPES[ENCODE if kernel == RETRY else kernel, self.codec, self.packing]

    def source(self, kernel: str) -> str:
        """CUDA C++ of `kernel`."""
        if kernel in (DECODE, DECODE_FEW):
            parts = ["intrinsics", "common", "read", "decode_rows", "decode"]
        else:
            parts = ["intrinsics", "common", "quantise", "choose", "gather", "writer"]
            parts += ["ans_encode" if self.packing == "ans" else "bitpack_encode"]
            parts += ["place", "fit", "write", "settle", "encode"]
        folder = files(__package__)
        return "".join(folder.joinpath(f"{part}.cu").read_text() for part in parts)


_STATIC_BYTES = 4096
"""At least as much shared memory as a block takes besides tables and stages."""


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: warps a block, where the device's shared memory allows them; blocks a multiprocessor,
    which bounds its registers; shared memory a warp needs, bytes; and how long a round of tiles takes, one a warp, by
    the measure of the kernel's other shapes."""

    warps: int
    blocks: int
    warp_bytes: int
    round_time: float = 1.0


# A byte and a bit a value; behind them lists, classes, bases (gather.cu).
_ENCODE_STAGE = TILE_VALUES + TILE_VALUES // 8
# On an H200, 16 warps of 128 registers encode fastest. In blocks of 8 more of them share the tables of `ans`, which
# leaves the first-level cache more room; in blocks of 4 they wait less for one another (docs/architecture.md).
_ENCODE_ANS, _ENCODE_BITPACK = _ENCODE_STAGE + 4 * 384, _ENCODE_STAGE + 4 * 640
SHAPES = {
    (ENCODE, "bounded", "ans"): Shape(8, 2, _ENCODE_ANS),
    (ENCODE, "bounded", "bitpack"): Shape(8, 2, _ENCODE_BITPACK),
    (ENCODE, "lossless", "ans"): Shape(4, 4, _ENCODE_ANS),
    (ENCODE, "lossless", "bitpack"): Shape(4, 4, _ENCODE_BITPACK),
    (ENCODE, "raw", "none"): Shape(8, 4, _ENCODE_BITPACK),
    (DECODE, "raw", "none"): Shape(8, 4, 8192),
}
for _codec in ("bounded", "lossless"):
    # 28 warps of 72 registers decode 8% faster than 32 of 64, but for the batches that those take in one round less.
    SHAPES[DECODE, _codec, "ans"] = Shape(14, 2, 4096)
    SHAPES[DECODE_FEW, _codec, "ans"] = Shape(16, 2, 4096, 1.2)
    SHAPES[DECODE, _codec, "bitpack"] = Shape(10, 2, 8192)


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
    """A kernel on a device: `threads` a block, `shared_bytes`, `blocks` that one of its `multiprocessors` holds;
    `Shape.round_time`."""

    kernel: Kernel
    threads: int
    shared_bytes: int
    blocks: int
    multiprocessors: int
    round_time: float = 1.0

    @property
    def scratch_bytes(self) -> int:
        """What an encoder's warps need to keep a tile each in."""
        return self.blocks * self.multiprocessors * self.threads // 32 * SCRATCH_BYTES

    def launch(self, num_tiles: int, num_sms: int | None, arguments: Arguments) -> None:
        """Queue it for `num_tiles` tiles on the current stream, in as many blocks as `num_sms` multiprocessors hold.

        A tile a block while there are few tiles: blocks then spread over the whole device.
        """
        blocks = self._most_blocks(num_sms)
        self.kernel.launch(min(blocks, num_tiles), self.threads, self.shared_bytes, arguments)

    def time(self, num_tiles: int, num_sms: int | None) -> float:
        """How long that may take, by the measure of the kernel's other shapes."""
        return -(-num_tiles // (self._most_blocks(num_sms) * self.threads // 32)) * self.round_time

    def _most_blocks(self, num_sms: int | None) -> int:
        return self.blocks * min(num_sms or self.multiprocessors, self.multiprocessors)


@cache
def load(case: Case, kernel: str, device: int) -> Loaded:
    """The kernel of `case`, compiled (or read from the cache) for the device's generation."""
    properties = torch.cuda.get_device_properties(device)
    shape, tables = case.shape(kernel), case.table_bytes[kernel]
    most = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    warps = max(1, min(shape.warps, (most - _STATIC_BYTES - tables) // shape.warp_bytes))
    threads, shared_bytes = 32 * warps, tables + warps * shape.warp_bytes
    arch = f"sm_{properties.major}{properties.minor}"
    loaded = load_kernel(
        cached_cubin(case.source(kernel), arch, case.defines(kernel, threads)), ENTRIES[kernel], device, shared_bytes
    )
    blocks = loaded.resident_blocks(threads, shared_bytes)
    return Loaded(loaded, threads, shared_bytes, blocks, properties.multi_processor_count, shape.round_time)


def load_decoders(case: Case, device: int) -> tuple[Loaded, ...]:
    """The kernels that decode, in all their shapes; the one for a batch is that of the least `Loaded.time`."""
    shapes = [kernel for kernel in (DECODE, DECODE_FEW) if (kernel, case.codec, case.packing) in SHAPES]
    with ThreadPoolExecutor(len(shapes)) as threads:  # compiling takes seconds
        return tuple(threads.map(lambda kernel: load(case, kernel, device), shapes))


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
