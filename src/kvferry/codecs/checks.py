"""Checks with an error that names the value and the remedy."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from kvferry.errors import CorruptFrame


def one_of(name: str, value: object, options: Iterable[str], *, corrupt: bool = False) -> None:
    """Raise `ValueError` (or, for a value read from a frame, `CorruptFrame`) unless `value` is one of `options`."""
    options = list(options)
    if value in options:
        return
    if corrupt:
        raise CorruptFrame(f"the frame's {name} {value!r} does not go with its codec")
    raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, options))}")


def gpu_kernels(part: str) -> ModuleType:
    """The module `part` of `kvferry.codecs.fused`. Raises `ImportError` naming the remedy where the CUDA bindings are
    missing."""
    try:
        return import_module(f"kvferry.codecs.fused.{part}")
    except ImportError as error:
        raise ImportError(
            f"a CUDA tensor needs the GPU kernels ({error}); pip install 'kvferry[gpu]', or use a CPU tensor"
        ) from error
