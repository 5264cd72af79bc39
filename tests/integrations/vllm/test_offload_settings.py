"""What an operator may set, where, and what is said of what may not be."""

import math
from typing import Any

import pytest
import torch

from kvferry import Bounded, Lossless, Raw
from kvferry.integrations.vllm.settings import OffloadSettings


def test_defaults() -> None:
    settings = OffloadSettings.read({}, {})
    assert settings == OffloadSettings()
    assert settings.codec_for(torch.bfloat16) == Bounded(1e-2, relative=True, relative_to="tile", mode="fixed")
    assert settings.ratio_for(torch.bfloat16) == 3.0
    assert settings.load_failure_policy == "recompute"


@pytest.mark.parametrize(
    ("codec", "dtype", "made", "ratio"),
    [
        ("lossless", torch.float16, Lossless(), 1.35),
        ("lossless", torch.float8_e4m3fn, Lossless(), 1.1),
        ("bounded", torch.float8_e5m2, Lossless(), 1.1),
        ("bounded", torch.uint8, Raw(), 1.0),
        ("raw", torch.bfloat16, Raw(), 1.0),
        ("raw", torch.float8_e4m3fn, Raw(), 1.0),
    ],
)
def test_codec_and_ratio_by_dtype(codec: str, dtype: torch.dtype, made: Any, ratio: float) -> None:
    settings = OffloadSettings(codec=codec)
    assert settings.codec_for(dtype) == made
    assert settings.ratio_for(dtype) == ratio


def test_a_given_ratio_does_not_promise_more_for_float8() -> None:
    settings = OffloadSettings(ratio=4.0)
    assert settings.ratio_for(torch.bfloat16) == 4.0
    assert settings.ratio_for(torch.float8_e4m3fn) == 1.1


def test_switched_off_is_raw() -> None:
    settings = OffloadSettings(enabled=False)
    assert settings.codec_for(torch.bfloat16) == Raw()
    assert "raw" in settings.identity and "bounded" not in settings.identity


def test_absolute_bounds() -> None:
    codec = OffloadSettings(relative_to="absolute", error_bound=0.05).codec_for(torch.bfloat16)
    assert isinstance(codec, Bounded) and not codec.relative and codec.error_bound == 0.05


def test_the_config_goes_before_the_environment() -> None:
    env = {
        "VLLM_ENABLE_COMPRESSION": "1",
        "VLLM_COMPRESSION_ERROR_BOUND": "0.05",
        "VLLM_COMPRESSION_MODE": "plain",
        "KVFERRY_RATIO": "2.5",
        "KVFERRY_RING_MIB": "64",
        "KVFERRY_TIMING": "no",
        "KVFERRY_CODEC": "",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    settings = OffloadSettings.read({"compression_error_bound": 0.02, "cpu_bytes_to_use": 5, "block_size": 64}, env)
    assert settings == OffloadSettings(error_bound=0.02, mode="plain", ratio=2.5, ring_mib=64, timing=False)


@pytest.mark.parametrize(
    ("extra", "env", "said"),
    [
        ({"compression_codec": "zip"}, {}, "compression_codec='zip' is none of bounded, lossless, transform, raw"),
        ({"compression_mode": "flat"}, {}, "compression_mode='flat' is none of"),
        ({"compression_error_bound": -1}, {}, "compression_error_bound=-1.0 must be .* above 0"),
        ({"compression_error_bound": math.nan}, {}, "compression_error_bound=nan"),
        ({"compression_error_bound": "small"}, {}, "compression_error_bound='small' is not a number"),
        ({"compression_error_bound": True}, {}, "compression_error_bound=True is not a number"),
        ({"compression_ratio": 0.5}, {}, "compression_ratio=0.5 must be 1 to 64"),
        ({"compression_ratio": 1000}, {}, "compression_ratio=1000.0 must be"),
        ({"compression_max_relaxations": 2.5}, {}, "compression_max_relaxations=2.5 is not a whole number"),
        ({"compression_ring_mib": 0}, {}, "compression_ring_mib=0 must be"),
        ({"compression_codec": 3}, {}, "compression_codec=3 is a int"),
        ({"compression_relative_to": "tensor"}, {}, "compression_relative_to='tensor' is none of"),
        (
            {"compression_error_bond": 0.1},
            {},
            "compression_error_bond=0.1 .* no setting: did you mean compression_error_bound",
        ),
        ({"compression_xyz": 1}, {}, "there are compression_codec"),
        ({"compression_enabled": 1}, {}, "no setting"),
        ({"enable_compression": "maybe"}, {}, "enable_compression='maybe' is neither yes nor no"),
        ({}, {"VLLM_ENABLE_COMPRESSION": "2"}, "VLLM_ENABLE_COMPRESSION='2' is neither"),
        ({}, {"VLLM_COMPRESSION_ERROR_BOUND": "x"}, "VLLM_COMPRESSION_ERROR_BOUND='x' is not a number"),
        ({}, {"VLLM_COMPRESSION_MODE": "x"}, "compression_mode='x' is none of"),
        ({}, {"KVFERRY_NUM_SMS": "0"}, "compression_num_sms=0 must be"),
    ],
)
def test_wrong_values_are_named(extra: dict[str, Any], env: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OffloadSettings.read(extra, env)


def test_identities_tell_settings_apart() -> None:
    several = [
        OffloadSettings(),
        OffloadSettings(error_bound=0.02),
        OffloadSettings(mode="plain"),
        OffloadSettings(relative_to="channel"),
        OffloadSettings(packing="bitpack"),
        OffloadSettings(overflow="reject"),
        OffloadSettings(codec="lossless"),
        OffloadSettings(codec="raw"),
    ]
    assert len({settings.identity for settings in several}) == len(several)
    # What does not change a slot's contents does not matter.
    assert OffloadSettings(ring_mib=64, num_sms=8, timing=False).identity == OffloadSettings().identity
