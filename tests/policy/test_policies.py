"""Policies that stay: what they choose, what they refuse, and that a store takes them."""

import pytest
import torch

import kvferry
from kvferry import Bounded, Profile, ProfileMismatch, Raw, Rope, Transform
from kvferry.policy import ByProfile, Constant, choose

BOUNDS = [(0.1, 0.05), (0.2, 0.025)]


def profile(bounds: list[tuple[float, float]] | None = BOUNDS) -> Profile:
    made = Profile.hadamard(2, 2, 16, Rope.none(16), [(0.25, 0.125), (0.5, 0.0625)])
    return made if bounds is None else made.with_bounds(bounds)


def tensor(tokens: int = 70) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


class TestChoose:
    def test_codecs_and_callables(self) -> None:
        raw = Raw()
        assert choose(raw, 0, "k", tensor()) is raw
        asked = []

        def policy(layer_index: int, which: str, values: torch.Tensor) -> kvferry.Codec:
            asked.append((layer_index, which, tuple(values.shape)))
            return raw

        assert choose(policy, 3, "v", tensor()) is raw
        assert asked == [(3, "v", (1, 2, 70, 16))]

    def test_a_transform_of_a_whole_profile_is_asked(self) -> None:
        codec = Transform(profile(), error_bound=0.5)
        assert choose(codec, 1, "v", tensor()) == Transform(codec.profile, 1, "v", 0.5)

    def test_what_is_no_choice(self) -> None:
        with pytest.raises(TypeError, match=r"codec is a str: give a codec such as kvferry.Lossless\(\), or a policy"):
            choose("lossless", 0, "k", tensor())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="chose a NoneType for layer 2 k: a policy returns a codec"):
            choose(lambda *_: None, 2, "k", tensor())  # type: ignore[arg-type, return-value]


class TestConstant:
    def test_it_is_the_same_everywhere(self) -> None:
        codec = Bounded(0.25, relative=False)
        assert all(Constant(codec)(layer, side, tensor()) is codec for layer in range(3) for side in ("k", "v"))

    def test_a_transform_is_of_each_place(self) -> None:
        codec = Transform(profile())
        assert Constant(codec)(1, "k", tensor()) == Transform(codec.profile, 1, "k")

    def test_what_is_no_codec(self) -> None:
        with pytest.raises(TypeError, match=r"codec is a str: give a codec such as kvferry.Lossless\(\)"):
            Constant("lossless")  # type: ignore[arg-type]


class TestByProfile:
    def test_transform(self) -> None:
        policy = ByProfile(profile(None), error_bound=0.5, packing="bitpack")
        for layer, side in ((0, "k"), (1, "v")):
            expected = Transform(policy.profile, layer, side, 0.5, packing="bitpack")
            assert policy(layer, side, tensor()) == expected

    @pytest.mark.parametrize("error_bound", [1.0, 0.5, 4.0])
    def test_bounded(self, error_bound: float) -> None:
        policy = ByProfile(profile(), "bounded", error_bound, "bitpack")
        for layer, bounds in enumerate(BOUNDS):
            for side, bound in zip(("k", "v"), bounds, strict=True):
                expected = Bounded(bound * error_bound, relative=False, packing="bitpack")
                assert policy(layer, side, tensor()) == expected

    def test_a_profile_without_bounds(self) -> None:
        wanted = r"no bound for layer 1 v: calibrate the model \(kvferry calibrate\)"
        with pytest.raises(ValueError, match=wanted):
            ByProfile(profile([(0.1, 0.1), (0.1, 0.0)]), "bounded")
        ByProfile(profile(None), "transform")

    @pytest.mark.parametrize("codec", ["transform", "bounded"])
    def test_a_layer_that_is_not_there(self, codec: str) -> None:
        with pytest.raises(ProfileMismatch, match="layer 2 is not in a profile of 2 layers"):
            ByProfile(profile(), codec)(2, "k", tensor())  # type: ignore[arg-type]

    @pytest.mark.parametrize("codec", ["transform", "bounded"])
    @pytest.mark.parametrize("error_bound", [0.0, -1.0, float("nan"), float("inf")])
    def test_bounds_that_are_none(self, codec: str, error_bound: float) -> None:
        with pytest.raises(ValueError, match=f"error_bound={error_bound}"):
            ByProfile(profile(), codec, error_bound)  # type: ignore[arg-type]

    def test_other_parameters(self) -> None:
        with pytest.raises(TypeError, match=r"profile is a str; load one with kvferry.Profile.load"):
            ByProfile("profile.safetensors")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="codec='raw'"):
            ByProfile(profile(), "raw")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="packing='zip'"):
            ByProfile(profile(), packing="zip")


@pytest.mark.parametrize("kind", ["choice", "constant", "transform", "bounded"])
def test_a_store_takes_them(kind: str) -> None:
    """A `Transform` of a whole profile and every policy, as the `codec` of `put_cache`."""
    transformers = pytest.importorskip("transformers")
    of = profile()
    codec = {
        "choice": Transform(of),
        "constant": Constant(Transform(of)),
        "transform": ByProfile(of),
        "bounded": ByProfile(of, "bounded"),
    }[kind]
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(tensor() * (layer + 1), tensor() / (layer + 1), layer)
    store = kvferry.HostStore(1 << 20)
    entry = store.put_cache("prompt", cache, codec)
    infos = [kvferry.inspect(frame) for frame in entry.frames]
    assert [info.codec for info in infos] == ["bounded" if kind == "bounded" else "transform"] * 4
    if kind == "bounded":
        assert [info.error_bound for info in infos] == [bound for pair in BOUNDS for bound in pair]
    assert entry.ratio > 1.5
    back = store.restore_cache("prompt")
    bounds = [info.bound_used for info in infos]
    for number, layer in enumerate(cache.layers):
        for which, found in enumerate((back.layers[number].keys, back.layers[number].values)):
            original = (layer.keys, layer.values)[which]
            assert (found.double() - original.double()).abs().max() <= bounds[2 * number + which] < 1.5


def test_a_transform_of_one_layer_is_not_for_all() -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    cache.update(tensor(), tensor(), 0)
    with pytest.raises(ValueError, match="for layer 0 k, not for layer 0 v"):
        kvferry.HostStore(1 << 20).put_cache("prompt", cache, Transform(profile(), 0, "k"))
