"""What the transform codec knows of a model's KV cache: means, orthonormal bases and steps, layer by layer."""

from __future__ import annotations

import copy
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from kvferry.codecs.transform.rope import Rope
from kvferry.errors import CorruptProfile, ProfileMismatch

BASIS_BITS = 15
"""Basis vectors are integers over 2**15."""
MOST_GROUP_CHANNELS = 1024
SIDES = ("k", "v")
_VERSION = 1
_LARGEST_ENTRY = (1 << BASIS_BITS) - 1
_ORTHONORMAL_WITHIN = 1e-3
SMALLEST_STEP, LARGEST_STEP = 2.0**-40, 2.0**100
"""What float32 steps, their reciprocals and the products with both stay exact, or finite, for."""
_LARGEST_MEAN = 2.0**100
_NO_SAFETENSORS = "profiles are safetensors files: pip install 'kvferry[transformers]'"


@dataclass(frozen=True, eq=False)
class SideProfile:
    """The K or the V of one layer, whose heads form groups of `n` channels.

    `mean` float32 `[groups, n]`, `basis` int16 `[groups, n, n]` (column j is basis vector j times 2**15, rounded;
    vectors in order of falling variance), `step`: what one unit of a coefficient is worth, so that coding it with error
    bound 0.5 is rounding to the step (2**-40 to 2**100; means are at most 2**100 in magnitude). `bound`: absolute error
    bound of the same layer and side for `kvferry.Bounded`, 0 where none was calibrated. All on the CPU. Raises
    `ValueError` for anything else.
    """

    mean: Tensor
    basis: Tensor
    step: float
    bound: float = 0.0

    def __post_init__(self) -> None:
        groups, n = self.mean.shape if self.mean.dim() == 2 else (0, 0)
        if self.mean.dtype != torch.float32 or not groups or not n:
            raise ValueError(f"mean is {self.mean.dtype} {tuple(self.mean.shape)}: give float32 [groups, n]")
        if self.basis.dtype != torch.int16 or tuple(self.basis.shape) != (groups, n, n):
            raise ValueError(f"basis is {self.basis.dtype} {tuple(self.basis.shape)}: give int16 {(groups, n, n)}")
        if self.mean.device.type != "cpu" or self.basis.device.type != "cpu":
            raise ValueError(f"mean is on {self.mean.device}, basis on {self.basis.device}: give both on the CPU")
        self._check_scalars()
        if not bool((self.mean.abs() <= _LARGEST_MEAN).all()):
            raise ValueError("mean holds a value that is not finite, or beyond 2**100")
        if self.deviation > _ORTHONORMAL_WITHIN * math.sqrt(n / 16 + 1):
            raise ValueError(f"the basis is not orthonormal: it deviates by {self.deviation:.3g} from one that is")

    def _check_scalars(self) -> None:
        if not SMALLEST_STEP <= self.step <= LARGEST_STEP:
            raise ValueError(f"step={self.step} must be at least {SMALLEST_STEP:.3g} and at most {LARGEST_STEP:.3g}")
        if not (math.isfinite(self.bound) and self.bound >= 0):
            raise ValueError(f"bound={self.bound} must be a finite number, 0 or more")

    @classmethod
    def of(cls, mean: Tensor, basis: Tensor, step: float, bound: float = 0.0) -> SideProfile:
        """From a float `mean` `[groups, n]` and an orthonormal float `basis` `[groups, n, n]`."""
        scaled = (basis.detach().cpu().double() * (1 << BASIS_BITS)).round().clamp(-_LARGEST_ENTRY, _LARGEST_ENTRY)
        return cls(mean.detach().cpu().float().contiguous(), scaled.to(torch.int16).contiguous(), step, bound)

    @property
    def groups(self) -> int:
        return self.mean.shape[0]

    @property
    def n(self) -> int:
        """Channels of a group."""
        return self.mean.shape[1]

    @cached_property
    def deviation(self) -> float:
        """Largest `||B B^T - I||` (spectral norm) over the groups, of the basis as it is stored; rounded up to 2**-20,
        which takes away what eigenvalue solvers differ in. Frames hold what is made of it."""
        basis = self.basis.double()
        difference = basis @ basis.transpose(1, 2) / (1 << 2 * BASIS_BITS) - torch.eye(self.n, dtype=torch.float64)
        norm = float(torch.linalg.eigvalsh(difference).abs().amax())
        # Entries are multiples of 2**-30: simple norms are, too, and a third away from where rounding changes.
        return math.ceil(norm * 2**20 + 1 / 3) * 2.0**-20

    def with_scalars(self, *, step: float | None = None, bound: float | None = None) -> SideProfile:
        """A copy with another step or bound, and the same tensors: its basis is not checked again, and the spectral
        norm `deviation` is kept. Raises `ValueError` as the constructor."""
        other = copy.copy(self)
        object.__setattr__(other, "step", self.step if step is None else step)
        object.__setattr__(other, "bound", self.bound if bound is None else bound)
        other._check_scalars()
        return other


class Layer(NamedTuple):
    """K and V of one layer."""

    k: SideProfile
    v: SideProfile


@dataclass(frozen=True, eq=False)
class Profile:
    """A calibrated transform of a model's KV cache; `layers[i][0]` is K, `[1]` V.

    `heads` KV heads of `head_dim` in each layer; `group_heads` of them form a group that is transformed together
    (1: each head on its own; `heads`: all heads of a layer). `rope` is taken off keys first. `model` names the model;
    `certificate` says what was measured, on which text. Raises `ValueError` for parts that do not fit together.
    """

    layers: tuple[Layer, ...]
    heads: int
    head_dim: int
    group_heads: int
    rope: Rope
    model: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(Layer(*pair) for pair in self.layers))
        n = self.group_heads * self.head_dim
        if not self.layers or self.group_heads < 1 or self.heads % self.group_heads or n > MOST_GROUP_CHANNELS:
            raise ValueError(
                f"{len(self.layers)} layers, {self.heads} heads in groups of {self.group_heads} with {self.head_dim} "
                f"channels each: groups divide the heads and have at most {MOST_GROUP_CHANNELS} channels"
            )
        if self.rope.head_dim != self.head_dim:
            raise ValueError(f"the rope is of head_dim={self.rope.head_dim}, the profile of {self.head_dim}")
        for number, (side, part) in self._sides():
            if (part.groups, part.n) != (self.heads // self.group_heads, n):
                raise ValueError(
                    f"layer {number} {side} has {part.groups} groups of {part.n} channels, not "
                    f"{self.heads // self.group_heads} of {n}"
                )

    @property
    def groups(self) -> int:
        """Groups of a layer's K, or V."""
        return self.heads // self.group_heads

    @property
    def n(self) -> int:
        """Channels of a group."""
        return self.group_heads * self.head_dim

    def _sides(self) -> Iterator[tuple[int, tuple[str, SideProfile]]]:
        for number, layer in enumerate(self.layers):
            for side, part in zip(SIDES, layer, strict=True):
                yield number, (side, part)

    def side(self, layer: int, side: str) -> SideProfile:
        """The part of `layer` and `side` ("k" or "v"). Raises `ProfileMismatch` for a layer that it does not have."""
        if not 0 <= layer < len(self.layers):
            raise ProfileMismatch(
                f"layer {layer} is not in a profile of {len(self.layers)} layers: use the model's own"
            )
        return self.layers[layer][SIDES.index(side)]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of all that decoding depends on."""
        state = xxhash.xxh3_128()
        shape = [_VERSION, len(self.layers), self.heads, self.head_dim, self.group_heads, asdict(self.rope)]
        state.update(json.dumps(shape).encode())
        for _, (_, part) in self._sides():
            state.update(part.mean.numpy().tobytes())
            state.update(part.basis.numpy().tobytes())
            state.update(float(part.step).hex().encode())
        return state.hexdigest()

    def check(
        self, *, layers: int | None = None, heads: int | None = None, head_dim: int | None = None,
        rope: Rope | None = None,
    ) -> None:  # fmt: skip
        """Raise `ProfileMismatch`, naming the difference, unless what is given is as in the profile."""
        own = {"layers": len(self.layers), "heads": self.heads, "head_dim": self.head_dim}
        for name, asked in (("layers", layers), ("heads", heads), ("head_dim", head_dim)):
            if asked is not None and asked != own[name]:
                raise ProfileMismatch(
                    f"the profile is of a model with {name}={own[name]}, this one has {asked}: calibrate this model "
                    "(kvferry calibrate)"
                )
        if rope is not None and not _same_angles(rope, self.rope):
            raise ProfileMismatch(
                f"the profile was made with another RoPE (rotary_dim={self.rope.rotary_dim}, against "
                f"{rope.rotary_dim}; first frequencies {self.rope.inv_freq[1:3]}, against {rope.inv_freq[1:3]}): "
                "calibrate this model (kvferry calibrate)"
            )

    def with_steps(self, steps: Sequence[tuple[float, float]]) -> Profile:
        """A copy with other steps (K, V of each layer); it has no certificate."""
        layers = [
            Layer(layer.k.with_scalars(step=k), layer.v.with_scalars(step=v))
            for layer, (k, v) in zip(self.layers, steps, strict=True)
        ]
        return replace(self, layers=tuple(layers), certificate={})

    def with_bounds(self, bounds: Sequence[tuple[float, float]]) -> Profile:
        """A copy with other bounds for the plain `bounded` codec (K, V of each layer)."""
        layers = [
            Layer(layer.k.with_scalars(bound=k), layer.v.with_scalars(bound=v))
            for layer, (k, v) in zip(self.layers, bounds, strict=True)
        ]
        return replace(self, layers=tuple(layers))

    def with_certificate(self, certificate: dict[str, Any]) -> Profile:
        """A copy with another certificate."""
        return replace(self, certificate=certificate)

    def for_heads(self, first: int, count: int) -> Profile:
        """The profile of heads `first` to `first + count` alone: those of one worker, under tensor parallelism. It
        keeps the certificate, which is of all heads. Raises `ValueError` for heads that do not exist, `ProfileMismatch`
        where they cut a group."""
        if first < 0 or count < 1 or first + count > self.heads:
            raise ValueError(f"heads {first} to {first + count - 1} are not among the profile's {self.heads}")
        if first % self.group_heads or count % self.group_heads:
            raise ProfileMismatch(
                f"the profile transforms {self.group_heads} heads together, and heads {first} to {first + count - 1} "
                "alone are asked for (tensor parallelism): calibrate with kvferry calibrate --scope head"
            )
        if count == self.heads:
            return self
        groups = slice(first // self.group_heads, (first + count) // self.group_heads)
        layers = [
            Layer(*(SideProfile(part.mean[groups], part.basis[groups], part.step, part.bound) for part in layer))
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers), heads=count)

    @classmethod
    def hadamard(
        cls, layers: int, heads: int, head_dim: int, rope: Rope, steps: Sequence[tuple[float, float]]
    ) -> Profile:
        """Without calibration: each head on its own, mean 0, a Hadamard basis (Sylvester's construction on the largest
        power of two that divides `head_dim`, block by block), which spreads large channels over all."""
        basis = _hadamard(head_dim).expand(heads, -1, -1)
        mean = torch.zeros(heads, head_dim)
        whole = SideProfile.of(mean, basis, 1.0)  # checked once: the rest are copies
        parts = [Layer(*(whole.with_scalars(step=step) for step in pair)) for pair in steps]
        if len(parts) != layers:
            raise ValueError(f"{len(parts)} pairs of steps for {layers} layers: give one pair (K, V) a layer")
        return cls(tuple(parts), heads, head_dim, 1, rope)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, under another name in the same folder first: whoever reads `path` finds the whole
        file, or what was there before. Raises `ImportError` without safetensors, `OSError` where it cannot write."""
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise ImportError(f"{_NO_SAFETENSORS} ({error})") from error

        tensors, scalars = {}, []
        for number, (side, part) in self._sides():
            # Copies: the format takes no tensors that share memory, as those of Hadamard profiles do.
            tensors[f"layer{number}.{side}.mean"] = part.mean.clone(memory_format=torch.contiguous_format)
            tensors[f"layer{number}.{side}.basis"] = part.basis.clone(memory_format=torch.contiguous_format)
            scalars.append((part.step, part.bound))
        described = {
            "version": _VERSION,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "group_heads": self.group_heads,
            "rope": asdict(self.rope),
            "steps_and_bounds": scalars,
            "model": self.model,
            "certificate": self.certificate,
            "digest": self.digest,
        }
        text = json.dumps(described)
        metadata = {"kvferry_profile": text, "kvferry_checksum": xxhash.xxh3_128_hexdigest(text.encode())}
        target = Path(path).resolve()  # of a link, what it points to is replaced
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {str(target.parent)!r} to write a profile into: make it first")
        unfinished = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}")
        try:
            save_file(tensors, str(unfinished), metadata=metadata)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote. Raises `CorruptProfile` for other files and damaged ones, `FileNotFoundError`,
        `ImportError` without safetensors."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ImportError(f"{_NO_SAFETENSORS} ({error})") from error

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no profile {str(path)!r}: make one with kvferry calibrate")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                text = metadata["kvferry_profile"]
                if xxhash.xxh3_128_hexdigest(text.encode()) != metadata["kvferry_checksum"]:
                    raise CorruptProfile(f"{path} was altered: the checksum of its description does not match")
                described = json.loads(text)
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            if described["version"] != _VERSION:
                raise CorruptProfile(f"{path} is a profile of version {described['version']}, this reads {_VERSION}")
            parts = []
            for i, (step, bound) in enumerate(described["steps_and_bounds"]):
                at = f"layer{i // 2}.{SIDES[i % 2]}."
                parts.append(SideProfile(tensors[at + "mean"], tensors[at + "basis"], float(step), float(bound)))
            profile = cls(
                tuple(Layer(*pair) for pair in zip(parts[0::2], parts[1::2], strict=True)),
                described["heads"],
                described["head_dim"],
                described["group_heads"],
                Rope(**described["rope"]),
                described["model"],
                described["certificate"],
            )
        except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise CorruptProfile(f"{path} is no profile, or a damaged one: {error!r}") from error
        if profile.digest != described.get("digest"):
            raise CorruptProfile(f"{path} was altered: its digest is {profile.digest}, not {described.get('digest')}")
        return profile


def _same_angles(left: Rope, right: Rope) -> bool:
    return (
        left.rotary_dim == right.rotary_dim
        and left.interleaved == right.interleaved
        and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(left.inv_freq, right.inv_freq, strict=True))
    )


def _hadamard(size: int) -> Tensor:
    block = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    whole: Tensor = torch.block_diag(*[block / math.sqrt(len(block))] * (size // len(block)))
    return whole
