"""Make the golden frames: `python tests/golden/make.py [--replace]`, from the repository's root.

Frames once written must be readable for good, so those that exist stay: `--replace` is for a new version of the format.
Inputs come of integer arithmetic alone, so that every machine and every PyTorch makes the same.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kvferry
from kvferry import Bounded, Codec, Lossless, Raw

FOLDER = Path(__file__).parent
DIGESTS = FOLDER / "digests.json"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
FLOATS = ("bfloat16", "float16", "float32")
SPECIALS = {
    "bfloat16": (0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFF81, 0x7F7F),
    "float16": (0x0000, 0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E01, 0xFC01, 0x4BFF),
    "float32": (0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFF800001, 0x42C80000),
    "float8_e4m3fn": (0x00, 0x80, 0x01, 0x87, 0x7F, 0xFF, 0x7E),
    "float8_e5m2": (0x00, 0x80, 0x01, 0x83, 0x7C, 0xFC, 0x7D, 0xFE),
}
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
MEDIUM = (70, 40)
SEVERAL = (2, 66, 144)


def make_input(shape: tuple[int, ...], dtype: str, special: bool) -> Tensor:
    """Noise with a mean of each channel's own, whole 128ths; special bit patterns strewn over it."""
    count = int(np.prod(shape, dtype=np.int64))
    index = np.arange(count, dtype=np.int64)
    channel = index % (shape[-1] if shape else 1)
    noise = np.zeros(count, dtype=np.int64)
    for multiplier, shift in ((2654435761, 9), (2246822519, 11), (3266489917, 7), (668265263, 13)):
        noise += ((index + 1) * multiplier % (1 << 32) >> shift) % 257 - 128
    values = torch.from_numpy((noise // 4 + channel * 7919 % 613 - 306).astype(np.float32)) / 128
    tensor = values.to(DTYPES[dtype]).view(shape)
    if special and count:
        words = np.array(tensor.view(torch.uint8).numpy()).reshape(-1).view(WORDS[tensor.element_size()])
        at = np.arange(5, count, 2 * shape[-1])  # of one channel: one infinity makes all of a channel costly
        words[at] = np.array(SPECIALS[dtype], dtype=words.dtype)[np.arange(len(at)) % len(SPECIALS[dtype])]
        tensor = torch.from_numpy(words.view(np.uint8)).view(DTYPES[dtype]).view(shape)
    return tensor


def bounded(mode: str, packing: str, grouping: str = "token", relative_to: str = "tensor") -> Bounded:
    if relative_to == "absolute":
        return Bounded(0.11, False, "tensor", mode, grouping, packing)
    # float32's specials reach furthest, and the tensor's range with them.
    return Bounded(0.01, True, relative_to, mode, grouping, packing)


def cases() -> dict[str, tuple[Codec, Tensor]]:
    """Codec and input of each golden frame by its name."""
    found: dict[str, tuple[Codec, Tensor]] = {}
    for dtype in DTYPES:
        tensor = make_input(MEDIUM, dtype, special=True)
        found[f"raw-{dtype}"] = Raw(), tensor
        for packing in ("ans", "bitpack"):
            found[f"lossless-{packing}-{dtype}"] = Lossless(packing), tensor
    modes, packings = ("fixed", "plain", "outlier"), ("ans", "bitpack")
    for mode, packing, dtype in itertools.product(modes, packings, FLOATS):
        tensor = make_input(MEDIUM, dtype, special=True)
        found[f"bounded-{mode}-{packing}-{dtype}-absolute"] = bounded(mode, packing, relative_to="absolute"), tensor
    for packing, relative_to in itertools.product(packings, ("tensor", "tile", "channel")):
        tensor = make_input(MEDIUM, "bfloat16", special=False)
        found[f"bounded-fixed-{packing}-bfloat16-{relative_to}"] = (
            bounded("fixed", packing, "token", relative_to),
            tensor,
        )
    for mode, packing in itertools.product(modes, packings):
        tensor = make_input(MEDIUM, "bfloat16", special=False)
        found[f"bounded-{mode}-{packing}-bfloat16-flat-tile"] = bounded(mode, packing, "flat", "tile"), tensor
    found["bounded-outlier-bitpack-float16-flat-channel"] = (
        bounded("outlier", "bitpack", "flat", "channel"),
        make_input(MEDIUM, "float16", special=True),
    )
    for packing in packings:
        several = make_input(SEVERAL, "bfloat16", special=True)
        found[f"lossless-{packing}-bfloat16-several-tiles"] = Lossless(packing), several
        found[f"bounded-fixed-{packing}-bfloat16-several-tiles"] = (
            bounded("fixed", packing, relative_to="channel"),
            several,
        )
    for name, shape in (("scalar", ()), ("empty", (3, 0)), ("vector", (131,))):
        found[f"lossless-ans-bfloat16-{name}"] = Lossless(), make_input(shape, "bfloat16", special=False)
        found[f"bounded-fixed-ans-float32-{name}"] = (
            bounded("fixed", "ans", relative_to="absolute"),
            make_input(shape, "float32", special=False),
        )
    return found


def digest(tensor: Tensor) -> str:
    """sha256 of the values' bits in row-major order."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replace", action="store_true", help="also make anew what exists")
    replace = parser.parse_args().replace
    digests = {} if replace or not DIGESTS.exists() else json.loads(DIGESTS.read_text())
    for name, (codec, tensor) in cases().items():
        path = FOLDER / f"{name}.kvf"
        if path.exists() and name in digests and not replace:
            continue
        path.write_bytes(kvferry.compress(tensor, codec))
        digests[name] = digest(kvferry.decompress(path.read_bytes()))
    DIGESTS.write_text(json.dumps(dict(sorted(digests.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
