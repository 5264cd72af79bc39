"""Every GPU kernel once on small odd tensors, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tools/sanitize.py
    compute-sanitizer --tool racecheck python tools/sanitize.py

Damaged frames are decoded too: a kernel must not read or write outside its tile whatever the bytes say.
"""

import itertools

import torch

import kvferry
from kvferry.codecs import fused
from kvferry.errors import CorruptFrame
from kvferry.format.frame import Frame, read_frame

SHAPES = ((3, 65, 80), (130, 129), (2, 64, 128), (33, 7))
DTYPES = (torch.bfloat16, torch.float32)


def damaged(frame: Frame, generator: torch.Generator) -> Frame:
    """The frame with one byte of each of its first tiles altered behind the checksum's back."""
    payload = bytearray(frame.payload)
    for _ in range(8):
        place = int(torch.randint(len(payload), (1,), generator=generator))
        payload[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
    return Frame(frame.header, frame.sizes, memoryview(bytes(payload)))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
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
            decode = fused.decode_lossless if codec.exact else fused.decode_bounded
            decode(frame, out)
            if codec.exact and not torch.equal(out.cpu().view(torch.uint8), x.view(torch.uint8)):
                raise SystemExit(f"{codec} on {shape} {dtype}: not bit-identical")
            try:
                decode(damaged(frame, generator), out)
            except CorruptFrame:
                refused += 1
            count += 1
    torch.cuda.synchronize()
    print(f"{count} cases encoded and decoded, {refused} of as many damaged frames refused")


if __name__ == "__main__":
    main()
