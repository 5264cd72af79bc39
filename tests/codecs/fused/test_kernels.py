"""The CUDA kernels without a GPU: they compile for every generation, and agree with the host about layouts."""

import ctypes
import re
from importlib.resources import files

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from kvferry.codecs import fitting
from kvferry.codecs.fused import kernels, transform
from kvferry.codecs.fused.kernels import (
    CHUNKS,
    DECODE,
    DECODE_FEW,
    ENCODE,
    ENTRIES,
    PAGES,
    RETRY,
    SHAPES,
    TENSOR,
    Case,
    Loaded,
)
from kvferry.device.nvrtc import Arguments, compile_cubin
from kvferry.format import slot
from kvferry.packing.ans import classes
from kvferry.packing.ans.tables import PROB_BITS, family

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
ONE, FOUR, ALL = 1, 8, 15
"""Channels a lane that occur: 1; 4; any."""


def bounded(
    packing: str, mode: str, dtype: torch.dtype, *, steps: bool = False, lanes: int = FOUR, places: str = PAGES
):
    return Case("bounded", packing, mode, dtype, steps, lanes, places)


def exact(codec: str, packing: str, dtype: torch.dtype, *, lanes: int = FOUR, places: str = PAGES):
    return Case(codec, packing, "none", dtype, False, lanes, places)


CASES = [bounded(packing, mode, BF16) for packing in ("ans", "bitpack") for mode in ("fixed", "plain", "outlier")]
CASES += [bounded("ans", "fixed", FP16, steps=True, lanes=ALL, places=TENSOR), bounded("bitpack", "plain", FP32)]
CASES += [exact("lossless", packing, dtype) for packing in ("ans", "bitpack") for dtype in (BF16, FP32, FP8)]
CASES += [exact("lossless", "ans", FP16, lanes=ALL, places=TENSOR), exact("raw", "none", torch.uint8, lanes=ONE)]
CASES += [bounded(packing, "fixed", FP16, places=CHUNKS) for packing in ("ans", "bitpack")]
COMPILED = [("sm_90", case) for case in CASES]
COMPILED += [(arch, case) for arch in ("sm_80", "sm_100") for case in (CASES[0], exact("lossless", "ans", BF16))]
KERNELS = [(kernel, arch, case) for kernel in (ENCODE, DECODE) for arch, case in COMPILED]
KERNELS += [(DECODE_FEW, arch, case) for arch, case in COMPILED if case.packing == "ans"]
KERNELS += [(RETRY, arch, case) for arch, case in COMPILED if case.codec == "bounded" and case.places != TENSOR]


@pytest.mark.parametrize(
    ("kernel", "arch", "case"),
    KERNELS,
    ids=lambda x: x if isinstance(x, str) else f"{x.codec}-{x.packing}-{x.mode}-{x.dtype}",
)
def test_kernels_compile(kernel: str, arch: str, case: Case) -> None:
    cubin = compile_cubin(case.source(kernel), arch, case.defines(kernel, 32 * case.shape(kernel).warps))
    assert ENTRIES[kernel].encode() in cubin


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("n", "head_dim", "rotary", "interleaved", "roomy"),
    [
        (128, 128, 128, False, True),
        (256, 128, 128, False, True),
        (256, 128, 128, False, False),
        (144, 144, 144, False, True),
        (64, 64, 32, True, False),
        (48, 48, 0, False, True),
    ],
)
def test_transforms_compile(
    n: int, head_dim: int, rotary: int, interleaved: bool, roomy: bool, inverse: bool, arch: str
) -> None:
    case = transform.TransformCase(inverse, FP16 if inverse else BF16, n, head_dim, rotary, interleaved, roomy)
    assert transform.KERNEL.encode() in compile_cubin(transform.source(), arch, case.defines)


@pytest.mark.parametrize(
    ("n", "kibibytes", "roomy"),
    [(128, 99, True), (256, 99, False), (256, 163, True), (512, 163, False), (512, 227, True), (1024, 227, False)],
)
def test_transforms_fit_the_shared_memory_of_a_gpu(n: int, kibibytes: int, roomy: bool) -> None:
    """Of compute capability 8.6 and 8.9, 8.0, and 9.0."""
    case = transform.TransformCase(False, BF16, n, 64, 64, False).fitted(kibibytes << 10)
    assert case.roomy == roomy
    assert case.shared_bytes < kibibytes << 10


def test_the_source_agrees_with_the_host() -> None:
    source = CASES[0].source(ENCODE)

    def constant(name: str) -> str:
        found = re.search(rf"\b{name} = ([^,;]+)[,;]", source)
        assert found, name
        return found[1].strip()

    assert int(constant("LAST_TWO_SIDED")) == family(False).count - 1
    assert int(constant("LAST_ONE_SIDED")) == family(True).count - 1
    assert int(constant("PROB_BITS")) == PROB_BITS
    assert int(constant("SLOT_HEADER")) == slot.HEADER_BYTES
    assert int(constant("SLOT_MAGIC"), 16).to_bytes(4, "little") == slot.MAGIC
    assert int(constant("SLOT_VERSION")) == slot.VERSION
    assert int(constant("SCRATCH_BYTES")) == kernels.SCRATCH_BYTES
    for name, status in zip(
        ("GOOD", "FOREIGN", "MISMATCH", "OTHER_IDENTITY", "NOT_USABLE", "CORRUPT"), slot.SlotStatus, strict=True
    ):
        assert int(constant(name)) == status
    assert int(constant("SPARE")) == fitting._SPARE
    assert int(constant("SPARING_TOKENS")) == classes._SPARING_TOKENS
    assert int(constant("LEVELS_OF_PAYLOAD")) == fitting._LEVELS_OF_PAYLOAD
    assert int(constant("MOST_TRIES")) == fitting.MOST_TRIES
    roots = re.findall(r"0x([0-9a-f]{8})u", source.split("mantissas[8]")[1])[:8]
    assert tuple(np.array([int(root, 16) for root in roots], dtype=np.uint32).view(np.float32)) == fitting.SCALES[48:56]
    assert int(constant("USABLE")) == slot.SlotState.USABLE
    assert int(constant("REJECTED")) == slot.SlotState.REJECTED


@pytest.mark.parametrize("codec", ["bounded", "lossless"])
@pytest.mark.parametrize("packing", ["ans", "bitpack"])
def test_a_warp_has_the_shared_memory_that_its_stage_takes(packing: str, codec: str) -> None:
    groups = {"ans": 1, "bitpack": 2}[packing]
    small = 2 * 128 * groups + 128
    assert SHAPES[ENCODE, codec, packing].warp_bytes == 64 * 128 + 64 * 128 // 8 + 4 * small
    decode = SHAPES[DECODE, codec, packing]
    assert decode.warp_bytes == 4 * {"ans": 1024, "bitpack": 2048}[packing]
    assert SHAPES.get((DECODE_FEW, codec, packing), decode).warp_bytes == decode.warp_bytes


class FakeKernel:
    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def launch(self, grid: int, block: int, shared_bytes: int, arguments: object) -> None:
        self.grids.append((grid, block))


def loaded(kernel: str) -> Loaded:
    """`kernel` of `ans` on a GPU with 132 multiprocessors."""
    shape = SHAPES[kernel, "bounded", "ans"]
    return Loaded(FakeKernel(), 32 * shape.warps, 0, shape.blocks, 132, shape.round_time)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_tiles", "num_sms", "expected"),
    [
        (1, None, DECODE),
        (28 * 132, None, DECODE),
        (28 * 132 + 1, None, DECODE_FEW),  # two rounds of 28 warps, one of 32
        (4096, None, DECODE_FEW),
        (32 * 132 + 1, None, DECODE),
        (32768, None, DECODE),
        (28 * 16 + 1, 16, DECODE_FEW),
        (28 * 132 + 1, 1000, DECODE_FEW),
    ],
)
def test_a_batch_is_decoded_in_the_shape_that_takes_least_time(
    num_tiles: int, num_sms: int | None, expected: str
) -> None:
    times = {kernel: loaded(kernel).time(num_tiles, num_sms) for kernel in (DECODE, DECODE_FEW)}
    assert min(times, key=times.__getitem__) == expected


def test_few_tiles_are_a_block_each() -> None:
    kernel = loaded(DECODE)
    arguments = Arguments()
    kernel.launch(5, None, arguments)
    kernel.launch(32768, None, arguments)
    kernel.launch(32768, 16, arguments)
    assert kernel.kernel.grids == [(5, 448), (264, 448), (32, 448)]  # type: ignore[attr-defined]


# A structure's fields in order, in the order of the CUDA source: a field added on one side only shifts all that follow.
@pytest.mark.parametrize(
    ("file", "name", "structure"),
    [
        ("common.cu", "Source", kernels.Source),
        ("common.cu", "SlotFacts", kernels.SlotFacts),
        ("quantise.cu", "Bounds", kernels.Bounds),
        ("place.cu", "Ladder", kernels.Ladder),
        ("place.cu", "Sink", kernels.Sink),
        ("read.cu", "Input", kernels.Input),
        ("transform_items.cu", "Job", transform.Job),
    ],
)
def test_structures_have_the_same_fields(file: str, name: str, structure: type[ctypes.Structure]) -> None:
    text = files("kvferry.codecs.fused").joinpath(file).read_text()
    body = re.search(rf"struct {name} {{(.*?)\n}};", text, re.DOTALL)
    assert body
    sizes = {"i64": 8, "double": 8, "int": 4, "u32": 4, "float": 4, "SlotFacts": 16, "Ladder": 16}
    fields = []
    for line in body[1].split("\n"):
        declared = re.match(r"\s*(?:const )?(\w+) ([*\w][^;()]*);", line)
        if not declared:
            continue
        for variable in declared[2].split(","):
            pointer = "*" in variable
            fields.append((variable.strip(" *"), 8 if pointer else sizes[declared[1]]))
    assert fields == [(field, ctypes.sizeof(kind)) for field, kind in structure._fields_]
