"""Tensors to frames and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvferry.codecs import codecs
from kvferry.codecs.base import Codec
from kvferry.errors import UnsupportedVersion
from kvferry.format.frame import read_frame, write_frame


@dataclass(frozen=True)
class FrameInfo:
    """What a frame says about itself. `ratio` is raw over encoded bytes, the whole frame counted; `bound_used` the
    largest absolute error bound of any tile (0 for exact codecs)."""

    codec: str
    packing: str
    mode: str
    grouping: str
    relative_to: str
    error_bound: float
    bound_used: float
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_tiles: int
    raw_bytes: int
    encoded_bytes: int

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.encoded_bytes

    @property
    def bits_per_value(self) -> float:
        """Encoded bits per value (infinite for a tensor without values)."""
        values = self.raw_bytes // self.dtype.itemsize
        return 8 * self.encoded_bytes / values if values else float("inf")


def compress(tensor: Tensor, codec: Codec) -> bytes:
    """Encode `tensor` `[..., tokens, channels]` (any strides, CPU or CUDA) as one self-describing frame.

    Raises `TypeError` for what is no dense float tensor that the codec takes, `ValueError` for one that requires grad,
    and what the codec's `encode` raises.
    """
    if not isinstance(codec, Codec):
        raise TypeError(f"codec is a {type(codec).__name__}; pass a codec object such as kvferry.Lossless()")
    encoded = codec.encode(_checked(tensor, codec))
    payload = encoded.payload.contiguous().numpy().data if encoded.payload.numel() else b""
    return write_frame(encoded.header, encoded.sizes, payload)


def _checked(tensor: Tensor, codec: Codec) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}; wrap it with torch.as_tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"a tensor of layout {tensor.layout} cannot be compressed; call .to_dense() first")
    if tensor.dtype not in codec.dtypes:
        wanted = ", ".join(_name(dtype) for dtype in codec.dtypes)
        raise TypeError(f"{codec.name} takes {wanted}, not {_name(tensor.dtype)}; convert it, or use another codec")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"a tensor on {tensor.device} cannot be compressed; move it to the CPU or a CUDA device")
    if tensor.requires_grad:
        raise ValueError("the tensor requires grad and compression has none; pass tensor.detach()")
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decompress(
    frame: bytes | bytearray | memoryview, device: str | torch.device = "cpu", out: Tensor | None = None
) -> Tensor:
    """Decode a frame into a new contiguous tensor on `device`, or into `out` (its shape and dtype, any strides and
    device).

    Raises `CorruptFrame` or `UnsupportedVersion` for frames that are not sound, `ProfileMismatch` for a frame of
    `transform` whose profile this process does not know (`register_profile`), `ValueError` for an `out` of another
    shape or dtype; `out` is untouched then.
    """
    parsed = read_frame(frame)
    header = parsed.header
    codec = codecs().get(header.codec)
    if codec is None:
        known = ", ".join(sorted(codecs()))
        raise UnsupportedVersion(f"the frame needs the codec {header.codec!r}; this installation has {known}")
    if out is not None:
        if tuple(out.shape) != header.shape or out.dtype != header.dtype:
            raise ValueError(
                f"out is {tuple(out.shape)} {_name(out.dtype)}, but the frame holds {header.shape} "
                f"{_name(header.dtype)}: pass a matching tensor"
            )
        device = out.device
    codec.check_size(parsed)
    # Decoded apart from `out`, so that a frame that turns out unsound half-way leaves it as it was.
    result = torch.empty(header.shape, dtype=header.dtype, device=device)
    codec.decode(parsed, result)
    return result if out is None else out.copy_(result)


def inspect(frame: bytes | bytearray | memoryview) -> FrameInfo:
    """Read a frame's header (its checksum is verified). Raises as `decompress` does, but for codecs and profiles it
    lacks."""
    parsed = read_frame(frame)
    header = parsed.header
    return FrameInfo(
        codec=header.codec,
        packing=header.packing,
        mode=header.mode,
        grouping=header.grouping,
        relative_to=header.relative_to,
        error_bound=header.bound_asked,
        bound_used=header.bound_used,
        dtype=header.dtype,
        shape=header.shape,
        num_tiles=len(parsed.sizes),
        raw_bytes=header.raw_bytes,
        encoded_bytes=memoryview(frame).nbytes,
    )
