"""Where the KV cache of a serving engine lies: pages of tokens, seen line by line, whatever the engine's layout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvferry.blocks import FLOAT_DTYPES, FP8_DTYPES, each_element_once
from kvferry.codecs.tiling import TILE_CHANNELS, channel_segments
from kvferry.format.slot import layout_digest

ROW_STEP = 8
"""Tokens that kernels read at a time: they must lie in one page."""
_OPAQUE_TOKENS = (64, 32, 16, 8)
_OPAQUE_ROW_STEP = 16
_MOST_TOKEN_STRIDE = (1 << 32) - 1


@dataclass(frozen=True, eq=False)
class PagedKV:
    """The pages of one group of layers as `lines`: each the K or V of one head of one layer (at most 128 channels; a
    wider head is cut as tiles are, docs/format.md), a view `[pages, page_tokens, channels]` of the engine's memory.

    Lines share dtype (bfloat16, float16, float32, a float8, or uint8 for bytes that nobody understands), device, number
    of pages and page_tokens (a multiple of 8); each has its own strides and channels, channels one element apart.
    Encoding reads through the lines, decoding writes through them. Raises `ValueError` for lines that are not so,
    `TypeError` for another dtype.

    The constructors order lines by layer, then K before V, then head, then segment of the head.
    """

    lines: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.lines:
            raise ValueError("no lines: pass the tensors of at least one layer")
        object.__setattr__(self, "lines", tuple(self.lines))
        first = self.lines[0]
        for number, line in enumerate(self.lines):
            _check_line(line, f"line {number}")
            if line.dtype != first.dtype or line.device != first.device or line.shape[:2] != first.shape[:2]:
                raise ValueError(
                    f"line {number} is {_describe(line)}, line 0 is {_describe(first)}: lines share dtype, device, "
                    "pages and tokens of a page; make one PagedKV of each kind of layer"
                )

    @classmethod
    def heads_first(cls, layers: Sequence[Tensor], head_dim: int) -> "PagedKV":
        """Layers `[pages, heads, tokens, 2*head_dim]`, each token's K before its V (vLLM 0.33), or `[..., head_dim]`
        where there is no V (MLA)."""
        views: list[Tensor] = []
        for number, layer in enumerate(layers):
            _check_dims(layer, number, "[pages, heads, tokens, channels]", 4)
            if head_dim < 1 or layer.shape[3] not in (head_dim, 2 * head_dim):
                raise ValueError(
                    f"layer {number} has {layer.shape[3]} channels, which is neither head_dim={head_dim} nor twice "
                    "that: pass the head_dim of these layers"
                )
            views += [half[:, head] for half in layer.split(head_dim, dim=3) for head in range(layer.shape[1])]
        return cls._of(views)

    @classmethod
    def kv_first(cls, layers: Sequence[Tensor]) -> "PagedKV":
        """Layers `[2, pages, tokens, heads, channels]`: all K, then all V."""
        return cls._of(_token_rows(layers, "[2, pages, tokens, heads, channels]", 0))

    @classmethod
    def kv_second(cls, layers: Sequence[Tensor]) -> "PagedKV":
        """Layers `[pages, 2, tokens, heads, channels]`: K before V in each page."""
        return cls._of(_token_rows(layers, "[pages, 2, tokens, heads, channels]", 1))

    @classmethod
    def heads_only(cls, layers: Sequence[Tensor]) -> "PagedKV":
        """Tensors `[pages, heads, tokens, channels]` that are K or V alone: a layer's K, then its V, then the next
        layer's."""
        views: list[Tensor] = []
        for number, layer in enumerate(layers):
            _check_dims(layer, number, "[pages, heads, tokens, channels]", 4)
            views += [layer[:, head] for head in range(layer.shape[1])]
        return cls._of(views)

    @classmethod
    def plain(cls, tensors: Sequence[Tensor], page_tokens: int) -> "PagedKV":
        """Tensors `[heads, tokens, channels]` without pages, a layer's K, then its V: page p is tokens
        `p*page_tokens` to `(p+1)*page_tokens`."""
        views: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            _check_dims(tensor, number, "[heads, tokens, channels]", 3)
            if page_tokens < 1 or tensor.shape[1] % page_tokens:
                raise ValueError(
                    f"tensor {number} has {tensor.shape[1]} tokens, no multiple of page_tokens={page_tokens}: pass "
                    "whole pages, such as tensor[:, :tokens // page_tokens * page_tokens]"
                )
            views += [tensor[head].unflatten(0, (-1, page_tokens)) for head in range(tensor.shape[0])]
        return cls._of(views)

    @classmethod
    def opaque(cls, layers: Sequence[Tensor]) -> "PagedKV":
        """Layers `[pages, page_bytes]` of uint8 that nobody understands, for `Raw` alone. A page is seen as 8 to 64
        rows (`page_tokens`) of bytes; `page_bytes` is a multiple of 8."""
        for number, layer in enumerate(layers):
            _check_dims(layer, number, "[pages, page_bytes]", 2)
            if layer.dtype != torch.uint8:
                raise TypeError(f"layer {number} is {_name(layer.dtype)}; view it as bytes: layer.view(torch.uint8)")
        sizes = [layer.shape[1] for layer in layers]
        # Rows of 16 bytes and their multiples copy fastest.
        steps = [tokens * _OPAQUE_ROW_STEP for tokens in _OPAQUE_TOKENS]
        fitting = [
            tokens for tokens, step in zip(_OPAQUE_TOKENS, steps, strict=True) if not any(n % step for n in sizes)
        ]
        page_tokens = fitting[0] if fitting else ROW_STEP
        uneven = [n for n in sizes if n % page_tokens or n == 0]
        if uneven:
            raise ValueError(f"a page of {uneven[0]} bytes is no multiple of {ROW_STEP}: pad the pages")
        return cls._of([layer.unflatten(1, (page_tokens, -1)) for layer in layers])

    @classmethod
    def _of(cls, views: Iterable[Tensor]) -> "PagedKV":
        """From views `[pages, page_tokens, channels]` of any width."""
        lines = [
            view[:, :, start : start + width] for view in views for start, width in channel_segments(view.shape[2])
        ]
        return cls(tuple(lines))

    @property
    def dtype(self) -> torch.dtype:
        return self.lines[0].dtype

    @property
    def device(self) -> torch.device:
        return self.lines[0].device

    @property
    def is_opaque(self) -> bool:
        """Whether the lines are bytes that nobody understands."""
        return self.dtype == torch.uint8

    @property
    def num_lines(self) -> int:
        return len(self.lines)

    @property
    def num_pages(self) -> int:
        return self.lines[0].shape[0]

    @property
    def page_tokens(self) -> int:
        return self.lines[0].shape[1]

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Channels of each line."""
        return tuple(line.shape[2] for line in self.lines)

    @cached_property
    def page_bytes(self) -> int:
        """Raw bytes of one page of all lines."""
        return self.page_tokens * sum(self.channels) * self.dtype.itemsize

    @cached_property
    def layout_digest(self) -> int:
        """32 bits that tell apart layouts between which slots cannot be exchanged (docs/format.md, "Slot")."""
        return layout_digest(self.dtype, self.page_tokens, self.channels)

    @cached_property
    def line_places(self) -> tuple[tuple[int, int, int], ...]:
        """Of each line: address of the first value of page 0; bytes from page to page, and from token to token."""
        size = self.dtype.itemsize
        return tuple((line.data_ptr(), line.stride(0) * size, line.stride(1) * size) for line in self.lines)

    @cached_property
    def kernel_lines(self) -> Tensor:
        """What kernels address lines by, int64 `[num_lines, 3]` on the device: `line_places`, and channels above
        the low 32 bits of the bytes from token to token."""
        places = zip(self.line_places, self.channels, strict=True)
        rows = [(start, page, token | channels << 32) for (start, page, token), channels in places]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)


def _token_rows(layers: Sequence[Tensor], form: str, kv_dim: int) -> list[Tensor]:
    """The views of layers `[2, pages, tokens, heads, channels]`, the 2 at `kv_dim`."""
    views: list[Tensor] = []
    for number, layer in enumerate(layers):
        _check_dims(layer, number, form, 5)
        if layer.shape[kv_dim] != 2:
            raise ValueError(
                f"layer {number} is {tuple(layer.shape)}, not {form}: pass K and V as its dimension {kv_dim}"
            )
        views += [half[:, :, head] for half in layer.unbind(kv_dim) for head in range(layer.shape[3])]
    return views


def _check_dims(tensor: Tensor, number: int, form: str, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"layer {number} is a {type(tensor).__name__}; pass tensors {form}")
    if tensor.dim() != dims:
        raise ValueError(f"layer {number} is {tuple(tensor.shape)}, not {form}: reshape it, or use another constructor")


def _check_line(line: Tensor, name: str) -> None:
    if not isinstance(line, Tensor) or line.layout != torch.strided or line.dim() != 3:
        raise TypeError(f"{name} must be a dense tensor [pages, page_tokens, channels]; use a constructor of PagedKV")
    if line.dtype not in (*FLOAT_DTYPES, *FP8_DTYPES, torch.uint8):
        raise TypeError(
            f"{name} is {_name(line.dtype)}; pass bfloat16, float16, float32 or a float8 (bytes that are a float8: "
            "tensor.view(torch.float8_e4m3fn); other bytes: PagedKV.opaque)"
        )
    if line.numel() == 0:
        raise ValueError(f"{name} is {tuple(line.shape)}: leave out tensors without values")
    if line.shape[1] % ROW_STEP:
        raise ValueError(
            f"a page has {line.shape[1]} tokens, no multiple of {ROW_STEP}: set the engine's block size to 16 or 32"
        )
    if line.shape[2] > TILE_CHANNELS:
        raise ValueError(
            f"{name} has {line.shape[2]} channels, more than {TILE_CHANNELS}: use a constructor of PagedKV"
        )
    if line.shape[2] > 1 and line.stride(2) != 1:
        raise ValueError(f"the channels of {name} are {line.stride(2)} elements apart: they must be adjacent, copy it")
    if line.requires_grad or line.is_neg():
        raise ValueError(f"{name} requires grad, or is a negated view: pass tensor.detach().resolve_neg()")
    if line.stride(1) * line.element_size() > _MOST_TOKEN_STRIDE:
        raise ValueError(
            f"the tokens of {name} are {line.stride(1)} elements apart: at most {_MOST_TOKEN_STRIDE} bytes"
        )
    if not each_element_once(line):
        raise ValueError(
            f"values of {name} share memory (strides {line.stride()}): an expanded tensor cannot be decoded"
        )


def _describe(line: Tensor) -> str:
    return f"{_name(line.dtype)} {tuple(line.shape)} on {line.device}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
