"""The `bitpack` packer fused with both codecs, in Triton."""

from kvferry.codecs.fused.bitpack_decode import decode_bounded, decode_lossless
from kvferry.codecs.fused.bitpack_encode import encode_bounded, encode_lossless

__all__ = ["decode_bounded", "decode_lossless", "encode_bounded", "encode_lossless"]
