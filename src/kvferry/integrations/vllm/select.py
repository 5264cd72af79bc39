"""How vLLM is told to use kvferry: the kv-transfer-config, made from what the user said. Needs no vLLM."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvferry.integrations.vllm.settings import ENABLE_KEY, PREFIX, OffloadSettings

CONNECTOR = "KVFerryConnector"
CONNECTOR_MODULE = "kvferry.integrations.vllm.connector"
SPEC = "KVFerrySpec"
TIERING_SPEC = "KVFerryTieringSpec"
SPEC_MODULE = "kvferry.integrations.vllm.spec"
DEFAULT_CPU_GIB = 16.0
_STOCK = "OffloadingConnector"
_OURS = {"CPUOffloadingSpec": SPEC, "TieringOffloadingSpec": TIERING_SPEC}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_GIB = 1 << 30


def complete_extra_config(extra: dict[str, Any]) -> None:
    """Name our spec in `extra` where it names vLLM's or none: the tiering one if there are secondary tiers. Raises
    `ValueError` for another spec."""
    named = extra.get("spec_name")
    if named is None:
        extra["spec_name"] = TIERING_SPEC if extra.get("secondary_tiers") else SPEC
    elif named in _OURS:
        extra["spec_name"] = _OURS[named]
    elif named not in (SPEC, TIERING_SPEC):
        raise ValueError(f"spec_name={named!r} is no spec that can be compressed: leave it out")
    extra["spec_module_path"] = SPEC_MODULE


def transfer_config(
    given: Mapping[str, Any] | None, cpu_gib: float | None, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """A kv-transfer-config that compresses: `given` (the user's, if any) with our connector in the place of vLLM's,
    `cpu_gib` of host memory unless `given` says how much, and `chosen` settings (their names without prefix).

    Raises `ValueError` for settings that cannot be, and for a connector that cannot be replaced.
    """
    config = dict(given or {})
    connector = config.get("kv_connector")
    if connector not in (None, _STOCK, CONNECTOR):
        raise ValueError(
            f"kv_connector={connector!r} is not vLLM's {_STOCK}, which is what compression stands in for: leave out "
            "--kv-transfer-config, or compression (--disable-compression)"
        )
    extra = dict(config.get("kv_connector_extra_config") or {})
    extra.pop("spec_module_path", None)
    complete_extra_config(extra)
    for name, value in chosen.items():
        extra[ENABLE_KEY if name == "enabled" else PREFIX + name] = value
    if cpu_gib is not None and "cpu_bytes_to_use" not in extra:
        if not 0 < cpu_gib < 1 << 20:
            raise ValueError(f"cpu_gib={cpu_gib!r} must be above 0: the GiB of host memory to use, such as 64")
        extra["cpu_bytes_to_use"] = int(cpu_gib * _GIB)
    if "cpu_bytes_to_use" not in extra:
        raise ValueError("cpu_bytes_to_use is missing: say how much host memory to use, --kv-offloading-size GIB")
    OffloadSettings.read(extra)
    return {
        **config,
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": config.get("kv_role") or "kv_both",
        "kv_connector_extra_config": extra,
    }


def without_compression(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with vLLM's own connector and spec where it names ours."""
    config = dict(given)
    if config.get("kv_connector") != CONNECTOR:
        return config
    extra = {
        key: value
        for key, value in (config.get("kv_connector_extra_config") or {}).items()
        if not key.startswith(PREFIX) and key not in (ENABLE_KEY, "spec_module_path")
    }
    if extra.get("spec_name") in _THEIRS:
        extra["spec_name"] = _THEIRS[extra["spec_name"]]
    elif extra.get("secondary_tiers"):
        extra["spec_name"] = "TieringOffloadingSpec"
    config.pop("kv_connector_module_path", None)
    return {**config, "kv_connector": _STOCK, "kv_connector_extra_config": extra}


def serve_command(model: str, cpu_gib: float | None, chosen: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """The `vllm serve` command that serves `model` with compression; `options` are the user's other options, a
    --kv-transfer-config among them is taken over. Raises `ValueError` as `transfer_config` does."""
    given, rest = _take_transfer_config(options)
    config = transfer_config(given, cpu_gib, chosen)
    return ["vllm", "serve", model, *rest, "--kv-transfer-config", json.dumps(config)]


def _take_transfer_config(options: Sequence[str]) -> tuple[dict[str, Any] | None, list[str]]:
    rest: list[str] = []
    given = None
    waiting = iter(options)
    for option in waiting:
        name, equals, value = option.partition("=")
        if name.replace("_", "-") != "--kv-transfer-config":
            rest.append(option)
            continue
        text = value if equals else next(waiting, "")
        try:
            given = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--kv-transfer-config {text!r} is no JSON ({error}): quote it as one word") from error
    return given, rest
