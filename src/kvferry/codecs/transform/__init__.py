"""Transform coding with a calibrated profile: more quality per byte than any codec that knows nothing of the model.

The heads of a layer are alike, and a basis that is made for them (Karhunen-Loeve, from calibration) leaves most of its
coefficients near zero, where entropy coding makes them cost next to nothing: reverse water-filling with one step for
all (T. Cover and J. Thomas, "Elements of Information Theory", section 10.3.3; for KV caches, KVTC, arXiv:2511.01815).
Keys are turned back by RoPE first. What is coded are float16 coefficients, by the coder of `bounded`.
"""

import math
import struct
import sys
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from kvferry.blocks import MANTISSA_BITS, BlockSpec
from kvferry.codecs.base import Codec, Encoded
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.checks import one_of
from kvferry.codecs.fitting import SCALES
from kvferry.codecs.tiling import TILE_TOKENS
from kvferry.codecs.transform import reference
from kvferry.codecs.transform.profile import SIDES, Profile, SideProfile
from kvferry.codecs.transform.reference import Angles, Matrices
from kvferry.errors import BoundTooTight, CorruptFrame, ProfileMismatch
from kvferry.format.frame import Frame, FrameHeader, frame_overhead, read_frame, write_frame
from kvferry.packing import PACKERS

_PARAMS = struct.Struct("<HBBIQ16s")
_PARAMS_VERSION = 1
_COUNT = struct.Struct("<II")
_NO_VALUES = np.zeros(0, dtype=np.int64)
COEFFICIENTS = torch.float16
MOST_KEPT_BYTES = (1 << 32) - 1
"""Of the values that a frame holds as they are."""
MOST_POSITIONS = 1 << 48
"""Positions are below: float64 holds them, and a frame's header says so of sizes."""
ROUNDING = 2.0**-21
"""Largest Euclidean error that float32 sums make (RoPE off and on, the mean off and on), over a vector's length."""


@dataclass(frozen=True)
class Transform(Codec):
    """Coefficients of a `profile`'s basis, each within 0.5 x `error_bound` of the profile's step for the layer and
    side: `error_bound=1` is what the profile's certificate was measured at, 0.5 halves every error.

    The guarantee is on vectors: the values of a group of heads at a token (`profile.n` of them: one head's, or those
    of all heads of a layer) come back within `l2_bound` in Euclidean distance, so no single value is further off
    either. To that add, in relation to a vector's distance from the mean, `relative_error` (the arithmetic), in
    relation to its length 2**-21 (float32), and of each value half a unit in the last place for rounding to the dtype.
    Blocks of 64 tokens of a group with a value that is not finite, or too far from the mean for a float16 coefficient,
    come back bit for bit. Signed zeros and denormals do not.

    `ratio`: instead of the error bound, the smallest of `fitting.SCALES` that makes a frame `ratio` times smaller than
    the raw values (a tensor without values has no ratio), or a chunk fit its slot; frame and slot say which. `layer`
    (its index) and `side` ("k" or "v") say what is encoded; without them, this is a choice: called with
    `(layer, side, tensor)` it returns the codec for them, as `HostStore.put_cache` asks. `first_position`: of the first
    token, in every sequence of a batch. `packing`: "ans" or "bitpack".

    Decoding needs a profile of the same digest in this process: one that a `Transform` was made of, as long as that
    profile is alive anywhere (in this codec, for one), or one that was given to `kvferry.register_profile`, which keeps
    it. Frames that outlive both need `Profile.load` and `register_profile` again.

    Raises `ValueError` for parameters that are none of this, `ProfileMismatch` for a layer that the profile lacks.
    """

    profile: Profile
    layer: int | None = None
    side: str | None = None
    error_bound: float = 1.0
    ratio: float | None = None
    first_position: int = 0
    packing: str = "ans"

    name: ClassVar[str] = "transform"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.profile, Profile):
            raise TypeError(f"profile is a {type(self.profile).__name__}; load one with kvferry.Profile.load(path)")
        if not 0 < 0.5 * self.error_bound <= 0.5 * sys.float_info.max:
            raise ValueError(f"error_bound={self.error_bound!r} must be a finite number above 0, such as 1.0")
        if self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio!r} must be at least 1, such as 6.0")
        if not isinstance(self.first_position, int) or not 0 <= self.first_position < MOST_POSITIONS:
            raise ValueError(f"first_position={self.first_position!r} must be a whole number from 0 to 2**48 - 1")
        if (self.layer is None) != (self.side is None):
            raise ValueError(f"layer={self.layer} and side={self.side!r}: give both, or neither for a choice")
        if self.side is not None and self.layer is not None:
            one_of("side", self.side, SIDES)
            self.profile.side(self.layer, self.side)
        one_of("packing", self.packing, PACKERS)
        _remember(self.profile)

    def __call__(self, layer_index: int, which: str, tensor: Tensor) -> "Transform":
        """The codec for a layer's `which` ("k" or "v") `[batch, heads, tokens, head_dim]`. Raises `ProfileMismatch` for
        a layer that the profile lacks, `ValueError` if this is for another layer or side."""
        if self.layer is not None:
            if (layer_index, which) != (self.layer, self.side):
                raise ValueError(
                    f"this Transform is for layer {self.layer} {self.side}, not for layer {layer_index} {which}: leave "
                    "out layer= and side= for a choice"
                )
            return self
        return replace(self, layer=layer_index, side=which)

    @property
    def part(self) -> SideProfile:
        """The profile of this layer and side. Raises `ValueError` for a choice."""
        if self.layer is None or self.side is None:
            raise ValueError("this Transform is for no layer: give layer= and side=, or call it to choose")
        return self.profile.side(self.layer, self.side)

    @property
    def l2_bound(self) -> float:
        """Largest Euclidean error of a group's vector before rounding to the dtype, `relative_error` and `ROUNDING`
        apart (with `ratio`: at the profile's own steps; times the `error_bound` that a frame states)."""
        return l2_bound(self.part, 1.0 if self.ratio is not None else self.error_bound)

    @property
    def relative_error(self) -> float:
        """What the arithmetic adds, in relation to a vector's distance from the mean: bases of 16 bits, rows of 16
        bits, coefficients of 11."""
        return relative_error(self.part)

    def num_tiles(self, spec: BlockSpec) -> int:
        """0: the tiles are in the coefficients' own frame."""
        return 0

    def max_payload_bytes(self, spec: BlockSpec) -> int:
        # Every block could be stored as it is, beside coefficients that are zero but not known to be.
        inner = self._coder(1.0).max_encoded_bytes(BlockSpec(_vector_shape(spec.shape, self.profile.n), COEFFICIENTS))
        blocks = -(-spec.num_values // self.profile.head_dim)
        return _COUNT.size + 4 * blocks + spec.raw_bytes + 8 + inner

    def max_encoded_bytes(self, spec: BlockSpec) -> int:
        return self.max_payload_bytes(spec) + frame_overhead(len(spec.shape), 0, _PARAMS.size)

    def encode(self, tensor: Tensor) -> Encoded:
        """Encode K or V `[..., heads, tokens, head_dim]`. Raises `ProfileMismatch` for another shape, `BoundTooTight`
        where no step gives the `ratio`, `ValueError` for 4 GiB or more in blocks that are stored as they are."""
        part = self.part
        rows = self._layers(tensor)
        coefficients = torch.empty(rows.shape, dtype=COEFFICIENTS, device=tensor.device)
        bad = torch.zeros(len(rows), part.groups, rows.shape[2], dtype=torch.bool, device=tensor.device)
        if tensor.numel():
            matrices, angles = self._at(tensor, part)
            for number, row in enumerate(rows):
                coefficients[number], bad[number] = reference.forward(row, matrices, angles)
        blocks = _special_blocks(bad)
        kept = _pack_special(rows, blocks, part.groups)
        if blocks:
            _zero_blocks(coefficients, blocks, part.groups)
        coefficients = _vectors(coefficients, part.groups).reshape(_vector_shape(tensor.shape, part.n))
        scale, inner = self._code(coefficients, len(kept), BlockSpec.of(tensor))
        payload = kept + inner
        bound_used = _pointwise_bound(rows, bad, matrices, angles, part, scale) if tensor.numel() else 0.0
        assert self.layer is not None and self.side is not None
        header = FrameHeader(
            codec=self.name,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            packing=self.packing,
            bound_asked=float(scale),
            bound_used=bound_used,
            params=_PARAMS.pack(
                _PARAMS_VERSION,
                SIDES.index(self.side),
                0,
                self.layer,
                self.first_position,
                bytes.fromhex(self.profile.digest),
            ),
        )
        return Encoded(header, _NO_VALUES, torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    def _code(self, coefficients: Tensor, kept: int, spec: BlockSpec) -> tuple[float, bytes]:
        """(error bound, inner frame) of the coefficients, at the asked bound or to the asked ratio."""
        if self.ratio is None or not spec.num_values:
            return self.error_bound, _frame(coefficients, self._coder(self.error_bound))
        room = spec.raw_bytes / self.ratio - frame_overhead(len(spec.shape), 0, _PARAMS.size) - kept
        low, high = 0, len(SCALES) - 1
        best = _frame(coefficients, self._coder(SCALES[high]))
        if len(best) > room:
            raise BoundTooTight(
                f"ratio={self.ratio} is out of reach: at {SCALES[high]:g} times the profile's steps, "
                f"{spec.raw_bytes} bytes still take {len(best) + kept}; ask for less"
            )
        while low < high:
            middle = (low + high) // 2
            frame = _frame(coefficients, self._coder(SCALES[middle]))
            if len(frame) <= room:
                high, best = middle, frame
            else:
                low = middle + 1
        return SCALES[high], best

    def _coder(self, error_bound: float) -> Bounded:
        return coefficient_coder(error_bound, self.packing)

    def _layers(self, tensor: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]`, contiguous."""
        if tensor.dim() < 3:
            raise ProfileMismatch(f"a tensor {tuple(tensor.shape)} has no heads: give [..., heads, tokens, head_dim]")
        self.profile.check(heads=tensor.shape[-3], head_dim=tensor.shape[-1])
        return tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])

    def _at(self, tensor: Tensor, part: SideProfile) -> tuple[Matrices, Angles | None]:
        assert self.side is not None
        positions = torch.arange(tensor.shape[-2], device=tensor.device) + self.first_position
        return Matrices.of(part, tensor.device), Angles.of(self.profile, self.side, positions)

    @classmethod
    def check_size(cls, frame: Frame) -> None:
        if frame.header.dtype not in cls.dtypes or len(frame.header.shape) < 3:
            raise CorruptFrame(f"a transform frame of {frame.header.dtype} {frame.header.shape}")
        if len(frame.sizes):
            raise CorruptFrame(f"a directory of {len(frame.sizes)} tiles, where a transform frame has none")
        _, inner = _split(frame)
        coefficients = read_frame(inner)
        header = coefficients.header
        stated = header.codec, header.dtype, header.shape, header.packing
        n, shape = header.shape[-1] if header.shape else 0, frame.header.shape
        fits = n > 0 and shape[-1] > 0 and n % shape[-1] == 0 and shape[-3] * shape[-1] % n == 0
        if not fits or stated != (Bounded.name, COEFFICIENTS, _vector_shape(shape, n), frame.header.packing):
            raise CorruptFrame(f"the coefficients' frame is of {stated}, which is not what is around it")
        Bounded.check_size(coefficients)

    @classmethod
    def decode(cls, frame: Frame, out: Tensor) -> None:
        """Raises `ProfileMismatch` if the frame's profile is not loaded in this process."""
        version, side, reserved, layer, first_position, digest = _unpack_params(frame.header.params)
        if version != _PARAMS_VERSION or side >= len(SIDES) or reserved:
            raise CorruptFrame(f"parameters of version {version}, side {side}: not what this version writes")
        profile = _known(digest.hex())
        if profile is None:
            raise ProfileMismatch(
                f"the frame needs the profile {digest.hex()}: load it with kvferry.Profile.load(path) and "
                "kvferry.register_profile(profile)"
            )
        if layer >= len(profile.layers) or first_position >= MOST_POSITIONS:
            raise CorruptFrame(f"layer {layer} of {len(profile.layers)}, first position {first_position}")
        codec = cls(profile, layer, SIDES[side], first_position=first_position)
        shape = frame.header.shape
        if (shape[-3], shape[-1]) != (profile.heads, profile.head_dim):
            raise CorruptFrame(f"{shape} is not the shape of the profile's layers")
        kept, inner = _split(frame)
        coded = read_frame(inner)
        if coded.header.shape != _vector_shape(shape, profile.n):
            raise CorruptFrame(f"coefficients {coded.header.shape} are not those of vectors of {profile.n}")
        coefficients = torch.empty(coded.header.shape, dtype=COEFFICIENTS, device=out.device)
        Bounded.decode(coded, coefficients)
        coefficients = torch.where(coefficients.isfinite(), coefficients, 0.0)
        targets = codec._layers(out)
        rows = _heads(coefficients.reshape(len(targets), *coefficients.shape[-3:]), shape[-1])
        special = _kept_blocks(kept, targets, codec.part.groups)
        if out.numel():
            matrices, angles = codec._at(out, codec.part)
            for row, target in zip(rows, targets, strict=True):
                target.copy_(reference.inverse(row, matrices, angles, out.dtype))
        for block, data in special:
            block.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(out.dtype).reshape(block.shape))


_PROFILES: dict[str, WeakSet[Profile]] = {}
"""By digest, the live profiles that a `Transform` was made of: several may be the same to a decoder."""
_KEPT: dict[str, Profile] = {}
_LOCK = Lock()


def register(profile: Profile) -> None:
    """Keep `profile`, and let frames that were made with it be decoded, for the rest of this process. Without this,
    frames are decoded as long as a profile that a `Transform` was made of is alive. Raises `TypeError` for anything
    but a profile."""
    if not isinstance(profile, Profile):
        raise TypeError(f"profile is a {type(profile).__name__}; load one with kvferry.Profile.load(path)")
    _remember(profile)
    with _LOCK:
        _KEPT.setdefault(profile.digest, profile)


def _remember(profile: Profile) -> None:
    """Let frames of `profile` be decoded while it is alive."""
    digest = profile.digest  # of megabytes, the first time: not under the lock
    with _LOCK:
        if digest not in _PROFILES:
            for gone in [other for other, alive in _PROFILES.items() if not alive]:
                del _PROFILES[gone]
        _PROFILES.setdefault(digest, WeakSet()).add(profile)


def _known(digest: str) -> Profile | None:
    with _LOCK:
        return next(iter(_PROFILES.get(digest, ())), None)


def coefficient_coder(error_bound: float, packing: str = "ans") -> Bounded:
    """What codes coefficients in units of the profile's steps."""
    return Bounded(error_bound=0.5 * error_bound, relative=False, packing=packing)


def l2_bound(part: SideProfile, error_bound: float) -> float:
    """Largest Euclidean error of a group's vector at `error_bound`, but for `relative_error` and rounding."""
    each = 0.5 * error_bound + reference.SMALLEST
    return part.step * math.sqrt(part.n) * each * (1 + part.deviation + 2.0**-15 * math.sqrt(part.n)) * (1 + 2.0**-16)


def relative_error(part: SideProfile) -> float:
    """Largest Euclidean error of a group's vector that the arithmetic makes, over its distance from the mean."""
    return (part.deviation + 2.0**-11 + math.sqrt(part.n) * (2.0**-14 + 2.0**-20)) * (1 + part.deviation) + 2.0**-18


def _pointwise_bound(
    rows: Tensor, bad: Tensor, matrices: Matrices, angles: Angles | None, part: SideProfile, scale: float
) -> float:
    """What no delivered value is further off than: of the longest vector, all that the guarantee adds up."""
    distance, length, largest = 0.0, 0.0, 0.0  # from the mean; from zero; of a single value
    for row, special in zip(rows, bad, strict=True):
        x = torch.where(row.isfinite(), row, 0.0).float()
        turned = x if angles is None else angles.rope.unrotate(x, angles.cos, angles.sin)
        from_mean = reference.group_rows(turned, matrices) - matrices.mean[:, None]
        distance = max(distance, _length(torch.where(special[..., None], 0.0, from_mean)))
        whole = torch.where(special[..., None], 0.0, reference.group_rows(x, matrices))
        length, largest = max(length, _length(whole)), max(largest, float(whole.abs().max()))
    error = l2_bound(part, scale) + relative_error(part) * distance + ROUNDING * length
    unit = max(largest + error, torch.finfo(rows.dtype).smallest_normal) * 2.0 ** -MANTISSA_BITS[rows.dtype]
    return error + 0.5 * unit


def _length(rows: Tensor) -> float:
    """At least the largest Euclidean length of finite vectors float32 `[..., n]`, by 2**-20 of each value's share; the
    same on every machine: of whole numbers a sum is exact in any order."""
    bits = 20
    exponent = reference.row_exponent(rows)
    whole = (rows.abs().double() * reference.power_of_two(bits - exponent).double()).ceil()
    unit = reference.power_of_two(exponent - bits).double()
    return math.sqrt(float(((whole * whole).sum(-1, keepdim=True) * unit * unit).max()))


def _vector_shape(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """`[..., groups, tokens, n]` of `[..., heads, tokens, head_dim]`."""
    return (*shape[:-3], shape[-3] * shape[-1] // n, shape[-2], n)


def _vectors(heads: Tensor, groups: int) -> Tensor:
    """`[B, groups, T, n]` of `[B, H, T, D]`."""
    vectors: Tensor = heads.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)
    return vectors


def _heads(vectors: Tensor, head_dim: int) -> Tensor:
    """`[B, H, T, D]` of `[B, groups, T, n]`."""
    heads: Tensor = vectors.unflatten(3, (-1, head_dim)).transpose(2, 3).flatten(1, 2)
    return heads


def _frame(coefficients: Tensor, codec: Bounded) -> bytes:
    encoded = codec.encode(coefficients)
    payload = encoded.payload.contiguous().numpy().data if encoded.payload.numel() else b""
    return write_frame(encoded.header, encoded.sizes, payload)


# -- blocks of 64 tokens of a group that are stored as they are -------------------------------------------------------


def _special_blocks(bad: Tensor) -> list[tuple[int, int, int]]:
    """(row, group, block) of each block with a token that is `bad`, bool `[B, G, T]`, ascending."""
    padded = torch.nn.functional.pad(bad, (0, -bad.shape[2] % TILE_TOKENS))
    found: list[Any] = padded.unflatten(2, (-1, TILE_TOKENS)).any(3).nonzero().tolist() if bad.numel() else []
    return [(row, group, block) for row, group, block in found]


def _block(rows: Tensor, groups: int, place: tuple[int, int, int]) -> Tensor:
    """The values `[group_heads, at most 64, D]` of a block of `rows` `[B, H, T, D]`."""
    row, group, block = place
    heads = rows.shape[1] // groups
    return rows[row, group * heads : (group + 1) * heads, block * TILE_TOKENS : (block + 1) * TILE_TOKENS]


def _zero_blocks(rows: Tensor, blocks: list[tuple[int, int, int]], groups: int) -> None:
    for place in blocks:
        _block(rows, groups, place).zero_()


def _pack_special(rows: Tensor, blocks: list[tuple[int, int, int]], groups: int) -> bytes:
    """`u32 count, u32 bytes`, the blocks' numbers u32, their values; padded to 8. Raises `ValueError` for too many."""
    num_bytes = sum(_block(rows, groups, place).numel() for place in blocks) * rows.element_size()
    if num_bytes > MOST_KEPT_BYTES:
        raise ValueError(
            f"{len(blocks)} blocks have values that are not finite or too far from the profile's mean, and take "
            f"{num_bytes} bytes as they are, where a frame holds at most {MOST_KEPT_BYTES}: encode fewer tokens at a "
            "time, or use kvferry.Lossless()"
        )
    per_row = -(-rows.shape[2] // TILE_TOKENS)
    numbers = np.array([(row * groups + group) * per_row + block for row, group, block in blocks], dtype="<u4")
    values = b"".join(
        _block(rows, groups, place).contiguous().view(torch.uint8).cpu().numpy().tobytes() for place in blocks
    )
    body = _COUNT.pack(len(blocks), num_bytes) + numbers.tobytes() + values
    return body.ljust(-(-len(body) // 8) * 8, b"\0")


def _special_bytes(payload: memoryview) -> tuple[int, int, int]:
    """(blocks, bytes of their values, bytes of all of it with padding). Raises `CorruptFrame`."""
    if len(payload) < _COUNT.size:
        raise CorruptFrame(f"a payload of {len(payload)} bytes is too short")
    count, num_bytes = _COUNT.unpack_from(payload)
    whole = -(-(_COUNT.size + 4 * count + num_bytes) // 8) * 8
    if whole > len(payload):
        raise CorruptFrame(f"{count} blocks of {num_bytes} bytes do not fit into a payload of {len(payload)}")
    return count, num_bytes, whole


def _split(frame: Frame) -> tuple[memoryview, memoryview]:
    """(what `_pack_special` made, the coefficients' frame)."""
    *_, whole = _special_bytes(frame.payload)
    return frame.payload[:whole], frame.payload[whole:]


def _kept_blocks(kept: memoryview, rows: Tensor, groups: int) -> list[tuple[Tensor, memoryview]]:
    """Each block's place in `rows` and its bytes. Raises `CorruptFrame` where they contradict the shape."""
    count, num_bytes, _ = _special_bytes(kept)
    per_row = -(-rows.shape[2] // TILE_TOKENS)
    numbers = np.frombuffer(kept, dtype="<u4", count=count, offset=_COUNT.size).astype(np.int64)
    if count and int(numbers.max()) >= len(rows) * groups * per_row:
        raise CorruptFrame(f"block {int(numbers.max())} is not in a tensor of {len(rows) * groups * per_row}")
    if np.any(np.diff(numbers) <= 0):
        raise CorruptFrame("blocks that are stored as they are must be in order, and each once")
    places = [(int(n) // per_row // groups, int(n) // per_row % groups, int(n) % per_row) for n in numbers]
    blocks = [_block(rows, groups, place) for place in places]
    if sum(block.numel() for block in blocks) * rows.element_size() != num_bytes:
        raise CorruptFrame(f"{count} blocks do not have {num_bytes} bytes")
    at = _COUNT.size + 4 * count
    parts = []
    for block in blocks:
        size = block.numel() * rows.element_size()
        parts.append((block, kept[at : at + size]))
        at += size
    if any(kept[at:]):
        raise CorruptFrame("the padding behind the blocks that are stored as they are is not zero")
    return parts


def _unpack_params(params: bytes) -> tuple[int, int, int, int, int, bytes]:
    if len(params) != _PARAMS.size:
        raise CorruptFrame(f"{len(params)} bytes of parameters, not {_PARAMS.size}")
    version, side, reserved, layer, first_position, digest = _PARAMS.unpack(params)
    return version, side, reserved, layer, first_position, digest
