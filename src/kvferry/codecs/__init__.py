"""The codecs by name, built-in ones and those that other packages register under the entry point group
`kvferry.codecs`."""

import logging
from functools import cache
from importlib.metadata import entry_points

from kvferry.codecs.base import Codec
from kvferry.codecs.bounded import Bounded
from kvferry.codecs.lossless import Lossless
from kvferry.codecs.raw import Raw
from kvferry.codecs.transform import Transform

ENTRY_POINT_GROUP = "kvferry.codecs"
BUILT_IN: tuple[type[Codec], ...] = (Raw, Lossless, Bounded, Transform)


@cache
def codecs() -> dict[str, type[Codec]]:
    """Codec classes by name. A third party's codec that cannot be loaded, or that takes a built-in name, is left out
    and logged: it must not break the others."""
    found: dict[str, type[Codec]] = {codec.name: codec for codec in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            codec = entry.load()
            if not (isinstance(codec, type) and issubclass(codec, Codec)):
                raise TypeError(f"{entry.value} is not a subclass of kvferry.Codec")
            if codec.name in found:
                raise ValueError(f"the name {codec.name!r} is taken")
            found[codec.name] = codec
        except Exception as error:  # a broken plugin may raise anything
            logging.getLogger(__name__).warning("codec %s left out: %s", entry.name, error)
    return found
