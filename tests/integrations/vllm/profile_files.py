"""Profiles of the tiny Llama, and of models that it is not. Needs no vLLM."""

from pathlib import Path
from typing import Any

from kvferry import Profile, Rope

LAYERS, HEADS, HEAD_DIM = 2, 2, 32
STEP = 0.05
RATIO, UNSEEN_RATIO, KL = 4.0, 3.9, 0.004


def rope(theta: float = 10000.0, head_dim: int = HEAD_DIM) -> Rope:
    return Rope(head_dim, head_dim, tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2)))


def certificate() -> dict[str, Any]:
    """What `kvferry calibrate` writes, as far as engines look at it."""
    return {
        "held_out": {"transform": {"ratio": RATIO, "kl_nats": KL}, "bounded": {"ratio": 3.0, "kl_nats": KL}},
        "unseen": {"transform": {"ratio": UNSEEN_RATIO, "kl_nats": 1.1 * KL}},
    }


def make_file(
    folder: Path,
    layers: int = LAYERS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    theta: float = 10000.0,
    certified: bool = True,
    step: float = STEP,
) -> str:
    """The path of a profile with Hadamard bases."""
    profile = Profile.hadamard(layers, heads, head_dim, rope(theta, head_dim), [(step, 0.5 * step)] * layers)
    if certified:
        profile = profile.with_certificate(certificate())
    path = folder / "profile.safetensors"
    profile.save(path)
    return str(path)
