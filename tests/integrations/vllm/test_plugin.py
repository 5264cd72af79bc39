"""Flags and environment variables on vLLM's own server."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.integrations.vllm import plugin
from kvferry.integrations.vllm.select import CONNECTOR, transfer_config
from kvferry.integrations.vllm.version import SUPPORTED, UnsupportedVLLM, check_version


class Arguments:
    """As vLLM's EngineArgs, as far as the plugin looks at it."""

    def __init__(self, kv_transfer_config: Any = None, kv_offloading_size: float | None = None) -> None:
        self.kv_transfer_config, self.kv_offloading_size = kv_transfer_config, kv_offloading_size

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--kv-offloading-size", type=float)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "Arguments":
        return cls(kv_offloading_size=args.kv_offloading_size)

    def create_engine_config(self) -> Any:
        return self.kv_transfer_config


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of them that the plugin has wrapped, twice."""
    monkeypatch.setattr(plugin, "_as_config", lambda config: SimpleNamespace(**config))
    for name in ("VLLM_ENABLE_COMPRESSION", "KVFERRY_ENABLED"):
        monkeypatch.delenv(name, raising=False)

    class Wrapped(Arguments):
        add_cli_args = staticmethod(Arguments.add_cli_args)
        from_cli_args = classmethod(Arguments.from_cli_args.__func__)  # type: ignore[attr-defined]

    plugin.wrap(Wrapped)
    plugin.wrap(Wrapped)
    return Wrapped


def parse(arguments: Any, *words: str) -> Any:
    parser = arguments.add_cli_args(argparse.ArgumentParser())
    return arguments.from_cli_args(parser.parse_args(words))


def test_nothing_is_asked(arguments: Any) -> None:
    assert parse(arguments).create_engine_config() is None
    made = parse(arguments, "--kv-offloading-size", "4")
    assert made.create_engine_config() is None and made.kv_offloading_size == 4


def test_flags(arguments: Any) -> None:
    made = parse(
        arguments, "--enable-compression", "--compression-error-bound", "0.02", "--compression-mode", "plain",
        "--kv-offloading-size", "3",
    )  # fmt: skip
    config = made.create_engine_config()
    assert config.kv_connector == CONNECTOR
    extra = config.kv_connector_extra_config
    assert extra["cpu_bytes_to_use"] == 3 << 30
    assert (extra["compression_error_bound"], extra["compression_mode"]) == ("0.02", "plain")
    assert made.kv_offloading_size is None  # or vLLM would put its own connector there


def test_other_flags(arguments: Any) -> None:
    words = ("--enable-compression", "--compression-codec", "lossless", "--compression-ratio", "1.5")
    extra = parse(arguments, *words).create_engine_config().kv_connector_extra_config
    assert (extra["compression_codec"], extra["compression_ratio"]) == ("lossless", "1.5")
    assert extra["cpu_bytes_to_use"] == 16 << 30


def test_the_environment_switches_it_on_and_flags_off(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", "1")
    assert arguments().create_engine_config().kv_connector == CONNECTOR
    assert parse(arguments, "--disable-compression").create_engine_config() is None
    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", "maybe")
    with pytest.raises(ValueError, match="VLLM_ENABLE_COMPRESSION='maybe'"):
        arguments().create_engine_config()


def test_switching_off_puts_vllms_connector_back(arguments: Any) -> None:
    made = arguments(transfer_config(None, 1, {"codec": "lossless"}))
    made._kvferry_chosen = {"enabled": False}
    config = made.create_engine_config()
    assert config.kv_connector == "OffloadingConnector"
    assert not [key for key in config.kv_connector_extra_config if "compression" in key]


@pytest.mark.parametrize("key", [True, False])
def test_a_key_goes_before_the_environment(arguments: Any, monkeypatch: pytest.MonkeyPatch, key: bool) -> None:
    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", str(int(not key)))
    config = arguments(transfer_config(None, 1, {"enabled": key})).create_engine_config()
    assert config.kv_connector == CONNECTOR
    assert config.kv_connector_extra_config["enable_compression"] is key


def test_without_a_key_the_environment_decides(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", "0")
    assert arguments(transfer_config(None, 1, {})).create_engine_config().kv_connector == "OffloadingConnector"


def test_settings_reach_a_connector_that_is_named(arguments: Any) -> None:
    made = arguments(transfer_config(None, 1, {}))
    made._kvferry_chosen = {"error_bound": "0.5"}
    assert made.create_engine_config().kv_connector_extra_config["compression_error_bound"] == "0.5"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compression-mode", "plain"], "add --enable-compression"),
        (["--enable-compression", "--compression-mode", "flat"], "compression_mode='flat'"),
        (["--enable-compression", "--compression-error-bound", "-1"], "compression_error_bound=-1.0"),
    ],
)
def test_wrong_flags(arguments: Any, words: list[str], said: str) -> None:
    made = parse(arguments, *words)
    with pytest.raises(ValueError, match=said):
        made.create_engine_config()


def test_versions() -> None:
    check_version(f"{SUPPORTED[0]}.7")
    for version in ("0.24.0", "0.34.1", "1.0.0"):
        with pytest.raises(UnsupportedVLLM, match=rf"{version} is installed; kvferry works with 0\.33\.x"):
            check_version(version)


def test_an_unsupported_version_matters_if_compression_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedVLLM("vLLM 9.9 is installed")

    monkeypatch.setattr(plugin, "check_version", refuse)
    monkeypatch.delenv("KVFERRY_ENABLED", raising=False)
    monkeypatch.delenv("VLLM_ENABLE_COMPRESSION", raising=False)
    plugin.register()  # a line in the log
    monkeypatch.setenv("VLLM_ENABLE_COMPRESSION", "1")
    with pytest.raises(UnsupportedVLLM):
        plugin.register()
