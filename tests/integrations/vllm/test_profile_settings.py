"""Settings of the codec transform, and what its profile must be."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from profile_files import HEAD_DIM, HEADS, LAYERS, make_file, rope

pytest.importorskip("safetensors")

from kvferry import Lossless, Profile, ProfileMismatch, Transform
from kvferry.integrations.vllm.profiles import check_model, default_ratio, load_profile
from kvferry.integrations.vllm.settings import OffloadSettings


@pytest.fixture
def path(tmp_path: Path) -> str:
    return make_file(tmp_path)


def read(path: str, **more: Any) -> OffloadSettings:
    given = {"codec": "transform", "profile": path, **more}
    return OffloadSettings.read({f"compression_{name}": value for name, value in given.items()}, {})


def test_the_codec_is_the_profiles(path: str) -> None:
    settings = read(path)
    codec = settings.codec_for(torch.bfloat16)
    assert isinstance(codec, Transform) and codec.error_bound == 1.0
    assert codec.profile.digest == Profile.load(path).digest
    assert settings.codec_for(torch.float16) == codec
    own = settings.codec_for(torch.bfloat16, (1, 1))
    assert isinstance(own, Transform) and own.profile.heads == 1
    assert own.profile is settings.codec_for(torch.bfloat16, (1, 1)).profile  # type: ignore[attr-defined]
    assert settings.codec_for(torch.float8_e4m3fn) == Lossless()
    assert read(path, error_bound="0.25", packing="bitpack").codec_for(torch.bfloat16) == Transform(
        codec.profile, error_bound=0.25, packing="bitpack"
    )


def test_bounded_keeps_its_own_default_bound(path: str) -> None:
    assert OffloadSettings.read({}, {}).bound == 0.01 and read(path).bound == 1.0
    assert OffloadSettings(error_bound=0.5).bound == 0.5


def test_a_profile_chooses_the_codec(path: str) -> None:
    assert OffloadSettings.read({"compression_profile": path}, {}).codec == "transform"
    for name in ("KVFERRY_PROFILE", "VLLM_COMPRESSION_PROFILE"):
        assert OffloadSettings.read({}, {name: path}).profile == path
    env = {"VLLM_COMPRESSION_PROFILE": path, "VLLM_COMPRESSION_TARGET_KL": "0.5", "KVFERRY_CODEC": "transform"}
    assert OffloadSettings.read({}, env) == OffloadSettings(codec="transform", profile=path, target_kl=0.5)


def test_the_ratio_is_what_the_certificate_states_and_a_little_less(path: str, tmp_path: Path) -> None:
    assert read(path).ratio_for(torch.bfloat16) == 3.62  # 0.93 x 3.9
    assert read(path, error_bound=2.0).ratio_for(torch.bfloat16) == 3.62
    # Two bits more of 16 / 3.9.
    assert read(path, error_bound=0.25).ratio_for(torch.bfloat16) == 2.43
    assert read(path, error_bound=1e-6).ratio_for(torch.bfloat16) == 1.0
    assert read(path, ratio=5).ratio_for(torch.bfloat16) == 5.0
    assert read(path).ratio_for(torch.float8_e4m3fn) == 1.1
    bare = make_file(tmp_path, certified=False)
    assert read(bare, ratio=2.5).ratio_for(torch.bfloat16) == 2.5
    with pytest.raises(ValueError, match="no certificate that states a ratio: set compression_ratio"):
        read(bare).ratio_for(torch.bfloat16)


@pytest.mark.parametrize("stated", [{}, {"held_out": 3}, {"held_out": {"transform": {"ratio": "much"}}}])
def test_certificates_of_another_make(path: str, stated: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no certificate"):
        default_ratio(load_profile(path).with_certificate(stated), 1.0)


def test_a_target_is_compared_with_the_certificate(path: str, tmp_path: Path) -> None:
    assert read(path, target_kl=0.004).load_profile().heads == HEADS
    said = r"compression_target_kl=0.003, but the certificate of .*profile.safetensors states a KL of 0.004 nats"
    with pytest.raises(ValueError, match=said):
        read(path, target_kl="0.003").load_profile()
    with pytest.raises(ValueError, match=r"is for compression_error_bound 1\.0, not 2"):
        read(path, target_kl=0.01, error_bound=2).load_profile()
    bare = make_file(tmp_path, certified=False)
    with pytest.raises(ValueError, match="has no certificate that states a KL"):
        read(bare, target_kl=0.01).load_profile()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"codec": "transform"}, "compression_codec=transform needs compression_profile"),
        ({"codec": "bounded", "profile": "PATH"}, "compression_profile='.*' goes with compression_codec=transform"),
        ({"codec": "lossless", "target_kl": 0.1}, "compression_target_kl=0.1 goes with compression_codec=transform"),
        ({"profile": "/no/such/file"}, "compression_profile='/no/such/file': there is no such file"),
        ({"profile": "PATH", "target_kl": 0}, "compression_target_kl=0.0 must be a finite number above 0"),
        ({"profile": "PATH", "target_kl": "low"}, "compression_target_kl='low' is not a number"),
        ({"profile": 7}, "compression_profile=7 is a int"),
        ({"profile": "PATH", "error_bound": 0}, "compression_error_bound=0.0 must be"),
        ({"profile": "PATH", "max_relaxations": 20}, "compression_codec=transform: max_relaxations=20 must be 0 to 12"),
        ({"profile": "PATH", "error_bound": 100}, "error_bound=100, doubled up to 8 times, is above"),
        ({"profile": "PATH", "overflow": "fit", "error_bound": 1}, "compression_error_bound=1.0 has no meaning with"),
        ({"profile": "PATH", "overflow": "fit", "target_kl": 1}, "compression_target_kl=1.0 has no meaning with"),
        ({"codec": "bounded", "overflow": "fit"}, "compression_overflow='fit' goes with compression_codec=transform"),
    ],
)
def test_what_cannot_be(path: str, given: dict[str, Any], said: str) -> None:
    extra = {f"compression_{name}": path if value == "PATH" else value for name, value in given.items()}
    with pytest.raises(ValueError, match=said):
        OffloadSettings.read(extra, {})


def test_identities_hold_the_profile_and_the_bound(path: str, tmp_path: Path) -> None:
    one = read(path).identity
    assert Profile.load(path).digest in one and "-1.0-" in one
    (tmp_path / "other").mkdir()
    other = make_file(tmp_path / "other", step=0.06)
    same = Path(tmp_path, "copy.safetensors")
    same.write_bytes(Path(path).read_bytes())
    assert read(str(same)).identity == one == read(path, target_kl=1).identity
    assert (
        len({one, read(other).identity, read(path, error_bound=0.5).identity, read(path, overflow="reject").identity})
        == 4
    )


def test_a_file_is_read_again_when_it_is_replaced(path: str) -> None:
    first = load_profile(path)
    assert load_profile(path) is first
    make_file(Path(path).parent, step=0.07)
    os.utime(path, ns=(1, 1))
    assert load_profile(path).digest != first.digest
    Path(path).unlink()
    with pytest.raises(FileNotFoundError, match="make one with kvferry calibrate"):
        load_profile(path)


def config(**changes: Any) -> SimpleNamespace:
    """As transformers has it."""
    stated = {"num_attention_heads": 4, "hidden_size": 128, "head_dim": HEAD_DIM, "rope_theta": 10000.0}
    return SimpleNamespace(**(stated | changes))


SHAPE = {"layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM}


def test_a_model_that_is_the_profiles(path: str) -> None:
    check_model(load_profile(path), **SHAPE, text_config=config())


@pytest.mark.parametrize(
    ("changes", "stated", "said"),
    [
        ({"layers": 3}, {}, "layers=2, this one has 3: calibrate this model"),
        ({"heads": 8}, {}, "heads=2, this one has 8"),
        ({"head_dim": 64}, {}, "head_dim=32, this one has 64"),
        ({}, {"rope_theta": 5e5}, "another RoPE"),
        ({}, {"partial_rotary_factor": 0.5}, "another RoPE .rotary_dim=32, against 16"),
        ({}, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope.*--no-rope"),
    ],
)
def test_a_model_that_is_not(path: str, changes: dict[str, Any], stated: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileMismatch, match=said):
        check_model(load_profile(path), **{**SHAPE, **changes}, text_config=config(**stated))


def test_a_profile_without_rope_asks_for_none() -> None:
    flat = Profile.hadamard(LAYERS, HEADS, HEAD_DIM, rope().none(HEAD_DIM), [(1.0, 1.0)] * LAYERS)
    check_model(flat, **SHAPE, text_config=config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}))
