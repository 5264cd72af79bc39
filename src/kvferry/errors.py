"""The exceptions kvferry raises on purpose; bad arguments raise plain `ValueError` or `TypeError`."""


class KVFerryError(Exception):
    """Base of every error that is about data, formats or resources rather than about an argument."""


class CorruptFrame(KVFerryError):
    """The bytes are not a well-formed frame: truncated, altered, or contradicting themselves. Nothing was decoded."""


class UnsupportedVersion(KVFerryError):
    """The frame is from another format version, or from a codec that this installation does not have."""


class BoundTooTight(KVFerryError):
    """A chunk does not fit its slot at the error bound that was asked, and relaxing the bound is not allowed."""


class OutOfHostMemory(KVFerryError):
    """The host store cannot hold the entry: it is larger than the store, or everything else is pinned."""


class OutOfDeviceMemory(KVFerryError):
    """The memory that transfers need on a GPU, once and for all, is not free there."""


class CorruptProfile(KVFerryError):
    """The file is no profile of the transform codec, or it was altered."""


class ProfileMismatch(KVFerryError):
    """A profile of another model, shape or RoPE than what it is used on, or one that is not loaded."""
