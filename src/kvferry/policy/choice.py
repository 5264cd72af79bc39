"""What a policy is, and how the codec for one tensor comes of whatever was given."""

from typing import Literal, Protocol

from torch import Tensor

from kvferry.codecs.base import Codec

KOrV = Literal["k", "v"]


class Policy(Protocol):
    """Chooses the codec for a layer's K or V."""

    def __call__(self, layer_index: int, which: KOrV, tensor: Tensor, /) -> Codec:
        """The codec for `which` of layer `layer_index`, `tensor` `[batch, kv_heads, tokens, head_dim]`."""
        ...


CodecChoice = Codec | Policy
"""One codec for all, or a callable that picks one for `(layer_index, "k" or "v", tensor)`."""


def check_choice(codec: object) -> None:
    """Raise `TypeError`, with the remedy, for what is neither a codec nor callable."""
    if not isinstance(codec, Codec) and not callable(codec):
        raise TypeError(
            f"codec is a {type(codec).__name__}: give a codec such as kvferry.Lossless(), or a policy such as "
            "kvferry.policy.Constant(...)"
        )


def choose(codec: CodecChoice, layer_index: int, which: KOrV, tensor: Tensor) -> Codec:
    """The codec for one tensor. What can be called is asked, codecs too: a `Transform` of a whole profile is a choice.

    Raises `TypeError` for what is no choice, or chooses what is no codec, and what a policy raises.
    """
    if not callable(codec):
        check_choice(codec)
        return codec
    chosen = codec(layer_index, which, tensor)
    if not isinstance(chosen, Codec):
        raise TypeError(
            f"{codec!r} chose a {type(chosen).__name__} for layer {layer_index} {which}: a policy returns a codec, "
            "such as kvferry.Lossless()"
        )
    return chosen
