"""The kv-transfer-config, and the vllm serve line, that come of what a user says."""

import json
from typing import Any

import pytest

from kvferry.integrations.vllm.select import CONNECTOR, serve_command, transfer_config, without_compression


def test_the_shortest_way() -> None:
    config = transfer_config(None, 2, {})
    assert config == {
        "kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "KVFerrySpec",
            "spec_module_path": "kvferry.integrations.vllm.spec",
            "cpu_bytes_to_use": 2 << 30,
        },
    }


def test_what_the_user_wrote_stays() -> None:
    given = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": "here",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 7,
            "block_size": 128,
            "secondary_tiers": [{"type": "fs", "root_dir": "/cache"}],
        },
    }
    config = transfer_config(given, 64, {"codec": "lossless", "enabled": True})
    extra = config["kv_connector_extra_config"]
    assert config["engine_id"] == "here" and config["kv_connector"] == CONNECTOR
    assert extra["spec_name"] == "KVFerryTieringSpec" and extra["cpu_bytes_to_use"] == 7
    assert extra["compression_codec"] == "lossless" and extra["enable_compression"] is True
    assert given["kv_connector_extra_config"]["spec_name"] == "TieringOffloadingSpec"  # not altered
    back = without_compression(config)
    assert back == given


def test_tiers_choose_the_tiering_spec() -> None:
    extra = {"secondary_tiers": [{"type": "fs"}]}
    config = transfer_config({"kv_connector_extra_config": extra}, 1, {})
    assert config["kv_connector_extra_config"]["spec_name"] == "KVFerryTieringSpec"
    assert without_compression(config)["kv_connector_extra_config"]["spec_name"] == "TieringOffloadingSpec"


def test_other_connectors_are_left_alone() -> None:
    given = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    assert without_compression(given) == given


@pytest.mark.parametrize(
    ("given", "gib", "chosen", "said"),
    [
        ({"kv_connector": "NixlConnector"}, 1, {}, "kv_connector='NixlConnector' is not vLLM's OffloadingConnector"),
        ({"kv_connector_extra_config": {"spec_name": "Mine"}}, 1, {}, "spec_name='Mine'"),
        (None, None, {}, "cpu_bytes_to_use is missing: .*--kv-offloading-size"),
        (None, 0, {}, "cpu_gib=0"),
        (None, 1, {"mode": "flat"}, "compression_mode='flat'"),
    ],
)
def test_what_cannot_be(given: dict[str, Any] | None, gib: float | None, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        transfer_config(given, gib, chosen)


def test_the_serve_line() -> None:
    options = [
        "--max-model-len",
        "4096",
        '--kv-transfer-config={"kv_connector_extra_config": {"block_size": 32}}',
        "-tp=2",
    ]
    command = serve_command("m", 1, {"codec": "bounded"}, options)
    assert command[:3] == ["vllm", "serve", "m"]
    assert command[3:6] == ["--max-model-len", "4096", "-tp=2"]
    assert command[6] == "--kv-transfer-config"
    extra = json.loads(command[7])["kv_connector_extra_config"]
    assert extra["block_size"] == 32 and extra["compression_codec"] == "bounded"
    with pytest.raises(ValueError, match="is no JSON"):
        serve_command("m", 1, {}, ["--kv-transfer-config", "{kv"])
