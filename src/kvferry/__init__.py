"""kvferry: KV cache compressed on its way between GPU and host, bit-identical or within a bound that you set.

Importing this needs PyTorch, NumPy and xxhash only; neither a GPU, NVRTC, transformers nor vLLM.
"""

from kvferry.api import FrameInfo, compress, decompress, inspect
from kvferry.blocks import BlockSpec
from kvferry.codecs import codecs
from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.codecs.slots import SlotCodec, decode_from_slots, encode_into_slots
from kvferry.codecs.transform import Transform
from kvferry.codecs.transform import register as register_profile
from kvferry.codecs.transform.profile import Profile
from kvferry.codecs.transform.rope import Rope
from kvferry.errors import (
    BoundTooTight,
    CorruptFrame,
    CorruptProfile,
    KVFerryError,
    OutOfDeviceMemory,
    OutOfHostMemory,
    ProfileMismatch,
    UnsupportedVersion,
)
from kvferry.pages import PagedKV
from kvferry.pipeline import Transfers
from kvferry.store import HostStore

__version__ = "0.1.0"

__all__ = [
    "BlockSpec",
    "BoundTooTight",
    "Bounded",
    "Codec",
    "CorruptFrame",
    "CorruptProfile",
    "FrameInfo",
    "HostStore",
    "KVFerryError",
    "Lossless",
    "OutOfDeviceMemory",
    "OutOfHostMemory",
    "PagedKV",
    "Profile",
    "ProfileMismatch",
    "Raw",
    "Rope",
    "SlotCodec",
    "Transfers",
    "Transform",
    "UnsupportedVersion",
    "codecs",
    "compress",
    "decode_from_slots",
    "decompress",
    "encode_into_slots",
    "inspect",
    "register_profile",
]
