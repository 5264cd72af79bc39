"""How long frames can be decoded, what a copy of a profile keeps, and files that are whole or not there."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch

import kvferry
from kvferry import Profile, ProfileMismatch, Rope, Transform
from kvferry.codecs import transform
from kvferry.codecs.transform.profile import SideProfile


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has loaded none."""
    monkeypatch.setattr(transform, "_PROFILES", {})
    monkeypatch.setattr(transform, "_KEPT", {})


def profile(step: float = 0.5) -> Profile:
    return Profile.hadamard(1, 2, 8, Rope.none(8), [(step, step)])


def values() -> torch.Tensor:
    return torch.linspace(-3, 3, 2 * 9 * 8).view(2, 9, 8).bfloat16()


class TestLifetime:
    def test_a_profile_is_forgotten_with_its_last_owner(self) -> None:
        codec = Transform(profile(), 0, "k")
        frame, alive = kvferry.compress(values(), codec), weakref.ref(codec.profile)
        assert kvferry.decompress(frame).shape == (2, 9, 8)
        del codec
        gc.collect()
        assert alive() is None
        with pytest.raises(ProfileMismatch, match="register_profile"):
            kvferry.decompress(frame)

    def test_the_profile_alone_is_enough(self) -> None:
        held = profile()
        frame = kvferry.compress(values(), Transform(held, 0, "k"))
        gc.collect()
        assert kvferry.decompress(frame).shape == (2, 9, 8)

    @pytest.mark.parametrize("first_dies", [False, True])
    def test_any_of_several_that_are_the_same_will_do(self, first_dies: bool) -> None:
        codecs = [Transform(profile(), 0, "k"), Transform(profile(), 0, "k")]
        frame = kvferry.compress(values(), codecs[0])
        back = kvferry.decompress(frame)
        del codecs[0 if first_dies else 1]
        gc.collect()
        assert kvferry.decompress(frame).equal(back)

    def test_registered_ones_stay(self) -> None:
        frame = kvferry.compress(values(), Transform(profile(), 0, "k"))
        gc.collect()
        kvferry.register_profile(profile())
        gc.collect()
        assert kvferry.decompress(frame).shape == (2, 9, 8)

    def test_only_profiles_are_registered(self) -> None:
        with pytest.raises(TypeError, match=r"profile is a str; load one with kvferry.Profile.load"):
            kvferry.register_profile("profile.safetensors")  # type: ignore[arg-type]

    def test_nothing_is_left_of_many(self) -> None:
        for number in range(20):
            Transform(profile(0.5 + number / 64))
            gc.collect()
        assert len(transform._PROFILES) == 1 and not transform._KEPT


def test_a_transform_of_a_layer_is_no_choice_for_others() -> None:
    """Called for its own place it is itself; elsewhere, another basis would do harm that nobody asked for."""
    codec = Transform(profile(), 0, "k", 0.5)
    assert codec(0, "k", values()) is codec
    with pytest.raises(ValueError, match="for layer 0 k, not for layer 0 v: leave out"):
        codec(0, "v", values())


def test_copies_keep_the_spectral_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes cubic time; what it is of does not change."""
    calls = []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: (calls.append(x.shape), eigvalsh(x))[1])
    first = Profile.hadamard(3, 2, 16, Rope.none(16), [(0.5, 0.25)] * 3)
    assert len(calls) == 1
    copy = first.with_steps([(0.125, 1.0)] * 3).with_bounds([(0.1, 0.2)] * 3).with_certificate({"ratio": 4.0})
    assert [part.deviation for layer in copy.layers for part in layer] == [first.layers[0].k.deviation] * 6
    assert len(calls) == 1
    part = copy.layers[2].v
    assert SideProfile(part.mean, part.basis, part.step, part.bound).deviation == part.deviation
    assert len(calls) == 2


class TestSaving:
    pytest.importorskip("safetensors")

    @pytest.mark.parametrize("broken", ["save_file", "replace"])
    def test_a_failure_leaves_what_was_there(
        self, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "profile"
        profile().save(path)
        before = path.read_bytes()

        def half(tensors: object, name: str, metadata: object) -> None:
            Path(name).write_bytes(before[: len(before) // 2])
            raise OSError("disk full")

        def fail(*names: object) -> None:
            raise OSError("disk full")

        if broken == "save_file":
            monkeypatch.setattr("safetensors.torch.save_file", half)
        else:
            monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            profile(0.25).save(path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["profile"]

    def test_it_replaces(self, tmp_path: Path) -> None:
        path, link = tmp_path / ("p" * 250), tmp_path / "link"
        profile().save(path)
        link.symlink_to(path)
        profile(0.25).save(link)
        assert link.is_symlink()
        assert Profile.load(path).layers[0].k.step == 0.25
        assert sorted(os.listdir(tmp_path)) == ["link", "p" * 250]

    def test_into_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'.*make it first"):
            profile().save(tmp_path / "absent" / "profile")
