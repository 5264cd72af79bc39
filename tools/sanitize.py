"""Every GPU kernel once on small odd tensors, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tools/sanitize.py
    compute-sanitizer --tool racecheck python tools/sanitize.py

Damaged frames and slots are decoded too: a kernel must not read or write outside its tile whatever the bytes say. Parts
may be named (`python tools/sanitize.py slots transform`), to run them beside each other.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial

import torch

import kvferry
from kvferry.codecs.fused import frames
from kvferry.codecs.slots import SlotCodec, raw_slot_bytes
from kvferry.codecs.transform.profile import Layer, SideProfile
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, read_frame
from kvferry.format.slot import SlotStatus
from kvferry.pages import PagedKV

SHAPES = ((3, 65, 80), (130, 129), (2, 64, 128), (33, 7))
HEADS, LAYERS = 2, 2


def damaged(frame: Frame, generator: torch.Generator) -> Frame:
    """The frame with one byte of each of its first tiles altered behind the checksum's back."""
    payload = bytearray(frame.payload)
    for _ in range(8):
        place = int(torch.randint(len(payload), (1,), generator=generator))
        payload[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    return Frame(frame.header, frame.sizes, memoryview(bytes(payload)))


def try_frames(dtype: torch.dtype, generator: torch.Generator) -> tuple[int, int]:
    """(cases, damaged frames refused)"""
    count = refused = 0
    modes = [(mode, relative) for mode in ("fixed", "plain", "outlier") for relative in ("tile", "channel")]
    for packing, shape in itertools.product(("ans", "bitpack"), SHAPES):
        codecs: list[kvferry.Codec] = [kvferry.Lossless(packing)]
        codecs += [kvferry.Bounded(0.02, relative_to=to, mode=mode, packing=packing) for mode, to in modes]
        x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
        x.view(-1)[::97] = torch.nan
        for codec in codecs:
            frame = read_frame(kvferry.compress(x.cuda(), codec))
            out = torch.empty(shape, dtype=dtype, device="cuda")
            frames.decode(frame, out)
            if codec.exact and not torch.equal(out.cpu().view(torch.uint8), x.view(torch.uint8)):
                raise SystemExit(f"{codec} on {shape} {dtype}: not bit-identical")
            try:
                frames.decode(damaged(frame, generator), out)
            except CorruptFrame:
                refused += 1
            count += 1
    return count, refused


def try_slots(generator: torch.Generator) -> tuple[int, int]:
    """(cases, damaged chunks reported). Slots too small for the bound asked make the encoder relax it."""
    codecs: list[kvferry.Codec] = [kvferry.Raw()]
    for packing in ("ans", "bitpack"):
        codecs.append(kvferry.Lossless(packing))
        codecs += [kvferry.Bounded(0.01, relative=False, mode=m, packing=packing) for m in ("fixed", "outlier")]
    count = reported = 0
    for codec, head_dim in itertools.product(codecs, (128, 72)):
        reported += try_chunks(codec, head_dim, 1.0 if codec.exact else 3.0, generator)
        count += 1
    return count, reported


def try_chunks(codec: kvferry.Codec, head_dim: int, ratio: float, generator: torch.Generator) -> int:
    """Damaged chunks reported, of chunks of three pages in slots of `ratio`."""
    pages, chunk_pages = 12, 3
    layers = [torch.randn(pages, HEADS, 16, 2 * head_dim, generator=generator).bfloat16().cuda() for _ in range(LAYERS)]
    kv = PagedKV.heads_first(layers, head_dim)
    slot_bytes = raw_slot_bytes(kv, chunk_pages, codec)
    if ratio > 1:
        slot_bytes = int(slot_bytes / ratio) // 512 * 512
    slot_codec = SlotCodec(kv, codec, chunk_pages, slot_bytes)
    table = torch.randperm(pages, generator=generator).reshape(-1, chunk_pages).int().cuda()
    index = torch.arange(len(table), dtype=torch.int32, device="cuda")
    positions = 48 * index if isinstance(codec, kvferry.Transform) else None
    identities = torch.arange(2 * len(table), device="cuda").reshape(-1, 2)
    slots = torch.zeros(len(table), slot_bytes, dtype=torch.uint8, device="cuda")
    status = torch.zeros(len(table), dtype=torch.int32, device="cuda")
    slot_codec.encode(table, slots, index, identities, positions)
    slot_codec.decode(slots, index, table, identities, status, positions)
    if status.any():
        raise SystemExit(f"{codec}: statuses {status.tolist()}")
    damage = torch.randint(slot_bytes // 4, (len(table), 6), generator=generator).cuda()
    slots.scatter_(1, damage, slots.gather(1, damage) ^ 16)
    slot_codec.decode(slots, index, table, identities, status, positions)
    return int((status != SlotStatus.GOOD).sum())


def profile(head_dim: int, heads: int, generator: torch.Generator) -> kvferry.Profile:
    """Any bases over `heads` heads together, with steps of a tenth of a standard deviation."""
    rotated = head_dim // 2
    frequencies = tuple(1e4 ** (-2 * i / rotated) for i in range(rotated // 2))
    groups, size = HEADS // heads, heads * head_dim

    def side() -> SideProfile:
        basis = torch.linalg.qr(torch.randn(groups, size, size, generator=generator, dtype=torch.float64)).Q
        return SideProfile.of(torch.randn(groups, size, generator=generator), basis, 0.1)

    layers = tuple(Layer(side(), side()) for _ in range(LAYERS))
    return kvferry.Profile(layers, HEADS, head_dim, heads, kvferry.Rope(head_dim, rotated, frequencies))


def try_transforms(generator: torch.Generator) -> tuple[int, int]:
    """(cases, damaged chunks reported): asked bounds and fixed rates, bases of a head and of two."""
    count = reported = 0
    for heads, head_dim, packing in itertools.product((1, 2), (128, 96), ("ans", "bitpack")):
        given = profile(head_dim, heads, generator)
        for codec in (kvferry.Transform(given, packing=packing), kvferry.Transform(given, ratio=4.0, packing=packing)):
            reported += try_chunks(codec, head_dim, 4.0 if codec.ratio else 1.0, generator)
            count += 1
    return count, reported


PARTS: dict[str, tuple[Callable[[torch.Generator], tuple[int, int]], str, str]] = {
    "bfloat16": (partial(try_frames, torch.bfloat16), "frames of bfloat16", "frames refused"),
    "float32": (partial(try_frames, torch.float32), "frames of float32", "frames refused"),
    "slots": (try_slots, "sets of slots", "chunks reported"),
    "transform": (try_transforms, "sets of slots by transform", "chunks reported"),
}


def main() -> None:
    unknown = set(sys.argv[1:]) - set(PARTS)
    if unknown:
        raise SystemExit(f"no parts {sorted(unknown)}: choose from {sorted(PARTS)}")
    for name in sys.argv[1:] or PARTS:
        run, what, refused = PARTS[name]
        count, found = run(torch.Generator().manual_seed(0))
        torch.cuda.synchronize()
        print(f"{count} {what} encoded and decoded; of damaged ones {found} {refused}", flush=True)


if __name__ == "__main__":
    main()
