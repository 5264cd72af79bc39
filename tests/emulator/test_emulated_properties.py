"""Whatever the values, pages and chunks, the GPU's kernels make the reference's bytes and give its values back."""

import pytest
import torch
from emulated import gpu  # noqa: F401  a fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_emulated_kernels import decode, encode, used
from torch import Tensor

from contract import slot_cases
from contract.slot_cases import Engine
from kvferry import Bounded, Codec, Lossless, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes, slot_bytes_for

pytestmark = pytest.mark.usefixtures("gpu")

# One case of the kernels each: compiling them takes longer than running them.
CODECS: list[Codec] = [
    *(Bounded(bound, relative=False) for bound in (0.01, 0.0625, 0.5)),
    *(Bounded(bound, relative=False, mode="plain") for bound in (0.01, 0.5)),
    *(Bounded(bound, relative=False, packing="bitpack") for bound in (0.0625, 0.5)),
    Lossless("ans"),
]
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-39, 3e38)
PAGES = 10


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 of some kind and scale, perhaps with some that are stored in their own bits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "smooth", "integers", "constant", "apart", "far"]))
    if kind == "heavy":
        x = x.sign() * x.abs() ** 3
    elif kind == "smooth":
        x = torch.cumsum(x, 2) / 4
    elif kind == "integers":
        x = (x * draw(st.sampled_from([1, 20, 60]))).round()
    elif kind == "constant":
        x = torch.full(shape, draw(st.sampled_from([0.0, -1.5])))
    elif kind == "apart":
        x = x + 8 * torch.randn(shape[0], 1, 1, shape[-1], generator=generator)
    elif kind == "far":  # a bit of the mantissa apart
        x = 300 * (1 + (x > 0) / 128)
    x = (x * 2.0 ** draw(st.integers(-4, 4))).bfloat16()
    count = draw(st.sampled_from([0, 0, 1, 40]))
    at = torch.randint(x.numel(), (count,), generator=generator)
    x.view(-1)[at] = torch.tensor([SPECIAL[i % len(SPECIAL)] for i in range(count)]).bfloat16()
    return x


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    engine = Engine(
        draw(st.sampled_from(slot_cases.LAYOUTS)), torch.bfloat16, layers=1, pages=PAGES,
        heads=draw(st.integers(1, 3)), page_tokens=draw(st.sampled_from([8, 16, 24, 64, 80])),
        head_dim=draw(st.sampled_from([97, 100, 128])),
    )  # fmt: skip
    return engine.write(draw(values(engine.shape)))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_references_bytes_and_values(data: st.DataObject) -> None:
    engine, codec = data.draw(engines()), data.draw(st.sampled_from(CODECS))
    pages = data.draw(st.integers(1, 5))
    ratio = data.draw(st.sampled_from([None, 2.0, 4.0]))
    size = raw_slot_bytes(engine.kv, pages) if ratio is None else slot_bytes_for(engine.kv, codec, pages, ratio)
    on_overflow = data.draw(st.sampled_from(["relax", "reject"]))
    slot_codec = SlotCodec(engine.kv, codec, pages, size, on_overflow=on_overflow)
    chunks = [data.draw(st.permutations(range(PAGES))) for _ in range(data.draw(st.sampled_from([1, 2, 5])))]
    table = torch.tensor(chunks)[:, :pages]
    if data.draw(st.booleans()):
        table[0, -1] = -1
    expected, slots = slot_cases.encode(slot_codec, "cpu", table), encode(slot_codec, table)
    assert used(slots) == used(expected)

    before = [memory.clone() for memory in engine.memory]
    to = torch.tensor([data.draw(st.permutations(range(PAGES)))])[:, :pages]
    wanted_status = slot_cases.decode(slot_codec, "cpu", slots[:1], to)
    wanted = [memory.clone() for memory in engine.memory]
    for memory, old in zip(engine.memory, before, strict=True):
        memory.copy_(old)
    assert decode(slot_codec, slots[:1], to) == wanted_status
    assert all(torch.equal(*pair) for pair in zip(engine.memory, wanted, strict=True))
