"""Any chunk of any layout in slots of any size: what is promised, holds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract import cases, slot_cases
from contract.cases import bits_of
from contract.slot_cases import LAYOUTS, Engine, assert_kept, chunk_rows, frame_tiles, poison_of, take_apart
from kvferry import Codec, Lossless, Raw, SlotCodec
from kvferry.codecs.slots import raw_slot_bytes
from kvferry.format.slot import SlotStatus

CODECS = slot_cases.slot_codecs()


def drawn_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """`kind`: noise, the same with special values strewn in, any bits, outliers, or one value everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "bits":
        width = 8 * dtype.itemsize
        words = torch.randint(-(1 << (width - 1)), 1 << (width - 1), shape, generator=generator)
        return words.to(cases.BITS[dtype.itemsize]).view(dtype)
    scale = 2.0 ** float(torch.randint(-6, 6, (), generator=generator))
    values = cases.gaussian(shape, torch.float32, seed) * scale
    if kind == "outliers":
        values.view(-1)[:: 1 + seed % 50] *= 1000
    if kind == "constant":
        values = torch.full(shape, scale)
    limit = torch.finfo(dtype).max
    drawn = values.clamp(-limit, limit).to(dtype)
    return cases.with_specials(drawn)[0] if kind == "special" else drawn


@settings(max_examples=400)
@given(
    layout=st.sampled_from(LAYOUTS),
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(cases.FLOATS + cases.FP8),
    page_tokens=st.sampled_from([8, 16, 32]),
    chunk_pages=st.integers(1, 9),
    head_dim=st.integers(1, 300),
    heads=st.integers(1, 2),
    kind=st.sampled_from(["noise", "special", "bits", "outliers", "constant"]),
    seed=st.integers(0, 2**16),
    room=st.floats(0.02, 1.05),
    max_relaxations=st.integers(0, 5),
    hidden=st.integers(0, 2**9 - 1),
)
def test_any_chunk_keeps_what_is_promised(
    layout: str,
    codec: Codec,
    dtype: torch.dtype,
    page_tokens: int,
    chunk_pages: int,
    head_dim: int,
    heads: int,
    kind: str,
    seed: int,
    room: float,
    max_relaxations: int,
    hidden: int,
) -> None:
    if dtype not in codec.dtypes:
        codec = Lossless("bitpack" if seed % 2 else "ans")
    sizes = {"layers": 1, "heads": heads, "pages": chunk_pages, "page_tokens": page_tokens, "head_dim": head_dim}
    engine = Engine(layout, dtype, **sizes)
    values = drawn_values(kind, engine.shape, dtype, seed)
    kv = engine.write(values).kv
    least = 64 + 12 * kv.num_lines * -(-chunk_pages * page_tokens // 64)
    most = raw_slot_bytes(kv, chunk_pages)
    slot_bytes = most if isinstance(codec, Raw) else min(max(least, int(room * most)) + 15, most) // 16 * 16
    slot_codec = SlotCodec(kv, codec, chunk_pages, slot_bytes, max_relaxations=max_relaxations)
    table = torch.randperm(chunk_pages, generator=torch.Generator().manual_seed(seed))[None]
    slots = slot_cases.encode(slot_codec, "cpu", table)
    parts = take_apart(slots[0])
    relaxed, state = int(parts.fields["relaxed"]), parts.fields["state"]
    rows = chunk_rows(values, table[0])
    assert state == 2 or len(parts.used) <= slot_bytes
    assert state == 1 or 64 + 8 * slot_codec.num_tiles + int(parts.fields["payload_bytes"]) > slot_bytes
    if relaxed == 0 and state == 1:
        assert list(parts.tiles) == frame_tiles(rows, codec)

    wanted = [page for page in range(chunk_pages) if not hidden >> page & 1]
    masked = torch.full_like(table, -1)
    masked[0, wanted] = table[0, wanted]
    fresh = Engine(layout, dtype, **sizes)
    status = slot_cases.decode(SlotCodec(fresh.kv, codec, chunk_pages, slot_bytes), "cpu", slots, masked)
    read = fresh.read()
    if state == 2:
        assert status == [SlotStatus.REJECTED]
        wanted = []
    else:
        assert status == [SlotStatus.GOOD]
    untouched = [page for page in range(chunk_pages) if page not in masked[0, wanted].tolist()]
    assert (read[:, untouched] == poison_of(read)).all()
    if state == 1:
        back = chunk_rows(read, table[0])
        here = torch.zeros(chunk_pages, dtype=torch.bool)
        here[wanted] = True
        seen = here.repeat_interleave(page_tokens)[None, :, None]
        assert_kept(rows, torch.where(seen, back, bits_of(rows)), codec, relaxed)
