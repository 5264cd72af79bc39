"""Make the golden frames and slots: `python tests/golden/make.py [--replace]`, from the repository's root.

Frames once written must be readable for good, so those that exist stay: `--replace` is for a new version of the format.
Inputs come of integer arithmetic alone, so that every machine and every PyTorch makes the same.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import kvferry
from kvferry import Bounded, Codec, Lossless, PagedKV, Profile, Raw, Rope, SlotCodec, Transform
from kvferry.codecs.slots import raw_slot_bytes
from kvferry.codecs.transform.profile import Layer, SideProfile

FOLDER = Path(__file__).parent
DIGESTS = FOLDER / "digests.json"
SLOT_DIGESTS = FOLDER / "slot-digests.json"
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
HEADS = (2, 4, 70, 24)


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


def reflection(n: int, seed: int) -> Tensor:
    """A basis int16 `[n, n]`: Householder's reflection I - 2 v v^T / v^T v with whole numbers v, times 2**15 and
    rounded, in integers."""
    v = (np.arange(1, n + 1) * 2654435761 * seed % (1 << 32) >> 13) % 61 - 30
    square = int(v @ v)
    exact = (np.eye(n, dtype=np.int64) * square - 2 * np.outer(v, v)) << 15
    rounded = (2 * exact + square) // (2 * square)
    return torch.from_numpy(np.clip(rounded, -32767, 32767).astype(np.int16))


def golden_profile(heads: int, head_dim: int, group_heads: int, interleaved: bool = False) -> Profile:
    """A profile of two layers, without any arithmetic that machines could differ in."""
    groups, n = heads // group_heads, group_heads * head_dim
    parts = []
    for number in range(4):
        basis = torch.stack([reflection(n, 7 * number + 2 * group + 3) for group in range(groups)])
        mean = torch.arange(groups * n).view(groups, n) * (number + 5) % 193 - 96
        parts.append(SideProfile(mean.float() / 64, basis, (0.25, 0.1875, 0.375, 0.125)[number]))
    pairs = head_dim // 3
    rope = Rope(head_dim, 2 * pairs, tuple(2.0**-i for i in range(pairs)), interleaved)
    return Profile((Layer(*parts[:2]), Layer(*parts[2:])), heads, head_dim, group_heads, rope)


def transform_cases() -> dict[str, tuple[Codec, Tensor]]:
    alone, pairs = golden_profile(4, 24, 1), golden_profile(4, 24, 2, interleaved=True)
    wide = golden_profile(1, 144, 1)
    found: dict[str, tuple[Codec, Tensor]] = {}
    for packing, dtype in itertools.product(("ans", "bitpack"), ("bfloat16", "float16")):
        plain = make_input(HEADS, dtype, special=False)
        found[f"transform-{packing}-{dtype}-k"] = Transform(alone, 0, "k", packing=packing, first_position=40), plain
        special = make_input(HEADS, dtype, special=False)
        # Of eight blocks of 64 tokens of two heads, these two are stored as they are.
        special[0, 1, 3, 5] = float("nan")
        special[1, 2, 69, 23] = -float("inf")
        found[f"transform-{packing}-{dtype}-v-specials"] = Transform(pairs, 1, "v", 0.5, packing=packing), special
    several = make_input((1, 130, 144), "bfloat16", special=False)
    found["transform-ans-bfloat16-k-interleaved"] = (
        Transform(pairs, 1, "k", 2.0),
        make_input(HEADS, "bfloat16", special=False),
    )
    found["transform-ans-bfloat16-k-several-tiles"] = Transform(wide, 1, "k", ratio=3.0), several
    found["transform-ans-bfloat16-v-empty"] = Transform(alone, 0, "v"), several[..., :24].expand(4, -1, -1)[:, :0]
    return found


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
    return found | transform_cases()


@dataclass(frozen=True)
class SlotCase:
    """One chunk of pages of `memory` `[pages, heads, page_tokens, 2*head_dim]` (`opaque`: of its bytes)."""

    codec: Codec
    memory: Tensor
    pages: tuple[int, ...] = (4, 0, 5, 2, 1)
    opaque: bool = False
    slot_bytes: int | None = None
    options: dict[str, object] = field(default_factory=dict)
    bounds: tuple[float, ...] | None = None

    def slot_codec(self, memory: Tensor) -> SlotCodec:
        """The codec of `self`, for pages that lie in `memory`."""
        if self.opaque:
            kv = PagedKV.opaque([memory.view(torch.uint8).flatten(1)])
        else:
            kv = PagedKV.heads_first([memory], memory.shape[3] // 2)
        size = raw_slot_bytes(kv, len(self.pages)) if self.slot_bytes is None else self.slot_bytes
        bounds = None if self.bounds is None else torch.tensor(self.bounds, device=memory.device)
        return SlotCodec(kv, self.codec, len(self.pages), size, bounds=bounds, **self.options)

    def arguments(self, slot: bytes, slot_codec: SlotCodec) -> dict[str, Tensor]:
        """What a call of `slot_codec` takes: one slot, starting with the bytes `slot`."""
        device = slot_codec.kv.device
        slots = torch.zeros(1, slot_codec.slot_bytes, dtype=torch.uint8)
        slots[0, : len(slot)] = torch.from_numpy(np.frombuffer(slot, dtype=np.uint8).copy())
        return {
            "page_table": torch.tensor([self.pages], dtype=torch.int32, device=device),
            "slots": slots.to(device),
            "slot_index": torch.zeros(1, dtype=torch.int32, device=device),
            "identities": torch.tensor([[-(2**63) + 5, 7]], device=device),
        }

    def encode(self, memory: Tensor) -> bytes:
        """The slot's bytes that mean something."""
        slot_codec = self.slot_codec(memory)
        arguments = self.arguments(b"", slot_codec)
        slot_codec.encode(**arguments)
        data = arguments["slots"][0].cpu().numpy().tobytes()
        used = 64 + 8 * slot_codec.num_tiles + int.from_bytes(data[20:24], "little")
        return data[:64] if data[12] == 2 else data[:used]

    def decode(self, slot: bytes, memory: Tensor) -> int:
        """Decode into `memory`; the status."""
        slot_codec = self.slot_codec(memory)
        status = torch.full((1,), 77, dtype=torch.int32, device=memory.device)
        slot_codec.decode(**self.arguments(slot, slot_codec), status=status)
        return int(status)

    def decoded(self, slot: bytes, device: str = "cpu") -> tuple[int, Tensor]:
        """The status, and what the pages are then that were zeros before, on the CPU."""
        memory = torch.zeros_like(self.memory, device=device)
        return self.decode(slot, memory), memory.cpu()


def slot_cases() -> dict[str, SlotCase]:
    """The golden slots by name."""
    found: dict[str, SlotCase] = {}
    shape = (6, 1, 16, 40)
    modes, packings = ("fixed", "plain", "outlier"), ("ans", "bitpack")
    for dtype in DTYPES:
        memory = make_input(shape, dtype, special=True)
        found[f"slot-raw-{dtype}"] = SlotCase(Raw(), memory)
        for packing in packings:
            found[f"slot-lossless-{packing}-{dtype}"] = SlotCase(Lossless(packing), memory)
    for mode, packing, dtype in itertools.product(modes, packings, FLOATS):
        memory = make_input(shape, dtype, special=True)
        found[f"slot-bounded-{mode}-{packing}-{dtype}-absolute"] = SlotCase(
            bounded(mode, packing, relative_to="absolute"), memory
        )
    plain = make_input(shape, "bfloat16", special=False)
    for mode, packing, relative_to in itertools.product(modes, packings, ("tile", "channel")):
        codec = bounded(mode, packing, relative_to=relative_to)
        found[f"slot-bounded-{mode}-{packing}-bfloat16-{relative_to}"] = SlotCase(codec, plain)
    found["slot-raw-opaque"] = SlotCase(Raw(), make_input((6, 1, 8, 130), "float16", special=True), opaque=True)
    wide = make_input((6, 1, 24, 288), "bfloat16", special=True)
    for packing in packings:
        codec = bounded("fixed", packing, relative_to="absolute")
        small = {"codec": codec, "memory": plain, "slot_bytes": 1040}
        found[f"slot-lossless-{packing}-bfloat16-wide"] = SlotCase(Lossless(packing), wide, (1, 3, 0))
        found[f"slot-bounded-fixed-{packing}-bfloat16-relaxed"] = SlotCase(**small)
        found[f"slot-bounded-fixed-{packing}-bfloat16-rejected"] = SlotCase(**small, options={"max_relaxations": 1})
        found[f"slot-bounded-fixed-{packing}-bfloat16-bounds"] = SlotCase(codec, plain, bounds=(0.02, 0.3))
        found[f"slot-bounded-fixed-{packing}-bfloat16-missing-page"] = SlotCase(codec, plain, (4, 0, -1, 2, -1))
    return found


def digest(tensor: Tensor) -> str:
    """sha256 of the values' bits in row-major order."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def make(
    suffix: str, path: Path, entries: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Tensor]]], replace: bool
) -> None:
    """Write the files of `entries` (how to encode, how to decode) that are missing, and their digests to `path`."""
    digests = {} if replace or not path.exists() else json.loads(path.read_text())
    for name, (encode, decode) in entries.items():
        file = FOLDER / f"{name}{suffix}"
        if file.exists() and name in digests and not replace:
            continue
        file.write_bytes(encode())
        digests[name] = digest(decode(file.read_bytes()))
    path.write_text(json.dumps(dict(sorted(digests.items())), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replace", action="store_true", help="also make anew what exists")
    replace = parser.parse_args().replace
    frames = {
        name: (partial(kvferry.compress, tensor, codec), kvferry.decompress)
        for name, (codec, tensor) in cases().items()
    }
    slots = {
        name: (partial(case.encode, case.memory), lambda slot, case=case: case.decoded(slot)[1])
        for name, case in slot_cases().items()
    }
    make(".kvf", DIGESTS, frames, replace)
    make(".kvs", SLOT_DIGESTS, slots, replace)


if __name__ == "__main__":
    main()
