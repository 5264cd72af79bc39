"""Packers: integers in columns to bytes and back. `ans` (static-table rANS) is the default, `bitpack` the simple
one."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvferry.packing.ans import reference as ans
from kvferry.packing.bitpack import reference as bitpack
from kvferry.packing.columns import Columns, Decoded, Layout


@dataclass(frozen=True)
class Packer:
    """`pack(columns, layout, capacity)` and `unpack(payload, starts, sizes, tokens, channels, layout)` of the
    reference;
    `group_tokens` is how many consecutive tokens of a channel share a class and a base."""

    name: str
    group_tokens: int
    pack: Callable[[Columns, Layout, int], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, Tensor, int, int, Layout], Decoded]


PACKERS = {
    "ans": Packer("ans", ans.GROUP_TOKENS, ans.pack, ans.unpack),
    "bitpack": Packer("bitpack", bitpack.GROUP_TOKENS, bitpack.pack, bitpack.unpack),
}
