"""The ans kernels without a GPU: they compile for every supported generation, and the tables they read are right."""

import random

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from kvferry.codecs.fused import ans
from kvferry.device.nvrtc import compile_cubin
from kvferry.packing.ans.tables import PROB_SCALE, family

# (dtype, mode or None for lossless, whether each channel has its own step)
BF16 = [(torch.bfloat16, mode, False) for mode in ("fixed", "plain", "outlier", None)] + [
    (torch.bfloat16, "fixed", True)
]
FLOATS = [(dtype, mode, False) for dtype in (torch.float16, torch.float32) for mode in ("fixed", None)]
FP8 = [(torch.float8_e4m3fn, None, False), (torch.float8_e5m2, None, False)]
CASES = [("sm_90", *case) for case in (*BF16, *FLOATS, *FP8)]
CASES += [(arch, torch.bfloat16, mode, False) for arch in ("sm_80", "sm_100") for mode in ("fixed", None)]


@pytest.mark.parametrize("kernel", ["kvf_encode", "kvf_decode"])
@pytest.mark.parametrize(("arch", "dtype", "mode", "channel_steps"), CASES)
def test_kernels_compile(kernel: str, arch: str, dtype: torch.dtype, mode: str | None, channel_steps: bool):
    cubin = compile_cubin(ans.source_text(kernel), arch, ans.defines(kernel, dtype, mode, channel_steps))
    assert kernel.encode() in cubin


@pytest.mark.parametrize("one_sided", [False, True])
def test_multiplying_by_the_reciprocal_divides(one_sided: bool):
    """The update x -> (x // f << 10) + x % f + cum, done as the kernel does it, at the edges of quotient ranges."""
    tables = family(one_sided)
    entries = ans.encoder_entries(one_sided).tolist()
    drawn = random.Random(0)
    for c in range(tables.count):
        for column in range(int(tables.size[c])):
            f, cum = int(tables.freq[c, column]), int(tables.cum[c, column])
            symbol = column - int(tables.origin[c])
            reciprocal, packed = (x & 0xFFFFFFFF for x in entries[64 * c + symbol + (0 if one_sided else 32)])
            assert packed & 2047 == f
            bias, shift = packed >> 11 & 2047, packed >> 22
            top = f << 22  # states are below this when a symbol is coded
            edges = [k * f + d for k in (1, 2, top // f - 1, top // f) for d in (-1, 0, 1)]
            for x in edges + [drawn.randrange(1, top) for _ in range(200)]:
                if 0 < x < top:
                    quotient = (x * reciprocal >> 32) >> shift
                    state = x + bias + quotient * (PROB_SCALE - f)
                    assert state == (x // f << 10) + x % f + cum, (f, x)


@pytest.mark.parametrize("one_sided", [False, True])
def test_decoder_slots_invert_the_tables(one_sided: bool):
    tables = family(one_sided)
    slots = ans.decoder_slots(one_sided).reshape(tables.count + 1, PROB_SCALE).long()
    for c in range(tables.count):
        for column in range(int(tables.size[c])):
            cum, f = int(tables.cum[c, column]), int(tables.freq[c, column])
            run = slots[c, cum : cum + f]
            assert torch.all(run >> 24 == column - int(tables.origin[c]))
            assert torch.all(run >> 12 & 0xFFF == f)
            assert torch.equal(run & 0xFFF, torch.arange(f))


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_idle_table_leaves_every_state_as_it_is(one_sided: bool):
    tables = family(one_sided)
    reciprocal, packed = (
        x & 0xFFFFFFFF for x in ans.encoder_entries(one_sided).tolist()[64 * tables.count + (0 if one_sided else 32)]
    )
    slots = ans.decoder_slots(one_sided)[PROB_SCALE * tables.count :].long()
    for x in (1 << 16, 123456789, 2**32 - 1):
        assert x >> 22 < packed & 2047
        assert (
            x + (packed >> 11 & 2047) + ((x * reciprocal >> 32) >> (packed >> 22)) * (PROB_SCALE - (packed & 2047)) == x
        )
        slot = int(slots[x & 1023])
        assert slot >> 24 == 0
        assert (slot >> 12 & 0xFFF) * (x >> 10) + (slot & 0xFFF) == x


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_outermost_entries_are_empty(one_sided: bool):
    entries = ans.encoder_entries(one_sided).reshape(-1, 64, 2)
    assert not entries[:, -1].any()
    assert one_sided or not entries[:, 0].any()


def test_the_kernel_source_agrees_with_the_host():
    encode, decode = ans.source_text("kvf_encode"), ans.source_text("kvf_decode")
    assert f"LAST_TWO_SIDED = {family(False).count - 1}" in encode
    assert f"LAST_ONE_SIDED = {family(True).count - 1}" in encode
    assert f"ENCODE_WARPS = {ans.SHAPES['kvf_encode'].warps};" in encode
    assert f"DECODE_WARPS = {ans.SHAPES['kvf_decode'].warps};" in decode
