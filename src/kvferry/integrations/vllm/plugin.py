"""vLLM's general plugin: flags on vLLM's own server, and the environment variables, for every engine of the process.

vLLM has no hook for flags, but loads plugins before it makes its parser: `EngineArgs` is wrapped in three places. The
kv-transfer-config is what they come to; whoever writes it needs none of this.
"""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from kvferry.integrations.vllm.select import CONNECTOR, DEFAULT_CPU_GIB, transfer_config, without_compression
from kvferry.integrations.vllm.settings import CODECS, ENABLE_KEY, truth
from kvferry.integrations.vllm.version import check_version

logger = logging.getLogger(__name__)

FLAGS = {
    "--compression-error-bound": (
        "error_bound",
        "Error bound: of bounded, times the range of each tile; of transform, in units of its profile.",
    ),
    "--compression-mode": ("mode", "Mode of bounded compression: fixed, plain or outlier."),
    "--compression-codec": ("codec", f"How KV cache is compressed: {', '.join(CODECS)}."),
    "--compression-ratio": ("ratio", "Raw bytes over slot bytes: how many more chunks the host memory holds."),
    "--compression-profile": ("profile", "Profile of the codec transform: a file that kvferry calibrate made."),
    "--compression-target-kl": ("target_kl", "Start only if the profile's certificate states at most so many nats."),
}
"""Flags with a value, the setting each gives, and its help."""
_ENABLE_VARIABLES = ("KVFERRY_ENABLED", "VLLM_ENABLE_COMPRESSION")
_CHOSEN = "_kvferry_chosen"
_WRAPPED = "_kvferry_wrapped"


def register() -> None:
    """What vLLM calls in each of its processes. Does not raise: vLLM must start where compression is not asked for."""
    try:
        check_version()
        from vllm.engine.arg_utils import EngineArgs

        wrap(EngineArgs)
    except Exception as error:
        if wanted_by_environment(os.environ):
            raise
        logger.warning("kvferry: compression flags are not there: %s", error)


def wanted_by_environment(env: Mapping[str, str]) -> bool | None:
    """Whether the environment switches compression on (True), off (False), or says nothing. Raises `ValueError` for a
    value that is neither."""
    for name in _ENABLE_VARIABLES:
        if env.get(name, "") != "":
            return truth(env[name], name)
    return None


def wrap(engine_args: Any) -> None:
    """Teach vLLM's `EngineArgs` our flags and variables; once."""
    if getattr(engine_args, _WRAPPED, False):
        return
    setattr(engine_args, _WRAPPED, True)
    add_cli_args, from_cli_args = engine_args.add_cli_args, engine_args.from_cli_args.__func__
    create_engine_config = engine_args.create_engine_config

    @staticmethod  # type: ignore[misc]
    @functools.wraps(add_cli_args)
    def with_flags(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(parser, *args, **kwargs)
        add_flags(parser)
        return parser

    @classmethod  # type: ignore[misc]
    @functools.wraps(from_cli_args)
    def with_choice(cls: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        made = from_cli_args(cls, args, *more, **kwargs)
        setattr(made, _CHOSEN, chosen_by_flags(args))
        return made

    @functools.wraps(create_engine_config)
    def with_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        apply(self, getattr(self, _CHOSEN, {}), os.environ)
        return create_engine_config(self, *args, **kwargs)

    engine_args.add_cli_args = with_flags
    engine_args.from_cli_args = with_choice
    engine_args.create_engine_config = with_config


def add_flags(parser: Any) -> None:
    """Our flags on vLLM's parser."""
    group = parser.add_argument_group(
        title="kvferry", description="KV cache compressed on its way to host memory (--kv-offloading-size) and back."
    )
    group.add_argument("--enable-compression", action="store_true", default=None, help="Switch it on.")
    group.add_argument(
        "--disable-compression", dest="enable_compression", action="store_false", default=None, help="Switch it off."
    )
    for flag, (_, text) in FLAGS.items():
        group.add_argument(flag, default=None, help=text)


def chosen_by_flags(args: Any) -> dict[str, Any]:
    """The settings that flags gave, without prefix; "enabled" among them if it was said."""
    given = {"enabled": getattr(args, "enable_compression", None)}
    for flag, (name, _) in FLAGS.items():
        given[name] = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
    return {name: value for name, value in given.items() if value is not None}


def apply(engine_args: Any, chosen: Mapping[str, Any], env: Mapping[str, str]) -> None:
    """Put what flags chose and the environment says into `engine_args.kv_transfer_config`.

    Flags and keys of the configuration go before the environment. A setting without a switch asks for compression
    only where our connector is named already. Raises `ValueError` for what cannot be, with its name, value and remedy.
    """
    settings = {name: value for name, value in chosen.items() if name != "enabled"}
    given = _as_dict(engine_args.kv_transfer_config)
    ours = given is not None and given.get("kv_connector") == CONNECTOR
    keyed = ours and given is not None and ENABLE_KEY in (given.get("kv_connector_extra_config") or {})
    said = wanted_by_environment(env)  # looked at in any case: a wrong value stops the start
    # What a key of our connector's configuration says, the connector itself will read.
    wanted = chosen.get("enabled", None if keyed else said)
    if wanted is None and settings and not ours:
        raise ValueError(
            f"compression_{next(iter(settings))} is given, but compression is not switched on: add --enable-compression"
        )
    if wanted is False:
        if ours and given is not None:
            engine_args.kv_transfer_config = _as_config(without_compression(given))
        return
    if wanted is None and not ours:
        return
    gib = engine_args.kv_offloading_size
    if gib is None and not ours:
        gib = DEFAULT_CPU_GIB
    config = transfer_config(given, gib, settings)
    # Or vLLM would put its own connector in place of ours.
    engine_args.kv_offloading_size = None
    engine_args.kv_transfer_config = _as_config(config)


def _as_dict(config: Any) -> dict[str, Any] | None:
    if config is None or isinstance(config, dict):
        return config
    names = ("kv_connector", "engine_id", "kv_buffer_device", "kv_role", "kv_port", "kv_connector_extra_config",
             "kv_connector_module_path", "enable_permute_local_kv", "kv_load_failure_policy")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _as_config(config: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**config)
