"""From model and text to a profile that keeps what its certificate says; interrupted, and refused."""

import dataclasses
import json

import pytest
import torch

import kvferry
from kvferry.calibration import Settings, calibrate, certified_schemes, check_model
from kvferry.calibration import run as run_module
from kvferry.calibration.identity import probe_cache
from kvferry.calibration.windows import split_text
from kvferry.evaluation import evaluate_prefix

transformers = pytest.importorskip("transformers")

SMALL = Settings(windows=3, window_tokens=256, held_out=1)


@pytest.fixture(scope="module")
def profile(source, tmp_path_factory):
    """Of the built-in model, for the KL of fp8, on a few short windows."""
    state = tmp_path_factory.mktemp("calibration") / "profile.state"
    profile = calibrate(source.model, source.documents, SMALL, name="built-in", text="held-out", state=state)
    assert not state.exists()
    return profile


def measured(source, profile, settings, part):
    windows = split_text(source.documents, settings.protocol.window, settings.windows, settings.held_out)
    schemes = certified_schemes(profile)
    results = evaluate_prefix(source.model, getattr(windows, part), list(schemes.values()), settings.protocol)
    return dict(zip(schemes, results, strict=True))


def test_the_profile_loads_and_its_certificate_is_reproduced(source, profile, tmp_path):
    profile.save(tmp_path / "a.safetensors")
    loaded = kvferry.Profile.load(tmp_path / "a.safetensors")
    loaded.check(layers=4, heads=2, head_dim=64, rope=kvferry.Rope.from_config(source.model.config))
    check_model(loaded, source.model)
    assert loaded.certificate == json.loads(json.dumps(profile.certificate))
    certificate = loaded.certificate
    assert certificate["text"]["name"] == "held-out"
    assert "fp8" in certificate["target"]["from"]
    for part in ("held_out", "unseen"):
        results = measured(source, loaded, SMALL, part)
        for name, result in results.items():
            assert result.ratio == certificate[part][name]["ratio"]
            assert result.kl_nats == certificate[part][name]["kl_nats"]
            assert result.guarantee_kept
    held_out = certificate["held_out"]
    assert certificate["target"]["kl_nats"] == held_out["fp8"]["kl_nats"]
    for name in ("transform", "bounded"):
        assert held_out[name]["kl_nats"] <= held_out["fp8"]["kl_nats"]
        assert held_out[name]["ratio"] > 1.3 * held_out["fp8"]["ratio"]
    assert held_out["transform"]["ratio"] > held_out["bounded"]["ratio"]


def test_a_ratio_is_met_by_both_codecs(source):
    settings = Settings(windows=3, window_tokens=256, held_out=1, target_ratio=5.0, scope="head")
    profile = calibrate(source.model, source.documents, settings)
    assert profile.group_heads == 1
    for name in ("transform", "bounded"):
        assert 5.0 <= profile.certificate["held_out"][name]["ratio"] < 5.1
    assert profile.certificate["target"] == {"kind": "ratio", "ratio": 5.0, "from": "given"}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("stage", "after"), [("moments", 2), ("sensitivities", 1), ("steps", 3)])
def test_what_was_interrupted_goes_on_to_the_same_profile(source, profile, tmp_path, monkeypatch, stage, after):
    monkeypatch.setattr("kvferry.calibration.state.SAVE_EVERY_S", 0.0)
    state = tmp_path / "state"

    def interrupt(at, done, total, remark):
        if (at, done) == (stage, after):
            raise Interrupted

    with pytest.raises(Interrupted):
        calibrate(source.model, source.documents, SMALL, name="built-in", state=state, report=interrupt)
    seen = []
    resumed = calibrate(
        source.model, source.documents, SMALL, name="built-in", text="held-out", state=state,
        report=lambda at, done, total, remark: seen.append((at, done)),
    )  # fmt: skip
    first = ("sensitivities", 1) if stage == "sensitivities" else ("moments", 2 if stage == "moments" else 3)
    assert first in seen
    assert ("moments", 0) not in seen
    assert (("sensitivities", 0) in seen) == (stage == "moments")
    assert resumed.digest == profile.digest
    assert resumed.certificate == profile.certificate
    assert not state.exists()


def test_a_state_of_something_else_is_refused(source, tmp_path):
    state = tmp_path / "state"

    def interrupt(at, done, total, remark):
        if at == "bases":
            raise Interrupted

    def begin(model=source.model, documents=source.documents, settings=SMALL, **options):
        calibrate(model, documents, settings, state=state, report=interrupt, **options)

    with pytest.raises(Interrupted):
        begin()
    other = transformers.LlamaForCausalLM(source.model.config).to(torch.bfloat16).eval()
    with pytest.raises(ValueError, match=r"another calibration: weights was .*--fresh"):
        begin(model=other)
    with pytest.raises(ValueError, match="moment_windows was"):
        begin(documents=source.documents[::-1])
    with pytest.raises(ValueError, match="group_heads was 2, and is 1 now"):
        begin(settings=dataclasses.replace(SMALL, scope="head"))
    with pytest.raises(Interrupted):  # the target may change
        begin(settings=dataclasses.replace(SMALL, target_ratio=5.0))
    state.write_bytes(b"noise")
    with pytest.raises(ValueError, match="damaged: begin anew"):
        begin()
    with pytest.raises(Interrupted):
        begin(fresh=True)


def test_profiles_of_other_models_are_refused(source, profile):
    config = source.model.config

    def model(**changes):
        changed = transformers.LlamaConfig(**{**config.to_dict(), **changes})
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(changed).to(torch.bfloat16).eval()

    for other, message in (
        (model(), "weights"),
        (model(num_hidden_layers=3), "layers=4, this one has 3"),
        (model(num_key_value_heads=4), "heads=2, this one has 4"),
        (model(head_dim=32), "head_dim=64, this one has 32"),
        (model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "RoPE"),
    ):
        with pytest.raises(kvferry.ProfileMismatch, match=message):
            check_model(profile, other)
    in_half = model().to(torch.float16)
    in_half.load_state_dict(source.model.state_dict())
    with pytest.raises(kvferry.ProfileMismatch, match="dtype bfloat16; this model has float16"):
        check_model(profile, in_half)


def test_a_rope_that_the_keys_do_not_show_is_noticed(source):
    shape, rope = probe_cache(source.model, 7)
    assert (shape.layers, shape.heads, shape.head_dim) == (4, 2, 64)
    wrong = dataclasses.replace(rope, inv_freq=tuple(f / 8 for f in rope.inv_freq))
    with pytest.raises(ValueError, match=r"keys of layer 0 are not rotated .*--no-rope"):
        probe_cache(source.model, 7, wrong)
    assert probe_cache(source.model, 7, kvferry.Rope.none(64))[1] == kvferry.Rope.none(64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": 1e-3, "target_ratio": 4.0}, "exclude each other"),
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_ratio": 1.0}, "target_ratio is 1.0"),
        ({"windows": 0}, "windows is 0"),
        ({"window_tokens": 8}, "window_tokens is 8"),
        ({"held_out": 0}, "held_out is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_models_and_texts_that_cannot_be_are_refused(source):
    with pytest.raises(ValueError, match="context of 4096"):
        calibrate(source.model, [torch.ones(90_000, dtype=torch.int64)], Settings(window_tokens=5000, windows=1))
    with pytest.raises(ValueError, match="fewer or shorter windows"):
        calibrate(source.model, source.documents, Settings())
    sliding = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, sliding_window=32,
        )
    ).to(torch.bfloat16).eval()  # fmt: skip
    text = [torch.arange(97).repeat(30)]
    with pytest.raises(ValueError, match="sliding-window attention"):
        calibrate(sliding, text, SMALL)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        calibrate(transformers.LlamaForCausalLM(source.model.config).eval(), source.documents, SMALL)


def test_a_target_out_of_reach_leaves_the_state(source, tmp_path):
    """So that another target need not measure again."""
    settings = dataclasses.replace(SMALL, target_kl=1e-7)
    with pytest.raises(ValueError, match="larger --target-kl"):
        calibrate(source.model, source.documents, settings, state=tmp_path / "state")
    assert (tmp_path / "state").is_file()
    assert run_module.StateFile(tmp_path / "state", {}).load()["sensitivities"].shape == (4, 2)
