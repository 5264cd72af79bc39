"""Which versions of vLLM this works with. Needs no vLLM."""

import importlib.metadata

from kvferry.errors import KVFerryError

SUPPORTED = ("0.33",)
"""Minor versions whose offloading interface `compat` is written for; it moves with each of them."""


class UnsupportedVLLM(KVFerryError):
    """vLLM is missing, or has another offloading interface than this was written for."""


def check_version(version: str | None = None) -> None:
    """Raise `UnsupportedVLLM` unless `version` (default: the installed vLLM's) is supported."""
    wanted = f"'vllm>={SUPPORTED[0]},<{_after(SUPPORTED[-1])}'"
    try:
        found = version or importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedVLLM(f"vLLM is not installed: pip install {wanted}") from None
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        supported = ", ".join(f"{minor}.x" for minor in SUPPORTED)
        raise UnsupportedVLLM(
            f"vLLM {found} is installed; kvferry works with {supported}: pip install {wanted}, or leave compression "
            "out (--disable-compression)"
        )


def _after(minor: str) -> str:
    major, number = minor.split(".")
    return f"{major}.{int(number) + 1}"
