"""Studies: one thing changed at a time, each a few codecs side by side under the same protocol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """A question, and the codecs (`codec_names.GRAMMAR`) whose comparison answers it."""

    name: str
    question: str
    codecs: tuple[str, ...]
    needs_profile: bool = False


_BASE = "bounded:0.2sigma"

STUDIES = (
    Study(
        "sides",
        "How much of the damage is in K, how much in V? The other side is kept as it is and counted with 16 bits.",
        tuple(f"{codec}{side}" for codec in (_BASE, "int4", "kivi2") for side in ("", "@k", "@v")),
    ),
    Study(
        "bounds",
        "What should a bound be relative to: the deviation of a layer's K or V, its range, a tile's, a channel's?",
        (
            *(f"bounded:{bound}sigma" for bound in (0.1, 0.2, 0.4)),
            *(f"bounded:{bound}range" for bound in (0.01, 0.02, 0.04)),
            *(f"bounded:{bound}tile" for bound in (0.01, 0.02, 0.04)),
            *(f"bounded:{bound}channel" for bound in (0.02, 0.04, 0.08)),
        ),
    ),
    Study(
        "modes",
        "Does predicting a value from the token before it help? The bound is the same, so only the size should move.",
        (_BASE, "bounded-plain:0.2sigma", "bounded-outlier:0.2sigma"),
    ),
    Study(
        "grouping",
        "Tokens of a channel coded together, or values as they lie in memory; entropy coding, or fixed widths?",
        (_BASE, "bounded-flat:0.2sigma", "bounded-bitpack:0.2sigma", "bounded-flat-bitpack:0.2sigma"),
    ),
    Study(
        "group-size",
        "How many values should share a scale and a zero?",
        tuple(f"kivi{bits}:{group}" for bits in (2, 4) for group in (16, 32, 64, 128)),
    ),
    Study(
        "chunks",
        "What does it cost to code chunks of tokens apart, as a store of chunks does?",
        (_BASE, *(f"{_BASE}@chunk{tokens}" for tokens in (16, 64, 256)), "kivi2", "kivi2@chunk16"),
    ),
    Study(
        "sinks",
        "Does it help to keep the first tokens as they are?",
        tuple(f"{codec}{sinks}" for codec in (_BASE, "int2", "int4", "kivi2") for sinks in ("", "@sinks4", "@sinks16")),
    ),
    Study(
        "basis",
        "What is the calibrated basis worth, against a Hadamard basis with the same steps? (Give "
        "a profile per head and one per layer to compare these.)",
        tuple(f"transform{basis}:{bound}" for basis in ("", "-hadamard") for bound in (1, 2)),
        needs_profile=True,
    ),
    Study(
        "un-rotation",
        "What is it worth to take RoPE off the keys first? (The basis is for unrotated keys "
        "in both cases; give a profile calibrated with --no-rope too, to see what a basis of its own makes of it.)",
        tuple(f"transform{off}:{bound}" for off in ("", "-rotated") for bound in (1, 2)),
        needs_profile=True,
    ),
    Study(
        "transform-bounds",
        "How do size and quality of the transform follow its error bound?",
        tuple(f"transform:{bound}" for bound in (0.25, 0.5, 1, 2, 4)),
        needs_profile=True,
    ),
    Study(
        "transform-parts",
        "The transform on one side only, with the first tokens kept, and in chunks.",
        tuple(f"transform:1{part}" for part in ("", "@k", "@v", "@sinks4", "@chunk16", "@chunk64", "@chunk256")),
        needs_profile=True,
    ),
)


def choose_studies(names: Iterable[str], *, with_profile: bool) -> list[Study]:
    """The studies of those names; `default` is all that can be had, `none` is none.

    Raises `ValueError` for other names, and for studies that need a profile where there is none.
    """
    known = {study.name: study for study in STUDIES}
    chosen: list[Study] = []
    for name in names:
        if name == "default":
            chosen += [study for study in STUDIES if with_profile or not study.needs_profile]
        elif name in known:
            if known[name].needs_profile and not with_profile:
                raise ValueError(
                    f"the study {name!r} needs a profile: give --profile FILE (kvferry calibrate makes one)"
                )
            chosen.append(known[name])
        elif name != "none":
            raise ValueError(f"unknown study {name!r}: give some of {', '.join(known)}, or default, or none")
    return list(dict.fromkeys(chosen))
