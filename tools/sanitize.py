"""Every GPU kernel once on small odd tensors, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tools/sanitize.py
    compute-sanitizer --tool racecheck python tools/sanitize.py

Damaged frames and slots are decoded too: a kernel must not read or write outside its tile whatever the bytes say.
"""

import itertools

import torch

import kvferry
from kvferry.codecs.fused import frames
from kvferry.codecs.slots import SlotCodec, raw_slot_bytes
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, read_frame
from kvferry.format.slot import SlotStatus
from kvferry.pages import PagedKV

SHAPES = ((3, 65, 80), (130, 129), (2, 64, 128), (33, 7))
DTYPES = (torch.bfloat16, torch.float32)


def damaged(frame: Frame, generator: torch.Generator) -> Frame:
    """The frame with one byte of each of its first tiles altered behind the checksum's back."""
    payload = bytearray(frame.payload)
    for _ in range(8):
        place = int(torch.randint(len(payload), (1,), generator=generator))
        payload[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    return Frame(frame.header, frame.sizes, memoryview(bytes(payload)))


def try_frames(generator: torch.Generator) -> tuple[int, int]:
    """(cases, damaged frames refused)"""
    count = refused = 0
    modes = [(mode, relative) for mode in ("fixed", "plain", "outlier") for relative in ("tile", "channel")]
    for dtype, packing, shape in itertools.product(DTYPES, ("ans", "bitpack"), SHAPES):
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
    count = reported = 0
    codecs: list[kvferry.Codec] = [kvferry.Raw()]
    for packing in ("ans", "bitpack"):
        codecs.append(kvferry.Lossless(packing))
        codecs += [kvferry.Bounded(0.01, relative=False, mode=m, packing=packing) for m in ("fixed", "outlier")]
    pages, chunk_pages = 12, 3
    for codec, head_dim in itertools.product(codecs, (128, 72)):
        layers = [torch.randn(pages, 2, 16, 2 * head_dim, generator=generator).bfloat16().cuda() for _ in range(2)]
        kv = PagedKV.heads_first(layers, head_dim)
        whole = raw_slot_bytes(kv, chunk_pages)
        slot_bytes = whole if codec.exact else whole // 3 // 512 * 512
        slot_codec = SlotCodec(kv, codec, chunk_pages, slot_bytes)
        table = torch.randperm(pages, generator=generator).reshape(-1, chunk_pages).int().cuda()
        index = torch.arange(len(table), dtype=torch.int32, device="cuda")
        identities = torch.arange(2 * len(table), device="cuda").reshape(-1, 2)
        slots = torch.zeros(len(table), slot_bytes, dtype=torch.uint8, device="cuda")
        status = torch.zeros(len(table), dtype=torch.int32, device="cuda")
        slot_codec.encode(table, slots, index, identities)
        slot_codec.decode(slots, index, table, identities, status)
        if status.any():
            raise SystemExit(f"{codec}: statuses {status.tolist()}")
        damage = torch.randint(slot_bytes // 4, (len(table), 6), generator=generator).cuda()
        slots.scatter_(1, damage, slots.gather(1, damage) ^ 16)
        slot_codec.decode(slots, index, table, identities, status)
        reported += int((status != SlotStatus.GOOD).sum())
        count += 1
    return count, reported


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    count, refused = try_frames(generator)
    chunks, reported = try_slots(generator)
    torch.cuda.synchronize()
    print(f"{count} frames encoded and decoded, {refused} of as many damaged ones refused")
    print(f"{chunks} sets of slots encoded and decoded, {reported} damaged chunks reported")


if __name__ == "__main__":
    main()
